# ---
# jupyter:
#   budget: 130
#   cover: 5
# ---

# %% [markdown]
# # Mixtral: sparse experts, expert and pipeline parallelism
#
# **How do 47 billion parameters cost 13 billion a token, and how is a model like that
# spread over machines?**
#
# - **You will be able to** count the parameters that a token goes through; write a router;
#   compute a sparse layer in three ways, and count the work that each wastes or drops; tell
#   whether a balancing loss balances; and read the schedule of a pipeline.
# - **Before this**: [07](07_many_devices.ipynb), for meshes; the feed-forward network is in
#   [02](02_inside_one_block.ipynb).
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/moe.py`, `kernels/experts.py`, `devices/experts.py`
#   and `devices/stages.py`. `one_file_ref.py` has no experts, so its dense network is
#   compared with a mixture that is built from it.
# - **Model and data**: the shapes of Mixtral 8x7B; the embedded model, whose feed-forward
#   networks become experts; and a small Mixtral. Nobody has trained that one, so this
#   notebook does, three times, from random weights.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: what does a token cost if it takes one expert and not two? How much
#   of the model do eight texts read? Does the balancing loss balance every layer? How
#   often do four stages run for four microbatches?
#
# The letters: `T` tokens, `D` width, `L` layers; see [README.md](README.md). New here:
# `E` experts, of which each token takes `k`. Two lines below the imports make one CPU
# look like eight devices, as in [07](07_many_devices.ipynb).

# %%
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mistral_eqx as mx
import nb08
import nbtools as nb
import one_file_ref
from exercises import ex08
from mistral_eqx.learning import batches as text_batches, training


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
key = jax.random.key(0)
nb.versions()
nb.check("devices (if there is one, restart the kernel)", jax.device_count(), eq=8)

# %% [markdown]
# Two models serve all sections. Of `mixtral` we only have the shape. `fresh` is small and
# has random weights, which NumPy draws with the package's spread (`nb08.random_model`).
# Like Mixtral it has eight experts, of which a token takes two.

# %%
mixtral = mx.RELEASED["mixtral-8x7b"]
tiny = mx.ModelConfig(
    dim=64,
    n_layers=4,
    head_dim=32,
    hidden_dim=96,
    n_heads=2,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=2048,
    rope_theta=1e4,
    moe=mx.config.MoEConfig(num_experts=8, num_experts_per_tok=2),
)
fresh = nb08.random_model(tiny)

# %% [markdown]
# ## Where 47 billion sit
#
# In its shapes, Mixtral is Mistral 7B with one change. Where a block had one feed-forward
# network it has eight, the **experts**, and a small matrix, the **router** (`gate` in the
# code), that chooses two of them for each token. All eight must be in memory. A token
# goes through two.
#
# How many parameters is that? `eqx.filter_eval_shape` calls a function without computing
# anything: what comes back has the shapes of the arrays and no numbers. So a model of any
# size fits into a notebook:
#
# ```python
# skeleton = eqx.filter_eval_shape(mx.Transformer, config, key=key)
# skeleton.norm.weight  # ShapeDtypeStruct(shape=(4096,), dtype=float32)
# skeleton.norm.weight.size  # 4096
# ```
#
# **Predict.** With two experts a token goes through 12.9 billion parameters. With one
# expert it would be how many: 6.4, 7.2 or 11.3 billion?

# %%
my_billions = None  # 6.4, 7.2 or 11.3

# %% [markdown]
# `nb08.parts_of(config)` makes such a skeleton and adds up the sizes of three parts: the
# experts, the vocabulary (embedding and output), and the rest. With `k` it counts `k`
# experts of each layer.

# %%
per_token = nb.knob(2, of=(1, 2, 4))
dense = nb08.parts_of(mx.RELEASED["mistral-7b-v0.1"])
whole, active = nb08.parts_of(mixtral), nb08.parts_of(mixtral, k=per_token)
total = lambda parts: sum(parts.values())
one = total(nb08.parts_of(mixtral, k=1))
why = {
    6.4: "half of 12.9, but attention is not halved.",
    11.3: "that is two experts alone.",
}
nb.guess("Billions for a token of one expert", my_billions, round(one / 1e9, 1), why)

# %%
nb08.plot_parameters({"Mistral 7B": (dense, dense), "Mixtral 8x7B": (whole, active)})
nb.caption(
    "nearly all of Mixtral is experts, and of these a token goes through "
    f"{per_token} of 8. All else is as large as in Mistral 7B, but for the routers."
)

# %%
routers = 32 * 4096 * 8
nb.check("Mixtral, all parameters (billions)", total(whole) / 1e9, near=46.7)
nb.check("share of the experts in memory", whole["experts"] / total(whole), gt=0.95)
nb.check(
    "experts of a token, share", active["experts"] / whole["experts"], eq=per_token / 8
)
nb.check("with one expert, beyond Mistral 7B", one - total(dense), eq=routers)
rest = total(whole) - whole["experts"] - total(dense) + dense["experts"]
nb.check("everything but experts, beyond Mistral 7B", rest, eq=routers)

# %% [markdown]
# The last two checks say why. With one expert a token would go through exactly as many
# parameters as in Mistral 7B, plus the routers. So the name "8x7B" misleads twice. The
# model does not have 56 billion parameters, because the eight experts share one
# attention. And a token does not cost a quarter of the 46.7 billion, because it goes
# through the attention and the vocabulary as well.
#
# **Takeaway.** Memory pays for eight experts, a token for two.
#
# ## What a batch reads
#
# When a model writes, each step makes one token for each text. The arithmetic of one token
# is small, so most of such a step can be *reading the weights* from memory, and what a step
# must read is worth counting. One text reads two experts a layer. Eight texts choose two
# each.
#
# **Predict.** Eight texts are decoded together, and routers choose at random. How many of
# the experts are read in a step: 25, 60, 90 or 100 %?

# %%
my_percent = None  # 25, 60, 90 or 100

# %% [markdown]
# We draw the choices of 2,000 batches, and count the different experts in each.

