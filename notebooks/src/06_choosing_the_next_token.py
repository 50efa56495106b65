# ---
# jupyter:
#   budget: 125
#   cover: 7
# ---

# %% [markdown]
# # Choosing the next token
#
# **What do temperature, top-k, top-p, min-p and beams do to the distribution of the next
# token, and why do beams repeat themselves?**
#
# - **You will be able to** write each filter in three lines and prove it; draw a token by
#   hand; write a decoding loop of your own; say what a beam search finds and what it
#   misses; and show by measurement why it ends in a loop.
# - **Before this**: [05](05_what_the_compiler_sees.ipynb), which explains `jit`.
# - **Time**: {{time}}.
# - **The code lives in** `sampling.py`, `decoding.py`, `generation.py` and `beams.py` of
#   `mistral_eqx/`, and in `generate` of `one_file_ref.py`.
# - **Model and data**: the embedded model, in float32, which has read Shakespeare and the
#   Bible, and Shakespeare that it has never seen.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: how many tokens does top-p 0.9 keep? A search is stuck in "I pray
#   thee, I pray thee,": how probable is one more "I pray thee,"?
#
# The letters: `B` texts side by side, `T` tokens in a text, `V` tokens in the vocabulary,
# `W` window; see [README.md](README.md).

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
import nb06
import nbtools as nb
import one_file_ref
from exercises import ex06


key = jax.random.key(0)
nb.versions()

# %%
oracle = nb.Oracle("06")
package, tokenizer = mx.load(dtype=jnp.float32)
V = package.config.vocab_size


# %% [markdown]
# Three helpers for all that follows. `next_logits` runs the model on a text. `jax.jit`
# compiles a function once for each *shape* of its arguments, so every text is padded to 64
# tokens: then one program serves for all. The pads come last, where no token of the text
# sees them. `kept_by` counts the tokens that may be drawn. `word` spells a token with its
# leading blank. (The tokenizer drops that blank at the start of a text, so `word` decodes
# the token after a letter and removes the letter.)


# %%
read = jax.jit(lambda model, padded, n: model(padded)[0][n - 1])


def next_logits(tokens):  # of the token that follows: [V]
    return read(package, jnp.asarray(tokens + [0] * (64 - len(tokens))), len(tokens))


def kept_by(logits, **options):
    return int(jnp.isfinite(mx.Sampling(**options).scores(logits)).sum())


letter = tokenizer.encode("a")[-1]
word = lambda token: tokenizer.decode([letter, int(token)])[1:]

# %% [markdown]
# ## One vector
#
# The model reads a text and answers with one vector of `V` numbers, the **logits**, one
# for each token that it knows. The softmax makes probabilities of them: `exp` of each,
# divided by the sum. Everything in this notebook happens to that vector, or to a text
# made of many such choices. Here are two beginnings. One is a famous line, the other
# could go on in many ways.

# %%
famous, free = "O Romeo, Romeo, wherefore art", "The king is"
logits = {text: next_logits(tokenizer.encode(text)) for text in (famous, free)}
chances = {text: jax.nn.softmax(x) for text, x in logits.items()}  # each [V]

# %%
nb06.bars(chances, word)
nb.caption(
    "after the famous line the model is sure of one token. After the other, the best "
    "token has about a twentieth of the probability, and eight others have at least a "
    "quarter of what it has. The same rule must serve both."
)

# %%
best = [float(chances[text].max()) for text in (famous, free)]
nb.check("probability of the best token, famous line", best[0], gt=0.8)
nb.check("probability of the best token, free line", best[1], near=0.05, rtol=0.3)
quarter = int((chances[free] > best[1] / 4).sum()) - 1
nb.check("others with a quarter of the best one's probability, free", quarter, gt=7)

# %% [markdown]
# **Top-p** keeps the smallest set of the most probable tokens whose probabilities sum to at
# least `p`, and drops the rest (Holtzman et al., who call it nucleus sampling). A common
# value is 0.9.
#
# **Predict.** How many of the 2,048 tokens does top-p 0.9 keep after "The king is": up to
# 10, up to 50, or more than 200?

# %%
my_kept = None  # "up to 10", "up to 50" or "more than 200"

# %% [markdown]
# `mx.Sampling` holds the options of a sampler. Its method `scores` gives the logits of
# the distribution that is drawn from, with `-inf` for each token that is dropped; `exp`
# makes a zero of that.

# %%
counts = {t: kept_by(x, temperature=1.0, top_p=0.9) for t, x in logits.items()}
size = nb06.band(counts[free], {10: "up to 10", 50: "up to 50"}, "more than 200")
why = {
    "up to 10": "the ten bars above hold less than half of the probability together.",
    "up to 50": "the tail is long: each rare token is small, and there are many.",
}
nb.guess("Tokens that top-p 0.9 keeps after “The king is”", my_kept, size, why=why)

# %%
ten = float(jnp.sort(chances[free])[-10:].sum())
nb.check("probability of the ten bars together, free line", ten, lt=0.45)
nb.check("tokens that top-p 0.9 keeps, famous line", counts[famous], eq=1)
nb.check("tokens that top-p 0.9 keeps, free line", counts[free], gt=200)
nb.say(
    f"**Takeaway.** The same top-p of 0.9 keeps {counts[famous]} token after one line and "
    f"{counts[free]} after another: it follows the model's certainty."
)

# %% [markdown]
# ## Four rules, three lines each
#
# **Temperature** divides the logits. Below 1 their differences grow and the best token
# gains; above 1 they shrink. Four words, four temperatures:

# %%
four = jnp.array([2.0, 1.0, 0.0, -1.0])  # the logits of four words
heats = jnp.array([0.25, 1.0, 4.0, 100.0])
softened = np.asarray(jax.nn.softmax(four / heats[:, None]), np.float64)
print(np.round(softened, 3))  # [4 temperatures, 4 words]

# %% [markdown]
# Row by row: almost **greedy** (always the best token), unchanged, flat, almost a die. The
# order of the words never changes and none gets zero, so temperature alone drops nothing.
# The other three rules do. Each says which tokens stay. Here they are in plain NumPy:


# %%
def keep_top_k(p, k):  # the k most probable
    return p >= np.sort(p)[-k]


def keep_top_p(p, share):  # those before which less than `share` is reached
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    return (before < share)[np.argsort(order)]


def keep_min_p(p, share):  # those with `share` of the best one's probability
    return p >= share * p.max()


