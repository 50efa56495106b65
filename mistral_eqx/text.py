"""Text in, text out: a model together with its tokenizer."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from jax.sharding import Mesh
from jax.typing import DTypeLike

from . import arguments, beams, scoring
from .decoding import BLOCK
from .files.adapters import Adapters
from .files.checkpoint import load_model
from .files.hub import local_folder
from .sampling import Sampling, SamplingOptions
from .scoring import Scored
from .tokenizer import Tokenizer, load_checked_tokenizer
from .transformer import Transformer
from .writer import Completion, Writer, checked_stop, write


TINY_MISTRAL = Path(__file__).parent / "tiny_mistral"


def load(
    folder: str | os.PathLike | None = None,
    *,
    adapter: Adapters | None = None,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Loads a model and its tokenizer.

    **Arguments:**

    - `folder`: in Mistral's own format or in Hugging Face's, with its tokenizer; or a GGUF
        file; or a name on Hugging Face's hub, as "mistralai/Mistral-7B-v0.3", if
        huggingface_hub is installed. Without it, the model that comes with this package,
        which has read Shakespeare and the Bible.
    - `adapter`: a LoRA adapter, or several, to merge into the weights.
    - `dtype`, `quantize`, `mesh`: of the weights, in how many bits, and where they go; for
        these and `adapter` see [`load_model`][mistral_eqx.load_model].

    **Raises:**

    `FileNotFoundError` and `ValueError` as `load_model` does, also if the tokenizer has
    other ids than the model.
    """
    if folder is None:
        folder = TINY_MISTRAL
    else:
        folder = local_folder(arguments.path("folder", folder))
    # The tokenizer first: it is read in no time, and the weights may take minutes.
    tokenizer = load_checked_tokenizer(folder)
    options = {"dtype": dtype, "quantize": quantize, "mesh": mesh}
    return load_model(folder, adapter=adapter, **options), tokenizer


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
    eos_ids: Sequence[int] | None = None,
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
    - `eos_ids`: the tokens that end a text; by default those of the tokenizer.
    - `alternatives`: how many of the most probable tokens to tell at each place.
    - `chunk`: the most tokens of a prompt that go through the model at once.
    - `seed`: of the draws. The same seed gives a prompt the same text, alone or in any
        batch; copies of a prompt within a batch get different ones.
    - `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`: see
        [`Sampling`][mistral_eqx.Sampling]. By default the most probable token is taken.

    **Returns:**

    A [`Completion`][] for one text, a list of them for several.

    **Raises:**

    `ValueError` for an empty list of prompts, or an option outside its range; `TypeError`
    for an argument of another type.
    """
    texts, stop = arguments.texts("prompts", prompts), checked_stop(stop)
    writers = [Writer(tokenizer, text, stop=stop) for text in texts]
    pieces = write(
        model,
        tokenizer,
        writers,
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),
        eos_ids=eos_ids,
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
    eos_ids: Sequence[int] | None = None,
    with_reasoning: bool = False,
    chunk: int | None = None,
    seed: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> Iterator[str]:
    """Continues a text and yields what is written as soon as it is certain: whole
    characters, and nothing that a stop string may begin with. The pieces together are the
    `text` that [`generate`][mistral_eqx.generate] returns.

    **Arguments:**

    - `with_reasoning`: whether to yield the reasoning and the tool calls too, between
        their marks, `[THINK]`, `[/THINK]` and `[TOOL_CALLS]`.
    - The others are those of `generate`.

    **Raises:**

    As `generate` does, at the call.
    """
    prompt = arguments.text("prompt", prompt)
    writer = Writer(tokenizer, prompt, stop=stop, with_reasoning=with_reasoning)
    options = {"max_tokens": max_tokens, "eos_ids": eos_ids, "chunk": chunk, "seed": seed}
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
    eos_ids: Sequence[int] | None = None,
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
    texts = arguments.texts("prompts", prompts)
    encoded = [tokenizer.encode(text) for text in texts]
    found = beams.beam_search(
        model,
        encoded,
        n_beams=n_beams,
        max_tokens=max_tokens,
        eos_ids=tokenizer.eos_ids if eos_ids is None else eos_ids,
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
    if not arguments.text("text", text):
        raise ValueError("The text is empty: there is nothing to score.")
    ids = tokenizer.encode(text)
    return scoring.score(model, ids, alternatives=alternatives, chunk=chunk)
