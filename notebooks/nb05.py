"""The helpers of notebook 05: stop watches, equations, what JAX says when it compiles once
more, and the figures."""

import io
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np

import nbtools as nb


plt.rcParams["figure.dpi"] = 90
SHADES = ["#dddddd", "#999999", "#31688e", "#000000"]


def equations(jaxpr) -> int:
    """How many a program has, with those of the programs inside it."""
    inner = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    inner = [getattr(part, "jaxpr", part) for part in inner]
    return len(jaxpr.eqns) + sum(equations(part) for part in inner if hasattr(part, "eqns"))


class Stages(NamedTuple):
    """The equations of a program, the seconds of CPU time to trace, lower, compile and run
    it, and what came out."""

    equations: int
    seconds: np.ndarray
    result: jax.Array


def stages(run: Callable, *arguments) -> Stages:
    """Takes a function through the four stages, for the first time."""
    marks = [time.process_time()]
    traced = jax.jit(run).trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    compiled = lowered.compile()
    marks.append(time.process_time())
    result = jax.block_until_ready(compiled(*arguments))
    marks.append(time.process_time())
    return Stages(equations(traced.jaxpr.jaxpr), np.diff(marks), result)


def race(runs: dict[str, Callable], *, rounds: int) -> dict[str, nb.Timing]:
    """Times several functions in turn, which have all been called before."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    quartiles = {name: np.quantile(s, [0.5, 0.25, 0.75]) for name, s in seconds.items()}
    return {name: nb.Timing(*map(float, q)) for name, q in quartiles.items()}


def reasons(calls: Callable) -> list[str]:
    """What JAX says of each compilation while `calls` runs."""
    said = io.StringIO()
    log, handler = logging.getLogger("jax"), logging.StreamHandler(said)
    log.addHandler(handler)
    try:
        with jax.explain_cache_misses(True):
            calls()
    finally:
        log.removeHandler(handler)
    return [line.strip() for line in said.getvalue().splitlines() if "[" in line]


# --- figures --------------------------------------------------------------------------


def plot_calls(seconds: list[float]) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.2))
    calls = range(1, len(seconds) + 1)
    axis.semilogy(calls, 1000 * np.array(seconds), linestyle="--")
    axis.set(xlabel="call", ylabel="time (ms)")
    axis.set_xticks(calls)


def plot_stages(depths, loop, scan) -> None:
    """Above, the seconds of each stage; below, the equations."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 6.4), height_ratios=(1.4, 1))
    place = np.arange(len(depths))
    for offset, measured, name in ((-0.2, loop, "loop"), (0.2, scan, "scan")):
        bottom = np.zeros(len(depths))
        for i, stage in enumerate(("trace", "lower", "compile", "run")):
            seconds = np.array([made.seconds[i] for made in measured])
            label = stage if offset < 0 else None
            bars = dict(bottom=bottom, color=SHADES[i], label=label, edgecolor="0.3")
            axes[0].bar(place + offset, seconds, 0.36, **bars)
            bottom = bottom + seconds
        for x, top in zip(place + offset, bottom):
            axes[0].text(x, top, name, ha="center", va="bottom", fontsize=10)
    axes[0].set_xticks(place, depths)
    axes[0].set(ylabel="first call\n(CPU seconds)")
    axes[0].legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=10)
    axes[1].plot(depths, [made.equations for made in loop], label="loop")
    axes[1].plot(depths, [made.equations for made in scan], label="scan")
    axes[1].set(xlabel="layers", ylabel="equations\nin the program", ylim=(0, None))
    axes[1].set_xticks(depths)
    axes[1].legend()


def plot_rates(timings: dict, names: list[str], tokens: int) -> None:
    """Tokens a second of every way to write, for each batch."""
    batches = sorted({batch for _, batch in timings})
    figure, axes = plt.subplots(len(batches), 1, figsize=(7, 5.8))
    shades = ["#d5d5d5", "#999999", "#7fb2d9", "#123f66", "#e07b00"]
    for axis, batch in zip(axes, batches):
        for i, name in enumerate(names):
            median, low, high = (tokens * batch / s for s in timings[name, batch])
            axis.barh(i, median, color=shades[i], edgecolor="0.3")
            whisker = dict(xerr=[[median - high], [low - median]], color="k", capsize=3)
            axis.errorbar(median, i, marker="", **whisker)
            axis.text(max(median, low), i, f"  {median:,.0f}", va="center")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(f"batch of {batch}", fontsize=11)
    axes[-1].set_xlabel("tokens a second, prompt included")


def hand_over(*arguments) -> nb.Timing:
    """The time of a call of a compiled function that gets these and does nothing."""
    nothing = jax.jit(lambda *arguments: np.int32(0), keep_unused=True)
    return nb.timeit(lambda: nothing(*arguments), repeats=31)
