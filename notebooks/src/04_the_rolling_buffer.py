# ---
# jupyter:
#   budget: 125
#   cover: 0
# ---

# %% [markdown]
# # The rolling buffer, and filling it in chunks
#
# **How can 64 slots serve a text of any length, and why may a long prompt be read in
# pieces?**
#
# - **You will be able to** say which token sits in which slot; explain why the order of
#   the slots does not matter; draw the mask of a chunk; compute a cache's bytes; and
#   *prove* a cache, by what breaks when it is wrong.
# - **Before this**: [03](03_sliding_window_attention.ipynb).
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/cache.py`, `mistral_eqx/generation.py`, and in
#   `Attention.forward` of `one_file_ref.py`.
# - **Model and data**: the embedded model, whose window `W` is 64 tokens, and Shakespeare
#   that it has never seen.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: what sits in slot 20 after 150 tokens? Which broken cache is right
#   for the longest? How many slots does a ring need for chunks of 96?
#
# The letters: `T` tokens, `W` window, `L` layers, `K` key and value heads, `H` query
# heads, `V` vocabulary; see [README.md](README.md). A comment such as `# [T, V]` gives the
# axes of an array.

# %%
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
import nb04
import nbtools as nb
import one_file_ref
from exercises import ex04


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("04")
package, tokenizer = mx.load(dtype=jnp.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
config, W = package.config, package.config.sliding_window
tokens = nb.held_out(256)  # 256 token ids

# %% [markdown]
# Two functions are used throughout. `uncached` reads a whole text at once and remembers
# nothing: it is the truth that every cache is held to. `step` reads one token and a cache,
# and gives back logits (a score for each of the `V` words that may come next) and the
# cache with that token in it.
#
# **`eqx.filter_jit`** compiles a function, as `jax.jit` does, and it also takes models as
# arguments: the arrays in a model become inputs of the program, and whatever else it holds
# (such as its window) becomes part of the program. (**`jnp`** is NumPy's interface for
# arrays of JAX, and `jnp.int32(0)` is an array of one whole number.)

# %%
uncached = eqx.filter_jit(lambda model, tokens: model(tokens)[0])  # [T, V]
step = eqx.filter_jit(lambda model, token, cache: model(token[None], cache))

# %% [markdown]
# `walk` reads the whole text with `step`, and gives back all logits. (`change` is for
# later: it meddles with the cache after each token. By default it does nothing.)


# %%
def walk(model, cache, change=lambda cache, position: cache):
    logits = []
    for position, token in enumerate(jnp.asarray(tokens)):
        row, cache = step(model, token, cache)
        cache = change(cache, position)
        logits.append(row)
    return np.concatenate(logits)  # [T, V]


# %% [markdown]
# ## 64 drawers, 256 letters
#
# To write a token, attention compares its **query** with the **keys** of the tokens before
# it, and mixes their **values**. Keys and values do not change once they are computed, so
# one keeps them instead of computing them again at every token. That store is the
# **cache**.
#
# With a window only the last `W` tokens are ever looked at. So `W` places, the **slots**,
# are enough, if each new token takes the place of the one that has just left the window.
# The rule is short: a token goes to the slot that is its number modulo the number of
# slots. Here is a cache of 4 slots, with 4 numbers for each token, after 6 tokens. The
# numbers are simply the token's own.

# %%
buffer = np.full((4, 4), -1)  # a row for each slot
for token in range(6):
    buffer[token % 4] = token
print(buffer)

# %% [markdown]
# Tokens 4 and 5 have taken the places of 0 and 1. That is the whole idea. This is the
# package's code:

# %%
nb.show_source(mx.cache.LayerCache.write, mx.cache.LayerCache.indices)

# %% [markdown]
# `LayerCache` is an **Equinox module**: a class whose fields are arrays (`keys` and
# `values`, and there is nothing else in it). It cannot be changed, so `write` returns a new
# one. The reason is JAX: its arrays cannot be changed either. What NumPy writes as
# `a[3:5] = b`, JAX does with a function that gives back another array.
# **`dynamic_update_slice_in_dim`** is that function for a block whose start is known only
# when the program runs:

# %%
row = jnp.zeros(6, jnp.int32)
block = jnp.array([7, 8])
print(jax.lax.dynamic_update_slice_in_dim(row, block, 3, axis=0))

# %% [markdown]
# `indices` answers the question the other way around. Which token does each slot hold,
# once `length` have been written? The answer follows from `length` alone, so no list of
# positions is kept, and nothing is ever shifted. Does the package do what our three lines
# did?

# %%
ours = nb04.empty_ring(4, width=4)
for token in range(6):
    keys = jnp.full((1, 1, 4), token)  # one token, one head, four numbers
    ours = ours.write(keys, keys, jnp.int32(token))
same_rows = int((np.asarray(ours.keys[0]) == buffer).all(axis=1).sum())

# %%
nb.check("slots with the keys of the naive buffer", same_rows, eq=4)
naive, named = buffer[:, 0].tolist(), ours.indices(jnp.int32(6)).tolist()
nb.check("tokens that `indices` names, as in the naive buffer", named, eq=naive)

# %% [markdown]
# **Predict.** 150 tokens, counted from 0, have been written to 64 slots. Which of them sits
# in slot 20: token 20, 84 or 148?

# %%
my_token = None  # 20, 84 or 148

# %%
held = int(nb04.empty_ring(64).indices(jnp.int32(150))[20])
why = {
    20: "it was there first, but tokens 84 and 148 have come to the same slot since.",
    84: "it is the second to map there. The third, 84 + 64, is among the 150 as well.",
}
nb.guess("The token in slot 20", my_token, held, why=why)
nb.check("token in slot 20 of 64 after 150", held, eq=148)

# %% [markdown]
# The tokens 20, 84, 148, 212, ... all map to slot 20, and the last one below 150 is there.
# Now we write three times as many tokens as there are slots, and ask after each token what
# every slot holds. The number of slots is a knob: change it, and run the section again.

# %%
slots = nb.knob(8, of=(4, 8, 16))
steps = 3 * slots
ring = nb04.empty_ring(slots)
held = np.stack([ring.indices(jnp.int32(n)) for n in range(1, steps + 1)])
nb04.plot_slots(held)
nb.caption(
    "a diagonal that wraps around. Each token is written once and stays, as a bar of one "
    "shade, for exactly as many steps as there are slots. Then the token that comes to the "
    "same slot takes its place. Dots are slots that were never written."
)

# %%
stays = [int((held == token).sum()) for token in range(steps - slots + 1)]
nb.check("steps that a token stays, in all", sorted(set(stays)), eq=[slots])
there = sum(int(held[token, token % slots] == token) for token in range(steps))
nb.check("tokens that stand in their slot when written", there, eq=steps)
never = int((held < 0).sum())
nb.check("dots: a token less for each token written", never, eq=sum(range(slots)))

# %% [markdown]
# The same as a moving picture, which the next cell makes from these very numbers:
#
# ![Tokens go around a ring of eight slots, and each takes the place of the one that came
# eight before it](pictures/04_ring.gif)
#
# The circle with the thick edge is being written. Below is the text. The ring holds the
# eight tokens that are filled, and these are the eight that the window can see.

# %%
if slots == 8:  # the moving picture is of the default
    shown = nb04.film(held, "pictures/04_ring.gif")
    nb.check("the moving picture shows these slots", shown == str(held.tolist()), eq=True)
last = [np.sort(row).tolist() for row in held[slots - 1 :]]
window = [list(range(n - slots + 1, n + 1)) for n in range(slots - 1, steps)]
nb.check("what the full ring holds is the window, always", last == window, eq=True)

# %%
nb.say(
    f"**Takeaway.** Slot = token number modulo slots. In a ring of {slots} slots a token "
    f"stays for {stays[0]} steps, just as long as a window of {slots} can see it."
)

# %% [markdown]
# ## The order in the drawers does not matter
#
# After token 8 the eight slots hold 8, 1, 2, 3 and so on: they are out of order. Must they
# not be sorted before attention? No, because attention is a sum over slots, and a sum has
# no order. Here is attention in two lines, over 4 slots of 4 numbers that serve as keys and
# as values, and then over the same slots shuffled.

# %%
numbers = np.random.default_rng(0).normal(size=(4, 4)).round(1)
weights = lambda slots: np.exp(slots @ numbers[0]) / np.exp(slots @ numbers[0]).sum()
look = lambda slots: weights(slots) @ slots
print(numbers, look(numbers), look(numbers[[2, 0, 3, 1]]), sep="\n\n")

# %% [markdown]
# The last two rows are the same. But attention must know *where* a token stands in the
# text. That is in the key itself: **RoPE** turns each key by an angle that depends on its
# position, before it is stored. (Notebook [02](02_inside_one_block.ipynb) shows how.)
#
# Now the real model. We read 150 tokens with `chunk=1`, one at a time, so the ring has
# exactly `W` slots and has been filled more than twice. The cache of a batch has an axis
# for its rows in front. **`jax.tree.map`** takes it away. It calls a function with every
# array in a tree (a **pytree**: modules, tuples and dicts, nested as you like, with arrays
# in them) and gives back a tree of the results:

# %%
tree = {"keys": jnp.zeros((1, 3)), "more": (jnp.ones((1, 2)),)}
print(jax.tree.map(lambda x: x[0], tree))

# %%
cache, _ = mx.prefill(package, [tokens[:150]], chunk=1)
layer = jax.tree.map(lambda x: x[0], cache.layers[3])
filled = mx.attention.visible(jnp.int32([149]), layer.indices(cache.length), W)  # [1, W]
nb.check("slots of the ring", layer.slots, eq=W)

# %% [markdown]
# `visible` is the mask: which slots may the query at position 149 see? The query itself is
# random, and so is the shuffle. JAX has no hidden state for random numbers: every draw
# takes a **key**, and `jax.random.key(0)` is the first one. The same key gives the same
# numbers, always:

# %%
print(jax.random.permutation(key, 8), jax.random.permutation(key, 8))

# %%
queries = jax.random.normal(key, (1, config.n_heads, config.head_dim))
shuffle = jax.random.permutation(key, layer.slots)
in_order = mx.attention.attend(queries, layer.keys, layer.values, filled)
shuffled = mx.attention.attend(
    queries, layer.keys[:, shuffle], layer.values[:, shuffle], filled[:, shuffle]
)

# %%
moved = int((np.asarray(shuffle) != np.arange(W)).sum())
nb.check("slots that the shuffle moves", moved, gt=W // 2)
gap = float(jnp.abs(in_order - shuffled).max())
nb.check("max|Δ| of attention, slots shuffled", gap, lt=1e-5)
nb.say(
    f"**Takeaway.** Shuffling {moved} of {W} slots changes attention by {gap:.0e}, which "
    "is rounding. Positions are in the keys, not in the slots."
)

# %% [markdown]
# ## Two ports and torch
#
# A cache is right if nobody can tell that it is there. The truth is the model without a
# cache, reading 256 tokens at once. Against it stand three programs that read the same text
# one token at a time through 64 slots, which are filled once and then wrap three times.
# First the package:

# %%
truth = np.asarray(uncached(package, jnp.asarray(tokens)))  # [T, V]
cached = walk(package, nb04.new_cache(package))

# %% [markdown]
# The one-file port works on batches, and keeps its cache as plain pairs of arrays. It takes
# the position of the token as an argument:

# %%
caches, one_file_cached = one_file.empty_cache(1, 256), []
for position, token in enumerate(tokens):
    row, caches = one_file(jnp.asarray([[token]]), jnp.asarray([position]), caches)
    one_file_cached.append(row[0])
one_file_cached = np.concatenate(one_file_cached)


# %%
def walk_torch(twin):
    import torch

    text, cache = torch.tensor([tokens]), twin.empty_cache(1)
    steps = torch.stack([twin(text[:, [t]], t, cache)[0, 0] for t in range(256)])
    whole = twin(text)[0]
    gap = (steps - whole).abs().amax(dim=1)
    return torch.cat([gap, steps.argmax(-1), whole.argmax(-1)])


torch_gap, torch_cached, torch_top = oracle("walk", walk_torch).reshape(3, 256)

# %% [markdown]
# Two measures tell how near they are: the largest difference of any logit, and the number
# of positions at which the most probable token (the **argmax**) is the same as without a
# cache.

# %%
top = truth.argmax(-1)
gaps = [np.abs(one_file_cached - truth), np.abs(cached - truth), torch_gap]
best = [one_file_cached.argmax(-1), cached.argmax(-1), torch_cached]
one_file_cache, package_cache = caches, nb04.new_cache(package).layers
size_of = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache))
n_bytes = [size_of(cache) for cache in (one_file_cache, package_cache, one_file_cache)]
rows = []
for name, gap, mine, size in zip(("one file", "package", "torch"), gaps, best, n_bytes):
    same = f"{int((mine == top).sum())} of 256"
    rows.append([name, float(gap.max()), same, f"{size // 1024} KiB"])

