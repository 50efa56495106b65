"""Attention to a ring in blocks of slots, for accelerators and for meshes of others.

Slots that are not written yet are not read, and scores exist for one block at a time: a
chunk of a prompt needs no more memory for a long ring than for a short one. The softmax is
that of Milakov and Gimelshein (arXiv 1805.02867), as in FlashAttention (arXiv 2205.14135).
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int32

from .. import attention
from .replaced import replaces


# How many slots are read at a time: so many that there are at most SCORES scores. Rings
# that are not longer are read at once.
BLOCKS = (2048, 1024, 512, 256)
SCORES = 2**24


@replaces(attention.attend_ring, on="any")
def attend_blocks(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    view: attention.RingView,
    length: Int32[Array, ""],
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_ring`][]."""
    batch, seq, heads, head_dim = queries.shape
    _, kv_heads, slots, _ = keys.shape
    fitting = (size for size in BLOCKS if batch * heads * seq * size <= SCORES)
    block = next(fitting, BLOCKS[-1])
    mask = view.mask
    if slots <= block or slots % block != 0:
        return jax.vmap(attention.attend)(queries, keys, values, mask)
    # Without this the compiler turns the rings of a batch around before it decodes a block
    # of tokens, and back after it, and needs memory for a second cache.
    as_they_lie = lambda ring: with_layout_constraint(ring, Layout((0, 1, 2, 3)))
    keys, values = as_they_lie(keys), as_they_lie(values)
    groups, lowest = heads // kv_heads, jnp.finfo(jnp.float32).min
    rows = queries.reshape(batch, seq, kv_heads, groups, head_dim).astype(keys.dtype)

    def add(i, sums):
        top, total, out = sums
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=2)
        seen = cut(mask)[:, None, None]
        scores = jnp.einsum(
            "btkgd,bksd->bkgts", rows, cut(keys), preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, scores * head_dim**-0.5, lowest)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        # This rescales what was summed under another maximum. The sums of a query that has
        # seen no key yet mean nothing, and its first key makes them 0.
        kept = jnp.exp(top - new_top)
        more = jnp.einsum(
            "bkgts,bksd->bkgtd",
            weights.astype(values.dtype),
            cut(values),
            preferred_element_type=jnp.float32,
        )
        total = kept * total + jnp.sum(weights, axis=-1)
        return new_top, total, kept[..., None] * out + more

    shape = (batch, kv_heads, groups, seq)
    sums = jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, head_dim))
    n_blocks = (jnp.minimum(length, slots) + block - 1) // block
    _, total, out = jax.lax.fori_loop(0, n_blocks, add, sums)
    out = (out / total[..., None]).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, seq, heads, head_dim).astype(queries.dtype)
