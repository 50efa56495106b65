"""How probable a model finds tokens that are there already."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32
from tqdm import tqdm

from .cache import Cache
from .decoding import make_cache
from .devices.processes import to_host
from .devices.sharding import replicate
from .prompts import (
    checked_alternatives,
    checked_chunk,
    checked_prompts,
    chunk_sizes,
    next_power_of_two,
)
from .transformer import Transformer


@dataclasses.dataclass
class Scored:
    """Tokens of one row, and how probable the model found them.

    **Attributes:**

    - `tokens`: the ids.
    - `logprobs`: the log-probability of each after those before it, in nats.
    - `alternatives`: at each place the most probable ids and their log-probabilities, the
        best first; empty if none were asked for.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """How many equally probable tokens would have been as hard to guess. 1 for none."""
        return perplexity(self.logprobs)


def score(
    model: Transformer,
    tokens: Sequence[int],
    *,
    alternatives: int = 0,
    chunk: int | None = None,
) -> Scored:
    """How probable every token but the first is after those before it, as far as the
    model's window lets it see them.

    The tokens go through the rolling buffer in chunks, so a text of any length needs the
    memory of one chunk.

    **Arguments:**

    - `model`, `chunk`: see [`prefill`][mistral_eqx.prefill].
    - `tokens`: the ids of one text, two at least.
    - `alternatives`: how many of the most probable tokens to tell at each place.

    **Raises:**

    `ValueError` for fewer tokens, or an id that the vocabulary does not have.
    """
    (tokens,) = checked_prompts([tokens], model.config.vocab_size)
    alternatives = checked_alternatives(alternatives, model.config.vocab_size)
    if len(tokens) < 2:
        raise ValueError("A text of one token has nothing to score.")
    chunk = checked_chunk(chunk, model, 1)
    inputs = np.asarray(tokens[:-1], np.int32)
    targets = np.asarray(tokens[1:], np.int32)
    capacity = next_power_of_two(len(inputs))
    cache = make_cache(model, jnp.int32(0), chunk=chunk, max_length=capacity)
    scored, start = Scored(), 0
    sizes = chunk_sizes(0, len(inputs), chunk=chunk, slots=cache.slots)
    for size in tqdm(sizes, "score", unit="chunk", delay=1, disable=None):
        piece = slice(start, start + size)
        cache, *found = _score_chunk(
            model, cache, inputs[piece], targets[piece], alternatives
        )
        logprobs, top_tokens, top_logprobs = to_host(found)
        scored.tokens += targets[piece].tolist()
        scored.logprobs += logprobs.tolist()
        scored.alternatives += alternatives_of(top_tokens, top_logprobs)
        start += size
    return scored


@partial(jax.jit, donate_argnums=1, static_argnums=4)
def _score_chunk(
    model: Transformer,
    cache: Cache,
    inputs: Int32[Array, "chunk"],
    targets: Int32[Array, "chunk"],
    alternatives: int,
) -> tuple[
    Cache,
    Float32[Array, "chunk"],
    Int32[Array, "chunk top"],
    Float32[Array, "chunk top"],
]:
    logits, cache = model(inputs, cache)
    logprobs = jax.nn.log_softmax(logits)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, alternatives)
    logprobs = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
    return cache, logprobs, top_tokens, top_logprobs


def divergence(
    model: Transformer, other: Transformer, tokens: Sequence[int], *, length: int = 256
) -> float:
    """How far the predictions of another model are from a model's: the mean over all places
    of the Kullback-Leibler divergence, in nats.

    **Arguments:**

    - `model`, `other`: of one vocabulary.
    - `tokens`: a text, which both read in slices.
    - `length`: of a slice, in tokens.
    """
    slices = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    found = [
        to_host(_divergence(model, other, replicate(jnp.asarray(part), model)))
        for part in tqdm(slices, "compare", unit="slice", delay=1, disable=None)
    ]
    return float(np.concatenate(found).mean())


@jax.jit
def _divergence(
    model: Transformer, other: Transformer, tokens: Int32[Array, "seq"]
) -> Float32[Array, "seq"]:
    p, q = (jax.nn.log_softmax(m(tokens)[0]) for m in (model, other))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def perplexity(logprobs: Sequence[float]) -> float:
    """`exp` of the mean of the negative log-probabilities; 1 if there are none."""
    return math.exp(-math.fsum(logprobs) / max(1, len(logprobs)))


def alternatives_of(
    tokens: Int32[np.ndarray, "seq top"], logprobs: Float32[np.ndarray, "seq top"]
) -> list[dict[int, float]]:
    if tokens.shape[1] == 0:
        return []
    return [dict(zip(*pair)) for pair in zip(tokens.tolist(), logprobs.tolist())]