# %%
p = np.asarray(jax.nn.softmax(four), np.float64)  # [4]
print("p        ", np.round(p, 3))
print("top-k 2  ", keep_top_k(p, 2))
print("top-p 0.8", keep_top_p(p, 0.8))
print("min-p 0.1", keep_min_p(p, 0.1))

# %% [markdown]
# Look at top-p. The first word alone has less than 0.8, the first two have more. The word
# that *crosses* `p` stays, or else the set would sum to less. Leaving it out is an easy
# mistake: after the famous line, where the first token crosses 0.9 by itself, nothing at
# all would be left.
#
# This is the package's code. It uses no sort: a function `_threshold` finds the cut by
# bisection, bit by bit, in 32 passes over the vector. `jax.lax.cond` is an `if` inside a
# compiled program, so a rule that is switched off is not computed.

# %%
nb.show_source(mx.Sampling._filter, mx.Sampling._keep_min_p)

# %% [markdown]
# Do they agree? The plain way applies one rule after another and normalises in between.
# We take 32 places in unseen Shakespeare and five settings. `jax.vmap` turns a function
# of one row into one of many rows: `jax.vmap(f)(rows)` is a `stack` of `f(row)`, computed
# at once.


# %%
def naive_probabilities(logits, temperature, **rules):
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    for name, value in rules.items():
        keep = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}[name]
        p = np.where(keep(p, value), p, 0.0)
        p /= p.sum()
    return p


# %%
settings = [
    dict(temperature=0.7),
    dict(temperature=0.7, top_k=40),
    dict(temperature=1.5, top_p=0.9),
    dict(temperature=1.3, min_p=0.1),
    dict(temperature=1.2, top_k=100, top_p=0.8, min_p=0.02),
]

# %% [markdown]
# One run of the model gives the logits at all places of a text. Both ways get the same
# logits. We count the places where they keep different sets of tokens, and compare the
# probabilities.

# %%
text = jnp.asarray(nb.held_out(256))
places = np.asarray(jax.jit(lambda model, text: model(text)[0])(package, text)[7::8])
rows = []  # of the 32 places, [32, V] each
for options in settings:
    ours = np.asarray(jax.nn.softmax(jax.vmap(mx.Sampling(**options).scores)(places)))
    naive = np.stack([naive_probabilities(row, **options) for row in places])
    kept, same = (ours > 0).sum(axis=1), ((ours > 0) == (naive > 0)).all(axis=1)
    gap = float(np.abs(ours - naive)[same].max())
    rows.append([nb06.spelled(options), f"{min(kept)} to {max(kept)}", sum(~same), gap])
nb.table(["options", "tokens kept", "places with another set", "max abs Δ p"], rows)

# %% [markdown]
# Floats are rounded, so a sum that all but equals `p` may fall on either side: a place or
# two of 160 may differ by one token. Where the sets are the same, so must the
# probabilities be.

# %%
differing = int(sum(row[2] for row in rows))
nb.check("places of 160 where the kept sets differ", differing, lt=4)
nb.check("max|Δ p|, package and NumPy", max(row[3] for row in rows), lt=1e-5)
crossing = kept_by(four, temperature=1.0, top_p=0.8)
nb.check("words that top-p 0.8 keeps of the four", crossing, eq=2)

# %% [markdown]
# And how many tokens does each rule keep after the two lines of the first section?

# %%
rules = {"top-k 50": dict(top_k=50), "top-p 0.9": dict(top_p=0.9)}
rules["min-p 0.1"] = dict(min_p=0.1)
kept = {
    text: {name: kept_by(x, temperature=1.0, **rule) for name, rule in rules.items()}
    for text, x in logits.items()
}
nb06.ranked(chances, kept)
nb.caption(
    "the black line, probability by rank, falls steeply at first after the famous line "
    "and slowly after the free one. Top-k cuts at the same rank in both. Top-p and min-p "
    "cut at rank 1 above and far to the right below. There top-p keeps several times as "
    "many tokens as min-p."
)

# %%
ratio = kept[free]["top-p 0.9"] / kept[free]["min-p 0.1"]
falls = [float(p.max() / jnp.sort(p)[-10]) for p in chances.values()]
nb.check("fall from rank 1 to 10, famous line", falls[0], gt=100)
nb.check("fall from rank 1 to 10, free line", falls[1], lt=10)
nb.check("top-k 50 keeps", [kept[famous]["top-k 50"], kept[free]["top-k 50"]], eq=[50, 50])
nb.check("min-p 0.1 keeps, famous line", kept[famous]["min-p 0.1"], eq=1)
nb.check("top-p 0.9 keeps, over min-p 0.1, free line", ratio, gt=3)
nb.say(
    f"**Takeaway.** Three lines of NumPy and the package keep the same tokens at "
    f"{160 - differing} of 160 places. Top-k counts tokens, top-p sums probability, min-p "
    "compares with the best."
)

# %% [markdown]
# ## First heat, then filter
#
# The order matters. The package divides by the temperature *first*, as Hugging Face's
# transformers does, so the three rules see the heated distribution.
#
# **Predict.** Top-p stays as it is, and the temperature goes from 1 to 4. How many tokens
# does top-p keep then, after "The king is": as many, about twice as many, or more than
# three times as many?

# %%
my_growth = None  # "as many", "twice as many" or "more than three times"

# %% [markdown]
# `nb.knob` is a number that you may change, to one of those listed; the section runs with
# each of them.

# %%
top_p = nb.knob(0.9, of=(0.5, 0.9, 0.95))
vector = next_logits(tokenizer.encode("The king is"))  # [V]
rules = {"top-k 50": dict(top_k=50), f"top-p {top_p}": dict(top_p=top_p)}
rules["min-p 0.1"] = dict(min_p=0.1)

# %%
temperatures = 2.0 ** np.arange(-3, 5.25, 0.25)
curves = {
    name: {float(t): kept_by(vector, temperature=float(t), **rule) for t in temperatures}
    for name, rule in rules.items()
}

# %%
by_top_p = curves[f"top-p {top_p}"]
growth = by_top_p[4.0] / by_top_p[1.0]
size = nb06.band(growth, {1.5: "as many", 3: "twice as many"}, "more than three times")
why = {
    "as many": "the sum has to reach p in a distribution that has become flat.",
    "twice as many": "the heated tail is almost as high as the top.",
}
nb.guess("Top-p at temperature 4, over temperature 1", my_growth, size, why=why)

# %% [markdown]
# So top-p does not undo a high temperature: it keeps more. The figure has the whole range.

# %%
nb06.heat(curves, V)
nb.caption(
    "top-k keeps its number at every temperature. Top-p keeps a few tokens when it is cold "
    "and ends at its share of the whole vocabulary. Min-p starts as low, and in the end "
    "keeps everything."
)

