"""Generation from token ids to token ids: prefill in chunks, then decode on the device.

Whatever the prompts and the options are, the same few programs run: one for each size of
chunk, and one that decodes a block of tokens. `prefill` fills a cache, `decode` continues
it, `generate` does both.
"""

import collections
from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, PRNGKeyArray
from tqdm import tqdm

from .cache import Cache, chunk_sizes
from .sampling import Sampling
from .transformer import Transformer


# The most tokens that one call of `decode` can make.
BLOCK = 64


class DecodeState(eqx.Module):
    """Everything that the next step of a batch depends on, the model apart."""

    cache: Cache
    logits: Float32[Array, "batch vocab"]
    remaining: Int32[Array, "batch"]
    ended: Bool[Array, "batch"]
    keys: Key[Array, "batch"]
    sampling: Sampling
    eos_ids: Int32[Array, "eos"]


def default_chunk(window: int | None) -> int:
    """The most tokens of a prompt that go through the model at once: the power of two that
    fits in the window, so that the ring is no longer than two windows."""
    return 256 if window is None else min(256, 1 << (window.bit_length() - 1))


def prefill(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 0,
    chunk: int | None = None,
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    """Reads prompts of any lengths into a new cache, a chunk at a time.

    **Arguments:**

    - `model`: any.
    - `prompts`: a list of token ids for each row, at least one in each.
    - `max_tokens`: how many tokens will be written behind the prompts. It only matters
        to layers without a window, whose ring must have room for them.
    - `chunk`: the most tokens that go through the model at once.

    **Returns:**

    The cache, and the logits of the token that follows each prompt.

    **Raises:**

    `ValueError` for no prompts, an empty one, or an id that the vocabulary does not have.
    """
    _check_prompts(prompts, model.config.vocab_size)
    chunk = _checked_chunk(chunk, model.config.smallest_window)
    longest = max(len(prompt) for prompt in prompts)
    length = _padded_length(longest, chunk)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[length - len(prompt) :] = prompt
    padding = np.array([length - len(prompt) for prompt in prompts], np.int32)
    # A power of two, so that few sizes of ring are ever compiled for.
    max_length = _next_power_of_two(length + max_tokens)
    cache = Cache(
        model.config,
        jnp.asarray(padding),
        chunk=chunk,
        max_length=max_length,
        dtype=model.dtype,
    )
    start = 0
    for size in chunk_sizes(0, length, chunk=chunk, slots=cache.slots):
        piece = jnp.asarray(tokens[:, start : start + size])
        cache, logits = _prefill_chunk(model, cache, piece)
        start += size
    return cache, logits


@eqx.filter_jit(donate="all-except-first")
def _prefill_chunk(
    model: Transformer, cache: Cache, tokens: Int32[Array, "batch chunk"]
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    return _forward(model, cache, tokens)


def _forward(
    model: Transformer, cache: Cache, tokens: Int32[Array, "batch seq"]
) -> tuple[Cache, Float32[Array, "batch vocab"]]:
    """The one place where the model meets a batch: the next logits of every row."""

    def row(tokens, cache):
        hidden, cache = model.hidden_states(tokens, cache)
        return cache, model.logits(hidden[-1][-1:])[0]

    return jax.vmap(row, in_axes=(0, cache.axes), out_axes=(cache.axes, 0))(tokens, cache)


def decode_step(
    model: Transformer, state: DecodeState
) -> tuple[DecodeState, Int32[Array, "batch"]]:
    """Chooses the next token of every row and runs the model on it.

    **Returns:**

    The new state and the tokens: -1 in rows that have ended, and where an end-of-sequence
    id was chosen.
    """
    # A key depends on the row's own key and position alone, so that a row gets the same
    # text in whatever company it is.
    positions = state.cache.length - state.cache.padding
    keys = jax.vmap(jr.fold_in)(state.keys, positions)
    choose = lambda logits, key: state.sampling(logits, key=key)
    tokens = jax.vmap(choose)(state.logits, keys)
    ended = state.ended | jnp.isin(tokens, state.eos_ids)
    remaining = state.remaining - 1
    cache, logits = _forward(model, state.cache, tokens[:, None])
    state = eqx.tree_at(
        lambda s: (s.cache, s.logits, s.remaining, s.ended),
        state,
        (cache, logits, remaining, ended | (remaining <= 0)),
    )
    return state, jnp.where(ended, -1, tokens)


@eqx.filter_jit(donate="all-except-first")
def decode(
    model: Transformer, state: DecodeState, steps: Int32[Array, ""]
) -> tuple[DecodeState, Int32[Array, "batch block"]]:
    """Runs up to `steps <= BLOCK` decode steps on the device, fewer if every row ends.

    **Returns:**

    The new state, and the tokens: -1 wherever a row made none. The state given is donated.
    """
    block = jnp.full((state.ended.shape[0], BLOCK), -1, jnp.int32)

    def going(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.ended)

    def advance(carry):
        step, state, block = carry
        state, tokens = decode_step(model, state)
        block = jax.lax.dynamic_update_index_in_dim(block, tokens, step, axis=1)
        return step + 1, state, block

    _, state, block = jax.lax.while_loop(going, advance, (jnp.int32(0), state, block))
    return state, block


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    chunk: int | None = None,
    block: int = 8,
    key: PRNGKeyArray,
) -> Iterator[list[list[int]]]:
    """Continues prompts and yields the tokens as they are made.

    **Arguments:**

    - `model`, `prompts`, `chunk`: see [`prefill`][].
    - `max_tokens`: the most tokens to make for each prompt.
    - `sampling`: how to choose them; greedy by default.
    - `eos_ids`: a row ends when one of them is chosen, which is not returned.
    - `block`: how many tokens to make between two yields, up to `BLOCK`.
    - `key`: for sampling. A prompt gets the same tokens alone as in any batch; the copies
        of a prompt within a batch get different ones.

    **Yields:**

    For each row the tokens made since the last time: nothing for rows that have ended.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be 0 or more, got {max_tokens}.")
    if not 1 <= block <= BLOCK:
        raise ValueError(f"block must be between 1 and {BLOCK}, got {block}.")
    cache, logits = prefill(model, prompts, max_tokens=max_tokens, chunk=chunk)
    state = DecodeState(
        cache,
        logits,
        remaining=jnp.full(len(prompts), max_tokens, jnp.int32),
        ended=jnp.zeros(len(prompts), bool),
        keys=_row_keys(key, prompts),
        sampling=Sampling() if sampling is None else sampling,
        eos_ids=jnp.asarray(list(eos_ids) or [-1], jnp.int32),
    )
    made = None
    for start in range(0, max_tokens, block):
        steps = min(block, max_tokens - start)
        # The next block is under way before this one is looked at, so that the device
        # does not wait for the host.
        state, ahead = decode(model, state, jnp.int32(steps))
        if made is not None:
            yield _rows(made)
            if np.all(np.asarray(made)[:, block - 1] == -1):
                return
        made = ahead
    if made is not None:
        yield _rows(made)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    chunk: int | None = None,
    key: PRNGKeyArray,
) -> list[list[int]]:
    """Continues prompts. Arguments and errors are those of [`stream`][].

    **Returns:**

    The new tokens of each row, without the end-of-sequence id that ended it.
    """
    rows = [[] for _ in prompts]
    blocks = stream(
        model,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        chunk=chunk,
        block=BLOCK,
        key=key,
    )
    for block in blocks:
        for row, tokens in zip(rows, block):
            row.extend(tokens)
    return rows


def score(
    model: Transformer, tokens: Sequence[int], *, chunk: int | None = None
) -> Float32[np.ndarray, "scored"]:
    """The log-probability, in nats, of every token but the first after those before it.

    The tokens go through the rolling buffer in chunks, so a text of any length needs the
    memory of one chunk.

    **Arguments:**

    - `model`, `chunk`: see [`prefill`][].
    - `tokens`: the ids of one text, two at least.
    """
    _check_prompts([tokens], model.config.vocab_size)
    if len(tokens) < 2:
        raise ValueError("A text of one token has nothing to score.")
    chunk = _checked_chunk(chunk, model.config.smallest_window)
    inputs, targets = (
        np.asarray(tokens[:-1], np.int32),
        np.asarray(tokens[1:], np.int32),
    )
    cache = Cache(
        model.config,
        jnp.zeros((), jnp.int32),
        chunk=chunk,
        max_length=_next_power_of_two(len(inputs)),
        dtype=model.dtype,
    )
    scores, start = [], 0
    sizes = chunk_sizes(0, len(inputs), chunk=chunk, slots=cache.slots)
    for size in tqdm(sizes, "score", unit="chunk", delay=1, disable=None):
        piece = slice(start, start + size)
        cache, scored = _score_chunk(model, cache, inputs[piece], targets[piece])
        scores.append(scored)
        start += size
    return np.concatenate([np.asarray(scored) for scored in scores])


@eqx.filter_jit(donate="all-except-first")
def _score_chunk(
    model: Transformer,
    cache: Cache,
    inputs: Int32[Array, "chunk"],
    targets: Int32[Array, "chunk"],
) -> tuple[Cache, Float32[Array, "chunk"]]:
    logits, cache = model(inputs, cache)
    logprobs = jax.nn.log_softmax(logits)
    return cache, jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
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


def _row_keys(key: PRNGKeyArray, prompts: Sequence[Sequence[int]]) -> Key[Array, "batch"]:
    seen = collections.Counter()
    copies = []
    for prompt in prompts:
        copies.append(seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    return jax.vmap(jr.fold_in, in_axes=(None, 0))(key, jnp.asarray(copies))


def _rows(block: Int32[Array, "batch block"]) -> list[list[int]]:
    return [[int(token) for token in row if token >= 0] for row in np.asarray(block)]


def _padded_length(longest: int, chunk: int) -> int:
    """Whole chunks and a power of two behind them: the least such length."""
    whole, rest = divmod(longest, chunk)
    return whole * chunk + (min(chunk, _next_power_of_two(rest)) if rest else 0)


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
