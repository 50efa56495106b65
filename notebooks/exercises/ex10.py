"""The checkers of notebook 10."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx
from mistral_eqx.files.names import skeleton

from . import check_cases, todo, verdict


# --- a zero point -------------------------------------------------------------------------

RANGES = ((-1, 3), (-3, 1), (2, 3), (-0.1, 0.1))


def check_with_zero_point(with_zero_point: Callable) -> bool | None:
    return check_cases(
        "with_zero_point",
        with_zero_point,
        [(jnp.asarray(np.linspace(*ends, 41, dtype=np.float32)),) for ends in RANGES],
        _wrong_grid,
        "Every row uses the whole grid.",
    )


def _wrong_grid(answer, row: jax.Array) -> str | None:
    row = np.asarray(row)
    name = f"a row from {row[0]:g} to {row[-1]:g}"
    try:
        values, scale, zero = (np.asarray(part, np.float64) for part in answer)
    except (TypeError, ValueError):
        return "It should give back three things: values, scale and zero point."
    if values.shape != row.shape or scale.size != 1 or zero.size != 1:
        return "The values should have the row's shape; scale and zero point are numbers."
    if not all(np.isfinite(part).all() for part in (values, scale, zero)):
        return f"Something that {name} gives is not finite."
    scale, zero = scale.item(), zero.item()
    if zero != round(zero):
        return (
            f"The zero point of {name} is {zero:.3g}. It must be a whole number, or "
            "else no value stands for exactly 0."
        )
    if not 0 <= zero <= 255:
        return (
            f"The zero point of {name} is {zero:.0f}, outside of 0 to 255: let the range "
            "reach to 0 before you cut it into steps."
        )
    if (values != np.round(values)).any() or values.min() < 0 or values.max() > 255:
        return (
            f"The values of {name} go from {values.min():.3g} to {values.max():.3g}; they "
            "should be whole numbers from 0 to 255."
        )
    step = (max(row.max(), 0.0) - min(row.min(), 0.0)) / 255
    if scale > 1.01 * step:
        return (
            f"The scale of {name} is {scale:.3g}; {step:.3g} is enough: (largest - "
            "smallest) / 255, not twice the absmax."
        )
    back = scale * (values - zero)
    worst = np.argmax(np.abs(back - row))
    if np.abs(back - row)[worst] > 0.51 * step:
        return f"In {name}, {row[worst]:.3g} comes back as {back[worst]:.3g}."
    return None


# --- five patients ------------------------------------------------------------------------

FAULTS = ("toward zero", "axis", "wraps", "halves", "twice")
# What gives each away: shown to whoever took it for something else.
_SIGNS = {
    "wraps": "some numbers have changed their sign: look at the largest of each row",
    "toward zero": "no number is farther from zero than it was, and errors reach a step",
    "axis": "each number is off by a factor of its row and another of its column",
    "halves": "the right numbers are there, 16 places away from where they were",
    "twice": "all numbers are far too small, by about the same factor in a row",
}


def patients() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A weight `[64, 64]` and what a faulty quantizer gave back, by letters."""
    weight = np.asarray(jr.normal(jr.key(10), (64, 64)))
    weight *= np.exp(0.4 * np.asarray(jr.normal(jr.key(11), (64, 1))))
    absmax = lambda axis: np.abs(weight).max(axis, keepdims=True)
    rows, columns = absmax(1) / 127, absmax(0) / 127
    wrapped = np.round(weight / (absmax(1) / 128)).astype(np.int64).astype(np.int8)
    step = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True) / 7
    nibbles = (np.round(weight.reshape(-1, 32) / step) * step).reshape(64, 2, 2, 16)
    out = {
        "A": np.round(weight / columns) * rows,
        "B": np.trunc(weight / rows) * rows,
        "C": nibbles[:, :, ::-1].reshape(64, 64),
        "D": np.round(weight / rows) * rows * rows,
        "E": wrapped * (absmax(1) / 128),
    }
    return {letter: (weight.copy(), back) for letter, back in out.items()}


_DIAGNOSIS = dict(zip("ABCDE", ("axis", "toward zero", "halves", "twice", "wraps")))


def check_diagnosis(diagnosis: dict) -> bool | None:
    if not isinstance(diagnosis, dict):
        return verdict("diagnosis", "It should be a dictionary, a fault for each letter.")
    given = [diagnosis.get(letter, NotImplemented) for letter in _DIAGNOSIS]
    if all(answer is NotImplemented for answer in given):
        return todo("diagnosis")
    for letter, answer in zip(_DIAGNOSIS, given):
        if answer is NotImplemented or answer is None:
            return verdict("diagnosis", f"Patient {letter} is still waiting.")
        if not isinstance(answer, str) or answer not in FAULTS:
            known = ", ".join(FAULTS)
            return verdict(
                "diagnosis", f"{answer!r} is no known fault. These are: {known}."
            )
    bad = [x for x, answer in zip(_DIAGNOSIS, given) if answer != _DIAGNOSIS[x]]
    if bad:
        right = len(_DIAGNOSIS) - len(bad)
        return verdict(
            "diagnosis",
            f"{right} of 5 are right. Of patient {bad[0]}: {_SIGNS[_DIAGNOSIS[bad[0]]]}.",
        )
    return verdict("diagnosis", None, "All five will recover.")


# --- seven billion ------------------------------------------------------------------------


def check_gigabytes(gigabytes) -> bool | None:
    if gigabytes is NotImplemented:
        return todo("gigabytes")
    try:
        answer = float(gigabytes)
    except (TypeError, ValueError, OverflowError):
        answer = np.nan
    if not np.isfinite(answer):
        return verdict("gigabytes", "It should be a number.")
    # Shapes alone: nothing is allocated.
    whole = skeleton(mx.RELEASED["mistral-7b-v0.1"], jnp.bfloat16)
    small = eqx.filter_eval_shape(mx.quantize, whole, "int4")
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e9
    right, numbers = size(small), size(whole) / 2
    table = size(small.tok_embeddings) / 2  # billions of numbers
    near = lambda other: abs(answer - other) <= 0.01 * other
    wrong = None
    if not near(right):
        tempting = {
            numbers / 2: "Four bits are not all: each 32 numbers have a scale as well.",
            numbers * 4.5 / 8: "The embeddings are not quantized: they stay in bfloat16.",
            right + 2 * table: "The embeddings have two bytes a number, not four.",
            right * 1e9 / 2**30: "That is in GiB (2^30 bytes); a GB has 10^9.",
            (numbers - table) / 2 + 2 * table: "Where are the scales?",
        }
        wrong = next((why for other, why in tempting.items() if near(other)), None)
        wrong = wrong or (
            "Count the numbers of the matrices, and those of the embeddings, apart: "
            f"{answer:.3g} GB is {'more' if answer > right else 'less'} than it takes."
        )
    return verdict("gigabytes", wrong, f"{right:.2f} GB, where bfloat16 needs 14.5.")
