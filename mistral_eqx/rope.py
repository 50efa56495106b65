"""Rotary position embeddings: a position turns each pair of features by an angle."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from .config import Llama4Scaling, ModelConfig, Yarn
from .kernels.replaced import replaceable


class Places(eqx.Module):
    """Where the tokens of a chunk stand in their row.

    **Attributes:**

    - `positions`: of the tokens; negative for pads.
    - `cos`, `sin`: of every position's angles, as [`rotation`][] returns them.
    - `length`: how many tokens of the row, pads included, came before the chunk.
    - `segments`: the number of the text that each token belongs to, if the row is several
        texts that do not see one another.
    """

    positions: Int32[Array, "*batch seq"]
    cos: Float32[Array, "*batch seq half"]
    sin: Float32[Array, "*batch seq half"]
    length: Int32[Array, "*batch"]
    segments: Int[Array, "*batch seq"] | None

    def __init__(
        self,
        config: ModelConfig,
        positions: Int[Array, "seq"],
        length: Int[Array, ""] | None = None,
        segments: Int[Array, "seq"] | None = None,
    ):
        """**Arguments:**

        - `config`: of the model.
        - `positions`: of the tokens.
        - `length`: how many tokens came before; by default none.
        - `segments`: which text each token belongs to; by default all to one.
        """
        self.positions = positions.astype(jnp.int32)
        self.cos, self.sin = rotation(
            positions, config.head_dim, config.rope_theta, config.yarn
        )
        self.length = jnp.zeros((), jnp.int32) if length is None else length
        self.segments = segments


def rotation(
    positions: Int[Array, "seq"], head_dim: int, theta: float, yarn: Yarn | None = None
) -> tuple[Float32[Array, "seq half"], Float32[Array, "seq half"]]:
    """The cosine and sine of every position's angles.

    Pair `i` of a head turns by `position * theta ** (-2i / head_dim)` radians: the first
    pair by a radian a token, the last hardly at all. Always float32: in bfloat16 the
    angles of neighbours past position 256 would be the same.

    Follows `precompute_freqs_cis` of the reference; RoFormer (arXiv 2104.09864), §3.2.
    """
    # Computed by NumPy and rounded once, the powers are nearly always torch's, bit for bit.
    # XLA's differ in the last bits, which changes a cosine at position 32,767 by 6e-4.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = 1 / powers
    if yarn is not None:
        frequencies = _stretched(frequencies, head_dim, theta, yarn)
    cos, sin = turn(positions, jnp.asarray(frequencies))
    if yarn is not None and yarn.scale != 1:
        cos, sin = yarn.scale * cos, yarn.scale * sin
    return cos, sin


@replaceable(shared=("frequencies",))
def turn(
    positions: Int[Array, "seq"], frequencies: Float32[Array, "half"]
) -> tuple[Float32[Array, "seq half"], Float32[Array, "seq half"]]:
    """The cosine and sine of every position times every frequency."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _stretched(
    frequencies: Float32[np.ndarray, "half"], head_dim: int, theta: float, yarn: Yarn
) -> Float32[np.ndarray, "half"]:
    """The frequencies of YaRN (arXiv 2309.00071, §3.2). The first pairs turn many times
    within the original context and keep their frequencies. The last pairs have not turned
    once there, and are slowed down by the factor. Between them is a ramp."""

    def pair_that_turns(times: float) -> float:
        wavelength = yarn.original_max_position_embeddings / times
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta)), 0)
    last = min(math.ceil(pair_that_turns(yarn.alpha)), head_dim - 1)
    last = last if last != first else first + 0.001
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    slowed = np.clip((pairs - first) / (last - first), 0, 1)
    return frequencies * (1 - slowed) + frequencies / yarn.factor * slowed


def query_scale(
    positions: Int[Array, "seq"], scaling: Llama4Scaling
) -> Float32[Array, "seq"]:
    """What Llama 4 multiplies the query at each position by: 1 within the original context,
    then slowly more."""
    # Pads have negative positions. The logarithm would be of zero.
    contexts = jnp.maximum(positions, 0) // scaling.original_max_position_embeddings
    return 1 + scaling.beta * jnp.log1p(contexts.astype(jnp.float32))


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
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
