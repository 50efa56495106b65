# ---
# jupyter:
#   budget: 160
#   cover: 3
# ---

# %% [markdown]
# # Training and LoRA
#
# **How do you know that a training step is right, and what does a model forget when it
# learns something new?**
#
# - **You will be able to** say which parts of a module are trained; check a loss and a
#   gradient before you trust a curve; freeze weights for real; split a batch without
#   changing the step; and train a LoRA adapter (two thin matrices beside each weight),
#   turn it up and down, and merge it.
# - **Before this**: [01](01_one_model_two_languages.ipynb), for modules and random keys.
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/learning/`: `training.py`, `batches.py`, `lora.py`.
#   It needs optax (`pip install 'mistral_eqx[train]'`), JAX's library of optimizers.
# - **Model and data**: a model of one layer, trained here from nothing; the embedded
#   model; Shakespeare, and Shakespeare in Pig Latin.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: what is the first loss? What is left of a weight after 1,000 steps
#   with a gradient of zero? Does one of LoRA's two matrices begin with a gradient of
#   zero?
#
# The letters: `T` tokens, `D` width of the model, `V` vocabulary, and here also `r`, the
# rank of an adapter; see [README.md](README.md).

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mistral_eqx as mx
import nb09
import nbtools as nb
import one_file_ref
from exercises import ex09
from mistral_eqx.learning import lora, training
from mistral_eqx.learning.batches import Batch, Example, Packed, Slices


key = jax.random.key(0)
nb.versions()

# %%
package, tokenizer = mx.load(dtype=jnp.float32)
shape = dict(dim=48, n_layers=1, head_dim=16, hidden_dim=120, n_heads=3, n_kv_heads=1)
config = mx.ModelConfig(**shape, norm_eps=1e-5, vocab_size=2048, sliding_window=64)
little = mx.Transformer(config, key=key)  # new: its weights are random
compiled_loss = eqx.filter_jit(training.loss)

# %% [markdown]
# ## The loss, before anything is trained
#
# A model gives a score, a **logit**, for each token that may come next. The loss asks one
# thing: how probable was the token that did come? It is the negative logarithm of that
# probability, in **nats**, and its mean over all tokens. Here are four tokens from a
# vocabulary of four. Row `t` has the logits of what follows token `t`. The last line
# computes the loss.

# %%
tokens = jnp.array([2, 0, 3, 1])
logits = jax.random.normal(key, (4, 4))  # [T, V]
print(logits.round(2))
probabilities = jnp.exp(logits) / jnp.exp(logits).sum(axis=1, keepdims=True)
print("naive:", -jnp.log(probabilities[jnp.arange(3), tokens[1:]]).mean())

# %% [markdown]
# Mind the **shift**: row 0 is held to token *1*, and the last row to nothing. A loss
# without the shift asks the model to copy its input, and no shape complains. So we
# compare the package's loss with one by hand, on a passage of Shakespeare. The model is a
# new one of one layer, whose weights are random. (`eqx.filter_jit` compiles a function
# whose arguments have more in them than arrays; [05](05_what_the_compiler_sees.ipynb) is
# about compiling. `jax.nn.log_softmax` is the logarithm of the probabilities above.)

# %%
text = jnp.asarray(nb.held_out(257))
run = eqx.filter_jit(little)
log_probabilities = jax.nn.log_softmax(run(text[:-1])[0])  # [T, V]
each = -log_probabilities[jnp.arange(256), text[1:]]
unshifted = -log_probabilities[jnp.arange(256), text[:-1]].mean()
ours = float(compiled_loss(little, Batch(text[None])))
nb.check("loss, |package - by hand|", abs(ours - float(each.mean())), lt=1e-4)
nb.check("loss, |package - without the shift|", abs(ours - float(unshifted)), gt=0.02)

# %% [markdown]
# **Predict.** This new model has `V` = 2,048 ids and knows nothing. If each id were
# equally probable, the loss would be ln V, about 7.6. What is the loss of the new model:
# 7.6, 8.1, or about 11? (For the plot the vocabulary is cut to its first 32, 128 or 512
# ids. The rows of the output matrix are drawn independently, so the cut model is a new
# model too.)

# %%
my_first_loss = None  # 7.6, 8.1 or 11

# %%
sizes, first, rng = [32, 128, 512, 2048], [], np.random.default_rng(0)
for size in sizes:
    ids = rng.integers(0, size, 257)
    logits = run(jnp.asarray(ids[:-1]))[0][:, :size]  # [T, V]
    first.append(float(-jax.nn.log_softmax(logits)[jnp.arange(256), ids[1:]].mean()))

# %%
why = {
    7.6: "that is no opinion: all logits equal. These logits have variance 1.",
    11: "that would be overconfidence: weights that start too large.",
}
nb.guess("The first loss at 2,048 ids", my_first_loss, round(first[3], 1), why)

# %% [markdown]
# One number may come out right by luck, so here are four vocabularies.

# %%
nb09.plot_first_losses(sizes, first)
nb.caption(
    "a new model is worse than having no opinion, by about half a nat in each of four "
    "vocabularies: it has opinions, and they are random."
)

# %% [markdown]
# The points lie close to the upper line. Where does it come from?

# %%
excess = np.array(first) - np.log(sizes)
nb.check("first loss over ln V, the least", excess.min(), gt=0.25)
nb.check("first loss over ln V, the most", excess.max(), lt=0.75)
noise = rng.normal(size=(2000, 2048))
gap = np.log(np.exp(noise).sum(axis=1)).mean() - np.log(2048)
nb.check("logsumexp of noise of variance 1, over ln V", gap, near=0.5)
nb.check("variance of the new model's logits", float(logits.var()), near=1, rtol=0.3)

# %% [markdown]
# The last two checks show the cause. The first of them has no model in it: if logits are
# noise of variance 1, the logarithm of the sum of their exponentials is ln V + 1/2. And
# the package draws its weights so that logits begin with variance 1. So the cheapest test
# of a training program is **one number, before the first step**.
#
# ### Pads do not count
#
# Examples to learn from are often short, so several share a row, and **pads**, tokens
# that nobody is to learn, fill what is left. A `Batch` says which example each token
# belongs to (`segments`) and which tokens are learnt. The mean must go over the learnt
# tokens, and over no others. Here are two examples in a row of 64: the first 9 and the
# first 20 tokens of the passage. `Packed` lays them out, and its `measured(1)` gives
# batches of one row. A token's loss depends only on what is before it in its example, so
# it must be the one that `each` has, computed above.

# %%
lengths = (9, 20)
examples = [Example(text[:n].tolist(), [True] * n) for n in lengths]
rows = Packed(examples, seq_len=63)
(batch,) = rows.measured(1)
print(rows.told)
print(batch.segments[0])

# %%
n_learnt = sum(lengths) - 2  # the first token of each is only read
expected = float((each[:8].sum() + each[:19].sum()) / n_learnt)
packed_loss = float(compiled_loss(little, batch))
nb.check("loss, |packed - each alone|", abs(packed_loss - expected), lt=1e-3)
nb.check("learnt tokens of the row", int(training.n_learnt(batch)), eq=n_learnt)

# %% [markdown]
# **Takeaway.** A new model of this package starts at about ln V + 1/2. Pads and
# neighbours in a row change nothing.
#
# ## What is trained, and what is left alone
#
# To JAX a model is a **pytree**: modules, lists and tuples are its branches, and what hangs
# at their ends are its **leaves**. `jax.tree.map(f, tree)` applies `f` to every leaf, and
# keeps the branches.
#
# [01](01_one_model_two_languages.ipynb) says what happens to a float like `eps` that nobody
# marked *static*: `jax.grad` gives it a gradient, and `eqx.filter_grad`, which computes the
# gradient of a module's arrays, leaves it alone. That is not the whole story. Here is a
# norm whose `eps` is a leaf, and a function of it to make smaller. (An `eps` of a half, so
# that one sees it move.)


# %%
class Norm(eqx.Module):
    weight: jax.Array  # [4]
    eps: float  # not marked static, so it is a leaf

    def __call__(self, x):
        return self.weight * x / jnp.sqrt(jnp.mean(x**2) + self.eps)


def error(norm):
    return jnp.sum((norm(jnp.arange(4.0)) - jnp.arange(4.0)) ** 2)


# %% [markdown]
# **Predict.** The same number can be written in three ways: `0.5`, `np.float32(0.5)` and
# `jnp.array(0.5)`. For how many of the three does `eqx.filter_grad` give `eps` a gradient?

# %%
my_spellings = None  # 0, 1, 2 or 3

# %%
halves = {"0.5": 0.5, "np.float32(0.5)": np.float32(0.5), "jnp.array(0.5)": jnp.array(0.5)}
gradients_of_eps = lambda eps: [
    grad(error)(Norm(jnp.ones(4), eps)).eps for grad in (jax.grad, eqx.filter_grad)
]
found = {spelling: gradients_of_eps(eps) for spelling, eps in halves.items()}

# %%
rows = [[f"`{spelling}`", *map(str, gradients)] for spelling, gradients in found.items()]
nb.table(["eps is", "by `jax.grad`", "by `eqx.filter_grad`"], rows)
n_all, n_arrays = (sum(g[i] is not None for g in found.values()) for i in (0, 1))
why = {
    0: "that is so for a float of Python. The two others count as arrays, without axes.",
    1: "an array without axes is an array, and a scalar of NumPy counts as one, too.",
    3: "a float of Python is no array.",
}
nb.guess("Ways in which eps is trained", my_spellings, n_arrays, why)
nb.check("ways in which jax.grad trains eps", n_all, eq=3)
nb.check("ways in which filter_grad trains eps", n_arrays, eq=2)

# %% [markdown]
# So a float of Python is safe from `filter_grad`, and the same number *read from a file by
# NumPy* is not: an optimizer will move your `eps`. The cure is to say what is trained,
# instead of leaving it to the type of a number.
#
# **`eqx.partition(tree, filter)`** splits a tree in two of the same shape. The filter is
# a tree of that shape, too, with `True` for each leaf that goes into the first one. Each
# of the two has `None` where the other has a leaf. **`eqx.combine`** puts them together
# again.

# %%
norm = Norm(jnp.ones(4), np.float32(0.5))
weights, rest = eqx.partition(norm, Norm(weight=True, eps=False))
print(weights, rest, eqx.combine(weights, rest), sep="\n")

# %% [markdown]
# Now ten steps of plain descent, from this norm: each number of `weights` loses a
# hundredth of its gradient. We train both fields first, and then `weight` alone. A
# gradient is taken by the first argument, so `rest` has none, whatever is in it.


# %%
def descend(weights, rest):
    for _ in range(10):
        gradient = eqx.filter_grad(lambda w: error(eqx.combine(w, rest)))(weights)
        weights = jax.tree.map(lambda w, g: w - 0.01 * g, weights, gradient)
    return eqx.combine(weights, rest)


both, alone = (descend(*eqx.partition(norm, Norm(True, eps))) for eps in (True, False))
print(f"eps: {both.eps:.3f} if both are trained, {alone.eps:.3f} behind a partition")

# %%
nb.check("move of eps, if it is trained", abs(float(both.eps) - 0.5), gt=0.01)
nb.check("move of eps, behind a partition", abs(float(alone.eps) - 0.5), eq=0.0)
nb.check("error behind a partition, of that before", error(alone) / error(norm), lt=0.9)

# %% [markdown]
# The package partitions a model once, at the start of a run. `trainable` is the filter:
# all arrays or, if the model has an adapter (see LoRA, below), those of the adapter
# alone.

# %%
nb.show_source(training.start)

# %% [markdown]
# **Predict.** Why not simply stop the gradient? Suppose a weight's gradient is zero in
# every step, by `jax.lax.stop_gradient(x)`, which is `x` with a gradient of zero. AdamW,
# the optimizer of most language models, runs 1,000 steps at a learning rate of 0.01 and a
# weight decay of 0.1, which is there to keep weights small. How much of the "frozen"
# weight is left, in percent: 100, 99.9 or 37?
#
# (An **optimizer** of optax is two functions: `init(weights)` makes its state, and
# `update(gradient, state, weights)` returns what to add to the weights, and the next state.
# `jax.jit` compiles a function of arrays.)

# %%
my_left = None  # 100, 99.9 or 37

# %%
adamw = optax.adamw(1e-2, weight_decay=0.1)


@jax.jit
def step_without_gradient(weight, state):
    updates, state = adamw.update(jnp.zeros_like(weight), state, weight)
    return optax.apply_updates(weight, updates), state


weight = jnp.eye(4)
state = adamw.init(weight)
for _ in range(1000):
    weight, state = step_without_gradient(weight, state)

# %%
left = float(weight[0, 0])
why = {
    100: "the gradient is zero, and weight decay does not look at the gradient.",
    99.9: "that is the first step. There are 1,000.",
}
nb.guess("Left of the weight, percent", my_left, round(100 * left), why)
nb.check("left after 1,000 steps", left, near=(1 - 1e-2 * 0.1) ** 1000)

# %% [markdown]
# Weight decay pulls each weight towards zero by `learning rate × decay` of itself, with a
# gradient or without. A partition has no such hole: what is not in the tree that the
# optimizer sees cannot be moved by it. The package decays its matrices, but not its
# norms, which start at 1 and would be pulled away from it. One step with a gradient of
# zero shows both:

# %%
optimizer = training.make_optimizer(learning_rate=1e-2, steps=10, warmup=0)
zeros = jax.tree.map(jnp.zeros_like, little)
updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(little), little)
moves = {name: float(np.abs(x).max()) for name, x in nb.named(updates).items()}
norms = [move for name, move in moves.items() if "norm" in name]
matrices = [move for name, move in moves.items() if "norm" not in name]
nb.check("largest move of a norm", max(norms), eq=0.0)
nb.check("smallest move of a matrix", min(matrices), gt=1e-5)

# %%
nb.say(
    "**Takeaway.** Freezing is leaving out. A zero gradient is not freezing: after 1,000 "
    f"steps of AdamW {100 * left:.0f}% of the weight is left."
)

# %% [markdown]
# ## Two ports and torch
#
# Is the gradient right? JAX and torch differentiate by different means, so torch is an
# independent judge. The embedded model reads 128 tokens, in all three programs; then the
# gradients of all weights are compared, array by array. The reference's mask shows 65
# keys to a query, not 64 ([03](03_sliding_window_attention.ipynb)), so the one-file port
# is told 63. And to see what a *real* error looks like, torch computes once more, with one
# key too many.


# %%
def torch_gradients(twin, n_keys):
    import torch

    tokens = torch.tensor(np.asarray(text), dtype=torch.long)
    for layer in twin.layers:
        layer.attention.window = n_keys
    with torch.enable_grad():
        twin.requires_grad_().zero_grad()
        loss = torch.nn.functional.cross_entropy(twin(tokens[None, :-1])[0], tokens[1:])
        loss.backward()
    gradients = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    return np.append(nb09.fingerprints(gradients).ravel(), loss.item())


# %%
text = text[:129]
oracle = nb.Oracle("09")  # asks torch, or the file of its answers
wrong = oracle("gradients, 65 keys", lambda twin: torch_gradients(twin, 65))
right = oracle("gradients", lambda twin: torch_gradients(twin, 64))
prints = {n: a[:-1].reshape(-1, 102) for n, a in {64: right, 65: wrong}.items()}

# %% [markdown]
# For readers without torch a file holds the norm of each array, its largest number, and
# 100 of its numbers, spread evenly. These are compared. The ports use
# `eqx.filter_value_and_grad(f)`, which returns the value of `f` and its gradient.


# %%
def one_file_loss(model):
    caches = model.empty_cache(1, 128)
    logits, _ = model(text[None, :-1], jnp.arange(128), caches)
    return -jax.nn.log_softmax(logits[0])[jnp.arange(128), text[1:]].mean()


differentiate = eqx.filter_jit(lambda f, *x: eqx.filter_value_and_grad(f)(*x))
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
one_file = nb.with_config(one_file, sliding_window=63)
found = {
    "package": differentiate(training.loss, package, Batch(text[None])),
    "one file": differentiate(one_file_loss, one_file),
}

# %% [markdown]
# A gradient is a tree like the model, so its arrays have the names of the weights.

# %%
named = {name: nb.named(gradient) for name, (_, gradient) in found.items()}
prints |= {name: nb09.fingerprints(arrays) for name, arrays in named.items()}
losses = {name: float(loss) for name, (loss, _) in found.items()} | {65: float(wrong[-1])}
series = {"package": "package", "one file": "one file", "torch, one key too many": 65}
differences = {name: nb09.relative(prints[of], prints[64]) for name, of in series.items()}
off = {name: abs(losses[of] - float(right[-1])) for name, of in series.items()}
header = ["against torch", "abs Δ loss", "largest relative Δ of a gradient"]
nb.table(header, [[name, off[name], differences[name].max()] for name in series])

# %%
nb09.plot_gradients(differences, sorted(named["package"]))
nb.caption(
    "each point is one of the 54 arrays inside the layers. Both ports are at the noise of "
    "float32. The triangles are torch with one key too many in the mask: far above the "
    "noise in every layer."
)

# %%
package_off, one_file_off, _ = (float(each.max()) for each in differences.values())
nb.check("arrays with a gradient", len(differences["package"]), eq=len(prints[64]))
nb.check("relative Δ of a gradient, package and torch", package_off, lt=5e-5)
nb.check("relative Δ of a gradient, one file and torch", one_file_off, lt=5e-5)
nb.check("|Δ loss|, package and torch", off["package"], lt=1e-4)
clean = max(package_off, one_file_off)
inside = [name.startswith("layers.") for name in sorted(named["package"])]
nb.check("arrays inside the layers", sum(inside), eq=54)
faintest = float(differences["torch, one key too many"][inside].min())
nb.check("one key too many, faintest array over the noise", faintest / clean, gt=30)
nb.check("the loss that it changes", off["torch, one key too many"], lt=0.05)

# %% [markdown]
# The difference in code is where the gradient goes: torch records what it runs, and
# `backward()` writes into `p.grad` of each parameter; JAX transforms the function, and
# the gradient is what the new function returns. Note the last check: the wrong mask
# hardly moves the loss, so a loss curve would hardly show it.
#
# **Takeaway.** Compare gradients array by array: there a bug stands out that hides in the
# loss.
#
# ## One step, by hand
#
# AdamW keeps two running means for each weight, of its gradient and of the square of its
# gradient. They are its state. Nothing changes in place: a step takes weights and state
# and returns new ones. `eqx.apply_updates` adds the updates to the weights, leaf by leaf.
# The three lines of the loop are all there is to a step. Next to them runs the package's
# `train_step`, which is compiled and may take the memory of the old state for the new one
# (it is *donated*, hence the copies). Both make three steps on one batch, and the package
# goes on to 80.

# %%
optimizer = training.make_optimizer(learning_rate=1e-2, steps=1000, warmup=50)
one_batch = Batch(jax.random.randint(key, (5, 65), 0, 2048))
update = jax.jit(optimizer.update)
weights, state = little, optimizer.init(little)
for _ in range(3):
    _, gradient = differentiate(training.loss, weights, one_batch)
    updates, state = update(gradient, state, weights)
    weights = eqx.apply_updates(weights, updates)

# %%
copy = lambda tree: jax.tree.map(jnp.copy, tree)
frozen, state = training.start(copy(little), optimizer)
losses = []
for step in range(80):
    state, outcome = training.train_step(frozen, state, copy(one_batch), optimizer)
    losses.append(float(outcome.loss))
    if step == 2:
        after_three = copy(state.weights)

# %%
largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
gap = lambda a, b: largest(jax.tree.map(jnp.subtract, a, b))
moved = gap(little, weights)
nb.check("max|Δ| of the weights, by hand and before", moved, gt=1e-4)
nb.check(
    "train_step less by hand, of that move", gap(after_three, weights) / moved, lt=0.02
)
nb.check("first loss of one batch", losses[0], gt=7.6)
nb.check("its loss after 80 steps", losses[-1], lt=1.0)

# %% [markdown]
# The batch was 325 *random* ids. There is nothing to understand in it; the model has
# learnt it by heart. A program that cannot do this will learn nothing else: that is the
# second cheapest test.
#
# **Takeaway.** First loss, gradient, one batch by heart: make these three tests, in that
# order, before any long run.
#
# ## A thousand steps
#
# Now from nothing to Shakespeare, with the recipe of the package: AdamW, gradients that
# are cut to a norm of 1 (**clipped**), and a learning rate that rises for 50 steps and
# then falls along a cosine. The model has one layer, 48 wide; a step is 5 rows of 64
# tokens. Two tables of counts stand for what can be known without a network: how often
# each token comes (2,048 numbers), and how often each one follows each one (4 million).
#
# **Predict.** After 1,000 steps, on **held-out** text, which neither has seen: is the
# loss of the model better than the large table's by more than half a nat, about level
# with it, or worse by more than half?

# %%
my_level = None  # "better", "level" or "worse"

# %%
encode = lambda text: np.asarray(tokenizer.encode(text, bos=False), np.int32)
slices = lambda text: Slices("text", encode(text), seq_len=64, bos_id=tokenizer.bos_id)
learnt, unseen = (
    slices(nb.passage(0, 1_000_000)),
    slices(nb.passage(0.95, 150_000)),
)
single, pairs = nb09.table_losses(learnt.tokens, unseen.tokens)

# %% [markdown]
# `Slices` cuts rows at random places of a text, the same ones for the same seed and step.
# `frozen` holds no weight here, for all are trained; `state` has the weights, the state
# of the optimizer and the number of steps made. The loop is the whole program:

# %%
frozen, state = training.start(copy(little), optimizer)
n_weights = sum(x.size for x in jax.tree.leaves(little))
curve, measured, texts = [], {}, {}
for step in range(1001):
    if step in (0, 10, 30, 100, 300, 700, 1000):
        measured[step] = nb09.held_out_loss(frozen, state, unseen)
    if step in (0, 100, 1000):
        options = dict(max_tokens=40, temperature=0.7)  # 0: the most probable token
        texts[step] = mx.generate(state.model(frozen), tokenizer, 8 * ["ROMEO:"], **options)
    if step < 1000:
        batch = learnt.batch(5, seed=0, step=step)
        state, outcome = training.train_step(frozen, state, batch, optimizer)
        curve.append(outcome.loss)

# %%
ahead = pairs - measured[1000]
level = "level" if abs(ahead) <= 0.5 else "better" if ahead > 0 else "worse"
why = {
    "better": "do not despise a table: it has seen every pair that is frequent.",
    "worse": "the table has more numbers, but each learns from its own pair alone.",
}
nb.guess("The model, against the table of pairs", my_level, level, why)

# %% [markdown]
# Here is the whole run, beside both tables.

# %%
curve = np.array(curve)
references = {"ln V": np.log(2048), "table of tokens": single, "table of pairs": pairs}
nb09.plot_training(curve, measured, references)
nb.caption(
    "the loss starts above ln V and passes the table of single tokens within 100 steps. "
    "After 1,000 it is about level with the table of pairs, and it was still falling over "
    "the last 300."
)

# %%
nb.check("held-out loss before the first step", measured[0], gt=float(np.log(2048)))
nb.check("table of tokens, less the model at step 100", single - measured[100], gt=0)
nb.check("at step 1,000, |less the table of pairs|", abs(ahead), lt=0.4)
nb.check("loss at step 700, less at step 1,000", measured[700] - measured[1000], gt=0)

# %% [markdown]
# And the text? Eight ROMEOs speak before the first step, after 100, and at the end; here
# is the first of them. The table of pairs is the judge: what loss, in nats a token, does
# it have on the eight texts?

# %%
judged = {}
for step, romeos in texts.items():
    made = np.concatenate([completion.tokens for completion in romeos])
    _, judged[step] = nb09.table_losses(learnt.tokens, made)
    shown = "\n> ".join(f"ROMEO:{romeos[0].text}".splitlines())
    nb.say(f"**After {step:,} steps** ({judged[step]:.1f} nats a token)\n\n> {shown}")

# %%
nb.check("judge: nats of the text at step 0, less at 100", judged[0] - judged[100], gt=1)
nb.check("judge: nats of the text at step 100, less at 1,000",
         judged[100] - judged[1000], gt=0.3)  # fmt: skip

# %% [markdown]
# The lower the judge's loss, the more often a token follows one that it also follows in
# Shakespeare. After 1,000 steps neighbours fit one another, and still the lines make no
# sense.

# %%
nb.say(
    f"**Takeaway.** {1000 * 5 * 64:,} tokens take the loss from {measured[0]:.2f} to "
    f"{measured[1000]:.2f}: past what a table of tokens knows ({single:.2f}), to about "
    f"what one of pairs knows ({pairs:.2f}), with {2048**2 / n_weights:.0f} times fewer "
    "numbers."
)

# %% [markdown]
# ## A big batch, in parts
#
# A batch that does not fit into memory goes through the model in parts, and the gradients
# are added up. The obvious program takes the mean loss of each part, and the mean of the
# means. Here are 8 rows, some with far more learnt tokens than others, as in data of
# questions and answers. (`nb.knob` is a number that you may change, to one of those
# listed; the section runs with each.)

# %%
parts = nb.knob(4, of=(2, 4, 8))
n_each = jnp.array([2, 30, 3, 25, 2, 5, 28, 3])
learnt_tokens = jnp.arange(33)[None, :] <= n_each[:, None]
uneven = Batch(jax.random.randint(key, (8, 33), 0, 2048), learnt=learnt_tokens)

# %%
gradient_of = eqx.filter_jit(eqx.filter_value_and_grad(training.loss))
loss_of_whole, whole = gradient_of(little, uneven)
in_part = lambda i: learnt_tokens & (jnp.arange(8) % parts == i)[:, None]
pieces = [Batch(uneven.tokens, learnt=in_part(i)) for i in range(parts)]
mean_of_means = jax.tree.map(lambda *g: sum(g) / parts,
                             *[gradient_of(little, p)[1] for p in pieces])  # fmt: skip


def distance(a, b):  # optax.tree.norm: the root of the sum of all squares
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / optax.tree.norm(b))


# %% [markdown]
# The package divides by the number of learnt tokens of the *whole* batch. To see its
# gradient, take one step of plain descent at a learning rate of 1: what the weights lose
# is the gradient.

# %%
descent = optax.sgd(1.0)
frozen, state = training.start(jax.tree.map(jnp.copy, little), descent)
copied = jax.tree.map(jnp.copy, uneven)
state, outcome = training.train_step(frozen, state, copied, descent, parts=parts)
in_parts = jax.tree.map(jnp.subtract, little, state.weights)
off_by, ours = distance(mean_of_means, whole), distance(in_parts, whole)
nb.table(["gradient", "relative distance"], [["mean of means", off_by], ["package", ours]])

# %%
nb.check("relative Δ of the gradient, in parts and whole", ours, lt=1e-3)
nb.check("relative Δ of the mean of means", off_by, gt=0.03)
nb.check("|Δ loss|, in parts and whole",
         abs(float(outcome.loss - loss_of_whole)), lt=1e-4)  # fmt: skip

# %% [markdown]
# The mean of means gives a token in a nearly empty part more weight than one in a full
# part, and no error tells. Hugging Face's transformers did this until October 2024 (pull
# request #34191).
#
# **Takeaway.** Add sums, count tokens, divide once.
#
# ## LoRA: two thin matrices
#
# To teach a large model something new, one need not move all of it. **LoRA** keeps a
# weight `W` and learns a product beside it: `W + scale · B A`, where `A` has `r` rows and
# `B` has `r` columns. Together they are an **adapter**, and `r` is its **rank**. By hand,
# for a `W` of 4 × 4 and `r` = 1:

# %%
thin_b, thin_a = jnp.array([[1.0], [2.0], [0.0], [-1.0]]), jnp.array([[1.0, 0.0, 1.0, 2.0]])
print(thin_b @ thin_a)
print("rank", jnp.linalg.matrix_rank(thin_b @ thin_a), "from", thin_a.size + thin_b.size)

# %% [markdown]
# Eight numbers make sixteen. In a large matrix, few numbers make very many. The package's
# layer never makes the product `B A`: it sends `x` through `A`, and then through `B`.

# %%
nb.show_source(lora.LoRALinear.added)

# %% [markdown]
# `add_lora` puts such a layer in place of every linear layer but the output.

# %%
rank = nb.knob(8, of=(1, 8, 32))
adapted = mx.add_lora(package, rank=rank, key=key)
count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
weights, base = eqx.partition(adapted, lora.trainable(adapted))
nb.say(f"Trained: {count(weights):,} numbers, beside {count(base):,} that stay.")
layers = [layer for _, layer in lora.linear_layers(adapted)]
thin = [layer for layer in layers if isinstance(layer, lora.LoRALinear)]
formula = sum(rank * sum(layer.base.weight.shape) for layer in thin)
nb.check("numbers trained", count(weights), eq=formula)

# %% [markdown]
# `A` starts random and `B` starts at zero, so at first nothing is added. Not "almost
# nothing": not a bit. Each layer gives the same as its `base`, the layer without an
# adapter:


# %%
def differs(layer):
    x = jax.random.normal(key, (3, layer.base.weight.shape[1]))
    return not np.array_equal(layer(x), layer.base(x))


nb.check("layers whose output a new adapter changes", sum(map(differs, thin)), eq=0)

# %% [markdown]
# **Predict.** One of the two thin matrices has a gradient of exactly zero in the first
# step. Is it `A`, `B`, or neither? (We ask a new model of one layer, and one line of text.)

# %%
my_zero = None  # "A", "B" or "neither"

# %%
new = mx.add_lora(little, rank=rank, key=key)
held_out_line = Batch(jnp.asarray([nb.held_out(33)]))
weights, rest = eqx.partition(new, lora.trainable(new))
loss_of = lambda w, batch: training.loss(eqx.combine(w, rest), batch)
gradient = eqx.filter_jit(eqx.filter_grad(loss_of))(weights, held_out_line)
gradient = nb.named(gradient)

# %%
of_a = max(float(np.abs(g).max()) for name, g in gradient.items() if name.endswith(".a"))
of_b = min(float(np.abs(g).max()) for name, g in gradient.items() if name.endswith(".b"))
why = {
    "B": "B is zero, but its gradient is a product with A, which is random.",
    "neither": "A's gradient is a product with B, and B is zero.",
}
nb.guess("The gradient that is zero", my_zero, "A" if of_a == 0 else "neither", why)
nb.check("largest gradient of any A", of_a, eq=0.0)
nb.check("smallest gradient of any B", of_b, gt=1e-6)
nb.check("arrays with a gradient, of two in each layer", len(gradient), eq=2 * 7)

# %% [markdown]
# If both began at zero, both gradients would be zero, and the adapter would never learn.
# The base has no gradient at all: it is not in the tree.
#
# Last, the scale. It is a number that checkpoints carry in a file beside the weights, so
# it is easily lost; then the adapter writes another text, and no shape complains. To have
# something to scale, we need a `B` that is not zero. A module cannot be changed in place;
# **`eqx.tree_at(where, tree, new)`** makes a copy of a tree, in which the leaf that `where`
# points at is `new`. By default the scale is 2.

# %%
random_b = jax.random.normal(key, thin[0].b.shape)
layer = eqx.tree_at(lambda lora_layer: lora_layer.b, thin[0], random_b)
x = jax.random.normal(key, (3, 256))
expected = x @ layer.base.weight.T + 2.0 * (x @ layer.a.T) @ layer.b.T
merged = lora.merged_weight(layer.base.weight, layer.a, layer.b, layer.scale)
far = lambda found: jnp.abs(found - expected).max() / jnp.abs(expected).max()
nb.check("layer and formula, relative Δ", far(layer(x)), lt=1e-4)
nb.check("merged and formula, relative Δ", far(x @ merged.T), lt=1e-4)
nb.check("and the layer alone, relative Δ", far(layer.base(x)), gt=0.1)

# %% [markdown]
# **Takeaway.** A new adapter changes not one bit, and only `B` has a gradient in the
# first step.
#
# ## What it learns, and what it forgets
#
# The embedded model has read Shakespeare and the King James Bible. Its new language is
# Pig Latin: the consonants that a word begins with go behind it, and "ay" is added ("way"
# if it begins with a vowel).

# %%
nb.say(f"*{nb09.pig_latin('To be, or not to be, that is the question.')}*")
pig = slices(nb09.pig_latin(nb.passage(0.1, 200_000)))
held = {
    "Shakespeare": unseen,
    "Pig Latin": slices(nb09.pig_latin(nb.passage(0.95, 60_000))),
}

# %% [markdown]
# An adapter of rank 8 learns for 25 steps of 4 × 64 tokens. A second one learns for 25
# steps too, but half of the rows of its batches are Shakespeare: what is already known is
# **rehearsed**. The base is frozen in both.
#
# **Predict.** The base does not change by a bit. Does the model with the first adapter
# forget Shakespeare: not at all, a little (less than 0.3 nats), or more?

# %%
my_forgotten = None  # "not at all", "a little" or "more"


# %%
optimizer = training.make_optimizer(learning_rate=5e-3, steps=25, warmup=5)


def fine_tune(make_batch, steps=25):
    frozen, state = training.start(mx.add_lora(package, rank=8, key=key), optimizer)
    for step in range(steps):
        state, _ = training.train_step(frozen, state, make_batch(step), optimizer)
    return state.model(frozen)


measure = {name: data.batch(12, seed=1, step=0) for name, data in held.items()}
losses_of = lambda model: [float(compiled_loss(model, b)) for b in measure.values()]


def rehearsed(step):
    halves = [data.batch(2, seed=0, step=step).tokens for data in (pig, learnt)]
    return Batch(np.concatenate(halves))


# %% [markdown]
# Then all three models are measured on 12 rows of each text, from the held-out tenth.

# %%
speaks_pig = fine_tune(lambda step: pig.batch(4, seed=0, step=step))
speaks_both = fine_tune(rehearsed)

# %%
matrix = np.array([losses_of(m) for m in (package, speaks_pig, speaks_both)])
lost, kept = matrix[1, 0] - matrix[0, 0], matrix[2, 0] - matrix[0, 0]
why = {
    "not at all": "the base is intact, and the adapter is added to all that it computes.",
    "a little": "nothing in the loss asks for Shakespeare, so nothing protects it.",
}
nb.guess("Shakespeare", my_forgotten, "more" if lost > 0.3 else "a little", why)

# %% [markdown]
# All six numbers, the two of the model with rehearsal among them:

# %%
nb09.plot_matrix(matrix, ["before", "Pig Latin", "half of each"], list(held))
nb.caption(
    "rows: what was learnt; columns: what is measured. The loss on Pig Latin falls, and "
    "that on Shakespeare rises. With half of each, Pig Latin falls nearly as far, and "
    "much less of Shakespeare is lost."
)

# %%
nb.check("Pig Latin, nats gained", float(matrix[0, 1] - matrix[1, 1]), gt=1.0)
nb.check("Shakespeare, nats lost", float(lost), gt=0.3)
gains = matrix[0, 1] - matrix[1:, 1]
nb.check("gained with rehearsal, of what is gained without", gains[1] / gains[0], gt=0.6)
nb.check("lost with rehearsal, of what is lost without", float(kept / lost), lt=0.6)
stays = lambda model: jax.tree.leaves(eqx.partition(model, lora.trainable(model))[1])
untouched = zip(stays(speaks_pig), jax.tree.leaves(package), strict=True)
moved = sum(not np.array_equal(a, b) for a, b in untouched)
nb.check("arrays of the base that have moved", moved, eq=0)

# %% [markdown]
# Because the base is intact, forgetting can be undone. The scale is a dial: at 0 the
# adapter is off. (Multiplying every `B` by `s / 2` is to turn the scale from 2, the
# default, to `s`. `tree_map_with_path` is `jax.tree.map` for a function that also wants
# to know where in the tree a leaf is.)


# %%
def turned(model, scale):
    is_b = lambda path: getattr(path[-1], "name", "") == "b"
    turn = lambda path, leaf: leaf * (scale / 2) if is_b(path) else leaf
    return jax.tree_util.tree_map_with_path(turn, model)


scales = [0.0, 0.67, 1.33, 2.0, 3.0, 4.5, 6.0]
dial = np.array([losses_of(turned(speaks_pig, scale)) for scale in scales])
dial = dict(zip(held, dial.T))

# %%
nb09.plot_dial(scales, dial, trained=2.0)
nb.caption(
    "at scale 0 the old model is back. On the way to 2 the loss on Shakespeare rises and "
    "that on Pig Latin falls, so a smaller scale trades one for the other. At 6, far "
    "beyond the scale that was trained, both are higher."
)

# %%
off = abs(float(dial["Shakespeare"][0]) - matrix[0, 0])
nb.check("|Δ loss|, scale 0 and the base", off, lt=1e-4)
nb.check("Shakespeare, least rise on the way to 2",
         float(np.diff(dial["Shakespeare"][:4]).min()), gt=0)  # fmt: skip
nb.check("Pig Latin, least fall on the way to 2",
         float(-np.diff(dial["Pig Latin"][:4]).max()), gt=0)  # fmt: skip
rise = min(float(values[-1] - values[3]) for values in dial.values())
nb.check("rise of either from 2 to 6, the least", rise, gt=0.1)

# %% [markdown]
# To keep what was learnt, **merge**: the sum becomes an ordinary weight, and the model an
# ordinary one, with the same names. (`jax.tree.structure` is a tree without its leaves.)

# %%
merged = mx.merge_lora(speaks_pig)
same = jax.tree.structure(merged) == jax.tree.structure(package)
nb.check("merged, structure of the base", same, eq=True)
apart = np.abs(np.subtract(losses_of(merged), losses_of(speaks_pig))).max()
nb.check("|Δ loss| on both texts, merged and adapted", apart, lt=1e-3)
nb.check("numbers, merged less base", count(merged) - count(package), eq=0)

# %% [markdown]
# What do the three write, for the same beginning and the same seed?

# %%
both = mx.merge_lora(speaks_both)
for name, model in [("The base", package), ("Pig Latin", merged), ("Half of each", both)]:
    options = dict(max_tokens=40, temperature=0.7)  # 0: the most probable token
    completion = mx.generate(model, tokenizer, "My lord, the", **options)
    shown = "\n> ".join(f"My lord, the{completion.text}".splitlines())
    nb.say(f"**{name}**\n\n> {shown}")

# %%
nb.say(
    f"**Takeaway.** {25 * 4 * 64:,} tokens of Pig Latin lower its loss by "
    f"{matrix[0, 1] - matrix[1, 1]:.1f} nats, and raise Shakespeare's by {lost:.1f}. If "
    f"half of the rows are Shakespeare, they raise it by {kept:.1f}."
)

# %% [markdown]
# ## Exercises
#
# **Exercise 1: freeze the embedding** (●● 5 minutes). Return the filter that trains all
# of a model but its token embedding: a tree like the model with `True` or `False` for
# each array. The checker partitions a model with it.
#
# <details><summary>Hint</summary>
#
# Make a tree of `True` first, by `jax.tree.map`. Then change one leaf of it, as one
# changes a leaf of any tree.
#
# </details>
#
# {{solution:all_but_embedding}}


# %%
def all_but_embedding(model):
    return NotImplemented


ex09.check_all_but_embedding(all_but_embedding)

# %% [markdown]
# **Exercise 2: the optimizer that will not start** (●● 5 minutes). A colleague's model is
# an `eqx.nn.MLP`, which keeps its activation, a function, as a leaf. The line below stops
# with `TypeError: zeros_like requires ndarray or scalar arguments`. Repair it. (The
# models of this package have arrays alone as leaves, so the line would run for them.)
#
# <details><summary>Hint</summary>
#
# The optimizer must see what `eqx.filter_grad` gives a gradient to, in a tree of the same
# shape. Equinox has a function that keeps some leaves, and puts `None` for the others.
#
# </details>
#
# {{solution:first_state}}


# %%
def first_state(optimizer, model):
    return NotImplemented  # was: optimizer.init(model)


ex09.check_first_state(first_state)

# %% [markdown]
# **Exercise 3: how thin is thin?** (● 3 minutes). A feed-forward weight of the embedded
# model is 704 × 256. What is the largest rank at which the adapter of this layer has
# fewer numbers than the layer? Write the number.
#
# <details><summary>Hint</summary>
#
# An adapter of rank 1 has a row for the one side and a column for the other.
#
# </details>
#
# {{solution:largest_rank}}

# %%
largest_rank = NotImplemented
ex09.check_largest_rank(largest_rank)

# %% [markdown]
# ## Recap

# %%
nb.table(["what we asked", "what we found"], [
    ["the first loss of a new model", f"ln V + {excess.mean():.2f}"],
    ["gradients of both ports, and torch's",
     f"at most {clean:.0e} of the largest number of an array apart"],
    ["a gradient of zero, with weight decay",
     f"{100 * left:.0f}% of the weight left after 1,000 steps"],
    ["the mean of means of uneven parts", f"gradient off by {100 * off_by:.0f}%"],
    ["Shakespeare after Pig Latin", f"+{lost:.1f} nats, or +{kept:.1f} if rehearsed"],
])  # fmt: skip
nb.recap()

# %%
nb.say(
    "**The answer.** Trust a step if its first loss is right, if its gradient is torch's, "
    "and if it learns one batch by heart. And a model forgets what the new data do not "
    f"hold: {lost:.1f} nats of Shakespeare in 25 steps, with not one weight of the base "
    "changed. Turn the adapter off, and they are back."
)

# %% [markdown]
# **What we did not show**: fine-tuning of all weights, which cannot be turned off;
# conversations, where the answers alone are learnt; checkpoints of
# a run, and adapters on quantized weights (`mistral_eqx finetune` has all of these).
#
# **Further reading**: Hu et al., arXiv 2106.09685, §4.1 (LoRA); Loshchilov & Hutter, arXiv
# 1711.05101 (weight decay apart from the gradient); Biderman et al., arXiv 2405.09673 (what
# LoRA learns and forgets); Karpathy, *A Recipe for Training Neural Networks* (2019).
#
# **Next**: [10](10_fewer_bits.ipynb), where each weight gets fewer bits.
