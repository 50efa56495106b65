"""Pipeline stages: the layers of a model in groups, each group on devices of its own."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from ..cache import Cache, LayerCache
from .mesh import WHOLE, complete, mesh_of_array, row_groups


class Stages(eqx.Module):
    """The layers of a model in stages, each on devices of its own: what stands in the place
    of its tuple of blocks.

    Block `j` of every stage is one block here, whose arrays have a leading axis `stages`.

    **Attributes:**

    - `blocks`: those of a stage, in order.
    - `n_stages`: how many there are.
    - `microbatches`: the most parts that a batch is cut into.
    """

    blocks: tuple[eqx.Module, ...]
    n_stages: int = eqx.field(static=True)
    microbatches: int = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "batch seq dim"],
        positions: Int32[Array, "batch seq"],
        rotation: tuple[Float32[Array, "batch seq half"], Float32[Array, "batch seq half"]],
        caches: tuple[LayerCache, ...] | None,
        length: Int32[Array, ""],
        *,
        n_experts: int = 0,
    ) -> tuple[
        Float[Array, "batch seq dim"],
        tuple[LayerCache, ...] | None,
        Float[Array, "batch layers seq experts"] | None,
    ]:
        """All layers, in GPipe's schedule: in turn `t`, stage `s` has microbatch `t - s`,
        and hands it on to the next.

        Arguments are those of a block, for a batch. The arrays of a cache have an axis
        `stages` behind that of the batch, as [`stage_cache`][] makes it. With `n_experts`
        the routers' logits are returned too.
        """
        mesh = mesh_of_array(jax.tree.leaves(self.blocks)[0])
        batch, n_stages = x.shape[0], self.n_stages
        rows_apart = row_groups(mesh)
        apart = batch % rows_apart == 0
        n_micro = math.gcd(batch // rows_apart if apart else batch, self.microbatches)
        # Microbatch `m` has rows `m, m + n_micro, ...`: a part of each device's rows.
        cut = lambda a: a.reshape(a.shape[0] // n_micro, n_micro, *a.shape[1:])
        join = lambda a: a.reshape(batch, *a.shape[2:])
        take = lambda a, m: jax.lax.dynamic_index_in_dim(a, m, axis=1, keepdims=False)
        put = lambda a, new, m: jax.lax.dynamic_update_index_in_dim(a, new, m, axis=1)

        def stage(blocks, stage, x, rest, caches, length):
            blocks = jax.tree.map(lambda a: a[0], blocks)
            caches = jax.tree.map(lambda a: a[:, :, 0], caches)
            stage = stage[0]

            def run(x, positions, rotation, kept):
                caches, router_logits = [], []
                for j, block in enumerate(blocks):
                    cache = None if kept[0] is None else kept[0][j]
                    x, cache = block.attend(x, positions, rotation, cache, length)
                    caches.append(cache)
                    if n_experts > 0:
                        router_logits.append(block.router_logits(x))
                    x = block.feed(x)
                caches = None if kept[0] is None else tuple(caches)
                return x, (caches, jnp.stack(router_logits) if router_logits else None)

            def turn(carry, t):
                received, kept = carry
                m = t - stage
                busy = (m >= 0) & (m < n_micro)
                m = jnp.clip(m, 0, n_micro - 1)
                # The cache, the routers' logits and the output of this microbatch.
                mine, mine_out = jax.tree.map(lambda a: take(a, m), kept)
                given = jnp.where(stage == 0, take(x, m), received)
                rest_of_m = jax.tree.map(lambda a: take(a, m), rest)
                made, written = jax.vmap(run)(given, *rest_of_m, mine)
                keep = lambda a, new, old: put(a, jnp.where(busy, new, old), m)
                kept = jax.tree.map(keep, kept, (written, made), (mine, mine_out))
                onward = [(s, s + 1) for s in range(n_stages - 1)]
                return (jax.lax.ppermute(made, "pipe", onward), kept), None

            turns = jnp.arange(n_micro + n_stages - 1, dtype=jnp.int32)
            router_logits = None
            if n_experts > 0:
                shape = (*x.shape[:2], len(blocks), x.shape[2], n_experts)
                router_logits = jnp.zeros(shape, x.dtype)
            kept = (caches, router_logits), jnp.zeros_like(x)
            start = jnp.zeros_like(x[:, 0]), kept
            (_, (kept, out)), _ = jax.lax.scan(turn, start, turns)
            return out[None], jax.tree.map(lambda a: a[:, :, None], kept)

        stages, rows_and_stages = PartitionSpec("pipe"), PartitionSpec(None, None, "pipe")
        run_stages = jax.shard_map(
            stage,
            mesh=mesh,
            in_specs=(stages, stages, WHOLE, WHOLE, rows_and_stages, WHOLE),
            out_specs=(stages, rows_and_stages),
            axis_names={"pipe"},
            check_vma=False,
        )
        # Compiled: step by step, it cannot leave the mesh's other axes to the compiler.
        out, kept = jax.jit(run_stages)(
            self.blocks,
            jnp.arange(n_stages, dtype=jnp.int32),
            *jax.tree.map(cut, (x, (positions, rotation), caches)),
            length,
        )
        caches, router_logits = jax.tree.map(join, kept)
        if router_logits is not None:
            router_logits = router_logits.reshape(batch, -1, *router_logits.shape[3:])
        # The last stage has made what comes out.
        return join(out[-1]), caches, router_logits


def in_stages(
    model: eqx.Module, mesh: Mesh | AbstractMesh, *, microbatches: int | None = None
) -> eqx.Module:
    """The model with its layers in stages, if the mesh has an axis for them. `model` may be
    a skeleton. Arguments and errors are those of [`shard`][]."""
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"microbatches must be 1 or more, got {microbatches}.")
    n_stages = mesh.shape.get("pipe", 1)
    complete(mesh, model.config)
    blocks, size = model.layers, model.config.n_layers // n_stages
    if isinstance(blocks, Stages):
        if blocks.n_stages != n_stages:
            raise ValueError(
                f"The model is in {blocks.n_stages} stages already, and the mesh has "
                f"pipe={n_stages}: shard the model that it was made from."
            )
        microbatches, blocks = microbatches or blocks.microbatches, blocks.blocks
    elif n_stages == 1:
        return model
    else:
        stack = lambda *leaves: jnp.stack(leaves)
        if isinstance(model.norm.weight, jax.ShapeDtypeStruct):
            stack = lambda *leaves: jax.eval_shape(lambda *x: jnp.stack(x), *leaves)
        blocks = tuple(jax.tree.map(stack, *blocks[j::size]) for j in range(size))
    layers = Stages(blocks, n_stages, microbatches or n_stages)
    return eqx.tree_at(lambda m: m.layers, model, layers)


def stage_cache(cache: Cache, model: eqx.Module) -> Cache:
    """Gives the layers of a new cache to the stages of a model, if it has any."""
    if not isinstance(model.layers, Stages):
        return cache
    axis, size = cache.padding.ndim, len(model.layers.blocks)
    stack = lambda *leaves: jnp.stack(leaves, axis)
    layers = tuple(jax.tree.map(stack, *cache.layers[j::size]) for j in range(size))
    return eqx.tree_at(lambda c: c.layers, cache, layers)
