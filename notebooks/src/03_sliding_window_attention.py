# ---
# jupyter:
#   budget: 120
#   cover: 1
# ---

# %% [markdown]
# # Sliding window attention
#
# **How far back can a token see: W keys or W + 1, and how does layer 6 know about a token
# that none of its queries may look at?**
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
# - **Predict first**: how many keys does a window of 3 let through in Mistral's reference?
#   How much does a token matter that is in reach, but far away? How much work does a mask
#   save?
#
# The letters: `T` tokens, `D` width of the residual stream, `W` window, `L` layers; see
# [README.md](README.md). Words of JAX that [01](01_one_model_two_languages.ipynb) explains:
# `jax.jit` compiles a function, `jax.vmap` maps it over rows, a model is a **pytree** (a
# tree with arrays as leaves), and `eqx.tree_at` makes a copy with another leaf.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
import nb03
import nbtools as nb
import one_file_ref
from exercises import ex03


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("03")
package, tokenizer = mx.load(dtype=jnp.float32)
tokens = nb.held_out(512)
text = jnp.asarray(tokens)  # [T]

# %% [markdown]
# ## The mask, in three lines
#
# In attention every token has a **query**, a **key** and a **value**. A query is compared
# with keys, and the token fetches a mixture of the values whose keys fit. Causal attention
# lets the query at position `t` look at the keys at positions `0 .. t`. A **sliding
# window** cuts off the old end: only the last few keys remain. The **mask** says which, a
# row for each query and a column for each key. In three lines, with a window of 2:

# %%
t, s = np.arange(4)[:, None], np.arange(4)[None, :]  # queries down, keys across
naive = (s <= t) & (t - s < 2)  # [query, key]
print(naive.astype(int))

# %% [markdown]
# The package's mask is as short. It takes the positions as arguments, because the keys in
# a **cache**, the memory of the keys and values of earlier tokens, need not lie in order. A
# negative position marks an empty place of the cache, which no query sees.

# %%
nb.show_source(mx.attention.visible)
four = jnp.arange(4, dtype=jnp.int32)
same = np.array_equal(naive, mx.attention.visible(four, four, 2))
nb.check("three lines = the package's mask", same, eq=True)

# %% [markdown]
# So in the package a window of `W` is `W` keys, the query's own among them. The reference,
# and the one-file port with it, makes the mask by two calls: `tril` cuts off the future,
# `triu` with a negative diagonal cuts off the past.
#
# ```python
# mask = jnp.tril(tensor, k=0)
# mask = jnp.triu(mask, k=-self.args.sliding_window)
# ```
#
# **Predict.** The window is 3. How many keys does a query late in the text see in the
# reference? Its own key counts.

# %%
my_reference = None  # 2, 3 or 4

# %% [markdown]
# ## Poke it
#
# We may have misread the code, so we ask the programs. Change one token, and see at which
# positions the output changes: exactly those positions *can see* that token. With one
# layer, that is the mask itself. The program may be a black box: the same poke works on
# torch, on both ports, and on a model that reads one token at a time. We take a model of
# one small layer with random weights. Row 0 of `poked` is the text, and row `s + 1` is the
# text with another token at place `s`.

# %%
T, W = 6, 3
small = nb03.small_model(window=W)  # the package's
small_one_file = nb03.as_one_file(small, window=W)  # the same weights
poked = np.tile(np.arange(T, dtype=np.int32), (T + 1, 1))
poked[np.arange(1, T + 1), np.arange(T)] = 15


def seen(logits):  # [T + 1, T, V] -> [query, key]
    return (np.abs(logits[1:] - logits[:1]).max(axis=-1) > 1e-6).T


# %% [markdown]
# All three programs run in **prefill**, which reads the whole text at once. The one-file
# port also runs in **decoding**, which reads a token at a time and keeps the last `W` keys
# in a cache that [04](04_the_rolling_buffer.ipynb) explains, the rolling buffer.

