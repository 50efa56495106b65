"""The checkers of notebook 03."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx

from . import check_cases


def check_band(band: Callable) -> bool | None:
    def fault(answer, n, window):
        expected = _visible(n, window)
        if np.shape(answer) != expected.shape:
            return f"The shape for n={n} is {np.shape(answer)}, not {expected.shape}."
        answer = np.asarray(answer, bool)
        if np.array_equal(answer, expected):
            return None
        query, key = np.argwhere(answer != expected)[0].tolist()
        sees = "sees" if expected[query, key] else "does not see"
        return f"For n={n}, window={window}, query {query} {sees} key {key}."

    return check_cases("band", band, [(6, 3), (5, 1), (4, 9)], fault)


def check_layers_for(layers_for: Callable) -> bool | None:
    layers = {(63, 64): 1, (64, 64): 2, (4032, 64): 64, (4096, 64): 66}

    def fault(answer, reach, window):
        if answer != layers[reach, window]:
            return f"A reach of {reach} with a window of {window}: not {answer} layers."

    return check_cases("layers_for", layers_for, layers, fault)


def check_scores(scores: Callable) -> bool | None:
    def fault(answer, n, window):
        expected = int(_visible(n, window).sum())
        if answer != expected:
            return f"For n={n}, window={window} it is {expected}, not {answer}."

    return check_cases("scores", scores, [(3, 64), (64, 64), (512, 64), (10, 1)], fault)


def _visible(n: int, window: int) -> np.ndarray:
    positions = jnp.arange(n, dtype=jnp.int32)
    return np.asarray(mx.attention.visible(positions, positions, window))
