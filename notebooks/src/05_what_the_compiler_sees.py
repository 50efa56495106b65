# ---
# jupyter:
#   budget: 110
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
#   `generate` of `one_file_ref.py`.
# - **Model and data**: the embedded model, and random ones of other depths.
# - **Torch**: live if installed, else its recorded answers (and its recorded times).
# - **Predict first**: how does the time to compile grow with depth? How much does one
#   Python `int` cost?
#
# No number of seconds below is asserted, for machines differ and are busy. What is
# asserted is the mechanism: how often something is traced, how many equations a program
# has, how many bytes are shared.

# %%
import dataclasses
import io
import logging
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mistral_eqx as mx
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
small = mx.ModelConfig(
    dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2,
    norm_eps=1e-5, vocab_size=2048, sliding_window=64,
)  # fmt: skip

# %% [markdown]
# ## Four stages
#
# A torch program runs line by line. `jax.jit` does something else the first time it is
# called: it runs the Python with *tracers* in place of arrays and writes down every
# operation (**trace**); translates that list, the *jaxpr*, for the compiler (**lower**);
# and makes machine code of it (**compile**). Only then does it **run**; the next call
# with the same shapes runs straight away.

# %%
text = jnp.asarray(tokens[:32])
forward = jax.jit(lambda model, tokens: model(tokens)[0])
x = jnp.ones((32, 256))
print(jax.make_jaxpr(lambda x: package.norm(x))(x).pretty_print(use_color=False))

# %% [markdown]
# That is RMSNorm as the compiler sees it: arrays with their shapes, operations, and no
# class. Of a whole model there would be no loop over layers either, for Python has run
# through it while tracing: a model with twice the layers is twice the program. (The
# package traces the block once and calls it for each layer; each call is compiled.)
# `jax.lax.scan` instead traces **one** block and says "do this for each of these
# weights", stacked along a new axis.


# %%
def scanned(model, stacked, tokens):
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    places = mx.rope.Places(model.config, positions)

    def body(x, block):
        return block(x, places, None)[0], None

    x, _ = jax.lax.scan(body, model.tok_embeddings(tokens), stacked)
    return model.logits(x)


def split(model):  # the model without its layers, and the layers stacked
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *model.layers)
    return eqx.tree_at(lambda m: m.layers, model, ()), stacked


# %%
direct = forward(package, text)
through_scan = jax.jit(scanned)(*split(package), text)
nb.check(
    "max|Δ| logits, loop and scan", float(jnp.abs(direct - through_scan).max()), lt=2e-4
)

# %% [markdown]
# **Predict.** From 2 layers to 32: by what factor does the time to compile grow, with the
# loop and with the scan?

# %%
my_loop, my_scan = None, None  # two factors


# %%
def stages(function, *arguments):  # equations; CPU seconds to trace, lower, compile, run
    marks = [time.process_time()]
    traced = jax.jit(function).trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    compiled = lowered.compile()
    marks.append(time.process_time())
    jax.block_until_ready(compiled(*arguments))
    marks.append(time.process_time())
    return equations(traced.jaxpr.jaxpr), np.diff(marks)


def equations(jaxpr):  # those of the programs inside it too
    inner = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    inner = [getattr(part, "jaxpr", part) for part in inner]
    return len(jaxpr.eqns) + sum(equations(part) for part in inner if hasattr(part, "eqns"))


# %%
depths = [2, 8, 32]
loop, scan = [], []
shallow = mx.Transformer(dataclasses.replace(small, n_layers=1), key=key)
stages(scanned, *split(shallow), text)  # the very first is slow
for depth in depths:
    model = mx.Transformer(dataclasses.replace(small, n_layers=depth), key=key)
    loop.append(stages(lambda model, tokens: model(tokens)[0], model, text))
    scan.append(stages(scanned, *split(model), text))

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 4))
shades = ["#dddddd", "#999999", "#31688e", "#000000"]
for offset, measured in ((-0.2, loop), (0.2, scan)):
    bottom = np.zeros(len(depths))
    for i, stage in enumerate(("trace", "lower", "compile", "run")):
        seconds = np.array([times[i] for _, times in measured])
        label = stage if offset < 0 else None
        axes[0].bar(
            np.arange(len(depths)) + offset,
            seconds,
            0.36,
            bottom,
            color=shades[i],
            label=label,
        )
        bottom += seconds
    for x, top in enumerate(bottom):
        axes[0].text(
            x + offset,
            top,
            "loop" if offset < 0 else "scan",
            ha="center",
            va="bottom",
            fontsize=8,
        )
