"""Attention of whole sequences on many devices: each attends with its own heads, to its own
rows."""

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from .. import attention
from ..kernels.replaced import on_one_device, replaces
from .mesh import MODEL, mesh_of_array, rows_spec


@replaces(attention.attend_sequence, on="mesh", derived=True)
def attend_where_heads_are(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    band: attention.Band,
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_sequence`][]. A kernel is for one device, and the
    compiler cannot divide it."""
    mesh, arguments = mesh_of_array(queries), (queries, keys, values, band)
    if mesh is None:
        return jax.vmap(attention.attend_sequence.plain)(*arguments)
    kinds = zip(mesh.axis_names, mesh.axis_types)
    (rows,) = rows_spec(queries.shape[0], mesh)
    query_heads = PartitionSpec(rows, None, MODEL)
    kv_heads = PartitionSpec(rows, None, "model")
    run_here = jax.shard_map(
        lambda *arguments: on_one_device(attention.attend_sequence, *arguments),
        mesh=mesh,
        in_specs=(query_heads, kv_heads, kv_heads, PartitionSpec(rows)),
        out_specs=query_heads,
        # A kernel wants all axes to be divided by hand. In a pipeline one is already.
        axis_names={axis for axis, kind in kinds if kind is not AxisType.Manual},
        check_vma=False,
    )
    return jax.jit(run_here)(*arguments)