# %%
nb.check("top-k 50, numbers kept", sorted(set(curves["top-k 50"].values())), eq=[50])
nb.check("top-p, least kept", min(by_top_p.values()), lt=5)
nb.check("min-p, least kept", min(curves["min-p 0.1"].values()), lt=5)
nb.check("top-p at 32, share of V over p", by_top_p[32.0] / V / top_p, near=1, rtol=0.15)
nb.check("min-p at temperature 32 keeps", curves["min-p 0.1"][32.0], eq=V)
nb.check("growth of top-p from temperature 1 to 4", growth, gt=3)

# %% [markdown]
# A program that filters first and heats afterwards keeps the number that stands at
# temperature 1 in this figure, whatever the temperature is. llama.cpp does it that way,
# unless it is told otherwise. So the same options mean different things in different
# programs.

# %%
nb.say(
    f"**Takeaway.** From temperature 1 to 4, top-p {top_p} goes from {by_top_p[1.0]} to "
    f"{by_top_p[4.0]:,} tokens, and top-k 50 stays at 50. Say in which order you filter."
)

# %% [markdown]
# ## The draw
#
# Now a token is drawn. JAX has no hidden random state. A **key** is an array that stands
# for the state, and the same key always gives the same numbers. `jax.random.split` makes
# many keys of one, and each of them gives other numbers:
#
# ```python
# key = jax.random.key(0)
# a, b = jax.random.split(key)
# jax.random.categorical(a, jnp.array([2.0, 1.0, 0.0]))  # an index: 0, 1 or 2
# ```
#
# `categorical` takes *logits*, and nothing stops you from giving it probabilities.
#
# **Predict.** An earlier JAX port of Mistral gave it probabilities. After the
# famous line "thou" has more than 0.9. How often is "thou" drawn if `categorical` is given
# probabilities: 9 times in 10, every second time, or hardly ever?

# %%
my_share = None  # "9 in 10", "every second" or "hardly ever"

# %% [markdown]
# A `Sampling` can be called: it filters, and then it calls `categorical`. At temperature 1
# without a filter it is `categorical` alone. We draw with 4,000 keys.

# %%
keys = jax.random.split(key, 4_000)
many_draws = jax.jit(
    lambda sampling, row: jax.vmap(lambda key: sampling(row, key=key))(keys)
)
plain = mx.Sampling(temperature=1.0)

# %%
p = jax.nn.softmax(next_logits(tokenizer.encode("O Romeo, Romeo, wherefore art")))  # [V]
share = float((many_draws(plain, p) == p.argmax()).mean())

# %%
often = nb06.band(share, {0.05: "hardly ever", 0.7: "every second"}, "9 in 10")
why = {
    "9 in 10": "the softmax is applied once more, to numbers between 0 and 1.",
    "every second": "a logit of at most 1 cannot outweigh 2,047 others that are near 0.",
}
nb.guess("“thou”, if probabilities are given", my_share, often, why=why)
nb.check("share of “thou” if probabilities are given", share, lt=0.01)

# %% [markdown]
# No error is raised, and the text is noise. How does the right draw work? Add
# **Gumbel noise** to each logit, which is `-log(-log(u))` with `u` uniform between 0 and
# 1, and take the largest. The index is then distributed by the softmax. So a draw is a
# greedy choice on noisy logits. We check it against the package's sampler.

# %%
mild = mx.Sampling(temperature=0.8, top_p=0.9)
vector = next_logits(tokenizer.encode("The king is"))  # [V]
noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(keys)  # [4000, V]
by_hand = jnp.argmax(mild.scores(vector) + noise, axis=1)
explained = int((by_hand == many_draws(mild, vector)).sum())
nb.check("draws of 4,000 that the noise explains", explained, gt=3990)

# %% [markdown]
# Are draws of the package distributed as they should be? The measure is the **total
# variation**: half the summed absolute difference between two distributions, 0 for equal
# ones and 1 for disjoint ones. Even perfect draws miss by chance, and by how much is known:
# a token of probability `p` by about `√(p (1 − p) / n)` in `n` draws. The last row below is
# the mistake again.


# %%
def compared(share, p):  # total variation; by chance alone; dropped tokens drawn
    chance = np.sqrt(2 / np.pi) * np.sqrt(p * (1 - p) / len(keys)).sum() / 2
    return [np.abs(share - p).sum() / 2, chance, int((share[p == 0] > 0).sum())]


def shares(sampling, row):  # of each token in the draws: [V]
    return np.bincount(np.asarray(many_draws(sampling, row)), minlength=V) / len(keys)


# %%
rows = []
for options in (dict(temperature=1.5, top_p=0.8), dict(temperature=1.0)):
    sampling = mx.Sampling(**options)
    p = np.asarray(jax.nn.softmax(sampling.scores(vector)), np.float64)  # [V]
    good = shares(sampling, vector)
    rows.append([nb06.spelled(options), *compared(good, p)])
bad = shares(plain, jax.nn.softmax(vector))
rows.append(["*probabilities given*", *compared(bad, p)])
nb.table(["options", "total variation", "by chance alone", "dropped tokens drawn"], rows)

# %%
over = max(row[1] / row[2] for row in rows[:2])
nb.check("total variation over chance, worst sampler", over, lt=1.5)
nb.check("dropped tokens that were drawn", sum(row[3] for row in rows[:2]), eq=0)
nb.check("total variation, probabilities given", rows[2][1], gt=0.5)

# %% [markdown]
# In a picture, each token by the probability that it should have and the share of the
# draws that it got:

# %%
nb06.scatter(p, {"logits given": good, "probabilities given": bad}, len(keys))
nb.caption(
    "each mark is a token after “The king is”; the lowest marks were never drawn. With "
    "logits they follow the diagonal. With probabilities they lie flat: every token of the "
    "vocabulary is drawn about equally often, whatever the model says."
)

# %%
common = p > 0.003
along = [np.corrcoef(p[common], found[common])[0, 1] for found in (good, bad)]
nb.check("correlation of p and draws, logits", along[0], gt=0.8)
nb.check("correlation of p and draws, probabilities", along[1], lt=0.5)
nb.check("most drawn over the mean, probabilities", bad.max() * V, lt=8)
nb.say(
    f"**Takeaway.** Right draws miss the distribution by {rows[1][1]:.2f}, by chance; one "
    f"wrong argument makes it {rows[2][1]:.2f}, and no error is raised."
)

