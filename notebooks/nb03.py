"""The plumbing, the plots and the moving picture of notebook 03."""

import copy
import dataclasses
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import mistral_eqx as mx
import nbtools as nb
import one_file_ref


# --- models ---------------------------------------------------------------------------


def small_config(window: int, n_layers: int = 1, vocab_size: int = 16) -> dict:
    """The sizes of a model small enough to try every token."""
    sizes = dict(dim=32, n_layers=n_layers, head_dim=16, hidden_dim=32, n_heads=2)
    sizes |= dict(n_kv_heads=1, vocab_size=vocab_size, norm_eps=1e-5, rope_theta=1e4)
    return sizes | dict(sliding_window=window)


def small_model(window: int, n_layers: int = 1, vocab_size: int = 16):
    """A model of the package with random weights."""
    config = mx.ModelConfig(**small_config(window, n_layers, vocab_size))
    return mx.Transformer(config, key=jax.random.key(0))


def as_one_file(model, window: int):
    """The one-file port with the weights of a small model."""
    args = one_file_ref.ModelArgs(**small_config(window))
    key = jax.random.key(0)
    skeleton = eqx.filter_eval_shape(one_file_ref.Transformer, args, key=key)
    return jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(model))


def without_preferences(model):
    """A copy whose queries are zero: every token attends equally to all that it sees."""
    where = lambda m: [layer.attention.wq.weight for layer in m.layers]
    return eqx.tree_at(where, model, replace_fn=jnp.zeros_like)


# --- the poke -------------------------------------------------------------------------


def decode_one_file(model, tokens):
    """Logits `[B, T, V]` of the one-file port, which reads a token at a time."""
    cache, logits = model.empty_cache(len(tokens), tokens.shape[1]), []
    for t in range(tokens.shape[1]):
        step, cache = model(tokens[:, t : t + 1], jnp.array([t]), cache)
        logits.append(step[:, 0])
    return jnp.stack(logits, axis=1)


def poke_torch(model, window: int, texts):
    """Logits of torch with the weights of a small model."""
    import torch

    import torch_mistral

    twin = torch_mistral.Transformer(small_config(window))
    weights = nb.named(model).items()
    twin.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in weights})
    return twin(torch.tensor(texts))


# --- read at once, or a token at a time -----------------------------------------------


def gap_one_file(model, text) -> float:
    """max|Δ| of the logits of a text, read at once and read a token at a time."""
    n = len(text)
    at_once, _ = model(text[None], jnp.arange(n), model.empty_cache(1, n))
    stepped = decode_one_file(model, text[None])
    return float(jnp.abs(at_once - stepped).max())


def gap_package(model, text) -> float:
    room = dict(chunk=1, max_length=len(text), dtype=jnp.float32)
    cache = mx.Cache(model.config, jnp.int32(0), **room)
    read, stepped = eqx.filter_jit(model), []
    at_once, _ = read(text)
    for t in range(len(text)):
        logits, cache = read(text[t : t + 1], cache)
        stepped.append(logits[0])
    return float(jnp.abs(at_once - jnp.stack(stepped)).max())


def gap_torch(twin, tokens):
    import torch

    text, cache = torch.tensor([tokens]), twin.empty_cache(1)
    steps = range(len(tokens))
    stepped = [twin(text[:, [t]], t, cache)[0, 0] for t in steps]
    return (twin(text)[0] - torch.stack(stepped)).abs().max()


# --- the reach of the others ----------------------------------------------------------


def reach_one_file(model, embedded) -> int:
    """How far back the gradient of the last logits is not zero."""

    def influence(table, model):
        model = eqx.tree_at(lambda m: m.tok_embeddings.weight, model, table)
        positions = jnp.arange(len(table))
        logits, _ = model(positions[None], positions, model.empty_cache(1, len(table)))
        return logits[0, -1] @ jax.random.normal(jax.random.key(0), (logits.shape[-1],))

    gradient = jax.jit(jax.grad(influence))(embedded, without_preferences(model))
    return int(len(embedded) - 1 - np.flatnonzero(np.linalg.norm(gradient, axis=-1))[0])


