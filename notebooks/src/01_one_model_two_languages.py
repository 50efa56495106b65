# ---
# jupyter:
#   budget: 120
#   cover: 1
# ---

# %% [markdown]
# # One model, two languages
#
# **What changes when a PyTorch module becomes an Equinox module, and how do you prove
# that nothing else did?**
#
# - **You will be able to** read an Equinox module if you know torch; change a model
#   without mutating it; load weights by their path; compare two programs layer by layer;
#   and tell porting bugs apart by the shape of their error.
# - **Before this**: nothing. You know PyTorch and have never seen JAX.
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/` (the package), `one_file_ref.py` (the port of
#   Mistral's reference, line by line) and `torch_mistral.py` (the same model in PyTorch).
# - **Model and data**: the embedded model (6 layers, 256 wide, a sliding window of 64
#   tokens) and Shakespeare that it has never been trained on.
# - **Torch**: live if installed, else its recorded answers. All cells run without it.
# - **Predict first**: what does `jax.grad` do with a number that is no weight? How far
#   apart are the logits of two right programs? Which bugs does the first token not show?
#
# The letters: `T` tokens, `D` width of the residual stream, `L` layers, `V` vocabulary;
# the legend of all notebooks is in [README.md](README.md).

# %%
import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
import nb01
import nbtools as nb
import one_file_ref
from exercises import ex01


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("01")
package, tokenizer = mx.load(dtype=jnp.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
tokens = nb.held_out(128)
text = jnp.asarray(tokens)  # [T]
start = " ".join(tokenizer.decode(tokens).split()[:10])
nb.say(f"The text begins: *{start} ...*")

# %% [markdown]
# `read` below runs a model over the text, and gives the **logits**: for each of the 128
# positions, a number for each of `V` = 2,048 tokens that may come next. `nats` turns them
# into the **loss** of each token: minus the logarithm of the probability that the model
# gave to the token that came. (`eqx.filter_jit` compiles a function, and a `key` is the
# source of random numbers. Both are explained below.)


# %%
read = eqx.filter_jit(lambda model: model(text)[0])  # [T, V]


def nats(logits):  # [T, V] -> [T - 1]
    log_probabilities = jax.nn.log_softmax(logits[:-1])
    return -jnp.take_along_axis(log_probabilities, text[1:, None], axis=1)[:, 0]


# %% [markdown]
# ## One of these two programs is wrong
#
# Here are two programs for the same weights. One of them has a mistake in one line, as
# ports often have. The figure shows what one might look at first: the loss, token by token.

# %%
truth = read(package)
mistaken = read(nb01.one_mistake(package))
per_token = {"program A": nats(mistaken), "program B": nats(truth)}
nb01.two_programs(per_token)
nb.caption(
    "there are two lines, the thin black one inside the thick grey one. No token has a "
    "loss by which one could tell the programs apart."
)

# %%
apart = per_token["program A"] - per_token["program B"]
nb.check("mean loss, the two programs apart (nats)", abs(apart.mean()), lt=0.02)
nb.check("loss of any token, apart (nats)", jnp.abs(apart).max(), lt=0.5)
nb.check("spread of the loss, over the tokens (nats)", nats(truth).std(), gt=1.5)
nb.check("and yet, largest difference of a logit", jnp.abs(mistaken - truth).max(), gt=0.1)

# %% [markdown]
# Both programs load without an error, and their losses cannot be told apart. Still, some
# logits differ in their first digits. So a loss that looks right proves no port. This
# notebook is about what does, and the museum at its end names the mistake.
#
# ## Six words of JAX
#
# JAX is NumPy (`jnp`) with functions that **transform functions**. First the data. A
# **pytree** is arrays inside of tuples, lists, dicts or modules, nested as you like. The
# arrays are its **leaves**. `jax.tree.leaves` lists them, and **`jax.tree.map`** applies a
# function to each and keeps the nest around them. A model is a pytree whose leaves are its
# weights.

# %%
numbers = jnp.arange(16.0).reshape(4, 4)
tree = {"weight": numbers, "others": (jnp.zeros(2), jnp.ones(3))}
print(numbers)
print("leaves:  ", len(jax.tree.leaves(tree)))
print("tree.map:", jax.tree.map(jnp.size, tree))

# %% [markdown]
# Three transformations, of a function that takes one row of numbers:
#
# - **`jax.jit(f)`** is `f`, compiled. At the first call with arrays of some shape, JAX
#   **traces** the function: it runs your Python once, with stand-ins for the arrays, and
#   writes down each operation. The compiled program is used from then on.
# - **`jax.vmap(f)`** takes an `f` that is written for one row, and makes it act on many
#   rows. It is no loop: the operations themselves get one more axis.
# - **`jax.grad(f)`** is the function that computes the gradient of `f`.


# %%
def square_sum(row):  # [4] -> one number
    return jnp.dot(row, row)


print("a row:", square_sum(numbers[1]), " jit:", jax.jit(square_sum)(numbers[1]))
print("vmap: ", jax.vmap(square_sum)(numbers))
print("grad: ", jax.grad(square_sum)(numbers[1]))
naive = [float(square_sum(row)) for row in numbers]
nb.check("vmap = a loop over rows", jax.vmap(square_sum)(numbers).tolist(), eq=naive)

# %% [markdown]
# The fifth word is **`jax.eval_shape(f, x)`**. It traces `f` and computes nothing, and
# tells which shape the result would have. So a model of any size can be made as a
# **skeleton**, with shapes in the places of its arrays.
#
# The sixth is **`filter_`**: Equinox has its own edition of each transformation,
# `eqx.filter_jit`, `filter_vmap`, `filter_grad` and `filter_eval_shape`. They also take
# arguments that hold other things than arrays, as modules may, and transform only the
# arrays.

# %%
print(jax.eval_shape(square_sum, numbers[1]))
skeleton = eqx.filter_eval_shape(mx.Transformer, nb01.MISTRAL_7B, key=key)
size = sum(leaf.size for leaf in jax.tree.leaves(skeleton))
print(skeleton.layers[0].attention.wk.weight)
nb.check("parameters of Mistral 7B, without making one", size, eq=7_241_732_096)

# %% [markdown]
# **Takeaway.** JAX described seven billion weights without making one, because it works on
# the description of a program. `jit`, `vmap` and `grad` turn one program into another.
#
# ## One file of weights, three programs
#
# A model is numbers and the program that reads them. Here the numbers are one file,
# `consolidated.safetensors`, and there are three programs: PyTorch's, the one-file port,
# which follows Mistral's published reference line by line, and the package, which is the
# model as a JAX programmer would build it. If all three read the same file and compute
# the same numbers, the ports are right.
#
# In torch a weight's name is spelt by the attributes that lead to it:
# `layers.0.attention.wq.weight`. An Equinox model is a tree of attributes too, so the
# **path** to a leaf can be its name: `tree_leaves_with_path` gives each leaf with its path,
# and `keystr` spells the path. If both ports keep Mistral's names, loading needs no table
# of translations.


# %%
def names(model):
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x.shape for p, x in leaves}


for name, shape in itertools.islice(names(package).items(), 1, 5):
    print(name, shape)

# %%
torch_names = oracle("names", lambda twin: sorted(twin.state_dict()))
n_weights = sum(x.size for x in jax.tree.leaves(package))
nb.say(f"{len(torch_names)} weights, {n_weights:,} numbers.")
nb.check("names of package = torch's", sorted(names(package)) == list(torch_names), eq=True)
nb.check("names and shapes, package = one file", names(package) == names(one_file), eq=True)

# %% [markdown]
# **Takeaway.** The path of a leaf is the name of a weight: one checkpoint serves all
# three.
#
# ## A module is a frozen tree
#
# A module of Equinox in its smallest form. **`eqx.Module`** makes a dataclass of the class:
# its fields are declared above, and become the arguments of `Scale(...)`. Fields that hold
# arrays are the leaves. A field marked **static** is no leaf, but part of the tree's
# *structure*.


# %%
class Scale(eqx.Module):
    weight: jax.Array
    times: float = eqx.field(static=True)

    def __call__(self, x):
        return self.times * (x @ self.weight.T)


small = Scale(numbers, 2.0)
print(small(jnp.ones(4)))
print(jax.tree.leaves(small))

# %% [markdown]
# Now a real one. This is the feed-forward network, SwiGLU, from torch to Equinox. Lines
# with `-` are torch's, lines with `+` replace them.

# %%
nb.show_diff("torch_mistral.py:FeedForward", mx.transformer.FeedForward)

# %% [markdown]
# Three things have changed, and the formula is not one of them:
#
# 1. **Fields are declared** above `__init__`. There is no `super().__init__()` to register
#    anything: the fields *are* the registry.
# 2. **Randomness comes in by hand**, as a `key`. Torch draws the initial weights from a
#    hidden global generator. In JAX a key always gives the same numbers, and
#    **`jax.random.split`** makes new keys of one.
# 3. **`forward` is called `__call__`**, and shapes are part of the signature:
#    `Float[Array, "seq dim"]` (of the library *jaxtyping*) is an array of floats with two
#    axes. The axis `dim` of the input is the axis `dim` of the output, and in the tests
#    this is checked on every call.

# %%
print(jax.random.normal(key, (2,)), jax.random.normal(key, (2,)))
one, other = jax.random.split(key)
print(jax.random.normal(one, (2,)), jax.random.normal(other, (2,)))

# %% [markdown]
# Normalisation shows the same changes, and marks `eps` as static:

# %%
nb.show_diff("torch_mistral.py:RMSNorm", mx.transformer.RMSNorm)

# %% [markdown]
# Why static? A number like `eps`, or the number of heads, is part of the program and no
# weight.
#
# **Predict.** Forget the mark. The module below has an array and a plain Python float. What
# does `jax.grad` do with the float: raise an error, do nothing, or give it a gradient?

# %%
my_float = None  # "an error", "nothing" or "a gradient"


# %%
class Unmarked(eqx.Module):
    weight: jax.Array
    times: float


total = lambda module: (module.times * module.weight).sum()
by_jax = jax.grad(total)(Unmarked(numbers, 2.0)).times
by_equinox = eqx.filter_grad(total)(Unmarked(numbers, 2.0)).times

# %%
nb.guess(
    "jax.grad gives the float",
    my_float,
    "nothing" if by_jax is None else "a gradient",
    why={
        "an error": "an integer would raise one; a float is a number like any other.",
        "nothing": "that is `eqx.filter_grad`, which differentiates arrays alone.",
    },
)
nb.check("gradient of the float by jax.grad, the sum of 0 to 15", by_jax, eq=120.0)
nb.check("eqx.filter_grad leaves the float alone", by_equinox is None, eq=True)

# %% [markdown]
# `jax.grad` differentiates every leaf that it is given, so an optimizer that follows it
# would train your `eps`. Hence the rule of the package: arrays are leaves, all else is
# static.

# %%
leaves = jax.tree.leaves(package)
nb.check("leaves that are arrays", sum(eqx.is_array(x) for x in leaves), eq=len(leaves))
nb.check("leaves = tensors in torch", len(leaves), eq=len(torch_names))

# %% [markdown]
# The tree is **frozen**. The next cell makes the one deliberate mistake of this notebook.

# %%
try:
    package.norm.weight = jnp.zeros(256)
except dataclasses.FrozenInstanceError as error:
    print("FrozenInstanceError:", error)

# %% [markdown]
# A compiled function knows only what goes in and what comes out, so a change made on the
# side would be lost. **`eqx.tree_at`** makes a *changed copy* instead: say where, say what.
# The copy shares every other array with the original. First on the small module, then on
# the model:

# %%
print(eqx.tree_at(lambda m: m.weight, small, jnp.eye(4))(jnp.ones(4)))
muted = eqx.tree_at(lambda m: m.norm.weight, package, jnp.zeros(256))
shared = muted.output.weight is package.output.weight
nb.check("the other weights are shared, not copied", shared, eq=True)
nb.check("the original is as it was", bool(jnp.all(package.norm.weight != 0)), eq=True)

# %% [markdown]
# And **static** things are changed by giving the same leaves another structure:
# `jax.tree.structure` takes the nest without its leaves, **`jax.tree.unflatten`** puts
# leaves into a nest. `nb.with_config` does so with a whole model: `filter_eval_shape`
# makes a skeleton of another configuration, and the leaves are put into its structure.

# %%
structure = jax.tree.structure(Scale(numbers, 3.0))
print(jax.tree.unflatten(structure, jax.tree.leaves(small))(jnp.ones(4)))
narrow = nb.with_config(package, sliding_window=8)
nb.check("window of the copy", narrow.layers[0].attention.window, eq=8)
nb.check("its weights are shared", narrow.norm.weight is package.norm.weight, eq=True)

# %% [markdown]
# **Takeaway.** A module is a frozen tree whose leaves are all arrays; `tree_at` changes
# leaves, a new structure changes what is static.
#
# ## One sequence, and `vmap` for the batch
#
# Torch's modules carry a batch axis through every line, and so does the one-file port. The
# package's modules take **one sequence**, `[T]`, and `vmap` adds the batch axis to the
# whole program. No line of the model knows that batches exist. Naively, a batch is a loop
# over its rows:

# %%
batch = text.reshape(4, 32)  # [B, T]
together = eqx.filter_jit(eqx.filter_vmap(package))(batch)[0]  # [B, T, V]
of_row = eqx.filter_jit(package)
alone = jnp.stack([of_row(row)[0] for row in batch])
nb.check("max|Δ| logits, batch and rows alone", jnp.abs(together - alone).max(), lt=2e-4)

# %% [markdown]
# **Takeaway.** Write the model for one sequence; `vmap` makes the batch, to within
# rounding.
#
# ## The proof: every layer, side by side
#
# **Predict.** All three programs compute in float32, with the same weights, on the same
# 128 tokens. What is the largest difference between torch's logits and the package's, as
# the nearest power of ten? Logits here are numbers around ten.

# %%
my_gap = None  # 0, 1e-7, 1e-5 or 1e-2

# %% [markdown]
# One difference must be out of the way first, because it is real. In attention, a token's
# *query* is compared with the *keys* of itself and of earlier tokens, and the **window** is
# how many keys it sees. The reference's mask lets a query see 65 keys where the other
# programs show 64. The one-file port keeps that, because it is a port
# ([03](03_sliding_window_attention.ipynb) is about it). If we tell it that the window is
# 63, it sees 64 keys, and all three compute the same function.
#
# Now the **taps**, at which we compare. The **residual stream** is a table with a row of
# `D` numbers for each token, to which every part of the model adds
# ([02](02_inside_one_block.ipynb)). We keep it after the embedding, and after each
# attention and each feed-forward network: 13 taps, and the logits. In torch one hangs
# *hooks* on a model and runs it. In Equinox one calls the parts of the model one after the
# other. (The walks through the other two programs are in `nb01.py`.)


# %%
def taps_package(model, tokens):
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    places = mx.rope.Places(model.config, positions)
    taps = [model.tok_embeddings(tokens)]  # [T, D]
    for block in model.layers:
        attended = block.attention(block.attention_norm(taps[-1]), places, None)[0]
        taps.append(taps[-1] + attended)
        taps.append(taps[-1] + block.feed_forward(block.ffn_norm(taps[-1])))
    return jnp.stack(taps), model.logits(taps[-1])  # [2L + 1, T, D], [T, V]


# %% [markdown]
# Torch's answers are kept in a file for readers without torch. To keep the file small, the
# three-way comparison looks at 12 of the 128 positions, early and late; the most probable
# token (the *argmax*) is compared at all of them further below. Everything is done twice,
# in float32, and in bfloat16, which keeps only the first 8 of a float's 24 significant
# bits.

# %%
ROWS = np.array([0, 1, 2, 7, 31, 62, 63, 64, 65, 100, 126, 127])
matched = nb.with_config(one_file, sliding_window=63)
walks = {"package": (taps_package, package), "one file": (nb01.taps_one_file, matched)}
taps, top = {}, {}  # top: the most probable token at each position
for dtype in ("float32", "bfloat16"):
    answer = oracle(
        f"taps {dtype}", lambda twin: nb01.taps_torch(twin, tokens, ROWS), dtype=dtype
    )
    taps["torch", dtype] = nb01.unravel(answer, len(ROWS))
    for name, (walk, model) in walks.items():
        walked, logits = jax.jit(walk)(nb01.to_dtype(model, dtype), text)
        taps[name, dtype] = np.float32(walked[:, ROWS]), np.float32(logits[ROWS])
        top[name, dtype] = np.argmax(logits, axis=-1)

# %% [markdown]
# A difference means little without the size of what differs. So at each tap we divide the
# largest difference by the largest activation.

# %%
distance, gap = {}, {}  # relative, at the 13 taps and the logits; absolute, of the logits
for dtype in ("float32", "bfloat16"):
    for one, other in itertools.combinations(["torch", "one file", "package"], 2):
        (a, a_logits), (b, b_logits) = taps[one, dtype], taps[other, dtype]
        pairs = [*zip(a, b), (a_logits, b_logits)]
        relative = [np.abs(x - y).max() / np.abs(x).max() for x, y in pairs]
        distance[one, other, dtype] = np.array(relative)
        gap[one, other, dtype] = float(np.abs(a_logits - b_logits).max())

# %%
nb01.distances(distance)
nb.caption(
    "in float32 the programs agree to more than five digits, and in bfloat16 to about "
    "two. In neither does the difference jump at some layer. A point on the floor is an "
    "exact zero: the embedding is a look-up."
)

# %% [markdown]
# The claims of the caption, and the logits themselves:

# %%
in_32, in_16 = (
    np.array([v for (*_, dtype), v in distance.items() if dtype == wanted])
    for wanted in ("float32", "bfloat16")
)
worst = float(in_32.max())
nb.check("largest relative Δ of any tap and pair, float32", worst, lt=1e-5)
nb.check("largest relative Δ of any tap and pair, bfloat16", in_16.max(), lt=0.05)
jump = lambda values: (values[:, 1:].max(1) / np.median(values[:, 1:], axis=1)).max()
nb.check("largest tap over the median one, float32", jump(in_32), lt=20)
nb.check("largest tap over the median one, bfloat16", jump(in_16), lt=20)
nb.check("relative Δ of the embeddings, all pairs", float(in_32[:, 0].max()), eq=0.0)

# %%
noise = gap["torch", "package", "float32"]
nb.guess(
    "max|Δ| of the logits, torch and package, to the nearest power of ten",
    my_gap,
    float(10.0 ** np.round(np.log10(noise))),
    why={
        0: "they add the same numbers in another order, and each order rounds differently.",
        1e-7: "that is one rounding of a number near 1; here thousands of numbers are "
        "rounded, some of them near ten.",
        1e-2: "that is a bug, or bfloat16.",
    },
)
for (one, other, dtype), value in gap.items():
    bound = 1e-4 if dtype == "float32" else 0.6
    nb.check(f"max|Δ| logits, {one} and {other}, {dtype}", value, lt=bound)

# %% [markdown]
# Zero would have been suspicious. Floating-point addition depends on the order: add 1,000
# random numbers forwards and backwards, one by one, and compare.

# %%
random = np.asarray(jax.random.normal(key, (1000,)))
forwards, backwards = np.cumsum(random)[-1], np.cumsum(random[::-1])[-1]
print(forwards, backwards)
nb.check("a sum of 1,000 numbers in two orders, apart", abs(forwards - backwards), gt=0)

# %% [markdown]
# **Takeaway.** What proves the port is not that the difference is small. It is **as small
# as rounding**, at **every layer**.
#
# ## Part by part
#
# Now two parts by themselves. The first is **RoPE**, which tells attention where tokens
# stand: it turns queries and keys by angles that grow with the position.
#
# **Predict.** A port begins to count at 1 instead of 0, so that every angle is wrong. What
# happens to the logits?

# %%
my_shift = None  # "nothing", "a small error" or "a large error"

# %%
shift = nb.knob(1, of=(1, 8, 64))
moved = eqx.filter_jit(package.logits)(nb01.stream(package, text, first=shift))
shift_gap = float(jnp.abs(moved - read(package)).max())
nb.guess(
    "The logits show",
    my_shift,
    "nothing" if shift_gap < 1e-3 else "an error",
    why={
        "a small error": "what little there is, is rounding.",
        "a large error": "a score is a product of a query and a key, and depends on the "
        "*difference* of their angles alone.",
    },
)
nb.check("max|Δ logits|, all positions too high", shift_gap, lt=5e-4)

# %% [markdown]
# So no comparison of logits finds this mistake, and a larger shift shows no more (try the
# knob). It would do harm where another part of the program, such as a cache, counts from
# 0. Therefore the angles have to be compared by themselves.

# %%
positions = jnp.arange(128, dtype=jnp.int32)
angles = lambda positions: mx.rope.rotation(positions, 32, package.config.rope_theta)
cos, sin = angles(positions)  # [T, 16] each
freqs = one_file_ref.precompute_freqs_cis(32, positions, one_file.args.rope_theta)
nb.check("max|Δ| of cosines and sines", jnp.abs(cos + 1j * sin - freqs).max(), lt=1e-5)
nb.check("angle at position 0, its cosine", cos[0].min(), eq=1.0)
shifted_gap = jnp.abs(angles(positions + shift)[0] - cos).max()
nb.check("max|Δ| of cosines, all positions too high", shifted_gap, gt=0.5)

# %% [markdown]
# The second part is RMSNorm. Mistral rounds the normalised value to the model's dtype
# **before** it multiplies by the weight, `eqx.nn.RMSNorm` after. In float32 nothing is
# rounded there. In bfloat16, count the values that come out equal to torch's, bit for bit.

# %%
x = 3 * jax.random.normal(key, (128, 256), jnp.bfloat16)  # [T, D]
norm = nb01.to_dtype(package.layers[3].ffn_norm, jnp.bfloat16)
late = eqx.nn.RMSNorm(256, eps=norm.eps, use_bias=False)
late = eqx.tree_at(lambda n: n.weight, late, norm.weight)
normed = {
    "one file": nb01.to_dtype(one_file.layers[3].ffn_norm, jnp.bfloat16)(x),
    "package": norm(x),
    "eqx.nn.RMSNorm": jax.vmap(late)(x),
}

# %%
normed_torch = oracle("norm", lambda twin: nb01.norm_torch(twin, x), dtype="bfloat16")
equal = {name: float((np.float32(y) == normed_torch).mean()) for name, y in normed.items()}
nb.table(
    ["bfloat16", "equal to torch's"], [[n, f"{100 * e:.1f}%"] for n, e in equal.items()]
)
nb.check("RMSNorm bf16, share equal to torch's, package", equal["package"], gt=0.99)
nb.check("RMSNorm bf16, share equal to torch's, one file", equal["one file"], gt=0.99)
nb.check("RMSNorm bf16, share equal to torch's, eqx.nn", equal["eqx.nn.RMSNorm"], lt=0.95)

# %% [markdown]
# **Takeaway.** Some mistakes hide from a comparison of logits, or of float32. Their parts
# have to be compared by themselves.
#
# ## Two ports and torch
#
# Does rounding matter to the reader of the text? Two questions: is the most probable token
# the same at all 128 positions? And do 64 tokens written **greedily**, always with the most
# probable next one, come out the same?


# %%
def greedy_torch(twin):
    import torch_mistral

    return torch_mistral.greedy(twin, [prompt], 64)[0]


def argmax_torch(twin):
    import torch

    return twin(torch.tensor([tokens]))[0].argmax(-1)


prompt = tokens[:40]
prompt_text = tokenizer.decode(prompt)
assert tokenizer.encode(prompt_text) == prompt

# %% [markdown]
# The package writes with `mx.generate`, the one-file port with its own `generate`. It keeps
# its window of 64 here: its extra key shows only when more than 64 tokens are read at once,
# and this prompt is shorter.

# %%
text_torch = tokenizer.decode(prompt + oracle("greedy", greedy_torch).astype(int).tolist())
text_package = str(mx.generate(package, tokenizer, prompt_text, max_tokens=64))
port_tokenizer = one_file_ref.Tokenizer(str(nb.MODEL / "tokenizer.model"))
texts, _ = one_file_ref.generate([prompt_text], one_file, port_tokenizer, max_tokens=64)
nb.say("> " + text_package.replace("\n", "\n> "))

# %%
top_torch = oracle("argmax", argmax_torch).astype(int)
ports = ("one file", "package")
same_top = {n: int((top[n, "float32"] == top_torch).sum()) for n in ports}
same_text = {"one file": texts[0] == text_torch, "package": text_package == text_torch}

# %%
header = ["against torch, fp32", "max abs Δ logits", "same argmax", "same 64 tokens"]
gaps = {"one file": gap["torch", "one file", "float32"], "package": noise}
nb.table(header, [[n, gaps[n], f"{same_top[n]} of 128", same_text[n]] for n in gaps])
for name in gaps:
    nb.check(f"argmax of {name} = torch's", same_top[name], eq=128)
    nb.check(f"64 greedy tokens, {name} = torch", same_text[name], eq=True)

# %% [markdown]
# The difference in code between the ports is attention, where four *query heads* share a
# *key head* ([02](02_inside_one_block.ipynb)). The one-file port repeats each key head four
# times and masks the whole square of scores, as the reference does. The package multiplies
# the four query heads as the rows of one matrix, block by block along the window
# ([03](03_sliding_window_attention.ipynb)). The sums are the same, in another order.
#
# **Takeaway.** Equal to rounding at all 14 places, equal in every token.
#
# ## The museum of bugs
#
# Every exhibit below is a port with **one** mistake, of a kind that ports have. Each loads
# without an error, because each has the right shapes: `D` happens to be heads × head
# width, so even `wo`, the matrix at the end of attention, fits when it is transposed.
#
# 1. **Half-split RoPE**: weights from Hugging Face, whose rows pair feature `i` with `i +
#    16`, in a program that pairs neighbours. (A relative is transformers #31788: rows of
#    `wq` and `wk` in a wrong order, when a GGUF was loaded.)
# 2. **theta 1e6**: the base of the angles of a later Mistral.
# 3. **Window + 1**: the reference's own slip.
# 4. **eps 1e-3** for 1e-5: a default that nobody looked at.
# 5. **`wo` transposed**: `x @ w` for `x @ w.T`.
# 6. **`w1`, `w3` swapped**: two matrices of the feed-forward network, which other code
#    calls *gate* and *up*.

