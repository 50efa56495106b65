"""The checkers of notebook 04."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx

from . import call, check_cases, todo, verdict


def check_slot(slot: Callable) -> bool | None:
    def fault(answer, position, slots):
        expected = _slot_that_changes(position, slots)
        if answer != expected:
            return f"Position {position} in {slots} slots goes to {expected}, not {answer}."

    cases = [(0, 64), (63, 64), (64, 64), (150, 64), (7, 3)]
    return check_cases("slot", slot, cases, fault)


def _slot_that_changes(position: int, slots: int) -> int:
    """By writing there: the cache itself is asked."""
    one = jnp.ones((1, 1, 2))
    written = _ring(slots).write(one, one, jnp.int32(position))
    return int(jnp.argmax(written.keys[0, :, 0]))


def _ring(slots: int) -> mx.cache.LayerCache:
    return mx.cache.LayerCache(jnp.zeros((1, slots, 2)), jnp.zeros((1, slots, 2)))


def check_held_by(held_by: Callable) -> bool | None:
    def fault(answer, slot, written, slots):
        index = int(_ring(slots).indices(jnp.int32(written))[slot])
        expected = index if index >= 0 else None
        if answer != expected:
            return f"Slot {slot} holds {expected} after {written} tokens, not {answer}."

    cases = [(20, 150, 64), (22, 150, 64), (5, 5, 64), (0, 1, 8), (7, 64, 8)]
    return check_cases("held_by", held_by, cases, fault)


def check_unrotate(unrotate: Callable) -> bool | None:
    positions = jnp.array([0, 1, 20, 63], jnp.int32)
    cos, sin = mx.rope.rotation(positions, 32, 1e4)
    x = jr.normal(jr.key(3), (4, 2, 32))
    answer, wrong = call(unrotate, mx.rope.rotate(x, cos, sin), cos, sin)
    if answer is NotImplemented:
        return todo("unrotate")
    if wrong is None and np.shape(answer) != x.shape:
        wrong = f"The shape is {np.shape(answer)}, not {x.shape}."
    if wrong is None and not np.allclose(answer, x, atol=1e-4):
        bad = np.abs(answer - x).max(axis=(1, 2)) > 1e-4
        wrong = f"It is not undone at position {int(positions[np.argmax(bad)])}."
    return verdict("unrotate", wrong)