# %%
batches = 2 ** np.arange(8)
draws = jax.random.normal(key, (2000, 128, 8))  # 2,000 times 128 texts, 8 logits each
picks = np.asarray(jax.lax.top_k(draws, 2)[1])
distinct = np.array([np.mean([len(np.unique(p[:b])) for p in picks]) for b in batches])
uniform = 8 * (1 - (1 - 2 / 8) ** batches)

# %% [markdown]
# Beside Mixtral we put a dense model that computes as much for a token: it always reads the
# same weights.

# %%
part = distinct[3] / 8
nb.guess(
    "Experts read by eight texts (%)",
    my_percent,
    int(round(100 * part, -1)),
    why={
        25: "that is what each text reads; but they choose different ones.",
        60: "all eight miss an expert with probability 0.75 to the power of 8: 0.1.",
        100: "nearly: a tenth is still missed.",
    },
)
shared = total(whole) - whole["experts"]
reads = (shared + whole["experts"] * distinct / 8) / 1e9
computed = np.full(len(batches), (shared + whole["experts"] / 4) / 1e9)

# %%
nb08.plot_reads(
    batches, {"Mixtral 8x7B": reads, "a dense model as costly to compute": computed}
)
nb.caption(
    "alone, a text reads the 13 billion weights that it computes with. At eight texts "
    "nine tenths of all experts are read, and beyond 16 the curve is flat: the model "
    "computes like one of 13 billion parameters and reads like one of 47."
)

# %%
nb.check("billions read, batch of 1", reads[0], near=12.9)
nb.check("share of the experts read, batch of 8", part, near=0.9)
nb.check("billions read, batch of 16 over 128", reads[4] / reads[7], near=1.0)
gap = np.abs(distinct - uniform).max()
nb.check("max|Δ| of the counted experts and 8 (1 - 0.75^B)", gap, lt=0.13)

# %% [markdown]
# **Takeaway.** Sparse experts save arithmetic. They save reading only while few texts are
# decoded together.
#
# ## The router
#
# The naive router comes first, for four tokens and four experts. Take the two largest
# scores (logits) of each token. Their softmax gives the token's two **portions**: how
# much of each expert it takes.

# %%
scores = np.asarray(jax.random.normal(jax.random.key(8), (4, 4))).round(1)  # [T, E]
print(scores)

# %%
best = np.argsort(-scores, axis=1)[:, :2]  # naive
exponentials = np.exp(np.take_along_axis(scores, best, axis=1))
portions = exponentials / exponentials.sum(axis=1, keepdims=True)
nb.table(["token", "experts", "portions"], zip("0123", best, portions.round(2)))

# %% [markdown]
# The package's router is written for any number of tokens. `jax.lax.top_k` gives the `k`
# largest numbers of each row and their places, in one go.

# %%
nb.show_source(mx.moe.route)
chosen, weights = mx.moe.route(jnp.asarray(scores), 2)
nb.check("experts chosen, package and naive", chosen.tolist(), eq=best.tolist())
nb.check("max|Δ| of the portions", np.abs(weights - portions).max(), lt=1e-5)

# %% [markdown]
# One could also take the softmax over all eight experts, and then the two best. These two
# portions do not sum to one, because the other six experts got a part too. Divide them by
# their sum, and they are the same as before: the sum over all experts cancels. This
# division is the **renormalisation**. A port that forgets it runs without any error, and
# its portions sum to too little.

# %%
many = jax.random.normal(key, (1000, 8))
chosen, weights = mx.moe.route(many, 2)
probabilities = jnp.take_along_axis(jax.nn.softmax(many), chosen, axis=1)  # not divided
sums = probabilities.sum(axis=1, keepdims=True)

# %%
nb.check(
    "max|Δ| of the sum of a token's portions and 1",
    jnp.abs(weights.sum(1) - 1).max(),
    lt=1e-5,
)
nb.check(
    "max|Δ|, softmax of all, divided",
    jnp.abs(probabilities / sums - weights).max(),
    lt=1e-5,
)
nb.check("mean sum, not divided", sums.mean(), lt=0.8)

# %% [markdown]
# **Takeaway.** A softmax before choosing gives the same portions as one after it, if they
# are renormalised.
#
# ## One layer, computed in three ways
#
# **The loop** is what the words say: each token alone goes through each of its experts.
# **All experts** sends every token through every expert, and gives those not chosen the
# portion 0. Its shapes do not depend on the data, and three quarters of its work is
# wasted. It is `mix.plain`, the plain version of the package's `mix`. **Blocks** is what
# `mix` runs in its place: tokens are brought together by expert.
#
# All experts are stored as one network, whose arrays have one more axis in front: `w1` has
# the shape `[E, F, D]`. `jax.tree.map` calls a function with every array of a module, and
# makes a module of what comes back. So it can take one expert out:

# %%
length = nb.knob(40, of=(40, 96))
layer = fresh.layers[0].feed_forward
x = jax.random.normal(key, (length, tiny.dim))  # [T, D]
chosen, weights = mx.moe.route(layer.gate(x), 2)
expert = lambda e: jax.tree.map(lambda leaf: leaf[e], layer.experts)

# %%
rows = [  # naive
    sum(w * expert(int(e))(x[t : t + 1])[0] for e, w in zip(chosen[t], weights[t]))
    for t in range(length)
]
loop = jnp.stack(rows)

# %%
everyone = mx.moe.mix.plain(layer.experts, x, chosen, weights)
blocks = mx.moe.mix(layer.experts, x, chosen, weights)
nb.check("max|Δ|, all experts and the loop", jnp.abs(everyone - loop).max(), lt=1e-4)
nb.check("max|Δ|, blocks and the loop", jnp.abs(blocks - loop).max(), lt=1e-4)

# %% [markdown]
# Equal results do not prove that less was done. Poison does. We send the first token alone,
# and fill all experts but its own with NaN, "not a number". NaN times 0 is NaN, so a way
# that touches what it does not need gives itself away.