# %%
swap = lambda ffn: eqx.tree_at(lambda f: (f.w1, f.w3), ffn, (ffn.w3, ffn.w1))
wo = lambda block: block.attention.wo.weight
in_every_layer, with_config = nb01.in_every_layer, nb.with_config
museum = {
    "half-split RoPE": in_every_layer(package, lambda b: b.attention, nb01.half_split),
    "theta 1e6": with_config(package, rope_theta=1e6),
    "window + 1": with_config(package, sliding_window=65),
    "eps 1e-3": with_config(package, norm_eps=1e-3),
    "wo transposed": in_every_layer(package, wo, jnp.transpose),
    "w1, w3 swapped": in_every_layer(package, lambda b: b.feed_forward, swap),
}

# %% [markdown]
# **Predict.** A quick test of a port compares the logits of the first token. How many of
# these six bugs does it miss, because they leave the logits at position 0 untouched?

# %%
my_invisible = None  # 1, 2, 3 or 6

# %%
wrong = {name: read(bug) for name, bug in museum.items()}  # [T, V] each
prints = {name: np.abs(w - truth).max(axis=1) for name, w in wrong.items()}
hidden = [name for name, print_ in prints.items() if print_[0] < 1e-4]
nb.guess(
    "Bugs that the first token does not show",
    my_invisible,
    len(hidden),
    why={
        1: "two of the bugs are in RoPE, which does not turn position 0.",
        2: "the two of RoPE hide, and a window that is too wide needs more tokens to show.",
        6: "a wrong matrix is wrong for any token.",
    },
)

