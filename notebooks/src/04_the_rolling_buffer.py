# ---
# jupyter:
#   budget: 90
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
# - **Model and data**: the embedded model, `W` = 64, and Shakespeare that it has never
#   seen.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: what sits in slot 20 after 150 tokens? Which broken cache is found
#   last?
#
# The letters: `T` tokens, `W` window, `L` layers, `K` key and value heads, `H` query
# heads; see [README.md](README.md).

# %%
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

import mistral_eqx as mx
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

# %% [markdown]
# ## 64 drawers, 256 letters
#
# To write a token, attention needs the keys and values of the tokens before it. They do
# not change, so one keeps them: the **cache**. With a window only the last `W` are ever
# looked at, so `W` slots are enough, if each new token takes the place of the one that
# has just left the window. Token number `index` goes to slot `index % slots`. This is all
# of it:

# %%
nb.show_source(mx.cache.LayerCache.write, mx.cache.LayerCache.indices)

# %% [markdown]
# `write` puts keys and values at `length % slots`. `indices` answers the other way: which
# token does each slot hold, once `length` have been written? That follows from `length`
# alone, so no list of positions is kept, and nothing is ever shifted.
#
# **Predict.** 150 tokens have been written to 64 slots. Which sits in slot 20: token 20,
# 84 or 148?

# %%
my_token = None  # 20, 84 or 148

# %%
ring = lambda n: mx.cache.LayerCache(jnp.zeros((1, n, 2)), jnp.zeros((1, n, 2)))
held = int(ring(64).indices(jnp.int32(150))[20])
nb.guess("The token in slot 20", my_token, held)
nb.check("token in slot 20 of 64 after 150", held, eq=148)

# %% [markdown]
# The youngest token that maps to the slot: of 20, 84, 148, 212, ... the last one below
# 150. Here are 24 tokens going through 8 slots.

# %%
slots, steps = 8, 24
held = np.stack([ring(slots).indices(jnp.int32(n)) for n in range(1, steps + 1)])
figure, axis = plt.subplots(figsize=(7, 3.4))
image = axis.imshow(np.ma.masked_less(held.T, 0), aspect="auto", vmin=0, vmax=steps)
for step in range(steps):
    for slot in range(slots):
        text = held[step, slot] if held[step, slot] >= 0 else "·"
        light = "white" if 0 <= held[step, slot] < steps * 0.6 else "black"
        axis.text(step, slot, text, ha="center", va="center", fontsize=8, color=light)
axis.set(xlabel="tokens written so far, less one", ylabel="slot")
axis.grid(False)
figure.colorbar(image, label="token in the slot")
nb.caption(
    "a diagonal that wraps around. Each token is written once and stays, a bar of one "
    "shade, for exactly 8 steps, until the token 8 later takes its slot. Dots are slots "
    "never written, which the mask hides."
)

# %%
lifetimes = [(held == token).sum() for token in range(steps - slots)]
nb.check("steps that a token stays, shortest", min(lifetimes), eq=slots)
nb.check("steps that a token stays, longest", max(lifetimes), eq=slots)

# %% [markdown]
# **Takeaway.** Slot = token number modulo slots; a token lives exactly as long as the
# window can see it.
#
# ## The order in the drawers does not matter
#
# After token 8 the slots hold 8, 1, 2, 3, ...: out of order. Should they not be sorted
# before attention? No. A key carries its position in itself, for RoPE has turned it
# before it was stored; and attention is a sum over slots, which has no order. Here are
# 150 tokens in a ring of 64 slots, which has been filled more than twice. Shuffle them:

# %%
tokens = nb.held_out(256)
cache, _ = mx.prefill(package, [tokens[:150]], chunk=1)  # so the ring has W slots
layer = jax.tree.map(lambda x: x[0], cache.layers[3])  # of the batch's one row
queries = jax.random.normal(key, (1, config.n_heads, config.head_dim))
filled = mx.attention.visible(jnp.int32([149]), layer.indices(cache.length), W)
shuffle = jax.random.permutation(key, layer.slots)