# %% [markdown]
# ## A loop of your own
#
# Writing a text is the draw, again and again. The plain loop reads the whole text anew
# for each token. One key must not be used twice, so each step makes its own with
# `jax.random.fold_in`, which mixes a number into a key:
#
# ```python
# key = jax.random.key(0)
# jax.random.fold_in(key, 7)  # a new key, the same every time
# jax.random.fold_in(key, 8)  # another one
# ```
#
# The package folds in two numbers: the copy, so that a prompt that occurs twice in a batch
# gets two texts, and then the *position* of the token. Nothing else enters, so a prompt
# gets the same text alone as in any batch.

# %%
prompt, n_made = tokenizer.encode("My lord, I"), 48


def naive_text(prompt, n_made, key, fold=jax.random.fold_in):
    text, row_key = list(prompt), jax.random.fold_in(key, 0)  # copy 0
    while len(text) < len(prompt) + n_made:
        text.append(int(mild(next_logits(text), key=fold(row_key, len(text)))))
    return text[len(prompt) :]


# %% [markdown]
# The package's loop has three parts, and you can put them together yourself. `prefill`
# reads the prompt into a cache ([04](04_the_rolling_buffer.ipynb)). `DecodeState.start`
# makes the state: the cache, the logits, the keys, and what ends a row. `decode_step`
# chooses a token for each row and runs the model on it. `donate_argnums=1` lets the
# compiled step overwrite the old state, so that the cache is not copied. `change` is our
# own: any function of the state, called between two steps.

# %%
step = jax.jit(mx.decode_step, donate_argnums=1)


def write_text(prompt, n_made, sampling, change=lambda state: state):
    cache, row = mx.prefill(package, [prompt], max_tokens=48)  # room: the same always
    options = dict(max_tokens=n_made, prompts=[prompt], sampling=sampling, key=key)
    state, made = mx.DecodeState.start(package, cache, row, **options), []
    while not state.ended.all():
        state, choice = step(package, change(state))
        made.append(int(choice.tokens[0]))
    return made


# %% [markdown]
# A shorter way leads to the same text: `mx.generation.generate`, where up to 64 steps are
# one compiled program. We give it a batch of nine: our prompt, and eight passages of
# unseen Shakespeare. All three ways must agree, token by token.

# %%
unseen = nb.held_out(4000)
passages = [unseen[i : i + 32] for i in range(0, 2400, 300)]
options = dict(max_tokens=n_made, sampling=mild, key=key)
whole, *_ = mx.generation.generate(package, [prompt, *passages], **options)
ways = {
    "the plain loop": naive_text(prompt, n_made, key),
    "our loop": write_text(prompt, n_made, mild),
}

# %%
for name, made in ways.items():
    agree = sum(a == b for a, b in zip(made, whole.tokens, strict=True))
    nb.check(f"tokens of {n_made} as generate's in a batch, {name}", agree, eq=n_made)
print("My lord, I", tokenizer.decode(whole.tokens))

# %% [markdown]
# **Predict.** Someone forgets `fold_in` and uses the same key at every step. What does the
# text look like: like any other; one token for ever; or a few words again and again?

# %%
my_text = None  # "like any other", "one token for ever" or "a few words again and again"

# %%
same_key = naive_text(prompt, n_made, key, fold=lambda key, position: key)
distinct = len(set(same_key)) / len(set(whole.tokens))
bands = {1 / n_made: "one token for ever", 0.85: "a few words again and again"}
why = {
    "like any other": "the noise favours the same few tokens at every step.",
    "one token for ever": "the logits still change from step to step.",
}
look = nb06.band(distinct, bands, "like any other")
nb.guess("The text with one key for every step", my_text, look, why=why)

# %%
print("My lord, I", tokenizer.decode(same_key))
nb.check("distinct tokens, one key over many", distinct, lt=0.85)

# %% [markdown]
# The noise is a bonus for each token. With one key every token gets the same bonus at
# every step, so a few favoured tokens win again and again. The text looks as if the model
# were bad, but only the key is.
#
# A loop of your own can do what no option does. Here is a text without the letter e:
# before each step, every token with an e gets the logit `-inf`. The state is an
# Equinox **module**, an object that holds arrays and cannot be changed. So `eqx.tree_at`
# returns a copy with one part replaced:
#
# ```python
# eqx.tree_at(lambda state: state.logits, state, new_logits)
# ```

# %%
has_e = jnp.asarray(["e" in word(t).lower() for t in range(V)])  # [V]


def without_e(state):
    masked = jnp.where(has_e, -jnp.inf, state.logits)  # [1, V]
    return eqx.tree_at(lambda state: state.logits, state, masked)


# %%
warm = mx.Sampling(temperature=0.7, top_p=0.9)
lipogram = tokenizer.decode(write_text(tokenizer.encode("To sing of"), 48, warm, without_e))
print("To sing of", lipogram)
nb.check("letters e in it", lipogram.lower().count("e"), eq=0)
nb.check("letters in it", len(lipogram), gt=60)
nb.say(
    f"**Takeaway.** Three ways make the same {n_made} tokens, because a draw depends on "
    f"the key and the position alone. {int(has_e.sum())} tokens were forbidden in two "
    "lines."
)

# %% [markdown]
# ## Beams
#
# Greedy decoding takes the best *token* at each step. That is not the best *text*: a
# second-best token may open the way to something much more probable. **Beam search**
# follows the best `n` texts at once. The score of a text is the **sum** of its tokens'
# log-probabilities, which is the logarithm of the whole text's probability. (Logarithms
# here are natural ones; their unit is the **nat**.)

# %%
n_beams = nb.knob(3, of=(2, 3, 4))


def after(prompt, texts):  # log-probabilities of what follows each: [len(texts), V]
    cache, _ = mx.prefill(package, [prompt[:-1]], max_tokens=32, chunk=1)
    rows = [prompt[-1:] + text for text in texts]
    rows += rows[:1] * (64 - len(rows))  # always 64, so that one program serves
    _, logits = mx.prefill(package, rows, cache=cache, chunk=1)
    return np.asarray(jax.nn.log_softmax(logits))[: len(texts)]


# %% [markdown]
# `after` reads up to 64 texts of one length side by side. All of them begin with the
# prompt, so it is read once, into a cache of one row that they all follow. (`chunk=1` reads
# a token at a time: one program for texts of any length.) On top of that, a beam search has
# two steps: make every text longer by each of its best tokens, and keep the best texts.


