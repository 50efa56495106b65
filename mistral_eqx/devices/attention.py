"""Attention of whole sequences on many devices: each attends with its own heads, to its own
rows."""

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from .. import attention
from ..kernels.replaced import replaces
from .mesh import MODEL, mesh_of_array, on_each_device, rows_spec


@replaces(attention.attend_sequence, on="mesh", derived=True)
def attend_where_heads_are(
    queries: Float[Array, "batch seq heads head_dim"],
    keys: Float[Array, "batch seq kv_heads head_dim"],
    values: Float[Array, "batch seq kv_heads head_dim"],
    band: attention.Band,
) -> Float[Array, "batch seq heads head_dim"]:
    """[`mistral_eqx.attention.attend_sequence`][]. A kernel is for one device, and the
    compiler cannot divide it."""
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
