"""Programs for a CPU, written so that XLA compiles them to its fast loops.

A product of few rows with a weight matrix should take no longer than reading the matrix
once. Each program below was the fastest of those tried for its case, 1.5 to 20 times as
fast as the plain one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from .. import attention, layers, rope
from .replaced import replaces


# XLA multiplies a vector by a matrix in one loop only if the vector has less than 16 KiB.
# Otherwise it first writes a transposed or converted copy of the whole matrix.
LONGEST_VECTOR = 4095


def project(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float32[Array, "rows out"]:
    """`x @ weight.T`, multiplied as the dtypes say and summed in float32."""
    rows = x.shape[0]
    # The barrier makes the weight depend on `x`. Otherwise XLA converts all weights before
    # the loop of decode steps, and keeps that second copy of the model.
    x, weight = jax.lax.optimization_barrier((x, weight))
    is_float32, width = weight.dtype == jnp.float32, weight.shape[1]
    if is_float32 and rows == 1 and width > LONGEST_VECTOR:
        return (weight @ x[0])[None, :]
    # The loop takes as long again for each row, and all rows should fit in the L1 cache.
    few = rows < 8 and x.size <= LONGEST_VECTOR if is_float32 else rows < 4
    if few:
        return product_of_few_rows(x, weight)
    if is_float32 and rows <= 64 and weight.shape[0] % 2 == 0:
        # With the matrix on the left this is faster. XLA would put it on the right again if
        # it were not in halves.
        halves = weight.reshape(2, -1, width)
        out = jnp.einsum("noi,ri->nor", halves, x, preferred_element_type=jnp.float32)
        return out.transpose(2, 0, 1).reshape(rows, -1)
    return jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)


def product_of_few_rows(
    x: Float[Array, "rows in"], weight: Float[Array, "out in"]
) -> Float32[Array, "rows out"]:
    """As `project`, in one loop that converts the matrix while it reads it."""
    n = n_pieces(x.shape[1])
    return product_of_pieces(*(array.reshape(len(array), n, -1) for array in (x, weight)))


def n_pieces(width: int, multiple: int = 1) -> int:
    """In how many pieces a row has to be cut for the fast loop. The length of a piece is a
    multiple of `multiple`."""
    numbers = range(-(-width // LONGEST_VECTOR), width + 1)
    return next(n for n in numbers if width % (n * multiple) == 0)


def product_of_pieces(
    x: Float[Array, "rows pieces part"], weight: Float[Array, "out pieces part"]
) -> Float32[Array, "rows out"]:
    """As `product_of_few_rows`, of what is in pieces. All pieces of a row of the weight are
    read before the next row. A loop over all rows for each piece would jump in memory."""
    if x.shape[:2] == (1, 1):
        x = computed_once(x[:, 0].astype(jnp.float32))
        return one(x) * (x @ weight[:, 0].astype(jnp.float32).T)
    # Here `x` keeps its dtype, so that less of it has to be in the L1 cache.
    x = computed_once(x)
    return sum_of_products(x[None], weight[:, None]).sum(2).T


@replaces(layers.product, on="cpu")
def product(
    x: Float[Array, "batch *seq in"], weight: Float[Array, "out in"]
) -> Float[Array, "batch *seq out"]:
    """[`mistral_eqx.layers.product`][]."""
    out = project(x.reshape(-1, x.shape[-1]), weight)
    return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


@replaces(layers.lookup, on="cpu")
def lookup(
    tokens: Int[Array, "batch seq"], table: Float[Array, "vocab dim"]
) -> Float[Array, "batch seq dim"]:
    """[`mistral_eqx.layers.lookup`][]. The barrier makes the table depend on the tokens.
    Otherwise XLA converts the whole table before the loop of decode steps."""
    tokens, table = jax.lax.optimization_barrier((tokens, table))
    return layers.lookup.batched(tokens, table)


@replaces(rope.turn, on="cpu")
def turn(
    positions: Int[Array, "batch seq"], frequencies: Float32[Array, "half"]
) -> tuple[Float32[Array, "batch seq half"], Float32[Array, "batch seq half"]]:
    """[`mistral_eqx.rope.turn`][], written to memory. Otherwise XLA computes the cosine of
    a position again for every head of every layer."""
    cos, sin = rope.turn.batched(positions, frequencies)
    return computed_once(cos), computed_once(sin)


@replaces(attention.score, on="cpu")
def score(
    queries: Float[Array, "batch kv_heads rows head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
) -> Float32[Array, "batch kv_heads rows slots"]:
    """[`mistral_eqx.attention.score`][]: for one token of each row by `sum_of_products`."""
    # With shorter heads the loop is slower than the plain product.
    if queries.shape[2] > 16 or queries.shape[3] < 64:
        return attention.score.batched(queries, keys)
    return sum_of_products(computed_once(queries)[..., :, None, :], keys[..., None, :, :])


@replaces(attention.attend_ring, on="cpu")
def attend_ring(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    view: attention.RingView,
    length: Int32[Array, ""],
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_ring`][], on the smallest half, quarter, ... of the
    ring that holds all written slots. The `switch` also keeps XLA from copying the whole
    ring at each update.

    A chunk attends in its own dtype, even if the cache's is wider: products of many rows
    are faster in the narrower dtype, and converting the ring is cheap beside them."""
    mask, slots = view.mask, keys.shape[2]
    dtype = keys.dtype if queries.shape[1] == 1 else queries.dtype
    sizes = [slots]
    while sizes[-1] >= 128:
        sizes.append(sizes[-1] // 2)

    def branch(n):
        first = lambda ring: ring[:, :, :n].astype(dtype)
        return lambda q, k, v, m: jax.vmap(attention.attend)(
            q, first(k), first(v), m[:, :, :n]
        )

    index = sum(((length <= size).astype(jnp.int32) for size in sizes[1:]), jnp.int32(0))
    return jax.lax.switch(index, [branch(n) for n in sizes], queries, keys, values, mask)


def sum_of_products(
    x: Float[Array, "*#shape n"], y: Float[Array, "*#shape n"]
) -> Float32[Array, "*shape"]:
    """`jnp.sum(x * y, axis=-1)` in one loop that writes no intermediate array.

    XLA has such a loop for a vector times a matrix, and fuses into it how the matrix is
    computed. So this is a vector of ones times the matrix `x * y`."""
    products = x.astype(jnp.float32) * y.astype(jnp.float32)
    n, factor = products.shape[-1], one(x)
    sums = jnp.broadcast_to(factor, (1, n)) @ products.reshape(-1, n).T
    return (factor * sums).reshape(products.shape[:-1])


def one(x: Float[Array, "..."]) -> Float32[Array, ""]:
    """A 1 that XLA cannot simplify away. A product times this 1 stays in its fast loop.
    Without it, XLA fuses a following addition into the product and leaves that loop."""
    return 1 + 0 * jnp.nan_to_num(x[(0,) * x.ndim].astype(jnp.float32))


def computed_once(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, written to memory. XLA recomputes cheap values inside every loop that uses them,
    but it materialises a division. So this divides by a 1 that XLA cannot simplify away."""
    return x / (1 + 0 * x)