# %%
def naive_beams(prompt, n_beams, n_made):
    beams, levels = [(0.0, [])], []
    for _ in range(n_made):
        rows = after(prompt, [text for _, text in beams])  # [n_beams, V]
        longer = [
            (float(score + rows[i, t]), [*text, int(t)])
            for i, (score, text) in enumerate(beams)
            for t in np.argsort(-rows[i])[:n_beams]
        ]
        beams = sorted(longer, reverse=True)[:n_beams]
        levels.append(beams)
    return levels


# %%
start = tokenizer.encode("The king is")
levels = naive_beams(start, n_beams, 5)
nb06.tree(levels, word)
nb.caption(
    "each row is a place in the beam, each column a step; the number is the summed "
    "log-probability, and the best sum only falls. A text without a line to the right is "
    "dropped. The bold path is the best text at the end; ↵ is a line break."
)

# %%
totals = [[total for total, _ in level] for level in levels]
falls = all(after[0] <= before[0] for before, after in zip(totals, totals[1:]))
nb.check("the best sum never rises", falls, eq=True)
survive = len({text[0] for _, text in levels[-1]})
nb.check("first tokens that survive five steps", survive, eq=1)
greedy = naive_beams(start, 1, 5)[-1][0]
nb.check("log-probability won over greedy (nats)", totals[-1][0] - greedy[0], gt=0.2)

# %% [markdown]
# A beam is less varied than its width suggests: here all its texts share their first token
# after five steps. The package searches on the device, with a cache for each beam, and
# finds the same texts. Its `score` is the sum divided by the number of tokens
# (`length_penalty=1.0`, the default).

# %%
options = dict(n_beams=n_beams, n_best=n_beams, max_tokens=5)
(found,) = mx.beams.beam_search(package, [start], **options)
same = sum(beam.tokens == text for beam, (_, text) in zip(found, levels[-1], strict=True))
nb.check("beams that are the naive ones", same, eq=n_beams)
gaps = [abs(5 * beam.score - total) for beam, total in zip(found, totals[-1])]
nb.check("max|Δ| of the summed log-probabilities", max(gaps), lt=1e-3)

# %% [markdown]
# What does it cost? When one beam is dropped and another goes on twice, the other's cache
# has to be there twice. So every step copies the caches of all beams. How many bytes is
# that? (`jax.tree.leaves` lists the arrays of a module: here keys and values, for each
# layer.)

# %%
cache, _ = mx.prefill(package, [start], max_tokens=5)
moved = n_beams * sum(array.nbytes for array in jax.tree.leaves(cache.layers))
config, slots = package.config, cache.slots[0]
numbers = 2 * config.n_layers * slots * config.n_kv_heads * config.head_dim
nb.check("bytes that a step copies for its beams", moved, eq=4 * n_beams * numbers)

# %% [markdown]
# Does a beam search find the most probable text? An exact search tells. Log-probabilities
# are negative, so a sum only falls as a text grows. A beginning whose sum is below that of
# the beam's finished text can therefore never win, and we drop it. We follow all other
# beginnings, which are few enough. The best text at the end is the best of all `V⁵`, with
# certainty. (Stahlberg and Byrne searched translations with such a bound.)


# %%
def best_of_all(prompt, n_made, at_least):
    alive, lengths = [(0.0, [])], []  # beginnings that may win; those of each length
    for _ in range(n_made):
        longer = []
        for part in (alive[i : i + 64] for i in range(0, len(alive), 64)):
            rows = after(prompt, [text for _, text in part])
            rows = rows + np.array([score for score, _ in part])[:, None]  # [64, V]
            good = zip(*np.where(rows >= at_least))
            longer += [(float(rows[i, t]), [*part[i][1], int(t)]) for i, t in good]
        alive = sorted(longer, reverse=True)
        lengths.append([text for _, text in alive])
    return *alive[0], lengths


# %% [markdown]
# **Predict.** Four prompts, five tokens each. For how many of them do 16 beams find the
# most probable continuation: none, two, or all four?

# %%
my_found = None  # 0, 2 or 4

# %% [markdown]
# The plain search and the package's have just given the same, so the plain one serves
# here. The exact search starts from the sum that 16 beams have reached: it is the least
# that is worth following.

# %%
openings = ["The king is", "To be, or not", "My lord, I", "I pray thee,"]
ids = [tokenizer.encode(opening) for opening in openings]
by_beams = {n: [naive_beams(x, n, 5)[-1][0] for x in ids] for n in (1, 16)}
exact = [best_of_all(x, 5, by_16[0] - 1e-3) for x, by_16 in zip(ids, by_beams[16])]

# %%
show = lambda total, tokens: f"{nb06.shown(tokenizer.decode(tokens))} ({total:.2f})"
rows, worst = [], []
for i, opening in enumerate(openings):
    total, tokens, lengths = exact[i]
    shown = [show(*best[i]) for best in by_beams.values()]
    worst.append(max(1 + all_.index(tokens[: n + 1]) for n, all_ in enumerate(lengths)))
    rows.append([opening, *shown, show(total, tokens), worst[-1]])
nb.table(["prompt", "greedy", "16 beams", "the best of all", "its worst place"], rows)

# %%
right = sum(row[1] == by_16[1] for row, by_16 in zip(exact, by_beams[16]))
why = {
    2: "each of the four winners once stood beyond place 16: see the last column.",
    4: "16 of 2,048 is not many: the best text may begin badly.",
}
nb.guess("Prompts where 16 beams find the best text", my_found, right, why=why)

# %% [markdown]
# The last column tells why. It follows the winner from its first token on, and gives the
# worst place that its beginning ever had among all beginnings of the same length. A
# beginning at place 17 or worse has no room in 16 beams that hold the better ones, and a
# dropped one never comes back. Here most winners are a single word, spelt in five tokens.

# %%
nb.check("prompts of four where 16 beams find the best text", right, lt=2)
wins = [row[0] - by_16[0] for row, by_16 in zip(exact, by_beams[16])]
nb.check("least that the exact search wins (nats)", min(wins), gt=-1e-3)
single = sum(len(tokenizer.decode(tokens).split()) == 1 for _, tokens, _ in exact)
nb.check("winners of four that are a single word", single, gt=2)

# %%
lost = sum(place > 16 for place in worst)
nb.check("winners once out of 16 places, and those found", lost + right, eq=4)
n_read = sum(1 + sum(map(len, lengths[:-1])) for *_, lengths in exact)
nb.say(
    f"**Takeaway.** 16 beams find the most probable five tokens for {right} of four "
    f"prompts, because the winner stood at place {min(worst)} or worse on its way. The "
    f"exact search read {n_read:,} beginnings, for {float(V) ** 5:.0e} possible texts each."
)