axes[0].set_xticks(range(len(depths)), depths)
axes[0].set(xlabel="layers", ylabel="first call (CPU seconds)")
axes[0].legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
axes[1].plot(depths, [n for n, _ in loop], label="loop")
axes[1].plot(depths, [n for n, _ in scan], label="scan")
axes[1].set(xlabel="layers", ylabel="equations in the program", ylim=(0, None))
axes[1].set_xticks(depths)
axes[1].legend()
nb.caption(
    "left, the first call is mostly compiling, and the run itself, in black, a small "
    "part. With the Python loop it grows with the depth; with scan it does not, "
    "though for a few layers scan may be the dearer one. "
    "Right, why: the program of the loop has its equations once for each layer, that of "
    "scan once."
)

# %%
growth = lambda measured: measured[-1][1][2] / measured[0][1][2]
nb.guess("Compiling, 32 layers over 2, loop", my_loop, f"{growth(loop):.1f}x")
nb.guess("Compiling, 32 layers over 2, scan", my_scan, f"{growth(scan):.1f}x")
per_layer = np.diff([n for n, _ in loop]) // np.diff(depths)
added = "equations that a layer adds, from 2 to 8 layers less from 8 to 32"
nb.check(added, int(per_layer[0] - per_layer[1]), eq=0)
slope, fixed = np.polyfit(depths, [times[2] for _, times in loop], 1)
nb.check("equations of scan, 32 layers less 2 layers", scan[-1][0] - scan[0][0], eq=0)

# %%
nb.say(
    f"**Takeaway.** In the loop every layer is {per_layer[0]} more equations to compile; "
    f"in scan there are {scan[0][0]} whatever the depth. Sixteen times the layers are not "
    "sixteen times the seconds: a straight line through the three depths says that a "
    f"layer costs {1000 * slope:.0f} ms to compile, and {fixed:.1f} s are there without "
    "any. The package has the loop all the same, since its models are shallow, or compiled "
    "once and run for long, and unrolled layers may differ."
)

# %% [markdown]
# ## The same call, twelve times
#
# What somebody sees who times a function by calling it:

# %%
fresh = jax.jit(lambda model, tokens: model(tokens)[0])
calls = []
for _ in range(12):
    start = time.perf_counter()
    jax.block_until_ready(fresh(package, text))
    calls.append(time.perf_counter() - start)

# %%
figure, axis = plt.subplots(figsize=(7, 3))
axis.semilogy(range(1, 13), 1000 * np.array(calls))
axis.set(xlabel="call", ylabel="time (ms)")
axis.set_xticks(range(1, 13))
nb.caption(
    "one slow call, then calls of a few milliseconds. A mean over these would describe "
    "neither. Compile time and run time are two numbers: report both."
)

# %%
steady = np.median(calls[2:])
nb.say(f"The first call took as long as {calls[0] / steady:,.0f} of the later ones.")

# %% [markdown]
# And there is a second trap. JAX does not wait: a call returns when the work has been
# **handed over**, not when it is done. A clock stopped without `block_until_ready`
# measures the handing over.

# %%
heavy = jax.jit(lambda x: jnp.linalg.matrix_power(x, 16))
x = jax.block_until_ready(heavy(jnp.eye(1200)))
start = time.perf_counter()
y = heavy(x)
handed_over = time.perf_counter() - start
jax.block_until_ready(y)
done = time.perf_counter() - start
nb.say(f"Handed over after {1000 * handed_over:.2f} ms; done after {1000 * done:.1f} ms.")