# %%
caches = small_one_file.empty_cache(T + 1, T)
prefill, _ = small_one_file(poked, jnp.arange(T), caches)
masks = {
    "package": seen(np.asarray(jax.vmap(small)(poked)[0])),
    "torch": seen(oracle("poke", lambda _: nb03.poke_torch(small, W, poked))),
    "one file, prefill": seen(np.asarray(prefill)),
    "one file, decoding": seen(np.asarray(nb03.decode_one_file(small_one_file, poked))),
}
nb03.masks(masks)
nb.caption(
    "a dark cell is a key that the query's output depends on, and the number is how far "
    "back it lies. Three pictures are the same band. The reference's prefill has one "
    "diagonal more."
)

# %%
keys_seen = {name: int(mask.sum(1).max()) for name, mask in masks.items()}
nb.guess(
    "Keys seen in the reference's prefill",
    my_reference,
    keys_seen["one file, prefill"],
    why={
        2: "the query's own key counts as well.",
        3: "`triu(k=-3)` keeps the diagonal `t - s = 3` itself.",
    },
)

# %% [markdown]
# The same as checks: three of the four are the package's mask, key by key.

# %%
for name in ("package", "torch", "one file, decoding"):
    nb.check(f"{name}: keys seen", keys_seen[name], eq=W)
    same = np.array_equal(masks[name], mx.attention.visible(*[jnp.arange(T)] * 2, W))
    nb.check(f"{name}: its mask is the package's `visible`", same, eq=True)
nb.check("one file, prefill: keys seen", keys_seen["one file, prefill"], eq=W + 1)

# %%
nb.say(
    f"**Takeaway.** A window of {W} is {keys_seen['package']} keys, the query's own "
    "included, except in the prefill of the reference, where it is "
    f"{keys_seen['one file, prefill']}. The same slip sits in other places: "
    "`window_size=(W, W)` of the FlashAttention kernel means W + 1 keys, too "
    "(transformers #29623)."
)

# %% [markdown]
# ## Two ports and torch
#
# A model that sees 4 keys in prefill and 3 in decoding gives the same text two meanings,
# depending on how it was read. So let the embedded model read 128 tokens of Shakespeare at
# once, and again one at a time, with a cache. It is the same text, so the **logits**, the
# scores of all tokens that may come next, should be the same. (The loops are in `nb03.py`.)

# %%
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
gaps = {
    "one file": nb03.gap_one_file(one_file, text[:128]),
    "package": nb03.gap_package(package, text[:128]),
    "torch": float(oracle("gap", lambda twin: nb03.gap_torch(twin, tokens[:128]))),
}

# %%
decoding = {**keys_seen, "one file": keys_seen["one file, decoding"]}
prefilling = {**keys_seen, "one file": keys_seen["one file, prefill"]}
nb.table(
    ["", "keys in prefill, W = 3", "keys in decoding", "max abs Δ, at once or stepped"],
    [[name, prefilling[name], decoding[name], gap] for name, gap in gaps.items()],
)
for name in ("package", "torch"):
    nb.check(f"{name}, at once or stepped, max|Δ logits|", gaps[name], lt=2e-4)
nb.check("one file, at once or stepped, max|Δ logits|", gaps["one file"], gt=0.05)

# %% [markdown]
# The difference in code is one diagonal of `triu`. The one-file port keeps it, because a
# port that quietly repairs its original cannot be checked against it. The package sees `W`
# keys, at once or stepped.
#
# **Takeaway.** In the reference a text gives other logits if it is read a token at a time;
# in the package and in torch it gives the same, up to rounding.
#
# ## A staircase, in small
#
# The title's second question: one layer fetches from at most `W - 1` positions back. But
# what it fetches *from* has itself fetched, one layer earlier. So after `l` layers a token
# may depend on tokens up to `l · (W - 1)` positions back. That is the **reach**.
#
# There is a naive way to see it. Take the mask as a matrix of 0 and 1, and multiply it by
# itself. Entry `(t, s)` of the product counts the ways to go from `t` to `s` in two steps,
# each of which the mask allows. With the mask of the first section, in three lines:

# %%
band = np.tril(np.ones((4, 4), int)) - np.tril(np.ones((4, 4), int), -2)  # a window of 2
print(band, band @ band, band @ band @ band, sep="\n\n")

