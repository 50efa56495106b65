# ---
# jupyter:
#   budget: 70
#   cover: 0
# ---

# %% [markdown]
# # Start here
#
# **What happens to the text when one line of a language model is wrong?**
#
# Here is a language model that is small enough to break. It has read Shakespeare, and it
# runs on your laptop without a network. In the next two minutes it writes for you, you
# break one line of it, and you get a map of all its parts.
#
# - **Before this**: nothing. Some Python.
# - **Time**: {{time}}. Run the cells from top to bottom (Shift + Enter).
# - **The code lives in** `mistral_eqx/`, a package, and `one_file_ref.py`, the same model
#   in one file. Both are **ports** of Mistral: its program, written anew for the library
#   JAX. The plots and the map are in `nb00.py`.

# %%
import mistral_eqx as mx
import nb00
import nbtools as nb


# %% [markdown]
# ## It writes
#
# The model reads a text as **tokens**, which are words and parts of words. After each token
# it gives every token of its vocabulary a probability of being the next. *Greedy* writing
# takes the most probable one, again and again.

# %%
model, tokenizer = mx.load()
print(mx.generate(model, tokenizer, "To be, or not to be", max_tokens=50))

# %% [markdown]
# Or it **draws** the next token, in proportion to the probabilities. A temperature below 1
# prefers the probable ones. Change the seed or the beginning, and run the cell again.

# %%
begin = "ROMEO.\nBut soft"
print(mx.generate(model, tokenizer, begin, max_tokens=50, temperature=0.8, seed=1))

# %% [markdown]
# The text sounds like a play and means little. The model has some five million
# **parameters** (or **weights**), the numbers that training has set. Mistral 7B runs the
# same program with more than a thousand times as many.
#
# ## Break one line
#
# The program stands in `one_file_ref.py`, which follows Mistral's own reference line by
# line. The next cell changes one line of it, runs the changed program, and shows what it
# writes beside what it wrote before. The weights stay as they are. Choose another bug, and
# run the cell again; the section below explains them.
#
# The **loss** is how badly the program predicts passages of Shakespeare that it was not
# trained on: the mean of minus the logarithm of the probability that it gave to the token
# that came. It is counted in *nats*, and lower is better.

# %%
bug = nb.knob("w1, w3 swapped", of=(
    "half-split RoPE", "eps misplaced", "softmax in bfloat16", "wo transposed",
    "w1, w3 swapped", "window off by one", "position + 1",
))  # fmt: skip
nb00.show_line(bug)
nb00.beside(bug)
nb.check("loss of the port as it is (nats a token)", nb00.run(None).loss, lt=4.5)

# %% [markdown]
# The broken program raised no error, because every array still had the right shape. That
# is why this repository does not trust a run that ends. It compares the numbers of every
# layer, and the *logits*, the scores from which the probabilities are made.
#
# ## The museum of bugs
#
# Seven lines, each broken in a way that happens to people who port models:
#
# 1. **Half-split RoPE**: RoPE tells the model where a token stands, by turning pairs of
#    its features. This pairs feature `i` with `i + 16`, as Hugging Face's files want it,
#    but these weights pair neighbours.
# 2. **eps misplaced**: the small number that keeps RMSNorm from dividing by zero is added
#    after the square root, not before.
# 3. **softmax in bfloat16**: how much a token takes from each earlier one is computed with
#    two to three digits instead of seven.
# 4. **wo transposed**: `x @ w` for `x @ w.T`. The matrix is square, so it fits.
# 5. **w1, w3 swapped**: two matrices of SwiGLU, the feed-forward network, change places.
# 6. **window off by one**: a token looks back a fixed number of tokens; here, one fewer.
# 7. **position + 1**: each new token is told that it stands one place further on than it
#    does.
#
# **Predict.** How many of the seven leave the text *exactly* as it was? And the worst of
# them: is it better or worse than a model that knows nothing, and finds all tokens equally
# probable?

# %%
my_silent = None  # 0, 1, 3 or 6
my_worst = None  # "better" or "worse"

# %%
runs = nb00.museum()
silent = [name for name, run in runs.items() if run.text == nb00.run(None).text]
nb.guess("Bugs that leave the text as it was", my_silent, len(silent), nb00.WHY_SILENT)