# %% [markdown]
# **Takeaway.** Warm up first, block before stopping the clock, report the compile time
# apart. `timeit` of `nbtools.py` does so, and gives the median and the quartiles.
#
# ## What makes it compile again
#
# Compiled code is for the shapes and the static values that it was traced with. Anything
# else is traced and compiled anew. Twenty prompts of different lengths:

# %%
lengths = list(range(5, 65, 3))
model = mx.Transformer(small, key=key)
counted = jax.jit(eqx.debug.assert_max_traces(lambda m, t: m(t)[0], max_traces=20))
exact = [counted(model, jnp.asarray(tokens[:n]))[-1] for n in lengths]
naive = eqx.debug.get_num_traces(counted)
nb.check("programs compiled for 20 lengths", naive, eq=20)


# %% [markdown]
# Here we know the reason. When you do not, ask: inside `jax.explain_cache_misses`, JAX
# writes into its log which argument was new, and what the nearest call before had there.
# (`jax.log_compiles` says when anything is compiled, and how long that took.)
#
# Read its last line as a sentence: *at* this argument, *now* this shape, *before* that
# one. A static argument that changed is told in the same way. Often the culprit is not a
# shape at all, but a Python number where an array was meant, or a function that is made
# anew in a loop and so is never the same function twice. Exercise 1 is about the first.

# %%
said = io.StringIO()
log, handler = logging.getLogger("jax"), logging.StreamHandler(said)
log.addHandler(handler)
with jax.explain_cache_misses(True):
    counted_here = jax.jit(lambda tokens: 2 * tokens)
    counted_here(jnp.asarray(tokens[:5]))
    counted_here(jnp.asarray(tokens[:8]))
log.removeHandler(handler)
reasons = [line.strip() for line in said.getvalue().splitlines() if "[" in line]
print(reasons[-1])
nb.check("the log names the new shape", "[8]" in reasons[-1], eq=True)

# %% [markdown]
# The cure is to have few shapes. **Buckets**: pad each prompt on the right to the next
# power of two. Pads come after the text, so a causal model's logits before them are the
# same.

# %%
counted = jax.jit(eqx.debug.assert_max_traces(lambda m, t: m(t)[0], max_traces=4))
gap = 0.0
for n, expected in zip(lengths, exact):
    bucket = max(8, 1 << (n - 1).bit_length())
    padded = jnp.zeros(bucket, jnp.int32).at[:n].set(jnp.asarray(tokens[:n]))
    gap = max(gap, float(jnp.abs(counted(model, padded)[n - 1] - expected).max()))
bucketed = eqx.debug.get_num_traces(counted)

# %%
nb.check("programs compiled with buckets", bucketed, eq=4)
nb.check("max|Δ| logits, padded and not", gap, lt=1e-4)

# %% [markdown]
# The package does without pads on a single prompt, and with a bound for prompts of *any*
# length: it reads them in chunks, each as large as it may be, or a power of two below.

# %%
nb.show_source(mx.cache.chunk_sizes)

# %%
counted = jax.jit(eqx.debug.assert_max_traces(lambda m, t, c: m(t, c), max_traces=5))
for n in lengths:
    cache = mx.Cache(small, jnp.int32(0), chunk=16, max_length=256, dtype=jnp.float32)
    start = 0
    for size in mx.cache.chunk_sizes(0, n, chunk=16, slots=cache.slots):
        logits, cache = counted(model, jnp.asarray(tokens[start : start + size]), cache)
        start += size
chunked = eqx.debug.get_num_traces(counted)
nb.check("programs compiled in chunks of up to 16", chunked, eq=5)

# %%
nb.say(
    f"**Takeaway.** Twenty lengths are {naive} programs if one lets them, {bucketed} with "
    f"buckets and {chunked} in chunks. `eqx.debug.assert_max_traces` turns a recompilation "
    "from a mystery into an error."
)