# %%
nb.check("slots of the ring", layer.slots, eq=W)
in_order = mx.attention.attend(queries, layer.keys, layer.values, filled)
shuffled = mx.attention.attend(
    queries, layer.keys[:, shuffle], layer.values[:, shuffle], filled[:, shuffle]
)
nb.check(
    "max|Δ| of attention, slots shuffled",
    float(jnp.abs(in_order - shuffled).max()),
    lt=1e-5,
)

# %% [markdown]
# **Takeaway.** Positions are in the keys, not in their places.
#
# ## Two ports and torch
#
# A cache is right if nobody can tell that it is there. The truth is the model without
# one, reading 256 tokens at once. Against it: each program reading the same text one
# token at a time through 64 slots, which are filled once and then wrap three times.


# %%
step = eqx.filter_jit(lambda model, token, cache: model(token[None], cache))


def new_cache(model=package, **options):
    options = dict(chunk=1, max_length=256, dtype=jnp.float32) | options
    return mx.Cache(model.config, jnp.int32(0), **options)


def walk(cache, change=lambda cache, position: cache):
    logits = []
    for position, token in enumerate(jnp.asarray(tokens)):
        row, cache = step(package, token, cache)
        cache = change(cache, position)
        logits.append(row)
    return np.concatenate(logits)  # [T, V]


# %%
truth = np.asarray(eqx.filter_jit(package)(jnp.asarray(tokens))[0])  # [T, V]
cached = walk(new_cache())

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

# %%
top = truth.argmax(-1)
one_file_bytes = sum(x.nbytes for x in jax.tree.leaves(caches))
package_bytes = sum(x.nbytes for x in jax.tree.leaves(new_cache().layers))
rows = []
for name, gap, argmax, size in [
    (
        "one file",
        np.abs(one_file_cached - truth).max(1),
        one_file_cached.argmax(-1),
        one_file_bytes,
    ),
    ("package", np.abs(cached - truth).max(1), cached.argmax(-1), package_bytes),
    ("torch", torch_gap, torch_cached, one_file_bytes),
]:
    rows.append(
        [name, gap.max(), f"{int((argmax == top).sum())} of 256", f"{size // 1024} KiB"]
    )
nb.table(["cached", "max abs Δ logits", "argmax as without a cache", "bytes, fp32"], rows)

# %%
for name, gap, agreement, _ in rows:
    nb.check(f"max|Δ| over three wraps, {name} cached and uncached", float(gap), lt=1e-3)
    nb.check(f"argmax, {name} cached = package uncached", agreement, eq="256 of 256")
nb.check("argmax, torch uncached = package uncached", int((torch_top == top).sum()), eq=256)

# %% [markdown]
# And what is *in* the rings? One layer of each port reads 100 tokens: the one-file port
# into a ring of `W` slots, the package into one of 200, where nothing is overwritten yet.
# The last `W` keys of both are compared, in float32 and in bfloat16, which is how Mistral
# is shipped. Keys are the model's memory: they must hold the right position's turn, and,
# in bfloat16, mostly the very same bits.


# %%
def keys_of_both(dtype, n=100):
    cast = lambda model: jax.tree.map(lambda x: x.astype(dtype), model)
    block, other = cast(package.layers[0]), cast(one_file.layers[0])
    x = cast(package.tok_embeddings)(jnp.asarray(tokens[:n]))  # [T, D]
    positions = jnp.arange(n, dtype=jnp.int32)
    places = mx.rope.Places(config, positions)
    freqs = one_file_ref.precompute_freqs_cis(32, positions, config.rope_theta)
    kept = [jnp.zeros((config.n_kv_heads, 200, config.head_dim), dtype)] * 2
    empty = mx.cache.LayerCache(*kept)
    _, kept = block.attention(block.attention_norm(x), places, empty)
    ring_ = cast(one_file).empty_cache(1, n)[0]
    _, (keys, _) = other.attention(
        other.attention_norm(x[None]), freqs, positions, jnp.zeros((n, n), dtype), ring_
    )
    ours = jnp.swapaxes(kept.keys, 0, 1)[n - W : n]  # [W, K, head width]
    return np.float32(ours), np.float32(keys[0, (np.arange(n - W, n) % W)])


