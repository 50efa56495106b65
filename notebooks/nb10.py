"""Plots and plumbing of notebook 10."""

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

import nbtools as nb


KINDS = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")]
KINDS += [f"feed_forward.{w}" for w in ("w1", "w2", "w3")]


# The largest value of a grid with as many values on both sides of zero.
TOPS = {"4 bits": 7, "8 bits": 127}


def distance(model, other) -> float:
    """How far the matrices of a model are from another's, over the size of those."""
    ours, theirs = nb.named(model), nb.named(other)
    names = [n for n, x in theirs.items() if x.ndim == 2 and "tok_embeddings" not in n]
    squares = lambda arrays: sum(float((x**2).sum()) for x in arrays)
    apart = squares(ours[n] - theirs[n] for n in names)
    return (apart / squares(theirs[n] for n in names)) ** 0.5


def by_kind(values: dict[str, float], numbers: dict[str, int]) -> dict[str, float]:
    """Millinats for a million numbers, for each kind of matrix."""
    kind = lambda name: name.split(".")[-2]
    kinds = {kind(name): [] for name in values}
    for name in values:
        kinds[kind(name)].append(name)
    return {
        k: 1e9 * sum(values[n] for n in names) / sum(numbers[n] for n in names)
        for k, names in kinds.items()
    }


def grid_plot(row: np.ndarray, back: dict[str, np.ndarray], step: float) -> None:
    """A row's numbers with the grid of four bits, and how far each number moves."""
    row, back = row.ravel(), {name: numbers.ravel() for name, numbers in back.items()}
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True)
    edge = 7 * step
    top.hist(row, bins=np.linspace(-edge, edge, 43), color="#31688e")
    for k in range(-7, 8):
        top.axvline(k * step, color="0.35", linewidth=0.8, linestyle="-", marker="")
    top.set(ylabel="numbers of the row")
    for name, marker in (("4 bits", "s"), ("8 bits", "o")):
        bottom.plot(
            row, back[name] - row, marker=marker, markersize=3.5, linestyle="", label=name
        )
    for sign in (-1, 1):
        bottom.axhline(sign * step / 2, color="0.6", linestyle="--", marker="")
    bottom.set(xlabel="weight", ylabel="rounding error")
    bottom.legend(loc="upper left", bbox_to_anchor=(0, 1.25), ncols=2)


def sweep_plot(bits: list[int], kls: dict[str, np.ndarray]) -> None:
    """KL by bits, and a line that falls by four a bit."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, values in kls.items():
        axis.semilogy(bits, values, label=f"a scale for {name}")
    line = kls["a row"][bits.index(8)] * 4.0 ** (8 - np.array(bits))
    axis.semilogy(
        bits, line, color="0.4", linewidth=1, marker="", label="4 times for each bit less"
    )
    axis.set(
        xlabel="bits of a number, without its scale", ylabel="KL divergence (nats a token)"
    )
    axis.set_ylim(5e-6, 20)
    axis.legend(fontsize=10)


def mixture_plot(mb: dict, found: dict, told: dict) -> None:
    """KL by the size of models in which some matrices have eight bits and others four."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for way in mb:
        measured, added = 1000 * np.array(found[way]), 1000 * np.array(told[way])
        axis.plot(mb[way], measured, label=f"measured, {way}")
        axis.plot(mb[way], added, label=f"predicted, {way}", markersize=3)
    axis.set(xlabel="model (MB), from int4 to int8", ylabel="KL (millinats a token)")
    axis.legend(fontsize=10)


def spike_plot(factors: list[int], spikes: dict[str, np.ndarray]) -> None:
    """KL by the factor of one column, but for float32, whose KL is zero."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for name in list(spikes)[1:]:
        axis.loglog(factors, spikes[name], label=name)
    axis.set_xticks(factors, factors)
    axis.minorticks_off()
    axis.set(xlabel="factor of one column of 256", ylabel="KL divergence (nats a token)")
    axis.legend(fontsize=10)


def heat_map(values: dict[str, float], numbers: dict[str, int]) -> None:
    """KL for a million weights, of each matrix of the blocks."""
    layers = range(1 + max(int(n.split(".")[1]) for n in values if n.startswith("layers")))
    per = {n: 1e9 * values[n] / numbers[n] for n in values}
    grid = np.array([[per[f"layers.{i}.{kind}.weight"] for i in layers] for kind in KINDS])
    figure, axis = plt.subplots(figsize=(7, 3.9))
    image = axis.imshow(np.log10(grid), aspect="auto")
    low, high = np.log10(grid).min(), np.log10(grid).max()
    for (r, c), value in np.ndenumerate(grid):
        light = np.log10(value) < (low + high) / 2
        color = "white" if light else "black"
        axis.text(c, r, f"{value:.1f}", ha="center", va="center", color=color, fontsize=10)
    axis.set_yticks(range(len(KINDS)), [kind.split(".")[1] for kind in KINDS])
    axis.set(xlabel="layer", ylabel="matrix")
    axis.grid(False)
    ticks = [t for t in (1, 3, 10, 30, 100) if low <= np.log10(t) <= high]
    bar = figure.colorbar(image, label="KL (millinats for a million weights)")
    bar.set_ticks(np.log10(ticks), labels=ticks)


def timing_plot(rows: list[int], seconds: dict[str, list], conversion: float) -> None:
    """Milliseconds of a product by the rows that it has, median and quartiles. A level
    line has the milliseconds of the conversion alone."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for name, timings in seconds.items():
        low, middle, high = 1000 * np.array([[t.low, t.median, t.high] for t in timings]).T
        axis.errorbar(rows, middle, [middle - low, high - middle], capsize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(rows, rows)
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.axhline(
        conversion, color="0.5", marker="", linestyle=(0, (6, 3)), label="conversion"
    )
    axis.set(xlabel="rows of x (tokens read at once)", ylabel="one product (ms)")
    axis.legend()


def product_dtypes(function, *arguments) -> list[tuple[str, str]]:
    """The dtypes of both factors of every matrix product in a function's jaxpr."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield tuple(str(factor.aval.dtype) for factor in equation.invars)
            for value in equation.params.values():
                has = lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
                for inner in jax.tree.leaves(value, is_leaf=has):
                    if has(inner):
                        yield from walk(getattr(inner, "jaxpr", inner))

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def run_torch(twin, weights: dict, text):
    """The logits of torch's model with other weights, at every fourth token: [T / 4, V]."""
    import copy

    import torch

    given, state = copy.deepcopy(twin), twin.state_dict()
    state |= {name: torch.tensor(np.array(w)) for name, w in weights.items()}
    given.load_state_dict(state)
    return given(torch.tensor([text.tolist()]))[0, ::4]


def one_line(text: str) -> str:
    """A text in one line, as a cell of a table can hold it."""
    return " / ".join(line.strip() for line in text.split("\n") if line.strip())