# %%
needed = jnp.isin(jnp.arange(8), chosen[0])
poison = lambda leaf: jnp.where(needed[:, None, None], leaf, jnp.nan)
poisoned = jax.tree.map(poison, layer.experts)
spoilt = lambda way: bool(jnp.isnan(way(poisoned, x[:1], chosen[:1], weights[:1])).any())
nb.check("all experts are spoilt by NaN", spoilt(mx.moe.mix.plain), eq=True)
nb.check("blocks are spoilt by NaN", spoilt(mx.moe.mix), eq=False)

# %% [markdown]
# In PyTorch one would write, for each expert, `x[chosen == e]`: an array as long as the
# data wants. A compiled JAX program cannot have that: all its shapes are fixed before it
# sees a number. So the package cuts the tokens of each expert into **blocks** of one
# fixed size, pads the last block of each, and makes room for as many blocks as could be
# needed at worst. Those that turn out not to be needed are skipped by `jax.lax.cond`,
# which is an `if` inside the program, and runs one of two functions. The size is chosen
# from the shapes alone:

# %%
nb.show_source(mx.kernels.experts.block_sizes, mx.kernels.experts.dispatch)

# %% [markdown]
# Let us look inside. In place of experts we hand `dispatch` modules that note what they
# are given (`nb08.Noting`). Every row below that is not hatched is a call that really
# happened.

# %%
block, n_blocks = mx.kernels.experts.block_sizes(chosen.size, 8)
noted = nb08.noted_blocks(chosen, 8)
nb08.plot_blocks(noted, n_blocks, 8)
nb.caption(
    "one row is one call of one expert, with the numbers of its tokens. White slots are "
    "padding: computed for nothing. Hatched rows are blocks that were allocated and "
    "skipped. Every token is there exactly twice: nothing is dropped."
)

# %%
filled = [(e, int(t)) for e, tokens in noted for t in tokens if t >= 0]
pairs = [(int(e), t) for t in range(length) for e in chosen[t]]
computed, n_read = nb08.expert_rows(np.asarray(chosen), 8)
nb.check(
    "pairs in the blocks are the pairs chosen", sorted(filled) == sorted(pairs), eq=True
)
nb.check("blocks that ran, seen and by the rule", len(noted), eq=n_read)
nb.check("blocks skipped", n_blocks - len(noted), gt=0)
nb.say(f"{computed} rows were computed for {len(pairs)} pairs of token and expert.")

# %% [markdown]
# Many implementations, among them GShard and the Switch Transformer, fix the shapes in
# another way: each expert has room for a **capacity**, a little more than its fair share,
# and what does not fit is *dropped*. Its token then gets nothing from that expert. Here
# are both kinds of waste, padded rows and dropped pairs of token and expert, for a router
# that is perfectly fair: random.

# %%
lengths, dropped, padded = 2 ** np.arange(0, 14), {}, []
fair = {n: nb08.fair_choices(n, 8) for n in lengths}  # [draws, T, k], 8,192 tokens or more
counts = {
    n: np.stack([np.bincount(c.ravel(), minlength=8) for c in fair[n]]) for n in lengths
}
for factor in (1.0, 1.25, 2.0):
    room = {n: int(np.ceil(factor * n / 4)) for n in lengths}
    over = [np.maximum(counts[n] - room[n], 0).sum(1).mean() / (2 * n) for n in lengths]
    dropped[f"capacity {factor:g}"] = np.array(over)
rows = lambda n: np.mean([nb08.expert_rows(c, 8)[0] for c in fair[n]]) / (2 * n)
padded = np.array([rows(n) for n in lengths])

# %%
everyone = np.full(len(lengths), 4.0)
buffers = np.array([8 * np.ceil(1.25 * n / 4) / (2 * n) for n in lengths])
nb08.plot_rows(
    lengths,
    {"all experts": everyone, "capacity 1.25": buffers, "blocks": padded},
    dropped | {"blocks": np.zeros(len(lengths))},
)
nb.caption(
    "blocks pad nothing up to 32 tokens, where a block holds one token. At 64 tokens "
    "blocks "
    "of 16 begin, and padding is worst. From 128 tokens on it is at most a third, from 512 "
    "at most a quarter. A capacity of 1.25 drops pairs where tokens are few, although the "
    "router is fair, and hardly any where there are thousands. A capacity of 1.0 drops "
    "some even then."
)

# %%
nb.check("rows for each needed, blocks, up to 32 tokens", padded[:6].max(), eq=1.0)
nb.check("tokens where padding is worst", int(lengths[padded.argmax()]), eq=64)
sizes = [mx.kernels.experts.block_sizes(2 * n, 8)[0] for n in (32, 64)]
nb.check("slots of a block, for 32 and for 64 tokens", sizes, eq=[1, 16])
nb.check("rows for each needed, blocks, from 128 tokens", padded[7:].max(), lt=1.33)
nb.check("rows for each needed, blocks, from 512 tokens", padded[9:].max(), lt=1.25)
quarter = dropped["capacity 1.25"]
nb.check(
    "share dropped at capacity 1.25, up to 64 tokens, worst", quarter[:7].max(), gt=0.02
)
nb.check("share dropped at capacity 1.25, from 2,048 tokens", quarter[11:].max(), lt=0.002)
nb.check("share dropped at capacity 1.0, 8,192 tokens", dropped["capacity 1"][-1], gt=0.001)

# %% [markdown]
# **Takeaway.** Fixed shapes have a price. Capacity pays in dropped pairs, blocks pay in
# padded rows, and the package has chosen blocks.
#
# ## Two ports and torch
#
# The one-file port has no experts, and neither has the torch model of these notebooks. But
# there is a Mixtral that both must agree with: one whose experts are all copies of the
# feed-forward network of the embedded model. Portions sum to one, so every mixture of the
# copies is the network itself, whatever the router does. (Training such copies further is
# called sparse upcycling.)
#
# Modules cannot be changed. `eqx.tree_at(where, module, new)` makes a copy in which one
# part is another: `where` is a function that points to it. And `eqx.filter_jit` compiles a
# function; arrays among its arguments are inputs of the program, all else is built into it.