(ours, theirs), (ours_bf16, theirs_bf16) = keys_of_both("float32"), keys_of_both("bfloat16")
nb.check(
    "max|Δ| of the keys in the ring, package and one file",
    np.abs(ours - theirs).max(),
    lt=1e-4,
)
nb.check("bf16 keys with equal bits, share", (ours_bf16 == theirs_bf16).mean(), gt=0.9)

# %% [markdown]
# The difference in code: the one-file port has one list of positions for the whole batch
# and scatters to `positions % slots`, as the reference does; without sorting either. The
# package writes a contiguous block and computes the mask from the token numbers, which is
# what lets rows of different lengths share a batch, and chunks follow one another.
#
# **Takeaway.** Over three wraps, none of three caches can be told from no cache.
#
# ## Four ways to break it
#
# A proof that cannot fail proves nothing. Here are four caches that run without an error.
# Each meddles with the real cache between two steps.
#
# 1. **The ring is too short**: 48 slots for a window of 64.
# 2. **Positions a step ahead**: the length is advanced once too often, so one slot is
#    never written, and attended. (An earlier JAX port of Mistral does this at every
#    step.)
# 3. **Keys stored before RoPE**: order then does matter.
# 4. **Values written where keys belong.** (The same port; the keys it stores come from
#    V.)
#
# **Predict.** Which of them agrees with the truth for the longest?

# %%
my_longest = None  # 1, 2, 3 or 4

# %%
narrow = dataclasses.replace(config, sliding_window=48)
short = mx.Cache(narrow, jnp.int32(0), chunk=1, max_length=256, dtype=jnp.float32)


@jax.jit
def ahead(cache, position):
    bump = jnp.where(position == 0, 1, 0)
    return eqx.tree_at(lambda c: c.length, cache, cache.length + bump)


# %%
def rewrite_slot(cache, position, change):
    slot = position % cache.layers[0].slots
    new = lambda layer: layer.keys.at[:, slot].set(change(layer, slot))
    keys = [new(layer) for layer in cache.layers]
    return eqx.tree_at(lambda c: [layer.keys for layer in c.layers], cache, keys)


@jax.jit
def before_rope(cache, position):
    cos, sin = mx.rope.rotation(
        jnp.atleast_1d(position), config.head_dim, config.rope_theta
    )
    back = lambda layer, slot: mx.rope.rotate(layer.keys[None, :, slot], cos, -sin)[0]
    return rewrite_slot(cache, position, back)


@jax.jit
def k_from_v(cache, position):
    return rewrite_slot(cache, position, lambda layer, slot: layer.values[:, slot])


# %%
broken = {
    "1 ring too short": walk(short),
    "2 a step ahead": walk(new_cache(), ahead),
    "3 keys before RoPE": walk(new_cache(), before_rope),
    "4 K from V": walk(new_cache(), k_from_v),
}
gaps = {name: np.abs(logits - truth).max(axis=1) for name, logits in broken.items()}

# %%
first = {name: int(np.argmax(gap > 1e-2)) for name, gap in gaps.items()}
other = {name: broken[name].argmax(-1) != top for name in broken}
rows = [
    [name, first[name], int(np.argmax(other[name])), int(other[name].sum()), gap.max()]
    for name, gap in gaps.items()
]
header = ["broken cache", "first wrong logits", "first other token", "other tokens of 256"]
nb.table([*header, "max abs Δ"], rows)
nb.guess("Right for the longest", my_longest, max(first, key=first.get))

# %%
figure, axis = plt.subplots(figsize=(7, 4))
for name, gap in gaps.items():
    axis.semilogy(np.maximum(gap, 1e-7), label=name, markevery=24, markersize=5)