# %% [markdown]
# The last row sees 2 tokens, then 3, then 4. And there is more in it: after three layers
# there are three ways to each of the tokens in the middle, but only one to the farthest.
#
# Does a real model do that? A **gradient** tells. The gradient of the last token's state
# with respect to each token's embedding, the row of numbers that enters the model for it,
# is *exactly* zero if no path leads there. We call the gradient's length the **influence**
# of that token.
# **`jax.grad`** gives the gradient of a single number, **`jax.jacrev`** those of several, a
# row for each:

# %%
row = jnp.array([1.0, 2, 3, 4])
two_numbers = lambda x: jnp.stack([x[0] * x[1], x[3] ** 2])
print(jax.jacrev(two_numbers)(row))

# %% [markdown]
# The model takes token ids, and one cannot differentiate by a whole number. The trick: give
# the model a table of embeddings with a row for each *position*, let it read the ids 0, 1,
# 2, and so on, and differentiate by the table. The state of the last token after a layer
# is a vector; its product with a random direction makes it one number.


# %%
def influence(table, model):  # [T, D] -> a number for each layer
    model = eqx.tree_at(lambda m: m.tok_embeddings.weight, model, table)
    hidden, _ = model.hidden_states(jnp.arange(len(table)))
    direction = jax.random.normal(key, (table.shape[1],))
    return jnp.stack([h[-1] @ direction for h in hidden])


gradients = jax.jit(jax.jacrev(influence))
lengths_of = lambda table, model: np.linalg.norm(gradients(table, model), axis=-1)

# %% [markdown]
# A model of six small layers with random weights, and a window that you may change:

# %%
window = nb.knob(4, of=(2, 4, 8))
n = 6 * (window - 1) + 4  # some tokens are out of reach
model = nb03.small_model(window, n_layers=6, vocab_size=n)
small_strength = lengths_of(model.tok_embeddings.weight, model)  # [L + 1, T]
nb03.small_staircase(small_strength)
nb.caption(
    "a staircase. Each row is the last token after one layer more, and each cell is a "
    "token on which it depends: on the right the farthest. Every step is as wide as the "
    "one before. The darker a cell, the less influence its token has."
)

# %%
n_t = np.arange(n)
band = (n_t[None, :] <= n_t[:, None]) & (n_t[:, None] - n_t[None, :] < window)
ways = [np.linalg.matrix_power(band.astype(float), layer)[-1] for layer in range(7)]
cells = [np.array_equal(row > 0, way > 0) for row, way in zip(small_strength, ways)]
nb.check("layers whose cells are those of the product of masks", sum(cells), eq=7)
steps = np.diff((small_strength > 0).sum(axis=1)).tolist()
nb.check("new tokens with each layer", steps, eq=[window - 1] * 6)
edge = small_strength[6, n - 1 - 6 * (window - 1)]
nb.check(
    "influence of the farthest over that of the last", edge / small_strength[6, -1], lt=0.5
)

# %%
if window == 4:  # the moving picture is of the default
    shown = nb03.film(small_strength, "pictures/03_staircase.gif")
    same = shown == nb03.rows_of(small_strength)
    nb.check("the moving picture shows these cells", same, eq=True)

# %% [markdown]
# The same as a moving picture, which the cell above makes from these numbers. With a
# window of 4, each layer lets the last token know of three more:
#
# ![The staircase grows by one row with each layer](pictures/03_staircase.gif)
#
# **Takeaway.** A layer adds `W - 1` tokens to those that a token can know of, and a model
# of `L` layers reaches `L · (W - 1)` positions back. Mistral's paper rounds that to
# `L · W`: 32 layers with a window of 4,096 make "131K tokens".
#
# ## The reach of the embedded model
#
# Now the trained model, with `W` = 64 and six layers, on 512 tokens of Shakespeare.
#
# **Predict.** A token 300 positions back is in reach of layer 6. How large is its influence
# on the last token's state, compared with that of the last token itself: about a tenth, a
# thousandth, or less than a millionth?