def reach_torch(twin, tokens):
    import torch

    twin, kept = copy.deepcopy(twin), []
    for layer in twin.layers:
        layer.attention.wq.weight.zero_()
    with torch.enable_grad():
        keep = lambda module, inputs, out: kept.append(out) or out.retain_grad()
        twin.tok_embeddings.register_forward_hook(keep)
        twin(torch.tensor([tokens]))[0, -1, ::7].sum().backward()
    return len(tokens) - 1 - kept[0].grad[0].norm(dim=-1).nonzero()[0, 0]


# --- other windows --------------------------------------------------------------------


@eqx.filter_jit
def losses_at(model, rows, squeeze):
    """The mean loss of the tokens at each position. RoPE is given positions that are
    multiplied by `squeeze`."""

    def logits(row):
        positions = jnp.arange(len(row), dtype=jnp.int32)
        places = mx.rope.Places(model.config, positions)
        config = model.config
        turned = mx.rope.rotation(squeeze * positions, config.head_dim, config.rope_theta)
        places = eqx.tree_at(lambda p: (p.cos, p.sin), places, turned)
        x = model.tok_embeddings(row)
        for block in model.layers:
            x, _ = block(x, places, None)
        return model.logits(x[:-1])

    log_probabilities = jax.nn.log_softmax(jax.vmap(logits)(rows))
    chosen = jnp.take_along_axis(log_probabilities, rows[:, 1:, None], axis=2)
    return -chosen[:, :, 0].mean(axis=0)


# --- work and memory ------------------------------------------------------------------


def shapes(n: int) -> tuple:
    """Queries, keys and values of `n` tokens in the embedded model, without numbers."""
    make = lambda heads: jax.ShapeDtypeStruct((n, heads, 32), jnp.float32)
    return make(8), make(2), make(2)


def blocks_of(n: int, window: int) -> list[tuple[int, int]]:
    """The queries and the keys of each block into which the package cuts a text of `n`
    tokens: the arguments of `attend`, noted while `attend_sequence` is traced."""
    noted, attend = [], mx.attention.attend

    def noting(queries, keys, values, mask):
        noted.append(mask.shape)
        return attend(queries, keys, values, mask)

    run = lambda *x: mx.attention.attend_sequence(*x, mx.attention.Band(None, window))
    jax.clear_caches()  # else what was traced before is not traced again
    with mock.patch.object(mx.attention, "attend", noting):
        jax.eval_shape(run, *shapes(n))
    return noted


def cache_bytes(config, n: int, window: int | None) -> int:
    config = dataclasses.replace(config, sliding_window=window)
    make = lambda: mx.Cache(config, jnp.int32(0), chunk=1, max_length=n, dtype=jnp.float32)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


# --- plots ----------------------------------------------------------------------------


def masks(seen: dict) -> None:
    """Which keys each query sees, in each program, with their distances."""
    figure, axes = plt.subplots(2, 2, figsize=(5.6, 5.6), sharex=True, sharey=True)
    for axis, (name, mask) in zip(axes.flat, seen.items()):
        axis.imshow(mask, cmap="Greys", vmin=0, vmax=1.6)
        for t, s in np.argwhere(mask):
            axis.text(s, t, t - s, ha="center", va="center", color="white")
        axis.set_title(name, fontsize=11)
        axis.grid(False)
    for axis in axes[1]:
        axis.set_xlabel("key (position)")
    for axis in axes[:, 0]:
        axis.set_ylabel("query (position)")


def _steps(axis, strength, upto: int) -> None:
    """The rows of a small staircase up to a layer: a cell for each token that matters."""
    n_layers, n = strength.shape
    shown = np.where(strength > 0, np.log10(np.maximum(strength, 1e-30)), np.nan)
    low, high = np.nanmin(shown), np.nanmax(shown)
    colours = plt.get_cmap("viridis")
    for layer in range(upto + 1):
        for t in np.flatnonzero(strength[layer]):
            shade = colours(0.1 + 0.85 * (shown[layer, t] - low) / (high - low))
            place = (n - 1 - t - 0.45, layer - 0.42)
            axis.add_patch(plt.Rectangle(place, 0.9, 0.84, fc=shade, ec="0.25", lw=0.6))
    axis.set(xlim=(-0.6, n - 0.4), ylim=(-0.6, n_layers - 0.4), ylabel="after layer")
    axis.set_xlabel("how far back the token lies (positions)")
    axis.set_yticks(range(n_layers))
    axis.set_xticks(range(0, n, 2 if n < 30 else 7))
    axis.grid(False)