# %%
nb.table(["cached", "max abs Δ logits", "argmax as without a cache", "bytes, fp32"], rows)
for name, gap, agreement, _ in rows:
    nb.check(f"max|Δ| over three wraps, {name} cached and uncached", gap, lt=1e-3)
    nb.check(f"argmax, {name} cached = package uncached", agreement, eq="256 of 256")
nb.check("argmax, torch uncached = package uncached", int((torch_top == top).sum()), eq=256)

# %% [markdown]
# And what is *in* the rings? One layer of each port reads 100 tokens: the one-file port
# into a ring of `W` slots, the package into one of 200, where nothing is overwritten. We
# compare the last `W` keys of both, in float32 and in bfloat16, in which Mistral is
# shipped. (It has 8 bits where float32 has 24, so two programs may round differently.) Keys
# are the model's memory. They must be turned for the right position, and most must have the
# very same bits.

# %%
exact, theirs = nb04.keys_of_both(package, one_file, tokens, "float32")
gap = float(np.abs(exact - theirs).max())
nb.check("max|Δ| of the keys in the ring, package and one file", gap, lt=1e-4)
ours, theirs = nb04.keys_of_both(package, one_file, tokens, "bfloat16")
nb.check("bf16 keys with equal bits, share", float((ours == theirs).mean()), gt=0.9)

