"""Grouped-query attention under a sliding window."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PRNGKeyArray

from .cache import LayerCache
from .config import Llama4Scaling, ModelConfig
from .kernels.replaced import replaceable
from .layers import Linear
from .rope import Places, query_scale, rotate


class Band(eqx.Module):
    """Which tokens of a sequence see which: each sees itself and what came before it, in
    its own text and within the window.

    **Attributes:**

    - `segments`: the number of each token's text, if there are several in a row.
    - `window`: how many tokens one sees, itself included; `None` for all before it.
    """

    segments: Int[Array, "*batch seq"] | None
    window: int | None = eqx.field(static=True)


def visible(
    query_positions: Int32[Array, "*batch seq"],
    key_positions: Int32[Array, "*batch slots"],
    window: int | None,
) -> Bool[Array, "*batch seq slots"]:
    """Which keys each query may see: itself and the `window - 1` tokens before it.

    Positions below zero are pads and empty slots, which nobody sees. That is `window`
    keys in all, as in Mistral's production code; the mask of its one-file reference lets
    one more through (Mistral 7B, arXiv 2310.06825, §2).
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = (distance >= 0) & (key_positions[..., None, :] >= 0)
    return seen if window is None else seen & (distance < window)


class RingView(eqx.Module):
    """What a chunk sees of a ring: the positions of its tokens, the positions of what the
    slots hold (below zero where that is nothing), and the window, as in [`Band`][]."""

    positions: Int32[Array, "*batch seq"]
    held: Int32[Array, "*batch slots"]
    window: int | None = eqx.field(static=True)

    @property
    def mask(self) -> Bool[Array, "*batch seq slots"]:
        return visible(self.positions, self.held, self.window)


@replaceable()
def score(
    queries: Float[Array, "kv_heads rows head_dim"],
    keys: Float[Array, "kv_heads slots head_dim"],
) -> Float32[Array, "kv_heads rows slots"]:
    """The product of each query with each key of its head."""
    return jnp.einsum("krd,ksd->krs", queries, keys, preferred_element_type=jnp.float32)


