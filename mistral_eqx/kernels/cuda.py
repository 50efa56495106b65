"""Attention of whole sequences on an NVIDIA GPU: cuDNN's, which JAX can call.

No scores are written to memory, neither forwards nor in reverse.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import attention
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
    dtype, (_, seq, _, head_dim) = keys.dtype, keys.shape
    # What cuDNN knows on every card.
    knows = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    if not knows and implementation == "cudnn":
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