# %% [markdown]
# The difference in code: the one-file port has one list of positions for the whole batch
# and writes to `positions % slots`, one place at a time, as the reference does. The package
# writes one contiguous block, and computes the mask from the token numbers. That is what
# lets rows of different lengths share a batch, and chunks follow one another.
#
# **Takeaway.** Over three wraps, none of three caches can be told from no cache.
#
# ## Four ways to break it
#
# A proof that cannot fail proves nothing. Here are four caches that run without an error.
# Each differs from the real cache in one thing.
#
# 1. **The ring is too short**: it has three quarters of the slots that the window needs.
# 2. **Positions a step ahead**: the length is advanced once too often, after the first
#    token. So one slot stays empty until the ring has come around, and yet it is
#    attended. (An earlier JAX port of Mistral does this at every step.)
# 3. **Keys stored before RoPE.** Then a key no longer says where it stands.
# 4. **Values written where keys belong.** (The same earlier port stores V as K.)
#
# **Predict.** Which of them agrees with the truth for the longest, counted from the first
# token?

# %%
my_longest = None  # 1, 2, 3 or 4

# %% [markdown]
# The window is a knob. The shipped model was trained with 64. Under another window it is a
# worse model, but a cache must be right for it all the same, and the truth changes with it.

# %%
window = nb.knob(64, of=(32, 64))
model = nb.with_config(package, sliding_window=window)
truth = np.asarray(uncached(model, jnp.asarray(tokens)))
short = window * 3 // 4

