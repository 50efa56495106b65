"""Prefill and decode: prompts into a cache, then one token after another on the device.

Whatever the prompts and the options are, the same few programs run: one for each size of
chunk, and one that decodes a block of tokens. `generate` is a loop over these; to write a
loop of your own:

```python
cache, logits = mx.prefill(model, prompts, max_tokens=20)
state = mx.DecodeState.start(model, cache, logits, max_tokens=20, key=jax.random.key(0))
step = jax.jit(mx.decode_step, donate_argnums=1)
while not state.ended.all():
    state, choice = step(model, state)
    print(choice.tokens, choice.made)  # `made` is False in rows that have ended
```
"""

import collections
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float32, Int32, Key, PRNGKeyArray

from . import arguments
from .cache import Cache
from .devices.sharding import replicate, shard_cache, shard_rows
from .kernels.dtypes import cache_dtype
from .prompts import (
    budgets_of,
    check_continuation,
    check_room,
    checked_alternatives,
    checked_chunk,
    checked_eos_ids,
    checked_prompts,
    chunk_sizes,
    next_power_of_two,
    padded_length,
)
from .sampling import Sampling
from .transformer import Transformer


# The most tokens that one call of `decode` can make.
BLOCK = 64
# Why a row has ended, by the number that the device has for it.
REASONS = (None, "eos", "length", "stop")


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
    - `max_tokens`: how many tokens will be written behind the prompts: the cache is made
        with room for them. Where a window is shorter it does not matter.
    - `chunk`: the most tokens that go through the model at once.

    **Returns:**

    The cache, and the logits of the token that follows each prompt.

    **Raises:**

    `ValueError` for no prompts, an empty one, or an id that the vocabulary does not have;
    for a cache that has no room, or a row that ended before the others.
    """
    prompts = checked_prompts(prompts, model.config.vocab_size)
    max_tokens = arguments.integer("max_tokens", max_tokens)
    chunk = checked_chunk(chunk, model, len(prompts))
    length = max(len(prompt) for prompt in prompts)
    if cache is None:
        length = padded_length(length, chunk)
        padding = np.array([length - len(prompt) for prompt in prompts], np.int32)
        # A power of two, so that few sizes of ring are ever compiled for.
        capacity = next_power_of_two(length + max_tokens)
        cache = make_cache(model, jnp.asarray(padding), chunk=chunk, max_length=capacity)
    else:
        # The same in every stage, if there are any.
        windows = model.config.windows[: len(cache.slots)]
        check_continuation(cache, prompts, max_tokens, chunk=chunk, windows=windows)
        cache = shard_cache(_copy(cache, len(prompts)), model)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[length - len(prompt) :] = prompt
    start, written = 0, int(cache.length)
    for size in chunk_sizes(written, length, chunk=chunk, slots=cache.slots):
        piece = shard_rows(jnp.asarray(tokens[:, start : start + size]), model)
        cache, logits = prefill_chunk(model, cache, piece)
        start += size
    return cache, logits


def make_cache(
    model: Transformer, padding: Int32[Array, "*batch"], *, chunk: int, max_length: int
) -> Cache:
    """An empty [`Cache`][mistral_eqx.Cache] for a model, on the devices that it is on."""
    dtype = cache_dtype(model.tok_embeddings.weight)
    return shard_cache(_make_cache(model, padding, chunk, max_length, dtype), model)


def _copy(cache: Cache, rows: int) -> Cache:
    """A copy that may be donated; one row becomes `rows` of them."""
    n = 1 if cache.padding.size == rows else rows
    copy = lambda x: jnp.copy(x) if n == 1 else jnp.repeat(x, n, axis=0)
    arrays = jax.tree.map(copy, (cache.layers, cache.padding))
    arrays = (*arrays, jnp.copy(cache.length))
    return eqx.tree_at(lambda c: (c.layers, c.padding, c.length), cache, arrays)


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


# `jax.jit` and not `eqx.filter_jit`, which waits for the result: the host stays ahead.
@partial(jax.jit, donate_argnums=1)
def prefill_chunk(
    model: Transformer, cache: Cache, tokens: Int32[Array, "batch chunk"]
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    return forward(model, cache, tokens)


def forward(
    model: Transformer, cache: Cache, tokens: Int32[Array, "batch seq"]
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    """Runs the model on a batch. Returns the cache and the next logits of every row."""
    hidden, cache = model.batch(tokens, cache)
    logits = jax.vmap(model.logits)(hidden[:, -1:])[:, 0]
    # A row's logits are gathered here, once, and not at every use.
    return shard_cache(cache, model), shard_rows(logits, model)


class Choice(eqx.Module):
    """What a step chose, or a block of steps.

    **Attributes:**

    - `tokens`: the ids.
    - `made`: which of them count. In a row that has ended none does, nor does an
        end-of-sequence id.
    - `logprobs`: the model's own log-probabilities, in nats: no temperature, penalty or
        filter changes them.
    - `top_tokens`, `top_logprobs`: of the most probable tokens, the best first.
    - `reason`: why the row has ended, as an index into `REASONS`.
    """

    tokens: Int32[Array, "batch *block"]
    made: Bool[Array, "batch *block"]
    logprobs: Float32[Array, "batch *block"]
    top_tokens: Int32[Array, "batch *block top"]
    top_logprobs: Float32[Array, "batch *block top"]
    reason: Int32[Array, "batch *block"]


class DecodeState(eqx.Module):
    """Everything that the next step of a batch depends on, the model apart.

    **Attributes:**

    - `cache`: what the rows have so far.
    - `logits`: of the next token of each row.
    - `remaining`: how many tokens each row may still make.
    - `reason`: why each row has ended, as an index into `REASONS`; 0 if it has not.
    - `keys`: one a row. The key of a draw is made from it and the token's position.
    - `sampling`, `eos_ids`: how tokens are chosen, and which of them end a row.
    - `seen`: which ids a row has already, for the repetition penalty.
    - `alternatives`: how many of the most probable tokens are told at each place.
    """

    cache: Cache
    logits: Float32[Array, "batch vocab"]
    remaining: Int32[Array, "batch"]
    reason: Int32[Array, "batch"]
    keys: Key[Array, "batch"]
    sampling: Sampling
    eos_ids: Int32[Array, "eos"]
    seen: Bool[Array, "batch vocab"]
    alternatives: int = eqx.field(static=True, default=0)

    @staticmethod
    def start(
        model: Transformer,
        cache: Cache,
        logits: Float32[Array, "batch vocab"],
        *,
        max_tokens: int | Sequence[int],
        prompts: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
        eos_ids: Sequence[int] = (),
        alternatives: int = 0,
        key: PRNGKeyArray,
    ) -> "DecodeState":
        """The state in which decoding begins, on the devices that the model is on.

        **Arguments:**

        - `cache`, `logits`: as [`prefill`][] returns them. [`decode`][] donates both: they
            cannot be used afterwards.
        - `max_tokens`: the most tokens to make: one number, or one a row.
        - `prompts`: the ids that each row has already. The repetition penalty counts them,
            and equal prompts get different draws. Without them every row counts as a copy
            of the same empty prompt.
        - `sampling`, `eos_ids`, `alternatives`, `key`: see [`stream`][].

        **Raises:**

        `ValueError` for a number outside its range, for a cache that has no room for
        `max_tokens` more, or for `prompts` that [`prefill`][] refuses.
        """
        batch, vocab_size = logits.shape
        budgets = np.asarray(budgets_of(max_tokens, batch), np.int32)
        if not isinstance(cache.length, jax.core.Tracer):  # which has no number yet
            windows = model.config.windows[: len(cache.slots)]
            # The last token is only chosen: what follows it is not asked for.
            remembered = max(int(budgets.max()) - 1, 0)
            check_room(cache, 0, remembered, chunk=1, windows=windows)
        alternatives = checked_alternatives(alternatives, vocab_size)
        eos_ids = checked_eos_ids(eos_ids, vocab_size)
        prompts = [()] * batch if prompts is None else prompts
        prompts = checked_prompts(prompts, vocab_size, n_rows=batch)
        seen = np.zeros((batch, vocab_size), bool)
        for row, prompt in zip(seen, prompts):
            row[prompt] = True
        reason = np.where(budgets == 0, REASONS.index("length"), 0)
        rows = {
            "remaining": jnp.asarray(budgets),
            "reason": jnp.asarray(reason, jnp.int32),
            "keys": _row_keys(key, prompts),
            "seen": jnp.asarray(seen),
        }
        shared = {
            # A copy, because the state is donated and the options are the caller's.
            "sampling": jax.tree.map(jnp.copy, sampling or Sampling()),
            "eos_ids": jnp.asarray(eos_ids or [-1], jnp.int32),
        }
        rows, shared = shard_rows(rows, model), replicate(shared, model)
        return DecodeState(cache, logits, **rows, **shared, alternatives=alternatives)

    @property
    def ended(self) -> Bool[Array, "batch"]:
        return self.reason > 0


def decode_step(model: Transformer, state: DecodeState) -> tuple[DecodeState, Choice]:
    """Chooses the next token of every row and runs the model on it.

    **Returns:**

    The new state and what was chosen. The rows' part of the cache holds all that was chosen
    up to their end, the end-of-sequence id included; later only pads are written to it.
    """
    # A key depends on the row's own key and position alone, so that a row gets the same
    # text in whatever company it is.
    positions = state.cache.length - state.cache.padding
    keys = jax.vmap(jr.fold_in)(state.keys, positions)
    choose = lambda logits, seen, key: state.sampling(logits, seen, key=key)
    tokens = jax.vmap(choose)(state.logits, state.seen, keys)
    logprobs = jax.nn.log_softmax(state.logits)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, state.alternatives)
    remaining, is_end = state.remaining - 1, jnp.isin(tokens, state.eos_ids)
    new = jnp.where(is_end, REASONS.index("eos"), 0)
    new = jnp.where(~is_end & (remaining <= 0), REASONS.index("length"), new)
    reason = jnp.where(state.ended, state.reason, new.astype(jnp.int32))
    choice = Choice(
        tokens,
        ~(state.ended | is_end),
        jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0],
        top_tokens,
        top_logprobs,
        reason,
    )
    cache, logits = forward(model, state.cache.close(state.ended), tokens[:, None])
    ids = jnp.arange(state.seen.shape[1], dtype=jnp.int32)
    seen = state.seen | (ids[None, :] == tokens[:, None])
    state = eqx.tree_at(
        lambda s: (s.cache, s.logits, s.seen, s.remaining, s.reason),
        state,
        (cache, logits, seen, remaining, reason),
    )
    return state, choice


# `jax.jit` and not `eqx.filter_jit`, which waits for the result: the next block shall run
# while the last one is read.
@partial(jax.jit, donate_argnums=1)
def decode(
    model: Transformer, state: DecodeState, steps: Int32[Array, ""]
) -> tuple[DecodeState, Choice]:
    """Runs `steps` decode steps on the device: `BLOCK` at most, fewer if every row ends.

    **Returns:**

    The new state, and `BLOCK` choices for each row. The state given is donated.
    """
    steps = jnp.minimum(steps, BLOCK)
    batch, top = state.reason.shape[0], state.alternatives
    block = Choice(
        jnp.zeros((batch, BLOCK), jnp.int32),
        jnp.zeros((batch, BLOCK), bool),
        jnp.zeros((batch, BLOCK), jnp.float32),
        jnp.zeros((batch, BLOCK, top), jnp.int32),
        jnp.zeros((batch, BLOCK, top), jnp.float32),
        jnp.broadcast_to(state.reason[:, None], (batch, BLOCK)),
    )

    def going(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.ended)

    def advance(carry):
        step, state, block = carry
        state, choice = decode_step(model, state)
        write = lambda rows, new: rows.at[:, step].set(new)
        return step + 1, state, jax.tree.map(write, block, choice)

    _, state, block = jax.lax.while_loop(going, advance, (jnp.int32(0), state, block))
    return state, block


def _row_keys(key: PRNGKeyArray, prompts: Sequence[Sequence[int]]) -> Key[Array, "batch"]:
    # Copies of a prompt get different keys.
    seen = collections.Counter()
    copies = []
    for prompt in prompts:
        copies.append(seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    return jax.vmap(jr.fold_in, in_axes=(None, 0))(key, jnp.asarray(copies))
