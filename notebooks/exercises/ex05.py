"""The checkers of notebook 05."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from . import call, number, todo, verdict


def check_n_traces(n_traces: int) -> bool | None:
    if n_traces is NotImplemented:
        return todo("n_traces")
    given, n_traces = n_traces, number(n_traces)
    traces = count_traces()
    slips = {
        2: "not only the shape of x makes a program new: a Python int is no array.",
        4: "both the two shapes of x and the three values of the Python int count.",
        6: "the calls with an array need a program too, one for each shape of x.",
        12: "arrays of one shape share a program, whatever their values are.",
        16: "each length comes twice, and the second time its programs are there.",
        24: "these are all calls: many of them find a program that is there already.",
    }
    wrong = None
    if n_traces is None or n_traces % 1 != 0:
        wrong = f"It should be a whole number, not {given!r}."
    elif n_traces != traces:
        hint = slips.get(
            int(n_traces), "run the loop by hand, with `traces.append` inside."
        )
        wrong = f"Not {int(n_traces)}: {hint}"
    return verdict("n_traces", wrong, "Two shapes, each with three constants and an array.")


@functools.cache
def count_traces() -> int:
    """How often the function of the exercise is traced, by running it."""
    traces = []

    @eqx.filter_jit
    def scaled(x, step):
        traces.append(0)
        return x * step

    for length in (4, 8, 8, 4):
        x = jnp.ones(length)
        for step in (0, 1, 2):
            scaled(x, step)
            scaled(x, jnp.asarray(step))
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