# %% [markdown]
# ## Why beams repeat
#
# Longer searches show another fault. We let four beams write 48 tokens: after
# "I pray thee,", and after the eight passages of Shakespeare, which the next section needs.

# %%
opening = "I pray thee,"
beginnings = [tokenizer.encode(opening), *passages]
found = mx.beams.beam_search(package, beginnings, n_beams=4, max_tokens=48)
stuck = found[0][0].tokens
print(opening, tokenizer.decode(stuck))


# %%
def period(tokens):  # the length of the loop in which a text ends; 0 if in none
    loops = (n for n in range(1, 32) if tokens[-3 * n :] == tokens[-n:] * 3)
    return next(loops, 0)


nb.check(f"tokens of the loop after “{opening}”", period(stuck), gt=0)

# %% [markdown]
# (`nb06.costs` reads what each token **costs**: the negative logarithm of its probability.)
#
# **Predict.** The search has found no better text than this loop. Take "I pray thee," eight
# times. How probable does the *model* find one more round: 90 %, 50 %, or less than 10 %?

# %%
my_round = None  # "90 %", "50 %" or "less than 10 %"

# %%
loop = stuck[-period(stuck) :]
looping = tokenizer.encode(opening) + loop * 7
one_more = float(np.exp(-nb06.costs(package, [looping + loop])[0, -len(loop) :].sum()))

# %%
why = {
    "90 %": "to be the best of all continuations, a text need not be probable.",
    "50 %": "the rest is shared by thousands of other continuations.",
}
size = nb06.band(one_more, {0.1: "less than 10 %", 0.7: "50 %"}, "90 %")
nb.guess("The probability of one more round", my_round, size, why=why)

# %% [markdown]
# The model can say so itself: we draw 128 continuations, 64 at a time, with `after` and
# `categorical`, which draws one token for each row of logits.

# %%
drawn = []
for batch in range(2):
    texts = [[]] * 64
    for i in range(len(loop)):
        step_key = jax.random.fold_in(key, len(loop) * batch + i)
        tokens = jax.random.categorical(step_key, after(looping, texts)).tolist()  # 64
        texts = [[*text, token] for text, token in zip(texts, tokens)]
    drawn += texts
print(*[tokenizer.decode(text).replace("\n", "↵") for text in drawn[:9]], sep=" | ")

# %%
stay = float(np.mean([text == loop for text in drawn]))
nb.check("probability of one more round", one_more, lt=0.1)
nb.check("share of 128 draws that go one more round", stay, lt=0.1)

# %% [markdown]
# So a draw nearly always leaves the loop at once, but the beam search stays in it. Is the
# search at fault? We ask the exact search of the last section for the best of all `V⁴`
# continuations.

# %%
_, rival, _ = best_of_all(looping, len(loop), np.log(one_more) - 1e-3)
nb.check("the best of all V⁴ continuations is the loop", rival == loop, eq=True)
nb.say(
    f"One more round has probability {one_more:.1%}, and no other text of {len(loop)} "
    "tokens has as much."
)

# %% [markdown]
# The search is right, and yet the most probable text is improbable: nearly all of the
# probability is spread over a great many other texts. A search for the maximum ignores
# them, because each of them alone has less.
#
# But why does the maximum lie in a *loop*? There are two explanations. The model may have
# learnt to **copy**: a phrase that came twice becomes more probable. Or it **forgets**:
# once the window holds nothing but the loop, the model sees the same input after each
# round, and so it makes the same choice again.
#
# We can separate the two. Take 100 tokens of unseen Shakespeare, from 8 places, put the
# loop behind them, and read what each round costs. Then do the same with a *shorter
# window*. A model with a shorter window sees fewer copies, and it forgets sooner. If
# copying makes a round cheap, the short window should need more rounds; if forgetting
# does, fewer. (Through its six layers a window of 4 reaches 18 positions back and one of
# 64 reaches 378: see [03](03_sliding_window_attention.ipynb).)


# %%
def cost_of_rounds(model, before, loop, n_rounds=20):  # nats a token: [n_rounds]
    found = nb06.costs(model, [text + loop * n_rounds for text in before])
    found = found[:, len(before[0]) - 1 :]  # of the rounds alone
    return found.reshape(len(before), n_rounds, len(loop)).mean((0, 2))


before = [unseen[i : i + 100] for i in range(0, 1600, 200)]

# %%
models = {window: nb.with_config(package, sliding_window=window) for window in (4, 64)}
by_window = {w: cost_of_rounds(model, before, loop) for w, model in models.items()}
nb06.rounds({f"window {w}": cost for w, cost in by_window.items()}, len(loop))
nb.caption(
    "with both windows the loop costs much at first and becomes cheap, sooner with the "
    "short window. Both end at about the same cost, although the short window holds a "
    "single round."
)

# %% [markdown]
# The table says how many tokens of the loop it takes until 90 % of the fall is done.

# %%
floor = {w: float(cost[-3:].mean()) for w, cost in by_window.items()}
left = {w: (cost - floor[w]) / (cost[0] - floor[w]) for w, cost in by_window.items()}
until = {w: len(loop) * int(np.argmax(share < 0.1)) for w, share in left.items()}
nb.table(
    ["window", "first round", "last rounds", "tokens until 90 % of the fall is done"],
    [[w, by_window[w][0], floor[w], until[w]] for w in models],
)

# %%
nb.check("tokens of a round, and the shortest window", len(loop), eq=4)
nb.check("tokens until cheap, window 64 over window 4", until[64] / until[4], gt=3)
spread = max(floor.values()) - min(floor.values())
nb.check("spread of the last rounds' costs (nats)", spread, lt=0.4)
least = min(cost[0] - floor[w] for w, cost in by_window.items())
nb.check("least fall from the first round to the last (nats)", least, gt=1.5)

# %% [markdown]
# So forgetting makes the loop cheap: the short window, which sees fewer copies, needs
# fewer tokens. But the model was trained with a window of 64, and 4 may harm it. So here
# are both causes apart in the unchanged model: few copies and many, with and without
# Shakespeare before them.

# %%
alone = len(loop) * cost_of_rounds(package, [tokenizer.encode("")], loop)
behind = len(loop) * by_window[64]
header = ["cost of the next round (nats)", "3 copies before", "19 copies before"]
rows = [["nothing else before", alone[3], alone[19]]]
nb.table(header, [*rows, ["100 tokens of Shakespeare before", behind[3], behind[19]]])
forgetting, copying = behind[3] - alone[3], alone[3] - alone[19]
nb.check("nats by forgetting, over nats by 16 more copies", forgetting / copying, gt=2)

