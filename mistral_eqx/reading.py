"""Tokens that are there already: read into a cache a chunk at a time, and scored."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32
from tqdm import tqdm

from .cache import Cache, chunk_sizes
from .devices.processes import to_host
from .devices.sharding import shard_cache, shard_rows
from .kernels import cpu
from .transformer import Transformer


# The padding of a row that has ended: all that is written there from then on are pads.
ENDED = 1 << 30


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
        """How many equally probable tokens would have been as hard to guess."""
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))


def default_chunk(window: int | None) -> int:
    """The most tokens of a prompt that go through the model at once: the power of two that
    fits in the window, between 128 and 256. Fewer would leave a device idle, and more make
    the ring longer than it need be."""
    return 256 if window is None else min(256, max(128, 1 << (window.bit_length() - 1)))


def prefill(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    cache: Cache | None = None,
    max_tokens: int = 0,
    chunk: int | None = None,
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    """Reads prompts of any lengths into a cache, a chunk at a time.

    **Arguments:**

    - `model`: any.
    - `prompts`: a list of token ids for each row, at least one in each.
    - `cache`: what the prompts follow. It is copied and stays as it is, so that it can be
        continued many times. The prompts must be of one length then, since there is no
        place for pads behind it; if it has one row, every prompt follows that.
    - `max_tokens`: how many tokens will be written behind the prompts. It is the room that
        the cache is made with. Only where a window is shorter does it not matter.
    - `chunk`: the most tokens that go through the model at once.

    **Returns:**

    The cache, and the logits of the token that follows each prompt.

    **Raises:**

    `ValueError` for no prompts, an empty one, or an id that the vocabulary does not have;
    for a cache that has no room, or a row that ended before the others.
    """
    check_prompts(prompts, model.config.vocab_size)
    chunk = _checked_chunk(chunk, model.config.smallest_window)
    longest = max(len(prompt) for prompt in prompts)
    if cache is None:
        length = _padded_length(longest, chunk)
        padding = np.array([length - len(prompt) for prompt in prompts], np.int32)
        # A power of two, so that few sizes of ring are ever compiled for.
        capacity = next_power_of_two(length + max_tokens)
        cache = make_cache(model, jnp.asarray(padding), chunk=chunk, max_length=capacity)
    else:
        length = longest
        # The same in every stage, if there are any.
        windows = model.config.windows[: len(cache.slots)]
        _check_continuation(cache, prompts, max_tokens, chunk=chunk, windows=windows)
        cache = shard_cache(_copy(cache, len(prompts)), model)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[length - len(prompt) :] = prompt
    start = 0
    written = int(cache.length)
    for size in chunk_sizes(written, length, chunk=chunk, slots=cache.slots):
        piece = shard_rows(jnp.asarray(tokens[:, start : start + size]), model)
        cache, logits = _prefill_chunk(model, cache, piece)
        start += size
    return cache, logits


def make_cache(
    model: Transformer, padding: Int32[Array, "*batch"], *, chunk: int, max_length: int
) -> Cache:
    """An empty [`Cache`][mistral_eqx.Cache] for a model, on the devices that it is on."""
    dtype = cpu.cache_dtype(model.tok_embeddings.weight)
    return shard_cache(_make_cache(model, padding, chunk, max_length, dtype), model)


# Compiled, so that no device ever holds more than its part.
@eqx.filter_jit
def _make_cache(
    model: Transformer,
    padding: Int32[Array, "*batch"],
    chunk: int,
    max_length: int,
    dtype: DTypeLike,
) -> Cache:
    options = {"chunk": chunk, "max_length": max_length, "dtype": dtype}
    return shard_cache(model.empty_cache(padding, **options), model)


# Not by `eqx.filter_jit`, which waits for the result: the host is to stay ahead.
@partial(jax.jit, donate_argnums=1)
def _prefill_chunk(
    model: Transformer, cache: Cache, tokens: Int32[Array, "batch chunk"]
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    return forward(model, cache, tokens)


def forward(
    model: Transformer, cache: Cache, tokens: Int32[Array, "batch seq"]
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    """The one place where the model meets a batch: the next logits of every row."""
    hidden, cache = model.batch(tokens, cache)
    logits = jax.vmap(model.logits)(hidden[:, -1:])[:, 0]
    # A row's logits are gathered here, once, and not at every look at them.
    return shard_cache(cache, model), shard_rows(logits, model)


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

    - `model`, `chunk`: see [`prefill`][].
    - `tokens`: the ids of one text, two at least.
    - `alternatives`: of how many of the most probable tokens to tell at each place.

    **Raises:**

    `ValueError` for fewer tokens, or an id that the vocabulary does not have.
    """
    check_prompts([tokens], model.config.vocab_size)
    check_alternatives(alternatives, model.config.vocab_size)
    if len(tokens) < 2:
        raise ValueError("A text of one token has nothing to score.")
    chunk = _checked_chunk(chunk, model.config.smallest_window)
    inputs = np.asarray(tokens[:-1], np.int32)
    targets = np.asarray(tokens[1:], np.int32)
    cache = make_cache(
        model, jnp.int32(0), chunk=chunk, max_length=next_power_of_two(len(inputs))
    )
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


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if len(prompts) == 0:
        raise ValueError("There is no prompt: give at least one.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"Prompt {i} is empty. A model needs a token to follow: the BOS id, say."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(
                f"Prompt {i} has the token id {wrong}, but the model's vocabulary has "
                f"{vocab_size} ids, from 0. Is the tokenizer of this model?"
            )


