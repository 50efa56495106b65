"""Attention on an NVIDIA GPU, of whole sequences and of a prompt's chunks to their ring:
cuDNN's, which JAX can call.

No scores are written to memory, neither forwards nor in reverse.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import attention
from . import rings
from .replaced import replaces


@replaces(attention.attend_sequence, on="cuda", derived=True)
def attend_sequence(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    band: attention.Band,
    implementation: str = "cudnn",
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_sequence`][]. The `implementation` `"xla"` runs
    everywhere."""
    dtype, seq = keys.dtype, keys.shape[1]
    if not is_known(keys, implementation):
        return attention.attend_sequence.batched(queries, keys, values, band)
    # Pads come last, where no token sees them. With a mask, cuDNN needs an even number.
    pad = lambda x: jnp.pad(x, [(0, 0), (0, seq % 2), *((0, 0) for _ in x.shape[2:])])
    queries, keys, values = pad(queries.astype(dtype)), pad(keys), pad(values)
    mask = None
    if band.segments is not None:
        segments = pad(band.segments)
        mask = segments[:, None, :, None] == segments[:, None, None, :]
    # The window is of the tokens on the left, without the query's own. Without `is_causal`
    # the right side would be open, whatever the window says.
    window = None if band.window is None else (band.window - 1, 0)
    out = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        mask=mask,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )
    return out[:, :seq]


@replaces(attention.attend_ring, on="cuda")
def attend_ring(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    view: attention.RingView,
    length: Int32[Array, ""],
    implementation: str = "cudnn",
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_ring`][]. The `implementation` `"xla"` runs
    everywhere.

    cuDNN wants the heads of a token side by side, but in a ring the tokens of a head are.
    So each kv head goes in as a row of its own with one head, and no ring is turned around.
    """
    (batch, seq, heads, head_dim), (_, kv_heads, slots, _) = queries.shape, keys.shape
    if seq == 1 or not is_known(keys, implementation):
        return rings.attend_blocks(queries, keys, values, view, length)
    # Slots that are not written yet are not read.
    lengths = jnp.full(kv_heads, jnp.minimum(length, slots))

    # One row of the batch at a time: its kv heads share a mask. For several rows, cuDNN
    # would need one mask for each kv head of each row. What comes out takes the place of
    # the queries: for arrays of zeros to write to, XLA would find room for all layers'.
    def attend_row(i, out):
        take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        queries, keys_i, values_i, view_i = jax.tree.map(take, (out, keys, values, view))
        queries = queries.reshape(seq, kv_heads, -1, head_dim).swapaxes(0, 1)
        row = jax.nn.dot_product_attention(
            queries,
            keys_i[:, :, None],
            values_i[:, :, None],
            mask=view_i.mask[None, None],
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )
        row = row.swapaxes(0, 1).reshape(seq, heads, head_dim)
        return jax.lax.dynamic_update_index_in_dim(out, row, i, 0)

    out = jax.lax.fori_loop(0, batch, attend_row, queries.astype(keys.dtype))
    return out.astype(queries.dtype)


def is_known(keys: Float[Array, "..."], implementation: str) -> bool:
    """Whether the implementation knows such keys; cuDNN's, on every card."""
    head_dim, narrow = keys.shape[-1], keys.dtype in (jnp.bfloat16, jnp.float16)
    return implementation != "cudnn" or narrow and head_dim % 8 == 0 and head_dim <= 128
