"""Text in, text out: a model together with its tokenizer."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import jax.random as jr
from jax.typing import DTypeLike

from . import generation
from .checkpoint import load_model, read_config
from .sampling import Sampling
from .tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from .transformer import Transformer


TINY_MISTRAL = Path(__file__).parent / "tiny_mistral"


@dataclasses.dataclass(frozen=True)
class Completion:
    """How a prompt was continued. `str()` of it is the prompt and the text behind it.

    **Attributes:**

    - `prompt`: the text that was continued.
    - `text`: what was written behind it.
    - `tokens`: the ids of `text`.
    - `reason`: why it ended: "eos" if the model ended it, "length" at `max_tokens`.
    """

    prompt: str
    text: str
    tokens: list[int]
    reason: str

    def __str__(self) -> str:
        return self.prompt + self.text


def load(
    folder: str | os.PathLike | None = None, *, dtype: DTypeLike | None = None
) -> tuple[Transformer, Tokenizer]:
    """Loads a model and its tokenizer.

    **Arguments:**

    - `folder`: in Mistral's own format or in Hugging Face's, with a `tokenizer.model` or
        a `tekken.json`. Without it, the model that comes with this package, which has
        read Shakespeare and the Bible.
    - `dtype`: of the weights; see [`load_model`][mistral_eqx.load_model].

    **Raises:**

    `FileNotFoundError` and `ValueError` as `load_model` does, also if the tokenizer has
    other ids than the model.
    """
    folder = TINY_MISTRAL if folder is None else Path(folder)
    # The tokenizer first: it is read in no time, and the weights may take minutes.
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    return load_model(folder, dtype=dtype), tokenizer


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
    max_tokens: int = 64,
    temperature: float = 0.0,
    chunk: int | None = None,
    seed: int = 0,
) -> Completion | list[Completion]:
    """Continues a text, or a batch of texts of any lengths.

    **Arguments:**

    - `model`, `tokenizer`: as [`load`][mistral_eqx.load] returns them.
    - `prompts`: one text or several. An empty one asks for a text from its beginning.
    - `max_tokens`: the most tokens to write behind each.
    - `temperature`: 0 always writes the most probable token; 1 draws from the model's own
        distribution; between them, text is safer and more repetitive.
    - `chunk`: the most tokens of a prompt that go through the model at once.
    - `seed`: of the draws. The same seed gives a prompt the same text, alone or in any
        batch; copies of a prompt within a batch get different ones.

    **Returns:**

    A [`Completion`][] for one text, a list of them for several.

    **Raises:**

    `ValueError` for an empty list of prompts, or an option outside its range.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = generation.generate(
        model,
        [tokenizer.encode(text) for text in texts],
        max_tokens=max_tokens,
        sampling=Sampling(temperature=temperature),
        eos_ids=[tokenizer.eos_id],
        chunk=chunk,
        key=jr.key(seed),
    )
    completions = []
    for text, tokens in zip(texts, rows):
        # Decoded behind the prompt: by themselves they would lose their first space.
        ids = tokenizer.encode(text)
        written = tokenizer.decode(ids + tokens)[len(tokenizer.decode(ids)) :]
        reason = "length" if len(tokens) == max_tokens else "eos"
        completions.append(Completion(text, written, tokens, reason))
    return completions[0] if isinstance(prompts, str) else completions
