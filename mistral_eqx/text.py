"""Text in, text out: a model together with its tokenizer."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import jax.random as jr
from jax.sharding import Mesh
from jax.typing import DTypeLike

from . import beams, generation, scoring
from .decoding import BLOCK
from .files.checkpoint import load_model
from .files.folders import read_config
from .generation import Continuation
from .sampling import Sampling, SamplingOptions
from .scoring import Scored
from .tokenizer import Detokenizer, Tokenizer, check_vocabulary, load_tokenizer
from .transformer import Transformer


TINY_MISTRAL = Path(__file__).parent / "tiny_mistral"


@dataclasses.dataclass
class Completion:
    """How a prompt was continued. `str()` of it is the prompt and the text behind it.

    **Attributes:**

    - `prompt`: the text that was continued.
    - `text`: what was written behind it, without a stop string.
    - `tokens`: the ids that were made, those of a stop string included.
    - `logprobs`: the log-probability of each, in nats, as the model has it: temperature,
        penalty and filters do not change it.
    - `alternatives`: the most probable ids at each place and their log-probabilities.
    - `reason`: why it ended: "eos" if the model ended it, "length" at `max_tokens`,
        "stop" at a stop string.
    - `score`: of a beam: the sum of `logprobs`, that of the end-of-sequence id included,
        over the length to the power of the length penalty.
    """

    prompt: str = ""
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)
    reason: str | None = None
    score: float | None = None

    def __str__(self) -> str:
        return self.prompt + self.text

    @property
    def perplexity(self) -> float:
        """How many equally probable tokens would have been as hard to guess."""
        return scoring.perplexity(self.logprobs)


def load(
    folder: str | os.PathLike | None = None,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a model and its tokenizer.

    **Arguments:**

    - `folder`: in Mistral's own format or in Hugging Face's, with a `tokenizer.model` or
        a `tekken.json`. Without it, the model that comes with this package, which has
        read Shakespeare and the Bible.
    - `dtype`, `mesh`: of the weights, and where they go; see
        [`load_model`][mistral_eqx.load_model].

    **Raises:**

    `FileNotFoundError` and `ValueError` as `load_model` does, also if the tokenizer has
    other ids than the model.
    """
    folder = TINY_MISTRAL if folder is None else Path(folder)
    # The tokenizer first: it is read in no time, and the weights may take minutes.
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    return load_model(folder, dtype=dtype, mesh=mesh), tokenizer


@overload
def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: str, **options
) -> Completion: ...


@overload
def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options
) -> list[Completion]: ...


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_tokens: int | Sequence[int] = 64,
    stop: str | Sequence[str] = (),
    alternatives: int = 0,
    chunk: int | None = None,
    seed: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> Completion | list[Completion]:
    """Continues a text, or a batch of texts of any lengths.

    **Arguments:**

    - `model`, `tokenizer`: as [`load`][mistral_eqx.load] returns them.
    - `prompts`: one text or several. An empty one asks for a text from its beginning.
    - `max_tokens`: the most tokens to write behind each: one number, or one for each.
    - `stop`: strings that end a text where the first of them would stand.
    - `alternatives`: how many of the most probable tokens to tell at each place.
    - `chunk`: the most tokens of a prompt that go through the model at once.
    - `seed`: of the draws. The same seed gives a prompt the same text, alone or in any
        batch; copies of a prompt within a batch get different ones.
    - `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`: see
        [`Sampling`][mistral_eqx.Sampling]. By default the most probable token is taken.

    **Returns:**

    A [`Completion`][] for one text, a list of them for several.

    **Raises:**

    `ValueError` for an empty list of prompts, or an option outside its range.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    writers = [Writer(tokenizer, text, stop=stop) for text in texts]
    pieces = write(
        model,
        tokenizer,
        writers,
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),
        alternatives=alternatives,
        chunk=chunk,
        # Tokens behind a stop string are made for nothing.
        block=8 if stop else BLOCK,
        seed=seed,
    )
    for _ in pieces:
        pass
    completions = [writer.completion for writer in writers]
    return completions[0] if isinstance(prompts, str) else completions


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 64,
    stop: str | Sequence[str] = (),
    chunk: int | None = None,
    seed: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Continues a text and yields what is written as soon as it is certain: whole
    characters, and nothing that a stop string may begin with. The pieces together are the
    `text` that [`generate`][mistral_eqx.generate] returns, which see for the arguments."""
    writer = Writer(tokenizer, prompt, stop=stop)
    options = {"max_tokens": max_tokens, "chunk": chunk, "seed": seed}
    options["sampling"] = Sampling(**sampling)
    pieces = write(model, tokenizer, [writer], **options)
    return (piece for (piece,) in pieces if piece)


@overload
def beam_search(
    model: Transformer, tokenizer: Tokenizer, prompts: str, **options
) -> list[Completion]: ...


