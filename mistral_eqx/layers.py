"""The parts that act on each token alone, with Mistral's order of casts."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .kernels.replaced import replaceable


@replaceable(shared=("weight",))
def product(
    x: Float[Array, "*seq in"], weight: Float[Array, "out in"]
) -> Float[Array, "*seq out"]:
    """`x @ weight.T`, summed in float32 whatever the dtypes are. Every product with a
    weight matrix in the model is this function."""
    out = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


@replaceable(shared=("table",))
def lookup(
    tokens: Int[Array, "seq"], table: Float[Array, "vocab dim"]
) -> Float[Array, "seq dim"]:
    """The rows of a table; NaN for a token that it does not have."""
    # Indexing alone would take -1 for the last row.
    rows = table.at[tokens]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class Linear(eqx.Module):
    """A matrix product without bias."""

    weight: Float[Array, "out in"]

    def __init__(self, in_size: int, out_size: int, *, dtype: DTypeLike, key: PRNGKeyArray):
        """**Arguments:**

        - `in_size`, `out_size`: lengths of the input's and the output's last axis.
        - `dtype`: of the weight.
        - `key`: for the normal initialisation, of variance `1 / in_size`.
        """
        scale = 1 / math.sqrt(in_size)
        self.weight = scale * jr.normal(key, (out_size, in_size), dtype)

    def __call__(self, x: Float[Array, "*seq in"]) -> Float[Array, "*seq out"]:
        return product(x, self.weight)


def each_token(
    f: Callable[[Float[Array, "seq in"]], Float[Array, "seq out"]],
    x: Float[Array, "batch seq in"],
) -> Float[Array, "batch seq out"]:
    """What acts on each token alone, on a batch whose rows become one sequence."""
    return f(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Embedding(eqx.Module):
    """A table with one row for each token id."""

    weight: Float[Array, "vocab dim"]

    def __init__(self, vocab_size: int, dim: int, *, dtype: DTypeLike, key: PRNGKeyArray):
        """**Arguments:**

        - `vocab_size`, `dim`: shape of the table.
        - `dtype`: of the table.
        - `key`: for the normal initialisation, of variance 1 / dim.
        """
        self.weight = jr.normal(key, (vocab_size, dim), dtype) / math.sqrt(dim)

    def __call__(self, tokens: Int[Array, "seq"]) -> Float[Array, "seq dim"]:
        return lookup(tokens, self.weight)


class RMSNorm(eqx.Module):
    """Divides by the root mean square, then scales each feature.

    The order of casts is the reference's: normalise in float32, cast to the input's
    dtype, **then** multiply by the weight. In bfloat16 that differs from `eqx.nn.RMSNorm`.
    Zhang & Sennrich (arXiv 1910.07467).
    """

    weight: Float[Array, "dim"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike):
        """**Arguments:**

        - `dim`: length of the last axis.
        - `eps`: added to the mean square.
        - `dtype`: of the weight, which starts as ones.
        """
        self.weight = jnp.ones(dim, dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "seq dim"]) -> Float[Array, "seq dim"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32**2, axis=-1, keepdims=True)
        normalised = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return normalised.astype(x.dtype) * self.weight[None, :]


class FeedForward(eqx.Module):
    """SwiGLU: `w2(silu(w1(x)) * w3(x))`. Shazeer (arXiv 2002.05202)."""

    w1: Linear
    w2: Linear
    w3: Linear

    def __init__(self, dim: int, hidden_dim: int, *, dtype: DTypeLike, key: PRNGKeyArray):
        """**Arguments:**

        - `dim`, `hidden_dim`: widths outside and inside.
        - `dtype`: of the weights.
        - `key`: for their initialisation.
        """
        key1, key2, key3 = jr.split(key, 3)
        self.w1 = Linear(dim, hidden_dim, dtype=dtype, key=key1)
        self.w2 = Linear(hidden_dim, dim, dtype=dtype, key=key2)
        self.w3 = Linear(dim, hidden_dim, dtype=dtype, key=key3)

    def __call__(self, x: Float[Array, "seq dim"]) -> Float[Array, "seq dim"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))
