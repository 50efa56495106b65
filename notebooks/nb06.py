"""The figures of notebook 06, and the plumbing that its cells need twice."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mistral_eqx as mx
import nbtools  # noqa: F401  (it sets the style that is changed here)


plt.rcParams["figure.dpi"] = 88  # eight figures in one small file


def shown(word: str) -> str:
    """A token as it can be read on an axis."""
    return word.replace("\n", "↵").replace("$", r"\$")


def label(word: str) -> str:
    """A token as a label: marks alone stand in quotes, so that they are not overlooked."""
    text = shown(word).strip()
    if not text:
        return "␣"
    return text if any(c.isalnum() or c == "↵" for c in text) else f"“{text}”"


def bars(distributions: dict, word, *, n: int = 10) -> None:
    """The most probable tokens of some distributions, one panel above the other."""
    figure, axes = plt.subplots(
        len(distributions), 1, figsize=(7, 2.5 * len(distributions))
    )
    for axis, (text, p) in zip(axes, distributions.items()):
        p = np.asarray(p)
        best = np.argsort(-p)[:n]
        axis.bar(range(n), p[best], color="#31688e")
        for i, token in enumerate(best):
            axis.text(i, p[token], f"{p[token]:.3f}", ha="center", va="bottom", fontsize=10)
        axis.set_xticks(range(n), [label(word(t)) for t in best], rotation=35, ha="right")
        axis.set(ylabel="probability", ylim=(0, 1.15 * p.max()))
        axis.set_title(f"after “{text} …”", fontsize=11, loc="left")
        axis.grid(axis="x", visible=False)


def ranked(distributions: dict, kept: dict) -> None:
    """Probabilities by rank, and where each filter cuts them."""
    _, axes = plt.subplots(
        len(distributions), 1, figsize=(7, 2.7 * len(distributions)), sharex=True
    )
    styles = {
        "top-k": ("--", "#b5367a"),
        "top-p": ("-", "#31688e"),
        "min-p": (":", "black"),
    }
    for axis, (text, p) in zip(axes, distributions.items()):
        p = np.sort(np.asarray(p))[::-1]
        axis.loglog(np.arange(1, p.size + 1), p, color="black", marker="", linestyle="-")
        for name, n in kept[text].items():
            dash, colour = styles[name.split()[0]]
            axis.axvline(
                n + 0.5, linestyle=dash, color=colour, marker="", label=f"{name}: {n:,}"
            )
        axis.set(ylabel="probability")
        axis.set_title(f"after “{text} …”", fontsize=11, loc="left")
        axis.legend(
            title="tokens kept", fontsize=9, title_fontsize=9, loc="lower left",
            bbox_to_anchor=(0.16, 0),
        )  # fmt: skip
    axes[-1].set(xlabel="rank of the token (1 is the most probable)")


def heat(curves: dict, vocab_size: int) -> None:
    """How many tokens each filter keeps, by temperature."""
    _, axis = plt.subplots(figsize=(7, 3.8))
    for name, kept in curves.items():
        temperatures, counts = list(kept), list(kept.values())
        axis.loglog(temperatures, counts, base=2, label=name, markevery=4, markersize=5)
    axis.axhline(vocab_size, color="0.6", linewidth=1, marker="", linestyle="-")
    axis.text(temperatures[0], vocab_size * 0.8, "the vocabulary", va="top", fontsize=9)
    axis.set_xticks([1 / 8, 1 / 2, 1, 2, 8, 32], ["1/8", "1/2", "1", "2", "8", "32"])
    ticks = [1, 8, 64, 512, 2048]
    axis.set_yticks(ticks, [f"{n:,}" for n in ticks])
    axis.set(xlabel="temperature", ylabel="tokens kept")
    axis.legend(loc="lower right")


def scatter(exact, drawn: dict, n: int = 10_000) -> None:
    """How often a token should be drawn, and how often it was."""
    _, axis = plt.subplots(figsize=(7, 4))
    exact = np.asarray(exact)
    order = np.argsort(-exact)
    order = order[np.unique(np.geomspace(1, order.size, 160).astype(int)) - 1]
    styles = [("o", "#31688e"), ("^", "#e07b00")]
    for (name, share), (marker, colour) in zip(drawn.items(), styles):
        y = np.where(share[order] > 0, share[order], 0.55 / n)
        axis.loglog(
            exact[order], y, marker=marker, color=colour, linestyle="", label=name,
            markersize=5,
        )  # fmt: skip
    ends = [exact[order].min(), exact.max()]
    axis.loglog(ends, ends, color="black", marker="", linestyle="-", linewidth=1)
    axis.set(xlabel="probability by the model", ylabel=f"share of {n:,} draws")
    axis.axhline(0.7 / n, color="0.6", linewidth=1, marker="", linestyle="-")
    axis.text(2.4e-6, 0.4 / n, "never drawn", va="center", fontsize=10)
    axis.set(xlim=(2e-6, 0.2), ylim=(0.27 / n, 0.2))
    axis.legend(loc="upper left")


def tree(levels: list, word) -> None:
    """What a beam search kept at each step, and where it came from."""
    _, axis = plt.subplots(figsize=(7, 1.2 + 0.75 * len(levels[0])))
    winner = levels[-1][0][1]
    axis.text(0, 0, "prompt", ha="center", va="center")
    for step, beams in enumerate(levels, start=1):
        parents = [tuple(made) for _, made in levels[step - 2]] if step > 1 else [()]
        for rank, (total, made) in enumerate(beams):
            parent = parents.index(tuple(made[:-1]))
            best = made == winner[:step]
            axis.plot(
                [step - 0.7, step - 0.3],
                [-parent, -rank],
                color="black" if best else "0.55",
                linewidth=2 if best else 1,
                linestyle="-" if best else "--",
                marker="",
            )
            axis.text(
                step, -rank, f"{label(word(made[-1]))}\n{total:.1f}", ha="center",
                va="center", fontsize=11, weight="bold" if best else "normal",
            )  # fmt: skip
    axis.set_xlim(-0.5, len(levels) + 0.5)
    axis.set_ylim(-len(levels[0]) + 0.4, 0.6)
    axis.set_xticks(range(1, len(levels) + 1))
    axis.set_yticks(-np.arange(len(levels[0])), np.arange(1, len(levels[0]) + 1))
    axis.set(xlabel="step (tokens)", ylabel="place in the beam")
    axis.grid(False)


def rounds(costs: dict, period: int) -> None:
    """What a loop costs from round to round, for some windows."""
    _, axis = plt.subplots(figsize=(7, 3.8))
    for name, cost in costs.items():
        x = period * np.arange(len(cost))
        axis.plot(x, cost, label=name, markevery=2, markersize=5)
    axis.set(
        xlabel="tokens of the loop that are written already",
        ylabel="cost of the next round\n(nats a token)",
        ylim=(0, None),
    )
    axis.legend()


def verse(texts: dict, word, *, width: int = 48) -> None:
    """Texts with each token on a shade of its surprise."""
    rows = []
    for name, (tokens, surprise) in texts.items():
        rows.append((name, None))
        line, used = [], 0
        for token, nats in zip(tokens, surprise):
            text = shown(word(token))
            if used + len(text) > width:
                rows.append((None, line))
                line, used = [], 0
            line.append((text, nats))
            used += len(text)
        rows.append((None, line))
    figure, axis = plt.subplots(figsize=(7, 0.31 * len(rows) + 0.9))
    norm, colours = plt.Normalize(0, 10), plt.get_cmap("viridis")
    for y, (name, line) in enumerate(rows):
        if name is not None:
            axis.text(0, -y, name, va="center", fontsize=10, style="italic")
            continue
        x = 0
        for text, nats in line:
            axis.barh(-y, len(text), left=x, height=0.86, color=colours(norm(nats)))
            for i, letter in enumerate(text):
                axis.text(
                    x + i + 0.5, -y, letter, ha="center", va="center", fontsize=11,
                    family="monospace", color="white" if nats < 6 else "black",
                )  # fmt: skip
            x += len(text)
    axis.set_xlim(0, width)
    axis.set_ylim(-len(rows) + 0.4, 0.7)
    axis.axis("off")
    figure.colorbar(
        plt.cm.ScalarMappable(norm, colours), ax=axis, orientation="horizontal",
        label="surprise of the token (nats)", aspect=40, shrink=0.7,
    )  # fmt: skip


def curve(points: dict, others: dict) -> None:
    """Samplers by how probable and how varied what they write is."""
    _, axis = plt.subplots(figsize=(7, 4.2))
    x, y = np.array(list(points.values())).T
    axis.plot(x, y, color="black", label="samples by temperature")
    for i, (name, (a, b)) in enumerate(points.items()):
        # Where the curve bends upwards there is room below it.
        sags = 0 < i < len(y) - 1 and b < (y[i - 1] + y[i + 1]) / 2
        place = dict(xytext=(-6, -14), ha="right") if sags else dict(xytext=(6, 5))
        axis.annotate(name, (a, b), **place, textcoords="offset points", fontsize=10)
    for (name, (a, b)), marker in zip(others.items(), "s^Dv"):
        axis.plot(a, b, marker=marker, linestyle="", markersize=9, label=name)
    axis.set(
        xlabel="mean log-probability by the model (nats a token)",
        ylabel="distinct pairs of tokens (share)",
    )
    axis.legend(loc="lower left")


def band(value: float, limits: dict, above: str) -> str:
    """The word for a number: of the first limit that is not exceeded, else `above`."""
    return next((word for limit, word in limits.items() if value <= limit), above)


def spelled(options: dict) -> str:
    """Options as a row of a table has them."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


def costs(model: mx.Transformer, rows: list) -> np.ndarray:
    """What each token costs after those before it, in nats: the negative logarithm of its
    probability. For rows of tokens of one length `T`, all but the first: `[B, T - 1]`."""
    found = []
    for start in range(0, len(rows), 8):
        # Always the same shape, so that one program serves: pads come last.
        part = np.zeros((8, 180), np.int32)
        for line, row in zip(part, rows[start : start + 8]):
            line[: len(row)] = row
        found.append(np.asarray(_costs(model, jnp.asarray(part))))
    return np.concatenate(found)[: len(rows), : len(rows[0]) - 1]


@jax.jit
def _costs(model: mx.Transformer, rows: jax.Array) -> jax.Array:
    logprobs = jax.vmap(lambda row: jax.nn.log_softmax(model(row)[0]))(rows)
    return -jnp.take_along_axis(logprobs[:, :-1], rows[:, 1:, None], axis=2)[..., 0]