# %% [markdown]
# To meddle with a cache that cannot be changed, we need **`eqx.tree_at`**. It gives back a
# copy of a tree in which one place holds something else. The place is named by a function:

# %%
tree = {"length": 5, "rest": (1, 2)}
print(eqx.tree_at(lambda t: t["rest"][0], tree, 100))


# %% [markdown]
# Three of the four are such changes. (`nb04.rewrite` uses `tree_at` for the keys of the
# slot that was written last. Turned by the sine with its sign changed, a key goes back to
# where it was before RoPE.) `jax.jit` compiles them.


# %%
@jax.jit
def ahead(cache, position):
    bump = jnp.where(position == 0, 1, 0)
    return eqx.tree_at(lambda c: c.length, cache, cache.length + bump)


@jax.jit
def before_rope(cache, position):
    angles = jnp.atleast_1d(position), config.head_dim, config.rope_theta
    cos, sin = mx.rope.rotation(*angles)
    back = lambda layer, slot: mx.rope.rotate(layer.keys[None, :, slot], cos, -sin)[0]
    return nb04.rewrite(cache, position, back)


@jax.jit
def k_from_v(cache, position):
    return nb04.rewrite(cache, position, lambda layer, slot: layer.values[:, slot])


# %%
narrow = dataclasses.replace(config, sliding_window=short)
too_short = mx.Cache(narrow, jnp.int32(0), chunk=1, max_length=256, dtype=jnp.float32)
made = {
    "1 ring too short": walk(model, too_short),
    "2 a step ahead": walk(model, nb04.new_cache(model), ahead),
    "3 keys before RoPE": walk(model, nb04.new_cache(model), before_rope),
    "4 K from V": walk(model, nb04.new_cache(model), k_from_v),
}
sound = np.abs(walk(model, nb04.new_cache(model)) - truth).max(axis=1)

# %% [markdown]
# For each we ask three things: at which position are its logits off for the first time (by
# more than 0.01), at how many positions is its most probable token another one, and how
# far off is it at worst?

