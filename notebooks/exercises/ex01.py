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
    if wrong is None and getattr(answer, "shape", None) != expected.shape:
        wrong = f"The shape is {getattr(answer, 'shape', None)}, not {expected.shape}."
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
        "w3 goes through silu: it is w1 that does.": ((x @ w1) * silu(x @ w3)) @ w2,
        "Both go through silu: only w1 does.": (silu(x @ w1) * silu(x @ w3)) @ w2,
        "The product with w3 x is missing.": silu(x @ w1) @ w2,
    }
    for hint, other in others.items():
        if np.allclose(answer, other, rtol=1e-2, atol=1e-2):
            return hint
    return "Is it w2(silu(w1(x)) * w3(x)), each weight transposed?"


SUSPECTS = {"A": "theta 1e6", "B": "window + 1"}


def check_name_the_bug(answer: dict[str, str]) -> bool | None:
    if NotImplemented in answer.values():
        return todo("name_the_bug")
    wrong = [letter for letter, bug in SUSPECTS.items() if answer.get(letter) != bug]
    hint = f"Look again at {' and '.join(wrong)}: where does it leave zero, and how?"
    return verdict("name_the_bug", hint if wrong else None)


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
        same = jax.tree.map(lambda a, b: bool(np.all(a == b)), answer, model)
        differing = [
            spell(p) for p, ok in jax.tree_util.tree_leaves_with_path(same) if not ok
        ]
        if differing:
            wrong = (
                f"{len(differing)} weights are not those of the file: {differing[0]}, say."
            )
    if wrong is None:
        missing = {name: array for name, array in arrays.items() if name != "norm.weight"}
        try:
            load_by_path(skeleton, missing)
            wrong = "Without norm.weight in the dictionary it did not raise KeyError."
        except KeyError:
            pass
    return verdict("load_by_path", wrong)
