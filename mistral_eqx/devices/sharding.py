"""Which part of every array each device of a mesh holds.

No module outside of this wing uses a `PartitionSpec`.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ..cache import Cache
from .mesh import MODEL, WHOLE, complete, mesh_of, row_groups, rows_spec
from .stages import in_stages


# The embeddings and the output belong to no stage: all of them share the vocabulary.
_VOCAB = ("pipe", *MODEL)
# The axes that each dimension of a weight is spread over, by the end of its name. Weights
# that are not in this table (norms and routers) are whole on every device.
_WEIGHTS = {
    "tok_embeddings.weight": (_VOCAB, "fsdp"),
    "wq.weight": (MODEL, "fsdp"),
    "wk.weight": ("model", "fsdp"),
    "wv.weight": ("model", "fsdp"),
    "wo.weight": ("fsdp", MODEL),
    "w1.weight": (MODEL, "fsdp"),
    "w2.weight": ("fsdp", MODEL),
    "w3.weight": (MODEL, "fsdp"),
    "output.weight": (_VOCAB, "fsdp"),
}


def shard(model: eqx.Module, mesh: Mesh, *, microbatches: int | None = None) -> eqx.Module:
    """Spreads a model over the devices of a mesh.

    The result is used as any model is: [`prefill`][mistral_eqx.prefill],
    [`generate`][mistral_eqx.generate] and a training step see where it is, and put caches
    and batches where they belong.

    **Arguments:**

    - `model`: a [`Transformer`][mistral_eqx.Transformer]. It stays as it is.
    - `mesh`: of the axes that `mesh.py` names; `jax.make_mesh((2, 4),
        ("data", "model"))`, say.
    - `microbatches`: with an axis `pipe`, the most parts that a batch goes through the
        stages in; as many as there are stages by default. Of `microbatches + stages - 1`
        turns each stage idles in `stages - 1`.

    **Returns:**

    The model. With an axis `pipe` its `layers` are [`Stages`][].

    **Raises:**

    `ValueError` for an axis of another name, or a size of one that the model cannot be
    divided by: it says which could.
    """
    model = in_stages(model, mesh, microbatches=microbatches)
    # `eqx.filter_shard` cannot move arrays from one set of devices to another.
    return jax.device_put(model, shardings(model, mesh))


def shardings(model: eqx.Module, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """The sharding of every array of a model, in a tree like it. `model` may be a skeleton
    without numbers, as `eqx.filter_eval_shape` makes it; for an axis `pipe` it has been
    through [`in_stages`][]. Raises as [`shard`][] does."""
    mesh = complete(mesh, model.config)

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # A quantized weight has `values` and `scales` in place of `weight`. An adapter has
        # `a` and `b` beside its `base`.
        stem, _, kind = name.rpartition(".")
        stem = stem.removesuffix(".base")
        spec = next(
            (_WEIGHTS[end] for end in _WEIGHTS if f"{stem}.weight".endswith(end)), ()
        )
        if kind == "scales":
            spec = _scales_spec(name, spec, leaf.shape[-1], mesh)
        elif kind in ("a", "b"):
            # Each has one of the weight's axes, and the rank, which is not divided.
            spec = (None, *spec[1:]) if kind == "a" else spec[:1]
        if ".experts." in name:
            spec = ("expert", *spec)
        if name.startswith("layers.blocks."):
            spec = ("pipe", *spec)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, model)


def _scales_spec(name: str, spec: tuple, groups: int, mesh: Mesh | AbstractMesh) -> tuple:
    """That of a weight, or of its rows alone if each of them has one scale."""
    if groups == 1:
        return spec[:1]
    axes = (spec[1],) if isinstance(spec[1], str) else spec[1]
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if groups % parts != 0:
        raise ValueError(
            f"{name}: the {groups} groups of numbers that share a scale cannot be divided "
            f"among {parts} devices. Quantize to int8, which has one scale for a row, or "
            "choose another mesh."
        )
    return spec


def settled(model: eqx.Module) -> eqx.Module:
    """A model with new arrays in it, with all of them where the others are."""
    mesh = mesh_of(model)
    if mesh is None:
        return _beside(model, model)
    return jax.device_put(model, shardings(model, mesh))


def rows_here(n_rows: int, model: eqx.Module) -> int:
    """How many rows of a batch a device has, at most."""
    return -(-n_rows // n_row_groups(model))


def n_row_groups(model: eqx.Module) -> int:
    """How many parts a batch is spread in: the devices along `data` and `fsdp`."""
    mesh = mesh_of(model)
    return 1 if mesh is None else row_groups(mesh)


def shard_rows(tree: PyTree[Array], model: eqx.Module) -> PyTree[Array]:
    """Spreads arrays, whose first axis is that of a batch, as the model needs them. If the
    rows cannot be divided, every device has all of them."""
    mesh = mesh_of(model)
    if mesh is None:
        return _beside(tree, model)
    return jax.tree.map(
        lambda x: eqx.filter_shard(x, NamedSharding(mesh, rows_spec(x.shape[0], mesh))),
        tree,
    )


def replicate(tree: PyTree[Array], model: eqx.Module) -> PyTree[Array]:
    """Gives arrays whole to every device that the model is on."""
    mesh = mesh_of(model)
    if mesh is None:
        return _beside(tree, model)
    return eqx.filter_shard(tree, NamedSharding(mesh, WHOLE))


def _beside(tree: PyTree[Array], model: eqx.Module) -> PyTree[Array]:
    """Commits arrays to the one device that a model was put on. Otherwise a program would
    be compiled twice: for uncommitted inputs, and then for its own committed outputs."""
    weight = model.norm.weight
    if isinstance(weight, jax.core.Tracer) or not weight.committed:
        return tree
    return jax.device_put(tree, weight.sharding) if len(weight.devices()) == 1 else tree


def place_like(tree: PyTree[Array], like: PyTree[Array]) -> PyTree[Array]:
    """Puts arrays where those of a tree like theirs are."""
    return jax.tree.map(
        lambda x, other: jax.device_put(x, other.sharding) if other.committed else x,
        tree,
        like,
    )


def shard_cache(cache: Cache, model: eqx.Module) -> Cache:
    """Spreads a cache as the model needs it: rows, and kv heads."""
    mesh = mesh_of(model)
    if mesh is None:
        return _beside(cache, model)
    return eqx.filter_shard(cache, cache_shardings(cache, mesh))


def cache_shardings(cache: Cache, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """The sharding of every array of a cache, for the mesh of a sharded model."""
    rows = WHOLE
    if cache.padding.ndim == 1:
        rows = rows_spec(cache.padding.shape[0], mesh)
    stages = ("pipe",) * (cache.layers[0].keys.ndim - 3 - cache.padding.ndim)
    layers = NamedSharding(mesh, PartitionSpec(*rows, *stages, "model"))
    places = jax.tree.map(lambda _: layers, cache)
    return eqx.tree_at(
        lambda c: (c.length, c.padding),
        places,
        (NamedSharding(mesh, WHOLE), NamedSharding(mesh, rows)),
    )


def row_shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """Those of arrays whose first axis is that of a batch, for the mesh of a sharded
    model."""
    rows = lambda leaf: NamedSharding(mesh, rows_spec(leaf.shape[0], mesh))
    return jax.tree.map(rows, tree)


def whole_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """That of an array that every device has."""
    return NamedSharding(mesh, WHOLE)


def fill_rows(prompts: Sequence[Sequence[int]], model: eqx.Module) -> list[Sequence[int]]:
    """Prompts, and copies of the first until they can be divided among the devices."""
    return [*prompts, *[prompts[0]] * (-len(prompts) % n_row_groups(model))]
