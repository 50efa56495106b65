"""The plumbing and the plots of notebook 01."""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mistral_eqx as mx
import nbtools as nb
import one_file_ref


# The sizes of Mistral 7B v0.1, as its paper has them (arXiv 2310.06825, table 1).
MISTRAL_7B = mx.ModelConfig(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
    norm_eps=1e-5, vocab_size=32000, sliding_window=4096, rope_theta=1e4,
)  # fmt: skip


def to_dtype(model, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), model)


# --- other programs for the same weights ----------------------------------------------


def one_mistake(model):
    """A port with a mistake in one line. The last section of the notebook names it."""
    return nb.with_config(model, sliding_window=model.config.sliding_window + 1)


def in_every_layer(model, where, change):
    """A copy of the model in which `change` has been made at `where` in every block."""
    old = [where(block) for block in model.layers]
    return eqx.tree_at(lambda m: [where(b) for b in m.layers], model, [*map(change, old)])


def half_split(attention):
    """The rows of `wq` and `wk` in the order of Hugging Face's files."""
    place = lambda a: (a.wq.weight, a.wk.weight)

    def reorder(weight, heads):
        rows, dim = weight.shape
        pairs = weight.reshape(heads, rows // heads // 2, 2, dim)
        return pairs.swapaxes(1, 2).reshape(rows, dim)

    wq, wk = place(attention)
    new = reorder(wq, attention.n_heads), reorder(wk, attention.n_kv_heads)
    return eqx.tree_at(place, attention, new)


@eqx.filter_jit
def stream(model, tokens, first):
    """The last state of the stream, if the first token stands at position `first`."""
    positions = first + jnp.arange(len(tokens), dtype=jnp.int32)
    x, places = model.tok_embeddings(tokens), mx.rope.Places(model.config, positions)
    for block in model.layers:
        x, _ = block(x, places, None)
    return x


# --- taps: the residual stream, in the one-file port and in torch ----------------------


def taps_one_file(model, tokens):
    """As `taps_package` of the notebook, for the one-file port."""
    positions = jnp.arange(len(tokens))
    args = model.args
    freqs = one_file_ref.precompute_freqs_cis(args.head_dim, positions, args.rope_theta)
    band = mx.attention.visible(positions, positions, args.sliding_window + 1)
    x = jax.vmap(model.tok_embeddings)(tokens)[None]  # [1, T, D]
    mask = jnp.where(band, 0.0, -jnp.inf).astype(x.dtype)
    taps = [x]
    for block, cache in zip(model.layers, model.empty_cache(1, len(tokens))):
        normed = block.attention_norm(x)
        taps.append(x + block.attention(normed, freqs, positions, mask, cache)[0])
        x = taps[-1] + block.feed_forward(block.ffn_norm(taps[-1]))
        taps.append(x)
    logits, _ = model(tokens[None], positions, model.empty_cache(1, len(tokens)))
    return jnp.concatenate(taps), logits[0]


def taps_torch(twin, tokens, rows):
    """The taps and the logits of torch at some of the positions, as one flat array."""
    import torch

    taps = []
    keep_input = lambda module, inputs: taps.append(inputs[0][0])
    hooks = [twin.norm.register_forward_pre_hook(keep_input)]
    for block in twin.layers:
        hooks.append(block.attention_norm.register_forward_pre_hook(keep_input))
        hooks.append(block.ffn_norm.register_forward_pre_hook(keep_input))
    logits = twin(torch.tensor([tokens]))[0]
    for hook in hooks:
        hook.remove()
    taps.append(logits)
    return np.concatenate([tap.float().numpy()[rows].ravel() for tap in taps])


def norm_torch(twin, x):
    """RMSNorm of torch, in bfloat16."""
    import torch

    return twin.layers[3].ffn_norm(torch.tensor(np.float32(x)).bfloat16())


def unravel(flat, n_rows: int, n_taps: int = 13, dim: int = 256):
    """What `taps_torch` made flat: `[2L + 1, rows, D]` and `[rows, V]`."""
    size = n_taps * n_rows * dim
    return flat[:size].reshape(n_taps, n_rows, dim), flat[size:].reshape(n_rows, -1)


# --- plots ----------------------------------------------------------------------------


def two_programs(per_token: dict) -> None:
    """What two programs lose at each token, one over the other."""
    _, axis = plt.subplots(figsize=(7, 2.8))
    (one, first), (other, second) = per_token.items()
    axis.plot(first, color="0.72", linewidth=5, linestyle="-", marker="", label=one)
    axis.plot(second, color="black", linewidth=1, linestyle="-", marker="", label=other)
    axis.set(xlabel="position (tokens)", ylabel="loss of the token (nats)")
    axis.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def distances(distance: dict) -> None:
    """The relative distance of each pair of programs at each tap, a panel for a dtype."""
    figure, axes = plt.subplots(2, 1, sharex=True, sharey=True, figsize=(7, 5))
    for (one, other, dtype), values in distance.items():
        axis = axes[int(dtype == "bfloat16")]
        axis.semilogy(np.maximum(values, 1e-9), label=f"{one} / {other}", markersize=5)
        axis.set_title(dtype, fontsize=11)
    axes[1].set_xticks(range(14), ["embed", *range(1, 13), "logits"])
    axes[1].set_xlabel("tap: the stream after each half of a block, then the logits")
    figure.supylabel("max|Δ| / max|activation|", fontsize=11)
    axes[1].legend(fontsize=10, loc="lower right")


def fingerprints(groups: dict[str, dict], noise: float) -> None:
    """How far each bug is off at each position, a panel for each group of bugs."""
    figure, axes = plt.subplots(len(groups), 1, sharex=True, sharey=True, figsize=(7, 5.6))
    for axis, (title, prints) in zip(axes, groups.items()):
        for name, values in prints.items():
            axis.semilogy(np.maximum(values, 1e-7), label=name, markevery=16, markersize=6)
        axis.axhline(noise, color="0.6", linewidth=6, alpha=0.4, linestyle="-", marker="")
        axis.axvline(64, color="0.6", linewidth=1, linestyle="-", marker="")
        axis.set_title(title, fontsize=11, loc="left")
        box = dict(loc="lower right", bbox_to_anchor=(1, 0.22))
        axis.legend(fontsize=10, **box)
    axes[-1].set(xlabel="position (tokens); the line at 64 is the window")
    figure.supylabel("max|Δ logits|", fontsize=11)


def suspects(curves: dict) -> None:
    """The two curves of exercise 2."""
    _, axis = plt.subplots(figsize=(7, 2.8))
    for letter, values in curves.items():
        axis.semilogy(np.maximum(values, 1e-7), label=letter, markevery=16, markersize=6)
    axis.set(xlabel="position (tokens)", ylabel="max|Δ logits|")
    axis.legend()
