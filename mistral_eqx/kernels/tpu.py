"""Attention on a TPU, of whole sequences and of a prompt's chunks to their ring: the splash
attention kernel that comes with JAX.

No scores are written to memory, neither forwards nor in reverse, and blocks that nobody
sees are skipped.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from .. import attention
from . import rings
from .replaced import replaces


# The kernel works on blocks of this many queries and keys, or on fewer if a sequence is
# shorter. It needs whole multiples of the 128 lanes of a TPU's registers.
BLOCK, LANES = 512, 128


@replaces(attention.attend_sequence, on="tpu", derived=True)
def attend_sequence(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    band: attention.Band,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_sequence`][]. `interpret` runs it on a CPU."""
    # Only a TPU needs this import, which takes a while.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, seq, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    if head_dim % LANES != 0:
        return attention.attend_sequence.batched(queries, keys, values, band)
    block = min(BLOCK, -(-seq // LANES) * LANES)
    padded = -(-seq // block) * block
    # Pads come last, where no token sees them.
    pad = lambda x: jnp.pad(x, [(0, 0), (0, padded - seq), (0, 0), (0, 0)])
    # The kernel does not scale.
    queries = (queries * head_dim**-0.5).astype(queries.dtype)
    queries = pad(queries).reshape(batch, padded, kv_heads, heads // kv_heads, head_dim)
    segments = band.segments
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, padded - seq)], constant_values=-1)
        segments = splash.SegmentIds(segments, segments)
    # The kernel's window is of the tokens on the left, without the query's own, and on the
    # right: none, or it would see the future.
    left = None if band.window is None else band.window - 1
    mask = splash.LocalMask((padded, padded), (left, 0), 0)
    kernel = splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * (heads // kv_heads)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )

    def row(queries, keys, values, segments):
        head = lambda *arrays: kernel(*arrays, segment_ids=segments)
        return jax.vmap(head)(queries, keys, values)

    out = jax.vmap(row)(
        queries.transpose(0, 2, 3, 1, 4),
        pad(keys).transpose(0, 2, 1, 3),
        pad(values).transpose(0, 2, 1, 3),
        segments,
    )
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, head_dim)
    return out[:, :seq].astype(values.dtype)


@replaces(attention.attend_ring, on="tpu")
def attend_ring(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    view: attention.RingView,
    length: Int32[Array, ""],
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_ring`][]. `interpret` runs it on a CPU.

    The kernel finds out by itself which slots a query sees, from the slot of the query: a
    mask of 2,048 tokens and 32,768 slots would need 268 MB. Pads and empty slots are what
    it calls another segment."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask_info,
    )

    (_, seq, _, head_dim), slots = queries.shape, keys.shape[2]
    fitting = lambda size: next((n for n in (BLOCK, 256, LANES) if size % n == 0), None)
    rows, block = fitting(seq), fitting(slots)
    if rows is None or block is None or head_dim % LANES != 0:
        return rings.attend_blocks(queries, keys, values, view, length)
    sees = _sees(seq, slots, view.window)
    own = (length - seq) % slots + jnp.arange(seq, dtype=jnp.int32)
    seen = sees(own[:, None], jnp.arange(slots, dtype=jnp.int32)[None])
    seen = seen.reshape(seq // rows, rows, slots // block, block).any(axis=(1, 3))
    first = jnp.arange(0, slots, block, dtype=jnp.int32)
    seen &= (first < length)[None]
    kernel = splash_attention_kernel.SplashAttentionKernel(
        splash_attention_mask_info.MaskInfo(
            data_next=_next(seen)[None],
            mask_next=None,
            block_mask=seen.astype(jnp.int32)[None],
            partial_mask_blocks=None,
            q_sequence=own,
        ),
        None,
        None,
        is_mqa=False,
        block_sizes=splash.BlockSizes(block_q=rows, block_kv=block),
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=sees,
        interpret=interpret,
    )

    def row(queries, keys, values, held):
        real = splash.SegmentIds(jnp.ones(seq, jnp.int32), (held >= 0).astype(jnp.int32))
        return kernel(queries, keys, values, segment_ids=real)

    # The kernel does not scale.
    scaled = (queries * head_dim**-0.5).astype(keys.dtype).transpose(0, 2, 1, 3)
    out = jax.vmap(row)(scaled, keys, values, view.held)
    return out.transpose(0, 2, 1, 3).astype(queries.dtype)


@functools.cache  # the kernel is traced once for all layers that see as far
def _sees(seq: int, slots: int, window: int | None) -> Callable[..., Bool[Array, "..."]]:
    """Whether a token of a chunk of `seq`, by its slot, sees the token in a slot, if there
    is one."""
    # A ring with room for a window and a chunk goes round. Others have room for everything.
    goes_round = window is not None and slots >= window - 1 + seq

    def sees(own: Int32[Array, "..."], slot: Int32[Array, "..."]) -> Bool[Array, "..."]:
        back = own - slot
        if goes_round:
            return jnp.where(back < 0, back + slots, back) < window
        return back >= 0 if window is None else (back >= 0) & (back < window)

    return sees


def _next(seen: Bool[Array, "rows blocks"]) -> Int32[Array, "rows blocks"]:
    """For each step the next block that is seen, so that no other is fetched; behind the
    last one that is seen, that one."""
    n = seen.shape[1]
    blocks = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), seen.shape)
    coming = jax.lax.cummin(jnp.where(seen, blocks, n), axis=1, reverse=True)
    return jnp.minimum(coming, jnp.max(jnp.where(seen, blocks, 0), axis=1, keepdims=True))
