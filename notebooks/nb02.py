"""The plots of notebook 02."""

import matplotlib.pyplot as plt
import numpy as np


def lens(losses, ceiling: float) -> None:
    """The loss read off the residual stream after each half of a block."""
    _, axis = plt.subplots(figsize=(7, 3.4))
    axis.plot(losses, markersize=5)
    axis.axhline(ceiling, color="0.5", linestyle="--", marker="", label="knows nothing")
    for i, kind in enumerate(["embedding", *["attention", "feed-forward"] * 6]):
        axis.plot(i, losses[i], "o" if kind == "attention" else "s", color="#31688e")
    ticks = ["embed", *(f"{half}{n}" for n in range(1, 7) for half in ("a", "f"))]
    axis.set_xticks(range(13), ticks)
    axis.set(
        xlabel="the stream after (a: attention, f: feed-forward, of block 1 to 6)",
        ylabel="loss (nats a token)",
        ylim=(0, None),
    )
    axis.legend()


def norm_sizes(sizes, curves: dict, streams) -> None:
    """The size of a row after the norm against its size before."""
    _, axis = plt.subplots(figsize=(7, 3.6))
    for name, values in curves.items():
        axis.semilogx(sizes, values, label=name, markevery=10, markersize=5)
    axis.plot(streams, [0.06] * len(streams), "|", color="black", markersize=14)
    axis.text(min(streams), 0.12, "rows of our model", fontsize=9)
    axis.axhline(0.5, color="0.7", linewidth=1, linestyle="-", marker="")
    axis.set(xlabel="size of a row before the norm (rms)", ylabel="size after it (rms)")
    axis.legend(loc="upper left")


def heads(profile, groups: int) -> None:
    """How much attention each head pays to each distance."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    image = axis.imshow(profile, aspect="auto", vmin=0, vmax=0.6, cmap="Greys")
    names = [f"head {h}, kv {h // groups}" for h in range(len(profile))]
    axis.set_yticks(range(len(profile)), names)
    for edge in range(groups, len(profile), groups):
        axis.axhline(edge - 0.5, color="black", linestyle="-", marker="")
    axis.set(xlabel="distance from the query back to the key (tokens)")
    axis.grid(False)
    figure.colorbar(image, label="mean attention weight", extend="max")


def dials(cosines) -> None:
    """The cosine of each pair's angle at each position."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    image = axis.imshow(
        np.asarray(cosines).T,
        aspect="auto",
        vmin=-1,
        vmax=1,
        interpolation="nearest",
        cmap=plt.get_cmap("viridis", 10),  # few colours keep the file small
    )
    axis.axvline(64, color="white", linewidth=4, linestyle="-", marker="")
    axis.axvline(64, color="black", linestyle="--", marker="")
    axis.set(xlabel="position (tokens); the line is the window", ylabel="pair of features")
    axis.grid(False)
    figure.colorbar(image, label="cosine of the pair's angle")


def shuffled(with_rope, without) -> None:
    """How far the last token's stream moves if the tokens before it change places."""
    _, axis = plt.subplots(figsize=(7, 3.6))
    for name, gaps in (("with RoPE", with_rope), ("without RoPE", without)):
        axis.semilogy(range(1, len(gaps) + 1), np.maximum(gaps, 1e-8), label=name)
    axis.set(
        xlabel="the stream after block",
        ylabel="change of the last token\n(of the stream's rms)",
    )
    axis.legend(loc="center right")


def powers(scales, measured) -> None:
    """The size of a feed-forward network's output against the scale of its input."""
    _, axis = plt.subplots(figsize=(7, 3.6))
    here = measured[np.argmin(np.abs(scales - 1))]
    axis.loglog(scales, measured, label="SwiGLU of our model", markersize=5)
    axis.loglog(scales, here * scales**2, label="input squared", marker="")
    axis.loglog(scales, here * scales, label="proportional to the input", marker="")
    axis.axvline(1, color="0.7", linewidth=1, linestyle="-", marker="")
    axis.set(
        xlabel="input, times (the line is where the norm puts it)", ylabel="output (rms)"
    )
    axis.legend()


def gates(inputs, silu) -> None:
    """A histogram of what goes into the gates, and the gate itself over it."""
    _, axis = plt.subplots(figsize=(7, 3.6))
    bins = np.linspace(-8, 6, 85)
    shares = np.histogram(inputs, bins)[0] / len(inputs)
    axis.bar(bins[:-1], 100 * shares, width=bins[1] - bins[0], align="edge", color="0.75")
    axis.set(xlabel="w1(x), what goes into a gate", ylabel="share of all gates (%)")
    other = axis.twinx()
    other.plot(bins, silu(bins), marker="", color="#b5367a", label="silu, what comes out")
    other.set_ylabel("silu(w1(x))")
    other.grid(False)
    other.legend(loc="upper left")


def bars(losses: dict, ceiling: float) -> None:
    """The loss of each sabotaged model."""
    _, axis = plt.subplots(figsize=(7, 4.2))
    names = list(losses)
    finite = [loss if np.isfinite(loss) else 0 for loss in losses.values()]
    colors = ["black", *["#8fb3c9"] * (len(names) - 1)]
    axis.barh(names, finite, color=colors)
    for i, loss in enumerate(losses.values()):
        told = f" {loss:.2f}" if np.isfinite(loss) else " not a number"
        plain = dict(facecolor="white", edgecolor="none", pad=0.5)
        axis.text(finite[i], i, told, va="center", fontsize=9, bbox=plain)
    axis.axvline(ceiling, color="0.3", linestyle="--", marker="", zorder=0)
    axis.text(ceiling, -1.1, "knows nothing", ha="center", fontsize=9)
    axis.set(xlabel="loss (nats a token)", xlim=(0, 1.12 * max(finite)))
    axis.invert_yaxis()
