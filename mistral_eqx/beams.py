"""Beam search: the most probable continuations that a fixed number of guesses finds.

The search is one loop on the device. It keeps `n_beams` running guesses for each prompt
and the `n_beams` best that have ended. Every decision is that of Hugging Face's
transformers, so that sequences and scores are the same.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from . import arguments
from .cache import Cache
from .decoding import forward, prefill
from .devices.processes import to_host
from .devices.sharding import fill_rows, shard_cache
from .prompts import checked_eos_ids, checked_prompts, next_power_of_two
from .transformer import Transformer


# Added to the score of what may not be chosen. Finite, because sums of it must be ordered;
# and far below every score, whatever the length penalty makes of it.
_NEVER = -1e30
_LARGEST_FACTOR = 1e20


@dataclasses.dataclass
class Beam:
    """One continuation that a search found.

    **Attributes:**

    - `tokens`, `logprobs`, `alternatives`, `reason`: see
        [`Continuation`][mistral_eqx.generation.Continuation].
    - `score`: the sum of the log-probabilities, that of the end-of-sequence id included,
        over the number of tokens to the power of the length penalty.
    """

    tokens: list[int]
    logprobs: list[float]
    reason: str
    score: float
    alternatives: tuple[()] = ()


class Guesses(eqx.Module):
    """Continuations of every prompt, the best first. Where there is no token stands -1."""

    tokens: Int32[Array, "batch beams length"]
    logprobs: Float32[Array, "batch beams length"]
    scores: Float32[Array, "batch beams"]

    def take(self, indices: Int32[Array, "batch beams"]) -> "Guesses":
        return jax.tree.map(lambda array: _take(array, indices), self)


class SearchState(eqx.Module):
    """Everything that the next step depends on, the model apart."""

    cache: Cache
    running: Guesses
    finished: Guesses
    is_finished: Bool[Array, "batch beams"]
    parents: Int32[Array, "batch beams"]
    hopeful: Bool[Array, "batch"]
    going: Bool[Array, ""]
    step: Int32[Array, ""]


class Options(eqx.Module):
    """Numbers only: other values do not retrace."""

    max_tokens: Int32[Array, ""]
    length_penalty: Float32[Array, ""]
    stop_when_full: Bool[Array, ""]
    wait_for_longest: Bool[Array, ""]
    eos_ids: Int32[Array, "eos"]


def beam_search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    n_beams: int,
    n_best: int = 1,
    max_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    eos_ids: Sequence[int] = (),
    chunk: int | None = None,
) -> list[list[Beam]]:
    """Searches for the most probable continuations of prompts.

    A prompt is read once, then its cache is held `n_beams` times. At every step beams that
    go on from another's tokens take a copy of its cache: a step moves the whole cache once
    more than greedy decoding with as many rows does, and no more than that.

    **Arguments:**

    - `model`, `prompts`, `chunk`: see [`prefill`][mistral_eqx.prefill].
    - `n_beams`: how many guesses to follow for each prompt.
    - `n_best`: how many of them to return.
    - `max_tokens`: the most tokens to make, the end-of-sequence id included.
    - `length_penalty`: above 0 longer texts are preferred, below 0 shorter ones.
    - `early_stopping`: `True` ends the search of a prompt at `n_beams` ended guesses;
        `False` when the best running one is no better than the worst of these at its
        present length; `"never"` when it could not become so at any length.
    - `eos_ids`: end a guess, and are not returned.

    **Returns:**

    The `n_best` beams of each prompt, the best first.

    **Raises:**

    `ValueError` as `prefill` does, and for a number outside its range.
    """
    vocab_size = model.config.vocab_size
    prompts = checked_prompts(prompts, vocab_size)
    eos_ids = checked_eos_ids(eos_ids, vocab_size)
    n_beams = arguments.integer("n_beams", n_beams, least=1, most=vocab_size)
    n_best = arguments.integer("n_best", n_best, least=1, most=n_beams)
    max_tokens = arguments.integer("max_tokens", max_tokens, least=1)
    length_penalty = arguments.number("length_penalty", length_penalty)
    if not -np.inf < length_penalty < np.inf:
        raise ValueError(f"length_penalty must be finite, got {length_penalty!r}.")
    if -length_penalty * np.log(max_tokens) > np.log(_LARGEST_FACTOR):
        raise ValueError(
            f"length_penalty is too small, got {length_penalty!r}: the score of a text of "
            f"{max_tokens} tokens would be too large for a float."
        )
    if early_stopping is not True and early_stopping not in (False, "never"):
        raise ValueError(
            'early_stopping must be True, False or "never", got '
            f"{arguments.shown(early_stopping)}."
        )
    rows = fill_rows(prompts, model)
    cache, logits = prefill(model, rows, max_tokens=max_tokens, chunk=chunk)
    state = _start(cache, len(rows), n_beams=n_beams, length=next_power_of_two(max_tokens))
    cache = shard_cache(state.cache, model)
    state = eqx.tree_at(lambda s: s.cache, state, cache)
    options = Options(
        max_tokens=jnp.int32(max_tokens),
        length_penalty=jnp.float32(length_penalty),
        stop_when_full=jnp.asarray(early_stopping is True),
        wait_for_longest=jnp.asarray(early_stopping == "never"),
        eos_ids=jnp.asarray(eos_ids or [-1], jnp.int32),
    )
    found = _search(model, state, logits, options)
    return _read(found, n_best, frozenset(eos_ids))[: len(prompts)]


def _start(cache: Cache, n_prompts: int, *, n_beams: int, length: int) -> SearchState:
    repeat = lambda array: jnp.repeat(array, n_beams, axis=0)
    cache = eqx.tree_at(
        lambda c: (c.layers, c.padding),
        cache,
        jax.tree.map(repeat, (cache.layers, cache.padding)),
    )
    shape = (n_prompts, n_beams)

    def guesses(scores):
        return Guesses(
            jnp.full((*shape, length), -1, jnp.int32),
            jnp.zeros((*shape, length), jnp.float32),
            jnp.broadcast_to(jnp.asarray(scores, jnp.float32), shape),
        )

    return SearchState(
        cache,
        # All beams begin alike: only the first may be followed from there.
        running=guesses([0.0] + [_NEVER] * (n_beams - 1)),
        finished=guesses([_NEVER] * n_beams),
        is_finished=jnp.zeros(shape, bool),
        parents=jnp.zeros(shape, jnp.int32),
        hopeful=jnp.ones(n_prompts, bool),
        going=jnp.array(True),
        step=jnp.int32(0),
    )


@eqx.filter_jit
def _search(
    model: Transformer,
    state: SearchState,
    logits: Float32[Array, "batch vocab"],
    options: Options,
) -> Guesses:
    batch, n_beams = state.parents.shape

    def advance(state):
        rows = (state.parents + n_beams * jnp.arange(batch)[:, None]).reshape(-1)
        follow = lambda array: array[rows]
        # The pads of a prompt are the same in all of its beams.
        layers = jax.tree.map(follow, state.cache.layers)
        cache = eqx.tree_at(lambda c: c.layers, state.cache, layers)
        tokens = jax.lax.dynamic_index_in_dim(
            state.running.tokens, state.step - 1, axis=2, keepdims=False
        )
        cache, logits = forward(model, cache, tokens.reshape(-1, 1))
        state = eqx.tree_at(lambda s: s.cache, state, cache)
        return _choose(state, logits.reshape(batch, n_beams, -1), options)

    logits = jnp.broadcast_to(logits[:, None, :], (batch, n_beams, logits.shape[1]))
    state = _choose(state, logits, options)
    return jax.lax.while_loop(lambda state: state.going, advance, state).finished


def _choose(
    state: SearchState, logits: Float32[Array, "batch beams vocab"], options: Options
) -> SearchState:
    """One step of the search: which guesses go on, which have ended, whether any may still
    become better."""
    batch, n_beams, vocab_size = logits.shape
    logprobs = jax.nn.log_softmax(logits)
    totals = (logprobs + state.running.scores[:, :, None]).reshape(batch, -1)
    # So many that `n_beams` are left to go on, even if the best all end here.
    n_candidates = max(2, 1 + options.eos_ids.size) * n_beams
    totals, chosen = jax.lax.top_k(totals, n_candidates)
    parents, tokens = chosen // vocab_size, chosen % vocab_size
    candidates = eqx.tree_at(lambda g: g.scores, state.running.take(parents), totals)
    chosen_logprobs = jnp.take_along_axis(logprobs.reshape(batch, -1), chosen, axis=1)
    candidates = eqx.tree_at(
        lambda g: (g.tokens, g.logprobs),
        candidates,
        (
            candidates.tokens.at[:, :, state.step].set(tokens),
            candidates.logprobs.at[:, :, state.step].set(chosen_logprobs),
        ),
    )
    step = state.step + 1
    ends = jnp.isin(tokens, options.eos_ids) | (step >= options.max_tokens)

    scores, best = jax.lax.top_k(totals + _NEVER * ends.astype(jnp.float32), n_beams)
    parents = _take(parents, best)
    running = eqx.tree_at(lambda g: g.scores, candidates.take(best), scores)

    # Only the best `n_beams` candidates may end; the others are there to go on.
    may_end = ends & (jnp.arange(n_candidates) < n_beams)[None, :]
    full = jnp.all(state.is_finished, axis=1) & options.stop_when_full
    closed = (full | ~state.hopeful)[:, None]
    length = step.astype(jnp.float32) ** options.length_penalty
    scores = totals / length + _NEVER * (
        (~may_end).astype(jnp.float32) + closed.astype(jnp.float32)
    )
    candidates = eqx.tree_at(lambda g: g.scores, candidates, scores)
    join = lambda *arrays: jnp.concatenate(arrays, axis=1)
    pool = jax.tree.map(join, state.finished, candidates)
    _, best = jax.lax.top_k(pool.scores, n_beams)
    finished = pool.take(best)
    is_finished = _take(join(state.is_finished, may_end), best)

    longest = options.wait_for_longest & (options.length_penalty > 0)
    length = jnp.where(longest, options.max_tokens, step).astype(jnp.float32)
    possible = running.scores[:, :1] / length**options.length_penalty
    worst = jnp.min(finished.scores, axis=1, keepdims=True)
    better = possible > jnp.where(is_finished, worst, _NEVER)
    hopeful = state.hopeful & jnp.any(better, axis=1)
    all_full = jnp.all(is_finished) & options.stop_when_full
    return SearchState(
        state.cache,
        running,
        finished,
        is_finished,
        parents,
        hopeful,
        going=jnp.any(hopeful) & ~all_full & ~jnp.all(ends),
        step=step,
    )


def _take(array: Array, indices: Int32[Array, "batch beams"]) -> Array:
    """Entries of the second axis, for each row of the first."""
    return jax.vmap(lambda row, index: row[index])(array, indices)


def _read(found: Guesses, n_best: int, eos_ids: frozenset[int]) -> list[list[Beam]]:
    found = to_host(found)
    rows = []
    for tokens, logprobs, scores in zip(found.tokens, found.logprobs, found.scores):
        rows.append([])
        for beam in range(n_best):
            made = tokens[beam][tokens[beam] >= 0].tolist()
            reason = "eos" if made[-1] in eos_ids else "length"
            n = len(made) - (reason == "eos")
            rows[-1].append(
                Beam(
                    made[:n],
                    logprobs[beam, :n].tolist(),
                    reason=reason,
                    score=float(scores[beam]),
                )
            )
    return rows