# %%
groups = {"hidden at position 0": {n: prints[n] for n in hidden}}
groups["seen at position 0"] = {n: prints[n] for n in prints if n not in hidden}
nb01.fingerprints(groups, noise)
nb.caption(
    "the bugs have different fingerprints. Those of RoPE start at nothing, since position "
    "0 is turned by no angle, and are there from position 1 on. Window + 1 is right until "
    "the window is full, then wrong. A swapped or transposed matrix is wrong from the "
    "first token on, and so is eps, by less. The thick grey line is how far apart torch "
    "and the package are: every bug rises far above it."
)

# %% [markdown]
# A test that looks at the first token alone misses the bugs of the upper panel, and a test
# with a prompt shorter than the window still misses one of them. The claims:

# %%
for name in ("half-split RoPE", "theta 1e6"):
    nb.check(f"{name}, at position 0", prints[name][0], lt=1e-4)
    nb.check(f"{name}, from position 1 on", prints[name][1:].min(), gt=0.005)
nb.check("window + 1 before the window is full", prints["window + 1"][:64].max(), lt=1e-4)
nb.check("window + 1 after it", prints["window + 1"][64:].max(), gt=0.02)
matrices = min(prints[name][0] for name in ("wo transposed", "w1, w3 swapped"))
nb.check("wrong matrices, at position 0", matrices, gt=1)
nb.check("eps at position 0, over the noise", prints["eps 1e-3"][0] / noise, gt=50)
faintest = min(print_.max() for print_ in prints.values())
nb.check("the faintest bug, over the noise", faintest / noise, gt=20)