# %% [markdown]
# ## Giving memory back
#
# A JAX function may not change its input, so a step that returns an updated cache makes a
# whole new one: two caches, and a copy for every token. **Donation** is the promise not
# to use the input again; the compiler then writes into its memory. In Equinox it is a
# word: `eqx.filter_jit(donate="all-except-first")`, as in `decode`, whose first argument
# is the model. The compiler tells what it shares:

# %%
cache = mx.Cache(package.config, jnp.int32(0), chunk=1, max_length=256, dtype=jnp.float32)
one_token = jnp.asarray(tokens[:1])
step = lambda model, token, cache: model(token, cache)
shared = {}
for name, donated in (("kept", ()), ("donated", (2,))):
    compiled = (
        jax.jit(step, donate_argnums=donated).lower(package, one_token, cache).compile()
    )
    shared[name] = compiled.memory_analysis().alias_size_in_bytes
cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))

# %%
nb.table(["the cache is", "bytes shared by input and output"], [*shared.items()])
nb.check("bytes shared without donation", shared["kept"], eq=0)
nb.check(
    "bytes shared with donation, over the cache's",
    shared["donated"] / cache_bytes,
    near=1.0,
)

# %%
nb.say(
    f"**Takeaway.** Donated, all {cache_bytes / 1024:.0f} KiB of the cache are updated in "
    "place; otherwise they would be copied for every token."
)

# %% [markdown]
# ## Two ports and torch: tokens a second
#
# Now the benchmark. Five ways to write 24 tokens behind a prompt of 16:
#
# 1. **one file, eager**: operation by operation, as torch works;
# 2. **one file, jit**: its forward pass compiled, a Python loop around it;
# 3. **package, a call a token**: the package's model in the same Python loop;
# 4. **package, loop on the device**: `generate`, whose loop is a `jax.lax.while_loop`
#    inside the compiled program, so Python is only asked once for 24 tokens;
# 5. **torch, eager**, on one thread, which is enough for so small a model.
#
# **Predict.** How many times faster is 4 than 1?

# %%
my_speedup = None  # a factor

# %%
NEW = 24
candidates = [[tokens[0], *tokens[i : i + 15]] for i in range(1, 240, 8)]
# Those that the tokenizer would cut in the same way: `generate` takes texts.
candidates = [c for c in candidates if tokenizer.encode(tokenizer.decode(c)) == c]
prompts = {batch: candidates[:batch] for batch in (1, 8)}


def write_one_file(prompts, forward=one_file_ref.Transformer.forward):
    caches = one_file.empty_cache(len(prompts), 16 + NEW)
    logits, caches = forward(one_file, jnp.asarray(prompts), jnp.arange(16), caches)
    made = [logits[:, -1].argmax(-1)]
    for position in range(16, 15 + NEW):
        at = jnp.asarray([position])
        logits, caches = forward(one_file, made[-1][:, None], at, caches)
        made.append(logits[:, -1].argmax(-1))
    return jnp.stack(made, axis=1)


def write_eagerly(prompts):  # what `filter_jit` was put around, as it is
    return write_one_file(prompts, one_file_ref.Transformer.forward.__wrapped__)


# %%
@eqx.filter_jit(donate="all-except-first")
def batched(model, tokens, cache):
    axes = (0, cache.axes)
    logits, cache = jax.vmap(model, in_axes=axes, out_axes=axes)(tokens, cache)
    return logits[:, -1].argmax(-1), cache


def write_package(prompts):
    padding = jnp.zeros(len(prompts), jnp.int32)
    cache = mx.Cache(package.config, padding, chunk=16, max_length=64, dtype=jnp.float32)
    token, cache = batched(package, jnp.asarray(prompts), cache)
    made = [token]
    for _ in range(NEW - 1):
        token, cache = batched(package, made[-1][:, None], cache)
        made.append(token)
    return jnp.stack(made, axis=1)


def write_on_device(prompts):
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    return [c.tokens for c in mx.generate(package, tokenizer, texts, max_tokens=NEW)]