sound = np.maximum(np.abs(cached - truth).max(axis=1), 1e-7)
axis.semilogy(sound, label="the sound cache", markevery=24, markersize=5)
axis.axvline(64, color="0.6", linewidth=1, marker="", linestyle="-")
axis.set(xlabel="position (tokens); the line is the window", ylabel="max|Δ logits|")
axis.legend(ncols=2, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1))
nb.caption(
    "the sound cache is at the noise of float32 throughout, wraps included. The short "
    "ring is right for 48 tokens: a test with a short prompt passes it. The cache a step "
    "ahead is wrong at once and then heals, for the slot that was skipped is "
    "overwritten, and what it did fades: a test that looks at the end of a long text "
    "passes that one."
)

# %%
nb.check("first wrong logits, ring of 48 slots", first["1 ring too short"], eq=48)
for name in ("2 a step ahead", "3 keys before RoPE", "4 K from V"):
    nb.check(f"first wrong logits, {name}", first[name], lt=4)
nb.check("least max|Δ| of a broken cache", min(gap.max() for gap in gaps.values()), gt=0.1)

# %% [markdown]
# **Takeaway.** Test a cache at every step, past its window, and more than once around.
#
# ## What it costs
#
# A cache holds `2 · L · K · head width · slots` numbers, twice because of keys and
# values. Grouped-query attention shrinks `K`, the window bounds the slots. The sizes
# below are those of the package's caches for reading a token at a time (`chunk=1`), which
# have as many slots as the window and no more. (Shapes only: nothing is allocated.) By
# default the package reads prompts in larger chunks and makes the ring longer for them:
# why, comes next.


