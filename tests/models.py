"""Small random models, made once for all tests."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_eqx import ModelConfig, Transformer, add_lora
from mistral_eqx.files.names import weight_name


PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 6,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 64,
    "rope_theta": 1e4,
    "sliding_window": 8,
}


@functools.cache
def random_model(**changes):
    """A model of `PARAMS | changes`. Its attention is as decided and its norms as uneven as
    a trained model's, so that a wrong mask, position or scale shows in the logits."""
    skeleton = eqx.filter_eval_shape(
        Transformer, ModelConfig(**PARAMS | changes), key=jax.random.key(0)
    )
    rng = np.random.default_rng(3)

    def weight(path, leaf):
        values = rng.standard_normal(leaf.shape)
        if leaf.ndim == 1:
            values = 1 + 0.2 * values
        elif weight_name(path) != "tok_embeddings.weight":
            scale = 3 if "attention.w" in weight_name(path) else 1.5
            values *= scale / leaf.shape[-1] ** 0.5
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(weight, skeleton)


def small_model(**changes):
    """A new one each time: training gives away the memory of its model."""
    small = {"n_layers": 1, "dim": 16, "hidden_dim": 16}
    return jax.tree.map(jnp.copy, random_model(**small | changes))


# Optax mixes dtypes, which the other tests refuse.
trains = pytest.mark.usefixtures("promote")


def adapted(model, size, *, seed=0, **options):
    """A model with an adapter that adds something: the numbers of `b` are of this size."""
    options = {"rank": 3, "key": jax.random.key(seed)} | options
    rng = np.random.default_rng(1 + seed)

    def trained(path, leaf):
        if path[-1].name != "b":
            return leaf
        return jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(trained, add_lora(model, **options))


def close(found, expected, tolerance=1e-5):
    """Up to a share of the largest of the numbers."""
    expected = np.asarray(expected)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def cast(model, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def random_tokens(n, vocab_size=PARAMS["vocab_size"], seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, n).tolist()