def attend(
    queries: Float[Array, "seq heads head_dim"],
    keys: Float[Array, "kv_heads slots head_dim"],
    values: Float[Array, "kv_heads slots head_dim"],
    mask: Bool[Array, "seq slots"],
) -> Float[Array, "seq heads head_dim"]:
    """Softmax attention, the `groups` of query heads that share a kv head together.

    Scores and softmax are float32, the probabilities are cast back to the values' dtype,
    as in the reference. Grouped-query attention: Ainslie et al. (arXiv 2305.13245).
    """
    seq, heads, head_dim = queries.shape
    kv_heads, slots, _ = keys.shape
    groups = heads // kv_heads
    # The queries of a group become the rows of one matrix. XLA runs two batched matrix
    # products faster than an einsum over five axes.
    rows = queries.reshape(seq, kv_heads, groups, head_dim).transpose(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, groups * seq, head_dim).astype(keys.dtype)
    scores = score(rows, keys).reshape(kv_heads, groups, seq, slots) * head_dim**-0.5
    # The value is finite because a pad sees no key: the softmax of only -inf is NaN.
    scores = jnp.where(mask[None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(kv_heads, groups * seq, slots)
    out = jnp.einsum("krs,ksd->krd", weights, values, preferred_element_type=jnp.float32)
    out = out.reshape(kv_heads, groups, seq, head_dim).transpose(2, 0, 1, 3)
    return out.reshape(seq, heads, head_dim).astype(queries.dtype)


@replaceable(shared=("length",))
def attend_ring(
    queries: Float[Array, "seq heads head_dim"],
    keys: Float[Array, "kv_heads slots head_dim"],
    values: Float[Array, "kv_heads slots head_dim"],
    view: RingView,
    length: Int32[Array, ""],
) -> Float[Array, "seq heads head_dim"]:
    """Attention of a chunk to the ring of a cache, into which it was written. Slots from
    `length` on are not written yet."""
    return attend(queries, keys, values, view.mask)


@replaceable()
def attend_sequence(
    queries: Float[Array, "seq heads head_dim"],
    keys: Float[Array, "seq kv_heads head_dim"],
    values: Float[Array, "seq kv_heads head_dim"],
    band: Band,
) -> Float[Array, "seq heads head_dim"]:
    """Attention of a whole sequence to itself, in blocks of queries. A block looks only at
    the keys that some query of it may see, so that a window saves work and memory and not
    only probability."""
    seq, window, segments = queries.shape[0], band.window, band.segments
    keys, values = jnp.swapaxes(keys, 0, 1), jnp.swapaxes(values, 0, 1)
    indices = jnp.arange(seq, dtype=jnp.int32)
    # Every block is compiled by itself. At most 16 of them keep compilation short.
    block = max(64, -(-seq // 16))
    out = []
    for start in range(0, seq, block):
        stop = min(start + block, seq)
        first = 0 if window is None else max(0, start - window + 1)
        seen = slice(first, stop)
        mask = visible(indices[start:stop], indices[seen], window)
        if segments is not None:
            mask &= segments[start:stop, None] == segments[None, seen]
        out.append(attend(queries[start:stop], keys[:, seen], values[:, seen], mask))
    return jnp.concatenate(out)


class Attention(eqx.Module):
    """One layer's attention over a sequence, or over a chunk of it and a ring."""

    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear
    n_heads: int = eqx.field(static=True)
    n_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    scaling: Llama4Scaling | None = eqx.field(static=True)

    def __init__(
        self, config: ModelConfig, layer: int = 0, *, dtype: DTypeLike, key: PRNGKeyArray
    ):
        """**Arguments:**

        - `config`: of the model.
        - `layer`: which one, from 0: layers may differ in their windows.
        - `dtype`: of the weights.
        - `key`: for their initialisation.
        """
        key_q, key_k, key_v, key_o = jr.split(key, 4)
        query_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, query_dim, dtype=dtype, key=key_q)
        self.wk = Linear(config.dim, kv_dim, dtype=dtype, key=key_k)
        self.wv = Linear(config.dim, kv_dim, dtype=dtype, key=key_v)
        self.wo = Linear(query_dim, config.dim, dtype=dtype, key=key_o)
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self.window = config.windows[layer]
        self.scaling = config.llama_4_scaling

    def __call__(
        self, x: Float[Array, "seq dim"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "seq dim"], LayerCache | None]:
        """**Arguments:**

        - `x`: the normalised residual stream.
        - `places`: where the tokens of `x` stand.
        - `cache`: what came before `x`, or `None` if nothing did.

        **Returns:**

        What to add to the residual stream, and the cache with `x` in it.
        """
        seq = x.shape[0]
        queries = self.wq(x).reshape(seq, self.n_heads, self.head_dim)
        keys = self.wk(x).reshape(seq, self.n_kv_heads, self.head_dim)
        values = self.wv(x).reshape(seq, self.n_kv_heads, self.head_dim)
        # Keys are rotated before they are stored, so their order in the ring is free.
        queries = rotate(queries, places.cos, places.sin)
        keys = rotate(keys, places.cos, places.sin)
        if self.scaling is not None:
            scale = query_scale(places.positions, self.scaling).astype(queries.dtype)
            queries = queries * scale[:, None, None]
        if cache is None:
            band = Band(places.segments, self.window)
            out = attend_sequence(queries, keys, values, band)
        else:
            cache = cache.write(keys, values, places.length)
            length, padding = places.length + seq, places.length - places.positions[0]
            view = RingView(places.positions, cache.indices(length) - padding, self.window)
            out = attend_ring(queries, cache.keys, cache.values, view, length)
        return self.wo(out.reshape(seq, self.n_heads * self.head_dim)), cache
