# ---
# jupyter:
#   budget: 90
#   cover: 1
# ---

# %% [markdown]
# # Sliding window attention
#
# **How far back can a token see: W keys or W + 1, and how does layer 6 know about a token
# that no query of it may look at?**
#
# - **You will be able to** write the band mask; find out what any model's mask really is
#   by poking it; tell a *window* from a *reach*; say what a window saves and what it does
#   not.
# - **Before this**: [01](01_one_model_two_languages.ipynb), or knowing what attention is.
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/attention.py` and in `Transformer.forward` of
#   `one_file_ref.py`.
# - **Model and data**: the embedded model, trained with a window of `W` = 64, and
#   Shakespeare that it has never seen.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: how many keys does a window of 3 let through? How much work does a
#   mask save?
#
# The letters: `T` tokens, `W` window, `L` layers; see [README.md](README.md).

# %%
import copy
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mistral_eqx as mx
import nbtools as nb
import one_file_ref
from exercises import ex03


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("03")
package, tokenizer = mx.load(dtype=jnp.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)


def with_config(model, **changes):
    config = dataclasses.replace(model.config, **changes)
    skeleton = eqx.filter_eval_shape(mx.Transformer, config, key=key)
    return jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(model))


# %% [markdown]
# ## The mask, in three lines
#
# Causal attention lets the query at position `t` see the keys at positions `0 .. t`. A
# sliding window cuts off the old end: only the last `W` remain, the query's own among
# them. In the package that is the whole of it:

# %%
nb.show_source(mx.attention.visible)

# %% [markdown]
# And in the reference, as the one-file port has kept it, two calls: `tril` cuts off the
# future, `triu` with a negative diagonal cuts off the past.
#
# ```python
# mask = jnp.tril(tensor, k=0)
# mask = jnp.triu(mask, k=-self.args.sliding_window)
# ```
#
# **Predict.** Set `W` = 3. How many keys does a query late in the text see, in the
# package, and how many in this?

# %%
my_package, my_reference = None, None  # two numbers

# %% [markdown]
# ## Poke it
#
# Let us not trust our reading of code, and ask the programs. Change one token, and see at
# which positions the output moves: exactly those positions *can see* that token. With one
# layer, that is the mask itself. A black box is enough; the same poke works on torch, on
# both ports, and on a model that runs one token at a time.

# %%
T, W = 6, 3
small = dict(dim=32, n_layers=1, head_dim=16, hidden_dim=32, n_heads=2, n_kv_heads=1)
small |= dict(norm_eps=1e-5, vocab_size=16, rope_theta=1e4, sliding_window=W)
small_package = mx.Transformer(mx.ModelConfig(**small), key=key)
args = one_file_ref.ModelArgs(**small)
skeleton = eqx.filter_eval_shape(one_file_ref.Transformer, args, key=key)
leaves = jax.tree.leaves(small_package)
small_one_file = jax.tree.unflatten(jax.tree.structure(skeleton), leaves)

# %%
poked = np.tile(np.arange(T, dtype=np.int32), (T + 1, 1))  # row 0 is left as it is
poked[np.arange(1, T + 1), np.arange(T)] = 15  # row s + 1 differs at position s


def seen(logits):  # [T + 1, T, V] -> [query, key]
    return (np.abs(logits[1:] - logits[:1]).max(axis=-1) > 1e-6).T


# %% [markdown]
# Three programs in prefill, which reads the whole text at once, and the one-file port
# also in decoding, which reads a token at a time through its rolling buffer of `W` slots.


# %%
def decode_one_file(model, tokens):
    cache, logits = model.empty_cache(len(tokens), tokens.shape[1]), []
    for t in range(tokens.shape[1]):
        step, cache = model(tokens[:, t : t + 1], jnp.array([t]), cache)
        logits.append(step[:, 0])
    return jnp.stack(logits, axis=1)  # [B, T, V]


# %%
def poke_torch(_):
    import torch

    import torch_mistral

    twin = torch_mistral.Transformer(small)
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    weights = jax.tree_util.tree_leaves_with_path(small_package)
    twin.load_state_dict({spell(p): torch.tensor(np.asarray(w)) for p, w in weights})
    return twin(torch.tensor(poked))


# %%
caches = small_one_file.empty_cache(T + 1, T)
masks = {
    "package": seen(np.asarray(jax.vmap(small_package)(poked)[0])),
    "torch": seen(oracle("poke", poke_torch)),
    "one file, prefill": seen(np.asarray(small_one_file(poked, jnp.arange(T), caches)[0])),
    "one file, decode": seen(np.asarray(decode_one_file(small_one_file, poked))),
}