# %%
my_influence = None  # "a tenth", "a thousandth" or "less than a millionth"

# %%
embedded = package.tok_embeddings(text)  # [T, D]
strength = lengths_of(embedded, package)  # [L + 1, T]
nb03.staircase(strength, window=64)
nb.caption(
    "the same staircase. After layer l the last token depends on no token more than 63 l "
    "back, which is the black line; the white beyond it is not small but exactly zero. "
    "Towards the edge the influence fades by orders of magnitude: the reach says what a "
    "token can know, and not how much."
)

# %%
back = strength[6, ::-1] / strength[6, -1]  # by distance
nb.guess(
    "A token 300 back, compared with the last one, matters",
    my_influence,
    "less than a millionth" if back[300] < 1e-6 else "more",
    why={
        "a tenth": "each look hands on only a part, and here five are needed.",
        "a thousandth": "that would be about right for heads that attend equally to all "
        "keys. The trained heads do not, as the next figure shows.",
    },
)
beyond = [float(row[: 511 - 63 * layer].max()) for layer, row in enumerate(strength)]
nb.check("gradient beyond the reach, any layer", max(beyond), eq=0.0)
nb.check("influence of a token 300 back, relative to the last", back[300], lt=1e-6)

# %% [markdown]
# So no token beyond the line has any influence. Does the farthest one on the line have
# some? In the trained model it is too little to tell. So take away the model's preferences:
# with queries of zero, every token attends equally to all keys that it may see.

# %%
flat = lengths_of(embedded, nb03.without_preferences(package))
reach = [int(511 - np.flatnonzero(row)[0]) for row in flat]
nb.check("reach after 0 to 6 layers (positions)", reach, eq=[63 * n for n in range(7)])

# %% [markdown]
# The model without preferences also tells why far tokens matter so little. Is it the
# geometry, because few ways lead to the edge, as in the products of the small masks? Or is
# it the trained heads?

# %%
indifferent = flat[6, ::-1] / flat[6, -1]
curves = {"trained model": back, "without preferences": indifferent}
nb03.fading({name: np.where(c > 0, c, np.nan)[:390] for name, c in curves.items()})
nb.caption(
    "neither line goes beyond the reach. Without preferences little influence is lost for "
    "half of the way, and many powers of ten between there and the edge. The trained model "
    "loses far more, near and far."
)

# %%
nb.check("trained model, last token that matters", int(np.flatnonzero(back)[-1]), lt=379)
nb.check("without preferences, lost up to 200", indifferent[0] / indifferent[200], lt=50)
nb.check("lost from 200 to 378", indifferent[200] / indifferent[378], gt=1e5)
for n in (60, 300):
    nb.check(f"{n} back, without preferences over trained", indifferent[n] / back[n], gt=20)

# %% [markdown]
# So both are at work. Geometry makes the edge faint, and the trained heads, which prefer
# some tokens to others, make everything faint that is far.
#
# The one-file port sees one key more in prefill, so each of its steps is one position
# wider. Torch's are the package's. (`nb03.py` has the same gradient for both.)

# %%
one_file_reach = nb03.reach_one_file(one_file, embedded)
nb.check("reach of 6 layers, one file (positions)", one_file_reach, eq=6 * 64)
torch_reach = int(oracle("reach", lambda twin: nb03.reach_torch(twin, tokens)))
nb.check("reach of 6 layers, torch (positions)", torch_reach, eq=6 * 63)
nb.say(
    f"**Takeaway.** Six layers with windows of 64 reach {reach[6]} positions back, plus "
    f"the token itself; but a token 300 back has {back[300]:.0e} times the influence of "
    "the last one."
)

# %% [markdown]
# ## What is a longer look worth?
#
# The window is not a weight, so the same weights run with any window. How well does the
# trained model predict when it sees fewer keys than in training, or more?
#
# **Predict.** The model was trained with a window of 64. Will it predict better with 256?

# %%
my_loss = None  # "better", "same" or "worse"

