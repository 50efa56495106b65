"""Mixtral's experts on a TPU: products of groups of rows, each with its expert's weights.

The kernel, megablox, comes with JAX. Rows are brought together by their expert and
multiplied in tiles. The weights of an expert that somebody chose are read once, those of
the others not at all. As in MegaBlocks (Gale et al., arXiv 2211.15841).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ..layers import FeedForward, Linear
from ..moe import mix
from .experts import mix_in_large_blocks
from .replaced import replaces


# A tile has at most ROWS rows, and what is multiplied at a time lies in BYTES of the memory
# on the chip, twice: the next tile is read meanwhile. LANES are those of a register.
ROWS, BYTES, LANES = 128, 7.5e6, 128


@replaces(mix, on="tpu")
def mix_grouped(
    experts: FeedForward,
    x: Float[Array, "batch seq dim"],
    chosen: Int32[Array, "batch seq top_k"],
    weights: Float[Array, "batch seq top_k"],
    interpret: bool = False,
) -> Float[Array, "batch seq dim"]:
    """[`mistral_eqx.moe.mix`][]. `interpret` runs it on a CPU. Gradients are those of
    [`mistral_eqx.kernels.experts.mix_in_large_blocks`][]."""
    if not is_known(experts):
        return mix_in_large_blocks(experts, x, chosen, weights, few=0)
    # Only a TPU needs this import, which takes a while.
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    (n_experts, _, dim), top_k = experts.w1.weight.shape, chosen.shape[-1]
    chosen, weights = chosen.reshape(-1), weights.reshape(-1, 1)
    # Pairs of a token and an absent expert come last, and are in no group.
    is_here = (0 <= chosen) & (chosen < n_experts)
    expert = jnp.where(is_here, chosen, n_experts)
    numbers = jnp.arange(n_experts, dtype=jnp.int32)
    sizes = jnp.sum(expert[:, None] == numbers[None, :], axis=0, dtype=jnp.int32)
    order = jnp.argsort(expert)
    tile = min(ROWS, max(16, 1 << (chosen.size - 1).bit_length()))
    rows = jnp.pad(x.reshape(-1, dim)[order // top_k], [(0, -chosen.size % tile), (0, 0)])

    def product(x, linear):
        tiling = functools.partial(tiles, tile, x.dtype.itemsize)
        how = {"transpose_rhs": True, "interpret": interpret}
        return gmm(x, linear.weight, sizes, x.dtype, tiling, **how)

    inner = jax.nn.silu(product(rows, experts.w1)) * product(rows, experts.w3)
    out = product(inner, experts.w2)[jnp.argsort(order)]
    # Rows in no group are not written.
    out = jnp.where(is_here[:, None], out, 0) * weights
    return jnp.sum(out.reshape(-1, top_k, dim), axis=1).reshape(x.shape)


def is_known(experts: FeedForward) -> bool:
    """Whether the kernel can multiply with these weights: not quantized, without LoRA, and
    of sizes that fill the registers."""
    parts = (experts.w1, experts.w2, experts.w3)
    return all(
        isinstance(part, Linear)
        and part.weight.dtype in (jnp.bfloat16, jnp.float32)
        and all(size % LANES == 0 for size in part.weight.shape[1:])
        for part in parts
    )


def tiles(tile: int, itemsize: int, m: int, k: int, n: int) -> tuple[int, int, int]:
    """How many rows, columns in and columns out are multiplied at a time. With all columns
    in, the weights of an expert stay on the chip for all of its rows."""
    fitting = (
        (tile, k // parts, n_tile)
        for parts in range(1, k // LANES + 1)
        for n_tile in (4 * LANES, 2 * LANES, LANES)
        if k % (parts * LANES) == 0
        and n % n_tile == 0
        and (tile + n_tile) * (k // parts) * itemsize <= BYTES
    )
    return next(fitting)