# %%
figure, axes = plt.subplots(2, 2, figsize=(5.6, 5.6), sharex=True, sharey=True)
for axis, (name, mask) in zip(axes.flat, masks.items()):
    axis.imshow(mask, cmap="Greys", vmin=0, vmax=1.6)
    for t, s in np.argwhere(mask):
        axis.text(s, t, t - s, ha="center", va="center", color="white")
    axis.set_title(f"{name}\n{mask.sum(1).max()} keys", fontsize=11)
    axis.grid(False)
for axis in axes[1]:
    axis.set_xlabel("key (position)")
for axis in axes[:, 0]:
    axis.set_ylabel("query (position)")
nb.caption(
    "a dark cell is a key that the query's output depends on, and the number is how far "
    "back it lies. Three pictures are the same band of width 3. The reference's prefill "
    "has one diagonal more: its query 5 can see 3 back."
)

# %%
keys_seen = {name: int(mask.sum(1).max()) for name, mask in masks.items()}
nb.guess("Keys seen in the package", my_package, keys_seen["package"])
nb.guess(
    "Keys seen in the reference's prefill", my_reference, keys_seen["one file, prefill"]
)
nb.check("package sees W keys", keys_seen["package"], eq=W)
nb.check("torch sees W keys", keys_seen["torch"], eq=W)
nb.check("one file sees W + 1 in prefill", keys_seen["one file, prefill"], eq=W + 1)
nb.check("one file sees W in decoding", keys_seen["one file, decode"], eq=W)

# %%
nb.say(
    f"**Takeaway.** A window of {W} is {keys_seen['package']} keys, the query's own "
    "included, except in the prefill of the reference, where it is "
    f"{keys_seen['one file, prefill']}: `triu(k=-W)` keeps distance `W` itself. The right "
    "diagonal is `1 - W`. The same slip sits in other places: `window_size=(W, W)` of an "
    "attention kernel means W + 1 keys too (transformers #29623)."
)

# %% [markdown]
# ## The reference disagrees with itself
#
# A model that sees 4 keys in prefill and 3 in decoding gives the same text two meanings,
# depending on how it was read. Let the embedded model read 128 tokens at once; and again
# 64 at once, and the other 64 one at a time. It is the same text, so the logits should be
# the same.

# %%
tokens = nb.held_out(512)
text = jnp.asarray(tokens)
at_once, _ = one_file(text[None, :128], jnp.arange(128), one_file.empty_cache(1, 128))
_, caches = one_file(text[None, :64], jnp.arange(64), one_file.empty_cache(1, 128))
stepped = []
for t in range(64, 128):
    logits, caches = one_file(text[None, t : t + 1], jnp.array([t]), caches)
    stepped.append(logits[0, 0])
one_file_gap = float(jnp.abs(at_once[0, 64:] - jnp.stack(stepped)).max())

# %%
cache = mx.Cache(package.config, jnp.int32(0), chunk=64, max_length=128, dtype=jnp.float32)
model, stepped = eqx.filter_jit(package), []
at_once, _ = model(text[:128])  # [T, V]
_, cache = model(text[:64], cache)
for t in range(64, 128):
    logits, cache = model(text[t : t + 1], cache)
    stepped.append(logits[0])
package_gap = float(jnp.abs(at_once[64:] - jnp.stack(stepped)).max())


# %%
def gap_torch(twin):
    import torch

    text = torch.tensor([tokens[:128]])
    cache = twin.empty_cache(1)
    twin(text[:, :64], 0, cache)
    stepped = [twin(text[:, [t]], t, cache)[0, 0] for t in range(64, 128)]
    return (twin(text)[0, 64:] - torch.stack(stepped)).abs().max()


torch_gap = float(oracle("gap", gap_torch))

# %% [markdown]
# ## Two ports and torch

# %%
nb.table(
    ["", "keys in prefill", "keys in decoding", "max abs Δ, at once or stepped"],
    [
        [
            "one file",
            keys_seen["one file, prefill"],
            keys_seen["one file, decode"],
            one_file_gap,
        ],
        ["package", keys_seen["package"], keys_seen["package"], package_gap],
        ["torch", keys_seen["torch"], keys_seen["torch"], torch_gap],
    ],
)
nb.check("package, at once or stepped", package_gap, lt=2e-4)
nb.check("torch, at once or stepped", torch_gap, lt=2e-4)
nb.check("one file, at once or stepped", one_file_gap, gt=0.05)