# %%
gaps = {name: np.abs(logits - truth).max(axis=1) for name, logits in made.items()}
first = {name: int(np.argmax(gap > 1e-2)) for name, gap in gaps.items()}
other = {name: int((made[name].argmax(-1) != truth.argmax(-1)).sum()) for name in made}
rows = [[name, first[name], other[name], float(gaps[name].max())] for name in gaps]
nb.table(["broken cache", "first wrong logits", "other tokens of 256", "max abs Δ"], rows)
at_once = "it is wrong within the first four tokens"
nb.guess(
    "Right for the longest",
    my_longest,
    1 + [*first].index(max(first, key=first.get)),
    why={
        2: f"{at_once}: the slot that was skipped is attended from the next token on.",
        3: f"{at_once}: a query is turned for its place, and the keys no longer are.",
        4: f"{at_once}: the second token already looks at a wrong key.",
    },
)

# %%
nb04.plot_gaps({**gaps, "the sound cache": sound}, window)
nb.caption(
    "the sound cache is at the noise of float32 throughout, wraps included. The short ring "
    "is right for as many tokens as it has slots, so a test with a short prompt passes it. "
    "The cache a step ahead is wrong at once and later right again, so a test that looks "
    "only at the end of a long text passes that one. The other two stay wrong to the end."
)

# %%
nb.check("the sound cache, max|Δ| at any position", float(sound.max()), lt=1e-3)
nb.check("first wrong logits of the short ring", first["1 ring too short"], eq=short)
for name in ("2 a step ahead", "3 keys before RoPE", "4 K from V"):
    nb.check(f"first wrong logits, {name}", first[name], lt=4)
end = {name: float(gap[-32:].max()) for name, gap in gaps.items()}
nb.check("a step ahead, max|Δ| at its worst", float(gaps["2 a step ahead"].max()), gt=0.1)
nb.check("a step ahead, max|Δ| at the last 32 positions", end["2 a step ahead"], lt=0.01)
for name in ("1 ring too short", "3 keys before RoPE", "4 K from V"):
    nb.check(f"{name}, max|Δ| at the last 32 positions", end[name], gt=0.1)

# %% [markdown]
# Why does the second heal? Once the ring is full, the slot that was skipped is overwritten
# like any other. From then on the only fault is that every position is one too high, of
# queries and keys alike. Does that matter? We turn a query and a key by RoPE for positions
# 150 and 100, and for 151 and 101.

# %%
places = jnp.asarray([150, 100, 151, 101])
cos, sin = mx.rope.rotation(places, config.head_dim, config.rope_theta)
query, keys = jax.random.normal(key, (2, 1, config.head_dim))
turned = mx.rope.rotate(jnp.stack([query, keys, query, keys]), cos, sin)
scores = (turned[0::2] * turned[1::2]).sum(axis=(1, 2))
moved_on = float(abs(scores[1] - scores[0]))
nb.check("change of the score, query and key a position on", moved_on, lt=1e-3)
last = int(np.flatnonzero(gaps["2 a step ahead"] > 1e-2).max())
nb.check("a step ahead, position of the last wrong logits", last, gt=window - 1)

# %%
nb.say(
    "The score depends only on the distance. So the fault dies out: from position "
    f"{last + 1} on no logit is off by more than 0.01. (That is later than {window}, "
    "because a layer above still holds keys that were computed while the fault was there.)"
)

# %% [markdown]
# **Takeaway.** Test a cache at every step, past its window, and more than once around.
#
# ## What it costs
#
# A cache holds `2 · L · K · head width · slots` numbers: the 2 is for keys and values.
# Grouped-query attention makes `K` smaller, because several query heads share one key head.
# The window bounds the slots. The sizes below are those of the package's caches for reading
# a token at a time (`chunk=1`), which have as many slots as the window and no more. By
# default the package reads prompts in larger chunks and makes the ring longer for them. The
# next section says why.
#
# A cache of Mistral 7B may be larger than this machine. **`jax.eval_shape`** runs a
# function without computing anything: it gives back the shapes and dtypes that would come
# out.

# %%
huge = jax.eval_shape(lambda: jnp.zeros((10**6, 10**6)))
print(huge.shape, huge.dtype, f"{huge.size * huge.dtype.itemsize / 2**40:.1f} TiB")


# %%
def cache_bytes(config, length, dtype, **changes):
    config = dataclasses.replace(config, **changes)
    options = dict(chunk=1, max_length=length, dtype=dtype)
    shapes = jax.eval_shape(lambda: mx.Cache(config, jnp.int32(0), **options).layers)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


mistral_7b = mx.ModelConfig(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
    norm_eps=1e-5, vocab_size=32000, sliding_window=4096,
)  # fmt: skip

# %% [markdown]
# (`jax.tree.leaves` lists the arrays of a tree.) Three ways to build the 7B model: as it
# was released, without its window, and also without sharing key heads.

