"""The checkers of notebook 09."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import mistral_eqx as mx

from . import call, todo, verdict


CONFIG = mx.ModelConfig(
    dim=32, n_layers=2, head_dim=16, hidden_dim=48, n_heads=2, n_kv_heads=1, norm_eps=1e-5,
    vocab_size=64,
)  # fmt: skip


def check_all_but_embedding(all_but_embedding: Callable) -> bool | None:
    skeleton = eqx.filter_eval_shape(mx.Transformer, CONFIG, key=jr.key(1))
    model = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), skeleton)
    answer, wrong = call(all_but_embedding, model)
    if answer is NotImplemented:
        return todo("all_but_embedding")
    if wrong is None:
        wrong = _wrong_filter(model, answer)
    praise = "All is trained but the embedding."
    return verdict("all_but_embedding", wrong, praise)


def _wrong_filter(model, answer) -> str | None:
    if jax.tree.structure(answer) != jax.tree.structure(model):
        return (
            "It is no tree like the model with True or False in place of every array: "
            f"it is of type {type(answer).__name__}, with {len(jax.tree.leaves(answer))} "
            f"leaves, where the model has {len(jax.tree.leaves(model))}."
        )
    if not all(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(answer)):
        return "Some leaves of it are neither True nor False."
    trained, frozen = eqx.partition(model, answer)
    if trained.tok_embeddings.weight is not None:
        n = len(jax.tree.leaves(trained))
        rest = "all else is, too" if n > 1 else "nothing else is"
        return f"The embedding would be trained, and {rest}."
    if left := [name for name in _names(frozen) if not name.startswith("tok_embeddings")]:
        return f"These would not be trained: {', '.join(left[:3])}."
    return None


def _names(tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def check_first_state(first_state: Callable) -> bool | None:
    optimizer = optax.adamw(1e-2)
    model = eqx.nn.MLP(3, 1, 8, 1, key=jr.key(1))
    state, wrong = call(first_state, optimizer, model)
    if state is NotImplemented:
        return todo("first_state")
    if wrong is None:
        # A reader's own promotion rules are as they are; optax needs the standard ones.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            wrong = _wrong_state(optimizer, model, state)
    return verdict("first_state", wrong, "Two steps run, and the loss falls.")


def _wrong_state(optimizer, model, state) -> str | None:
    def loss(model):
        return jnp.mean((jax.vmap(model)(jnp.eye(3)) - 1) ** 2)

    if isinstance(state, eqx.Module):
        return "That is a model. The optimizer's state is what its `init` makes of one."

    n_weights = len(jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    n_moments = sum(eqx.is_array(leaf) and leaf.ndim > 0 for leaf in jax.tree.leaves(state))
    if n_moments != 2 * n_weights:
        return (
            f"The state has {n_moments} arrays of moments. Adam keeps two for each of the "
            f"{n_weights} weights."
        )
    before = loss(model)
    try:
        for _ in range(2):
            gradient = eqx.filter_grad(loss)(model)
            weights = eqx.filter(model, eqx.is_inexact_array)
            updates, state = optimizer.update(gradient, state, weights)
            model = eqx.apply_updates(model, updates)
    except Exception:
        return (
            "It begins, but the first step fails: the state must have the shape of the "
            "gradient, a tree like the model."
        )
    return None if loss(model) < before else "Two steps run, and the loss does not fall."


def check_largest_rank(largest_rank: int) -> bool | None:
    if largest_rank is NotImplemented:
        return todo("largest_rank")
    try:
        rank = int(largest_rank)
        exact = rank == largest_rank
    except Exception:
        rank, exact = 0, False
    if not exact or rank < 1:
        wrong = f"A rank is a whole number from 1, not {largest_rank!r}."
        return verdict("largest_rank", wrong)
    layer = 704 * 256
    adapter, next_one = rank * (704 + 256), (rank + 1) * (704 + 256)
    wrong = None
    if adapter >= layer:
        over = "just too many" if rank * 960 < layer + 960 else "far too many"
        wrong = f"Rank {rank} has {adapter:,} numbers, the layer {layer:,}: {over}."
    elif next_one < layer:
        wrong = f"Rank {rank + 1} still has fewer: {next_one:,} of {layer:,}."
    return verdict("largest_rank", wrong, "Above it the adapter is no saving in numbers.")
