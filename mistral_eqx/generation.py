"""Generation from token ids to token ids: prefill in chunks, then decode on the device.

Whatever the prompts and the options are, the same few programs run: one for each size of
chunk, and one that decodes a block of tokens. `prefill` fills a cache, `decode` continues
it, `stream` and `generate` do both. To write a loop of your own:

```python
cache, logits = mx.prefill(model, prompts, max_tokens=20)
state = mx.DecodeState.start(model, cache, logits, max_tokens=20, key=jax.random.key(0))
step = jax.jit(mx.decode_step, donate_argnums=1)
while not state.ended.all():
    state, choice = step(model, state)
    print(choice.tokens)  # one id a row, -1 in rows that have ended
```
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, PRNGKeyArray

from .cache import Cache
from .devices.processes import to_host
from .devices.sharding import fill_rows, replicate, shard_rows
from .reading import (
    ENDED,
    Scored,
    alternatives_of,
    check_alternatives,
    check_prompts,
    forward,
    prefill,
)
from .sampling import Sampling
from .transformer import Transformer


# The most tokens that one call of `decode` can make.
BLOCK = 64


class Choice(eqx.Module):
    """What a step chose, or a block of steps. The log-probabilities are the model's own,
    in nats: no temperature, penalty or filter changes them."""

    tokens: Int32[Array, "batch *block"]
    logprobs: Float32[Array, "batch *block"]
    top_tokens: Int32[Array, "batch *block top"]
    top_logprobs: Float32[Array, "batch *block top"]


class DecodeState(eqx.Module):
    """Everything that the next step of a batch depends on, the model apart.

    **Attributes:**

    - `cache`: what the rows have so far.
    - `logits`: of the next token of each row.
    - `remaining`: how many tokens each row may still make.
    - `ended`: which rows make no more.
    - `keys`: one a row. The key of a draw is made from it and the token's position.
    - `sampling`, `eos_ids`: how tokens are chosen, and which of them end a row.
    - `seen`: which ids a row has already, for the repetition penalty.
    - `alternatives`: how many of the most probable tokens are told at each place.
    """

    cache: Cache
    logits: Float32[Array, "batch vocab"]
    remaining: Int32[Array, "batch"]
    ended: Bool[Array, "batch"]
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

        - `model`: any.
        - `cache`, `logits`: as [`prefill`][] returns them. The cache is donated to
            [`decode`][].
        - `max_tokens`: the most tokens to make: one number, or one a row.
        - `prompts`: the ids that each row has already. The repetition penalty counts them,
            and equal prompts get different draws. Without them every row counts as a copy
            of the same empty prompt.
        - `sampling`, `eos_ids`, `alternatives`, `key`: see [`stream`][].

        **Raises:**

        `ValueError` for a `max_tokens` or `alternatives` outside its range.
        """
        batch, vocab_size = logits.shape
        budgets = np.asarray(_budgets(max_tokens, batch), np.int32)
        check_alternatives(alternatives, vocab_size)
        prompts = [()] * batch if prompts is None else prompts
        seen = np.zeros((batch, vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
        rows = {
            "remaining": jnp.asarray(budgets),
            "ended": jnp.asarray(budgets == 0),
            "keys": _row_keys(key, prompts),
            "seen": jnp.asarray(seen),
        }
        shared = {
            # A copy, because the state is donated and the options are the caller's.
            "sampling": jax.tree.map(jnp.copy, sampling or Sampling()),
            "eos_ids": jnp.asarray(list(eos_ids) or [-1], jnp.int32),
        }
        rows, shared = shard_rows(rows, model), replicate(shared, model)
        return DecodeState(cache, logits, **rows, **shared, alternatives=alternatives)


@dataclasses.dataclass
class Continuation(Scored):
    """What was made behind a prompt.

    **Attributes:** those of [`Scored`][], and

    - `reason`: "eos" if an end-of-sequence id was chosen, which is not among the tokens;
        "length" at `max_tokens`; `None` if the row has not ended.
    """

    reason: str | None = None


def decode_step(model: Transformer, state: DecodeState) -> tuple[DecodeState, Choice]:
    """Chooses the next token of every row and runs the model on it.

    **Returns:**

    The new state and what was chosen: the token -1 in rows that have ended, and where an
    end-of-sequence id was chosen. The rows' part of the cache holds all that was chosen
    up to there, the end-of-sequence id included; what is written to it later are pads.
    """
    # A key depends on the row's own key and position alone, so that a row gets the same
    # text in whatever company it is.
    positions = state.cache.length - state.cache.padding
    keys = jax.vmap(jr.fold_in)(state.keys, positions)
    choose = lambda logits, seen, key: state.sampling(logits, seen, key=key)
    tokens = jax.vmap(choose)(state.logits, state.seen, keys)
    logprobs = jax.nn.log_softmax(state.logits)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, state.alternatives)
    ended = state.ended | jnp.isin(tokens, state.eos_ids)
    choice = Choice(
        jnp.where(ended, -1, tokens),
        jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0],
        top_tokens,
        top_logprobs,
    )
    padding = jnp.where(state.ended, ENDED, state.cache.padding)
    cache = eqx.tree_at(lambda cache: cache.padding, state.cache, padding)
    cache, logits = forward(model, cache, tokens[:, None])
    ids = jnp.arange(state.seen.shape[1], dtype=jnp.int32)
    seen = state.seen | (ids[None, :] == tokens[:, None])
    remaining = state.remaining - 1
    state = eqx.tree_at(
        lambda s: (s.cache, s.logits, s.seen, s.remaining, s.ended),
        state,
        (cache, logits, seen, remaining, ended | (remaining <= 0)),
    )
    return state, choice


