"""The helpers of notebook 04: rings to look into, keys of both ports, and the figures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image

import mistral_eqx as mx
import nbtools as nb
import one_file_ref


plt.rcParams["figure.dpi"] = 90


def empty_ring(slots: int, width: int = 2) -> mx.cache.LayerCache:
    """The cache of one layer with one key head, of any number of slots."""
    zeros = jnp.zeros((1, slots, width))
    return mx.cache.LayerCache(zeros, zeros)


def new_cache(model: mx.Transformer, **options) -> mx.Cache:
    """An empty cache for one text of 256 tokens, by default read one at a time."""
    options = dict(chunk=1, max_length=256, dtype=jnp.float32) | options
    return mx.Cache(model.config, jnp.int32(0), **options)


def keys_of_both(package, one_file, tokens, dtype: str, n: int = 100):
    """The last keys that one layer of each port stores of `n` tokens: of the package, which
    has room for all, and of the one-file port, whose ring is as long as the window."""
    cast = lambda model: jax.tree.map(lambda x: x.astype(dtype), model)
    config, window = package.config, package.config.sliding_window
    positions = jnp.arange(n, dtype=jnp.int32)

    @eqx.filter_jit
    def of_package(block, x):
        kept = [jnp.zeros((config.n_kv_heads, 200, config.head_dim), dtype)] * 2
        places, empty = mx.rope.Places(config, positions), mx.cache.LayerCache(*kept)
        return block.attention(block.attention_norm(x), places, empty)[1].keys

    @eqx.filter_jit
    def of_one_file(block, x, ring):
        theta, mask = config.rope_theta, jnp.zeros((n, n), dtype)
        freqs = one_file_ref.precompute_freqs_cis(config.head_dim, positions, theta)
        x = block.attention_norm(x[None])
        return block.attention(x, freqs, positions, mask, ring)[1][0]

    x = cast(package.tok_embeddings)(jnp.asarray(tokens[:n]))  # [T, D]
    ours = jnp.swapaxes(of_package(cast(package.layers[0]), x), 0, 1)  # [slots, K, width]
    ring = cast(one_file).empty_cache(1, n)[0]
    theirs = of_one_file(cast(one_file.layers[0]), x, ring)[0]
    order = np.arange(n - window, n)
    return np.float32(ours[order]), np.float32(theirs[order % window])


def rewrite(cache: mx.Cache, position, change) -> mx.Cache:
    """The cache with other keys in the slot that was written last."""
    slot = position % cache.layers[0].slots
    new = lambda layer: layer.keys.at[:, slot].set(change(layer, slot))
    keys = [new(layer) for layer in cache.layers]
    return eqx.tree_at(lambda c: [layer.keys for layer in c.layers], cache, keys)


def temporary_bytes(model, cache: mx.Cache, chunk: int) -> int:
    """What the program that reads a chunk needs beside weights, cache and tokens."""
    piece = jax.ShapeDtypeStruct((chunk,), jnp.int32)
    run = jax.jit(lambda model, piece, cache: model(piece, cache))
    compiled = run.lower(model, piece, cache).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def by_token(cache: mx.Cache, n: int) -> np.ndarray:
    """The last `n` keys of every layer, in the order of the text."""
    order = np.argsort(cache.layers[0].indices(cache.length))[-n:]
    return np.stack([layer.keys[0][:, order] for layer in cache.layers])


# --- figures --------------------------------------------------------------------------


def plot_slots(held: np.ndarray) -> None:
    """`held[step, slot]` is the token in a slot, below zero if there is none."""
    steps, slots = held.shape
    figure, axis = plt.subplots(figsize=(7, 1.3 + 0.27 * slots))
    image = axis.imshow(np.ma.masked_less(held.T, 0), aspect="auto", vmin=0, vmax=steps)
    size = {24: 9, 12: 10}.get(steps, 6)
    for step, slot in np.ndindex(held.shape):
        text = held[step, slot] if held[step, slot] >= 0 else "·"
        light = "white" if 0 <= held[step, slot] < steps * 0.6 else "black"
        place = dict(ha="center", va="center", fontsize=size, color=light)
        axis.text(step, slot, text, **place)
    axis.set(xlabel="token being written", ylabel="slot")
    axis.set_yticks(range(0, slots, max(1, slots // 8)))
    axis.grid(False)
    figure.colorbar(image, label="token in the slot", pad=0.02)


def plot_gaps(gaps: dict[str, np.ndarray], window: int) -> None:
    """For each cache, how far its logits are from those without one, at each position."""
    figure, axis = plt.subplots(figsize=(7, 4.6))
    for name, gap in gaps.items():
        axis.semilogy(np.maximum(gap, 1e-7), label=name, markevery=24, markersize=5)
    axis.axvline(window, color="0.6", linewidth=1, marker="", linestyle="-")
    axis.set(
        xlabel="position (tokens); the grey line is the window",
        ylabel="largest gap of the logits",
    )
    axis.legend(ncols=2, fontsize=10, loc="lower center", bbox_to_anchor=(0.5, 1))


def plot_sizes(lengths, sizes: dict[str, list[float]]) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for name, values in sizes.items():
        axis.loglog(lengths, values, label=name, base=2)
    axis.set_xticks(lengths[::2], [f"{n:,}" for n in lengths[::2]])
    axis.set_yticks([0.25, 1, 4, 16, 64], ["0.25", "1", "4", "16", "64"])
    axis.set(xlabel="text (tokens)", ylabel="cache of Mistral 7B (GiB)")
    axis.legend()


def plot_zones(mask: np.ndarray, in_ring, positions, words: list[str]) -> None:
    """What the queries of a chunk see of the ring's slots."""
    figure, axis = plt.subplots(figsize=(7, 3))
    now = in_ring >= positions[0]
    shown = np.where(mask, np.where(now, 0.8, 0.55)[None], 0.08)
    axis.imshow(shown, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for t, s in np.ndindex(mask.shape):
        seen = "now" if now[s] else "cache"
        hidden = "future" if in_ring[s] > positions[t] else "past"
        place = dict(ha="center", va="center", color="white" if mask[t, s] else "black")
        axis.text(s, t, seen if mask[t, s] else hidden, **place)
    name = lambda i: f"{words[i]}\n{i}" if 0 <= i < len(words) else "·"
    axis.set_xticks(range(len(in_ring)), [name(int(i)) for i in in_ring])
    axis.set_yticks(range(len(positions)), [f"{words[int(p)]} {int(p)}" for p in positions])
    axis.set(xlabel="slot of the ring, with the token that it holds", ylabel="query")
    axis.grid(False)


def plot_chunks(chunks, seconds: list[nb.Timing], temporary: list[float]) -> None:
    """Time and memory, one above the other, over the size of the chunk."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 5.4), sharex=True)
    median, low, high = 1000 * np.array(seconds).T
    axes[0].errorbar(chunks, median, [median - low, high - median], capsize=3)
    axes[1].plot(chunks, temporary)
    axes[0].set(ylabel="time to read 256\ntokens (ms)")
    axes[1].set(xlabel="chunk (tokens)", ylabel="temporary memory\n(MiB)")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(chunks, chunks)
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")


# --- the moving picture ---------------------------------------------------------------


def film(held: np.ndarray, path: str) -> str:
    """The ring as a moving picture, a frame for each token. It tells `held`."""
    frames = lambda: (_frame(held, step) for step in range(len(held)))
    return nb.film(path, str(held.tolist()), frames, [*[700] * (len(held) - 1), 2500])


def _frame(held: np.ndarray, step: int) -> Image.Image:
    """Above, the slots in a circle; below, the tokens, of which the ring holds some."""
    steps, slots = held.shape
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.95, steps))
    colour = lambda token: "white" if token < steps * 0.6 else "black"
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(5.6, 6), height_ratios=(4.4, 1), dpi=72
    )
    for slot, token in enumerate(held[step]):
        angle = np.pi / 2 - 2 * np.pi * slot / slots
        x, y = np.cos(angle), np.sin(angle)
        new = token == step
        face = shades[token] if token >= 0 else "white"
        circle = dict(fc=face, ec="black" if new else "0.5", lw=4 if new else 1)
        above.add_patch(plt.Circle((2 * x, 2 * y), 0.62, **circle))
        middle = dict(ha="center", va="center")
        if token >= 0:
            above.text(2 * x, 2 * y, token, fontsize=19, color=colour(token), **middle)
        above.text(3.2 * x, 2.95 * y, f"slot {slot}", fontsize=12, **middle)
    told = f"token {step}\n{step} % {slots} = {step % slots}"
    above.text(0, 0, told, fontsize=17, **middle)
    above.set(xlim=(-3.9, 3.9), ylim=(-3.2, 3.2), aspect="equal")
    above.axis("off")
    for token in range(steps):
        row, column = divmod(token, steps // 2)
        kept = token in held[step]
        face = shades[token] if kept else "white"
        box = dict(
            fc=face, ec="black" if token == step else "0.6", lw=3 if token == step else 1
        )
        below.add_patch(plt.Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, **box))
        ink = colour(token) if kept else "0.65"
        if token <= step:
            place = (column + 0.5, row + 0.5, str(token))
            below.text(*place, ha="center", va="center", fontsize=13, color=ink)
    below.set(xlim=(0, steps // 2), ylim=(2, 0))
    below.set_title("the text: the ring holds the filled ones", fontsize=12)
    below.axis("off")
    return nb.as_image(figure).quantize(24)
