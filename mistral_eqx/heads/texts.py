"""Texts in, vectors or labels out."""

import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from tqdm import tqdm

from .. import arguments
from ..devices.processes import to_host
from ..devices.sharding import shard_rows
from ..prompts import next_power_of_two
from ..tokenizer import Tokenizer
from ..transformer import Transformer
from .classifier import POOLINGS, Classifier, pool


@dataclasses.dataclass(frozen=True)
class Classified:
    """What a text was found to be.

    **Attributes:**

    - `label`: the most probable one.
    - `probabilities`: of every label.
    """

    label: str
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return self.label


def embed(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    pooling: str = "last",
    eos: bool = False,
    batch_size: int = 8,
) -> Float32[np.ndarray, "*texts dim"]:
    """A vector for every text, for search and clustering.

    **Arguments:**

    - `model`, `tokenizer`: as [`load`][mistral_eqx.load] or
        [`load_embedder`][mistral_eqx.load_embedder] return them.
    - `texts`: one or several, of any lengths.
    - `pooling`: `"last"` for the vector at a text's last token, `"mean"` for the mean over
        its tokens. A model's card says which it was trained with.
    - `eos`: whether the EOS id is put behind each text, as E5-Mistral was trained.
    - `batch_size`: how many texts go through the model at once.

    **Returns:**

    The vectors, as the last norm puts them out. Divide by their lengths for cosines.

    **Raises:**

    `ValueError` for no texts, or another pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f'pooling must be "last" or "mean", got {pooling!r}.')
    rows = _rows(tokenizer, texts)
    rows = [[*row, tokenizer.eos_id] for row in rows] if eos else rows
    run = lambda *batch: _embed(model, *batch, pooling)
    vectors = _in_batches(model, rows, run, batch_size, "embed")
    return vectors[0] if isinstance(texts, str) else vectors


def classify(
    classifier: Classifier,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    batch_size: int = 8,
) -> Classified | list[Classified]:
    """The label of every text, and the probabilities of all labels.

    **Arguments:**

    - `classifier`, `tokenizer`: as [`load_classifier`][mistral_eqx.load_classifier] returns
        them.
    - `texts`: one or several, of any lengths.
    - `batch_size`: how many texts go through the model at once.

    **Raises:**

    `ValueError` for no texts.
    """
    rows = _rows(tokenizer, texts)
    run = lambda *batch: _classify(classifier, *batch)
    found = []
    for row in _in_batches(classifier, rows, run, batch_size, "classify"):
        probabilities = dict(zip(classifier.labels, row.tolist()))
        label = max(probabilities, key=probabilities.__getitem__)
        found.append(Classified(label, probabilities))
    return found[0] if isinstance(texts, str) else found


@eqx.filter_jit
def _embed(model, tokens, lengths, pooling) -> Float32[Array, "batch dim"]:
    return pool(model, tokens, lengths, pooling).astype(jnp.float32)


@eqx.filter_jit
def _classify(classifier, tokens, lengths) -> Float32[Array, "batch labels"]:
    return jax.nn.softmax(classifier(tokens, lengths), axis=-1)


def _rows(tokenizer: Tokenizer, texts: str | Sequence[str]) -> list[list[int]]:
    texts = arguments.texts("texts", texts)
    if not texts:
        raise ValueError("texts is empty: give one at least.")
    return [tokenizer.encode(text) for text in texts]


def _in_batches(
    model: eqx.Module,
    rows: list[list[int]],
    run: Callable[..., Float[Array, "batch out"]],
    batch_size: int,
    name: str,
) -> Float32[np.ndarray, "texts out"]:
    """What a function makes of rows of tokens: those of about one length together, in
    batches of few shapes."""
    batch_size = arguments.integer("batch_size", batch_size, least=1)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    out = [None] * len(rows)
    for numbers in tqdm(batches, name, unit="batch", delay=1, disable=None):
        longest = max(len(rows[i]) for i in numbers)
        size = min(batch_size, next_power_of_two(len(numbers)))
        tokens = np.zeros((size, max(16, next_power_of_two(longest))), np.int32)
        lengths = np.ones(size, np.int32)
        for place, i in enumerate(numbers):
            tokens[place, : len(rows[i])] = rows[i]
            lengths[place] = len(rows[i])
        batch = shard_rows((jnp.asarray(tokens), jnp.asarray(lengths)), model)
        for i, made in zip(numbers, to_host(run(*batch))):
            out[i] = made
    return np.stack(out)
