"""Rotary position embeddings: a position turns each pair of features by an angle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def rotation(
    positions: Int[Array, "seq"], head_dim: int, theta: float
) -> tuple[Float32[Array, "seq half"], Float32[Array, "seq half"]]:
    """The cosine and sine of every position's angles.

    Pair `i` of a head turns by `position * theta ** (-2i / head_dim)` radians: the first
    pair by a radian a token, the last hardly at all. Always float32: in bfloat16 the
    angles of neighbours past position 256 would be the same.

    Follows `precompute_freqs_cis` of the reference; RoFormer (arXiv 2104.09864), §3.2.
    """
    # Before compilation: folded by the compiler, the powers differ from torch's in their
    # last bits, which are 6e-4 of a cosine at position 32,767.
    with jax.ensure_compile_time_eval():
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / (theta**exponents)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "seq heads head_dim"],
    cos: Float32[Array, "seq half"],
    sin: Float32[Array, "seq half"],
) -> Float[Array, "seq heads head_dim"]:
    """Turns the interleaved pairs `(x[2i], x[2i + 1])` of every head.

    Mistral's own files hold wq and wk for this layout. Hugging Face's hold their rows
    permuted, for the pairs `(x[i], x[i + head_dim / 2])`.

    Follows `apply_rotary_emb` of the reference: computed in float32, cast back.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.stack(
        [real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1
    )
    return turned.reshape(x.shape).astype(x.dtype)
