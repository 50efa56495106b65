"""Small random models, made once for all tests."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_eqx import ModelConfig, Transformer
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


def cast(model, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def random_tokens(n, vocab_size=PARAMS["vocab_size"], seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, n).tolist()