# %% [markdown]
# Copying helps here, but much less than forgetting. (In large models copying helps much:
# Xu et al. measure how each repetition makes the next more probable.) Forgetting alone is
# enough. The extreme case shows it, a model that sees only the last token: it is a table
# `[V, V]` of how probable each token is after each other. We make it by giving the model
# texts of one token. The most probable text of a table can be found exactly, by a
# recursion over the last token (the Viterbi algorithm). Only tokens with a letter may be
# used, so that the best text has words.

# %%
after_one = jax.vmap(lambda token: package(token[None])[0][0])  # its logits: [V]
table = np.asarray(jax.nn.log_softmax(jax.jit(after_one)(jnp.arange(V)))).T  # [to, from]
is_word = np.array([any(c.isalpha() for c in word(t)) for t in range(V)])  # [V]
table = np.where(is_word[:, None], table, np.float32(-np.inf))


# %%
def most_probable(start, n_made):
    best, back = np.where(np.arange(V) == start, 0, -np.inf).astype(np.float32), []
    for _ in range(n_made):
        sums = best + table  # of the best texts that end so: [to, from]
        back.append(sums.argmax(axis=1))
        best = sums.max(axis=1)
    path = [int(best.argmax())]
    for step in back[:0:-1]:
        path.append(int(step[path[-1]]))
    return path[::-1]


# %%
paths = [most_probable(tokenizer.encode(start)[-1], 16) for start in (" king", " thou")]
for start, path in zip(("king", "thou"), paths):
    print(start, tokenizer.decode(path))
loops = sum(period(path) > 0 for path in paths)
nb.check("best texts of a table, of 2, that end in a loop", loops, eq=2)

# %% [markdown]
# The table cannot see that it repeats itself, and it soon loops. It has to: a long path
# through finitely many tokens must come back to one of them, and the best path goes round
# the cycle whose steps have the best mean (Karp).

# %%
nb.say(
    "**Takeaway.** Beams repeat because the search wants the maximum and the model "
    f"forgets. After eight rounds the next has probability {one_more:.1%}, and no rival "
    f"has as much. The loop is cheap after {until[4]} tokens with a window of 4, and after "
    f"{until[64]} with 64."
)

# %% [markdown]
# ## Quality against variety
#
# A sampler is a compromise. We continue the eight passages by 48 tokens each, and measure
# two things: how probable the model finds the text, and what share of its pairs of
# neighbouring tokens are distinct. Shakespeare's own continuation is measured in the same
# way.

# %%
truth = [unseen[i + 32 : i + 80] for i in range(0, 2400, 300)]


def reread(rows):  # log-probabilities of continuations of the passages: [8, 48]
    return -nb06.costs(package, [a + b for a, b in zip(passages, rows)])[:, -48:]


def point(name):  # mean log-probability of a token; share of distinct pairs
    rows, logprobs = texts[name]
    pairs = [list(zip(row, row[1:])) for row in rows]
    return float(logprobs.mean()), np.mean([len(set(p)) / len(p) for p in pairs])


# %% [markdown]
# Then beams, greedy decoding, and four temperatures without a filter. Each row that
# `generate` and `beam_search` return has `tokens` and their `logprobs`. These are the
# model's own, whatever the temperature was. Reading the texts again must give the same.

# %%
of_rows = lambda rows: ([x.tokens for x in rows], np.array([x.logprobs for x in rows]))
texts = {"Shakespeare": (truth, reread(truth))}
texts["4 beams"] = of_rows([row[0] for row in found[1:]])
heats = {"greedy": 0.0, "T = 0.5": 0.5, "T = 0.8": 0.8, "T = 1.0": 1.0, "T = 1.2": 1.2}
for name, t in heats.items():
    options = dict(max_tokens=48, key=key, sampling=mx.Sampling(temperature=t))
    rows = mx.generation.generate(package, beginnings, **options)
    texts[name] = of_rows(rows[1:])

# %%
for name in ("4 beams", "T = 0.5"):
    gap = np.abs(reread(texts[name][0]) - texts[name][1]).max()
    nb.check(f"max|Δ log-probability| when read again, {name}", gap, lt=1e-3)
points = {name: point(name) for name in heats}
others = {name: point(name) for name in ("4 beams", "Shakespeare")}
nb06.curve(points, others)
nb.caption(
    "the hotter the samples, the less probable; the hottest are more varied than the "
    "greedy texts. Beams lie beyond the greedy end. "
    "Shakespeare is not on the curve: the model finds his text less probable than its own "
    "at temperature 1, and his text repeats more pairs."
)

# %%
log_p, variety = (list(values) for values in zip(*points.values()))
bard, warmest = others["Shakespeare"], points["T = 1.0"]
nb.check("least loss of log-probability by more heat", -np.diff(log_p).max(), gt=0.1)
nb.check("distinct pairs, hottest over greedy", variety[-1] / variety[0], gt=1.03)
nb.check("4 beams over greedy (nats)", others["4 beams"][0] - log_p[0], gt=0.1)
nb.check("distinct pairs, 4 beams over greedy", others["4 beams"][1] / variety[0], lt=1)
nb.check("T = 1 over Shakespeare (nats)", warmest[0] - bard[0], gt=0.2)
nb.check("distinct pairs, T = 1 less Shakespeare", warmest[1] - bard[1], gt=0.005)

# %% [markdown]
# Here are three of these texts, after the same beginning.

# %%
shades = {
    n: (texts[n][0][3], -texts[n][1][3]) for n in ("Shakespeare", "T = 1.0", "4 beams")
}
print("…", tokenizer.decode(passages[3])[-60:])
nb06.verse(shades, word)
nb.caption(
    "light tokens surprised the model. In Shakespeare's text more than one token in ten "
    "costs over 5 nats. In the beams' text hardly any does."
)

# %%
loud = {name: float((values > 5).mean()) for name, (_, values) in shades.items()}
nb.check("share of tokens above 5 nats, Shakespeare", loud["Shakespeare"], gt=0.1)
nb.check("share of tokens above 5 nats, 4 beams", loud["4 beams"], lt=0.05)
nb.say(
    f"**Takeaway.** Shakespeare gets {bard[0]:.2f} nats a token, samples at temperature 1 "
    f"get {warmest[0]:.2f}, beams {others['4 beams'][0]:.2f}: good text is not the most "
    "probable text."
)

# %% [markdown]
# ## Two ports and torch
#
# The reference's `generate` takes the `argmax` and has no sampler, so two comparisons are
# made. Greedy: each program's own loop. Sampled: each program's own logits, the same
# filter, and the same Gumbel noise from NumPy, added by hand as above. The package does
# that in our loop, by a `change` before a greedy step.

