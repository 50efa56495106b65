"""The checkers of notebook 05."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import call, todo, verdict


def check_culprit(answer: str) -> bool | None:
    if answer is NotImplemented:
        return todo("culprit")
    traces = {name: count_culprit(name) for name in "ABC"}
    most = max(traces, key=traces.get)
    reasons = {
        "A": "its step is an array of JAX, whose value is no part of a program",
        "B": "filter_jit takes a number of NumPy for an array",
    }
    wrong = None
    if not isinstance(answer, str) or answer not in traces:
        wrong = f"{answer!r} is none of A, B and C."
    elif answer != most:
        wrong = f"{answer} is traced in {traces[answer]} call of 10: {reasons[answer]}."
    return verdict("culprit", wrong, f"Traced for A, B, C: {tuple(traces.values())}.")


@functools.cache
def count_culprit(name: str) -> int:
    """How often each function of the exercise is traced, by running it."""
    traces = []

    @eqx.filter_jit
    def scaled(x, step):
        traces.append(0)
        return x * step

    x = jnp.arange(4)
    for step in range(10):
        scaled(x, {"A": jnp.asarray(step), "B": np.int32(step), "C": step}[name])
    return len(traces)


LENGTHS = np.random.default_rng(0).zipf(1.3, 4000)
LENGTHS = LENGTHS[LENGTHS <= 512][:1000]


def padded(lengths: np.ndarray, buckets: list[int]) -> int:
    """How many pads it takes to bring every prompt to the next bucket."""
    edges = np.sort(np.asarray(buckets))
    return int((edges[np.searchsorted(edges, lengths)] - lengths).sum())


def check_buckets(buckets: list[int]) -> bool | None:
    if buckets is NotImplemented:
        return todo("buckets")
    wrong = None
    edges, failed = call(lambda: [int(edge) for edge in buckets])
    if failed or edges != list(buckets):
        wrong = "It should be a list of whole numbers."
    elif len(edges) == 0:
        wrong = "There is no bucket, so no prompt fits."
    elif len(edges) > 4:
        wrong = f"There are {len(edges)} buckets: four programs at most."
    elif max(edges) < LENGTHS.max():
        wrong = f"The longest prompt has {LENGTHS.max()} tokens and fits in none."
    else:
        pads, powers = padded(LENGTHS, buckets), padded(LENGTHS, [64, 128, 256, 512])
        if pads >= powers / 2:
            wrong = f"{pads:,} pads; 64, 128, 256, 512 need {powers:,}. Halve that."
    return verdict("buckets", wrong)


def check_compile_once(compile_once: Callable) -> bool | None:
    traces = []

    def scaled(x, step):
        traces.append(isinstance(x, jax.core.Tracer))
        return x * step

    run, wrong = call(compile_once, scaled)
    if run is NotImplemented:
        return todo("compile_once")
    for step in range(10):
        answer, wrong = (None, wrong) if wrong else call(run, jnp.ones(4, jnp.int32), step)
        if wrong is None and not np.all(answer == step):
            wrong = f"For step {step} it gives {answer}."
    if wrong is None and not all(traces):
        wrong = "Nothing is compiled: it runs as plain Python at every call."
    if wrong is None and len(traces) != 1:
        wrong = f"It is traced {len(traces)} times: is the step a constant of the program?"
    return verdict("compile_once", wrong)
