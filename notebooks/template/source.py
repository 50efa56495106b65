# ---
# jupyter:
#   budget: 90
#   cover: 0
# ---

# %% [markdown]
# # TITLE
#
# **What is the one question that this notebook answers?**
#
# - **You will be able to** say three to five things, each with a verb.
# - **Before this**: [01](01_one_model_two_languages.ipynb).
# - **Time**: {{time}}.
# - **The code lives in** `mistral_eqx/rope.py`.
# - **Model and data**: the embedded model, and Shakespeare that it has never seen.
# - **Torch**: live if installed, else its recorded answers.
# - **Predict first**: which answers would most readers get wrong?
#
# The letters: `T` tokens, `W` window; see [README.md](README.md).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mistral_eqx as mx
import nbtools as nb
from exercises import exNUMBER


key = jax.random.key(0)
nb.versions()

# %% [markdown]
# ## One section
#
# Say what is to be seen, first in three lines of plain code, then with the package. A knob
# is a number that the reader may change, and each of its values must work here. Here, a
# vector of two numbers is turned by RoPE.

# %%
position = nb.knob(3, of=(1, 3, 30))
pair = jnp.array([[[1.0, 0.0]]])  # [T, H, head width]

# %%
nb.show_source(mx.rope.rotate)

# %% [markdown]
# **Predict.** How long is it afterwards: 1, or as many times longer as the position says?

# %%
my_length = None  # 1 or the position

# %%
cos, sin = mx.rope.rotation(jnp.array([position], jnp.int32), 2, 1e4)
turned = mx.rope.rotate(pair, cos, sin)
length = round(float(jnp.linalg.norm(turned)), 3)
nb.guess("Its length", my_length, length, why={position: "a rotation stretches nothing."})
nb.check("length after the turn, less 1", abs(float(jnp.linalg.norm(turned)) - 1), lt=1e-5)

# %% [markdown]
# One sentence reads what the cell above has shown. Then comes the figure.

# %%
figure, axis = plt.subplots(figsize=(4, 4))
for name, vector in {"before": pair, "after": turned}.items():
    x, y = np.ravel(vector)
    axis.plot([0, x], [0, y], label=name)
axis.set(xlabel="first number", ylabel="second number", aspect="equal")
axis.legend()
nb.caption("the vector has turned, and is as long as before.")

# %%
nb.say(f"**Takeaway.** After a turn by {position} radians the length is {length}.")

# %% [markdown]
# ## Exercises
#
# **Exercise 1: the turn** (● 2 minutes). By how many degrees does a pair with the frequency
# `frequency` turn from one position to another?
#
# <details><summary>Hint</summary>
#
# One position turns it by `frequency` radians, and π radians are 180 degrees.
#
# </details>
#
# {{solution:turn_NUMBER}}


# %%
def turn_NUMBER(frequency, one, other):
    return NotImplemented


exNUMBER.check_turn_NUMBER(turn_NUMBER)

# %% [markdown]
# ## Recap

# %%
nb.recap()

# %% [markdown]
# **The answer.** One sentence with a number from a cell.
#
# **What we did not show**: what a reader may miss. **Further reading**: papers, with their
# sections. **Next**: the notebook after this one.
