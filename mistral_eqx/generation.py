"""Generation from token ids to token ids: a batch of prompts, continued in blocks."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from . import arguments
from .cache import Cache
from .decoding import BLOCK, REASONS, Choice, DecodeState, decode, prefill
from .devices.processes import to_host
from .devices.sharding import fill_rows, shard_rows
from .prompts import (
    budgets_of,
    checked_alternatives,
    checked_chunk,
    checked_eos_ids,
    checked_prompts,
)
from .sampling import Sampling
from .scoring import alternatives_of
from .transformer import Transformer


@dataclasses.dataclass
class Continuation:
    """What was made behind a prompt.

    **Attributes:**

    - `tokens`, `logprobs`, `alternatives`: see [`Scored`][mistral_eqx.scoring.Scored].
    - `reason`: "eos" if an end-of-sequence id was chosen, which is not among the tokens;
        "length" at `max_tokens`; `None` if the row has not ended.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)
    reason: str | None = None


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
    - `stopped`: a function that is called between blocks, and tells which rows need no
        more tokens. These rows may still get the tokens of one or two blocks that were
        under way.
    - `alternatives`: how many of the most probable tokens to tell at each place.
    - `block`: how many tokens to make between two yields, up to `BLOCK`.
    - `key`: for sampling. A prompt gets the same tokens alone as in any batch; the copies
        of a prompt within a batch get different ones.

    **Yields:**

    For each row what was made since the last time: nothing for rows that have ended.

    **Raises:**

    As `prefill` does, and for a number outside its range; at the call and not at the first
    `next`.
    """
    config = model.config
    prompts = checked_prompts(prompts, config.vocab_size)
    return _blocks(
        model,
        prompts,
        budgets_of(max_tokens, len(prompts)),
        prefix=prefix,
        stopped=stopped,
        chunk=checked_chunk(chunk, model, len(prompts)),
        block=arguments.integer("block", block, least=1, most=BLOCK),
        sampling=sampling,
        eos_ids=checked_eos_ids(eos_ids, config.vocab_size),
        alternatives=checked_alternatives(alternatives, config.vocab_size),
        key=key,
    )


def _blocks(
    model: Transformer,
    prompts: list[list[int]],
    budgets: list[int],
    *,
    prefix: Cache | None,
    stopped: Callable[[], Sequence[bool]] | None,
    chunk: int,
    block: int,
    **options: Any,
) -> Iterator[list[Continuation]]:
    """The generator behind [`stream`][], which has checked the arguments: a generator would
    check them at the first `next` only."""
    most, n_prompts = max(budgets), len(prompts)
    if prefix is None or prefix.padding.size == 1:
        # Rows that have ended before they begin fill up the devices.
        prompts = fill_rows(prompts, model)
    n_filled = len(prompts) - n_prompts
    follow = prompts if prefix is None else _after(prefix, prompts)
    cache, logits = prefill(model, follow, cache=prefix, max_tokens=most, chunk=chunk)
    state = DecodeState.start(
        model,
        cache,
        logits,
        max_tokens=budgets + [0] * n_filled,
        prompts=prompts,
        **options,
    )
    # The next block is started before the last one is read, so that the device does not
    # wait for the host.
    state, made = decode(model, state, jnp.int32(min(block, most)))
    for start in range(block, max(most, 1) + block, block):
        if start < most:
            if stopped is not None:
                rows = jnp.asarray([*stopped(), *[True] * n_filled], bool)
                rows = shard_rows(rows, model) & ~state.ended
                reason = jnp.where(rows, REASONS.index("stop"), state.reason)
                state = eqx.tree_at(lambda s: s.reason, state, reason)
            state, ahead = decode(model, state, jnp.int32(min(block, most - start)))
        rows = _read(made)
        yield rows[:n_prompts]
        if all(row.reason for row in rows) or (stopped is not None and all(stopped())):
            return
        made = ahead


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Continuation]:
    """Continues prompts. Arguments and errors are those of [`stream`][].

    **Returns:**

    What was made in each row.
    """
    blocks = stream(model, prompts, block=BLOCK, **options)
    rows: list[Continuation] = []
    for pieces in blocks:
        rows = rows or [Continuation() for _ in pieces]
        for row, piece in zip(rows, pieces):
            row.tokens += piece.tokens
            row.logprobs += piece.logprobs
            row.alternatives += piece.alternatives
            row.reason = row.reason or piece.reason
    return rows


def _read(block: Choice) -> list[Continuation]:
    """What a block of steps made in each row."""
    block, rows = to_host(block), []
    for i, n in enumerate(block.made.sum(axis=1)):
        found = alternatives_of(block.top_tokens[i, :n], block.top_logprobs[i, :n])
        tokens, logprobs = block.tokens[i, :n].tolist(), block.logprobs[i, :n].tolist()
        rows.append(Continuation(tokens, logprobs, found, REASONS[block.reason[i].max()]))
    return rows


def _after(prefix: Cache, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """What the prompts have beyond a prefix of them."""
    held = to_host(prefix.length) - to_host(prefix.padding)
    if held.size not in (1, len(prompts)):
        raise ValueError(
            f"The prefix has {held.size} rows, but there are {len(prompts)} prompts: give "
            "it one row for all, or one for each."
        )
    held = np.broadcast_to(held, len(prompts)) if held.size == 1 else held
    for i, (prompt, n) in enumerate(zip(prompts, held)):
        if len(prompt) <= n:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens, and the prefix holds {n}. The "
                "prompts must begin with it and go on by a token at least."
            )
    return [prompt[max(n, 0) :] for prompt, n in zip(prompts, held)]
