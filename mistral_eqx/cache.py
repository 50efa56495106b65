"""The rolling buffer: what attention remembers, in rings of fixed size.

The tokens of a sequence are numbered as they are written: token `index` of a row goes to
slot `index % slots` and stays until token `index + slots` takes its place. Which token a
slot holds follows from how many were written, so nothing is ever shifted and no list of
positions is kept.

The rows of a batch are padded on the **left** to one length. They then share the index,
and one write is one contiguous block for the whole batch. A row with `padding` pads has
its first token at index `padding`, which is its position 0.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree

from .config import ModelConfig


# The padding of a row that gets only pads: more than any length.
_CLOSED = 1 << 30


class LayerCache(eqx.Module):
    """The keys and values that one layer remembers. Slots never written hold zeros."""

    keys: Float[Array, "*batch kv_heads slots head_dim"]
    values: Float[Array, "*batch kv_heads slots head_dim"]

    @property
    def slots(self) -> int:
        return self.keys.shape[-2]

    def write(
        self,
        keys: Float[Array, "seq kv_heads head_dim"],
        values: Float[Array, "seq kv_heads head_dim"],
        length: Int32[Array, ""],
    ) -> "LayerCache":
        """Writes a chunk as tokens `length, length + 1, ...`. It must not straddle the
        ring's end, which the engine's `chunk_sizes` sees to: a block that would is moved
        back by XLA and overwrites slots that are still in use."""

        def write(ring, chunk):
            chunk = jnp.swapaxes(chunk, 0, 1).astype(ring.dtype)
            start = length % self.slots
            return jax.lax.dynamic_update_slice_in_dim(ring, chunk, start, axis=1)

        return LayerCache(write(self.keys, keys), write(self.values, values))

    def indices(self, length: Int32[Array, ""]) -> Int32[Array, "slots"]:
        """The index of the token in every slot once `length` have been written: the last
        one that maps there. Negative where none has."""
        slots = jnp.arange(self.slots, dtype=jnp.int32)
        last = length - 1
        return last - (last - slots) % self.slots


class Cache(eqx.Module):
    """The memory of one row; of a batch, where every array but `length` has a leading
    axis `batch`."""

    layers: tuple[LayerCache, ...]
    length: Int32[Array, ""]
    padding: Int32[Array, "*batch"]

    def __init__(
        self,
        config: ModelConfig,
        padding: Int[Array, "*batch"],
        *,
        chunk: int,
        max_length: int,
        dtype: DTypeLike,
    ):
        """**Arguments:**

        - `config`: of the model that will use it.
        - `padding`: how many pads stand left of each row. Shape `()` for one row, or
            `(batch,)`.
        - `chunk`: the most tokens that are written at once.
        - `max_length`: the most tokens that are written in all, pads included. With a
            window the ring is no longer than it and a chunk, and may be written for ever.
        - `dtype`: of the keys and values.
        """

        def layer(window: int | None) -> LayerCache:
            slots = ring_size(window, chunk=chunk, max_length=max_length)
            shape = (*padding.shape, config.n_kv_heads, slots, config.head_dim)
            # Each its own array: a donated buffer may be given away once only.
            return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        self.layers = tuple(layer(window) for window in config.windows)
        self.length = jnp.zeros((), jnp.int32)
        self.padding = padding.astype(jnp.int32)

    @property
    def slots(self) -> tuple[int, ...]:
        """The size of every layer's ring."""
        return tuple(layer.slots for layer in self.layers)

    def after(self, layers: PyTree[Array], n_tokens: int) -> "Cache":
        """The cache once `n_tokens` more were written into these layers."""
        length = self.length + n_tokens
        return eqx.tree_at(lambda c: (c.layers, c.length), self, (layers, length))

    @property
    def closed(self) -> Bool[Array, "*batch"]:
        """Which rows get only pads, and so cannot be continued."""
        return self.padding == _CLOSED

    def close(self, rows: Bool[Array, "batch"]) -> "Cache":
        """The cache of a batch in which some rows get only pads from now on."""
        padding = jnp.where(rows, _CLOSED, self.padding)
        return eqx.tree_at(lambda cache: cache.padding, self, padding)

    @property
    def axes(self) -> "Cache":
        """The axis of the batch in every array, as `jax.vmap` takes it. The rows share
        their `length`, so that a write stays one block and does not become a scatter."""
        axes = jax.tree.map(lambda _: 0, self)
        return eqx.tree_at(lambda cache: cache.length, axes, None)


def ring_size(window: int | None, *, chunk: int, max_length: int) -> int:
    """The number of slots of a layer with such a window.

    A chunk is written before it is attended. So that its first token still finds the
    `window - 1` before it, the ring has room for these and the chunk; it is a multiple of
    the chunk, so that chunks end where the ring does.
    """
    length = max_length if window is None else min(max_length, window - 1 + chunk)
    return -(-length // chunk) * chunk
