"""The checkers of notebook 03."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx

from . import check_cases, number, todo, verdict


def check_band(band: Callable) -> bool | None:
    def fault(answer, n, window):
        expected, case = _visible(n, window), f"For n={n}, window={window}"
        if np.shape(answer) != expected.shape:
            return f"{case} the shape is {np.shape(answer)}, not {expected.shape}."
        answer = np.asarray(answer, bool)
        if np.array_equal(answer, expected):
            return None
        query, key = np.argwhere(answer != expected)[0].tolist()
        if expected[query, key]:
            return f"{case}, query {query} must see key {key}: a window is {window} keys."
        why = "it comes later"
        if key <= query:
            why = f"with the query's own, {query - key + 1} keys are one too many"
        return f"{case}, query {query} must not see key {key}: {why}."

    return check_cases("band", band, [(6, 3), (5, 1), (4, 9)], fault)


def check_layers_needed(layers_needed) -> bool | None:
    if layers_needed is NotImplemented:
        return todo("layers_needed")
    layers_needed = number(layers_needed)
    if layers_needed is None:
        return verdict("layers_needed", "The answer is a number: how many layers.")
    reach, step = 131_072, 4_096 - 1
    wrong = None
    if layers_needed % 1 != 0:
        wrong = "A model has whole layers, and part of one moves nothing."
    elif layers_needed * step < reach:
        wrong = (
            f"{layers_needed} layers reach {int(layers_needed * step):,} positions back, "
            "because a query sees itself: a layer moves one position less than its window."
        )
    elif (layers_needed - 1) * step >= reach:
        wrong = f"One layer less than {layers_needed} reaches as far, too."
    praise = "So the paper's 32 layers fall short of 131,072, by 32 positions."
    return verdict("layers_needed", wrong, praise)


def check_scores(scores: Callable) -> bool | None:
    def fault(answer, n, window):
        expected = int(_visible(n, window).sum())
        slips = {
            n * window: "The first queries do not have so many keys before them.",
            n * (n + 1) // 2: "Late queries see no more keys than the window has.",
            expected - n: "A query sees its own key, too.",
        }
        if answer != expected:
            told = f"For n={n}, window={window} it is {expected}, not {answer}."
            return f"{told} {slips.get(answer, '')}".strip()

    return check_cases("scores", scores, [(3, 64), (64, 64), (512, 64), (10, 1)], fault)


def _visible(n: int, window: int) -> np.ndarray:
    positions = jnp.arange(n, dtype=jnp.int32)
    return np.asarray(mx.attention.visible(positions, positions, window))
