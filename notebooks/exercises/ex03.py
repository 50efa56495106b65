"""The checkers of notebook 03."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx

from . import call, todo, verdict


def check_band(band: Callable) -> bool | None:
    wrong = None
    for n, window in ((6, 3), (5, 1), (4, 9)):
        answer, wrong = call(band, n, window)
        if answer is NotImplemented:
            return todo("band")
        positions = jnp.arange(n, dtype=jnp.int32)
        expected = np.asarray(mx.attention.visible(positions, positions, window))
        if wrong is None and np.shape(answer) != expected.shape:
            wrong = f"The shape for n={n} is {np.shape(answer)}, not {expected.shape}."
        if wrong is None and not np.array_equal(np.asarray(answer, bool), expected):
            query, key = np.argwhere(np.asarray(answer, bool) != expected)[0].tolist()
            sees = "sees" if expected[query, key] else "does not see"
            wrong = f"For n={n}, window={window}, query {query} {sees} key {key}."
        if wrong:
            break
    return verdict("band", wrong)


def check_layers_for(layers_for: Callable) -> bool | None:
    wrong = None
    for reach, window, expected in (
        (63, 64, 1),
        (64, 64, 2),
        (4032, 64, 64),
        (4096, 64, 66),
    ):
        answer, wrong = call(layers_for, reach, window)
        if answer is NotImplemented:
            return todo("layers_for")
        if wrong is None and answer != expected:
            wrong = f"A reach of {reach} with a window of {window}: not {answer} layers."
        if wrong:
            break
    return verdict("layers_for", wrong)


def check_scores(scores: Callable) -> bool | None:
    wrong = None
    for n, window in ((3, 64), (64, 64), (512, 64), (10, 1)):
        answer, wrong = call(scores, n, window)
        if answer is NotImplemented:
            return todo("scores")
        positions = jnp.arange(n, dtype=jnp.int32)
        expected = int(mx.attention.visible(positions, positions, window).sum())
        if wrong is None and answer != expected:
            wrong = f"For n={n}, window={window} it is {expected}, not {answer}."
        if wrong:
            break
    return verdict("scores", wrong)