def write_torch(batch):
    def answer(twin):
        import torch_mistral

        return torch_mistral.greedy(twin, prompts[batch], NEW)

    return answer


def time_torch(batch):
    return lambda twin: nb.timeit(lambda: write_torch(batch)(twin), repeats=5)


# %% [markdown]
# **Equality comes before speed**: a program that writes something else is not faster.

# %%
ways = {
    "one file, eager": write_eagerly,
    "one file, jit": write_one_file,
    "package, a call a token": write_package,
    "package, loop on the device": write_on_device,
}
for batch in (1, 8):
    expected = oracle(f"tokens {batch}", write_torch(batch)).astype(int).tolist()
    for name, write in ways.items():
        same = np.asarray(write(prompts[batch])).tolist() == expected
        nb.check(f"{name}, batch {batch}: the tokens of torch", same, eq=True)

# %%
timings = {}
for batch in (1, 8):
    for name, write in ways.items():
        repeats = 5
        timings[name, batch] = nb.timeit(lambda: write(prompts[batch]), repeats=repeats)
    timings["torch, eager", batch] = oracle(f"seconds {batch}", time_torch(batch))

# %%
names = [*ways, "torch, eager"]
figure, axes = plt.subplots(2, 1, figsize=(7, 5.6))
for axis, batch in zip(axes, (1, 8)):
    for i, name in enumerate(names):
        median, low, high = (NEW * batch / seconds for seconds in timings[name, batch])
        shade = ["#bbbbbb", "#999999", "#5b8db8", "#123f66", "#e07b00"][i]
        axis.barh(i, median, color=shade)
        axis.errorbar(
            median,
            i,
            xerr=[[median - high], [low - median]],
            color="k",
            capsize=3,
            marker="",
        )
        axis.text(max(median, low), i, f"  {median:,.0f}", va="center")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(f"batch of {batch}", fontsize=11)
axes[1].set_xlabel("tokens a second, prompt included (median and quartiles)")
nb.caption(
    "the bars are the same model, the same weights and the same tokens. The grey ones "
    "are the reference's program, without and with a compiler; the blue ones the "
    "package's, with the loop outside and inside the compiled program; the orange one is "
    "torch."
)

# %%
rate = lambda name, batch: NEW * batch / timings[name, batch][0]
nb.table(
    ["tokens a second", "batch 1", "batch 8"],
    [[name, f"{rate(name, 1):,.0f}", f"{rate(name, 8):,.0f}"] for name in names],
)
speedup = rate("package, loop on the device", 1) / rate("one file, eager", 1)
nb.guess("Loop on the device over eager", my_speedup, f"{speedup:.0f}x")

# %% [markdown]
# The difference in code, bar by bar: from the first to the second, one decorator,
# `eqx.filter_jit`, which turns hundreds of dispatched operations into one call. From the
# second to the third, a cache that is donated and written in place, and keys that are not
# repeated for each query head. To the fourth, the loop moves into the program, and Python
# and its dispatch drop out of every token.
#
# How far the last step leads depends on how much a token costs. What Python and its
# dispatch take of a token's time is the difference between the two blue bars:

# %%
python = {}
for batch in (1, 8):
    inside = rate("package, loop on the device", batch)
    python[batch] = 1 - rate("package, a call a token", batch) / inside
nb.say(
    f"With the loop in Python, {python[1]:.0%} of a token's time go into Python and its "
    f"dispatch at a batch of 1, and {python[8]:.0%} at a batch of 8. The compiler alone "
    f"(from the first bar to the second) makes this port "
    f"{rate('one file, jit', 1) / rate('one file, eager', 1):.0f} times as fast, and the "
    "package's program and its loop "
    f"{rate('package, loop on the device', 1) / rate('one file, jit', 1):.1f} times more. "
    "A model of 7 billion parameters reads 14 GB of weights for each token, beside which "
    "Python's share is small."
)

# %% [markdown]
# ## Does scan pay in decoding?
#
# Of a deep model it compiles faster. In decoding each step reads every weight once, from a
# stack or from separate arrays.