# %%
oracle = nb.Oracle("08")
package, tokenizer = mx.load(dtype=jnp.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
tokens = nb.held_out(64)


# %%
@eqx.filter_jit
def upcycled(block, key):
    config = dataclasses.replace(package.config, moe=tiny.moe)
    mixture = mx.moe.MixtureOfExperts(config, dtype=jnp.float32, key=key)  # random router
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), block.feed_forward)
    mixture = eqx.tree_at(lambda m: m.experts, mixture, copies)
    return eqx.tree_at(lambda b: b.feed_forward, block, mixture)


layers = tuple(upcycled(b, jax.random.key(i)) for i, b in enumerate(package.layers))
copies = eqx.tree_at(lambda m: m.layers, package, layers)

# %%
logits = lambda model: np.asarray(eqx.filter_jit(model)(jnp.asarray(tokens))[0])  # [T, V]
sparse, truth = logits(copies), logits(package)
positions, caches = jnp.arange(64), one_file.empty_cache(1, 64)
compiled = eqx.filter_jit(one_file)
reference = np.asarray(compiled(jnp.asarray([tokens]), positions, caches)[0][0])


# %% [markdown]
# `oracle` asks torch, or the file of its answers. Only the function that it is given
# imports torch.


# %%
def of_torch(twin):
    import torch

    return twin(torch.tensor([tokens]))[0, ::8]


torch_logits = oracle("logits", of_torch)  # every eighth token
found = {"package": truth[::8], "one file": reference[::8], "torch": torch_logits}
gaps = {name: float(np.abs(sparse[::8] - dense).max()) for name, dense in found.items()}

# %% [markdown]
# Copies cannot show that each token went to the *right* expert. So, for one layer, experts
# that differ: the network of layer 4 with noise. In torch the mixture is written as the
# reference's authors write it: a loop over experts, with arrays as long as the data wants.

# %%
block = layers[3]
noise = lambda i, w: w + jnp.float32(np.random.default_rng(i).normal(0, 0.05, w.shape))
w1, w2, w3 = (
    noise(i, getattr(block.feed_forward.experts, f"w{i}").weight) for i in (1, 2, 3)
)
where = lambda b: [getattr(b.feed_forward.experts, f"w{i}").weight for i in (1, 2, 3)]
moe = eqx.tree_at(where, block, [w1, w2, w3]).feed_forward
x = jax.random.normal(key, (64, 256))
chosen, portions = mx.moe.route(moe.gate(x), 2)


# %%
def mixture_of_torch(twin):
    import torch

    a, b, c, h, p = (torch.tensor(np.asarray(v)) for v in (w1, w2, w3, x, portions))
    taken, out = torch.tensor(np.asarray(chosen)), torch.zeros_like(h)
    for e in range(8):
        token, nth = torch.where(taken == e)
        inner = torch.nn.functional.silu(h[token] @ a[e].T) * (h[token] @ c[e].T)
        out[token] += p[token, nth, None] * (inner @ b[e].T)
    return out


def mixture_of_one_file():
    layer, out = one_file.layers[3].feed_forward, 0
    for e in range(8):
        weights = lambda f: [f.w1.weight, f.w2.weight, f.w3.weight]
        one = eqx.tree_at(weights, layer, [w1[e], w2[e], w3[e]])
        out += jnp.where(chosen == e, portions, 0).sum(1, keepdims=True) * one(x)
    return out


# %% [markdown]
# In the one-file port its dense network runs once with the weights of each expert, and
# the portion is 0 for tokens that did not choose the expert.

# %%
mixed, by_torch = np.asarray(moe(x)), oracle("mixture", mixture_of_torch)
others = {
    "package": mx.moe.mix.plain(moe.experts, x, chosen, portions),
    "one file": mixture_of_one_file(),
    "torch": by_torch,
}
mixture_gaps = {name: float(np.abs(mixed - other).max()) for name, other in others.items()}
header = [
    "package's experts, against",
    "copies of a dense model, logits",
    "experts that differ",
]
table = [[name, gaps[name], mixture_gaps[name]] for name in gaps]
nb.table([header[0], *(f"max abs Δ: {h}" for h in header[1:])], table)

# %%
for name in gaps:
    nb.check(f"max|Δ| logits, sparse copies and dense {name}", gaps[name], lt=2e-3)
    nb.check(f"max|Δ| of a mixture, {name}", mixture_gaps[name], lt=1e-3)
agree = (sparse.argmax(1) == truth.argmax(1)).sum()
nb.check("tokens of 64 with the same best guess", int(agree), gt=60)

# %% [markdown]
# The difference in code: torch selects tokens with `torch.where`, and how many it returns
# depends on the data; the package computes a slot for each pair and scatters tokens to
# arrays of a fixed length, so that one compiled program serves every choice.
#
# **Takeaway.** A mixture of equal experts is a dense network. This test needs no trained
# Mixtral, and fails if portions do not sum to one.
#
# ## Does the balancing loss balance?
#
# A router left alone has favourites, as we shall see. So training adds a **balancing
# loss**, which is large if a few experts get most of the tokens. The package's is the
# loss of the Switch Transformer, computed over all layers together, as Hugging Face's
# transformers library does it.

# %%
load_balancing_loss = training.load_balancing_loss
nb.show_source(load_balancing_loss)

# %% [markdown]
# We train `fresh` on Shakespeare three times: without that loss; with it, as the package
# does (times 0.02); and with the same formula for each layer alone, averaged, which is
# ours. `eqx.filter_value_and_grad` gives a function's value, and its gradient with
# respect to the arrays of its first argument, here the model. Optax, a library of
# optimizers, turns the gradient into changes, and `eqx.apply_updates` adds these to the
# model. All this is explained in [09](09_training_and_lora.ipynb).
#
# **Predict.** Compare training with the package's loss and without a balancing loss. Is
# the load of the experts more even in every layer, only in the sum of all layers, or in
# neither?

# %%
my_even = None  # "every layer", "the sum" or "neither"

# %%
steps, learnt = 80, nb08.corpus(mx.load_tokenizer(nb.MODEL))
bos = int(nb.held_out(1)[0])
data = text_batches.Slices("Shakespeare", learnt, seq_len=32, bos_id=bos)
optimizer = training.make_optimizer(learning_rate=4e-3, steps=steps, warmup=10)