def small_staircase(strength) -> None:
    _, axis = plt.subplots(figsize=(7, 3.4))
    _steps(axis, strength, len(strength) - 1)


def staircase(strength, window: int) -> None:
    """How much each token matters to the last one, after each layer of the real model."""
    n_layers = len(strength)
    figure, axis = plt.subplots(figsize=(7, 3.6))
    shown = np.where(strength > 0, np.log10(np.maximum(strength, 1e-30)), np.nan)
    image = axis.imshow(
        np.ma.masked_invalid(shown)[:, ::-1],
        aspect="auto", origin="lower", vmin=-12, vmax=1, interpolation="nearest",
        cmap=plt.get_cmap("viridis", 13),  # few colours keep the file small
    )  # fmt: skip
    back = (window - 1) * np.arange(n_layers)
    theory = np.append(back, back[-1]) + 0.5
    axis.step(theory, np.arange(n_layers + 1) - 0.5, "k", where="pre", marker="")
    axis.set(xlabel="how far back the token lies (positions)", ylabel="after layer")
    axis.set_xlim(-0.5, back[-1] + 72)
    axis.grid(False)
    figure.colorbar(image, label="log10 of the gradient's norm")


def fading(curves: dict) -> None:
    """How much a token matters after the last layer, against its distance."""
    _, axis = plt.subplots(figsize=(7, 3.2))
    for name, values in curves.items():
        axis.semilogy(values, label=name, markevery=42, markersize=6)
    axis.set(
        xlabel="how far back the token lies (positions)",
        ylabel="influence, relative\nto the last token",
    )
    axis.legend()


def windows(trained: int, tried, losses, squeezed: dict) -> None:
    """The loss with each window, and with squeezed positions."""
    _, axis = plt.subplots(figsize=(7, 3.8))
    axis.plot(tried, losses, label="positions as they are", markersize=6)
    axis.plot([*squeezed], [*squeezed.values()], label="positions halved", markersize=7)
    axis.axvline(trained, color="0.6", linewidth=1, marker="", linestyle="-")
    axis.text(trained * 1.04, max(losses), "as trained", va="top")
    axis.set_xscale("log", base=2)
    axis.set_xticks(tried, tried)
    axis.set(xlabel="window at evaluation (keys)", ylabel="loss (nats a token)")
    axis.legend(loc="upper left")


def work_and_memory(lengths, work: dict, memory: dict) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(7, 6.6), sharex=True)
    for name, values in work.items():
        axes[0].loglog(lengths, np.array(values) / 1e6, label=name, alpha=0.8)
    for name, values in memory.items():
        axes[1].loglog(lengths, np.array(values) / 1024, label=name)
    axes[0].set(ylabel="attention of a layer\n(million operations)")
    axes[1].set(xlabel="text (tokens)", ylabel="cache of the model (KiB)")
    ticks = [192 * 2**i for i in range(0, 7, 2)]
    axes[1].set_yticks(ticks, [f"{size:,}" for size in ticks])
    for axis in axes:
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.minorticks_off()
        axis.legend(fontsize=10, loc="upper left")


# --- the moving picture ---------------------------------------------------------------


def film(strength, path: str) -> str:
    """The small staircase as a moving picture, a frame for each layer. It tells a row of 0
    and 1 for each layer."""
    layers = range(len(strength))
    frames = lambda: (_frame(strength, layer) for layer in layers)
    return nb.film(path, rows_of(strength), frames, [*[1100] * (len(layers) - 1), 3000])


def rows_of(strength) -> str:
    return " ".join("".join("01"[int(s > 0)] for s in row) for row in strength)


def _frame(strength, layer: int) -> Image.Image:
    figure, axis = plt.subplots(figsize=(6.4, 3.6), dpi=80)
    _steps(axis, strength, layer)
    back = int(strength.shape[1] - 1 - np.flatnonzero(strength[layer])[0])
    told = "before any layer, a token is itself"
    if layer:
        told = f"after layer {layer}, the last token knows of {back} before it"
    axis.set_title(told, fontsize=13, loc="left")
    axis.axhline(layer, color="0.6", linewidth=1, linestyle="-", marker="", zorder=0)
    return nb.as_image(figure).quantize(48)
