"""Weights that are spread along `fsdp`, whole again where a block uses them.

Left to itself the compiler multiplies each device's part of a weight with the rows of all
devices, and moves what it has made of them. That is more than the weights.
"""

import functools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .mesh import mesh_of
from .sharding import shardings


class Within(eqx.Module):
    """A block, each of whose functions goes through `around` before it is called. `around`
    gets it with the block's arrays inside."""

    block: eqx.Module
    around: Callable[[Callable], Callable] = eqx.field(static=True)

    def __call__(self, *args):
        return self.around(self.block)(*args)

    def attend(self, *args):
        return self.around(self.block.attend)(*args)

    def router_logits(self, x):
        return self.around(self.block.router_logits)(x)

    def feed(self, x):
        return self.around(self.block.feed)(x)


def gathered(model: eqx.Module) -> eqx.Module:
    """A model that gathers the weights of a block along `fsdp` when it comes to it; what is
    in no block, at once. Their gradients are spread again where they are summed. Other
    models stay as they are, and so does one in pipeline stages."""
    mesh = mesh_of(model)
    if mesh is None or mesh.shape["fsdp"] == 1 or mesh.shape["pipe"] > 1:
        return model
    places = shardings(model, mesh)
    layers = tuple(
        Within(block, functools.partial(_gather, places=jax.tree.leaves(here)))
        for block, here in zip(model.layers, places.layers, strict=True)
    )
    outside = lambda m: eqx.tree_at(lambda m: m.layers, m, ())
    rest = _gather(outside(model), places=jax.tree.leaves(outside(places)))
    return eqx.tree_at(lambda m: m.layers, rest, layers)


def _gather(tree: PyTree, *, places: Sequence[NamedSharding]) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(_whole, leaves, places))


def _whole(leaf: Array, place: NamedSharding) -> Array:
    """An array that lies at `place`, whole along `fsdp`. Its gradient lies there again."""
    spec = (None if axes == "fsdp" else axes for axes in place.spec)
    whole = NamedSharding(place.mesh, PartitionSpec(*spec))
    if not eqx.is_inexact_array(leaf):
        return jax.lax.with_sharding_constraint(leaf, whole)

    @jax.custom_vjp
    def gather(leaf):
        return jax.lax.with_sharding_constraint(leaf, whole)

    def spread(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, place),)

    gather.defvjp(lambda leaf: (gather(leaf), None), spread)
    return gather(leaf)