# %% [markdown]
# And the loss? It is what one looks at when there is no other program to compare with.

# %%
losses = {name: float(nats(w).mean()) for name, w in wrong.items()}
loss = float(nats(truth).mean())
rows = [["(none)", loss, 0.0, 0.0, 0.0]]
rows += [[n, losses[n], *(float(p[t]) for t in (0, 8, 100))] for n, p in prints.items()]
nb.table(["bug", "loss (nats a token)", "Δ at 0", "Δ at 8", "Δ at 100"], rows)

# %%
quiet = min(losses, key=lambda name: abs(losses[name] - loss))
nb.check("loss of the port (nats a token)", loss, lt=5.5)
nb.check("the bug that moves the loss least", quiet, eq="window + 1")
named = bool(jnp.array_equal(wrong[quiet], mistaken))
nb.check("it is the mistake of program A, of the beginning", named, eq=True)
nb.say(
    f"**Takeaway.** *{quiet}* moves the loss by only {abs(losses[quiet] - loss):.4f} "
    f"nats, and the logits by {prints[quiet].max():.2g}: "
    f"{prints[quiet].max() / noise:,.0f} times the noise. Compare logits, past the "
    "window, against an outside authority; a loss that looks fine proves little."
)

# %% [markdown]
# ## Exercises
#
# Each cell below runs as it is and says *not done yet*. Replace `NotImplemented`, run
# again, and the checker says what is wrong.
#
# **Exercise 1: a key for every query** (● 5 minutes). In Mistral 7B, 32 query heads share 8
# heads of keys and values: `n_heads` and `n_kv_heads` of `nb01.MISTRAL_7B`. How many
# parameters would it have if each query head had keys and values of its own? The answer is
# a number, and no weight needs to be made.
#
# <details><summary>Hint</summary>
#
# `dataclasses.replace(config, name=value)` is a changed copy of a configuration. The rest
# is in *Six words of JAX*.
#
# </details>
#
# {{solution:unshared_parameters}}