# %% [markdown]
# The **loss** is the mean of minus the log-probability of the token that comes, in nats. We
# take it over the second half of four texts of 256 tokens, where every token has more than
# 64 before it. And we try a second set of models, whose positions are halved before
# [RoPE](02_inside_one_block.ipynb) turns queries and keys by them. To such a model a key
# 100 tokens away looks as if it were 50 away.

# %%
rows = jnp.asarray([nb.held_out(256, start=s) for s in (0.91, 0.93, 0.95, 0.97)])  # [B, T]
tried, halved = [8, 32, 64, 128, 256], {}
by_position = {}
for w in tried:
    model = nb.with_config(package, sliding_window=w)
    by_position[w] = nb03.losses_at(model, rows, jnp.float32(1))  # [T - 1]
    if w in (64, 128):
        halved[w] = float(nb03.losses_at(model, rows, jnp.float32(0.5))[127:].mean())
losses = {w: float(loss[127:].mean()) for w, loss in by_position.items()}

# %%
nb03.windows(64, tried, [*losses.values()], halved)
nb.caption(
    "a window of 8 hurts, and one of 32 hardly does. A window above that of the training "
    "does not help: it hurts most. With halved positions the model is worse than as "
    "trained; but then a window of 128 is about as good as one of 64."
)

# %%
change = losses[256] - losses[64]
verdict = "same" if abs(change) < 0.01 else "better" if change < 0 else "worse"
nb.guess(
    "With a window of 256",
    my_loss,
    verdict,
    why={
        "better": "more can be known, but in training the model has never met a key so "
        "far away.",
        "same": "that would need far keys to be ignored, and nothing has taught that.",
    },
)
nb.check("loss at W = 8 less loss at W = 64 (nats)", losses[8] - losses[64], gt=0.1)
nb.check("loss at W = 256 less loss at W = 64 (nats)", change, gt=0.3)
nb.check("W = 256 hurts more than W = 8 (nats)", losses[256] - losses[8], gt=0.2)

# %% [markdown]
# Why does more hurt? A window of 128 brings two new things at once: more keys to choose
# from, and distances that the model has never met. The halved positions take them apart.
# They allow 128 keys, none of which looks farther away than 64.

# %%
more_keys = halved[128] - halved[64]
nb.check("halved: 128 keys for 64 change the loss by (nats)", abs(more_keys), lt=0.2)
farther = losses[128] - losses[64]
nb.check("as they are: 128 keys for 64 raise it by (nats)", farther, gt=0.4)
nb.check("halving itself costs (nats)", halved[64] - losses[64], gt=0.2)
early = float(jnp.abs(by_position[256] - by_position[64])[:63].max())
nb.check("before position 63, W = 64 and W = 256 are the same", early, lt=1e-3)

# %%
nb.say(
    f"**Takeaway.** At the window of its training the model loses {losses[64]:.3f} nats a "
    f"token, with 8 keys {losses[8]:.3f}, and with 256 {losses[256]:.3f}. Twice the keys "
    f"raise the loss by {farther:.2f} nats at new distances, and change it by "
    f"{more_keys:+.2f} at known ones. So the distance does the harm, not the number."
)

# %% [markdown]
# ## What does a mask save?
#
# A query with a window of 64 needs 64 scores, whatever the length of the text.
#
# **Predict.** We put the band mask on full attention over 1,024 tokens. Which share of the
# operations does it save?

# %%
my_saving = None  # 0, 50 or 94, in percent

# %% [markdown]
# XLA, the compiler behind `jax.jit`, can count for us without running anything.
# **`jax.jit(f).lower(x)`** runs `f` once with stand-ins for its arguments, and translates
# what it did into XLA's language. **`cost_analysis()`** says how many operations on numbers
# the program has. A **`jax.ShapeDtypeStruct`** stands for an array:
# a shape and a dtype, and no numbers. A product of two 4 × 4 matrices is 16 sums of 4
# products, so 16 · 4 · 2:


