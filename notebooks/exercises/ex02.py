"""The checkers of notebook 02."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx

from . import call, number, todo, verdict


def check_grouped(grouped: Callable) -> bool | None:
    key_q, key_k = jr.split(jr.key(5))
    wrong = None
    for seq, slots, heads, kv_heads, head_dim in ((3, 5, 8, 2, 4), (4, 4, 6, 3, 2)):
        queries = jr.normal(key_q, (seq, heads, head_dim))
        keys = jr.normal(key_k, (slots, kv_heads, head_dim))
        answer, wrong = call(grouped, queries, keys)
        if answer is NotImplemented:
            return todo("grouped")
        groups = heads // kv_heads
        scores = lambda keys: jnp.einsum("thd,shd->hts", queries, keys)
        expected = scores(jnp.repeat(keys, groups, axis=1))
        tiled = scores(jnp.tile(keys, (1, groups, 1)))
        wrong = wrong or _told_of_scores(answer, expected, tiled)
        if wrong:
            return verdict("grouped", wrong)
    wrong = _repeats(grouped)
    return verdict("grouped", wrong, "And no key was copied.")


def _told_of_scores(answer, expected, tiled) -> str | None:
    shape = _shape(answer)
    if shape != expected.shape:
        told = f"The shape is {shape}, not [H, T, S] = {expected.shape}."
        if shape is not None and sorted(shape) == sorted(expected.shape):
            told += " The axes are there, in another order."
        elif shape is not None and np.prod(shape) == expected.size:
            told += " Head and group are still two axes: make them one."
        return told
    try:
        close = lambda other: np.allclose(np.float32(answer), other, atol=1e-4)
        if close(expected):
            return None
        if close(tiled):
            return (
                "Query heads 0, 1, 2 get kv heads 0, 1, 0: they take turns. Neighbours "
                "share: 0, 0, 0, ... then 1, 1, 1, ..."
            )
        if close(expected * expected.shape[0] ** -0.5) or _one_factor(answer, expected):
            return "All scores are off by one factor. They are bare products here."
    except (TypeError, ValueError):
        return "These are no numbers."
    return "The shape is right, the scores are not."


def _one_factor(answer, expected) -> bool:
    ratio = np.float32(answer) / np.float32(expected)
    return bool(np.ptp(ratio) < 1e-3 * abs(ratio.mean()))


def _repeats(grouped: Callable) -> str | None:
    """What is made along the way: copies of keys would be seen in the shapes."""
    queries, keys = jnp.zeros((3, 32, 4)), jnp.zeros((1000, 2, 4))
    try:
        program = jax.make_jaxpr(grouped)(queries, keys)
    except Exception:
        return (
            "The scores are right. The checker also looks for copies of keys: for that it "
            "has to trace the function, so use jnp and not NumPy."
        )
    made = [np.prod(v.aval.shape) for e in program.eqns for v in e.outvars]
    # The scores themselves have 96,000 numbers; keys for every query head have 128,000.
    if max(made, default=0) > 32 * 3 * 1000:
        return "The scores are right, and the keys were copied for every query head."
    return None


def check_from_halves(from_halves: Callable) -> bool | None:
    wrong = None
    for heads, head_dim, dim in ((2, 4, 3), (2, 8, 3), (8, 32, 5)):
        weight = jr.normal(jr.key(heads), (heads * head_dim, dim))
        halves = weight.reshape(heads, head_dim // 2, 2, dim).swapaxes(1, 2)
        halves = halves.reshape(weight.shape)
        answer, wrong = call(from_halves, halves, heads)
        if answer is NotImplemented:
            return todo("from_halves")
        wrong = wrong or _told_of_rows(answer, weight, halves, heads, head_dim)
        if wrong:
            break
    return verdict("from_halves", wrong)


def _told_of_rows(answer, weight, halves, heads: int, head_dim: int) -> str | None:
    if _shape(answer) != weight.shape:
        return f"The shape is {_shape(answer)}, not {weight.shape}."
    try:
        answer = np.float32(answer)
    except (TypeError, ValueError):
        return "These are no numbers."
    if np.array_equal(answer, weight):
        return None
    what = f"{heads} heads of width {head_dim}"
    if np.array_equal(answer, halves):
        return f"With {what}: nothing has moved."
    rows = halves.shape[0]
    across = np.float32(halves).reshape(2, rows // 2, -1).swapaxes(0, 1)
    if np.array_equal(answer, across.reshape(halves.shape)):
        return f"With {what}: rows have moved from one head into another."
    # Each row is looked for in the answer.
    row = next(i for i in range(rows) if not np.array_equal(answer[i], weight[i]))
    found = [i for i in range(rows) if np.array_equal(answer[row], weight[i])]
    if not found:
        return f"With {what}: row {row} is no row of the matrix."
    return (
        f"With {what}: row {row} should be the pair {row % head_dim // 2}'s, and is the "
        f"one that belongs in row {found[0]}. Is it the way there, or back?"
    )


def check_slow_pairs(slow_pairs) -> bool | None:
    if slow_pairs is NotImplemented:
        return todo("slow_pairs")
    slow_pairs = number(slow_pairs)
    if slow_pairs is None:
        return verdict("slow_pairs", "The answer is a number: how many pairs.")
    slow = _pairs_below(2 * np.pi, 1e6)
    told = {
        2 * slow: "You have counted features; two of them are a pair.",
        64 - slow: "These are the pairs that do turn once.",
        _pairs_below(1, 1e6): "A full turn is not one radian: it is 2π.",
        _pairs_below(2 * np.pi, 1e4): "That is for theta 1e4; here it is 1e6.",
    }
    wrong = None
    if slow_pairs != slow:
        default = "Too many." if slow_pairs > slow else "Too few."
        wrong = told.get(slow_pairs, default)
    few = _pairs_below(2 * np.pi, 1e4)
    praise = f"With theta 1e4 it is {few}: a larger theta makes more slow hands."
    return verdict("slow_pairs", wrong, praise)


def _pairs_below(angle: float, theta: float) -> int:
    """Pairs of a head of 128 that turn less than this in 32,768 tokens, by the package."""
    cos, sin = mx.rope.rotation(jnp.array([1], jnp.int32), 128, theta)
    return int((32_768 * np.arctan2(sin[0], cos[0]) < angle).sum())


def _shape(answer):
    try:
        return np.shape(answer)
    except Exception:
        return None