# %%
def scanned_step(model, stacked, rings, token, length):
    positions = jnp.atleast_1d(length)
    places = mx.rope.Places(model.config, positions, length)

    def body(x, layer):
        block, ring = layer
        return block(x, places, ring)

    x, rings = jax.lax.scan(body, model.tok_embeddings(token), (stacked, rings))
    return model.logits(x), rings


bare, stacked = split(package)
cache = mx.Cache(package.config, jnp.int32(0), chunk=1, max_length=64, dtype=jnp.float32)
rings = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cache.layers)

# %%
looped, with_scan = jax.jit(step), jax.jit(scanned_step)
a, _ = looped(package, one_token, cache)
b, _ = with_scan(bare, stacked, rings, one_token, jnp.int32(0))
nb.check(
    "max|Δ| logits of a decode step, loop and scan", float(jnp.abs(a - b).max()), lt=1e-4
)
looping = nb.timeit(lambda: looped(package, one_token, cache), repeats=31)
scanning = nb.timeit(
    lambda: with_scan(bare, stacked, rings, one_token, jnp.int32(0)), repeats=31
)

# %%
nb.say(
    f"**Takeaway.** A decode step takes {1000 * looping.median:.2f} ms with the loop and "
    f"{1000 * scanning.median:.2f} ms with scan, on this machine and at this size: "
    f"{scanning.median / looping.median:.1f} times as long. Part of that is the call "
    f"itself, which hands over {len(jax.tree.leaves((package, cache)))} arrays in one "
    f"case and {len(jax.tree.leaves((bare, stacked, rings)))} in the other. Scan saves "
    "compile time; what it does to run time is to be measured where it matters."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: find the culprit** (● 5 minutes). `scaled` is called ten times with steps
# 0 to
# 9. In which of these is it traced ten times?
#
# ```python
# scaled = eqx.filter_jit(lambda x, step: x * step)
#
# scaled(x, jnp.asarray(step))  # A
# scaled(x, np.int32(step))     # B
# scaled(x, step)               # C: a Python int
# ```
#
# <details><summary>Hint</summary>
#
# What does `eqx.filter_jit` take for an array, and what for a constant?
#
# </details>
#
# {{solution:culprit}}

# %%
culprit = NotImplemented  # "A", "B" or "C"
ex05.check_culprit(culprit)

# %% [markdown]
# **Exercise 2: choose buckets** (●● 10 minutes). `ex05.LENGTHS` are the lengths of
# the prompts of a day. Choose at most four buckets, so that padding to them costs less
# than half the pads of 64, 128, 256 and 512.
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
# **Exercise 3: one trace for all** (●● 5 minutes). `compile_once` gets a function of an
# array and a step. Return it compiled, such that ten calls, with steps 0 to 9, trace it
# once.
#
# <details><summary>Hint</summary>
#
# `jax.jit` makes an array of a Python number, `eqx.filter_jit` a constant.
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
nb.recap()

# %%
nb.say(
    "**The answer.** The first seconds go into compiling a program of "
    f"{equations(forward.trace(package, text).jaxpr.jaxpr):,} equations; it is compiled "
    "again for every new shape, of which the package has a handful. It is fast because "
    "all of a token, and the loop over tokens, is one program that updates its cache in "
    f"place: {speedup:.0f} times the tokens a second of running it operation by operation, "
    "most of them from the compiler, as the bars say."
)

# %% [markdown]
# **What we did not show**: a GPU, where dispatch matters more; the persistent compilation
# cache (`jax_compilation_cache_dir`), which keeps programs between runs; ahead-of-time
# export.
#
# **Further reading**: Frostig, Johnson & Leary, *Compiling machine learning programs via
# high-level tracing* (2018); Kidger & Garcia, arXiv 2111.00254 (filtered
# transformations); Pope et al., arXiv 2211.05102, §2 (what decoding costs).
#
# **Before**: [04 The rolling buffer](04_the_rolling_buffer.ipynb). All notebooks:
# [README.md](README.md).