# %% [markdown]
# The difference in code is one character: `k=-W` for `k=1-W`. The port keeps it, because
# a port that quietly repairs its original cannot be checked against it; the package does
# what the authors' production code does.
#
# ## The reach: how layer 6 knows about token 0
#
# One layer moves information by at most `W - 1` positions. But what it moves *to* is
# itself looked at by the next layer. After `l` layers, a token depends on what happened
# up to `l · (W - 1)` positions ago: the **reach**. Mistral's paper counts 4096 × 32 =
# 131,072 tokens this way.
#
# We can measure it. The gradient of the last position of layer `l`'s output with respect
# to each embedding says how much each token matters to it, and it is *exactly zero* where
# no path leads. The trick to differentiate with respect to embeddings: let the model's
# table have one row for each position.


# %%
def influence(table, model):  # [T, D] -> a number for each layer
    model = eqx.tree_at(lambda m: m.tok_embeddings.weight, model, table)
    hidden, _ = model.hidden_states(jnp.arange(len(table)))
    direction = jax.random.normal(key, (table.shape[1],))
    return jnp.stack([h[-1] @ direction for h in hidden])


embedded = package.tok_embeddings(text)  # [T, D]
gradients = jax.jit(jax.jacrev(influence))
strength = np.linalg.norm(gradients(embedded, package), axis=-1)  # [L + 1, T]

# %%
figure, axis = plt.subplots(figsize=(7, 3.6))
shown = np.where(strength > 0, np.log10(np.maximum(strength, 1e-30)), np.nan)
image = axis.imshow(
    np.ma.masked_invalid(shown)[:, ::-1],
    aspect="auto",
    origin="lower",
    vmin=-12,
    vmax=1,
    interpolation="nearest",
)
theory = np.append(63 * np.arange(7), 378) + 0.5
axis.step(theory, np.arange(8) - 0.5, "k", where="pre", marker="")
axis.set(xlabel="how far back the token lies (positions)", ylabel="after layer")
axis.set_xlim(-0.5, 450)
axis.grid(False)
figure.colorbar(image, label="log10 of the gradient's norm")
nb.caption(
    "a staircase. After layer l the last token depends on tokens up to 63 l back, which "
    "is the black line; the white beyond it is not small but exactly zero. Towards the "
    "edge the influence fades by orders of magnitude: reach is what *can* be known, not "
    "what is."
)

# %%
beyond = [float(row[: 511 - 63 * layer].max()) for layer, row in enumerate(strength)]
nb.check("gradient beyond the reach, any layer", max(beyond), eq=0.0)

# %% [markdown]
# That nothing leads further is exact. That the last step is really reached is harder to
# see in a trained model: few heads look as far back as they can, and six such looks in a
# row multiply to next to nothing. So take away the model's preferences: with queries of
# zero, every token attends equally to all that it may see.


# %%
def without_preferences(model):
    where = lambda m: [layer.attention.wq.weight for layer in m.layers]
    return eqx.tree_at(where, model, replace_fn=jnp.zeros_like)


flat = np.linalg.norm(gradients(embedded, without_preferences(package)), axis=-1)
reach = [int(511 - np.flatnonzero(row)[0]) for row in flat]
for layer, measured in enumerate(reach):
    nb.check(f"reach after {layer} layers (positions)", measured, eq=layer * 63)

# %% [markdown]
# The one-file port sees one key more, so its stairs are one position wider. Torch's are
# the package's.


# %%
def influence_one_file(table, model):
    model = eqx.tree_at(lambda m: m.tok_embeddings.weight, model, table)
    positions = jnp.arange(len(table))
    logits, _ = model(positions[None], positions, model.empty_cache(1, len(table)))
    return logits[0, -1] @ jax.random.normal(key, (2048,))


def reach_torch(twin):
    import torch

    twin, kept = copy.deepcopy(twin), []
    for layer in twin.layers:
        layer.attention.wq.weight.zero_()
    with torch.enable_grad():
        keep = lambda module, inputs, out: kept.append(out) or out.retain_grad()
        twin.tok_embeddings.register_forward_hook(keep)
        twin(torch.tensor([tokens]))[0, -1, ::7].sum().backward()
    return 511 - kept[0].grad[0].norm(dim=-1).nonzero()[0, 0]


# %%
gradient = jax.jit(jax.grad(influence_one_file))(embedded, without_preferences(one_file))
one_file_reach = int(511 - np.flatnonzero(np.linalg.norm(gradient, axis=-1))[0])
nb.check("reach of 6 layers, one file (positions)", one_file_reach, eq=6 * 64)
torch_reach = int(oracle("reach", reach_torch))
nb.check("reach of 6 layers, torch (positions)", torch_reach, eq=6 * 63)