# %%
def cache_bytes(config, length, dtype, **changes):
    config = dataclasses.replace(config, **changes)
    make = lambda: (
        mx.Cache(config, jnp.int32(0), chunk=1, max_length=length, dtype=dtype).layers
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


mistral_7b = mx.ModelConfig(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
    norm_eps=1e-5, vocab_size=32000, sliding_window=4096,
)  # fmt: skip

# %%
lengths = 2 ** np.arange(9, 18)
kinds = {
    "32 kv heads, no window": dict(n_kv_heads=32, sliding_window=None),
    "8 kv heads, no window": dict(sliding_window=None),
    "8 kv heads, window 4096": {},
}
sizes = {
    name: [cache_bytes(mistral_7b, int(n), jnp.bfloat16, **change) / 2**30 for n in lengths]
    for name, change in kinds.items()
}

# %%
figure, axis = plt.subplots()
for name, values in sizes.items():
    axis.loglog(lengths, values, label=name, base=2)
axis.set_xticks(lengths[::2], [f"{n:,}" for n in lengths[::2]])
axis.set_yticks([0.25, 1, 4, 16, 64], ["0.25", "1", "4", "16", "64"])
axis.set(xlabel="text (tokens)", ylabel="cache of Mistral 7B (GiB)")
axis.legend()
nb.caption(
    "sharing key heads moves the line down by four; the window bends it flat at 4,096 "
    "tokens, and everything to the right of that costs the same."
)

# %%
tiny = [cache_bytes(config, 4096, jnp.float32, sliding_window=w) / 1024 for w in (W, None)]
nb.check("tiny at 4,096 tokens, rolling (KiB)", tiny[0], eq=192.0)
nb.check("tiny at 4,096 tokens, full (KiB)", tiny[1], eq=192.0 * 64)
default, _ = mx.prefill(package, [tokens])
nb.check("slots of the tiny model's ring by default", default.slots[0], eq=256)
big = [
    cache_bytes(mistral_7b, 32768, jnp.bfloat16, sliding_window=w) / 2**20
    for w in (4096, None)
]
nb.check("7B at 32,768 tokens, rolling (MiB)", big[0], eq=512.0)
nb.check("7B at 32,768 tokens, full (MiB)", big[1], eq=4096.0)

# %% [markdown]
# **Takeaway.** For 32,768 tokens Mistral 7B needs an eighth of the cache, and for ever
# longer texts no more.
#
# ## A long prompt, in pieces
#
# Reading a prompt at once takes scores of `T × T` and a program compiled for that very
# `T`. Instead it is cut into chunks, and each chunk reads the cache as it left the one
# before. The chunk is written first and then attends the ring, its own keys among the
# rest, so the ring must be longer than the window: the first query of a chunk still needs
# the `W - 1` tokens before it.

# %%
nb.show_source(mx.cache.ring_size)

# %% [markdown]
# What the queries of a chunk may see has three zones. Here is a text with a window of 4,
# of which the third chunk of three tokens has just been written. The picture is the real
# mask.

# %%
words = "the cat sat on the mat and saw it".split()
chunk, window, length = 3, 4, 6  # two chunks are behind us
positions = jnp.arange(length, length + chunk, dtype=jnp.int32)[: len(words) - length]
slots = mx.cache.ring_size(window, chunk=chunk, max_length=99)
in_ring = ring(slots).indices(jnp.int32(length) + len(positions))
mask = np.asarray(mx.attention.visible(positions, in_ring, window))

# %%
figure, axis = plt.subplots(figsize=(7, 2.6))
zone = np.where(np.asarray(in_ring) >= length, 0.8, 0.55)
axis.imshow(np.where(mask, zone[None], 0.08), cmap="Greys", vmin=0, vmax=1, aspect="auto")
for t, s in np.ndindex(mask.shape):
    kind = "now" if in_ring[s] >= length else "cache"
    word = kind if mask[t, s] else ("future" if in_ring[s] > positions[t] else "past")
    axis.text(
        s, t, word, ha="center", va="center", color="white" if mask[t, s] else "black"
    )
labels = [f"{words[i]}\n{i}" if 0 <= i < len(words) else "·" for i in np.asarray(in_ring)]
axis.set_xticks(range(slots), labels)
axis.set_yticks(range(len(positions)), [f"{words[int(p)]} {int(p)}" for p in positions])
axis.set(xlabel="slot of the ring, with the token it holds", ylabel="query")
axis.grid(False)
nb.caption(
    "three zones in one row of slots: *past* has left the window and is hidden, *cache* "
    "was written by earlier chunks, *now* by this one. The order is the ring's, not the "
    "text's. One comparison of token numbers makes all of it."
)

# %%
nb.check(
    "keys that each query of the chunk sees",
    mask.sum(1).tolist(),
    eq=[window] * len(positions),
)

# %% [markdown]
# Now the same prompt of 256 tokens in chunks of five sizes. **Predict**: do the logits
# depend on the chunk? Which size is the fastest?

# %%
my_fastest = None  # 4, 16, 64, 100 or 256


# %%
def temporary_bytes(chunk):  # of the program that reads a chunk
    piece = jax.ShapeDtypeStruct((chunk,), jnp.int32)
    run = jax.jit(lambda model, piece, cache: model(piece, cache))
    compiled = run.lower(package, piece, new_cache(chunk=chunk)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def by_token(cache):  # the last W keys of each layer, in order of the text
    order = np.argsort(cache.layers[0].indices(cache.length))[-W:]
    return np.stack([layer.keys[0][:, order] for layer in cache.layers])


# %%
chunks, results = [4, 16, 64, 100, 256], {}
for chunk in chunks:
    cache, logits = mx.prefill(package, [tokens], chunk=chunk)
    pieces = mx.cache.chunk_sizes(0, 256, chunk=chunk, slots=cache.slots)
    seconds = nb.timeit(lambda: mx.prefill(package, [tokens], chunk=chunk), repeats=5)
    gap = np.abs(logits[0] - truth[-1]).max()
    results[chunk] = gap, by_token(cache), len(set(pieces)), temporary_bytes(chunk), seconds

# %%
reference_keys = results[256][1]
rows = []
for chunk, (gap, keys, programs, temporary, seconds) in results.items():
    drift = np.abs(keys - reference_keys).max()
    milliseconds = f"{1000 * seconds.median:.1f}"
    rows.append(
        [chunk, float(gap), float(drift), programs, temporary / 2**20, milliseconds]
    )
header = [
    "chunk",
    "max abs Δ logits",
    "max abs Δ keys",
    "programs",
    "temporary (MiB)",
    "ms",
]
nb.table(header, rows)
nb.guess("Fastest here", my_fastest, min(chunks, key=lambda c: results[c][4].median))

# %%
nb.check("max|Δ| logits, any chunk and no cache", max(row[1] for row in rows), lt=1e-3)
nb.check("max|Δ| of the final keys, any two chunks", max(row[2] for row in rows), lt=1e-3)
nb.check("most programs for one prompt", max(row[3] for row in rows), lt=8)
nb.check("temporary bytes, chunk 256 over 16", rows[4][4] / rows[1][4], gt=4)

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2))
low, middle, high = np.array(
    [[r[4].low, r[4].median, r[4].high] for r in results.values()]
).T
axes[0].errorbar(
    chunks, 1000 * middle, 1000 * np.array([middle - low, high - middle]), capsize=3
)
axes[1].plot(chunks, [row[4] for row in rows])
axes[0].set(xlabel="chunk (tokens)", ylabel="prefill of 256 tokens (ms)")
axes[1].set(xlabel="chunk (tokens)", ylabel="temporary memory (MiB)")
for axis in axes:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([4, 16, 64, 256], [4, 16, 64, 256])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
nb.caption(
    "left, milliseconds, median and quartiles of five runs: a chunk of 4 reads all "
    "weights for every four tokens, and larger chunks share that cost. Right, what the "
    "program needs besides weights and cache grows with the chunk."
)