def objective(model, tokens, together, apart):
    hidden, routed = model.with_router_logits(tokens[:, :-1])  # [B, T, D], [B, L, T, E]
    logits = jax.vmap(model.logits)(hidden)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    of_layer = jax.vmap(lambda layer: load_balancing_loss(layer, 2), in_axes=1)
    balance = together * load_balancing_loss(routed, 2) + apart * of_layer(routed).mean()
    return entropy.mean() + balance


# %% [markdown]
# One step of training, compiled once for all three ways, because the factors of the two
# losses are arguments; and 80 such steps on batches of eight rows of 32 tokens.


# %%
@eqx.filter_jit
def update(model, state, tokens, together, apart):
    loss, gradient = eqx.filter_value_and_grad(objective)(model, tokens, together, apart)
    change, state = optimizer.update(gradient, state, model)
    return eqx.apply_updates(model, change), state, loss


# %%
def train(together, apart):
    model, state = fresh, optimizer.init(fresh)
    together, apart = jnp.float32(together), jnp.float32(apart)
    for i in range(steps):
        tokens = jnp.asarray(data.batch(8, seed=0, step=i).tokens)
        model, state, loss = update(model, state, tokens, together, apart)
    return model, float(loss)


ways = {"no balancing loss": (0, 0), "the package's": (0.02, 0), "each layer's": (0, 0.02)}
trained = {name: train(*way) for name, way in ways.items()}

# %% [markdown]
# How many of 1,024 tokens that no model has seen choose each expert, in each layer?

# %%
text = jnp.asarray(nb.held_out(1024)).reshape(16, 64)
router = eqx.filter_jit(lambda model: model.with_router_logits(text)[1])  # [B, L, T, E]
by_layer = lambda logits: np.asarray(logits).swapaxes(0, 1).reshape(4, 1024, 8)
routed = {name: by_layer(router(model)) for name, (model, _) in trained.items()}
best_two = lambda logits: np.argsort(-logits, axis=-1)[..., :2]
picks = {name: best_two(logits) for name, logits in routed.items()}  # [L, T, k]
load = lambda p: np.stack([np.bincount(layer.ravel(), minlength=8) for layer in p])
loads = {name: load(p) for name, p in picks.items()}  # [L, E]
share = 1024 * 2 / 8  # the fair one

# %% [markdown]
# Two numbers for each model, in fair shares: the load of the busiest expert of a layer
# (the mean over layers), and that of the busiest expert when all layers are added up.

# %%
busiest = {name: n.max(axis=1).mean() / share for name, n in loads.items()}
of_sum = {name: n.mean(axis=0).max() / share for name, n in loads.items()}

# %%
uneven = busiest["the package's"] > 1.8
nb.guess(
    "More even, with the package's loss",
    my_even,
    ("the sum" if uneven else "every layer")
    if of_sum["the package's"] < 1.8
    else "neither",
    why={
        "every layer": "the loss sees means over the tokens of *all* layers: one layer may "
        "have favourites if another has different ones.",
        "neither": "the sum is what the loss sees, and what it makes more even.",
    },
)
nb08.plot_load(loads, share)
nb.caption(
    "1.0 is an expert's fair share of 1,024 tokens that no model has seen. With the "
    "package's loss the last line is more even than without a loss, and the layers are "
    "about as uneven as without: they have different favourites. With each layer's own "
    "loss the layers are more even."
)

# %% [markdown]
# The same in numbers. The last column, in which the balancing loss is included, shows
# that all three have learned: a model that gives every token the same probability has a
# loss of ln 2048, which is 7.6.

# %%
table = [[name, busiest[name], of_sum[name], trained[name][1]] for name in ways]
nb.table(["trained with", "busiest in a layer", "busiest in the sum", "last loss"], table)
excess = {name: n - 1 for name, n in of_sum.items()}
sums = excess["no balancing loss"] / excess["the package's"]
nb.check("excess of the busiest in the sum, without the loss over with it", sums, gt=1.3)
kept = (busiest["the package's"] - 1) / (busiest["no balancing loss"] - 1)
nb.check(
    "excess of the busiest in a layer, with the package's loss over without", kept, gt=0.5
)
nb.check("busiest in a layer, the package's loss", busiest["the package's"], gt=1.8)
favourites = len(set(loads["the package's"].argmax(axis=1).tolist()))
nb.check("different favourites of four layers, the package's loss", favourites, gt=1)
favour = (busiest["the package's"] - 1) / (busiest["each layer's"] - 1)
nb.check(
    "excess of the busiest in a layer, the package's over each layer's", favour, gt=1.3
)
nb.check("loss after training", max(row[3] for row in table), lt=7)

# %% [markdown]
# The cause can be isolated. Take eight layers, where layer `i` sends every token to expert
# `i`. Nothing could be more lopsided. For tokens that take one expert, 1 is the loss of a
# perfect balance, and 8 of the worst. The loss over all layers together is 1; the loss of
# each layer alone is 8.

# %%
lopsided = 50 * np.broadcast_to(np.eye(8)[:, None], (8, 100, 8))  # [L, T, E]
balance = jax.jit(lambda logits: load_balancing_loss(logits, 1))
alone = np.mean([balance(layer) for layer in lopsided])
nb.check("loss, all layers together", balance(lopsided), near=1.0)
nb.check("loss, each layer alone", alone, near=8.0)

# %% [markdown]
# **Takeaway.** A mean over layers hides what each layer does. Yet if experts work on
# different devices, a layer is done only when its busiest expert is.
#
# ## Who goes where
#
# A line that the model has never seen, in the first and in the last layer of the model
# that was trained with each layer's loss.

# %%
place = slice(128, 152)  # 24 tokens
words = [tokenizer.decode([int(i)]).strip() or "·" for i in text.ravel()[place]]
shares_of = {}
for number in (0, 3):
    chosen, weights = mx.moe.route(routed["each layer's"][number, place], 2)
    portions = np.zeros((len(words), 8))
    np.put_along_axis(portions, np.asarray(chosen), np.asarray(weights), 1)
    shares_of[f"layer {number + 1}"] = portions