# %%
far = strength[6, 511 - 300] / strength[6, 511]
nb.say(
    f"**Takeaway.** Six layers with windows of 64 reach {reach[6]} positions back, plus "
    f"the token itself; but a token 300 back has {far:.0e} times the influence of the "
    "last one."
)

# %% [markdown]
# ## What is a longer look worth?
#
# The window is static: the same weights run with any. How good are predictions when the
# trained model is shown less than it was trained with, or more?
#
# **Predict.** Trained with 64. Will it predict better with 256?

# %%
my_loss = None  # "better", "same" or "worse"

# %%
rows = jnp.asarray([nb.held_out(256, start=s) for s in (0.91, 0.93, 0.95, 0.97)])  # [B, T]


@eqx.filter_jit
def loss(model):  # nats a token, over the second half of each text
    logits = jax.vmap(lambda row: model(row)[0])(rows)[:, 127:-1]
    logprobs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logprobs, rows[:, 128:, None], axis=2))


windows = [8, 16, 32, 64, 128, 256]
losses = [float(loss(with_config(package, sliding_window=w))) for w in windows]

# %%
figure, axis = plt.subplots()
axis.plot(windows, losses)
axis.axvline(64, color="0.6", linewidth=1, marker="", linestyle="-")
axis.text(66, max(losses), "as trained", va="top")
axis.set_xscale("log", base=2)
axis.set_xticks(windows, windows)
axis.set(xlabel="window at evaluation (keys)", ylabel="loss (nats a token)")
nb.caption(
    "less than it was trained with hurts at once, and more does not help: it hurts as "
    "well. The weights have never met a key 100 positions away, nor so many keys to "
    "choose from."
)

# %%
verdict = (
    "better"
    if losses[5] < losses[3] - 0.01
    else "same"
    if losses[5] < losses[3] + 0.01
    else "worse"
)
nb.guess("With a window of 256", my_loss, verdict)
nb.check("loss at W = 8 less loss at W = 64 (nats)", losses[0] - losses[3], gt=0.02)
nb.check("loss at W = 256 less loss at W = 64 (nats)", losses[5] - losses[3], gt=0.02)
nb.say(
    f"**Takeaway.** At the window of its training the model loses {losses[3]:.3f} nats a "
    f"token, with 8 keys {losses[0]:.3f}, and with 256 {losses[5]:.3f}."
)

# %% [markdown]
# ## A mask saves nothing by itself
#
# A query with a window of 64 needs 64 scores, whatever the length of the text.
#
# **Predict.** We put the band mask on full attention over 1024 tokens. Which share of the
# floating-point operations does it save?

# %%
my_saving = None  # a percentage


# %%
def flops(function, *arguments):
    cost = jax.jit(function).lower(*arguments).cost_analysis()
    return cost["flops"]


def masked(n, window):  # full attention under a mask
    positions = jnp.arange(n, dtype=jnp.int32)
    heads = jax.ShapeDtypeStruct((n, 8, 32), jnp.float32)
    kv_heads = jax.ShapeDtypeStruct((2, n, 32), jnp.float32)
    mask = mx.attention.visible(positions, positions, window)
    return flops(mx.attention.attend, heads, kv_heads, kv_heads, mask)


# %% [markdown]
# The package cuts the queries into blocks and gives each block only the keys that some
# query of it may see. The mask then only trims the edges of the band.

# %%
nb.show_source(mx.attention.attend_sequence)


# %%
def blocked(n, window):  # the package's attention, without its four matrix products
    config = dataclasses.replace(package.config, sliding_window=window)
    layer = eqx.filter_eval_shape(mx.Attention, config, dtype=jnp.float32, key=key)
    x = jax.ShapeDtypeStruct((n, 256), jnp.float32)
    places = eqx.filter_eval_shape(mx.rope.Places, config, jnp.arange(n))
    run = lambda layer, x, places: layer(x, places, None)[0]
    products = 2 * n * 256 * (256 + 64 + 64 + 256)
    return flops(run, layer, x, places) - products


lengths = [64, 128, 256, 512, 1024, 2048, 4096]
work = {
    "full attention": [masked(n, None) for n in lengths],
    "full attention under a band mask": [masked(n, 64) for n in lengths],
    "blocks along the band": [blocked(n, 64) for n in lengths],
}

# %% [markdown]
# The other saving is memory: without a window, the cache grows with the text. With one,
# it is a ring ([04](04_the_rolling_buffer.ipynb)).


# %%
def cache_bytes(n, window):
    config = dataclasses.replace(package.config, sliding_window=window)
    make = lambda: mx.Cache(config, jnp.int32(0), chunk=1, max_length=n, dtype=jnp.float32)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