# %% [markdown]
# A text stays the same as long as each of its tokens stays the most probable one. The loss
# sees more, because it counts how probable each token was. Here it is once more, beside
# the loss of a model that knows nothing.

# %%
nb00.bars(runs)
nb.guess("The worst bug", my_worst, nb00.against_nothing(runs), nb00.WHY_WORST)
nb.check("third smallest change (nats a token)", nb00.changes(runs)[2], lt=0.01)
nb.check("largest loss, over knowing nothing", nb00.excess(runs), gt=0.3)

# %% [markdown]
# So a loss that looks fine proves little: whoever ports a model has to compare the numbers
# inside it with those of another program, as [01](01_one_model_two_languages.ipynb) does.
#
# One exhibit is a surprise of another kind. In *window off by one*, the broken line is the
# right one: Mistral's reference lets a token look back one token too far, and the port
# keeps that, because it is a port. [03](03_sliding_window_attention.ipynb) shows how to
# find out.
#
# ## The map
#
# These are all parts of the model, in the order in which a token meets them, with the
# shapes of their arrays: in `wq [256, 256] → q`, the matrix `wq` makes `q`. Attention and
# SwiGLU only *add* to the thick line. The map prints on one page:
# [pictures/map.svg](pictures/map.svg).

# %%
nb00.show_map(model.config)
nb.check("parameters in the boxes of the map", **nb00.both_counts(model))

# %% [markdown]
# | box | notebook | source |
# |---|---|---|
# | Embedding | [02] | [layers.py] |
# | RMSNorm | [02] | [layers.py] |
# | Queries, keys, values | [02] | [attention.py] |
# | RoPE | [02] | [rope.py] |
# | Rolling buffer | [04] | [cache.py] |
# | Window | [03] | [attention.py] |
# | SwiGLU | [02] | [layers.py] |
# | RMSNorm, output | [02] | [transformer.py] |
# | Choose a token | [06] | [sampling.py] |
# | two ports | [01] | [one_file_ref.py] |
# | compile | [05] | [decoding.py] |
# | many devices | [07] | [sharding.py] |
# | experts | [08] | [moe.py] |
# | train, LoRA | [09] | [training.py] |
# | fewer bits | [10] | [quantized.py] |
#
# ## Where to go next
#
# Any notebook can be the next one: each answers one question with this model, asks you to
# predict, and has exercises that check themselves.
#
# - **You know PyTorch, and JAX is new**: [01] how a module of one becomes a module of the
#   other, [02] what each part does, [05] what the compiler makes of it, [09] how it is
#   trained.
# - **You want to know how a model writes fast**: [03] the window, [04] the cache, [06] the
#   choice of a token, [10] fewer bits.
# - **You have more than one device**: [05], then [07] one model on eight devices, and [08]
#   experts and pipelines.
# - **You are porting a model yourself**: [01], then the four broken caches of [04].
#
# The table of all notebooks, and the letters that they use, are in [README.md](README.md).
#
# [01]: 01_one_model_two_languages.ipynb
# [02]: 02_inside_one_block.ipynb
# [03]: 03_sliding_window_attention.ipynb
# [04]: 04_the_rolling_buffer.ipynb
# [05]: 05_what_the_compiler_sees.ipynb
# [06]: 06_choosing_the_next_token.ipynb
# [07]: 07_many_devices.ipynb
# [08]: 08_mixtral.ipynb
# [09]: 09_training_and_lora.ipynb
# [10]: 10_fewer_bits.ipynb
# [attention.py]: ../mistral_eqx/attention.py
# [cache.py]: ../mistral_eqx/cache.py
# [decoding.py]: ../mistral_eqx/decoding.py
# [layers.py]: ../mistral_eqx/layers.py
# [moe.py]: ../mistral_eqx/moe.py
# [one_file_ref.py]: ../one_file_ref.py
# [quantized.py]: ../mistral_eqx/kernels/quantized.py
# [rope.py]: ../mistral_eqx/rope.py
# [sampling.py]: ../mistral_eqx/sampling.py
# [sharding.py]: ../mistral_eqx/devices/sharding.py
# [training.py]: ../mistral_eqx/learning/training.py
# [transformer.py]: ../mistral_eqx/transformer.py
