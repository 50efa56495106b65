# ---
# jupyter:
#   budget: 145
#   cover: 2
# ---

# %% [markdown]
# # What the compiler sees
#
# **Where do the seconds go the first time, and what makes the optimized port fast?**
#
# - **You will be able to** tell tracing, lowering, compiling and running apart; find out
#   why a function is compiled again; choose between a loop and `scan`; give memory back
#   by donation; and time a JAX program honestly.
# - **Before this**: [01](01_one_model_two_languages.ipynb); for the cache,
#   [04](04_the_rolling_buffer.ipynb).
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/generation.py` and `mistral_eqx/cache.py`, against
#   `Transformer.forward` of `one_file_ref.py`.
# - **Model and data**: the embedded model, and random ones of other depths.
# - **Torch**: live if installed, else its recorded answers (and its recorded times).
# - **Predict first**: how do the equations and the time to compile grow with depth? How
#   many programs do ten prompts need? How much faster is a loop on the device?
#
# No number of seconds below is asserted, for machines differ and are busy. What is
# asserted is the mechanism: how often something is traced, how many equations a program
# has, how many bytes are shared. The letters: `B` batch, `T` tokens, `D` width, `V`
# vocabulary; see [README.md](README.md).

# %%
import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
import nb05
import nbtools as nb
import one_file_ref
from exercises import ex05


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("05")
package, tokenizer = mx.load(dtype=jnp.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
tokens = nb.held_out(256)
text = jnp.asarray(tokens[:32])
small = mx.ModelConfig(
    dim=64, n_layers=1, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2,
    norm_eps=1e-5, vocab_size=2048, sliding_window=64,
)  # fmt: skip

# %% [markdown]
# ## The same call, twelve times
#
# A torch program runs line by line, and so does a JAX program unless it is told otherwise.
# **`jax.jit`** makes a compiled function out of a Python function. Here is one that divides
# each row of a table by its root mean square, as the model's RMSNorm does. (**`jnp`** is
# NumPy as JAX has it: the same functions, for arrays of JAX.) It prints what it is given.


# %%
def naive(x):
    print("Python runs, and x is a", type(x).__name__)
    return x / jnp.sqrt((x**2).mean(axis=1, keepdims=True))


table = jnp.arange(16.0).reshape(4, 4)
compiled = jax.jit(naive)
print(table, compiled(table), compiled(table + 1), sep="\n\n")

# %% [markdown]
# Two calls, and Python ran once. It did not even get the table: in place of the array it
# got a **tracer**, which has a shape and a dtype but no numbers. The tracer wrote down
# which operations were done to it. That list was compiled, and the second call ran the
# compiled list at once, without Python.
#
# So the first call of a function is special. This is what somebody sees who times the whole
# model by calling it twelve times. **`eqx.debug.assert_max_traces`** counts how often a
# function is traced, and raises an error when that is too often; `get_num_traces` reads the
# count. (`block_until_ready` waits until the result is there. We come to that.)

# %%
once = eqx.debug.assert_max_traces(lambda model, tokens: model(tokens)[0], max_traces=1)
forward = jax.jit(once)  # [T] to [T, V]
calls = []
for _ in range(12):
    start = time.perf_counter()
    jax.block_until_ready(forward(package, text))
    calls.append(time.perf_counter() - start)

# %%
nb05.plot_calls(calls)
nb.caption(
    "the time of each call, on an axis where each line is ten times the one below. The "
    "first call traces and compiles, and all others run what it has compiled."
)
nb.check("traces in twelve calls", eqx.debug.get_num_traces(forward), eq=1)

# %%
steady = np.median(calls[2:])
nb.say(
    f"The first call took as long as {calls[0] / steady:,.0f} of the later ones. A mean "
    "over all twelve would describe neither the first nor the others. Compile time and run "
    "time are two numbers."
)

# %% [markdown]
# There is a second trap. JAX does not wait: a call returns when the work has been **handed
# over**, not when it is done. A clock that is stopped without `block_until_ready` measures
# the handing over.

# %%
heavy = jax.jit(lambda x: jnp.linalg.matrix_power(x, 16))
x = jax.block_until_ready(heavy(jnp.eye(700)))
start = time.perf_counter()
y = heavy(x)
handed_over = time.perf_counter() - start
jax.block_until_ready(y)
done = time.perf_counter() - start
nb.say(f"Handed over after {1000 * handed_over:.2f} ms; done after {1000 * done:.1f} ms.")

# %% [markdown]
# **Takeaway.** Make one call that does not count, block before you stop the clock, and
# report the compile time apart. `timeit` of `nbtools.py` does so, and gives the median
# and the quartiles.
#
# ## Four stages
#
# The first call has four stages, and each can be had by itself. **Trace**: run the Python
# with tracers and write down every operation. The list is called the **jaxpr**, and each
# line of it is an **equation**. **Lower**: translate it for the compiler, which is called
# XLA. **Compile**: make machine code. **Run.**

# %%
traced = jax.jit(naive).trace(table)
program = traced.lower().compile()
print(traced.jaxpr.pretty_print(use_color=False))

# %% [markdown]
# Read a line as "name : dtype[shape] = operation inputs". No class and no Python are left.
# The package's RMSNorm is such a function too, and it has two things more: it adds a small
# `eps`, so that a row of zeros is not divided by zero, and it has a weight for each column.
# It also computes in float32 whatever it is given, and multiplies by `rsqrt`, one over the
# root, where we divide.

# %%
nb.show_source(mx.layers.RMSNorm.__call__)
norm = mx.layers.RMSNorm(4, 1e-5, dtype=jnp.float32)
gap = float(jnp.abs(program(table) - norm(table)).max())
nb.check("max|Δ|, our program and the package's RMSNorm", gap, lt=1e-4)

# %% [markdown]
# What about a whole model? Its layers are a Python loop. Python runs through the loop while
# it traces, so the jaxpr has no loop: every layer is written out and makes it longer.
#
# **`jax.lax.scan`** is the other way. It traces **one** step, and says "do this for each
# row of these arrays". The step gets two things: what the step before has handed on, and a
# row. It gives back two things: what to hand on, and what to collect (here nothing):

# %%
add = lambda carried, row: (carried + row, None)
total, _ = jax.lax.scan(add, jnp.zeros(4), table)
print(total, table.sum(axis=0))

# %% [markdown]
# To scan over layers, their weights must be rows of arrays. `split` stacks them. A model
# is a **pytree**: a tree with arrays at its leaves. **`jax.tree.map`** takes several
# trees of the same form, and calls a function with the arrays that stand in the same
# place. **`eqx.tree_at`** gives a copy of a tree in which one place holds something else.
# On small trees:

# %%
one, two = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
print(jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two))
print(eqx.tree_at(lambda tree: tree["w"], one, 5))

# %% [markdown]
# And the two models, with the loop and with scan:


# %%
def split(model):  # the model without its layers, and the layers stacked
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.layers)
    return eqx.tree_at(lambda m: m.layers, model, ()), stacked


def looped(model, tokens):
    return model(tokens)[0]


def scanned(model, stacked, tokens):
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    places = mx.rope.Places(model.config, positions)
    body = lambda x, block: (block(x, places, None)[0], None)
    x, _ = jax.lax.scan(body, model.tok_embeddings(tokens), stacked)
    return model.logits(x)


# %% [markdown]
# **Predict.** From 1 layer to 16, by what factor does the number of equations grow with
# scan? And the time to compile with the loop: does it grow 16 times, or clearly less?

# %%
my_scan = None  # 1, 4 or 16
my_loop = None  # "16 times" or "clearly less"

# %%
depths, loop, scan = [1, 4, 16], [], []
nb05.stages(lambda x: x + 1, text)  # the very first is slow
for depth in depths:
    model = mx.Transformer(dataclasses.replace(small, n_layers=depth), key=key)
    loop.append(nb05.stages(looped, model, text))
    scan.append(nb05.stages(scanned, *split(model), text))
apart = float(jnp.abs(loop[-1].result - scan[-1].result).max())
nb.check("max|Δ| logits, loop and scan, 16 layers", apart, lt=1e-3)

# %% [markdown]
# Both programs give the same logits. (**Logits** are what the model says of the next token:
# a number for each token of the vocabulary.) Now the factors:

# %%
growth = loop[-1].seconds[2] / loop[0].seconds[2]
why = {
    4: "that would grow with the root of the depth. Nothing here does.",
    16: "that is the loop. Scan holds the step once, whatever it runs over.",
}
scan_growth = scan[-1].equations // scan[0].equations
nb.guess("Equations of scan, 16 layers over 1", my_scan, scan_growth, why=why)
measured = "clearly less" if growth < 13 else "16 times"
reason = "a part of the seconds is the same at any depth; a fit below says how much."
why = {"16 times": reason} if measured == "clearly less" else {}
nb.guess("Compiling 16 layers over 1, loop", my_loop, measured, why=why)

# %%
nb05.plot_stages(depths, loop, scan)
nb.caption(
    "above, how the first call divides into its stages, with a Python loop over the layers "
    "and with scan. Below, the size of the program: a straight line for the loop, and a "
    "flat one for scan."
)

# %% [markdown]
# The seconds are this machine's. The counts are not, so they are checked:

# %%
per_layer = np.diff([made.equations for made in loop]) // np.diff(depths)
bend = int(per_layer[0] - per_layer[1])
nb.check("equations that a layer adds, up to 4 layers less beyond", bend, eq=0)
nb.check("equations that a layer adds", int(per_layer[0]), gt=10)
more = scan[-1].equations - scan[0].equations
nb.check("equations of scan, 16 layers less 1 layer", more, eq=0)

# %% [markdown]
# Why are sixteen layers not sixteen times the seconds? A straight line through the three
# depths gives the seconds that a layer costs, and the seconds that no layer causes. (The
# embedding, the output and the compiler's own start are among the latter.)

# %%
slope, fixed = np.polyfit(depths, [made.seconds[2] for made in loop], 1)
nb.say(
    f"**Takeaway.** In the loop every layer is {per_layer[0]} more equations. In scan "
    f"there are {scan[0].equations}, whatever the depth. With the loop, 16 layers took "
    f"{growth:.1f} times as long to compile as one: a layer costs {1000 * slope:.0f} ms, "
    f"and {fixed:.2f} s would be there without any layer."
)

# %% [markdown]
# The package has the loop all the same, because layers in a loop may differ from each
# other, and because a model is compiled once and then runs for long.
#
# ## What makes it compile again
#
# A compiled program is for the shapes and dtypes that it was traced with. Anything else is
# traced and compiled anew. Here are ten prompts of 5 to 59 tokens. **Buckets** are one
# cure: pad each prompt on the right to the next power of two, 8 at least. The model is
# causal, which means that a token sees only what comes before it. Pads come after the text,
# so they do not change its logits.
#
# **Predict.** How many programs do the ten prompts need with buckets?

# %%
my_programs = None  # 1, 4 or 10

# %%
lengths = list(range(5, 65, 6))
model = mx.Transformer(small, key=key)
counted = lambda: jax.jit(eqx.debug.assert_max_traces(looped, max_traces=len(lengths)))
each_length, buckets = counted(), counted()
exact = [each_length(model, jnp.asarray(tokens[:n]))[-1] for n in lengths]

# %% [markdown]
# And padded. (`array.at[:n].set(...)` is what NumPy writes as `array[:n] = ...`. Arrays of
# JAX cannot be changed, so it gives back another array.)

# %%
gaps = []
for n, expected in zip(lengths, exact):
    bucket = max(8, 1 << (n - 1).bit_length())  # the next power of two
    padded = jnp.zeros(bucket, jnp.int32).at[:n].set(jnp.asarray(tokens[:n]))
    gaps.append(float(jnp.abs(buckets(model, padded)[n - 1] - expected).max()))
naive_programs, bucketed = map(eqx.debug.get_num_traces, (each_length, buckets))

# %%
why = {
    1: "a single size would have to be 64, and pad the prompt of 5 with 59 zeros.",
    10: "that is without buckets: every length is a shape of its own.",
}
nb.guess("Programs with buckets", my_programs, bucketed, why=why)
nb.check("programs compiled for 10 lengths", naive_programs, eq=10)
nb.check("programs compiled with buckets of 8, 16, 32 and 64", bucketed, eq=4)
nb.check("max|Δ| logits, padded and not", max(gaps), lt=1e-4)

# %% [markdown]
# Here we know the reason. When you do not, ask JAX. Inside **`jax.explain_cache_misses`**
# it writes into its log which argument was new, and what the nearest call before had there.
# (`jax.log_compiles` says when anything is compiled, and how long that took.)

# %%
double = jax.jit(lambda tokens: 2 * tokens)
said = nb05.reasons(lambda: [double(jnp.asarray(tokens[:n])) for n in (5, 8)])
print(said[-1])
nb.check("the log names the new shape", "[8]" in said[-1], eq=True)

# %% [markdown]
# Read the line as a sentence: *at* this argument, *now* this shape, *before* that one. Two
# other causes are no shapes at all. One is a Python number where an array was meant, given
# to Equinox's `filter_jit`, which comes below: exercises 1 and 3 are about it. The other is
# a function that is made anew in a loop, and so is never the same function twice:

# %%
traces = []
for step in range(3):
    jax.jit(lambda x: traces.append(step) or 2 * x)(table)  # a new function each time
nb.check("traces of three functions that look the same", len(traces), eq=3)

# %%
nb.say(
    f"**Takeaway.** Ten lengths are {naive_programs} programs as they are, and "
    f"{bucketed} with buckets. `eqx.debug.assert_max_traces` turns a recompilation from a "
    "mystery into an error, and `jax.explain_cache_misses` names its cause."
)

# %% [markdown]
# ## A handful of programs for any length
#
# The package needs no pads for a single prompt. It reads a prompt in **chunks**. A chunk
# has its full size if so many tokens are left; otherwise it is the largest power of two
# that still fits. The **cache** carries what was read from chunk to chunk. It is a ring
# of slots for each layer, and no chunk may cross the ring's end (notebook
# [04](04_the_rolling_buffer.ipynb)). The size is a knob, a number that you may change. We
# use 16 here so that prompts of 59 tokens have several chunks; by default it is 256 on a
# CPU.

# %%
nb.show_source(mx.prompts.chunk_sizes)

# %%
chunk = nb.knob(16, of=(8, 16))
lengths = list(range(5, 65, 6))
model = mx.Transformer(small, key=key)
run = eqx.debug.assert_max_traces(lambda m, tokens, cache: m(tokens, cache), max_traces=9)
read, calls_made = jax.jit(run), 0
for n in lengths:
    cache = mx.Cache(small, jnp.int32(0), chunk=chunk, max_length=256, dtype=jnp.float32)
    start = 0
    for size in mx.prompts.chunk_sizes(0, n, chunk=chunk, slots=cache.slots):
        logits, cache = read(model, jnp.asarray(tokens[start : start + size]), cache)
        start, calls_made = start + size, calls_made + 1

# %%
chunked = eqx.debug.get_num_traces(read)
powers = chunk.bit_length()  # 1, 2, 4, ... up to the chunk
nb.check("programs compiled in chunks", chunked, eq=powers)
whole = model(jnp.asarray(tokens[:n]))[0][-1]
nb.check(
    "max|Δ| logits, in chunks and at once",
    float(jnp.abs(logits[-1] - whole).max()),
    lt=1e-4,
)
nb.say(
    f"**Takeaway.** In chunks of up to {chunk}, {len(lengths)} prompts are {calls_made} "
    f"calls of {chunked} programs, without a single pad. A prompt of any other length "
    "needs no further program."
)

# %% [markdown]
# ## Giving memory back
#
# A JAX function may not change its input, so a step that returns an updated cache makes a
# whole new one: two caches, and a copy for every token. **Donation** is the promise not
# to use the input again. The compiler then writes into its memory. In `jax.jit` the promise
# is `donate_argnums=`, the numbers of the arguments. **`eqx.filter_jit`** is Equinox's
# `jit`: the arrays among the arguments are traced, and everything else becomes a constant
# of the program. Its promise is a word, `donate="all-except-first"`: all but the first
# argument, which is the model. On a small array, the input is gone afterwards:

# %%
bump = jax.jit(lambda x: x + 1, donate_argnums=0)
x = jnp.zeros(4)
print(bump(x), x.is_deleted())

# %% [markdown]
# How much of a step's cache is shared? The compiler tells: `lower(...).compile()` compiles
# without running, and `memory_analysis()` of the compiled program has the bytes that input
# and output share.

# %%
cache = mx.Cache(package.config, jnp.int32(0), chunk=1, max_length=64, dtype=jnp.float32)
one_token = jnp.asarray(tokens[:1])
step = lambda model, token, cache: model(token, cache)
shared = {}
for name, donated in (("kept", ()), ("donated", (2,))):
    lowered = jax.jit(step, donate_argnums=donated).lower(package, one_token, cache)
    shared[name] = lowered.compile().memory_analysis().alias_size_in_bytes

# %%
cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
nb.table(["the cache is", "bytes shared by input and output"], [*shared.items()])
nb.check("bytes shared without donation", shared["kept"], eq=0)
share = shared["donated"] / cache_bytes
nb.check("shared with donation, over the cache's own", share, near=1.0)
nb.say(
    f"**Takeaway.** Donated, all {cache_bytes / 1024:.0f} KiB of the cache are updated in "
    "place; otherwise they would be copied for every token."
)

# %% [markdown]
# ## Two ports and torch: tokens a second
#
# Now the benchmark. Here are five ways to write 16 tokens after one word (and the token
# that marks the beginning), for one text and for eight at once:
#
# 1. **one file, eager**: operation by operation, as torch works;
# 2. **one file, jit**: its forward pass compiled, a Python loop around it;
# 3. **package, a call a token**: the package's model in the same Python loop;
# 4. **package, loop on the device**: `generate`, whose loop is a `jax.lax.while_loop`.
#    That is a loop *inside* the compiled program, so Python is asked once for all tokens;
# 5. **torch, eager**, on one thread, which is enough for so small a model.
#
# **Predict.** At a batch of 1, how many times as many tokens a second does 4 write as 1?
# And does most of that come from the compiler (from 1 to 2) or from the package's own
# program and its loop (from 2 to 4)?

# %%
my_speedup = None  # about 2, 5 or 20
my_source = None  # "the compiler" or "the package"

# %%
NEW = 16
words = list(dict.fromkeys(tokens[1:]))  # each once
prompts = {batch: [[tokens[0], word] for word in words[:batch]] for batch in (1, 8)}


def write_greedily(run, prompts, cache):  # the most probable token is next
    text, made = jnp.asarray(prompts), []  # [B, 2]
    token = text[:, :1]
    for position in range(1 + NEW):
        logits, cache = run(token, position, cache)
        token = text[:, 1:] if position == 0 else logits[:, -1:].argmax(-1)
        made.append(token)
    return jnp.concatenate(made[1:], axis=1)  # [B, NEW]


# %% [markdown]
# The package's model reads one text. **`jax.vmap`** makes of a function of one thing a
# function of a batch of them. `in_axes` says which axis of each argument is the batch's,
# `None` that there is none, and `cache.axes` is the package's answer for a cache. Two lines
# show it on our table. (In `batched`, below, model and tokens come as one argument, the
# first, so that only the cache is donated: we still need the tokens.)

# %%
dot = lambda row, weights: row @ weights
print(jax.vmap(dot, in_axes=(0, None))(table, jnp.ones(4)))


# %%
@eqx.filter_jit(donate="all-except-first")
def batched(fixed, cache):
    (model, tokens), axes = fixed, (0, cache.axes)
    return jax.vmap(model, in_axes=axes, out_axes=axes)(tokens, cache)


def write_one_file(prompts, forward=one_file_ref.Transformer.forward):
    run = lambda token, at, cache: forward(one_file, token, jnp.asarray([at]), cache)
    return write_greedily(run, prompts, one_file.empty_cache(len(prompts), 2 + NEW))


def write_eagerly(prompts):  # what `filter_jit` was put around, as it is
    return write_one_file(prompts, one_file_ref.Transformer.forward.__wrapped__)


def write_package(prompts):
    rows, options = jnp.zeros(len(prompts), jnp.int32), dict(chunk=1, max_length=64)
    cache = mx.Cache(package.config, rows, dtype=jnp.float32, **options)
    run = lambda token, at, cache: batched((package, token), cache)
    return write_greedily(run, prompts, cache)


# %%
def write_on_device(prompts):
    rows = mx.generation.generate(package, prompts, max_tokens=NEW, key=key)
    return [row.tokens for row in rows]


def write_torch(batch):
    def answer(twin):
        import torch_mistral

        return torch_mistral.greedy(twin, prompts[batch], NEW)

    return answer


# %% [markdown]
# **Equality comes before speed**: a program that writes something else is not faster.

# %%
ways = {
    "one file, eager": write_eagerly,
    "one file, jit": write_one_file,
    "package, a call a token": write_package,
    "package, loop on the device": write_on_device,
}
for batch in prompts:
    expected = oracle(f"tokens {batch}", write_torch(batch)).astype(int).tolist()
    for name, run in ways.items():
        same = np.asarray(run(prompts[batch])).tolist() == expected
        nb.check(f"{name}, batch {batch}: the tokens of torch", same, eq=True)

# %% [markdown]
# All of them write torch's tokens, so the clock may run. `nb05.race` calls the four ways in
# turn, five times, so that a busy moment of the machine meets all of them.

# %%
timings = {}
for batch in prompts:
    runs = {name: lambda run=run: run(prompts[batch]) for name, run in ways.items()}
    for name, seconds in nb05.race(runs, rounds=5).items():
        timings[name, batch] = seconds
    by_torch = lambda twin: nb.timeit(lambda: write_torch(batch)(twin), repeats=5)
    timings["torch, eager", batch] = oracle(f"seconds {batch}", by_torch)

# %%
names = [*ways, "torch, eager"]
nb05.plot_rates(timings, names, NEW)
nb.caption(
    "tokens a second, the median of five runs with quartiles. The bars are the same "
    "model, the same weights and the same tokens. The two grey ones are the reference's "
    "program, without and with a compiler. The two blue ones are the package's, with the "
    "loop outside and inside the compiled program. The orange one is torch."
)

# %%
rate = lambda name, batch: NEW * batch / timings[name, batch][0]
rows = [[name, f"{rate(name, 1):,.0f}", f"{rate(name, 8):,.0f}"] for name in names]
nb.table(["tokens a second", "batch 1", "batch 8"], rows)
by_compiler = rate("one file, jit", 1) / rate("one file, eager", 1)
by_package = rate("package, loop on the device", 1) / rate("one file, jit", 1)
speedup = by_compiler * by_package
nearest = min((2, 5, 20), key=lambda n: abs(np.log(speedup / n)))
reason = f"eager starts hundreds of operations for a token. It is {speedup:.0f} times."
why = {n: reason for n in (2, 5) if n != nearest}
nb.guess(
    "Loop on the device over eager, the nearest of these", my_speedup, nearest, why=why
)
source = "the compiler" if by_compiler > by_package else "the package"
why = "eager starts every small operation of a token by itself; they are counted below."
why = {"the package": why} if source == "the compiler" else {}
nb.guess("Most of it comes from", my_source, source, why=why)

# %% [markdown]
# The difference in code, bar by bar. From the first to the second: one decorator,
# `eqx.filter_jit`. How many operations does it turn into one call? We count the equations
# of a step. From the second to the third: the cache is donated, and keys are not repeated
# for each query head. (That need not pay at a batch of 1: compare the two bars there.) From
# the third to the fourth, the loop moves into the program.

# %%
eager = one_file_ref.Transformer.forward.__wrapped__
arguments = one_file, text[None, :1], jnp.asarray([0]), one_file.empty_cache(1, 64)
operations = nb05.equations(jax.make_jaxpr(eager)(*arguments).jaxpr)
nb.check("operations that eager dispatches for a token", operations, gt=100)

# %% [markdown]
# And a **`while_loop`** that counts to 9 is one equation, whatever number of turns it
# makes. It gets the condition, the step, and what to start with:

# %%
count = lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x)
print(jax.make_jaxpr(count)(0).pretty_print(use_color=False))

# %% [markdown]
# How much the last step gains depends on how much a token costs. What the loop in Python
# takes of a token's time is the difference between the two blue bars:

# %%
outside = lambda batch: rate("package, a call a token", batch)
python = {b: 1 - outside(b) / rate("package, loop on the device", b) for b in prompts}
nb.say(
    f"**Takeaway.** One call stands for {operations:,} operations. The compiler alone "
    f"(from the first bar to the second) makes the one-file port {by_compiler:.0f} times "
    f"as fast. The package's program and its loop make it {by_package:.1f} times as fast "
    f"again. With the loop in Python, {max(0, python[1]):.0%} of a token's time goes into "
    f"that loop at a batch of 1, and {max(0, python[8]):.0%} at a batch of 8. A model of 7 "
    f"billion parameters reads {7e9 * 2 / 1e9:.0f} GB of 16-bit weights for each token, "
    "wherever its loop is."
)

# %% [markdown]
# ## Does scan pay in decoding?
#
# With scan, the program of a deep model is smaller. Does it run as fast? In **decoding**,
# which is writing token by token, each step reads every weight once, from a stack or from
# separate arrays. `scan` also collects: the second thing that its step gives back, here the
# ring of each layer, becomes a row of the result.


# %%
def scanned_step(model, stacked, rings, token, length):
    positions = jnp.atleast_1d(length)
    places = mx.rope.Places(model.config, positions, length)
    body = lambda x, layer: layer[0](x, places, layer[1])
    x, rings = jax.lax.scan(body, model.tok_embeddings(token), (stacked, rings))
    return model.logits(x), rings


bare, stacked = split(package)
rings = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cache.layers)

# %%
with_loop, with_scan = jax.jit(step), jax.jit(scanned_step)
looping, scanning = (
    (package, one_token, cache),
    (bare, stacked, rings, one_token, jnp.int32(0)),
)
apart = float(jnp.abs(with_loop(*looping)[0] - with_scan(*scanning)[0]).max())
nb.check("max|Δ| logits of a decode step, loop and scan", apart, lt=1e-4)

# %%
seconds = [
    nb.timeit(lambda: with_loop(*looping), repeats=31),
    nb.timeit(lambda: with_scan(*scanning), repeats=31),
]
handing = [nb05.hand_over(*looping), nb05.hand_over(*scanning)]
arrays = [len(jax.tree.leaves(arguments)) for arguments in (looping, scanning)]
milliseconds = lambda timings: [f"{1000 * timing.median:.2f}" for timing in timings]
columns = arrays, milliseconds(handing), milliseconds(seconds)
header = ["a decode step with", "arrays handed over", "handing over (ms)", "in all (ms)"]
nb.table(header, [[name, *row] for name, *row in zip(("loop", "scan"), *columns)])
nb.check("arrays handed over, loop less scan", arrays[0] - arrays[1], gt=50)

# %% [markdown]
# (The third column times a compiled function that gets the same arrays and does nothing.)

# %%
nb.say(
    f"**Takeaway.** On this machine and at this size a decode step with scan takes "
    f"{seconds[1].median / seconds[0].median:.1f} times as long as with the loop. What "
    "scan saves for certain is the size of the program. Measure its run time where it "
    "matters."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: count the traces** (● 5 minutes). How often is `scaled` traced, in all? A
# number.
#
# ```python
# scaled = eqx.filter_jit(lambda x, step: x * step)
#
# for length in (4, 8, 8, 4):
#     x = jnp.ones(length)
#     for step in (0, 1, 2):
#         scaled(x, step)
#         scaled(x, jnp.asarray(step))
# ```
#
# <details><summary>Hint</summary>
#
# What does `eqx.filter_jit` trace, and what is a constant of the program? Write down what
# makes each of the first six calls new, or not.
#
# </details>
#
# {{solution:n_traces}}