memory = {w: [cache_bytes(n, w) / 1024 for n in lengths] for w in (None, 64)}

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 4.2))
for name, values in work.items():
    axes[0].loglog(lengths, np.array(values) / 1e6, label=name, alpha=0.8)
axes[1].loglog(lengths, memory[None], label="no window")
axes[1].loglog(lengths, memory[64], label="window of 64")
axes[0].set(xlabel="text (tokens)", ylabel="attention of a layer (million flops)")
axes[1].set(xlabel="text (tokens)", ylabel="cache of the model (KiB)")
axes[1].set_yticks(memory[None], [f"{size:,.0f}" for size in memory[None]])
for axis in axes:
    axis.set_xticks(lengths, lengths)
    axis.minorticks_off()
    axis.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1))
nb.caption(
    "left, the mask's line lies on top of full attention's: quadratic. Only the blocks "
    "turn the window into less work. Up to 1,024 tokens their work grows with the text; "
    "beyond, it bends upwards, because there are never more than 16 blocks and each then "
    "has more queries than the window has keys. Right, the cache stops growing at 64 "
    "tokens."
)

# %%
at = lambda name, n: work[name][lengths.index(n)]
saving = 1 - at("full attention under a band mask", 1024) / at("full attention", 1024)
nb.guess("Operations saved by the mask", my_saving, f"{100 * saving:.1f}%")
nb.check("operations saved by a mask alone, at 1024 tokens", abs(saving), lt=0.01)
ratio = at("full attention", 1024) / at("blocks along the band", 1024)
growth = lambda n: at("blocks along the band", 2 * n) / at("blocks along the band", n)
nb.check("growth of the blocks' work, 512 to 1,024 tokens", growth(512), lt=2.3)
nb.check("growth of the blocks' work, 2,048 to 4,096 tokens", growth(2048), gt=2.7)
nb.check("operations, full over blocks, at 1024 tokens", ratio, gt=4)
nb.check(
    "cache at 1024 tokens, no window over window",
    memory[None][lengths.index(1024)] / memory[64][lengths.index(1024)],
    gt=15.9,
)

# %%
nb.say(
    f"**Takeaway.** At 1024 tokens the mask saves {100 * saving:.0f}% of the operations, "
    f"blocks do {ratio:.1f} times fewer, and the cache is "
    f"{memory[None][-1] / memory[64][-1]:.0f} times smaller."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: the band** (● 5 minutes). A boolean array `[n, n]`, true where query `t`
# may see key `s` under a window.
#
# <details><summary>Hint</summary>
#
# One line with `np.tril` and `np.triu` is enough; mind the diagonal.
#
# </details>
#
# {{solution:band}}


# %%
def band(n, window):
    return NotImplemented


ex03.check_band(band)

# %% [markdown]
# **Exercise 2: layers for a reach** (● 5 minutes). The fewest layers with which
# information can travel `reach` positions.
#
# <details><summary>Hint</summary>
#
# A layer moves it `window - 1` positions, not `window`.
#
# </details>
#
# {{solution:layers_for}}


# %%
def layers_for(reach, window):
    return NotImplemented


ex03.check_layers_for(layers_for)

# %% [markdown]
# **Exercise 3: scores that count** (●● 10 minutes). How many pairs of query and key does
# the band let through, for `n` tokens? A closed formula, or a sum, in plain Python.
#
# <details><summary>Hint</summary>
#
# The first `window` queries see 1, 2, 3, ... keys; all others see `window`.
#
# </details>
#
# {{solution:scores}}


# %%
def scores(n, window):
    return NotImplemented


ex03.check_scores(scores)

# %% [markdown]
# ## Recap

# %%
nb.recap()

# %%
nb.say(
    f"**The answer.** A token sees {keys_seen['package']} keys when the window is {W}, "
    "its own among them; layer 6 of a model with a window of 64 can know about a token "
    f"{reach[6]} positions back, through the tokens in between."
)

# %% [markdown]
# **What we did not show**: kernels that skip masked blocks on a GPU, and layers whose
# windows differ (Ministral alternates them). Mistral's own later models have no window at
# all (`sliding_window: null`), and every token of the text can be looked at directly.
#
# **Further reading**: Mistral 7B, arXiv 2310.06825, §2 (window and reach); Longformer,
# arXiv 2004.05150, §3.1; Child et al., arXiv 1904.10509 (sparse attention).
#
# **Next**: [04 The rolling buffer](04_the_rolling_buffer.ipynb): if only `W` keys are
# ever seen, why keep the others?
