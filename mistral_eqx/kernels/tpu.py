"""Attention of whole sequences on a TPU: the splash attention kernel that comes with JAX.

No scores are written to memory, neither forwards nor in reverse, and blocks that nobody
sees are skipped.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import attention
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
