"""The plumbing and the plots of notebook 09."""

import re

import matplotlib.pyplot as plt
import numpy as np

from mistral_eqx.learning import training


def pig_latin(text: str) -> str:
    """Moves the consonants that a word begins with behind it, and adds "ay"."""

    def changed(match: re.Match) -> str:
        word = match[0]
        head = re.match(r"[^aeiou]*", word, re.I)[0]
        if len(head) == len(word):
            return word
        out = word[len(head) :] + (head.lower() or "w") + "ay"
        return out.capitalize() if word[0].isupper() else out

    return re.sub(r"[A-Za-z]+", changed, text)


def table_losses(learnt: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Nats a token of two tables of counts: how often each token comes, and how often each
    comes behind each other."""
    size = max(learnt.max(), held_out.max()) + 1
    single = np.bincount(learnt, minlength=size) + 1.0
    single /= single.sum()
    pairs = np.zeros((size, size), np.float32)
    np.add.at(pairs, (learnt[:-1], learnt[1:]), 1)
    before, token = held_out[:-1], held_out[1:]
    # Seldom-seen pairs lean on the single counts, as if 50 more tokens had been read.
    seen = (pairs[before, token] + 50 * single[token]) / (pairs[before].sum(1) + 50)
    return float(-np.log(single[token]).mean()), float(-np.log(seen).mean())


def held_out_loss(frozen, state, data) -> float:
    """The mean loss of a token, over the same rows each time."""
    found = [training.evaluate(frozen, state, batch) for batch in data.measured(8)]
    return float(sum(total for total, _ in found) / sum(n for _, n in found))


def fingerprints(arrays: dict[str, np.ndarray], n: int = 100) -> np.ndarray:
    """Of each array, in the order of the names: its norm, its largest number, and `n` of
    its numbers."""
    rows = []
    for name in sorted(arrays):
        flat = np.asarray(arrays[name], np.float32).ravel()
        sample = flat[np.linspace(0, flat.size - 1, n).astype(int)]
        rows.append([np.linalg.norm(flat), np.abs(flat).max(), *sample])
    return np.array(rows)


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference of each array, relative to the array's largest number; of the
    norms, relative to the norm."""
    norms = np.abs(found[:, 0] / expected[:, 0] - 1)
    largest = np.abs(found - expected)[:, 1:].max(axis=1) / expected[:, 1]
    return np.maximum(norms, largest)


def plot_first_losses(sizes, losses) -> None:
    _, axis = plt.subplots()
    axis.plot(sizes, losses, linestyle="none", markersize=8, label="a new model")
    axis.plot(sizes, np.log(sizes), marker="", label="ln V: no opinion")
    axis.plot(sizes, np.log(sizes) + 0.5, marker="", linestyle=":", label="ln V + 1/2")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    axis.set(xlabel="vocabulary (ids)", ylabel="first loss (nats a token)")
    axis.legend()


def plot_gradients(series: dict[str, np.ndarray], names: list[str]) -> None:
    """Relative differences, in the order in which the model applies its weights."""
    depth = lambda name: int(name.split(".")[1]) if name.startswith("layers") else 99
    order = sorted(range(len(names)), key=lambda i: (depth(names[i]), names[i]))
    order = [i for i in order if names[i].startswith("layers.")]
    _, axis = plt.subplots(figsize=(7, 4))
    for name, values in series.items():
        axis.semilogy(values[order], label=name, markersize=5, linestyle="none")
    axis.set_xticks(np.arange(6) * len(order) / 6 + 4, range(6))
    for i in range(1, 6):
        axis.axvline(i * len(order) / 6 - 0.5, color="0.85", linewidth=1, marker="")
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="layer (nine arrays each)", ylabel="relative Δ of the gradient")
    axis.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def plot_training(losses, measured, lines: dict[str, float]) -> None:
    _, axis = plt.subplots(figsize=(7, 4.2))
    steps = np.arange(1, len(losses) + 1)
    axis.plot(steps, losses, color="0.75", linestyle="-", marker="", label="each batch")
    at, values = zip(*measured.items())
    axis.plot(np.maximum(at, 1), values, label="held out")
    for (name, value), style in zip(lines.items(), ((0, (6, 2)), "-.", ":")):
        axis.axhline(value, color="#b5367a", linestyle=style, label=name)
    axis.set_xscale("log")
    axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axis.set(xlabel="steps (log; untrained at the left edge)", ylabel="nats a token")
    axis.legend(fontsize=9, loc="lower left")


def plot_matrix(losses: np.ndarray, rows, columns) -> None:
    _, axis = plt.subplots(figsize=(6, 3.2))
    image = axis.imshow(losses, vmin=2, vmax=8, aspect="auto")
    for (i, j), value in np.ndenumerate(losses):
        colour = "white" if value < 5.3 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=14)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    axis.set(xlabel="held-out text")
    axis.figure.colorbar(image, label="loss (nats a token)")


def plot_dial(scales, curves: dict[str, np.ndarray], trained: float) -> None:
    _, axis = plt.subplots(figsize=(7, 3.8))
    for name, values in curves.items():
        axis.plot(scales, values, label=name)
    for at, text in ((0, " the base"), (trained, " as trained")):
        axis.axvline(at, color="0.6", linewidth=1, marker="", linestyle="-")
        axis.text(at, 1, text, transform=axis.get_xaxis_transform(), va="top", fontsize=9)
    axis.set(xlabel="scale of the adapter", ylabel="loss (nats a token)")
    axis.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
