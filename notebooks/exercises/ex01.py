"""The checkers of notebook 01."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

import mistral_eqx as mx
from nb01 import MISTRAL_7B

from . import call, number, todo, verdict


def check_unshared_parameters(answer) -> bool | None:
    if answer is NotImplemented:
        return todo("unshared_parameters")
    answer = number(answer)
    if answer is None:
        return verdict("unshared_parameters", "The answer is a number of parameters.")
    shared, unshared = _parameters(), _parameters(n_kv_heads=MISTRAL_7B.n_heads)
    told = {
        shared: "That is Mistral 7B as it is: `replace` gives a copy, and leaves the "
        "configuration as it was.",
        unshared - shared: "That many are added. How many are there in all?",
        (shared + unshared) // 2: "That widens the keys or the values: both are shared.",
        _parameters(n_heads=MISTRAL_7B.n_kv_heads): "Now keys and values are still 8 "
        "heads, and so are the queries. It is `n_kv_heads` that should grow.",
    }
    wrong = None
    if answer != unshared:
        default = "Too many." if answer > unshared else "Too few."
        wrong = told.get(answer, f"{default} Only `n_kv_heads` changes.")
    praise = f"Sharing keys and values saves {unshared - shared:,} of them."
    return verdict("unshared_parameters", wrong, praise)


def _parameters(**changes) -> int:
    """The parameters of Mistral 7B with another configuration."""
    config = dataclasses.replace(MISTRAL_7B, **changes)
    skeleton = eqx.filter_eval_shape(mx.Transformer, config, key=jr.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(skeleton))


SUSPECTS = {"A": "theta 1e6", "B": "window + 1"}
# What is known of each bug in the museum.
_SIGNS = {
    "half-split RoPE": "that one is off by more than 1 from position 1 on",
    "theta 1e6": "that one leaves zero at position 1",
    "window + 1": "that one has no error before position 64",
    "eps 1e-3": "that one has an error at position 0",
    "wo transposed": "that one has an error at position 0",
    "w1, w3 swapped": "that one has an error at position 0",
}


def check_name_the_bug(answer: dict[str, str]) -> bool | None:
    if not isinstance(answer, dict):
        return verdict("name_the_bug", "It should be a dictionary with A and B.")
    given = {letter: answer.get(letter) for letter in SUSPECTS}
    if NotImplemented in given.values():
        return todo("name_the_bug")
    for letter, bug in given.items():
        if not isinstance(bug, str) or bug not in _SIGNS:
            known = "; ".join(_SIGNS)
            return verdict(
                "name_the_bug", f"{bug!r} is not in the museum, which has {known}."
            )
        if bug != SUSPECTS[letter]:
            return verdict("name_the_bug", f"{letter} is not {bug}: {_SIGNS[bug]}.")
    return verdict("name_the_bug", None)


def check_load_by_path(load_by_path: Callable) -> bool | None:
    config = mx.ModelConfig(
        dim=8, n_layers=2, head_dim=4, hidden_dim=8, n_heads=2, n_kv_heads=1,
        norm_eps=1e-5, vocab_size=16,
    )  # fmt: skip
    skeleton = eqx.filter_eval_shape(mx.Transformer, config, key=jr.key(0))
    random = np.random.default_rng(0)
    model = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), skeleton
    )
    leaves = jax.tree_util.tree_leaves_with_path(model)
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    arrays = {spell(path): leaf for path, leaf in leaves}
    answer, wrong = call(load_by_path, skeleton, arrays)
    if answer is NotImplemented:
        return todo("load_by_path")
    if wrong is None and jax.tree.structure(answer) != jax.tree.structure(model):
        wrong = "What comes back is not a model of the skeleton's structure."
    if wrong is None:
        wrong = _of_loaded(answer, model, spell)
    if wrong is None:
        missing = {name: array for name, array in arrays.items() if name != "norm.weight"}
        _, raised = call(load_by_path, skeleton, missing)
        if raised is None or "KeyError" not in raised:
            wrong = "Without norm.weight in the dictionary it did not raise KeyError."
    return verdict("load_by_path", wrong)


def _of_loaded(
    answer: mx.Transformer, model: mx.Transformer, spell: Callable
) -> str | None:
    """Which weights are not in their places."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(model), jax.tree.leaves(answer))
    differing = [spell(path) for (path, a), b in pairs if not np.array_equal(a, b)]
    if differing:
        return f"{len(differing)} weights are not those of the file: {differing[0]}, say."
    return None
