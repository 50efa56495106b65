"""Models of any shape with random weights, to measure with: no time depends on what the
weights are."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from ..arguments import in_units
from ..config import ModelConfig
from ..files.names import skeleton, weight_shapes
from ..kernels import dtypes, quantized
from ..transformer import Transformer


def random_model(
    config: ModelConfig, *, dtype: DTypeLike | None = None, quantize: str | None = None
) -> Transformer:
    """A model with random weights, made on the device as they will be held.

    **Arguments:**

    - `config`: its shape.
    - `dtype`: of the weights. By default bfloat16, but float32 on a CPU if the model fits
        in half of the memory that way: what [`load_model`][] does with bfloat16 files.
    - `quantize`: `"int8"` or `"int4"`, if the weights are to be quantized.

    **Raises:**

    `ValueError` if they are more than nine tenths of the device's memory.
    """
    numbers = sum(math.prod(shape) for shape in weight_shapes(config).values())
    memory = memory_here()
    if dtype is None:
        dtype = dtypes.weights_dtype(numbers, jnp.bfloat16, memory)
    model = skeleton(config, np.dtype(dtype))
    if quantize is not None:
        model = eqx.filter_eval_shape(quantized.quantize, model, quantize)
    leaves, treedef = jax.tree.flatten(model)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if size > 0.9 * memory:
        raise ValueError(
            f"{numbers / 1e9:.1f} billion weights take {in_units(size)} in "
            f"{quantize or np.dtype(dtype)}, and nine tenths of the device's memory are "
            f"{in_units(0.9 * memory)}. Choose a smaller shape or dtype, or quantize them."
        )
    if quantize is None:
        return Transformer(config, dtype=dtype, key=jr.key(0))
    keys = jr.split(jr.key(0), len(leaves))
    made = [_random(leaf.shape, leaf.dtype, k) for leaf, k in zip(leaves, keys)]
    return treedef.unflatten(made)


@partial(jax.jit, static_argnums=(0, 1))
def _random(shape: tuple[int, ...], dtype: np.dtype, key: PRNGKeyArray) -> Array:
    """Whole numbers of any bits, or small floats."""
    if jnp.issubdtype(dtype, jnp.integer):
        # The same ones again and again: to draw billions would take minutes.
        bits = jnp.resize(jr.bits(key, (2**20,), jnp.uint8), shape)
        return jax.lax.bitcast_convert_type(bits, dtype)
    return jr.uniform(key, shape, dtype, -0.02, 0.02)


def memory_here() -> int:
    """Of the device, in bytes."""
    if jax.default_backend() == "cpu":
        return dtypes.machine_memory()
    return jax.devices()[0].memory_stats()["bytes_limit"]
