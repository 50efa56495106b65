"""The mesh: devices in a grid whose axes have names, and what each axis is for.

A mesh has any of these axes:

- `data`: the rows of a batch are divided. Every device has the whole model.
- `fsdp`: rows are divided too, and the weights are spread and gathered as they are needed
    (ZeRO-3, arXiv 1910.02054): for training.
- `model`: heads, hidden features and vocabulary are divided (Megatron's tensor parallelism,
    arXiv 1909.08053). Attention and the feed-forward network cost one all-reduce each.
- `expert`: the experts of a Mixtral are divided.
- `pipe`: layers are divided into stages. A batch goes through them in microbatches, so that
    the stages work at the same time (GPipe, arXiv 1811.06965).

An array knows which mesh it is on, also while it is traced, so caches and batches follow
the model that they are for.
"""

import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ..config import ModelConfig


AXES = ("data", "fsdp", "expert", "pipe", "model")
# Where there are fewer kv heads than devices along `model`, that axis is split in two: kv
# heads are spread over the first part, and the devices of the second, which share a kv
# head, hold it each. Query heads and all else are spread over both.
SHARING = "sharing_kv_head"
MODEL = ("model", SHARING)
ROWS = ("data", "fsdp")
WHOLE = PartitionSpec()


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of `data=2,model=4`, and their sizes. Raises `ValueError`."""
    sizes = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not axis or not equals or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text} cannot be understood at {part!r}: write axis=size, as in "
                "data=2,model=4."
            )
        if axis in sizes:
            raise ValueError(f"--mesh {text} names {axis} twice.")
        sizes[axis] = int(size)
    _check_axes(sizes)
    return sizes


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of the devices that there are. Raises `ValueError` if they do not suffice."""
    _check_axes(sizes)
    asked, devices = math.prod(sizes.values()), jax.devices()
    if asked > len(devices) or jax.process_count() > 1 and asked != len(devices):
        told = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        hint = ""
        if devices[0].platform == "cpu" and jax.process_count() == 1:
            hint = f" JAX_NUM_CPU_DEVICES={asked} in the environment makes a CPU that many."
        raise ValueError(
            f"A mesh of {told} needs {asked} devices, and there are {len(devices)} "
            f"({devices[0].platform}).{hint}"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:asked],
    )


def complete(mesh: Mesh | AbstractMesh, config: ModelConfig) -> Mesh | AbstractMesh:
    """The same devices in the same order under all the axes that the specs speak of, those
    that the mesh lacks of size 1. They are of type Auto, whatever the mesh's were: the
    compiler finds where the collectives go."""
    sizes = dict(mesh.shape)
    if SHARING in sizes:  # ours already
        sizes = {axis: size for axis, size in sizes.items() if axis in AXES}
        sizes["model"] *= mesh.shape[SHARING]
    _check_axes(sizes)
    _check_sizes(sizes, config)
    sizes = {**sizes, **{axis: 1 for axis in AXES if axis not in sizes}}
    complete = {}
    for axis, size in sizes.items():
        complete[axis] = math.gcd(size, config.n_kv_heads) if axis == "model" else size
        if axis == "model":
            complete[SHARING] = size // complete[axis]
    names, shape = tuple(complete), tuple(complete.values())
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, names, axis_types=types)
    return Mesh(mesh.devices.reshape(shape), names, axis_types=types)


def mesh_of(model: eqx.Module) -> Mesh | AbstractMesh | None:
    """The mesh that [`shard`][] has put a model on; `None` if it was not. Inside a jitted
    function too."""
    return mesh_of_array(model.norm.weight)


def mesh_of_array(array: Array | jax.ShapeDtypeStruct) -> Mesh | AbstractMesh | None:
    traced = isinstance(array, jax.core.Tracer)
    sharding = jax.typeof(array).sharding if traced else array.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if mesh is not None and SHARING in mesh.axis_names else None


def on_each_device(
    function: Callable,
    mesh: Mesh | AbstractMesh,
    *,
    in_specs: PyTree[PartitionSpec],
    out_specs: PyTree[PartitionSpec],
) -> Callable:
    """`function` on every device's own part of its arguments."""
    kinds = zip(mesh.axis_names, mesh.axis_types)
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        # A kernel wants all axes to be divided by hand. In a pipeline one is already.
        axis_names={axis for axis, kind in kinds if kind is not AxisType.Manual},
        check_vma=False,
    )
    return jax.jit(run)


def row_groups(mesh: Mesh | AbstractMesh) -> int:
    """As [`n_row_groups`][], for the mesh of a sharded model."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_spec(n: int, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    divides = n % row_groups(mesh) == 0
    return PartitionSpec(ROWS if divides else None)


def _check_axes(sizes: Mapping[str, int]) -> None:
    if unknown := [axis for axis in sizes if axis not in AXES]:
        raise ValueError(
            f"A mesh cannot have an axis {unknown[0]!r}: the axes are {', '.join(AXES)}."
        )


def _check_sizes(sizes: Mapping[str, int], config: ModelConfig) -> None:
    both = sizes.get("pipe", 1) * sizes.get("model", 1)
    for axis, size in sizes.items():
        if (wrong := _indivisible(axis, size, config)) is None:
            continue
        name, n = wrong
        sizes_to_try = range(1, min(n, 4096) + 1)
        would = [i for i in sizes_to_try if _indivisible(axis, i, config) is None]
        if n == 0:
            raise ValueError(f"The mesh has an axis {axis}={size}, but no {name}.")
        raise ValueError(
            f"{name} ({n}) cannot be divided by the mesh's {axis}={size}. The sizes of "
            f"{axis} that divide this model are {', '.join(map(str, would))}."
        )
    if config.vocab_size % both != 0:
        raise ValueError(
            f"vocab_size ({config.vocab_size}) cannot be divided by the mesh's pipe x "
            f"model = {both}. Make one of them smaller."
        )


def _indivisible(axis: str, size: int, config: ModelConfig) -> tuple[str, int] | None:
    """The dimension that an axis of this size does not divide, and its length."""
    dimensions = {
        "model": ("n_heads", "hidden_dim", "vocab_size"),
        "fsdp": ("dim",),
        "pipe": ("n_layers", "vocab_size"),
    }
    for name in dimensions.get(axis, ()):
        if (n := getattr(config, name)) % size != 0:
            return name, n
    kv_heads = config.n_kv_heads
    if axis == "model" and kv_heads % size != 0 and size % kv_heads != 0:
        return "n_kv_heads", kv_heads
    n_experts = 0 if config.moe is None else config.moe.num_experts
    if axis == "expert" and size > 1 and (n_experts == 0 or n_experts % size != 0):
        return "num_experts", n_experts
    per_stage = config.n_layers // size
    if axis == "pipe" and config.windows[per_stage:] != config.windows[:-per_stage]:
        return "the layers' pattern of windows", config.n_layers
    return None