# %%
heat, top_p = 0.8, 0.9
noise = np.random.default_rng(0).gumbel(size=(n_made, V)).astype(np.float32)
one_file = one_file_ref.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
sampling = mx.Sampling(temperature=heat, top_p=top_p)


# %%
def by_package():
    rows = iter(noise)

    def add_noise(state):
        row = sampling.scores(state.logits[0]) + next(rows)
        return eqx.tree_at(lambda state: state.logits, state, row[None])

    return write_text(prompt, n_made, mx.Sampling(), add_noise)


def by_one_file():
    text, made = prompt, []
    cache = one_file.empty_cache(1, len(prompt) + n_made)
    for g in noise:
        end = len(prompt) + len(made)
        positions = jnp.arange(end - len(text), end)
        rows, cache = one_file(jnp.asarray([text]), positions, cache)
        made.append(int(jnp.argmax(sampling.scores(rows[0, -1]) + g)))
        text = made[-1:]
    return made


# %% [markdown]
# Torch filters with its own `sort` and `cumsum`:


# %%
def by_torch(twin):
    import torch

    import torch_mistral

    cache, text, start, made = twin.empty_cache(1), prompt, 0, []
    for g in torch.from_numpy(noise):
        row = twin(torch.tensor([text]), start, cache)[0, -1] / heat
        p, order = row.softmax(-1).sort(descending=True)
        row[order[p.cumsum(-1) - p >= top_p]] = -torch.inf
        start += len(text)
        made.append(int((row + g).argmax()))
        text = made[-1:]
    return torch.tensor([torch_mistral.greedy(twin, [prompt], n_made)[0], made])


# %%
torch_greedy, torch_sampled = oracle("tokens", by_torch).astype(int).tolist()
speller = one_file_ref.Tokenizer(str(nb.MODEL / "tokenizer.model"))
(text,), _ = one_file_ref.generate(["My lord, I"], one_file, speller, n_made)
programs = {
    "package": (write_text(prompt, n_made, mx.Sampling()), by_package()),
    "one file": (speller.encode(text)[len(prompt) :], by_one_file()),
    "torch": (torch_greedy, torch_sampled),
}

# %%
ours = [tokenizer.decode(made) for made in programs["package"]]
rows = []
for name, both in programs.items():
    same = [tokenizer.decode(made) == text for made, text in zip(both, ours)]
    rows.append([name, *("the same" if x else "another" for x in same)])
    if name != "package":
        nb.check(f"greedy and sampled text, {name} = package", same, eq=[True, True])
nb.table(["program", "greedy text", "sampled text"], rows)
print(*[f"My lord, I {text}" for text in ours], sep="\n---\n")

# %% [markdown]
# The difference in code: torch sorts the vocabulary and cuts the sorted list, the package
# compares each token with a threshold and never sorts, the reference draws nothing.
#
# **Takeaway.** With the same noise, three programs draw the same text: all chance is in
# the key.
#
# ## Exercises
#
# **Exercise 1: no n-gram twice** (●● 10 minutes). An **n-gram** is `n` tokens in a row.
# The blunt cure for loops forbids every token that would complete an n-gram which the
# text already has. Give the set of these ids. (Then use it in `naive_text`: set the logits
# of these ids to `-jnp.inf` before the draw. Does the text become better?)
#
# <details><summary>Hint</summary>
#
# The last `n - 1` tokens are the beginning of the n-gram. Where else do they stand, and
# what follows them there?
#
# </details>
#
# {{solution:banned}}


# %%
def banned(tokens, n):  # tokens: list of ids
    return NotImplemented


ex06.check_banned(banned)

# %% [markdown]
# **Exercise 2: repair two faults** (●● 5 minutes). This shall give `n` independent draws
# from logits `[V]`. It has two faults, and neither raises an error. Repair it.
#
# ```python
# def draws(logits, n, key):
#     p = jax.nn.softmax(logits)
#     return jnp.stack([jax.random.categorical(key, p) for _ in range(n)])
# ```
#
# <details><summary>Hint</summary>
#
# What does `categorical` take? And how many keys do `n` draws need?
#
# </details>
#
# {{solution:draws}}


# %%
def draws(logits, n, key):
    return NotImplemented


ex06.check_draws(draws)

# %% [markdown]
# **Exercise 3: how far below the best?** (●● 5 minutes). The temperature is 1.5 and min-p
# is 0.05. By how many nats may a token's *logit*, as the model gives it, be below the
# best one's, so that the token is just kept? A number, to two decimals.
#
# <details><summary>Hint</summary>
#
# The quotient of two probabilities is `exp` of the difference of their divided logits.
#
# </details>
#
# {{solution:gap}}

# %%
gap = NotImplemented
ex06.check_gap(gap)

# %% [markdown]
# ## Recap

# %%
seen = lambda rule: f"{kept[famous][rule]} or {kept[free][rule]} tokens"
rows = [
    ["temperature", "divides the logits", f"at 4, top-p keeps {growth:.0f} times as many"],
    ["top-k", "keeps a number of tokens", seen("top-k 50")],
    ["top-p", "keeps a share of the probability", seen("top-p 0.9")],
    ["min-p", "compares with the best one's probability", seen("min-p 0.1")],
    ["beams", "seek the best text: a loop", f"one more round has {one_more:.1%}"],
]
nb.table(["rule", "what it does", "what we found"], rows)

# %%
nb.recap()

# %%
nb.say(
    "**The answer.** Temperature stretches the distribution, three filters cut its tail by "
    "number, by sum or by height, and one draw takes a token from the rest. Beams draw "
    "nothing and look for the highest peak. They repeat because that peak is a loop. The "
    f"model itself would leave it, after eight rounds, with probability {1 - one_more:.0%}."
)

# %% [markdown]
# **What we did not show**: typical and contrastive sampling, speculative decoding, beams
# that are kept apart on purpose; and whether people *like* a text.
#
# **Further reading**: Holtzman et al., arXiv 1904.09751 (top-p, and why the most probable
# text is dull); Nguyen et al., arXiv 2407.01082 (min-p); Keskar et al., arXiv 1909.05858,
# the section on sampling (repetition penalty); Stahlberg and Byrne, arXiv 1908.10090
# (exact search); Xu et al., arXiv 2206.02369 (repetition feeds itself); Karp, "A
# characterization of the minimum cycle mean in a digraph", Discrete Mathematics 23, 1978.
#
# **Next**: [07 Many devices](07_many_devices.ipynb).