# %%
n_traces = NotImplemented
ex05.check_n_traces(n_traces)

# %% [markdown]
# **Exercise 2: build buckets** (●● 10 minutes). `ex05.LENGTHS` are the lengths of the
# prompts of a day. Make a list of at most four buckets, so that padding to them costs less
# than half the pads of 64, 128, 256 and 512. Compute it from the lengths.
#
# <details><summary>Hint</summary>
#
# Most prompts are short: look at `np.quantile(ex05.LENGTHS, ...)`. The longest must
# fit.
#
# </details>
#
# {{solution:buckets}}

# %%
buckets = NotImplemented  # a list of numbers
ex05.check_buckets(buckets)

# %% [markdown]
# **Exercise 3: repair a slow loop** (●● 5 minutes). `compile_once` shall compile a function
# of an array and a step, so that ten calls with steps 0 to 9 run one program. This version
# gives the right numbers, and is traced ten times. Repair it.
#
# ```python
# def compile_once(function):
#     return eqx.filter_jit(function)
# ```
#
# <details><summary>Hint</summary>
#
# Of the two ways to compile in this notebook, one makes an array of a Python number, and
# the other a constant.
#
# </details>
#
# {{solution:compile_once}}


# %%
def compile_once(function):
    return NotImplemented


ex05.check_compile_once(compile_once)

