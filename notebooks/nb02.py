"""The plots of notebook 02."""

import json

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import nbtools as nb


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


BEHIND, LAST, PAIRS = 4, 20, (0, 2, 4)  # what the moving picture shows


def film(queries, keys, path: str) -> np.ndarray:
    """A query and a key at positions 0, 1, 2, ..., [T, d], as a moving picture of two
    scenes: first both walk on, the key always four tokens behind; then the query walks on
    alone. It tells its scores, [2, T], up to rounding. Gives these back."""
    queries, keys = np.asarray(queries), np.asarray(keys)
    walk = [*range(BEHIND, LAST + 1)]
    scenes = [[(m, m - BEHIND) for m in walk], [(m, 0) for m in walk]]
    scores = np.array([[queries[m] @ keys[n] for m, n in scene] for scene in scenes])

    def frames():
        drawn = [
            _frame(queries[m], keys[n], scenes, scores, scene, i)
            for scene, moments in enumerate(scenes)
            for i, (m, n) in enumerate(moments)
        ]
        # One palette for all: that of the last frame, which has every colour.
        palette = drawn[-1].quantize(16)
        return [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in drawn]

    told, pauses = json.dumps(scores.round(4).tolist()), [*[250] * (len(walk) - 1), 2000]
    read = lambda told: np.array(json.loads(told))
    same = lambda one, other: np.abs(read(one) - read(other)).max() <= 1e-3
    return read(nb.film(path, told, frames, 2 * pauses, same))


def _frame(query, key, scenes, scores, scene: int, now: int) -> Image.Image:
    """Above, the hands of three pairs; below, the score up to now."""
    figure = plt.figure(figsize=(5.6, 4.9), dpi=80)
    grid = figure.add_gridspec(2, len(PAIRS), height_ratios=(1, 1))
    m, n = scenes[scene][now]
    for column, pair in enumerate(PAIRS):
        dial = figure.add_subplot(grid[0, column])
        at = lambda x, i=2 * pair: np.arctan2(x[i + 1], x[i])
        start, stop = np.degrees([at(key), at(query)])
        dial.add_patch(plt.Circle((0, 0), 1, fill=False, ec="0.6"))
        dial.add_patch(plt.matplotlib.patches.Wedge((0, 0), 0.5, start, stop, fc="0.85"))
        for x, style in ((key, "--"), (query, "-")):
            tip = np.cos(at(x)), np.sin(at(x))
            color = "black" if style == "-" else "#b5367a"
            options = dict(color=color, linestyle=style, linewidth=3, marker="")
            dial.plot([0, tip[0]], [0, tip[1]], **options)
        dial.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        dial.set_title(f"pair {pair}", fontsize=13)
        dial.axis("off")
    figure.suptitle(f"query (solid) at {m},  key (dashed) at {n}", fontsize=15)
    axis = figure.add_subplot(grid[1, :])
    names = "the key follows", "the key stays at 0"
    looks = ("black", "-", "o"), ("#b5367a", "--", "s")
    for i, (name, look) in enumerate(zip(names, looks)):
        until = 0 if i > scene else now + 1 if i == scene else len(scores[i])
        x, y = [m for m, _ in scenes[i]][:until], scores[i][:until]
        look = dict(zip(("color", "linestyle", "marker"), look))
        axis.plot(x, y, markersize=4, label=name, **look)
    low, high = scores.min(), scores.max()
    room = 0.1 * (high - low)
    axis.set(
        xlim=(BEHIND - 1, LAST + 1), ylim=(low - room, high + 5 * room),
        xticks=range(BEHIND, LAST + 1, 4),
    )  # fmt: skip
    axis.set_xlabel("position of the query (tokens)", fontsize=13)
    axis.set_ylabel("score", fontsize=13)
    axis.tick_params(labelsize=12)
    axis.legend(loc="upper center", ncols=2, fontsize=12, handlelength=2.5)
    return nb.as_image(figure)


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
