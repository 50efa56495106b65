"""Which dtype is best where nobody asks for one."""

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def cache_dtype(weight: Float[Array, "..."]) -> DTypeLike:
    """The dtype for the keys and values of a model with such weights: float32 on a CPU,
    where XLA converts a whole bfloat16 array, there and back, to write a part of it."""
    on_cpu = all(device.platform == "cpu" for device in weight.devices())
    return jnp.float32 if on_cpu else weight.dtype


def weights_dtype(n_weights: int, stored: DTypeLike, memory: int) -> DTypeLike:
    """The dtype for weights that are `stored` in theirs, if nobody asks for another: on a
    CPU float32, which is exact, if they then take half of the `memory` in bytes at most."""
    fits = jax.default_backend() == "cpu" and 4 * n_weights <= memory / 2
    return jnp.float32 if fits else stored


def machine_memory() -> int:
    """In bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
