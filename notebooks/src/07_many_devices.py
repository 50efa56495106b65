# ---
# jupyter:
#   budget: 130
#   cover: 2
# ---

# %% [markdown]
# # Many devices: `filter_shard` on eight pretend CPUs
#
# **When a model is spread over eight devices, who holds what, and which messages are
# sent?**
#
# - **You will be able to** read a mesh and a `PartitionSpec`; predict the part of every
#   matrix that a device holds; say which products need a message; count the messages in a
#   compiled program; and find a wrong spec.
# - **Before this**: [01](01_one_model_two_languages.ipynb), and
#   [05](05_what_the_compiler_sees.ipynb) for what compiling is.
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/devices/`: `mesh.py`, `sharding.py`, `experts.py`,
#   `programs.py`. `one_file_ref.py` has no counterpart: it is for one device.
# - **Model and data**: the embedded model, and Shakespeare that it has never seen; of
#   Mistral 7B the shapes alone.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: which part of `wk` does one of four devices hold, when there are two
#   key heads? What becomes of the logits when a spec is wrong? How much faster are eight
#   pretend devices?
#
# The letters: `D` width, `F` width inside the feed-forward network, `H` query heads, `K`
# key and value heads, `L` layers; see [README.md](README.md).
#
# The two lines after the imports make one CPU look like eight devices. They come before JAX
# computes anything, because it looks for its devices only once. Each of the eight has
# memory of its own, and gets another's numbers only by a message, as real chips do.

# %%
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import mistral_eqx as mx
import nb07
import nbtools as nb
import one_file_ref
from exercises import ex07
from mistral_eqx.devices import sharding
from mistral_eqx.devices.mesh import make_mesh


jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
key = jax.random.key(0)
nb.versions()
nb.check("devices (if there is one, restart the kernel)", jax.device_count(), eq=8)

# %% [markdown]
# A model of Equinox is a **tree**: modules that hold modules, and arrays as its leaves.
# `forward` below is a pass of a whole batch, without a cache. The model reads one text;
# `jax.vmap` makes of that a function for each row of a batch; and `jax.jit` compiles it.

# %%
oracle = nb.Oracle("07")
package, tokenizer = mx.load(dtype=jnp.float32)
config = package.config
text = np.array(nb.held_out(8 * 64), np.int32).reshape(8, 64)  # [B, T]
forward = jax.jit(lambda model, tokens: jax.vmap(lambda row: model(row)[0])(tokens))

# %% [markdown]
# ## Sixteen numbers on eight devices
#
# A **mesh** is a grid of devices whose axes have names. This one has two rows and four
# columns. Its first axis, `data`, numbers the rows; its second, `model`, numbers the
# columns.

# %%
columns = nb.knob(4, of=(2, 4))
grid = make_mesh({"data": 8 // columns, "model": columns})
nb07.draw_mesh(grid)
nb.caption(
    "the mesh. Each of the eight devices stands in it once; its number is its name in all "
    "figures that follow."
)

# %%
nb.check("devices in the mesh", sorted(d.id for d in grid.devices.flat), eq=[*range(8)])
nb.check("rows and columns", grid.devices.shape, eq=(8 // columns, columns))

# %% [markdown]
# A **`PartitionSpec`**, `P` for short, has one entry for each axis of an array: the axis of
# the mesh that cuts it, or `None` for uncut. `P(None, "model")` leaves the rows of a matrix
# alone, and cuts its columns into as many parts as `model` has devices.
#
# A **`NamedSharding`** is a mesh and a spec together: it says of every device what it
# holds. And `jax.device_put` moves an array to where a sharding says. In three lines:

# %%
place = lambda *spec: NamedSharding(grid, P(*spec))
numbers = jnp.arange(16.0).reshape(4, 4)
cut = jax.device_put(numbers, place(None, "model"))
print(cut)

# %% [markdown]
# That is still *one* array, of shape 4 × 4. Its parts lie on different devices, and
# `cut.addressable_shards` lists them, one for each device.
#
# **Predict.** The mesh is 2 × 4, and the spec names `model` alone. How many of the eight
# devices hold the number 0, in the upper left corner: 1, 2 or 8?

# %%
my_holders = None  # 1, 2 or 8

# %%
holders = sum(0.0 in np.asarray(s.data) for s in cut.addressable_shards)
nb.guess(
    "Devices that hold number 0",
    my_holders,
    holders,
    why={
        1: "the spec does not name `data`, so all devices of a column hold the same.",
        8: "that would be `P()`, which names no axis at all.",
    },
)

# %% [markdown]
# The naive way: split the columns by hand, and give part `i` to all devices in column `i`
# of the mesh. Does every device hold that?

# %%
parts = np.split(numbers, columns, axis=1)  # naive
column_of = {d.id: i for row in grid.devices for i, d in enumerate(row)}
equal = [(s.data == parts[column_of[s.device.id]]).all() for s in cut.addressable_shards]
nb.check("devices whose part is the naive one", int(np.sum(equal)), eq=8)
nb.check("devices that hold number 0", holders, eq=8 // columns)
nb.check("shape of a part", cut.addressable_shards[0].data.shape, eq=(4, 4 // columns))

# %% [markdown]
# Four specs for the same sixteen numbers:

# %%
specs = {
    'P("model")': ("model",),
    'P(None, "model")': (None, "model"),
    'P("data", None)': ("data",),
    'P("data", "model")': ("data", "model"),
}
placed = {name: jax.device_put(numbers, place(*spec)) for name, spec in specs.items()}
nb07.draw_placed(placed)
nb.caption(
    "each square is a number, and in it stand the devices that have it. A spec that names "
    "one axis leaves copies along the other; a spec that names both leaves none. The first "
    "two differ in what is cut, rows or columns."
)

# %%
copies = {n: 8 * nb07.held(array) // array.nbytes for n, array in placed.items()}
nb.check("copies of each number, all four specs", [*copies.values()],
         eq=[8 // columns, 8 // columns, columns, 1])  # fmt: skip
part = lambda name: placed[name].addressable_shards[0].data.shape
nb.check("part of the first two", [*map(part, [*specs][:2])],
         eq=[(4 // columns, 4), (4, 4 // columns)])  # fmt: skip

# %% [markdown]
# (`nb07.held` counts the bytes that device 0 holds of an array or a tree.)
#
# **`eqx.filter_shard`** does this to every array of a module, and leaves alone what is no
# array. It places arrays that nobody has placed yet. (`mx.load` places its weights on
# device 0; only `jax.device_put` moves those.)

# %%
linear = mx.layers.Linear(4, 4, dtype=jnp.float32, key=key)
linear = eqx.filter_shard(linear, place("data"))
print(type(linear).__name__, linear.weight.sharding.spec)
nb.check("bytes on a device of 64", nb07.held(linear), eq=64 // (8 // columns))
nb.say(
    "**Takeaway.** A spec cuts an array along the axes that it names, and copies it along "
    f'the others: `P(None, "model")` leaves {holders} copies on this mesh.'
)

# %% [markdown]
# ## A product in pieces
#
# Whether devices have to send something depends on the axis
# along which the matrix is cut. A weight here is `[outputs, inputs]`, and the product is
# `weight @ x`. Take 4 × 4 numbers and four devices, first by hand.

# %%
w, x = np.arange(16).reshape(4, 4), np.array([1, 0, 2, 1])
by_outputs = [w[i : i + 1] @ x for i in range(4)]  # a row each: one finished number
by_inputs = [w[:, i] * x[i] for i in range(4)]  # a column each: four unfinished ones

# %%
rows = [[f"device {i}", by_outputs[i], by_inputs[i]] for i in range(4)]
together = np.concatenate(by_outputs), np.sum(by_inputs, axis=0)
nb.table(["", "cut by outputs", "cut by inputs"], [*rows, ["together", *together]])
nb.check("cut by outputs, then put side by side", together[0].tolist(), eq=(w @ x).tolist())
nb.check("cut by inputs, then added up", together[1].tolist(), eq=(w @ x).tolist())

# %% [markdown]
# Cut by **outputs**, every device finishes its own numbers, and nothing has to be sent.
# Cut by **inputs**, each has a part of *every* sum, and the parts have to be added up
# across devices. That message is an **all-reduce**: everyone gives an array, everyone gets
# the sum. Messages in which all take part are called **collectives**. Another is the
# **all-gather**: everyone gives a part, everyone gets the whole.
#
# In JAX nobody has to write these messages. A jitted function gets arrays with shardings.
# XLA, the compiler of JAX, finds out what each device has to do, and inserts a message
# where a device lacks a part. (The axes of our mesh are of the type `Auto`, which allows
# that.) The result is a program in **HLO**, XLA's own language. It is the program of one
# device, and all run the same one. `nb07.program` compiles a function for given arguments
# (`function.lower(*arguments).compile()`), and counts the collectives in its HLO.

# %%
four = make_mesh({"model": 4})
put = lambda array, *spec: jax.device_put(jnp.float32(array), NamedSharding(four, P(*spec)))
product = jax.jit(lambda w, x: w @ x)
outputs_cut = nb07.program(product, put(w, "model"), put(x)).collectives
inputs_cut = nb07.program(product, put(w, None, "model"), put(x, "model")).collectives
print("by outputs:", outputs_cut, "  by inputs:", inputs_cut)

# %% [markdown]
# And this is the all-reduce as it stands in the program: `f32[4]`, the type and shape of
# the result; the message; and what goes in.

# %%
(found,) = nb07.message_lines(product, put(w, None, "model"), put(x, "model"))
print(found.partition(", channel_id")[0])
nb.check("messages of a product cut by outputs", sum(outputs_cut.values()), eq=0)
nb.check("all-reduces of a product cut by inputs", inputs_cut["all-reduce"], eq=1)

# %% [markdown]
# A feed-forward network is `w2 @ (silu(w1 @ x) * (w3 @ x))`: two products in, one out. Cut
# `w1` and `w3` by outputs, and `w2` by inputs. Each device then has a part of the hidden
# features, and `silu` and `*` act on each feature alone.
#
# **Predict.** How many messages does the whole network need: 3 (one for each matrix), 1
# or 0?

# %%
my_messages = None  # 3, 1 or 0

# %%
on_four = mx.shard(package, four)
network = on_four.layers[0].feed_forward
hidden = jax.random.normal(key, (8, config.dim))  # [T, D]
apply = jax.jit(lambda network, hidden: network(hidden))
sent = nb07.program(apply, network, put(hidden)).collectives
nb.guess(
    "Messages of a feed-forward network",
    my_messages,
    sum(sent.values()),
    why={
        3: "a device's hidden features are just the inputs that its part of `w2` takes.",
        0: "the last product is cut by inputs, so its parts have to be added up.",
    },
)

# %% [markdown]
# That is Megatron's trick (arXiv 1909.08053): cut the first product by outputs, the second
# by inputs, and send once. Attention has the same form, with heads in place of hidden
# features: `wq`, `wk`, `wv` by outputs, `wo` by inputs.
#
# Now the same by hand. **`jax.shard_map`** runs a function once on each device, with that
# device's parts as arguments; `jax.lax.psum` is the all-reduce.


# %%
def by_hand(x, w1, w2, w3, add=functools.partial(jax.lax.psum, axis_name="model")):
    inside = jax.nn.silu(x @ w1.T) * (x @ w3.T)
    return add(inside @ w2.T)


def on_each(function, **options):
    spec_in = (P(), P("model"), P(None, "model"), P("model"))
    mapped = jax.shard_map(function, mesh=four, in_specs=spec_in, out_specs=P(), **options)
    return jax.jit(mapped)(put(hidden), *matrices)


# %%
matrices = [getattr(network, name).weight for name in ("w1", "w2", "w3")]
whole = np.asarray(package.layers[0].feed_forward(hidden))  # on one device
nb.check("max|Δ|, by hand and one device", nb07.distance(on_each(by_hand), whole), lt=1e-4)
nb.check(
    "max|Δ|, four devices and one",
    nb07.distance(apply(network, put(hidden)), whole),
    lt=1e-4,
)
nb.check("messages of a feed-forward network", sent, eq={"all-reduce": 1})

# %% [markdown]
# Whoever writes messages by hand can forget one. `out_specs=P()` promises that all devices
# return the same array. JAX notices that without the sum they may not, and refuses:

# %%
forgotten = functools.partial(by_hand, add=lambda x: x)
try:
    on_each(forgotten)
    refused = False
except ValueError as error:
    refused = True
    told = str(error)
    told = (told.partition("was given ")[2] or told).partition("\n")[0]
    print("ValueError: ...", told.partition(" at 0x")[0], "...")
nb.check("a forgotten sum is refused", refused, eq=True)

# %% [markdown]
# But that check can be switched off, with `check_vma=False`. (The package does so in
# `mesh.py`, where it runs kernels on each device.) Then the program runs without an error,
# and each device returns another "result":

# %%
wrong = on_each(forgotten, check_vma=False)
first = [float(shard.data[0, 0]) for shard in wrong.addressable_shards]
print("number 0 according to each device:", np.round(first, 3), " right:", whole[0, 0])
nb.check("max|Δ|, the sum forgotten", nb07.distance(wrong, whole), gt=0.01)
nb.check("different results among four devices", len(set(first)), eq=4)

# %% [markdown]
# The package writes a `psum` by hand in one place, for the **experts** of a Mixtral:
# several feed-forward networks in a block, of which each token takes a few and mixes what
# they give ([08](08_mixtral.ipynb)). There `check_vma` is off, so only a comparison
# notices if the sum is missing. Here it is, for one layer with four random experts, on
# `expert` 2 × `model` 2:

# %%
mixtral = nb07.random_mixtral(config)
experts_apart = make_mesh({"expert": 2, "model": 2})
spread = mx.shard(mixtral, experts_apart)
mix = jax.jit(lambda model, tokens: model(tokens)[0])
alone, shared = mix(mixtral, text[0]), mix(spread, text[0])
nb.check(
    "max|Δ| logits, experts on four devices and on one",
    nb07.distance(alone, shared),
    lt=1e-3,
)

# %% [markdown]
# That comparison cannot see a fault that both share. So take a mixture that is known
# beforehand: if all experts are copies of one network, the mixture is that network, because
# the weights of the chosen sum to one.

# %%
get = lambda model: model.layers[0].feed_forward
first = jax.tree.map(lambda w: w[:1], get(mixtral).experts)
copies = jax.tree.map(lambda w: jnp.repeat(w, 4, axis=0), first)
alike = eqx.tree_at(lambda m: get(m).experts, mixtral, copies)
dense = eqx.tree_at(get, mixtral, jax.tree.map(lambda w: w[0], first))
gap = nb07.distance(mix(mx.shard(alike, experts_apart), text[0]), mix(dense, text[0]))
nb.check("max|Δ| logits, equal experts on four devices and one network", gap, lt=1e-3)

# %%
nb.say(
    "**Takeaway.** Cut by outputs, a product costs no message; cut by inputs, one sum. A "
    f"feed-forward network of three matrices costs {sum(sent.values())}."
)

# %% [markdown]
# ## Who holds what
#
# `mx.shard` places a whole model. A table in `sharding.py` has the spec of every matrix, by
# the end of its name, and this puts the arrays there:

# %%
nb.show_source(sharding.shard)

# %% [markdown]
# (`in_stages` does nothing here; it is for notebook 08.) Each axis of the package's meshes
# has a purpose: `data` divides the rows of a batch; `model` divides heads, hidden features
# and the vocabulary. We take `data` 2 × `model` 4; the knob may change that.
#
# The embedded model has 8 query heads, and only 2 heads of keys and values, each shared by
# four query heads. A head is 32 numbers wide, so `wk` has 64 rows.
#
# **Predict.** How many rows of `wk` does a device hold when `model` is 4: 16, 32 or 64?

# %%
my_rows = None  # 16, 32 or 64

# %%
n = nb.knob(4, of=(2, 4, 8))
model = mx.shard(package, make_mesh({"data": 8 // n, "model": n}))
wk = model.layers[0].attention.wk.weight
rows_of_wk = wk.addressable_shards[0].data.shape[0]
nb.guess(
    f"Rows of `wk` on a device, model={n}",
    my_rows,
    rows_of_wk,
    why={
        16: "that is half a head, and a query needs whole keys.",
        64: "a device needs only the head that its own queries look at.",
    },
)

# %% [markdown]
# Heads are not cut. If `model` has more devices than there are key heads, the package
# splits that axis of the mesh in two, `model` and `sharing_kv_head`. Key heads are spread
# over the first; devices that differ only in the second hold the same key head. Everything
# else is spread over both.
#
# Now all matrices, the prediction beside the truth. Into how many parts each axis of each
# matrix should be cut is typed in, from the reasoning above. (`tok_embeddings` and `output`
# are cut by vocabulary: each device knows some of the tokens.)

# %%
shared_heads = min(n, config.n_kv_heads)
cuts = {
    "tok_embeddings": (n, 1), "wq": (n, 1), "wk": (shared_heads, 1),
    "wv": (shared_heads, 1), "wo": (1, n), "w1": (n, 1), "w2": (1, n), "w3": (n, 1),
    "norm": (1,), "output": (n, 1),
}  # fmt: skip

# %% [markdown]
# Beside it stand `weight.sharding.spec`, what the array itself says of its place, and the
# shape of `addressable_shards[0].data`, what device 0 really has.

# %%
block = model.layers[0]
arrays = {name: getattr(model, name) for name in ("tok_embeddings", "norm", "output")}
arrays |= {name: getattr(block.attention, name) for name in ("wq", "wk", "wv", "wo")}
arrays |= {name: getattr(block.feed_forward, name) for name in ("w1", "w2", "w3")}
short = lambda spec: str(spec).replace("sharing_kv_head", "sharing")

# %%
rows, wrong = [], []
for name, cut in cuts.items():
    weight = arrays[name].weight
    predicted = tuple(int(i) for i in np.array(weight.shape) // cut)
    real = weight.addressable_shards[0].data.shape
    wrong += [name] if predicted != real else []
    rows.append([name, weight.shape, short(weight.sharding.spec), predicted, real,
                 nb07.held(weight) // 1024])  # fmt: skip
header = ["weight", "shape", "spec", "predicted part", "real part", "KiB a device"]
nb.table(header, rows)
nb.check("weights whose part is not the predicted one", wrong, eq=[])

# %% [markdown]
# (A spec may name several axes of the mesh for one axis of an array: `("model", "sharing")`
# cuts it over both. `sharing` is short for `sharing_kv_head`. `fsdp`, for training, and
# `pipe`, for notebook 08, have one device each, so they cut nothing.) As a map:

# %%
nb07.draw_block(block)
nb.caption(
    "the matrices of a block, to scale, and in each part the devices that hold it. `wq`, "
    "`w1` and `w3` are cut by outputs, `wo` and `w2` by inputs. `wk` and `wv` never have "
    "more parts than there are key heads."
)


# %%
def cut_into(name):  # the parts of each axis, as all devices hold them
    weight = arrays[name].weight
    parts = weight.sharding.devices_indices_map(weight.shape).values()
    return [len({str(part[axis]) for part in parts}) for axis in range(2)]


nb.check("cuts of wq, w1, w3", [*map(cut_into, ("wq", "w1", "w3"))], eq=[[n, 1]] * 3)
nb.check("cuts of wo, w2", [*map(cut_into, ("wo", "w2"))], eq=[[1, n]] * 2)
nb.check("cuts of wk, wv", [*map(cut_into, ("wk", "wv"))], eq=[[min(n, 2), 1]] * 2)

# %% [markdown]
# And the cache, which keeps the keys and values of the tokens that `mx.prefill` reads? It
# is spread like the keys: the rows of the batch over `data`, and key heads over `model`
# (its first part alone). In the code below that is
# `PartitionSpec(*rows, *stages, "model")`, where `stages` is empty here. (`WHOLE` is `P()`;
# `eqx.tree_at` copies a tree and replaces some of its leaves.)

# %%
nb.show_source(sharding.cache_shardings)

# %%
cache, _ = mx.prefill(model, text.tolist())
keys = cache.layers[0].keys
real = keys.addressable_shards[0].data.shape
predicted = (keys.shape[0] // (8 // n), keys.shape[1] // shared_heads, *keys.shape[2:])
print(f"keys of a layer {keys.shape}, on a device {real}")
nb.check("part of the cache on a device, as predicted", real, eq=predicted)

# %% [markdown]
# In bytes: the parts of the cache are as many as the parts of the rows times the parts of
# the key heads. Of the weights a device holds one part in `n`, with two exceptions. It has
# the norms whole, and of `wk` and `wv` it has one key head.

# %%
total = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
share = total / nb07.held(cache.layers)
nb.check("parts of the cache", share, eq=8 // n * shared_heads)
norm_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(package) if leaf.ndim == 1)
whole_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(package))
pair = sum(
    b.attention.wk.weight.nbytes + b.attention.wv.weight.nbytes for b in package.layers
)
expected = (whole_bytes - norm_bytes - pair) // n + norm_bytes + pair // shared_heads
nb.check("bytes of the weights on a device", nb07.held(model), eq=expected)

# %% [markdown]
# Weights in eight bits ([10](10_fewer_bits.ipynb)) are cut in the same places. There each
# row of a matrix has a **scale**, by which its whole numbers are multiplied. Where rows are
# cut into pieces, as in `wo`, each device needs the scales of all rows.

# %%
small = mx.quantize(package, "int8")
on_eight = mx.shard(small, sharding.mesh_of(model))
scales = on_eight.layers[0].attention.wo.scales
nb.check("scales of wo on a device, of 256", nb07.held(scales) // scales.itemsize, eq=256)
cut, whole, exact = (np.asarray(forward(m, text)) for m in (on_eight, small, package))
gap = nb07.distance(cut, whole)
nb.check("max|Δ| logits, int8 on eight devices and on one", gap, lt=1e-3)
nb.check("mean|Δ| logits, int8 and float32", np.abs(cut - exact).mean(), lt=0.1)

# %% [markdown]
# Now Mistral 7B, from shapes alone. `jax.eval_shape` calls a function without computing: it
# returns the shapes and dtypes of the results. So the 7B below takes no memory. And on an
# `AbstractMesh`, which has axes and sizes but no devices, the package says where its parts
# would be. `v0.3` has 32 query heads, 8 key heads and no window. Its cache here has 8 rows
# of 32,768 tokens.
#
# **Predict.** From 8 to 32 devices along `model`, by which factor does the cache of a
# device shrink: 4, 2 or 1 (not at all)?

# %%
my_shrink = None  # 4, 2 or 1

# %%
released = mx.RELEASED["mistral-7b-v0.3"]
shapes, cache_shapes = nb07.skeletons(released, rows=8, tokens=32768)


def reckon(size):  # GiB of weights and cache on a device
    places = sharding.shardings(shapes, jax.sharding.AbstractMesh((size,), ("model",)))
    of_cache = sharding.cache_shardings(cache_shapes, places.norm.weight.mesh).layers
    return nb07.gibibytes(shapes, places), nb07.gibibytes(cache_shapes.layers, of_cache)


# %% [markdown]
# `shardings` is the function that `mx.shard` calls. Both functions are asked about meshes
# of 1 to 32 devices:

# %%
many = [1, 2, 4, 8, 16, 32]
weights, caches = np.array([reckon(size) for size in many]).T
nb.guess(
    "From 8 to 32 devices, the cache of a device shrinks by",
    my_shrink,
    float(caches[3] / caches[5]),
    why={
        4: "there are 8 key heads, and a head is not cut.",
        2: "with 8 key heads there are never more than 8 parts of them.",
    },
)

# %%
figure, axis = plt.subplots(figsize=(7, 3.8))
axis.loglog(many, weights, label="weights", base=2)
axis.loglog(many, caches, label="cache, 8 × 32,768 tokens", base=2)
axis.axvline(released.n_kv_heads, color="0.6", linewidth=1, marker="", linestyle="-")
axis.set_xticks(many, many)
ticks = [0.5, 1, 2, 4, 8, 16, 32]
axis.set_yticks(ticks, ticks)
axis.set(xlabel="devices along model (grey line: the number of key heads)",
         ylabel="on each device (GiB)")  # fmt: skip
axis.legend()
nb.caption(
    "up to 8 devices both halve when the devices double. From there on the weights still "
    "shrink, and the cache does not."
)

# %% [markdown]
# Beyond 8 devices, those that share a key head hold the same keys. So a longer axis `model`
# does not help a cache that is too large. An axis `data` does: it divides the rows.

# %%
halvings = lambda sizes: [round(float(a / b), 2) for a, b in zip(sizes, sizes[1:])]
print("weights:", halvings(weights))
nb.check("7B: cache, each mesh over the next", halvings(caches), eq=[2, 2, 2, 1, 1])
nb.check("7B: weights, up to 8 devices", min(halvings(weights)[:3]), gt=1.95)
nb.check("7B: weights, from 8 devices on", min(halvings(weights)[3:]), gt=1.8)
nb.say(
    f"**Takeaway.** On model={n} a device holds {nb07.held(model) / whole_bytes:.0%} of "
    f"the weights and one of {share:.0f} parts of the cache. No key head is cut."
)

# %% [markdown]
# ## Two ports and torch
#
# The one-file port knows nothing of devices. But its weights are arrays, and have the same
# names as the package's. So `eqx.filter_shard` can put them where the package's are, and
# its code, **unchanged**, runs on eight devices. Our torch model has no messages in it, and
# stays on one.

# %%
mesh = make_mesh({"data": 2, "model": 4})
model = mx.shard(package, mesh)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
name_of = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
named = lambda tree: {name_of(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
places = {name: leaf.sharding for name, leaf in named(model).items()}
nb.check(
    "the two ports' weights have the same names",
    set(places) == set(named(one_file)),
    eq=True,
)

# %% [markdown]
# `like` is a tree that has, for each array, the place of the package's array of that name.
# `filter_shard` takes such a tree, too.

# %%
like = jax.tree_util.tree_map_with_path(lambda path, _: places[name_of(path)], one_file)
spread_one_file = eqx.filter_shard(one_file, like)
positions, empty = jnp.arange(64), one_file.empty_cache(8, 64)
run = jax.jit(lambda model, tokens: model(tokens, positions, empty)[0])

# %% [markdown]
# `shard_rows` is the package's function that spreads a batch over `data`. Both ports on one
# device, both on eight, and then torch:

# %%
rows_apart = sharding.shard_rows(jnp.asarray(text), model)  # [B, T], 4 rows for each half
logits = {
    "package, 1 device": forward(package, text),
    "package, 8 devices": forward(model, rows_apart),
    "one file, 1 device": run(one_file, text),
    "one file, 8 devices": run(spread_one_file, rows_apart),
}
logits = {name: np.asarray(array) for name, array in logits.items()}  # [B, T, V]


# %%
def ask_torch(twin):
    import torch

    out = twin(torch.tensor(text, dtype=torch.long))
    return torch.cat([out[:, -1], out.argmax(-1).float()], dim=1)


answer = oracle("logits", ask_torch)
torch_last, torch_best = answer[:, : config.vocab_size], answer[:, config.vocab_size :]

# %% [markdown]
# For all 512 tokens the largest difference of a logit (torch: for the last token of each
# row), and how often the most likely next token is the same:

# %%
truth = logits["package, 1 device"]
best = truth.argmax(-1)
rows = [
    [
        name,
        nb07.distance(array, truth),
        f"{int((array.argmax(-1) == best).sum())} of {best.size}",
    ]
    for name, array in logits.items()
]
same = int((torch_best == best).sum())
rows.append(
    ["torch, 1 device", nb07.distance(torch_last, truth[:, -1]), f"{same} of {best.size}"]
)
nb.table(["", "max abs Δ logits", "same argmax"], rows)

# %%
for name, gap, agreement in rows[1:]:
    nb.check(f"max|Δ| logits to package on 1 device, {name}", gap, lt=1e-3)
    nb.check(f"same argmax, {name}", agreement, eq="512 of 512")
sent = nb07.program(forward, model, rows_apart).collectives
sent_too = nb07.program(run, spread_one_file, rows_apart).collectives
nb.check("both ports on 8 devices send the same messages", sent_too == sent, eq=True)

# %% [markdown]
# The difference in code: the package has a function that knows the specs, `mx.shard`; the
# one-file port was placed by names. Last, eight devices write, with a cache, and one device
# reads what they wrote, without. Would it have chosen the same tokens?

# %%
said = "To be, or not"
written = mx.generate(model, tokenizer, said, temperature=0.0, max_tokens=24)
print(written)
read = np.array(tokenizer.encode(said) + written.tokens)
would_write = forward(package, read[None, :-1])[0].argmax(-1)  # each next token
same = int((would_write == read[1:])[-24:].sum())
nb.check("tokens of 8 devices that 1 would write, of 24", same, eq=24)
nb.say(
    "**Takeaway.** Two ports on one device and on eight, and torch on one, agree to "
    f"{max(row[1] for row in rows):.0e} in the logits. Only arrays were placed; no code of "
    "the model was changed."
)

# %% [markdown]
# ## Which messages
#
# Now count the messages of a whole model. You know that `wo` and `w2` of each block are cut
# by inputs, so each costs an all-reduce.
#
# **Predict.** The embedded model has 6 blocks. How many all-reduces are in the program of
# its forward pass on `data` 2 × `model` 4: 12, 13 or 24?

# %%
my_sums = None  # 12, 13 or 24

# %%
n = nb.knob(4, of=(1, 2, 4, 8))
model = mx.shard(package, make_mesh({"data": 8 // n, "model": n}))
tokens = sharding.shard_rows(jnp.asarray(text), model)
sent = nb07.program(forward, model, tokens).collectives
nb.guess(
    f"All-reduces of a forward pass, model={n}",
    my_sums,
    sent.get("all-reduce", 0),
    why={
        12: "two a block is right, but the embeddings are cut, too.",
        24: "each all-reduce is in the program once, which all devices run.",
    },
)

# %% [markdown]
# The thirteenth is for the embeddings. Their table is cut by vocabulary, so among the
# devices along `model` only one has a token's vector. The others give zeros, and a sum
# makes the vector known to all. The output is cut by
# vocabulary too: every device computes the logits of its own words, and they stay apart
# until a program needs them together.
#
# Here is the first sum after a product, with its shape and with `replica_groups`, the
# groups of devices that add. (Newer versions of JAX write `[2,4]<=[8]` for two groups of
# four.)

# %%
lines = nb07.message_lines(forward, model, tokens)
for line in [line for line in lines if "dot_general" in line][:1]:
    print(line.partition(", use_global")[0].replace(", channel_id", "\n  channel_id"))
    added = np.prod(nb07.message_shape(line)[1])
    nb.check("numbers in a sum, of a group's rows", int(added), eq=n * 64 * config.dim)

# %% [markdown]
# With `model` 4 there are two groups, and each adds up what belongs to its own half of the
# rows. Does the count depend on how many devices there are?

# %%
meshes = [{"model": size} for size in (1, 2, 4, 8)] + [{"data": 8}, {"data": 2, "model": 4}]
counted = {}
for sizes in meshes:
    there = mx.shard(package, make_mesh(sizes))
    arguments = there, sharding.shard_rows(jnp.asarray(text), there)
    predicted = 0 if sizes.get("model", 1) == 1 else 2 * config.n_layers + 1
    name = "\n".join(f"{axis} {size}" for axis, size in sizes.items())
    counted[name] = predicted, nb07.program(forward, *arguments).collectives
    expected = {"all-reduce": predicted} if predicted else {}
    nb.check(f"messages, {name.replace(chr(10), ' x ')}", counted[name][1], eq=expected)

# %%
nb07.draw_counted(counted)
nb.caption(
    "the number of messages does not depend on how many devices `model` has, if it has "
    "more than one. Over `data` alone none is sent."
)

# %% [markdown]
# Writing text takes two more (its loop is in [06](06_choosing_the_next_token.ipynb)). The
# choice of a token needs the logits of all words, so there is an all-gather. And the loop
# stops when the rows of all devices have ended: an all-reduce over `data`.
#
# The cache is an argument and a result of this step. The package **donates** it: JAX may
# write the new cache into the memory of the old, and `aliased` counts the bytes for which
# XLA does so.

# %%
cache, next_logits = mx.prefill(model, text.tolist(), max_tokens=8)
state = mx.DecodeState.start(model, cache, next_logits, max_tokens=8, key=key)
decode = nb07.program(mx.decode, model, state, jnp.int32(8))
expected = {"all-reduce": (0 if n == 1 else 2 * config.n_layers + 1) + (n < 8)}
expected |= {"all-gather": 1} if n > 1 else {}
print(decode.collectives)
nb.check(f"messages of a decode step, model={n}", decode.collectives, eq=expected)
nb.check(
    "bytes changed in place over those of the cache",
    decode.aliased / nb07.held(cache),
    gt=0.99,
)

# %%
nb.say(
    f"**Takeaway.** A forward pass over `model` sends two sums a block and one for the "
    f"embeddings, {2 * config.n_layers + 1} for {config.n_layers} blocks, on any number of "
    "devices above one."
)

# %% [markdown]
# ## One wrong spec
#
# Here is a mistake that is easily made: the spec of `wo` with its two entries swapped, so
# that `wo` is cut by outputs.
#
# **Predict.** What happens: "an error", "wrong numbers" or "the same numbers"?

# %%
my_outcome = None  # "an error", "wrong numbers" or "the same numbers"

# %%
sound = mx.shard(package, make_mesh({"data": 2, "model": 4}))
tokens = sharding.shard_rows(jnp.asarray(text), sound)
at = lambda *spec: NamedSharding(sharding.mesh_of(sound), P(*spec))
both = ("model", "sharing_kv_head")  # the two parts of the package's axis


def misplaced(get, place):
    old = get(sound)
    return eqx.tree_at(get, sound, [jax.device_put(array, place) for array in old])


# %% [markdown]
# `misplaced` returns the model with some of its arrays in another place.

# %%
get_wo = lambda model: [block.attention.wo.weight for block in model.layers]
swapped = misplaced(get_wo, at(both, None))
truth = np.asarray(forward(package, text))
gap = nb07.distance(forward(swapped, tokens), truth)
nb.guess(
    "With `wo` cut the wrong way you get",
    my_outcome,
    "the same numbers" if gap < 1e-3 else "wrong numbers",
    why={
        "an error": "every placement is allowed: the compiler moves what is missing.",
        "wrong numbers": "a spec says where arrays are, not what is computed.",
    },
)

# %% [markdown]
# Whatever the specs are, the compiler must deliver what one device would, and pays with
# messages. So the test that everybody writes first, "sharded equals unsharded", **cannot
# find a wrong spec**. Read the program instead. What is sent, of which shape, and how
# often?

# %%
kinds = nb07.kinds_of_messages(forward, sound, tokens)
wrong_kinds = nb07.kinds_of_messages(forward, swapped, tokens)
every = sorted({**kinds, **wrong_kinds}, key=lambda kind: -wrong_kinds.get(kind, 0))
rows = [[kind, kinds.get(kind, 0), wrong_kinds.get(kind, 0)] for kind in every]
nb.table(["message", "`wo` by inputs", "`wo` by outputs"], rows)

# %% [markdown]
# `[4, 64, 256]` is the **residual stream** of a device's rows: the vector of each token
# that goes from block to block. Its sums should be there, two a block and one; its
# all-gathers should not. And look at the sums of `[4, 64]`, one number for each token:
# here there is one for each norm. XLA has taken `wo`'s cut over to the residual
# stream, so each device keeps a part of the features. Then the mean square of a token has
# to be summed across devices, and the features have to be gathered for the matrices that
# need them all.

# %%
right, broken = nb07.program(forward, sound, tokens), nb07.program(forward, swapped, tokens)
least = 2 * config.n_layers + 1
nb.check("messages, wo by inputs", right.collectives, eq={"all-reduce": least})
gathered = broken.collectives.get("all-gather", 0)
nb.check("all-gathers, wo by outputs", gathered, gt=config.n_layers - 1)
of_norms = sum(n for kind, n in wrong_kinds.items() if kind.endswith("[4, 64]"))
nb.check("messages of a number for each token", of_norms, gt=config.n_layers - 1)
print(f"norms in the model, two a block and one behind the last: {least}")
nb.check("bytes that come in, both", broken.arguments == right.arguments, eq=True)

# %% [markdown]
# The bytes are what they were: a quarter of `wo` is a quarter, whichever way it is cut.
# Which check sees which mistake? We compare three things: the numbers, the bytes of the
# arguments on a device, and the messages. We make four mistakes:
#
# 1. `wo` is cut by outputs.
# 2. `wq` is whole on every device.
# 3. The cache is whole on every device.
# 4. The sum of the feed-forward network is forgotten, by hand, as above.
#
# **Predict.** Which of the three sees number 2: "numbers", "bytes" or "messages"?

# %%
my_check = None  # "numbers", "bytes" or "messages"


# %%
def compare(name, function, good, bad):
    a, b = nb07.program(function, *good), nb07.program(function, *bad)
    gap = nb07.distance(function(*bad)[-1], function(*good)[-1])
    more = b.arguments / a.arguments - 1
    seen[name] = [gap > 1e-3, abs(more) > 0.01, a.collectives != b.collectives]
    before, after = sum(a.collectives.values()), sum(b.collectives.values())
    words.append([f"Δ {gap:.0e}" if gap else "Δ 0", f"{more:+.0%}", f"{before} to {after}"])


# %% [markdown]
# Each mistake goes through one step of the real program, which takes the model, the cache
# and a token for each row. First, its arguments, sound and wrong:

# %%
step = jax.jit(mx.decoding.forward)  # (cache, logits) of one more token
filled, _ = mx.prefill(sound, text.tolist(), max_tokens=8)
token = sharding.shard_rows(jnp.asarray(text[:, :1]), sound)
get_wq = lambda model: [block.attention.wq.weight for block in model.layers]
whole_wq = misplaced(get_wq, at())
layers = jax.device_put(filled.layers, at())
whole_cache = eqx.tree_at(lambda cache: cache.layers, filled, layers)

# %%
seen, words = {}, []
compare("1 wo by outputs", step, (sound, filled, token), (swapped, filled, token))
compare("2 wq whole", step, (sound, filled, token), (whole_wq, filled, token))
compare("3 cache whole", step, (sound, filled, token), (sound, whole_cache, token))


# %% [markdown]
# The fourth cannot be made by a spec, only by hand: `w2`'s product under `shard_map`, with
# the sum and without. (`static_argnums=2`: `jit` takes `forget` as a Python value.)


# %%
def summed(x, w2, forget):
    each = lambda x, w2: (x @ w2.T if forget else jax.lax.psum(x @ w2.T, both),)
    specs = (P(None, both), P(None, both))
    options = dict(mesh=at().mesh, in_specs=specs, out_specs=(P(),), check_vma=False)
    return jax.shard_map(each, **options)(x, w2)


inside = jax.device_put(jax.random.normal(key, (8, config.hidden_dim)), at(None, both))
w2 = sound.layers[0].feed_forward.w2.weight
run = jax.jit(summed, static_argnums=2)
compare("4 sum forgotten", run, (inside, w2, False), (inside, w2, True))

# %%
sees = dict(zip(("numbers", "bytes", "messages"), seen["2 wq whole"]))
nb.guess(
    "What sees that `wq` is whole on every device",
    my_check,
    ", ".join(name for name, yes in sees.items() if yes),
    why={
        "numbers": "a placement changes no number.",
        "messages": "a device that has all rows takes its own, and asks nobody.",
    },
)

# %% [markdown]
# A device with all of `wq` uses the rows that it needs, and sends nothing. All four
# mistakes:

# %%
nb07.draw_seen(seen, ["numbers", "bytes", "messages"], words)
nb.caption(
    "a dark cell means that the check sees the fault; in the cell stands what it measures. "
    "No column is dark throughout. The numbers see only the forgotten sum, and only the "
    "bytes see that `wq` is whole."
)

# %%
names = ["numbers", "bytes", "messages"]
told = {fault: [n for n, yes in zip(names, row) if yes] for fault, row in seen.items()}
nb.check("what sees wo by outputs", told["1 wo by outputs"], eq=["messages"])
nb.check("what sees wq whole", told["2 wq whole"], eq=["bytes"])
nb.check("bytes see the cache whole", "bytes" in told["3 cache whole"], eq=True)
nb.check("numbers see the cache whole", "numbers" in told["3 cache whole"], eq=False)
nb.check("what sees a forgotten sum", told["4 sum forgotten"], eq=["numbers", "messages"])
nb.check("checks that see all four faults", sum(map(all, zip(*seen.values()))), eq=0)

# %% [markdown]
# **Takeaway.** Of four mistakes the numbers show one. Check a sharded program by all three:
# its numbers, its bytes and its messages.
#
# ## What to believe of pretend devices
#
# Eight devices share the batch: with `data` 8 each has one row to read.
#
# **Predict.** How many times faster do these eight read it than one does: 8, 4 or 1 (not
# faster)?

# %%
my_speedup = None  # 8, 4 or 1

# %%
layouts = [{"model": 1}, {"data": 8}, {"data": 2, "model": 4}, {"model": 8}]
timed = {}
for sizes in layouts:
    there = mx.shard(package, make_mesh(sizes))
    tokens = sharding.shard_rows(jnp.asarray(text), there)
    compiled = forward.lower(there, tokens).compile()
    work = compiled.cost_analysis()["flops"]
    name = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    timed[name] = work, nb.timeit(lambda: compiled(there, tokens), repeats=5)

work = {name: flops for name, (flops, _) in timed.items()}
faster = timed["model 1"][1].median / timed["data 8"][1].median
nb.guess(
    "Times faster, eight devices of `data` and one (the nearest of 8, 4 and 1)",
    my_speedup,
    min((8, 4, 1), key=lambda option: abs(np.log(faster / option))),
    why={
        8: "each has an eighth of the work, but all compute on the cores that one had.",
        4: "there are no more cores for eight pretend devices than for one.",
    },
)

# %% [markdown]
# For each mesh the work, as the compiler counts it (`cost_analysis`), and the time:

# %%
nb07.draw_work(timed)
nb.caption(
    "above, dark, what a device has to do: an eighth, or close to it. The light bar is "
    "all eight together: no less than one device alone. Below, what the clock says on this "
    "machine; another has another picture."
)

# %%
one = work["model 1"]
total = min(8 * flops for name, flops in work.items() if name != "model 1")
nb.check("work of one over that of a device, data 8", one / work["data 8"], gt=6)
nb.check(
    "least work of one over that of one of eight", one / max([*work.values()][1:]), gt=6
)
nb.check("work of all eight together over that of one", total / one, gt=0.95)

# %% [markdown]
# Why is `model 8` above the eighth? Four of its devices share a key head, and each computes
# the keys and values of that head for itself. The work of a product grows with the size of
# its matrix, so the matrices' bytes and the work should have the same ratio.

# %%
narrow = mx.shard(package, make_mesh({"model": 8}))
of_matrices = lambda model: nb07.held((model.layers, model.output))
ratio = of_matrices(package) / of_matrices(narrow)
nb.check("matrices of one over those of a device, model 8", ratio, lt=7.5)
nb.check("the same of the work", one / work["model 8"], near=ratio, rtol=0.05)

# %% [markdown]
# So what may you believe?
#
# - **Yes**: the specs; the part and the bytes on each device; the numbers that come out.
# - **No**: any time; how long a message takes, and whether a computation goes on meanwhile;
#   whether the program fits into a chip's memory.
# - **Half**: the messages, because each compiler chooses its own.
#
# For the last, ask the compiler of the chip. That needs no chip. With libtpu, which has
# XLA for Google's TPUs (`pip install 'mistral_eqx[tpu-compiler]'`), this section compiles
# for eight TPU v5e; otherwise it shows what was recorded.

# %%
on_tpu, source = nb07.tiny_on_v5e()
on_cpu = nb07.compile_tiny("cpu")

# %%
rows = [[name, on_cpu[name]["collectives"], on_tpu[name]["collectives"]] for name in on_cpu]
nb.table(["program", "pretend CPUs", f"v5e ({source})"], rows)
for name in on_cpu:
    found = on_tpu[name]["collectives"].get("all-reduce", 0)
    nb.check(f"all-reduces for the v5e, {name}", found, gt=least - 1)

# %% [markdown]
# All have the two sums a block and the one for the embeddings. Where the columns differ,
# the compilers have made different choices. The 7B takes longer to compile than a notebook
# should. The command is
#
# ```sh
# JAX_PLATFORMS=cpu python -m mistral_eqx plan --shape mistral-7b-v0.3 \
#     --mesh model=8 --compile v5e:2x4
# ```
#
# and these are its figures, recorded:

# %%
big = nb07.recorded()["7b"]
nb.table(
    ["Mistral 7B, model=8", "comes in (GB a chip)", "made on the way (MB)", "messages"],
    [
        [name, p["arguments"] / 1e9, p["temporaries"] / 1e6, p["collectives"]]
        for name, p in big.items()
    ],
)
cache_of_one = 2 * 32 * 4096 * 128 * 2  # keys and values, layers, tokens, head, bytes
from_shapes = weights[3] * 2**30 + cache_of_one
nb.check("7B, bytes that come in: compiled, and from shapes", big["decode"]["arguments"],
         near=float(from_shapes))  # fmt: skip

# %%
nb.say(
    "**Takeaway.** On eight pretend devices the work of each falls to "
    f"1/{one / work['data 8']:.0f}, and the time was {1 / faster:.1f} times that of one. "
    "Trust their bytes, not their clock."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: build a table in parts** (●● 10 minutes). A device holds `part`, the rows
# `first`, `first + 1`, ... of an embedding table. What does it give to the sum for
# `tokens` (`[T]`)? For tokens that other devices hold it must add nothing.
#
# <details><summary>Hint</summary>
#
# A token's row in the part is `tokens - first`, if that is a row at all. Take some row for
# the others (`jnp.clip`), and replace it with zeros (`jnp.where`).
#
# </details>
#
# {{solution:look_up_here}}


# %%
def look_up_here(part, tokens, first):
    return NotImplemented


ex07.check_look_up_here(look_up_here)

# %% [markdown]
# **Exercise 2: repair the end of a block** (●● 5 minutes). This ran on four devices, by
# hand, under `shard_map`. All devices agreed, and the text was nonsense:
#
# ```python
# def close(residual, partial, psum):  # the device's copy, and its part of wo's product
#     return psum(residual + partial)
# ```
#
# <details><summary>Hint</summary>
#
# Every device has the residual. How often does the sum count it?
#
# </details>
#
# {{solution:close}}


# %%
def close(residual, partial, psum):
    return NotImplemented


ex07.check_close(close)

# %% [markdown]
# **Exercise 3: the size of the messages** (●● 5 minutes). Mistral 7B (`L` = 32, `D` =
# 4096) writes one token in bfloat16 on `model=8`. How many bytes does one device put into
# all-reduces? A whole number.
#
# <details><summary>Hint</summary>
#
# The number of sums, from "Which messages", and what each adds up: a vector as wide as the
# residual stream.
#
# </details>
#
# {{solution:message_bytes}}

# %%
message_bytes = NotImplemented
ex07.check_message_bytes(message_bytes)

# %% [markdown]
# ## Recap

# %%
keys_held = "whole heads; where there are more devices than heads, several hold the same"
count = f"2 · {config.n_layers} + 1 = {least}, on any number of devices above one"
answers = {
    "Who holds a matrix?": "its spec says: cut along the axes named, copied along the rest",
    "Which product costs a message?": "one that is cut by inputs: an all-reduce",
    "How many messages has a forward pass over `model`?": count,
    "Which keys does a device hold?": keys_held,
    "How is a wrong spec found?": "by bytes or messages; the numbers stay right",
}
nb.table(["question", "answer"], [*answers.items()])
nb.recap()

# %%
nb.say(
    "**The answer.** On `data` 2 × `model` 4 each device holds "
    f"{nb07.held(sound) / 1e6:.1f} MB of {nb07.held(package) / 1e6:.1f} MB: some heads, "
    "some hidden features and some words. For a forward pass the four devices along "
    f"`model` add up {least} times, and along `data` nothing is sent."
)

# %% [markdown]
# **What we did not show**: training, where gradients are summed over `data`, and `fsdp`
# spreads the weights over the devices of a batch; meshes of several hosts; the axis type
# `Explicit`, with which JAX puts shardings into types; how long messages take.
#
# **Further reading**: Shoeybi et al., Megatron-LM, arXiv 1909.08053, §3 (cut by outputs,
# then by inputs); Xu et al., GSPMD, arXiv 2105.04663, §3 (how a compiler finds the
# messages); Rajbhandari et al., ZeRO, arXiv 1910.02054, §5 (`fsdp`); Pope et al., arXiv
# 2211.05102, §3 (which cut for inference).
#
# **Next**: [08 Mixtral](08_mixtral.ipynb), whose experts are on different devices.
