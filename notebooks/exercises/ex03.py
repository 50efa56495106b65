"""The checkers of notebook 03."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx

from . import check_cases


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


def check_layers_for(layers_for: Callable) -> bool | None:
    layers = {(63, 64): 1, (4032, 64): 64, (4096, 64): 66, (64, 64): 2, (5, 2): 5}

    def fault(answer, reach, window):
        if answer == layers[reach, window]:
            return None
        case = f"A reach of {reach} with a window of {window}"
        if answer > layers[reach, window]:
            return f"{case}: fewer layers than {answer} are enough."
        why = f"{answer} layers reach {answer * (window - 1)} positions back"
        if answer == -(-reach // window):
            why += ", because a query sees itself: a layer moves one position less"
        return f"{case}: {why}."

    return check_cases("layers_for", layers_for, layers, fault)


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