# %%
nb08.plot_map(words, shares_of)
nb.caption(
    "each column is a token, and its two shaded cells are the experts that it takes: the "
    "darker, the more. The two sum to one. A token that comes twice often has the same "
    "first expert."
)

# %% [markdown]
# Is that more than chance? We take each of the 1,024 tokens that occurs more than once,
# and guess its first expert: the one that its *other* occurrences go to most. How often
# is that right? The last column guesses the layer's favourite each time.


# %%
def repeated(first):  # the first expert of every token of the text
    hits, base = [], []
    ids = np.asarray(text).ravel()
    for i, token in enumerate(ids):
        same = np.flatnonzero(ids == token)
        if len(others := same[same != i]):
            hits.append(np.bincount(first[others], minlength=8).argmax() == first[i])
            base.append(np.bincount(first).argmax() == first[i])
    return float(np.mean(hits)), float(np.mean(base))


agreement = [repeated(layer[:, 0]) for layer in picks["each layer's"]]
nb.table(
    ["layer", "right by the same token elsewhere", "right by the favourite"],
    [[i + 1, *row] for i, row in enumerate(agreement)],
)

# %%
nb.check(
    "same token and same expert, least of any layer", min(a for a, _ in agreement), gt=0.25
)
ahead = min(same - base for same, base in agreement)
nb.check("least lead over the favourite, any layer", ahead, gt=0.02)
sums = [s.sum(1) for s in shares_of.values()]
nb.check("max|Δ| of the shaded cells' sum and 1", np.abs(np.array(sums) - 1).max(), lt=1e-5)

# %% [markdown]
# So in this small model the token itself says a lot about its expert. Mixtral's authors
# looked for experts of subjects in their model, and found that syntax mattered more. Now
# back to capacity: what does 1.25 drop of real text, where routers are trained and not
# random?

# %%
lost = {
    name: np.maximum(n - int(1.25 * share), 0).sum() / n.sum() for name, n in loads.items()
}
nb.table(
    ["trained with", "dropped at capacity 1.25"], [[n, f"{v:.0%}"] for n, v in lost.items()]
)
nb.check("share dropped, a fair router", dropped["capacity 1.25"][10], lt=0.005)
nb.check("share dropped, the package's loss", lost["the package's"], gt=0.1)
saved = lost["the package's"] - lost["each layer's"]
nb.check("share that each layer's loss keeps, beyond the package's", saved, gt=0.05)

# %% [markdown]
# **Takeaway.** With a capacity of 1.25, a fair router drops next to nothing of 1,024
# tokens, and one that was trained with the package's loss drops a lot. So measure on real
# text.
#
# ## Experts on several devices
#
# A mesh with an axis `expert` cuts the experts, and nothing else. The naive way: give each
# device two experts (of eight, on four devices) and *all* tokens, let it compute what its
# experts contribute, and add the parts up. A device subtracts the number of its first
# expert from `chosen`. Its own experts then have the numbers 0 and 1, and `mix` ignores all
# others.

# %%
homes = nb.knob(4, of=(2, 4, 8))
each, x = 8 // homes, jax.random.normal(key, (48, tiny.dim))
layer = fresh.layers[0].feed_forward
chosen, weights = mx.moe.route(layer.gate(x), 2)
of_home = lambda home: jax.tree.map(
    lambda w: w[each * home : each * (home + 1)], layer.experts
)
parts = [  # naive
    mx.moe.mix(of_home(home), x, chosen - each * home, weights) for home in range(homes)
]

# %%
norms = np.linalg.norm(np.array(parts), axis=2)  # [devices, T]
nb08.plot_parts(norms)
nb.caption(
    "which device contributes to which token. A column has one shaded cell or two: the "
    "devices that hold the token's experts. The others are white: they add zeros."
)
owners = np.asarray(chosen) // each  # [T, k]
expected = np.stack([(owners == home).any(axis=1) for home in range(homes)])
nb.check("shaded cells are those expected", bool((expected == (norms > 0)).all()), eq=True)
nb.check("most shaded cells of a token", int((norms > 0).sum(axis=0).max()), eq=2)
nb.check("fewest shaded cells of a token", int((norms > 0).sum(axis=0).min()), gt=0)

# %% [markdown]
# `jax.shard_map` runs one function on every device of a mesh, on that device's part of
# the arrays; `in_specs` say how each array is cut, as in [07](07_many_devices.ipynb).
# Inside it, `jax.lax.psum` adds up what the devices have. That message is called
# all-reduce.

# %%
four = mx.devices.mesh.make_mesh({"expert": 4})
add = jax.shard_map(
    lambda a: jax.lax.psum(a, "expert"),
    mesh=four,
    in_specs=jax.P("expert"),
    out_specs=jax.P(),
)
print(jnp.arange(4.0), "becomes", jax.jit(add)(jnp.arange(4.0)))

# %% [markdown]
# The package's version is the naive one inside `shard_map`, with `psum` in place of
# `sum`. Read `here` first, which each device runs.

# %%
nb.show_source(mx.devices.experts.mix_where_experts_are)
spread = mx.shard(fresh, mx.devices.mesh.make_mesh({"expert": homes}))
experts = spread.layers[0].feed_forward.experts

# %% [markdown]
# `lower` and `compile` make the program without running it, as in
# [05](05_what_the_compiler_sees.ipynb), and `as_text` shows its lines. So we can count
# the messages, and then run that very program. `addressable_shards` are the parts of an
# array, a part for each device.

# %%
program = jax.jit(mx.moe.mix).lower(experts, x, chosen, weights).compile()
messages = [line for line in program.as_text().splitlines() if " all-reduce(" in line]
together = program(experts, x, chosen, weights)
here = experts.w1.weight.addressable_shards[0].data.nbytes
everywhere = layer.experts.w1.weight.nbytes

