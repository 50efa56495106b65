"""Right and wrong answers to the exercises of notebook 01. The notebook shows the right."""

import jax


def swiglu(x, w1, w2, w3):
    return (jax.nn.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def swiglu_wrong(x, w1, w2, w3):
    return (x @ w1.T * jax.nn.silu(x @ w3.T)) @ w2.T


def swiglu_wrong_2(x, w1, w2, w3):
    return (jax.nn.gelu(x @ w1.T) * (x @ w3.T)) @ w2.T


def swiglu_wrong_3(x, w1, w2, w3):
    return jax.nn.silu(x @ w1.T) @ w2.T


# B leaves zero at a stroke once the window of 64 is full; A rises from position 1 on.
name_the_bug = {"A": "theta 1e6", "B": "window + 1"}
name_the_bug_wrong = {"A": "half-split RoPE", "B": "window + 1"}
name_the_bug_wrong_2 = {"A": "window + 1", "B": "theta 1e6"}
name_the_bug_wrong_3 = {"A": "theta", "B": "window"}


def load_by_path(skeleton, arrays):
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[spell(path)], skeleton)


def load_by_path_wrong(skeleton, arrays):
    return jax.tree.unflatten(jax.tree.structure(skeleton), list(arrays.values())[::-1])


def load_by_path_wrong_2(skeleton, arrays):
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    place = lambda path, leaf: arrays.get(spell(path), leaf)
    return jax.tree_util.tree_map_with_path(place, skeleton)


def load_by_path_wrong_3(skeleton, arrays):
    return arrays