# %%
unshared_parameters = NotImplemented
ex01.check_unshared_parameters(unshared_parameters)

# %% [markdown]
# **Exercise 2: name the bug** (●● 5 minutes). Two curves of the museum, without their
# names. Which bugs are they? Write the names as they stand in `museum`.
#
# <details><summary>Hint</summary>
#
# Look at position 0 first, then at 64. Two bugs are zero at 0 and nowhere else: compare
# how far each is off at position 1.
#
# </details>
#
# {{solution:name_the_bug}}

# %%
nb01.suspects({letter: prints[name] for letter, name in ex01.SUSPECTS.items()})
nb.caption("both curves begin on the floor. One leaves it at once, the other later.")

# %%
name_the_bug = {"A": NotImplemented, "B": NotImplemented}
ex01.check_name_the_bug(name_the_bug)

# %% [markdown]
# **Exercise 3: load by path** (●●● 10 minutes). Write a `load_state_dict` for any Equinox
# model: given a skeleton, and a dictionary from names to arrays, return the model with the
# arrays in their places. A name that is missing must raise `KeyError`.
#
# <details><summary>Hint</summary>
#
# `jax.tree_util.tree_map_with_path(function, tree)` calls `function(path, leaf)`, and
# `jax.tree_util.keystr(path, simple=True, separator=".")` spells the path.
#
# </details>
#
# {{solution:load_by_path}}