# %%
nb.check(
    "max|Δ| of the parts' sum and the package on devices",
    jnp.abs(sum(parts) - np.asarray(together)).max(),
    lt=1e-4,
)
alone = mx.moe.mix.plain(layer.experts, x, chosen, weights)
nb.check(
    "max|Δ|, experts on devices and all on one",
    jnp.abs(np.asarray(together) - alone).max(),
    lt=1e-4,
)
nb.check("experts' bytes, one device over all", here / everywhere, eq=1 / homes)
nb.check("all-reduces in the program of a layer", len(messages), eq=1)

# %% [markdown]
# So no token is sent anywhere: every device has them all already. GShard's scheme keeps
# tokens on different devices and sends each to its experts and back. This message is an
# **all-to-all**: each device has something for each other one. It needs room of a fixed
# size for the tokens that arrive, which is a capacity again.
#
# **Predict.** Four devices share the experts, and so their work. Each device allocates
# slots for tokens, in fixed shapes. How many, compared with one device that has all
# experts: a quarter, a half, or about as many? (0.25, 0.5 or 1)

# %%
my_room = None  # 0.25, 0.5 or 1

# %%
pairs = 4096 * 2  # 4,096 tokens, two experts for each
slots = lambda n_experts: int(np.prod(mx.kernels.experts.block_sizes(pairs, n_experts)))
room = slots(each) / slots(8)
nb.guess(
    "Slots of a device, over those of one device alone",
    my_room,
    min((0.25, 0.5, 1), key=lambda option: abs(option - room)),
    why={
        0.25: "that is its fair share, and nobody can promise that it gets no more.",
        0.5: "all tokens might choose the experts of one and the same device.",
    },
)
nb.check("slots of a device for each pair of all tokens", slots(each) / pairs, gt=0.999)
nb.check("slots of a device over its fair share", room * homes, gt=1.5)

# %% [markdown]
# **Takeaway.** Cutting experts divides the weights, but not the room for tokens: a program
# that never drops a token must be ready for all of them to choose one device's experts.
#
# ## Layers in a pipeline
#
# The other cut is across: the first layers on one device, the next on another, and so on.
# Tokens go through these **stages** one after the other, so with one batch all stages but
# one would wait. GPipe's answer: cut the batch into **microbatches**, and while stage 1 has
# the first, stage 0 takes the second. In turn `t`, stage `s` has microbatch `t - s`.
#
# The message is `jax.lax.ppermute`: it sends along a list of pairs, from which device to
# which. A device that gets nothing has zeros.

# %%
n_stages, n_micro = nb.knob(4, of=(2, 4)), 4
line = mx.devices.mesh.make_mesh({"pipe": n_stages})
onward = [(s, s + 1) for s in range(n_stages - 1)]
send = lambda a: jax.lax.ppermute(a, "pipe", onward)
send = jax.shard_map(send, mesh=line, in_specs=jax.P("pipe"), out_specs=jax.P("pipe"))
print(jnp.arange(1, n_stages + 1), "becomes", jax.jit(send)(jnp.arange(1, n_stages + 1)))

# %% [markdown]
# The naive schedule, a row for each stage and a column for each turn, `-1` for no work:

# %%
turns = range(n_micro + n_stages - 1)
schedule = np.array(
    [[t - s if 0 <= t - s < n_micro else -1 for t in turns] for s in range(n_stages)]
)
print(schedule)

# %% [markdown]
# `mx.shard` with an axis `pipe` makes a `PipelinedTransformer`, whose `layers` are
# `Stages`: one program for all devices, with a loop over turns.
#
# **Predict.** Four stages, four microbatches. Whenever a device runs its stage, that is
# one run. How many runs are there, on all devices together: 7, 16 or 28?

# %%
my_runs = None  # 7, 16 or 28

# %% [markdown]
# We watch. `nb08.watched` wraps each block in one that notes every output. To find out
# which microbatch an output belongs to, we compare its numbers with those that one device
# computes.

# %%
notes, ids = [], jax.random.randint(key, (16, 16), 0, 2048)  # 16 texts of 16 tokens
hidden = jax.jit(jax.vmap(lambda row: jnp.stack(fresh.hidden_states(row)[0][1:])))
hidden = np.moveaxis(np.asarray(hidden(ids)), 1, 0)  # [L, B, T, D]


def run_stages(m):
    notes.clear()
    piped = mx.shard(nb08.watched(fresh, notes), line, microbatches=m)
    out = np.asarray(piped.batch(ids)[0])
    return nb08.recognised(notes, hidden, n_stages, m), np.abs(out - hidden[-1]).max()


grid, gap = run_stages(n_micro)

# %%
why = {
    n_stages + n_micro - 1: "that many turns there are; but in each all stages run.",
    n_stages * n_micro: "that many are needed. But all devices run one program, which has "
    "no branch for waiting.",
}
nb.guess("Runs of a stage, all together", my_runs, grid.size, why)
nb08.plot_schedule(grid)
nb.caption(
    "what came out of each stage in each turn, recognised by its numbers. Coloured cells "
    "are the schedule. In the others a stage runs too: before its first microbatch on "
    "zeros, and after its last one on a microbatch that it has had before."
)

# %% [markdown]
# We compare the measured schedule with the naive one, and count the wasted runs.

