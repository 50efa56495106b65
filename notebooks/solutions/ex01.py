"""Right and wrong answers to the exercises of notebook 01. The notebook shows the right."""

import dataclasses

import equinox as eqx
import jax

import mistral_eqx as mx
import nb01


unshared_parameters = sum(
    leaf.size
    for leaf in jax.tree.leaves(
        eqx.filter_eval_shape(
            mx.Transformer,
            dataclasses.replace(nb01.MISTRAL_7B, n_kv_heads=32),
            key=jax.random.key(0),
        )
    )
)  # 8,047,038,464

unshared_parameters_wrong = 7_241_732_096  # as it is

unshared_parameters_wrong_2 = 805_306_368  # what is added

unshared_parameters_wrong_3 = 7_644_385_280  # the keys alone


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