# %%
def operations(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


four_by_four = jax.ShapeDtypeStruct((4, 4), jnp.float32)
nb.check("a product of 4 x 4", operations(jnp.matmul, four_by_four, four_by_four), eq=128.0)

# %% [markdown]
# We count full attention, with and without the band (`attend` is the package's function
# for both), and `attend_sequence`, which the package uses in prefill. `attend_sequence`
# cuts the queries into blocks, and gives each block only the keys that one of its queries
# may see. The mask then trims the edges of the band. (`@replaceable` marks a function for
# which some devices have a faster program that computes the same; a CPU runs this one.
# `segments` is for several texts in one row.)

# %%
nb.show_source(mx.attention.attend_sequence)


# %%
def masked(n, window):  # full attention under a mask
    queries, keys, values = nb03.shapes(n)
    positions = jnp.arange(n, dtype=jnp.int32)
    swap = lambda x: jnp.swapaxes(x, 0, 1)  # `attend` has the heads first
    attend = lambda q, k, v, mask: mx.attention.attend(q, swap(k), swap(v), mask)
    mask = mx.attention.visible(positions, positions, window)
    return operations(attend, queries, keys, values, mask)


def blocked(n, window):
    band = mx.attention.Band(None, window)
    attend = lambda q, k, v: mx.attention.attend_sequence(q, k, v, band)
    return operations(attend, *nb03.shapes(n))


# %% [markdown]
# A window may also save memory: without one, the cache grows with the text. With one, it is
# a ring ([04](04_the_rolling_buffer.ipynb)). The bytes below are for decoding one token at
# a time (`chunk=1`; the default of `mx.Cache` leaves room for longer chunks).

# %%
lengths = [64, 128, 256, 512, 1024, 2048, 4096]
work = {
    "full attention": [masked(n, None) for n in lengths],
    "full attention under a band mask": [masked(n, 64) for n in lengths],
    "blocks along the band": [blocked(n, 64) for n in lengths],
}
size = lambda n, window: nb03.cache_bytes(package.config, n, window)
memory = {"no window": [size(n, None) for n in lengths]}
memory["window of 64"] = [size(n, 64) for n in lengths]

# %%
nb03.work_and_memory(lengths, work, memory)
nb.caption(
    "above, the mask's line lies on top of full attention's: quadratic. Only the blocks "
    "turn the window into less work. Up to 1,024 tokens their work grows about as fast as "
    "the text; beyond, the line bends upwards. Below, the cache with a window stops "
    "growing at 64 tokens."
)

# %%
at = lambda name, n: work[name][lengths.index(n)]
saving = 1 - at("full attention under a band mask", 1024) / at("full attention", 1024)
nb.guess(
    "Operations saved by the mask (percent)",
    my_saving,
    round(100 * saving),
    why={
        94: "that is the share of scores that do not count. All are computed, and then "
        "replaced.",
        50: "half of the scores lie in the future, and they are computed as well.",
    },
)
nb.check("operations saved by a mask alone, at 1,024 tokens", abs(saving), lt=0.01)

# %% [markdown]
# And the growth with the text. When the text doubles, quadratic work grows four times, and
# work along a band twice:

# %%
blocks = "blocks along the band"
growth = lambda name, n: at(name, 2 * n) / at(name, n)
nb.check(
    "growth of full attention, 2,048 to 4,096 tokens",
    growth("full attention", 2048),
    gt=3.8,
)
nb.check("growth of the blocks' work, 512 to 1,024 tokens", growth(blocks, 512), lt=2.3)
nb.check("growth of the blocks' work, 2,048 to 4,096 tokens", growth(blocks, 2048), gt=2.7)
ratio = at("full attention", 1024) / at(blocks, 1024)
nb.check("operations, full over blocks, at 1,024 tokens", ratio, gt=4)
of_64, of_128, *_, of_4096 = memory["window of 64"]
nb.check("cache of 4,096 tokens over that of 64, in a window", of_4096 / of_64, eq=1.0)

# %% [markdown]
# The reason for the bend is in the code above: `block` is 64 queries, or more if there
# would be over 16 blocks. (The comment says why: every block is compiled.) So a long text
# has 16 blocks of many queries, and a block has all keys that *any* of its queries needs.
# `nb03.blocks_of` notes the calls of `attend` while JAX traces the function, which is the
# run with stand-ins:

# %%
cut = {n: nb03.blocks_of(n, 64) for n in (512, 1024, 4096)}  # (queries, keys) of each block
header = ["tokens", "blocks", "queries in a block", "keys in a block", "keys a query needs"]
nb.table(header, [[f"{n:,}", len(b), *b[-1], 64] for n, b in cut.items()])
nb.check("blocks of 512, 1,024, 4,096 tokens", [*map(len, cut.values())], eq=[8, 16, 16])
nb.check(
    "keys of a block, 1,024 and 4,096", [cut[1024][-1][1], cut[4096][-1][1]], eq=[127, 319]
)

# %%
times = memory["no window"][-1] / memory["window of 64"][-1]
nb.say(
    f"**Takeaway.** At 1,024 tokens the mask saves {100 * saving:.0f}% of the operations, "
    f"and blocks need {ratio:.1f} times fewer. At 4,096 tokens the cache with a window is "
    f"{times:.0f} times smaller."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: repair the band** (●● 5 minutes). A port has this mask, which is wrong in
# two ways. Repair it: a boolean array `[n, n]`, true where query `t` may see key `s`, made
# by `tril` and `triu`.
#
# ```python
# def band(n, window):
#     return np.triu(np.tril(np.ones((n, n), bool)).T, -window)
# ```
#
# <details><summary>Hint</summary>
#
# Print it for `n = 4` and `window = 2`, next to the first array of this notebook.
#
# </details>
#
# {{solution:band}}


# %%
def band(n, window):
    return NotImplemented


ex03.check_band(band)

# %% [markdown]
# **Exercise 2: the 131K of the paper** (● 5 minutes). Mistral 7B has 32 layers and a window
# of 4,096, and 32 · 4,096 is 131,072. What is the least number of layers with which a token
# can know of one that lies 131,072 positions back? The answer is a number.
#
# <details><summary>Hint</summary>
#
# How wide is a step of the staircase?
#
# </details>
#
# {{solution:layers_needed}}

# %%
layers_needed = NotImplemented
ex03.check_layers_needed(layers_needed)

# %% [markdown]
# **Exercise 3: scores that count** (●● 10 minutes). How many pairs of query and key does
# the band let through, for `n` tokens? Write a function that says so for any `n` and
# `window`, by a formula or a sum, in plain Python.
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
both_seen = f"{keys_seen['package']}; {keys_seen['one file, prefill']} in the reference"
rows = [
    ["keys of a window of 3", both_seen, "poking one token at a time"],
    ["reach of 6 layers, W = 64", f"{reach[6]} positions", "gradients that are not zero"],
    ["influence 300 back", f"{back[300]:.0e} of the last token's", "the same gradients"],
    ["a window of 256, not trained", f"{change:+.2f} nats", "the loss of the same weights"],
    ["work at 1,024 tokens", f"mask: as full; blocks: 1/{ratio:.1f}", "XLA's own count"],
]
nb.table(["what", "how much", "how we know"], rows)

# %%
nb.recap()

# %% [markdown]
# And the question of the beginning:

# %%
nb.say(
    f"**The answer.** A token sees W keys, its own among them: {keys_seen['package']} when "
    f"the window is {W}. Only the reference's prefill shows W + 1. Layer 6 of a model with "
    f"a window of 64 can know about a token {reach[6]} positions back, through the tokens "
    "in between."
)

# %% [markdown]
# **What we did not show**: kernels that skip masked blocks on a GPU, and layers whose
# windows differ (Ministral alternates them). Many of Mistral's later models have no window
# (`sliding_window: null`), so each token can look at every earlier one directly.
#
# **Further reading**: Mistral 7B, arXiv 2310.06825, §2 (window and reach); Longformer,
# arXiv 2004.05150, §3.1; Child et al., arXiv 1904.10509 (sparse attention).
#
# **Next**: [04 The rolling buffer](04_the_rolling_buffer.ipynb): if only `W` keys are
# ever seen, why keep the others?
