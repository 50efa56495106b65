"""Experts on many devices: each device computes what its own experts contribute."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from .mesh import MODEL, mesh_of_array, rows_spec


def where_experts_are(
    mix: Callable[[eqx.Module, Array, Array, Array], Array],
    experts: eqx.Module,
    x: Float[Array, "tokens dim"],
    chosen: Int32[Array, "tokens top_k"],
    weights: Float[Array, "tokens top_k"],
) -> Float[Array, "tokens dim"]:
    """Lets every device mix what its experts, or its part of every expert, make of its
    tokens, and adds up. Left to itself the compiler would bring all experts together.

    **Arguments:**

    - `mix`: takes the others. A number of an expert outside is of one that is elsewhere.
    - `experts`: a feed-forward network whose weights have a leading axis `experts`.
    - `x`, `chosen`, `weights`: the tokens, their experts and how much each counts.
    """
    mesh = mesh_of_array(experts.w1.weight)
    if mesh is None or all(mesh.shape[a] == 1 for a in mesh.shape if a != "pipe"):
        return mix(experts, x, chosen, weights)
    n_experts, sums = experts.w1.weight.shape[0], ("expert", *MODEL)

    def here(first, experts, x, chosen, weights):
        mixed = mix(experts, x, chosen - first[0], weights)
        return jax.lax.psum(mixed.astype(jnp.float32), sums).astype(x.dtype)

    def spec(path, leaf):
        inside, outside = ("expert", MODEL), ("expert", None, MODEL)
        of_w2 = "w2" in jax.tree_util.keystr(path)
        return PartitionSpec(*(outside if of_w2 else inside))

    rows, each = rows_spec(x.shape[0], mesh), n_experts // mesh.shape["expert"]
    run_here = jax.shard_map(
        here,
        mesh=mesh,
        in_specs=(
            PartitionSpec("expert"),
            jax.tree_util.tree_map_with_path(spec, experts),
            *(rows, rows, rows),
        ),
        out_specs=rows,
        axis_names=set(mesh.axis_names) - {"pipe"},
        check_vma=False,
    )
    first = jnp.arange(0, n_experts, each, dtype=jnp.int32)
    return jax.jit(run_here)(first, experts, x, chosen, weights)