# %%
nb.check(
    "the coloured cells are the schedule",
    np.maximum(grid, -1).tolist(),
    eq=schedule.tolist(),
)
nb.check("max|Δ|, in stages and on one device", float(gap), lt=1e-3)
nb.check("runs of a stage, all together", grid.size, eq=n_stages * (n_micro + n_stages - 1))
again, zeros = int((grid == nb08.AGAIN).sum()), int((grid == nb08.NONSENSE).sum())
nb.check("runs that make a microbatch again", again, eq=n_stages * (n_stages - 1) // 2)
nb.check("runs that make no microbatch", zeros, eq=n_stages * (n_stages - 1) // 2)
size = 4 // n_stages  # layers of a stage; every note has its layer's number
empty = [not mean.any() for number, mean in notes if (number + 1) % size == 0]
nb.check("runs that make zeros", sum(empty), eq=zeros)

# %%
if n_stages == 4:  # the moving picture is of the default
    shown = nb08.film(grid, "pictures/08_pipeline.gif")
    nb.check("the moving picture shows this schedule", shown == str(grid.tolist()), eq=True)

# %% [markdown]
# The same as a moving picture, which the cell above makes from these notes:
#
# ![Microbatches move through four stages, one turn after the
# other](pictures/08_pipeline.gif)
#
# The two triangles of wasted runs are the **bubble**. With `m` microbatches and `p` stages
# its share is `(p - 1) / (m + p - 1)`, so more microbatches waste less. Is there a price?
# In every turn a stage must read the weights of the experts that its microbatch chooses,
# and a small microbatch chooses nearly as many different ones as a large one. So we count,
# for one layer and a router that is fair, the experts read in all turns.

# %%
sizes = np.array([1, 2, 4, 8, 16])  # 16 rows of text are 16 microbatches at most
wasted = {n_micro: (grid < 0).mean(), 16: (run_stages(16)[0] < 0).mean()}
formula = (n_stages - 1) / (sizes + n_stages - 1)
picked = nb08.fair_choices(256, 8)  # [draws, T, k]
different = lambda m: np.mean([len(np.unique(c[: 256 // m])) for c in picked])
reads = [(m + n_stages - 1) * different(m) for m in sizes]

# %%
nb08.plot_microbatches(sizes, wasted, formula, reads)
nb.caption(
    "above, the bubble shrinks as the formula says: the package was run at the two "
    "points. Below, the experts that one layer reads in all turns, for the same 256 "
    "tokens. More microbatches read more, because even a small one chooses nearly all "
    "eight."
)

# %%
gaps = [abs(share - formula[sizes == m][0]) for m, share in wasted.items()]
nb.check("max|Δ| of the bubble, counted and by the formula", max(gaps), lt=1e-9)
nb.check("experts read, 16 microbatches over 1", reads[-1] / reads[0], gt=2)
nb.check(
    "each doubling of microbatches reads more", bool((np.diff(reads) > 0).all()), eq=True
)
nb.check("different experts of a 16th of the batch, of 8", different(16), gt=6)

# %% [markdown]
# **Takeaway.** In the bubble a stage runs for nothing. More microbatches shrink the
# bubble, and each of them reads nearly all the experts again.
#
# ## Exercises
#
# **Exercise 1: what an all-to-all would send** (●● 15 minutes). Tokens lie on `n`
# devices, an equal run on each, and experts do too. Given `chosen` (`[T, k]`, a NumPy
# array), `E` and `n`, return the matrix `[n, n]` of how many pairs of token and expert
# device `i` sends to device `j`, those for itself included.
#
# <details><summary>Hint</summary>
#
# Where is token `t`? Where is expert `e`? Both are a division without remainder. Then
# `np.add.at(matrix, (i, j), 1)` counts, also if a place occurs twice.
#
# </details>
#
# {{solution:messages}}


# %%
def messages(chosen, n_experts, n_devices):
    return NotImplemented


ex08.check_messages(messages)

# %% [markdown]
# **Exercise 2: the way back** (●● 5 minutes). A colleague brings the tokens of each
# expert together with `order = np.argsort(expert)` and `rows[order]`, runs the experts,
# and returns `out[order]`. No shape complains, but most tokens get the row of another.
# Repair the line.
#
# <details><summary>Hint</summary>
#
# `order` says where each sorted row came from. You need where each token went. It is the
# *inverse* permutation. For two rows both are the same, so a test with two rows passes.
#
# </details>
#
# {{solution:back}}


# %%
def back(out, order):
    return NotImplemented  # was: out[order]


ex08.check_back(back)

# %% [markdown]
# **Exercise 3: how many microbatches?** (● 5 minutes). Four stages. What is the least
# number of microbatches for which at most a tenth of the stage runs is wasted?
#
# <details><summary>Hint</summary>
#
# In each stage's row three runs belong to the bubble, whatever `m` is.
#
# </details>
#
# {{solution:microbatches}}

# %%
microbatches = NotImplemented

ex08.check_microbatches(microbatches)

# %% [markdown]
# ## Recap

# %%
giga = lambda parts: f"{total(parts) / 1e9:.1f} billion"
two = nb08.parts_of(mixtral, k=2)
per_layer, of_all = busiest["the package's"], of_sum["the package's"]
nb.table(
    ["the question", "what we found"],
    [
        [
            "What is in memory, and what does a token cost?",
            f"{giga(whole)}, {whole['experts'] / total(whole):.0%} of it experts; a token "
            f"goes through {giga(two)}",
        ],
        ["What does a step of eight texts read?", f"{part:.0%} of the experts"],
        [
            "What do fixed shapes cost?",
            f"at worst {padded.max():.2f} rows for each that is needed; no pair is dropped",
        ],
        [
            "Does the loss balance?",
            f"the sum, not the layers: the busiest expert has {of_all:.1f} fair shares in "
            f"the sum, and {per_layer:.1f} in a layer",
        ],
        [
            "How is it spread?",
            f"experts: {here / everywhere:.0%} of the "
            f"bytes on each device; stages: {(grid < 0).mean():.0%} of the runs wasted",
        ],
    ],
)
nb.recap()

# %%
nb.say(
    f"**The answer.** {giga(whole)} parameters cost {giga(two)} a token, because a router "
    "sends each token to two experts of eight and all tokens share the rest. The "
    "experts are "
    "spread by giving each device some of them and adding up what all devices make; the "
    "layers, by giving each device a group of them and passing microbatches on."
)

# %% [markdown]
# **What we did not show.** A trained Mixtral, whose routers may choose differently from our
# small one's. Time: eight pretend devices on one CPU say what is computed and sent, and not
# how long it takes. An all-to-all, which the package does not use. Training in stages,
# where gradients run through the pipeline backwards and need a schedule of their own.
#
# **Further reading.** *Mixtral of Experts* (arXiv 2401.04088), for the layer and for who
# goes where; *Switch Transformers* (2101.03961), for capacity and the balancing loss;
# *GShard* (2006.16668), for the all-to-all; *GPipe* (1811.06965), for the bubble; *Sparse
# Upcycling* (2212.05055), for experts that begin as copies.
#
# **Next**: [09](09_training_and_lora.ipynb), where a dense model learns.
