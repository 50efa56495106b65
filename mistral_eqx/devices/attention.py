"""Attention on many devices: each attends with its own heads, to its own rows.

A kernel is for one device, and the compiler cannot divide it.
"""

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from .. import attention
from ..kernels.replaced import replaces
from ..kernels.rings import attend_blocks
from .mesh import MODEL, mesh_of_array, on_each_device, rows_spec


@replaces(attention.attend_sequence, on="mesh", derived=True)
def attend_sequence_where_heads_are(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    band: attention.Band,
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_sequence`][]."""
    mesh = mesh_of_array(queries)
    if mesh is None:
        return attention.attend_sequence.batched(queries, keys, values, band)
    (rows,) = rows_spec(queries.shape[0], mesh)
    query_heads = PartitionSpec(rows, None, MODEL)
    kv_heads = PartitionSpec(rows, None, "model")
    run = on_each_device(
        attention.attend_sequence.on_one_device,
        mesh,
        in_specs=(query_heads, kv_heads, kv_heads, PartitionSpec(rows)),
        out_specs=query_heads,
    )
    return run(queries, keys, values, band)


@replaces(attention.attend_ring, on="mesh")
def attend_ring_where_heads_are(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    view: attention.RingView,
    length: Int32[Array, ""],
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_ring`][]."""
    arguments = (queries, keys, values, view, length)
    mesh = mesh_of_array(queries)
    if mesh is None:  # a mesh of another's making, which the compiler divides
        return attend_blocks(*arguments)
    rows = rows_spec(queries.shape[0], mesh)
    query_heads, ring = PartitionSpec(*rows, None, MODEL), PartitionSpec(*rows, "model")
    run = on_each_device(
        attention.attend_ring.on_one_device,
        mesh,
        in_specs=(query_heads, ring, ring, rows, PartitionSpec()),
        out_specs=query_heads,
    )
    return run(*arguments)
