"""The checkers of notebook 01."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx

from . import call, todo, verdict


def check_swiglu(swiglu: Callable) -> bool | None:
    model, _ = mx.load(dtype=jnp.float32)
    block = model.layers[0].feed_forward
    x = jr.normal(jr.key(1), (16, model.config.dim))
    answer, wrong = call(swiglu, x, block.w1.weight, block.w2.weight, block.w3.weight)
    if answer is NotImplemented:
        return todo("swiglu")
    expected = block(x)
    shape = getattr(answer, "shape", None)
    if wrong is None and shape != expected.shape:
        wrong = f"The shape is {shape}, not {expected.shape}."
    if wrong is None:
        correct = float(np.mean(np.isclose(answer, expected, rtol=1e-3, atol=1e-4)))
        if correct < 1:
            wrong = f"{correct:.0%} of the values are. {_of_swiglu(answer, x, block)}"
    return verdict("swiglu", wrong, "100% of the values are.")


def _of_swiglu(answer, x, block) -> str:
    """What a wrong answer looks like."""
    w1, w2, w3 = (layer.weight.T for layer in (block.w1, block.w2, block.w3))
    silu = jax.nn.silu
    others = {
        "It is gelu that you use: SwiGLU has silu.": (jax.nn.gelu(x @ w1) * (x @ w3)) @ w2,
        "In yours w3 goes through silu; it should be w1.": ((x @ w1) * silu(x @ w3)) @ w2,
        "Both go through silu: only w1 does.": (silu(x @ w1) * silu(x @ w3)) @ w2,
        "The product with w3 x is missing.": silu(x @ w1) @ w2,
    }
    for hint, other in others.items():
        if np.allclose(answer, other, rtol=1e-2, atol=1e-2):
            return hint
    return "Is it w2(silu(w1(x)) * w3(x)), each weight transposed?"


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
    model = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), skeleton)
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
