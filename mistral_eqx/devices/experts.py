"""Experts on many devices: each device computes what its own experts contribute."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from ..kernels.replaced import replaces
from ..layers import FeedForward
from ..moe import mix
from .mesh import MODEL, mesh_of_array, on_each_device, rows_spec


@replaces(mix, on="mesh", derived=True)
def mix_where_experts_are(
    experts: FeedForward,
    x: Float[Array, "batch seq dim"],
    chosen: Int32[Array, "batch seq top_k"],
    weights: Float[Array, "batch seq top_k"],
) -> Float[Array, "batch seq dim"]:
    """[`mistral_eqx.moe.mix`][]: every device mixes what its experts, or its part of every
    expert, make of its tokens, and the devices add up. Left to itself the compiler would
    bring all experts together."""
    shape, mesh = x.shape, mesh_of_array(jax.tree.leaves(experts)[0])
    x, chosen, weights = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))

    def alone(experts, *rows):
        """What one device makes of them."""
        return mix.on_one_device(experts, *(row[None] for row in rows))[0]

    if mesh is None or all(mesh.shape[a] == 1 for a in mesh.shape if a != "pipe"):
        return alone(experts, x, chosen, weights).reshape(shape)
    n_experts, sums = jax.tree.leaves(experts)[0].shape[0], ("expert", *MODEL)

    def here(first, experts, x, chosen, weights):
        mixed = alone(experts, x, chosen - first[0], weights)
        return jax.lax.psum(mixed.astype(jnp.float32), sums).astype(x.dtype)

    def spec(path, leaf):
        is_w2, kind = "w2" in jax.tree_util.keystr(path), path[-1].name
        if not is_w2:
            return PartitionSpec("expert", MODEL if kind != "a" else None)
        # A scale that is one for a whole row is not cut with the row.
        is_whole = kind == "b" or leaf.shape[-1] == 1
        return PartitionSpec("expert", None, None if is_whole else MODEL)

    rows, each = rows_spec(x.shape[0], mesh), n_experts // mesh.shape["expert"]
    run = on_each_device(
        here,
        mesh,
        in_specs=(
            PartitionSpec("expert"),
            jax.tree_util.tree_map_with_path(spec, experts),
            *(rows, rows, rows),
        ),
        out_specs=rows,
    )
    first = jnp.arange(0, n_experts, each, dtype=jnp.int32)
    return run(first, experts, x, chosen, weights).reshape(shape)