# %% [markdown]
# Last, three prompts of different lengths in one batch. They are padded on the left,
# share the write index, and each row keeps its own positions. Each must get what it gets
# alone.

# %%
prompts = [tokens[:100], tokens[100:117], tokens[117:118]]
_, together = mx.prefill(package, prompts)
alone = [mx.prefill(package, [prompt])[1][0] for prompt in prompts]
gap = max(float(jnp.abs(a - b).max()) for a, b in zip(alone, together))
nb.check("max|Δ| logits, a ragged batch and each row alone", gap, lt=5e-4)

# %%
nb.say(
    "**Takeaway.** Chunks of 4 to 256 tokens give the same logits to within "
    f"{max(row[1] for row in rows):.0e}, with at most {max(row[3] for row in rows)} "
    f"compiled programs, and the chunk of 16 needs {rows[4][4] / rows[1][4]:.0f} times "
    "less temporary memory than the whole prompt."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: the slot** (● 2 minutes). Where does a token go?
#
# <details><summary>Hint</summary>
#
# One operator.
#
# </details>
#
# {{solution:slot}}


# %%
def slot(position, slots):
    return NotImplemented


ex04.check_slot(slot)

# %% [markdown]
# **Exercise 2: and the way back** (●● 10 minutes). Which token does a slot hold after
# `written` tokens? `None` if it was never written. The checker asks the package's cache.
#
# <details><summary>Hint</summary>
#
# Start at the last token, `written - 1`, and go back as far as its slot is ahead of
# yours.
#
# </details>
#
# {{solution:held_by}}


# %%
def held_by(slot, written, slots):
    return NotImplemented


ex04.check_held_by(held_by)

# %% [markdown]
# **Exercise 3: unrotate** (●● 5 minutes). Given keys from a cache and the cosine and sine
# of their positions, give back the keys before RoPE, with `mx.rope.rotate`.
#
# <details><summary>Hint</summary>
#
# A rotation is undone by turning the other way: which of cosine and sine changes its
# sign?
#
# </details>
#
# {{solution:unrotate}}


# %%
def unrotate(keys, cos, sin):
    return NotImplemented


ex04.check_unrotate(unrotate)

# %% [markdown]
# ## Recap

# %%
nb.recap()

# %%
nb.say(
    "**The answer.** 64 slots serve any text because a token is needed for exactly 64 "
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
