# ---
# jupyter:
#   budget: 120
#   cover: 7
# ---

# %% [markdown]
# # Inside one block: RMSNorm, RoPE, GQA, SwiGLU
#
# **What does each part of a transformer block do, and what breaks without it?**
#
# - **You will be able to** say what the residual stream and heads are; write each of the
#   four parts in three lines and prove that the package computes the same; read `einsum`
#   and use `vmap`; tell the two layouts of RoPE apart; count a cache's bytes.
# - **Before this**: [01](01_one_model_two_languages.ipynb). You know what attention is
#   for, and need not remember how it goes.
# - **Time**: {{time}}.
# - **The code lives in** `layers.py`, `rope.py`, `attention.py` and `transformer.py` of
#   `mistral_eqx/`, and in `one_file_ref.py`.
# - **Model and data**: the embedded model (6 blocks, 256 wide, 8 query heads, 2 key and
#   value heads; a token sees the last 64) and Shakespeare that it has never seen.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: is a model without positions blind to order? You double the input
#   of a feed-forward network: how much does its output grow? Which lost part harms a
#   trained model most?
#
# The letters: `B` batch, `T` tokens, `D` width of the stream, `H` query heads, `K` key and
# value heads, `F` width inside the feed-forward network; see [README.md](README.md). A
# comment such as `# [T, D]` gives the axes of an array.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
import nb02
import nbtools as nb
import one_file_ref
from exercises import ex02


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("02")
package, tokenizer = mx.load(dtype=jnp.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
config = package.config
text = jnp.asarray(nb.held_out(1024)).reshape(8, 128)  # [B, T]
tokens = text[0]  # [T]

# %% [markdown]
# Two measures: the **rms**, root mean square, is the size of a typical number in an
# array. The **loss** is the average of `-log p(next token)`, in nats. The model's output,
# the **logits**, is a number for each of 2,048 tokens; **softmax** turns them into
# probabilities, which sum to one. A model that knows nothing gives every token the same,
# and its loss is log 2048.


# %%
rms = lambda x: jnp.sqrt(jnp.mean(x**2))


def nats(logits, tokens):  # [T, V], [T]
    log_probabilities = jax.nn.log_softmax(logits[:-1])
    return -jnp.take_along_axis(log_probabilities, tokens[1:, None], axis=1).mean()


knows_nothing = float(np.log(config.vocab_size))

# %% [markdown]
# ## The residual stream: a table that is only ever added to
#
# A text enters as `T` token ids. The embedding looks up a row of `D` = 256 numbers for
# each. That makes a table `[T, D]`, one row for each token, and this table is the
# **residual stream**. It flows through the whole model and keeps its shape. A block does
# two things to it. Attention reads the stream, mixes information *between* rows, and adds
# its result. The feed-forward network reads the stream, works on each row *alone*, and
# adds its result. Here is all of that in the package:

# %%
nb.show_source(mx.TransformerBlock.attend, mx.TransformerBlock.feed)

# %% [markdown]
# Both add to `x`. We walk through the six blocks and keep the stream after each half.
# `places` holds where the tokens stand, for RoPE.

# %%
places, stream = package.places(tokens, None), [package.tok_embeddings(tokens)]
for block in package.layers:
    stream.append(block.attend(stream[-1], places, None)[0])  # [T, D]
    stream.append(block.feed(stream[-1]))

# %% [markdown]
# All blocks write into one shared table, so one can read it early: put the model's last
# norm and its output matrix behind *any* point of the stream, and ask for the loss.

# %%
lens = [float(nats(package.logits(x), tokens)) for x in stream]
nb02.lens(lens, knows_nothing)
nb.caption(
    "the model's answer, read too early. Read from the embedding alone, it is worse than "
    "knowing nothing. Block 1 gains the most, and every later block improves on what it "
    "gets."
)

# %%
after_block = lens[::2]
nb.check("loss read from the embedding alone", after_block[0], gt=knows_nothing)
gains = -np.diff(after_block)
nb.check("the least that a block improves the loss (nats)", gains.min(), gt=0.05)
nb.check("the block that gains the most", int(gains.argmax()) + 1, eq=1)

# %% [markdown]
# Do blocks only add? Then the model's last state is the embedding plus twelve arrays, which
# are made here by the parts alone.

# %%
total = stream[0]
for i, block in enumerate(package.layers):
    total += block.attention(block.attention_norm(stream[2 * i]), places, None)[0]
    total += block.feed_forward(block.ffn_norm(stream[2 * i + 1]))
last = package.hidden_states(tokens)[0][-1]  # by the model itself
gap = jnp.abs(last - total).max() / rms(last)
nb.check("last state = embedding + 12 arrays, max|Δ| / rms", gap, lt=1e-4)

# %%
growth = float(rms(last) / rms(stream[0]))
nb.check("the stream's growth, embedding to end (times)", growth, gt=50)
nb.say(
    "**Takeaway.** The stream is the sum of an embedding and twelve additions. On its way "
    f"its numbers grow {growth:.0f} times, from {rms(stream[0]):.2f} to {rms(last):.1f}, "
    "so parts that read it must cope with any size."
)

# %% [markdown]
# ## RMSNorm: read the stream at one size
#
# The norm divides a row by its rms, so that every reader gets numbers of about one, and
# then multiplies each of the `D` features by a learned weight.
# Three lines, for one row. The `eps` keeps a row of zeros from dividing by zero.


# %%
def norm_of_row(row, eps=1e-5):  # [D] -> [D]
    mean_square = jnp.mean(row**2)
    return row / jnp.sqrt(mean_square + eps)


small = jnp.array([[3.0, 4, 0, 0], [1, 1, 1, 1], [-2, 2, -2, 2], [100, 0, 0, 0]])
print(jax.vmap(norm_of_row)(small))

# %% [markdown]
# The function knows one row. **`jax.vmap`** turned it into a function of many: it *maps*
# along the first axis, and compiles to array operations and not to a loop. You write
# `f(row)` and get `f(table)`; no `axis=-1`, no `keepdims`. The package uses `vmap` for the
# batch, and writes the axis of the tokens out:

# %%
nb.show_source(mx.layers.RMSNorm.__call__)

# %% [markdown]
# `rsqrt` is one over the square root, and the squares are summed in float32 whatever the
# model's dtype is. Do the two agree, on rows of very different sizes and with the model's
# own weights?

# %%
norm = package.layers[0].attention_norm
rows = jnp.geomspace(1e-4, 1e4, 9)[:, None] * jax.random.normal(key, (9, 256))
naive = jax.vmap(norm_of_row)(rows) * norm.weight
nb.check(
    "max|Δ| RMSNorm, three lines and package", jnp.abs(naive - norm(rows)).max(), lt=1e-4
)
thousand = jnp.abs(norm(1000 * rows[4:]) - norm(rows[4:])).max()
nb.check("max|Δ| of the output, input x 1000", thousand, lt=1e-3)

# %% [markdown]
# A row and a thousand times that row look the same to whatever reads them. That cannot hold
# for the very smallest rows, next to which `eps` is no longer small.
#
# **Predict.** `eps` is 1e-5. Take a row of rms 1 and shrink it. At which rms of the row
# does the norm give back one of rms *one half*, and not 1: about 0.1, 0.002 or 0.00001?

# %%
my_half = None  # 0.1, 0.002 or 0.00001

# %% [markdown]
# We give the package's norm (with all its weights at 1) a row of every size from rms 100
# down to 1e-7, and draw what a norm with `eps` in the wrong place, outside the root, would
# do.

# %%
row = jax.random.normal(key, (256,))
sizes = np.geomspace(1e-7, 1e2, 91)
shrunk = sizes[:, None] * (row / rms(row))  # rms of row i is sizes[i]
inside = np.asarray(jax.vmap(rms)(mx.layers.RMSNorm(256, 1e-5, dtype=jnp.float32)(shrunk)))
outside = sizes / (sizes + 1e-5)  # the eps in the wrong place: after the root
half, wrong_half = (
    float(np.exp(np.interp(0.5, after, np.log(sizes)))) for after in (inside, outside)
)

# %%
far = "there eps is a thousandth of the mean square, and nothing is felt."
root = "eps is added to the *square* of the size, so it is felt at its root."
nb.guess("Half size at", my_half, float(f"{half:.0e}"), why={0.1: far, 0.00001: root})

# %% [markdown]
# The figure also marks the smallest row of our model's stream, after 0 to 6 blocks.

# %%
sizes_of_rows = [float(jax.vmap(rms)(x).min()) for x in package.hidden_states(tokens)[0]]
curves = {"eps in the root": inside, "eps outside": outside}
nb02.norm_sizes(sizes, curves, sizes_of_rows)
nb.caption(
    "on the right both curves are flat: the size of the input does not matter. On the left "
    "the norm fades out, and where it does so depends on where `eps` stands. Inside the "
    f"root, half size is reached at rows {half / wrong_half:.0f} times as large. All rows "
    "of our model lie on the flat part."
)

# %% [markdown]
# How far apart are the two curves?

# %%
nb.check("rms that comes back at half size", half, near=np.sqrt(1e-5 / 3), rtol=0.05)
nb.check("inside over outside, where half is reached", half / wrong_half, gt=50)

# %% [markdown]
# Does `eps` matter to this model? Its smallest rows are those of the embedding.

# %%
smallest, eps = min(sizes_of_rows), config.norm_eps
taken = 1 - smallest / np.sqrt(smallest**2 + eps)
taken_outside = 1 - smallest / (smallest + eps)
nb.check("share that eps takes from the smallest row of our model", taken, lt=0.005)
nb.say(
    "**Takeaway.** A norm hides the size of rows well above the root of `eps`; smaller "
    f"rows fade, to a half at {half:.1e}. Our smallest row has {smallest:.2g}: `eps` takes "
    f"{100 * taken:.2f}% of it, and {100 * taken_outside:.2f}% in the wrong place. A "
    "test of the norm must use small rows, or it hardly sees where `eps` stands."
)

# %% [markdown]
# ## Heads: eight small attentions side by side
#
# Attention lets a token fetch something from tokens before it. Each token makes three
# vectors from its (normed) row: a **query**, what it looks for; a **key**, what it can be
# found by; a **value**, what it hands over. The product of a query with a key is a *score*;
# softmax turns the scores of a query into weights that sum to one; the result is the
# weighted sum of the values.
#
# These are products of arrays, and **`einsum`** writes them by the names of their axes. A
# letter that is missing after the arrow is summed over. Shared letters must match:

# %%
q = jnp.arange(6.0).reshape(3, 2)  # t d: 3 queries of width 2
k = jnp.ones((4, 2))  # s d: 4 keys
print("t s, sum over d:", jnp.einsum("td,sd->ts", q, k).shape, "is q @ k.T")
print("t d, nothing summed:", jnp.einsum("td,td->td", q, q).shape, "is q * q")
print("one number:", jnp.einsum("td,td->", q, q), "is (q * q).sum()")

# %% [markdown]
# So one attention is three lines, one of which forbids looking ahead (the **causal mask**).
# The factor `d ** -0.5` keeps scores from growing with the width `d`. In the example every
# query and key is zero: all scores are equal, and each row is the average of the values so
# far.


# %%
def one_head(q, k, v):  # [T, d] each
    scores = jnp.einsum("td,sd->ts", q, k) * q.shape[1] ** -0.5
    scores = jnp.where(jnp.tri(len(q), dtype=bool), scores, -jnp.inf)
    return jnp.einsum("ts,sd->td", jax.nn.softmax(scores), v)


print(one_head(jnp.zeros((4, 4)), jnp.zeros((4, 4)), 4 * jnp.eye(4)))

# %% [markdown]
# One such average is a poor tool: a token that needs the previous word *and* the name three
# lines up would get a blur of both. So the model has `H` = 8 attentions next to one
# another, the **heads**. Each has a query of 32 numbers: the product `wq(x)` has 256, and
# `reshape` cuts it into 8 slices. Nothing more happens: a head *is* a slice.
#
# Mistral saves on keys and values: there are only `K` = 2 heads of those, the *kv heads*,
# each shared by a group of query heads. This is **grouped-query attention**, GQA.
#
# **Predict.** With 8 query heads and 2 kv heads, which kv head serves query head 3: kv head
# 0 or 1?

# %%
my_kv_head = None  # 0 or 1

# %%
kv_heads = nb.knob(2, of=(1, 2, 4, 8))
q, k, v = (jax.random.normal(jax.random.key(i), (6, 8, 4)) for i in range(3))  # [T, H, d]
k, v = k[:, :kv_heads], v[:, :kv_heads]  # [T, K, d]
swap = lambda x: jnp.swapaxes(x, 0, 1)  # the package keeps keys as [K, T, d]
causal = jnp.tri(6, dtype=bool)
out = mx.attention.attend(q, swap(k), swap(v), causal)  # [T, H, d]

# %% [markdown]
# `attend` is the package's. Now change the values of one kv head after the other, and see
# which query heads notice. Arrays of JAX cannot be changed; `v.at[:, kv].add(1)` is a copy
# of `v` with 1 added there.

# %%
serves = np.zeros((8, kv_heads), int)
for kv in range(kv_heads):
    poked = mx.attention.attend(q, swap(k), swap(v.at[:, kv].add(1)), causal)
    serves[:, kv] = jnp.abs(poked - out).max(axis=(0, 2)) > 1e-3
turns = {1: "that would be taking turns, `3 % 2`; here neighbours share."}
served, why = int(serves[3].argmax()), turns if kv_heads == 2 else {}
nb.guess("Query head 3 is served by kv head", my_kv_head, served, why=why)

# %% [markdown]
# The whole map is printed next. *Neighbours* share: the first query heads have kv head 0,
# the next have 1. Taking turns (0, 1, 0, 1, ...) would be `h % K`; it is `h // (H // K)`.
# Both give the same shapes, so no error tells them apart. And the naive loop over heads,
# against the package:

# %%
print(serves.T)  # a row for each kv head, a column for each query head
group = 8 // kv_heads
naive = [one_head(q[:, h], k[:, h // group], v[:, h // group]) for h in range(8)]
neighbours = [h // group for h in range(8)]
nb.check("kv heads by query head", serves.argmax(1).tolist(), eq=neighbours)
gap = jnp.abs(jnp.stack(naive, axis=1) - out).max()
nb.check("max|Δ| attention, loop over heads and package", gap, lt=1e-4)
nb.show_source(mx.attention.attend)

# %% [markdown]
# The package has no loop and copies no keys: all queries of a group become rows of one
# matrix, and `score` is that matrix times the keys. `astype(values.dtype)` and `float32`
# are about rounding only.
#
# What do heads look at? We want the weights, and `attend` returns values. So we use an
# identity matrix as the values: value `s` is 1 at place `s` and 0 elsewhere, and what comes
# out *is* the weights. (That needs as many tokens as a head is wide, 32.) `look` is written
# for one text, and `vmap` maps it over eight. **`jax.jit`** compiles the function into one
# program at its first call.


# %%
def look(tokens):  # [32] -> weights of the third block, [query, H, key]
    third, places = package.layers[2], package.places(tokens, None)
    x = third.attention_norm(package.hidden_states(tokens)[0][2])
    split = lambda x: x.reshape(32, -1, config.head_dim)
    q, k = (
        mx.rope.rotate(split(w(x)), places.cos, places.sin)
        for w in (third.attention.wq, third.attention.wk)
    )
    identity = jnp.broadcast_to(jnp.eye(32), (config.n_kv_heads, 32, 32))
    return mx.attention.attend(q, jnp.swapaxes(k, 0, 1), identity, jnp.tri(32, dtype=bool))


weights = np.asarray(jax.jit(jax.vmap(look))(text[:, :32]).mean(0))  # of 8 texts

# %%
late = weights[16:]  # queries with at least 16 tokens before them
back = lambda t: late[t, :, t : t + 17][:, ::-1]  # distances 0 to 16
profile = np.mean([back(t) for t in range(16)], axis=0)  # [H, distance]
nb02.heads(profile, config.n_heads // config.n_kv_heads)
nb.caption(
    "eight heads of block 3, and how far back each looks. Head 0 is a *previous-token* "
    "head: it puts most of its weight one token back. Heads 4 to 7 share one set of keys, "
    "and yet head 4 spreads over the text while head 7 stays near: the keys are the same, "
    "so the difference lies in the queries."
)

# %% [markdown]
# The caption in numbers:

# %%
mean_distance = (profile * np.arange(17)).sum(1) / profile.sum(1)  # [H]
nb.check("weight of head 0 on the token before", profile[0, 1], gt=0.5)
nb.check(
    "mean distance, head 4 over head 7 (same keys)",
    mean_distance[4] / mean_distance[7],
    gt=1.5,
)
nb.check("weights of a query sum to", weights.sum(-1).mean(), near=1.0, rtol=1e-3)

# %% [markdown]
# At the end the heads' results lie side by side, 8 × 32 = 256 numbers, and the matrix `wo`
# takes them to the stream. `wo` has 32 columns for each head. So its product is a *sum*:
# each head writes to the stream by itself. To see it, we mute seven heads at a time.
# **`eqx.tree_at(where, model, new)`** is a copy of a model in which what `where` points to
# is replaced by `new`; the rest is shared with the original.

# %%
attention = package.layers[2].attention
x = package.layers[2].attention_norm(package.hidden_states(tokens)[0][2])
places = package.places(tokens, None)
alone = jnp.zeros_like(x)

# %%
for h in range(8):
    keep = jnp.zeros((8, 32)).at[h].set(1).reshape(256)  # the columns of this head
    only = eqx.tree_at(lambda a: a.wo.weight, attention, attention.wo.weight * keep)
    alone += only(x, places, None)[0]
together, _ = attention(x, places, None)
nb.check(
    "max|Δ| of attention, and the sum over 8 heads",
    jnp.abs(alone - together).max(),
    lt=1e-3,
)

# %% [markdown]
# Why share keys at all? While it writes, a model keeps the keys and values of every token
# that it can still see. This **cache** grows with each token. By how much, for a Mistral 7B
# without a window, in bfloat16? (`jax.eval_shape` computes shapes and allocates nothing;
# `jax.tree.leaves` lists the arrays of an object.)


# %%
def kib_per_token(n_kv_heads):
    seven = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32)
    seven |= dict(n_kv_heads=n_kv_heads, norm_eps=1e-5, vocab_size=32000)
    make = lambda: mx.Cache(
        mx.ModelConfig(**seven), jnp.int32(0), chunk=1, max_length=1, dtype=jnp.bfloat16
    )
    return sum(x.size * 2 for x in jax.tree.leaves(jax.eval_shape(make).layers)) / 1024


nb.check("7B, 8 kv heads (KiB a token)", kib_per_token(8), eq=128.0)
nb.check("7B, 32 kv heads (KiB a token)", kib_per_token(32), eq=512.0)

# %%
nb.say(
    "**Takeaway.** A head is a slice with an attention of its own, and its result is added "
    "to the stream. Sharing keys and values cuts the cache of Mistral 7B from "
    f"{kib_per_token(32):.0f} to {kib_per_token(8):.0f} KiB a token, and heads that share "
    "keys can still look at different places."
)

# %% [markdown]
# ## RoPE: a position is an angle
#
# Attention is a sum over tokens, and a sum has no order. Something must say which token
# stands where. RoPE, *rotary position embedding*, takes the features of a query or key in
# pairs, and turns each pair like the hand of a clock. The hand of token `m` is turned by
# `m` times the pair's speed: the first pair turns one radian a token, the next ones ever
# slower.
#
# A pair is a point in the plane, so it is one complex number, and turning it by an angle is
# a product with `exp(i · angle)`. Three lines. The four rows printed are the *same* row
# `[1, 0, 1, 0]` at positions 0 to 3.


# %%
def turn_hands(x, theta=1e4):  # [T, d]: row t stands at position t
    speeds = theta ** -(jnp.arange(0, x.shape[1], 2) / x.shape[1])  # [d / 2]
    hands = (x[:, 0::2] + 1j * x[:, 1::2]) * jnp.exp(
        1j * jnp.arange(len(x))[:, None] * speeds
    )
    return jnp.stack([hands.real, hands.imag], axis=-1).reshape(x.shape)


print(turn_hands(jnp.array([[1.0, 0, 1, 0]] * 4)).round(3))

# %% [markdown]
# The first two columns run round the circle, the last two have hardly moved. `theta` sets
# how slow the last pair is. In the package the angles are made once for all layers
# (`rotation`), and the turn is written out in real numbers:

# %%
nb.show_source(mx.rope.rotation, mx.rope.rotate)

# %%
theta = nb.knob(1e4, of=(1e3, 1e4, 1e6))
positions = jnp.arange(1024, dtype=jnp.int32)
cos, sin = mx.rope.rotation(positions, 32, theta)  # [T, 16] each
x = jax.random.normal(key, (256, 1, 32))  # [T, one head, d]
turned = mx.rope.rotate(x, cos[:256], sin[:256])
gap = jnp.abs(turned[:, 0] - turn_hands(x[:, 0], theta)).max()
nb.check("max|Δ| RoPE, three lines and package", gap, lt=1e-3)

# %% [markdown]
# `yarn` in that code is for longer contexts, and off here. Here are all 16 pairs of a head,
# at 256 positions.

# %%
nb02.dials(cos[:256])
nb.caption(
    "a row is one pair, two stripes are one turn. The first pair is a second hand: it goes "
    "round several times within the window, and differs between neighbours. The last is an "
    "hour hand that has hardly moved at position 255."
)

# %%
flips = int((jnp.diff(jnp.sign(cos[:64, 0])) != 0).sum())  # two in a turn
nb.check("turns of the first pair in 64 tokens", flips / 2, gt=5)
step = jnp.hypot(jnp.diff(cos[:256, 0]), jnp.diff(sin[:256, 0]))
nb.check("first pair, neighbours: distance of the hands' tips", step.min(), gt=0.2)
nb.check("least cosine of the last pair up to 255", cos[:256, -1].min(), gt=0.8)

# %% [markdown]
# What is gained? If both a query and a key are turned by the same further angle, their
# product stays as it is. So the score depends on the *distance* only. Put one query and one
# key at 200 places of the text, a fixed distance apart:

# %%
one_q, one_k = jax.random.normal(key, (2, 32))
at = lambda x: mx.rope.rotate(jnp.broadcast_to(x, (1024, 1, 32)), cos, sin)[:, 0]  # [T, d]
scores = np.asarray(jnp.einsum("td,sd->ts", at(one_q), at(one_k)))
spread = max(np.ptp(np.diagonal(scores, -distance)[:200]) for distance in (0, 1, 7, 63))
nb.check("score at 200 places, same distance: largest spread", spread, lt=1e-3)
nb.check("score at different distances: spread", np.ptp(scores[:, 0]), gt=2)

# %%
if theta == 1e4:  # the moving picture is of the default
    shown = nb02.film(at(one_q), at(one_k), "pictures/02_rope.gif")  # scores, [2, 17]
    nb.check("moving picture: key 4 behind, spread of scores", np.ptp(shown[0]), lt=1e-3)
    live = np.array([np.diagonal(scores, -4)[:17], scores[4:21, 0]])
    nb.check("moving picture, max|Δ| to the scores above", abs(shown - live).max(), lt=1e-2)

# %% [markdown]
# The cell above also makes a moving picture of these scores:
#
# ![The hands of three pairs turn, and below them the score](pictures/02_rope.gif)
#
# First the key follows four tokens behind: the hands turn, the grey angles between them
# stay, and so does the score. Then the key stays at 0: the angles change, and so does the
# score.

# %% [markdown]
# The angles need exact positions, and bfloat16 has 8 significant bits.
#
# **Predict.** Positions 0 to 1,023 are cast to bfloat16. How many *different* positions
# remain: 1024, 513 or 257?

# %%
my_positions = None  # 1024, 513 or 257

# %%
rounded = positions.astype(jnp.bfloat16).astype(jnp.int32)
left = len(np.unique(rounded))
kept = len(np.unique(np.asarray(jnp.concatenate([cos, sin], axis=1)), axis=0))

# %%
many = "that needs ten bits, and bfloat16 has eight."
few = "256 is where it starts: up to 512 every second number exists, then each fourth."
nb.guess(
    "Different positions of 1,024 in bf16", my_positions, left, why={1024: many, 257: few}
)
nb.check("different positions left in bfloat16", left, eq=513)
nb.check("different angles in the package, which uses float32", kept, eq=1024)

# %% [markdown]
# About half of the places are gone, and neighbours share those that are left. It has
# shipped: Llama in transformers once computed positions and angles in the model's dtype
# (transformers #25681). Up to 256 all positions are exact, so a short prompt does not show
# that any are lost.
#
# **Two layouts.** Mistral's own files pair *neighbours*, features `(2i, 2i + 1)`. Hugging
# Face's pair *halves*, `(i, i + 16)`. Neither is wrong: a score is a sum over features, so
# any order will do if queries, keys and the program agree on it.


# %%
def turn_halves(x, cos, sin):  # [T, H, d], pairs (i, i + d / 2)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate(
        [first * cos - second * sin, first * sin + second * cos], axis=-1
    )


# %%
evens_first = np.r_[0:32:2, 1:32:2]  # 0, 2, 4, ..., 1, 3, 5, ...
queries, keys = jax.random.normal(key, (2, 64, 1, 32))

# %% [markdown]
# Three scores of the same queries and keys: by the package; with the wrong layout; and with
# the wrong layout, but the features of both put in its order.

# %%
together = (cos[:64], sin[:64])
score = lambda turn, q, k: jnp.einsum("thd,shd->ts", turn(q, *together), turn(k, *together))
right = score(mx.rope.rotate, queries, keys)
mixed_up = jnp.abs(score(turn_halves, queries, keys) - right)
reordered = score(turn_halves, queries[..., evens_first], keys[..., evens_first])

# %%
nb.check("halves for neighbours, max|Δ| score at position 0", mixed_up[0, 0], lt=1e-4)
nb.check("the same within 64 positions", mixed_up.max(), gt=1)
nb.check("halves, features reordered, max|Δ|", jnp.abs(reordered - right).max(), lt=1e-3)

# %% [markdown]
# A wrong layout is exactly right at position 0, where nothing is turned. A test with one
# token passes it.
#
# Now take RoPE away: every angle 0, the cosine 1, the sine 0. Shuffle the words (here, the
# tokens) of a text of 64, all but the first and the last. The mask is causal, as always.
#
# **Predict.** Without RoPE, the last token's row is compared after each of the 6 blocks,
# for the text in order and for the text shuffled. After how many of the 6 does it differ:
# 0, 5 or 6?

# %%
my_blocks = None  # 0, 5 or 6


# %%
def read(tokens, turned):  # the stream after each block, [L, T, D]
    places, x, rows = package.places(tokens, None), package.tok_embeddings(tokens), []
    if not turned:
        still = jnp.ones_like(places.cos), jnp.zeros_like(places.sin)
        places = eqx.tree_at(lambda p: (p.cos, p.sin), places, still)
    for block in package.layers:
        x, _ = block(x, places, None)
        rows.append(x)
    return jnp.stack(rows)


# %% [markdown]
# `permutation` shuffles the words 1 to 62. What changes is measured against the rms of the
# row.

# %%
words = jax.random.permutation(key, jnp.arange(1, 63))
shuffled = tokens[jnp.concatenate([jnp.array([0]), words, jnp.array([63])])]


def change(turned):  # [L]
    plain, other = read(tokens[:64], turned)[:, -1], read(shuffled, turned)[:, -1]
    return np.asarray(jnp.abs(plain - other).max(1) / jnp.sqrt((plain**2).mean(1)))


with_rope, without = change(True), change(False)

# %%
blind = "that holds without a mask; the causal mask tells order from block 2 on."
all_of_them = "in block 1 the last query sees the same set of keys, in another order."
noticed = int((without > 1e-3).sum())
nb.guess(
    "Blocks after which it differs", my_blocks, noticed, why={0: blind, 6: all_of_them}
)

# %% [markdown]
# Block by block:

# %%
nb02.shuffled(with_rope, without)
nb.caption(
    "with RoPE the last token's row changes from the first block on. Without RoPE, block 1 "
    "is blind to order: what is left is rounding. Blocks 2 to 6 are not blind."
)

# %% [markdown]
# What does block 2 read that block 1 could not? The rows of the words in between. Take each
# of them after block 1, in the text in order and in the shuffled one. It is the same word,
# and there is no RoPE; but the causal mask shows it other words than before.

# %%
plain, other = read(tokens[:64], False)[0], read(shuffled, False)[0]  # [T, D]
between = jnp.abs(other[1:63] - plain[words]).max() / rms(plain)
nb.check("the words between, after block 1: the largest change", between, gt=0.2)
nb.check("change after block 1, without RoPE", without[0], lt=1e-4)
nb.check("least change after blocks 2 to 6, without RoPE", without[1:].min(), gt=0.05)
nb.check("least change, with RoPE", with_rope.min(), gt=0.2)
nb.say(
    f"**Takeaway.** RoPE makes a score depend on distance alone, to {spread:.0e}. Without "
    f"RoPE, block 1 is blind to order. The other {noticed} of 6 are not, because the "
    "causal mask shows each word only the words before it."
)

# %% [markdown]
# ## SwiGLU: a gate for every feature
#
# The **feed-forward network** works on each token's row by itself. It widens the row from
# `D` = 256 to `F` = 704 numbers, twice: `w1(x)` makes *gates*, `w3(x)` makes *contents*.
# The gates go through `silu(z) = z · sigmoid(z)`, which lets large `z` through and flattens
# negative `z` to about zero. Gates and contents are multiplied, feature by feature, and
# `w2` takes them back to 256. Three lines, on a 4 × 4 table, with identity matrices for
# weights:


# %%
def swish_gated(x, w1, w2, w3):
    gates = jax.nn.silu(x @ w1.T)
    contents = x @ w3.T
    return (gates * contents) @ w2.T


print(swish_gated(jnp.diag(jnp.array([-4.0, -1, 1, 4])), *[jnp.eye(4)] * 3).round(3))

# %%
nb.show_source(mx.layers.FeedForward.__call__)

# %% [markdown]
# These are our three lines. Now the network of one block, and what it really reads.

# %%
layer = nb.knob(2, of=(1, 2, 3, 4, 5))  # counted from 0: the third block
places = package.places(tokens, None)
y, _ = package.layers[layer].attend(package.hidden_states(tokens)[0][layer], places, None)
x = package.layers[layer].ffn_norm(y)  # [T, D], what the network really gets
network = package.layers[layer].feed_forward

# %% [markdown]
# Our three lines against the package's one. And a poke: change token 5, and see whether
# any other token's row changes.

# %%
w1, w2, w3 = (linear.weight for linear in (network.w1, network.w2, network.w3))
gap = jnp.abs(swish_gated(x, w1, w2, w3) - network(x)).max()
nb.check("max|Δ| SwiGLU, three lines and package", gap, lt=2e-3)

# %%
others = jnp.abs(network(x.at[5].add(1)) - network(x)).max(1).at[5].set(0)
nb.check("change of the other tokens if one changes", others.max(), lt=1e-4)
swapped = jnp.abs(swish_gated(x, w3, w2, w1) - network(x)).max()
nb.check("max|Δ| if w1 and w3 change places", swapped, gt=1)

# %% [markdown]
# (Other code calls `w1` *gate* and `w3` *up*. They have one shape, so a swap loads without
# an error.)
#
# **Predict.** You double the input. By about how much does the *output* grow: 1.5, 2 or 4
# times?

# %%
my_growth = None  # 1.5, 2 or 4

# %%
scales = np.geomspace(1e-3, 1e3, 25)
outputs = np.array([rms(network(scale * x)) for scale in scales])
doubled = float(rms(network(2 * x)) / rms(network(x)))

# %%
linear = "so it is for ReLUs; here two things that both double are multiplied."
saturated = "silu does not saturate: for large inputs it is the input itself."
nb.guess("Growth of the output", my_growth, round(doubled), why={2: linear, 1.5: saturated})

# %% [markdown]
# The same for inputs a thousand times smaller and larger:

# %%
nb02.powers(scales, outputs)
nb.caption(
    "at both ends the output grows with the *square* of the input: slope two, where a "
    "proportional network would have slope one."
)

# %%
slope = np.diff(np.log(outputs)) / np.diff(np.log(scales))
nb.check("slope at the far left", slope[0], near=2.0, rtol=0.05)
nb.check("slope at the far right", slope[-1], near=2.0, rtol=0.05)
nb.check("output with the input doubled (times)", doubled, gt=3)

# %% [markdown]
# A gate times a content: if both double, the product is four times as large. For small
# `z`, `silu(z)` is about `z / 2`, so there it is a square too. That makes the norm in
# front of it necessary. What if the parts read a stream of any size? A norm that only
# multiplies by its weights is four lines: an `eqx.Module` is a class whose declared
# fields hold the weights.


# %%
class WeightOnly(eqx.Module):
    norm: mx.layers.RMSNorm

    def __call__(self, x):
        return x * self.norm.weight[None]


# %%
norms = lambda m: [n for b in m.layers for n in (b.attention_norm, b.ffn_norm)]
bare = eqx.tree_at(norms, package, [WeightOnly(n) for n in norms(package)])
sound_sizes, bare_sizes = (
    [float(rms(x)) for x in model.hidden_states(tokens)[0]] for model in (package, bare)
)

# %%
nb.table(
    ["rms after block", *"0123456"],
    [["with norms", *sound_sizes], ["without", *(f"{x:.2g}" for x in bare_sizes)]],
)

# %% [markdown]
# Without norms the stream explodes within four blocks:

# %%
nb.check("stream after block 4 without norms", bare_sizes[4], gt=1e9)
squared = np.log(bare_sizes[4]) / np.log(bare_sizes[3])
nb.check("its logarithm, over that after block 3", squared, gt=2)
nb.check("last state without norms is finite", bool(np.isfinite(bare_sizes[-1])), eq=False)
nb.check("largest state with norms", max(sound_sizes), lt=100)

# %% [markdown]
# Block 4 more than squares the size that it gets (the logarithm more than doubles), and
# soon float32, which ends at 3e38, overflows.
#
# And the gates themselves: are they open or shut?

# %%
inputs = np.asarray(network.w1(x)).ravel()
shut = float((inputs < 0).mean())
nb02.gates(inputs, lambda z: np.asarray(jax.nn.silu(z)))
nb.caption(
    "the grey bars are what enters the gates of one block; the line is what leaves them. "
    "Most of the inputs are negative, where the line stays within 0.3 of zero. These gates "
    "are nearly shut, and every token shuts more than half of its gates."
)
nb.check("share of gates with a negative input", shut, gt=0.6)
most_shut = (inputs.reshape(x.shape[0], -1) < 0).mean(1).min()
nb.check("share of its gates that a token shuts, least", most_shut, gt=0.5)
nb.check(
    "silu of a negative input, at least", jax.nn.silu(-np.arange(800) / 50).min(), gt=-0.3
)

# %% [markdown]
# How many of the 704 products matter? Sort the squares of each token's products, and count
# how many of the largest make up 90% of their sum.

# %%
energy = np.sort(np.asarray(jax.nn.silu(network.w1(x)) * network.w3(x)) ** 2)[:, ::-1]
needed = (np.cumsum(energy, 1) < 0.9 * energy.sum(1, keepdims=True)).sum(1).mean()
nb.check("features that carry 90% of a token's squares, of 704", needed, lt=250)
nb.say(
    f"**Takeaway.** The network is a product, so twice the input is {doubled:.1f} times "
    f"the output. {100 * shut:.0f}% of the gates are nearly shut. About {needed:.0f} of a "
    "token's 704 products carry 90% of their sum of squares."
)

# %% [markdown]
# ## What breaks without it
#
# How much does the *trained* model depend on each part? We take one thing at a time out of
# all six blocks, and measure the loss on 8 texts of 128 tokens.


# %%
def everywhere(where, change, model=package):
    parts = lambda m: [where(block) for block in m.layers]
    return eqx.tree_at(parts, model, [change(part) for part in parts(model)])


def other_halves(weight):  # rows as in Hugging Face's files
    return weight.reshape(-1, 16, 2, 256).swapaxes(1, 2).reshape(weight.shape)


zero, kv_swapped = jnp.zeros_like, lambda w: jnp.roll(w, 32, axis=0)
w1_w3 = lambda f: eqx.tree_at(lambda f: (f.w1, f.w3), f, (f.w3, f.w1))
both = lambda a, b, change: everywhere(b, change, everywhere(a, change))

# %% [markdown]
# Two ways to lose the gate. *Open*: every gate is 1. *Fixed*: each gate stays at its own
# average over these very texts, and no longer depends on the token.


# %%
class Gated(eqx.Module):
    network: mx.layers.FeedForward
    gates: jax.Array  # [F]

    def __call__(self, x):
        return self.network.w2(self.gates[None] * self.network.w3(x))


def with_gates(average):
    x, fixed = jax.vmap(package.tok_embeddings)(text), []  # [B, T, D]
    for block in package.layers:
        places = package.places(tokens, None)
        y, _ = jax.vmap(block.attend, (0, None, None))(x, places, None)
        gates = jax.nn.silu(block.feed_forward.w1(jax.vmap(block.ffn_norm)(y)))
        gates = gates.mean((0, 1)) if average else jnp.ones(config.hidden_dim)
        fixed.append(Gated(block.feed_forward, gates))
        x = jax.vmap(block.feed)(y)
    return eqx.tree_at(lambda m: [b.feed_forward for b in m.layers], package, fixed)


# %% [markdown]
# `jax.vmap(block.attend, (0, None, None))` maps along the first axis of the first argument
# and hands the other two to every row as they are. Now the list:

# %%
wq, wk = lambda b: b.attention.wq.weight, lambda b: b.attention.wk.weight
wv, wo = lambda b: b.attention.wv.weight, lambda b: b.attention.wo.weight
feed_forward = lambda b: b.feed_forward
norms = lambda m: [n for b in m.layers for n in (b.attention_norm, b.ffn_norm)]
ones = [eqx.tree_at(lambda n: n.weight, n, jnp.ones(256)) for n in norms(package)]
models = {
    "the sound model": package,
    "norms without weights": eqx.tree_at(norms, package, ones),
    "RoPE in halves": both(wq, wk, other_halves),
    "w1 and w3 swapped": everywhere(feed_forward, w1_w3),
    "gates fixed": with_gates(average=True),
    "no feed-forward": everywhere(lambda b: b.feed_forward.w2.weight, zero),
    "no attention": everywhere(wo, zero),
    "kv heads swapped": both(wk, wv, kv_swapped),
    "gates open": with_gates(average=False),
}

# %% [markdown]
# And RoPE turned off, which is no change of weights.
#
# **Predict.** Of these, which raises the loss *most*: no RoPE, no attention, no
# feed-forward network, or gates open? And gates *fixed*: is it nearer to the sound model,
# or nearer to having no feed-forward network at all?

# %%
my_worst = None  # "no RoPE", "no attention", "no feed-forward" or "gates open"
my_nearer = None  # "sound" or "nothing"


# %%
@eqx.filter_jit
def loss(model, turned):
    def of_one(tokens):
        places, x = model.places(tokens, None), model.tok_embeddings(tokens)
        angles = (places.cos * turned + 1 - turned, places.sin * turned)
        places = eqx.tree_at(lambda p: (p.cos, p.sin), places, angles)
        for block in model.layers:
            x, _ = block(x, places, None)
        return nats(model.logits(x), tokens)

    return jax.vmap(of_one)(text).mean()


# %% [markdown]
# `jax.jit` takes arrays, and trees of arrays such as our models. **`eqx.filter_jit`** also
# takes trees that hold other things, such as functions, which become a part of the program.
# All copies of the same shapes share one program; modules of another class get a new one.

# %%
losses = {name: float(loss(model, jnp.float32(1))) for name, model in models.items()}
losses["no RoPE"] = float(loss(package, jnp.float32(0)))
losses = dict(sorted(losses.items(), key=lambda item: item[1]))
four = ("no RoPE", "no attention", "no feed-forward", "gates open")
nearer = (
    losses["gates fixed"] - losses["the sound model"],
    losses["no feed-forward"] - losses["gates fixed"],
)

# %% [markdown]
# The answers:

# %%
seen = "the model still has its mask, and the words themselves."
gone = "a part that adds nothing does less harm here than one that adds nonsense."
why = {"no RoPE": seen, "no attention": gone, "no feed-forward": gone}
nb.guess("The worst of the four", my_worst, max(four, key=losses.get), why=why)
why = {"sound": "the averages are right, but they are the same for every token."}
nb.guess("Gates fixed", my_nearer, "sound" if nearer[0] < nearer[1] else "nothing", why=why)

# %%
losses["norms off"] = float(loss(bare, jnp.float32(1)))
nb02.bars(losses, knows_nothing)
nb.caption(
    "the dashed line is a model that knows nothing. RoPE off, or in the wrong layout, "
    "leaves a model that still knows something. Removing all attention or all feed-forward "
    "networks leaves about nothing, and so does fixing the gates at their averages. "
    "Swapping the two kv heads is about as bad as no attention. A network with its gates "
    "open is worse than none. Without norms there is no number."
)

# %% [markdown]
# So a part that writes wrong numbers can do more harm than a part that writes nothing. Not
# every wrong part does: with `w1` and `w3` swapped, the model still does better than
# without the network. The claims, as checks:

# %%
nb.check("loss without norms is finite", bool(np.isfinite(losses["norms off"])), eq=False)
rise = lambda name, over="the sound model": losses[name] - losses[over]
nb.check("loss of the sound model (nats)", losses["the sound model"], lt=5)
nb.check("norm weights at 1: rises by", rise("norms without weights"), lt=1)
for name in ("no RoPE", "RoPE in halves"):
    nb.check(f"{name}: loss", losses[name], lt=knows_nothing - 0.5)
    nb.check(f"{name}: rises by", rise(name), gt=0.3)

# %%
for name in ("no attention", "no feed-forward"):
    nb.check(f"{name}: from knowing nothing", abs(losses[name] - knows_nothing), lt=1.5)
nb.check("gates open over none", rise("gates open", "no feed-forward"), gt=0.8)
swapped_over_none = rise("kv heads swapped", "no attention")
nb.check("kv heads swapped and no attention, apart", abs(swapped_over_none), lt=1)
nb.check("gates fixed and no feed-forward, apart", abs(nearer[1]), lt=0.5)
nb.check("w1 and w3 swapped: rises by", rise("w1 and w3 swapped"), gt=0.6)
nb.check("none over swapped", rise("no feed-forward", "w1 and w3 swapped"), gt=0.1)

# %% [markdown]
# In short:

# %%
nb.say(
    "**Takeaway.** Without feed-forward networks the loss rises by "
    f"{rise('no feed-forward'):.1f} nats. Gates that ignore the token win back only "
    f"{nearer[1]:.1f} of them, so nearly all of the gain depends on gates that see the "
    f"token. Without RoPE the loss rises by {rise('no RoPE'):.1f}."
)

# %% [markdown]
# ## Two ports and torch
#
# The same rows of the stream go through the parts of block 3, in both ports and in torch.
# 64 tokens are within the window ([03](03_sliding_window_attention.ipynb)), so all masks
# agree. Torch's answers are kept for eight of the rows.

# %%
T, EIGHT = 64, np.array([0, 1, 2, 7, 31, 40, 62, 63])
x = np.asarray(package.hidden_states(tokens[:T])[0][2])  # [T, D]
positions = jnp.arange(T, dtype=jnp.int32)


def parts_package(block):
    places, normed = mx.rope.Places(config, positions), block.attention_norm(jnp.asarray(x))
    queries = block.attention.wq(normed).reshape(T, 8, 32)
    return {
        "RMSNorm": normed,
        "RoPE, queries": mx.rope.rotate(queries, places.cos, places.sin).reshape(T, 256),
        "attention": block.attention(normed, places, None)[0],
        "SwiGLU": block.feed_forward(normed),
        "the block": block(jnp.asarray(x), places, None)[0],
    }


# %%
def parts_one_file(block):
    freqs = one_file_ref.precompute_freqs_cis(32, positions, config.rope_theta)
    normed = block.attention_norm(jnp.asarray(x)[None])  # [1, T, D]
    queries = block.attention.wq(normed).reshape(1, T, 8, 32)
    mask, cache = jnp.log(jnp.tri(T)), one_file.empty_cache(1, T)[2]
    return {
        "RMSNorm": normed[0],
        "RoPE, queries": one_file_ref.apply_rotary_emb(queries, queries, freqs)[0].reshape(
            T, 256
        ),
        "attention": block.attention(normed, freqs, positions, mask, cache)[0][0],
        "SwiGLU": block.feed_forward(normed)[0],
        "the block": block(jnp.asarray(x)[None], freqs, positions, mask, cache)[0][0],
    }


# %% [markdown]
# And in torch:


# %%
def parts_torch(twin):
    import torch

    import torch_mistral

    block, rows, places = twin.layers[2], torch.tensor(x)[None], torch.arange(T)
    speeds = config.rope_theta ** -(torch.arange(0, 32, 2) / 32)
    angles = torch.outer(places.float(), speeds)
    angles = torch.polar(torch.ones_like(angles), angles)
    normed = block.attention_norm(rows)
    queries = block.attention.wq(normed).view(1, T, 8, 32)
    turned = torch_mistral.rotate(queries, angles).reshape(1, T, 256)
    attended = block.attention(normed, places, angles)
    fed = block.feed_forward(normed)
    parts = normed, turned, attended, fed, block(rows, places, angles)
    return torch.cat(parts)[:, EIGHT]


# %%
ours, theirs = parts_package(package.layers[2]), parts_one_file(one_file.layers[2])
torchs = dict(zip(ours, oracle("parts", parts_torch)))

# %%
rows = []
for name, value in ours.items():
    gap = lambda other, value=value: float(jnp.abs(other - value).max() / rms(value))
    rows.append([name, float(rms(value)), gap(theirs[name])])
    rows[-1].append(float(np.abs(torchs[name] - value[EIGHT]).max() / rms(value)))
nb.table(
    ["package against", "rms", "one file, max abs Δ / rms", "torch, max abs Δ / rms"], rows
)

# %% [markdown]
# Rounding, in every part:

# %%
for name, _, one_file_gap, torch_gap in rows:
    nb.check(f"{name}: package and one file", one_file_gap, lt=1e-4)
    nb.check(f"{name}: package and torch", torch_gap, lt=1e-4)

# %% [markdown]
# The difference in code: the one-file port turns complex numbers and copies each key four
# times with `repeat_kv`, as the reference does; the package turns pairs of real numbers and
# makes the queries of a group rows of one matrix.
#
# **Takeaway.** Three programs, five parts, one answer.
#
# ## Exercises
#
# **Exercise 1: grouped scores without copies** (●● 10 minutes). From queries `[T, H, d]`
# and keys `[S, K, d]`, make the scores `[H, T, S]`: bare products, no scaling, no mask. The
# checker also looks for copies of keys, so use `jnp`.
#
# <details><summary>Hint</summary>
#
# Cut the axis `H` of the queries into two, and give `einsum` a letter for each. Which of
# the two comes first?
#
# </details>
#
# {{solution:grouped}}


# %%
def grouped(queries, keys):
    return NotImplemented


ex02.check_grouped(grouped)

# %% [markdown]
# **Exercise 2: repair the loader** (●● 10 minutes). `weight` is `wq` or `wk` from a Hugging
# Face file, `[heads · head width, D]`, its rows in halves. The loader should bring them
# into Mistral's order. Its author tested it on heads of width 4, where it is right. Find
# out why it is wrong for all others:
#
# ```python
# def from_halves(weight, heads):
#     rows, dim = weight.shape
#     pairs = weight.reshape(heads, rows // heads // 2, 2, dim)
#     return pairs.swapaxes(1, 2).reshape(rows, dim)
# ```
#
# <details><summary>Hint</summary>
#
# Number the 8 rows of one head. Which order do you have, which one do you want? A
# permutation of 4 rows may undo itself.
#
# </details>
#
# {{solution:from_halves}}


# %%
def from_halves(weight, heads):
    return NotImplemented


ex02.check_from_halves(from_halves)

# %% [markdown]
# **Exercise 3: the slow hands** (●● 5 minutes). Mistral's heads are 128 wide, so they have
# 64 pairs. Later versions raised `theta` from 1e4 to 1e6 and read 32,768 tokens. How many
# of the 64 pairs do not get once around in 32,768 tokens, with `theta` 1e6?
#
# <details><summary>Hint</summary>
#
# The second value that `mx.rope.rotation` returns at position 1 is the sine of the speed.
# For a slow pair that is the speed itself. (Its cosine rounds to 1.) Or solve for the pair
# by hand, with a logarithm. Once around is 2π.
#
# </details>
#
# {{solution:slow_pairs}}

# %%
slow_pairs = NotImplemented
ex02.check_slow_pairs(slow_pairs)

# %% [markdown]
# ## Recap

# %%
base = losses["the sound model"]
cost = {name: f"{loss - base:+.1f} nats" for name, loss in losses.items()}
lost = f"{cost['no attention']}; in the wrong order {cost['kv heads swapped']}"
shut_off = f"{cost['no feed-forward']}; gates open {cost['gates open']}"
overflow = f"overflow: rms {bare_sizes[1]:.2g} after block 1, {bare_sizes[4]:.0e} after 4"
rows = [
    ["residual stream", "the sum of 13 arrays", f"embeddings alone: {lens[0]:.1f} nats"],
    ["RMSNorm", "every reader gets numbers of about one", overflow],
    ["RoPE", "a score knows the distance", cost["no RoPE"]],
    ["heads, GQA", "8 attentions, 2 sets of keys", lost],
    ["SwiGLU", "a gate for each of 704 features", shut_off],
]

# %%
nb.table(["part", "what it does", "without it"], rows)

# %%
nb.recap()

# %% [markdown]
# And the question of the beginning:

# %%
nb.say(
    "**The answer.** Norms give every reader numbers of one size. RoPE makes scores depend "
    "on distance. Heads fetch from other tokens, and gates choose features of the token's "
    "own row. All results are added to one stream. Without norms the "
    f"stream overflows. The loss rises from {base:.2f} nats to {losses['no RoPE']:.2f} "
    f"without RoPE, to {losses['no attention']:.2f} without attention, and to "
    f"{losses['no feed-forward']:.2f} without feed-forward networks."
)

# %% [markdown]
# **What we did not show**: models trained without a part, which may learn to live without
# it (a causal model can do without any position: Haviv et al., arXiv 2203.16634); why two
# kv heads are enough; YaRN.
#
# **Further reading**: Zhang & Sennrich, arXiv 1910.07467, §4 (RMSNorm); Su et al., arXiv
# 2104.09864, §3.2 (RoPE); Ainslie et al., arXiv 2305.13245, §2 (GQA); Shazeer, arXiv
# 2002.05202, §2 (SwiGLU); Elhage et al., *A Mathematical Framework for Transformer
# Circuits*, 2021 (the residual stream, and heads that add); Jiang et al., arXiv
# 2310.06825, §2 (Mistral 7B).
#
# **Next**: [03 Sliding window attention](03_sliding_window_attention.ipynb), on how far
# back a head may look.
