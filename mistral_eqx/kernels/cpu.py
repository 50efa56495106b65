"""What is done otherwise on a CPU, where XLA has to be led to its fast loops.

A product of few rows with a weight matrix should take the time to read the matrix once.
Each way below is the fastest found for its case, 1.5 to 20 times as fast as a plain one.
"""

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32

from .batching import batched_as


# XLA multiplies a vector by a matrix in one loop, with nothing written on the way, only if
# the vector has less than 16 KiB. Else it transposes, or converts, the matrix as a whole.
LONGEST_VECTOR = 4095


def project(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float32[Array, "rows out"]:
    """`x @ weight.T`, multiplied as the dtypes say and summed in float32."""
    rows = x.shape[0]
    # Seen to depend on `x`, the weight is not converted ahead of a loop of steps, which
    # would keep a second copy of the model.
    x, weight = jax.lax.optimization_barrier((x, weight))
    is_float32, width = weight.dtype == jnp.float32, weight.shape[1]
    if is_float32 and rows == 1 and width > LONGEST_VECTOR:
        return (weight @ x[0])[None, :]
    # Each row costs the loop as much again, and all should stay in the nearest cache.
    few = rows < 8 and x.size <= LONGEST_VECTOR if is_float32 else rows < 4
    if few:
        return product_of_few_rows(x, weight)
    if is_float32 and rows <= 64 and weight.shape[0] % 2 == 0:
        # The matrix on the left. In halves, or XLA would put it on the right again.
        halves = weight.reshape(2, -1, width)
        out = jnp.einsum("noi,ri->nor", halves, x, preferred_element_type=jnp.float32)
        return out.transpose(2, 0, 1).reshape(rows, -1)
    return jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)


def product_of_few_rows(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float32[Array, "rows out"]:
    """The same in one loop, which converts the matrix as it reads it."""
    rows, width = x.shape
    x = computed_once(x)
    if rows == 1 and width <= LONGEST_VECTOR:
        return one(x) * (x.astype(jnp.float32) @ weight.astype(jnp.float32).T)
    part = next(n for n in range(min(width, LONGEST_VECTOR), 0, -1) if width % n == 0)
    parts = weight.reshape(-1, 1, width // part, part)
    return sum_of_products(x.reshape(1, rows, -1, part), parts).sum(2).T


def _score_of_batch(size, batched, queries, keys):
    whole = [
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip((queries, keys), batched)
    ]
    return score(*whole), True


def _plain_score(queries, keys):
    return jnp.einsum(
        "...rd,...sd->...rs", queries, keys, preferred_element_type=jnp.float32
    )


@batched_as(_score_of_batch, derivative=_plain_score)
def score(
    queries: Float[Array, "*heads rows head_dim"],
    keys: Float[Array, "*heads slots head_dim"],
) -> Float32[Array, "*heads rows slots"]:
    """The product of each query with each key of its head, for few queries."""
    return sum_of_products(computed_once(queries)[..., :, None, :], keys[..., None, :, :])


def sum_of_products(
    x: Float[Array, "*#shape n"], y: Float[Array, "*#shape n"]
) -> Float32[Array, "*shape"]:
    """`jnp.sum(x * y, axis=-1)` in one loop, with nothing written on the way.

    XLA has such a loop for a vector times a matrix, and it takes up what the matrix is
    computed from. So the matrix is of the products, and the vector of ones."""
    products = x.astype(jnp.float32) * y.astype(jnp.float32)
    n, factor = products.shape[-1], one(x)
    sums = jnp.broadcast_to(factor, (1, n)) @ products.reshape(-1, n).T
    return (factor * sums).reshape(products.shape[:-1])


def one(x: Float[Array, "..."]) -> Float32[Array, ""]:
    """A one that XLA cannot know to be one. A product is multiplied by it before it is
    added to anything: else XLA would leave its fast loop for one that adds, too."""
    return 1 + 0 * jnp.nan_to_num(x[(0,) * x.ndim].astype(jnp.float32))


def computed_once(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, written to memory. XLA would rather compute an element again for every use: the
    cosine of a position for every head of every layer. A quotient it does write, and zeros
    that it cannot know to be make one of anything."""
    return x / (1 + 0 * x)


def attend(
    function: Callable,
    queries: Float[Array, "seq heads head_dim"],
    keys: Float[Array, "kv_heads slots head_dim"],
    values: Float[Array, "kv_heads slots head_dim"],
    mask: Bool[Array, "seq slots"],
    written: Int32[Array, ""],
) -> Float[Array, "seq heads head_dim"]:
    """Calls `function(queries, keys, values, mask)` with the first slots only, if no more
    are written: half of them, or half of that, and so on. The branches have another use:
    without one, XLA copies the ring at every write.

    A chunk attends in its own dtype, which may be narrower than the cache's: its many rows
    are multiplied faster so, and converting the ring takes little beside that."""
    seq, _, head_dim = queries.shape
    slots = keys.shape[1]
    on_one_device = jax.typeof(keys).sharding.mesh.empty
    # With shorter heads, the sums of a loop take longer than the loop saves.
    if seq == 1 and head_dim >= 64 and on_one_device:
        function = partial(function, score=score)
    dtype = keys.dtype if seq == 1 else queries.dtype
    sizes = [slots]
    while sizes[-1] >= 128:
        sizes.append(sizes[-1] // 2)

    def branch(n):
        first = lambda ring: ring[:, :n].astype(dtype)
        return lambda q, k, v, m: function(q, first(k), first(v), m[:, :n])

    fits = [written <= size for size in sizes[1:]]
    index = sum(fit.astype(jnp.int32) for fit in fits) if fits else jnp.int32(0)
    branches = [branch(n) for n in sizes]
    return jax.lax.switch(index, branches, queries, keys, values, mask)


def cache_dtype(weight: Float[Array, "..."]) -> DTypeLike:
    """The dtype for the keys and values of a model with such weights: float32 on a CPU. XLA
    converts a bfloat16 array as a whole, there and back, to write to a part of it."""
    on_cpu = all(device.platform == "cpu" for device in weight.devices())
    return jnp.float32 if on_cpu else weight.dtype


def weights_dtype(n_weights: int, stored: DTypeLike, memory: int) -> DTypeLike:
    """The dtype for weights that are `stored` in theirs, if nobody asks for another: on a
    CPU float32, which is exact, if they then take half of the `memory` in bytes at most."""
    fits = jax.default_backend() == "cpu" and 4 * n_weights <= memory / 2
    return jnp.float32 if fits else stored


def machine_memory() -> int:
    """In bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