# %% [markdown]
# ## Recap

# %%
answers = [
    [
        "the first seconds",
        f"trace, lower, compile: the time of {calls[0] / steady:,.0f} later calls",
    ],
    [
        "a new shape",
        f"a new program: {naive_programs} for 10 lengths, {bucketed} in buckets",
    ],
    ["a layer more", f"{per_layer[0]} equations in the loop, none in scan"],
    ["a donated cache", f"{cache_bytes / 1024:.0f} KiB updated in place, and not copied"],
    ["a loop on the device", f"{speedup:.0f} times the tokens a second of eager"],
]
nb.table(["what", "what it does"], answers)

# %%
nb.recap()

# %%
size = nb05.equations(jax.make_jaxpr(looped)(package, text).jaxpr)
nb.say(
    f"**The answer.** The first seconds go into compiling a program of {size:,} equations. "
    "It is compiled again for every new shape, of which the package has a handful. It is "
    "fast because all of a token, and the loop over tokens, is one program that updates "
    f"its cache in place: {speedup:.0f} times the tokens a second of running it operation "
    f"by operation. The compiler makes a factor of {by_compiler:.1f} of this, and the "
    f"package's program and its loop one of {by_package:.1f}."
)

# %% [markdown]
# **What we did not show**: a GPU or a TPU; the persistent compilation
# cache (`jax_compilation_cache_dir`), which keeps programs between runs; ahead-of-time
# export.
#
# **Further reading**: Frostig, Johnson & Leary, *Compiling machine learning programs via
# high-level tracing* (2018); Kidger & Garcia, arXiv 2111.00254 (filtered
# transformations); Pope et al., arXiv 2211.05102, §2 (what decoding costs).
#
# **Next**: [06 Choosing the next token](06_choosing_the_next_token.ipynb). All notebooks:
# [README.md](README.md).