# Not by `eqx.filter_jit`, which waits for the result: the next block is to be under way
# while the last one is read.
@partial(jax.jit, donate_argnums=1)
def decode(
    model: Transformer, state: DecodeState, steps: Int32[Array, ""]
) -> tuple[DecodeState, Choice]:
    """Runs up to `steps <= BLOCK` decode steps on the device, fewer if every row ends.

    **Returns:**

    The new state, and `BLOCK` choices for each row: the token -1 wherever it made none.
    The state given is donated.
    """
    batch, top = state.ended.shape[0], state.alternatives
    block = Choice(
        jnp.full((batch, BLOCK), -1, jnp.int32),
        jnp.zeros((batch, BLOCK), jnp.float32),
        jnp.zeros((batch, BLOCK, top), jnp.int32),
        jnp.zeros((batch, BLOCK, top), jnp.float32),
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


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    prefix: Cache | None = None,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    stopped: Callable[[], Sequence[bool]] | None = None,
    alternatives: int = 0,
    chunk: int | None = None,
    block: int = 8,
    key: PRNGKeyArray,
) -> Iterator[list[Continuation]]:
    """Continues prompts and yields the tokens as they are made.

    **Arguments:**

    - `model`, `prompts`, `chunk`: see [`prefill`][].
    - `max_tokens`: the most tokens to make for each prompt: one number, or one a row.
    - `prefix`: a cache that holds the beginning of every prompt, which is not computed
        again. It stays as it is. What each prompt has beyond it must be a token at least,
        and equally many in every row; a prefix of one row serves all.
    - `sampling`: how to choose them; greedy by default.
    - `eos_ids`: a row ends when one of them is chosen, which is not returned.
    - `stopped`: asked between blocks which rows need no more tokens. They may still get
        those of one or two blocks, which were under way.
    - `alternatives`: of how many of the most probable tokens to tell at each place.
    - `block`: how many tokens to make between two yields, up to `BLOCK`.
    - `key`: for sampling. A prompt gets the same tokens alone as in any batch; the copies
        of a prompt within a batch get different ones.

    **Yields:**

    For each row what was made since the last time: nothing for rows that have ended.

    **Raises:**

    `ValueError` as `prefill` does, and for a number outside its range.
    """
    budgets = _budgets(max_tokens, len(prompts))
    if not 1 <= block <= BLOCK:
        raise ValueError(f"block must be between 1 and {BLOCK}, got {block}.")
    check_alternatives(alternatives, model.config.vocab_size)
    check_prompts(prompts, model.config.vocab_size)
    most, n_prompts = max(budgets), len(prompts)
    if prefix is None or prefix.padding.size == 1:
        # Rows that have ended before they begin fill up the devices.
        prompts = fill_rows(prompts, model)
    n_filled = len(prompts) - n_prompts
    budgets += [0] * n_filled
    follow = prompts if prefix is None else _after(prefix, prompts)
    cache, logits = prefill(model, follow, cache=prefix, max_tokens=most, chunk=chunk)
    state = DecodeState.start(
        model,
        cache,
        logits,
        max_tokens=budgets,
        prompts=prompts,
        sampling=sampling,
        eos_ids=eos_ids,
        alternatives=alternatives,
        key=key,
    )
    left = list(budgets)
    # The next block is under way before one is looked at, so that the device does not
    # wait for the host.
    state, made = decode(model, state, jnp.int32(min(block, most)))
    for start in range(block, max(most, 1) + block, block):
        steps = min(block, most - start)
        if steps > 0:
            if stopped is not None:
                rows = jnp.asarray([*stopped(), *[True] * n_filled], bool)
                ended = state.ended | shard_rows(rows, model)
                state = eqx.tree_at(lambda s: s.ended, state, ended)
            state, ahead = decode(model, state, jnp.int32(steps))
        pieces = _read(made, left, min(block, most - start + block))
        yield pieces[:n_prompts]
        if all(n < 0 for n in left) or (stopped is not None and all(stopped())):
            return
        made = ahead


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int | Sequence[int],
    prefix: Cache | None = None,
    sampling: Sampling | None = None,
    eos_ids: Sequence[int] = (),
    alternatives: int = 0,
    chunk: int | None = None,
    key: PRNGKeyArray,
) -> list[Continuation]:
    """Continues prompts. Arguments and errors are those of [`stream`][].

    **Returns:**

    What was made in each row.
    """
    rows = [Continuation() for _ in prompts]
    blocks = stream(
        model,
        prompts,
        max_tokens=max_tokens,
        prefix=prefix,
        sampling=sampling,
        eos_ids=eos_ids,
        alternatives=alternatives,
        chunk=chunk,
        block=BLOCK,
        key=key,
    )
    for pieces in blocks:
        for row, piece in zip(rows, pieces):
            row.tokens += piece.tokens
            row.logprobs += piece.logprobs
            row.alternatives += piece.alternatives
            row.reason = row.reason or piece.reason
    return rows