def _checked_chunk(chunk: int | None, window: int | None) -> int:
    if chunk is None:
        return default_chunk(window)
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}.")
    return chunk


def check_alternatives(alternatives: int, vocab_size: int) -> None:
    if not 0 <= alternatives <= vocab_size:
        raise ValueError(
            f"alternatives must be between 0 and the {vocab_size} ids of the vocabulary, "
            f"got {alternatives}."
        )


def alternatives_of(
    tokens: Int32[np.ndarray, "seq top"], logprobs: Float32[np.ndarray, "seq top"]
) -> list[dict[int, float]]:
    if tokens.shape[1] == 0:
        return []
    return [dict(zip(*pair)) for pair in zip(tokens.tolist(), logprobs.tolist())]


def _check_continuation(
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    chunk: int,
    windows: tuple[int | None, ...],
) -> None:
    rows = cache.padding.size
    if rows not in (1, len(prompts)):
        raise ValueError(
            f"The cache has {rows} rows, but there are {len(prompts)} prompts to follow "
            "them."
        )
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(
            f"The prompts that follow a cache must be of one length, got {lengths[0]} to "
            f"{lengths[-1]} tokens. Continue it once for each length."
        )
    if np.any(to_host(cache.padding) == ENDED):
        raise ValueError(
            "A row of the cache ended before the others, and pads were written behind it. "
            "It cannot be continued: prefill its tokens again."
        )
    needed = int(cache.length) + lengths[0] + max_tokens
    for slots, window in zip(cache.slots, windows, strict=True):
        # A ring that holds a window and a chunk lets the oldest tokens go.
        rolls = window is not None and slots >= window - 1 + chunk
        if needed > slots and not rolls:
            raise ValueError(
                f"The cache was made for {slots} tokens, pads included, and {needed} are "
                f"asked of it: {int(cache.length)} are in it, {lengths[0]} follow, and "
                f"max_tokens is {max_tokens}. Make it with a larger max_tokens."
            )


def _copy(cache: Cache, rows: int) -> Cache:
    """A copy that may be donated; one row becomes `rows` of them."""
    repeat = 1 if cache.padding.size == rows else rows
    copy = lambda x: jnp.copy(x) if repeat == 1 else jnp.repeat(x, repeat, axis=0)
    copied = jax.tree.map(copy, (cache.layers, cache.padding))
    return eqx.tree_at(
        lambda c: (c.layers, c.padding, c.length), cache, (*copied, jnp.copy(cache.length))
    )


def _padded_length(longest: int, chunk: int) -> int:
    """Whole chunks and a power of two behind them: the least such length."""
    whole, rest = divmod(longest, chunk)
    return whole * chunk + (min(chunk, next_power_of_two(rest)) if rest else 0)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