# %%
lengths = 2 ** np.arange(9, 18)
kinds = {
    "32 kv heads, no window": dict(n_kv_heads=32, sliding_window=None),
    "8 kv heads, no window": dict(sliding_window=None),
    "8 kv heads, window 4096": {},
}
size = lambda n, change: cache_bytes(mistral_7b, int(n), jnp.bfloat16, **change) / 2**30
sizes = {name: [size(n, change) for n in lengths] for name, change in kinds.items()}
nb04.plot_sizes(lengths, sizes)
nb.caption(
    "sharing key heads moves the line down by a factor of four. The window bends it flat "
    "at 4,096 tokens, and any longer text costs the same."
)

# %%
every, shared, released = (np.array(values) for values in sizes.values())
times = sorted(set((every / shared).tolist()))
nb.check("bytes for 32 kv heads over 8, at all lengths", times, eq=[4.0])
grows = int(lengths[1:][np.diff(released) > 0].max())
nb.check("bytes of the released model grow up to (tokens)", grows, eq=4096)
nb.check("7B at 32,768 tokens, rolling (MiB)", float(released[6] * 1024), eq=512.0)
nb.check("7B at 32,768 tokens, full (MiB)", float(shared[6] * 1024), eq=4096.0)

# %%
tiny = [cache_bytes(config, 4096, jnp.float32, sliding_window=w) / 1024 for w in (W, None)]
nb.check("tiny at 4,096 tokens, rolling (KiB)", tiny[0], eq=192.0)
nb.check("tiny at 4,096 tokens, full (KiB)", tiny[1], eq=192.0 * 64)
nb.say(
    f"**Takeaway.** For 32,768 tokens Mistral 7B needs {released[6]:.1f} GiB of cache and "
    f"not {shared[6]:.1f}: one part in {shared[6] / released[6]:.0f}. Longer texts need no "
    "more."
)

# %% [markdown]
# ## A long prompt, in pieces
#
# To read a prompt at once takes `T · T` scores for each head, and a program that is
# compiled for just that `T`. Instead the prompt is cut into **chunks**. Each chunk finds
# the cache as the one before has left it. It is written first, and then its queries look at
# the ring, in which its own keys now stand among the rest. So the ring must be longer than
# the window: the *first* query of a chunk still needs the `W - 1` tokens before it, when
# the whole chunk has been written.
#
# **Predict.** The window is 64. How many slots does the package's ring have for chunks of
# 96 tokens?

# %%
my_slots = None  # 64, 96, 159 or 192

# %%
nb.guess(
    "Slots for chunks of 96",
    my_slots,
    mx.cache.ring_size(64, chunk=96, max_length=4096),
    why={
        64: "a chunk of 96 would write over its own beginning.",
        96: "then the chunk fills the ring, and its first query finds none of the 63 "
        "tokens before it.",
        159: "63 + 96 are needed, but a chunk is written as one block, and may not run "
        "over the ring's end. So the ring is a multiple of the chunk.",
    },
)
nb.show_source(mx.cache.ring_size)

# %% [markdown]
# (`-(-length // chunk) * chunk` rounds up to a multiple of `chunk`.) What may the queries
# of a chunk see? Here is a text under a window of 4, of which the third chunk of three
# tokens has just been written. The picture is the mask that the package computes.

# %%
words = "the cat sat on the mat and saw it".split()
positions = jnp.arange(6, 9, dtype=jnp.int32)  # two chunks of three are behind us
slots = mx.cache.ring_size(4, chunk=3, max_length=99)
in_ring = nb04.empty_ring(slots).indices(jnp.int32(len(words)))
mask = np.asarray(mx.attention.visible(positions, in_ring, 4))  # [queries, slots]
nb04.plot_zones(mask, np.asarray(in_ring), np.asarray(positions), words)
nb.caption(
    "*past* has left the window and is hidden. *cache* was written by earlier chunks and "
    "*now* by this one, and both are seen. *future* is in the ring already, but hidden "
    "from the queries before it. The slots are in the ring's order, not the text's. One "
    "comparison of token numbers makes all of it."
)

# %%
gap = np.asarray(positions)[:, None] - np.asarray(in_ring)[None]
by_hand = (gap >= 0) & (gap < 4) & (np.asarray(in_ring) >= 0)
same = bool((by_hand == mask).all())
nb.check("the mask is the comparison of token numbers", same, eq=True)
nb.check("keys that each query of the chunk sees", mask.sum(1).tolist(), eq=[4] * 3)
before, ahead_of = (gap >= 4), (gap < 0)
nb.check("cells *past* or *future* that are seen", int(mask[before | ahead_of].sum()), eq=0)
in_text = np.asarray(in_ring).tolist()
nb.check("the ring is in the order of the text", in_text == sorted(in_text), eq=False)