def _row_keys(key: PRNGKeyArray, prompts: Sequence[Sequence[int]]) -> Key[Array, "batch"]:
    seen = collections.Counter()
    copies = []
    for prompt in prompts:
        copies.append(seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    return jax.vmap(jr.fold_in, in_axes=(None, 0))(key, jnp.asarray(copies))


def _read(block: Choice, left: list[int], steps: int) -> list[Continuation]:
    """The first `steps` choices of every row. `left` is how many tokens each row may still
    make: it is counted down here, and is -1 once the row has ended."""
    block = to_host(block)
    pieces = []
    for row, tokens in enumerate(block.tokens):
        n = int(np.sum(tokens >= 0))
        reason = None
        if left[row] == n:
            reason, left[row] = "length", -1
        elif left[row] > 0 and n < steps:
            reason, left[row] = "eos", -1
        else:
            left[row] -= n
        pieces.append(
            Continuation(
                tokens[:n].tolist(),
                block.logprobs[row, :n].tolist(),
                alternatives_of(block.top_tokens[row, :n], block.top_logprobs[row, :n]),
                reason,
            )
        )
    return pieces


def _budgets(max_tokens: int | Sequence[int], n_prompts: int) -> list[int]:
    budgets = [max_tokens] * n_prompts if isinstance(max_tokens, int) else list(max_tokens)
    if len(budgets) != n_prompts:
        raise ValueError(
            f"max_tokens has {len(budgets)} numbers for {n_prompts} prompts: give one for "
            "each, or a single one for all."
        )
    if budgets and min(budgets) < 0:
        raise ValueError(f"max_tokens must be 0 or more, got {min(budgets)}.")
    return budgets


def _after(prefix: Cache, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """What the prompts have beyond a prefix of them."""
    held = to_host(prefix.length) - to_host(prefix.padding)
    held = np.broadcast_to(held, len(prompts)) if held.size == 1 else held
    for i, (prompt, n) in enumerate(zip(prompts, held)):
        if len(prompt) <= n:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens, and the prefix holds {n}. The "
                "prompts must begin with it and go on by a token at least."
            )
    return [prompt[max(n, 0) :] for prompt, n in zip(prompts, held)]
