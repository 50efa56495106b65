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
        slips = {
            slots - 1: "The last slot is not the end: after it comes slot 0 again.",
            position // slots: "That is how often all slots have been filled.",
            position
            % (slots - 1): f"There are {slots} slots, of which the last is {slots - 1}.",
        }
        if answer != expected:
            told = f"Position {position} in {slots} slots goes to {expected}, not {answer}."
            return f"{told} {slips.get(answer, '')}".strip()

    cases = [(0, 64), (150, 64), (63, 64), (64, 64), (7, 3)]
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
        if answer == expected:
            return None
        told = f"Slot {slot} holds {expected} after {written} tokens, not {answer}."
        if expected is None:
            return f"{told} It was never written."
        if answer is not None and answer >= written:
            return f"{told} The last token is {written - 1}: they are counted from 0."
        if answer is not None and answer < expected:
            return f"{told} Token {expected} has come later, into the same slot."
        return told

    cases = [(20, 150, 64), (22, 150, 64), (5, 5, 64), (0, 1, 8), (7, 64, 8)]
    return check_cases("held_by", held_by, cases, fault)


def check_unrotate(unrotate: Callable) -> bool | None:
    positions = jnp.array([0, 1, 20, 63], jnp.int32)
    cos, sin = mx.rope.rotation(positions, 32, 1e4)
    x = jr.normal(jr.key(3), (4, 2, 32))
    keys = mx.rope.rotate(x, cos, sin)
    answer, wrong = call(unrotate, keys, cos, sin)
    if answer is NotImplemented:
        return todo("unrotate")
    shape = getattr(answer, "shape", None)
    if wrong is None and shape != x.shape:
        wrong = f"The shape is {shape}, not {x.shape}."
    if wrong is None and not np.allclose(answer, x, atol=1e-4):
        bad = np.abs(answer - x).max(axis=(1, 2)) > 1e-4
        wrong = f"It is not undone at position {int(positions[np.argmax(bad)])}. "
        slips = {
            "Cosine and sine have changed places.": (sin, cos),
            "It is turned once more, in the same direction.": (cos, sin),
            "That is half a turn too far: the cosine keeps its sign.": (-cos, sin),
        }
        for told, turn in slips.items():
            if np.allclose(answer, mx.rope.rotate(keys, *turn), atol=1e-4):
                wrong += told
    return verdict("unrotate", wrong)