# %% [markdown]
# Now the 256 tokens in chunks of several sizes, 96 among them. The sizes are a knob. Do the
# logits depend on the chunk? They should not. For each size we also count the calls (pieces
# of the prompt) and the different programs that have to be compiled for them, and ask for
# the program's **temporary memory**: what it needs beside weights, cache and tokens.
# `jax.jit(f).lower(...).compile()` compiles without running, and the compiled program's
# `memory_analysis()` tells that number. Three lines show it:

# %%
mix = jax.jit(lambda x: jax.nn.softmax(x @ x.T) @ x)  # [T, T] in between
compiled = mix.lower(jax.ShapeDtypeStruct((512, 64), jnp.float32)).compile()
print(f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.1f} MiB for the scores")

# %% [markdown]
# (`jax.ShapeDtypeStruct` stands for an array of that shape: compiling needs no numbers.)

# %%
chunks = nb.knob((4, 32, 96, 256), of=((4, 32, 96, 256), (8, 64, 256)))
truth = np.asarray(uncached(package, jnp.asarray(tokens)))[-1]
rows, seconds, rings = [], [], []
for chunk in chunks:
    cache, logits = mx.prefill(package, [tokens], chunk=chunk)
    pieces = mx.prompts.chunk_sizes(0, 256, chunk=chunk, slots=cache.slots)
    timed = nb.timeit(lambda: mx.prefill(package, [tokens], chunk=chunk), repeats=5)
    gap = float(np.abs(logits[0] - truth).max())
    empty = nb04.new_cache(package, chunk=chunk)
    temporary = nb04.temporary_bytes(package, empty, chunk) / 2**20
    milliseconds = f"{1000 * timed.median:.1f}"
    rows.append([chunk, gap, len(pieces), len(set(pieces)), temporary, milliseconds])
    seconds.append(timed)
    rings.append(nb04.by_token(cache, W))

# %%
nb.table(["chunk", "max abs Δ logits", "calls", "programs", "temporary (MiB)", "ms"], rows)
drift = max(float(np.abs(keys - rings[-1]).max()) for keys in rings)
nb.check("max|Δ| logits, any chunk and no cache", max(row[1] for row in rows), lt=1e-3)
nb.check("max|Δ| of the final keys, any chunk and the largest", drift, lt=1e-3)
nb.check("most programs for one prompt", max(row[3] for row in rows), lt=8)

# %% [markdown]
# A prompt need not be a multiple of the chunk. `chunk_sizes` takes what is left in powers
# of two, so that prompts of *any* length need few programs. Time and memory go
# different ways:

# %%
nb04.plot_chunks(chunks, seconds, [row[4] for row in rows])
nb.caption(
    "above, milliseconds, the median of five runs with quartiles. Small chunks take more "
    "calls, and every call is handed all weights. Below, what a program needs beside "
    "weights and cache grows with the chunk."
)

