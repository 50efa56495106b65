"""The checkers of notebook 04."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx

from . import call, todo, verdict


def check_slot(slot: Callable) -> bool | None:
    wrong = None
    for position, window in ((0, 64), (63, 64), (64, 64), (150, 64), (7, 3)):
        answer, wrong = call(slot, position, window)
        if answer is NotImplemented:
            return todo("slot")
        expected = _slot_that_changes(position, window)
        if wrong is None and answer != expected:
            wrong = (
                f"Position {position} in {window} slots goes to {expected}, not {answer}."
            )
        if wrong:
            break
    return verdict("slot", wrong)


def _slot_that_changes(position: int, slots: int) -> int:
    """By writing there: the cache itself is asked."""
    ring = mx.cache.LayerCache(jnp.zeros((1, slots, 2)), jnp.zeros((1, slots, 2)))
    one = jnp.ones((1, 1, 2))
    written = ring.write(one, one, jnp.int32(position))
    return int(jnp.argmax(written.keys[0, :, 0]))


def check_held_by(held_by: Callable) -> bool | None:
    wrong = None
    for slot, written, slots in (
        (20, 150, 64),
        (22, 150, 64),
        (5, 5, 64),
        (0, 1, 8),
        (7, 64, 8),
    ):
        answer, wrong = call(held_by, slot, written, slots)
        if answer is NotImplemented:
            return todo("held_by")
        ring = mx.cache.LayerCache(jnp.zeros((1, slots, 2)), jnp.zeros((1, slots, 2)))
        index = int(ring.indices(jnp.int32(written))[slot])
        expected = index if index >= 0 else None
        if wrong is None and answer != expected:
            wrong = f"Slot {slot} holds {expected} after {written} tokens, not {answer}."
        if wrong:
            break
    return verdict("held_by", wrong)


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
