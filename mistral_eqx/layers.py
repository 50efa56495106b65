"""The parts that act on each token alone, with Mistral's order of casts."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from .kernels import cpu
from .kernels.batching import batched_as


def product(
    x: Float[Array, "*seq in"], weight: Float[Array, "out in"]
) -> Float32[Array, "*seq out"]:
    """The plain product with a weight matrix, in float32 sums whatever the weights are."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)


def _product_of_batch(size, batched, x, weight):
    if batched == [True, False]:
        return _project(x, weight), True
    axes = tuple(0 if is_batched else None for is_batched in batched)
    return jax.vmap(product, axes)(x, weight), True


@batched_as(_product_of_batch, derivative=product)
def _project(x, weight):
    if not jax.typeof(weight).sharding.mesh.empty:
        # On many devices, whose parts the ways of a CPU would cut across.
        return product(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.platform_dependent(rows, weight, cpu=cpu.project, default=product)
    return out.reshape(*x.shape[:-1], -1)


def project(
    x: Float[Array, "*seq in"], weight: Float[Array, "out in"]
) -> Float[Array, "*seq out"]:
    """The product with a weight matrix: the one place where one is multiplied by. Under
    `jax.vmap` the rows of the whole batch go through it together."""
    return _project(x, weight).astype(x.dtype)


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
        return project(x, self.weight)


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
        # Seen to depend on `tokens`, the table is not converted ahead of a loop of steps.
        tokens, weight = jax.lax.optimization_barrier((tokens, self.weight))
        # Indexing would take -1 for the last row: NaN says that it is no token.
        rows = weight.at[tokens]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


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