# %%
calls = [row[2] for row in rows]
nb.check("calls, smallest chunk over largest", calls[0] // calls[-1], eq=256 // chunks[0])
weights = sum(x.nbytes for x in jax.tree.leaves(package))
nb.check("bytes of weights that one call is handed", weights, eq=4 * 5_278_976)
memory = [row[4] for row in rows]
nb.check("temporary bytes, largest chunk over smallest", memory[-1] / memory[0], gt=4)
growth = float(min(np.diff(memory)))
nb.check("least growth of temporary memory to the next chunk (MiB)", growth, gt=0)

# %%
handed = [f"{n * weights / 2**20:,.0f} MiB of weights in {n} calls" for n in calls]
default, _ = mx.prefill(package, [tokens])
longer = mx.cache.ring_size(W, chunk=256, max_length=4096)
nb.check("slots of the ring by default, 256 tokens", default.slots[0], eq=256)
nb.say(
    f"Chunks of {chunks[0]} are handed {handed[0]}, chunks of {chunks[-1]} only "
    f"{calls[-1] * weights / 2**20:,.0f} MiB. By default the package reads these 256 "
    f"tokens in one chunk on a CPU. Its ring then has {default.slots[0]} slots. For a "
    f"longer text it would have {longer}."
)

# %% [markdown]
# Last, three prompts of different lengths in one batch. They are padded on the left, so
# they share the index at which they write, and each row keeps its own positions. Each must
# get what it gets alone. (They are read in chunks of 16, so that few programs are compiled.
# `max_tokens` makes room behind them, so that all rings are equally long.)

# %%
prompts, options = (
    [tokens[:48], tokens[48:79], tokens[79:92]],
    dict(chunk=16, max_tokens=64),
)
_, together = mx.prefill(package, prompts, **options)
alone = [mx.prefill(package, [prompt], **options)[1][0] for prompt in prompts]
gap = max(float(jnp.abs(a - b).max()) for a, b in zip(alone, together))
nb.check("max|Δ| logits, a ragged batch and each row alone", gap, lt=5e-4)

# %%
worst, most = max(row[1] for row in rows), max(row[3] for row in rows)
nb.say(
    f"**Takeaway.** Chunks of {chunks[0]} to {chunks[-1]} tokens give the same logits to "
    f"within {worst:.0e}, with at most {most} compiled programs for a size. Chunks of "
    f"{chunks[1]} need {memory[-1] / memory[1]:.0f} times less temporary memory than the "
    "whole prompt at once."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: the slots of a query** (●● 10 minutes). `written` tokens have gone into
# a ring. Give the set of slots that the query at `position` may see. The query may be
# anywhere in the last chunk, so later tokens may be in the ring already. The ring may also
# be too short, so some tokens of the window may be gone. The checker asks the package's
# cache and its mask.
#
# <details><summary>Hint</summary>
#
# Which token is the oldest that the query sees? There are three limits: the text begins at
# token 0, the window is `window` tokens, and the ring holds only the last `slots` of the
# `written` ones.
#
# </details>
#
# {{solution:seen}}


# %%
def seen(position, written, window, slots):
    return NotImplemented


ex04.check_seen(seen)

# %% [markdown]
# **Exercise 2: repair the ring** (●● 10 minutes). A colleague saves memory. For chunks of 4
# tokens a ring of 63 + 4 = 67 slots holds all that is needed, so it is not rounded up to
# 68. The logits are right for 64 tokens and wrong after them, and no error is raised.
# Repair the function, and keep the 67 slots:
#
# ```python
# def write_chunk(ring, rows, length):  # [slots, d], [chunk, d], tokens written before
#     start = length % len(ring)
#     return jax.lax.dynamic_update_slice_in_dim(ring, rows, start, axis=0)
# ```
#
# <details><summary>Hint</summary>
#
# Into which slots do tokens 64 to 67 belong? They are not one block. In JAX
# `ring.at[places].set(rows)` writes each row to a place of its own.
#
# </details>
#
# {{solution:write_chunk}}


# %%
def write_chunk(ring, rows, length):
    return NotImplemented


ex04.check_write_chunk(write_chunk)

# %% [markdown]
# **Exercise 3: the price of long chunks** (●● 5 minutes). The released Mistral 7B reads
# 32,768 tokens in bfloat16 with this package, in chunks of 1,000. How many MiB (2²⁰ bytes)
# is its cache? The model's sizes are in `mistral_7b` above.
#
# <details><summary>Hint</summary>
#
# First the slots of one ring: the window, the chunk, and the rounding, as in `ring_size`.
# Then the numbers in each slot (keys and values), over all layers. Last, two bytes each.
#
# </details>
#
# {{solution:cache_mib}}

# %%
cache_mib = NotImplemented
ex04.check_cache_mib(cache_mib)

# %% [markdown]
# ## Recap

# %%
answers = [
    ["where does a token go?", "to the slot of its number modulo the slots"],
    ["how long does it stay?", "as long as the window sees it, and not a step more"],
    ["why need slots not be sorted?", f"{moved} of {W} moved, and attention is the same"],
    ["what does it save?", f"{shared[6] / released[6]:.0f} times, for 32,768 tokens of 7B"],
    ["why may a prompt come in pieces?", f"its ring keeps {W - 1} tokens beside the chunk"],
]
nb.table(["question", "answer"], answers)

# %%
nb.recap()

# %%
nb.say(
    f"**The answer.** {W} slots serve any text because a token is needed for exactly {W} "
    f"steps, and its slot is free after them: over {len(tokens)} tokens every argmax is "
    "the same as without a cache. And a prompt may come in pieces because a chunk finds "
    "in the ring all that it may see."
)

# %% [markdown]
# **What we did not show**: caches of fewer bits, caches spread over devices, and pages,
# with which servers share memory among many texts.
#
# **Further reading**: Mistral 7B, arXiv 2310.06825, §2 (rolling buffer, pre-fill and
# chunking); Ainslie et al., arXiv 2305.13245 (grouped queries); Kwon et al., arXiv
# 2309.06180 (pages).
#
# **Next**: [05 What the compiler sees](05_what_the_compiler_sees.ipynb), on why those
# shapes had to be fixed.