@overload
def beam_search(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options
) -> list[list[Completion]]: ...


def beam_search(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    n_beams: int,
    max_tokens: int = 64,
    **options: Any,
) -> list[Completion] | list[list[Completion]]:
    """Searches for the most probable continuations of a text, or of several.

    **Arguments:** `model`, `tokenizer` and `prompts` are those of
    [`generate`][mistral_eqx.generate], the options those of
    [`mistral_eqx.beams.beam_search`][].

    **Returns:**

    The `n_best` best [`Completion`][]s, the best first, with their `score`; for several
    texts a list of those.

    **Raises:**

    `ValueError` for an option outside its range.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    encoded = [tokenizer.encode(text) for text in texts]
    found = beams.beam_search(
        model,
        encoded,
        n_beams=n_beams,
        max_tokens=max_tokens,
        eos_ids=[tokenizer.eos_id],
        **options,
    )
    completions = []
    for text, row in zip(texts, found):
        completions.append([])
        for beam in row:
            writer = Writer(tokenizer, text)
            writer.add(beam)
            writer.completion.score = beam.score
            completions[-1].append(writer.completion)
    return completions[0] if isinstance(prompts, str) else completions


def score(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    alternatives: int = 0,
    chunk: int | None = None,
) -> Scored:
    """How probable a model finds a text: its tokens, their log-probabilities, and the
    perplexity. The text may be of any length; each token is scored after those before it
    that the window lets the model see.

    **Arguments:**

    - `model`, `tokenizer`: as [`load`][mistral_eqx.load] returns them.
    - `text`: not empty.
    - `alternatives`: of how many of the most probable tokens to tell at each place.
    - `chunk`: the most tokens that go through the model at once.

    **Raises:**

    `ValueError` for an empty text.
    """
    if not text:
        raise ValueError("The text is empty: there is nothing to score.")
    ids = tokenizer.encode(text)
    return scoring.score(model, ids, alternatives=alternatives, chunk=chunk)


class Writer:
    """One row's text, as its tokens come: decoded, and ended at a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        *,
        stop: str | Sequence[str] = (),
    ):
        """**Arguments:**

        - `tokenizer`: of the tokens.
        - `prompt`: the text that is continued; or ids, as those of a conversation, behind
            which a text of its own begins.
        - `stop`: strings that end the text.

        **Raises:**

        `ValueError` for an empty stop string.
        """
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("A stop string is empty: every text would end at once.")
        of_text = isinstance(prompt, str)
        self.ids = tokenizer.encode(prompt) if of_text else list(prompt)
        self.completion = Completion(prompt=prompt if of_text else tokenizer.decode(prompt))
        self._detokenizer = Detokenizer(tokenizer, self.ids if of_text else ())
        # What may be the beginning of a stop string.
        self._held = ""

    def add(self, made: Continuation | beams.Beam) -> str:
        """The text that new tokens make certain. Nothing is added behind the end."""
        completion, pieces = self.completion, []
        for i, token in enumerate(made.tokens):
            if completion.reason is not None:
                break
            completion.tokens.append(token)
            completion.logprobs.append(made.logprobs[i])
            completion.alternatives += made.alternatives[i : i + 1]
            pieces.append(self._certain(self._detokenizer.add([token])))
        if completion.reason is None and made.reason is not None:
            pieces.append(self._certain(self._detokenizer.end()))
            if completion.reason is None:
                completion.reason = made.reason
                pieces.append(self._held)
        piece = "".join(pieces)
        completion.text += piece
        return piece

    def _certain(self, text: str) -> str:
        held = self._held + text
        ends = [(held.find(s) + len(s), held.find(s)) for s in self._stop if s in held]
        if ends:
            # The one that is whole first, so that it does not matter how the text comes.
            self.completion.reason = "stop"
            return held[: min(ends)[1]]
        longest = max(map(len, self._stop), default=1) - 1
        beginnings = (
            n
            for n in range(min(longest, len(held)), 0, -1)
            if any(stop.startswith(held[-n:]) for stop in self._stop)
        )
        certain = len(held) - next(beginnings, 0)
        self._held = held[certain:]
        return held[:certain]


def write(
    model: Transformer,
    tokenizer: Tokenizer,
    writers: Sequence[Writer],
    *,
    seed: int,
    **options: Any,
) -> Iterator[list[str]]:
    """Lets a model write for every writer, and yields the new text of each. The options are
    those of [`mistral_eqx.generation.stream`][]."""
    blocks = generation.stream(
        model,
        [writer.ids for writer in writers],
        eos_ids=[tokenizer.eos_id],
        stopped=lambda: [writer.completion.reason == "stop" for writer in writers],
        key=jr.key(seed),
        **options,
    )
    for made in blocks:
        yield [writer.add(piece) for writer, piece in zip(writers, made)]