# %%
def load_by_path(skeleton, arrays):
    return NotImplemented


ex01.check_load_by_path(load_by_path)

# %% [markdown]
# ## Recap

# %%
n_names = f"{len(torch_names)} of {len(torch_names)} names are torch's"
n_static = f"{len(leaves)} leaves, all of them arrays"
rows = [
    ["names", "attributes", "paths of leaves", n_names],
    ["what is a weight", "registered parameters", "a field that is not static", n_static],
    ["a change", "in place", "a copy by `tree_at`", "the other arrays are shared"],
    ["a batch", "an axis in every line", "`vmap`", "equal to a loop, to rounding"],
    ["the logits", "one order of sums", "another order", f"{noise:.0e} apart"],
]
nb.table(["", "torch", "Equinox", "proof"], rows)

# %%
nb.recap()

# %% [markdown]
# And the question of the beginning:

# %%
nb.say(
    "**The answer.** The language changes how modules are declared, copied and batched, "
    "and nothing else: at all 13 taps and the logits the three programs differ by at "
    f"most {worst:.0e} of the activations in float32, and every one of 128 + 64 tokens is "
    "the same."
)

# %% [markdown]
# **What we did not show**: gradients of the model, a GPU (where products of float32 may be
# rounded to fewer bits unless `jax.default_matmul_precision("highest")` is set), and
# checkpoints whose weights have other names.
#
# **Further reading**: Mistral 7B, arXiv 2310.06825, §2; RoFormer, arXiv 2104.09864, §3.2
# (RoPE); GLU Variants, arXiv 2002.05202 (SwiGLU); Kidger & Garcia, arXiv 2111.00254
# (Equinox).
#
# **Next**: [02 Inside one block](02_inside_one_block.ipynb), or
# [03 Sliding window attention](03_sliding_window_attention.ipynb), on why the window had to
# be 63.
