"""Pipeline stages: the layers of a model in groups, each group on devices of its own."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from ..arguments import shown
from ..cache import Cache, LayerCache
from ..layers import each_token
from ..rope import Places
from ..transformer import Transformer
from .mesh import WHOLE, complete, mesh_of_array, row_groups


class Stages(eqx.Module):
    """The layers of a model in stages, each on devices of its own. It takes the place of
    the model's tuple of blocks.

    The blocks `j` of all stages are one block here, whose arrays have a leading axis
    `stages`.

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
        places: Places,
        caches: tuple[LayerCache, ...] | None,
        *,
        n_experts: int = 0,
    ) -> tuple[
        Float[Array, "batch seq dim"],
        tuple[LayerCache, ...] | None,
        Float[Array, "batch layers seq experts"] | None,
    ]:
        """All layers, in GPipe's schedule: in turn `t`, stage `s` has microbatch `t - s`,
        and hands it on to the next.

        Arguments are those of a block, for a batch whose rows share `places.length`. The
        arrays of a cache have an axis `stages` behind that of the batch. With `n_experts`
        the routers' logits are returned too.
        """
        mesh = mesh_of_array(jax.tree.leaves(self.blocks)[0])
        batch, n_stages = x.shape[0], self.n_stages
        # The length is the same in all rows, and is not cut into microbatches.
        rest = eqx.tree_at(lambda p: p.length, places, None)
        rows_apart = row_groups(mesh)
        apart = batch % rows_apart == 0
        n_micro = math.gcd(batch // rows_apart if apart else batch, self.microbatches)
        # Microbatch `m` has rows `m, m + n_micro, ...`: a part of each device's rows.
        cut = lambda a: a.reshape(a.shape[0] // n_micro, n_micro, *a.shape[1:])
        join = lambda a: a.reshape(batch, *a.shape[2:])
        take = lambda a, m: jax.lax.dynamic_index_in_dim(a, m, axis=1, keepdims=False)
        put = lambda a, new, m: jax.lax.dynamic_update_index_in_dim(a, new, m, axis=1)

        axes = eqx.tree_at(lambda p: p.length, jax.tree.map(lambda _: 0, places), None)

        def stage(blocks, stage, x, rest, caches, length):
            blocks = jax.tree.map(lambda a: a[0], blocks)
            caches = jax.tree.map(lambda a: a[:, :, 0], caches)
            stage = stage[0]

            def run(x, places, kept):
                caches, router_logits = [], []
                for j, block in enumerate(blocks):
                    cache = None if kept[0] is None else kept[0][j]
                    x, cache = jax.vmap(block.attend, (0, axes, 0))(x, places, cache)
                    caches.append(cache)
                    if n_experts > 0:
                        router_logits.append(each_token(block.router_logits, x))
                    x = each_token(block.feed, x)
                caches = None if kept[0] is None else tuple(caches)
                stacked = jnp.stack(router_logits, axis=1) if router_logits else None
                return x, (caches, stacked)

            def turn(carry, t):
                received, kept = carry
                m = t - stage
                busy = (m >= 0) & (m < n_micro)
                m = jnp.clip(m, 0, n_micro - 1)
                # The cache, the routers' logits and the output of this microbatch.
                mine, mine_out = jax.tree.map(lambda a: take(a, m), kept)
                given = jnp.where(stage == 0, take(x, m), received)
                rest_of_m = jax.tree.map(lambda a: take(a, m), rest)
                places = eqx.tree_at(
                    lambda p: p.length, rest_of_m, length, is_leaf=_is_none
                )
                made, written = run(given, places, mine)
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
        # Outside of a jitted function, `shard_map` has to map all axes of the mesh.
        out, kept = jax.jit(run_stages)(
            self.blocks,
            jnp.arange(n_stages, dtype=jnp.int32),
            *jax.tree.map(cut, (x, rest, caches)),
            places.length,
        )
        caches, router_logits = jax.tree.map(join, kept)
        if router_logits is not None:
            router_logits = router_logits.reshape(batch, -1, *router_logits.shape[3:])
        # The output is that of the last stage.
        return join(out[-1]), caches, router_logits


class PipelinedTransformer(Transformer):
    """A [`Transformer`][mistral_eqx.Transformer] whose layers are [`Stages`][]. The engine
    calls it as it calls any model; the stages work on different rows at the same time."""

    layers: Stages

    def __init__(self, model: Transformer, layers: Stages):
        """**Arguments:**

        - `model`: what embeddings, norm and output are taken from.
        - `layers`: its layers in stages.
        """
        self.tok_embeddings, self.norm = model.tok_embeddings, model.norm
        self.output, self.config, self.layers = model.output, model.config, layers

    def __call__(
        self, tokens: Int[Array, "seq"], cache: Cache | None = None
    ) -> tuple[Float32[Array, "seq vocab"], Cache | None]:
        """As that of a `Transformer`: the row goes through the stages as a batch of one."""
        one = lambda array: array[None]
        if cache is not None:
            rows = jax.tree.map(one, (cache.layers, cache.padding))
            cache = eqx.tree_at(lambda c: (c.layers, c.padding), cache, rows)
        hidden, cache = self.batch(tokens[None], cache)
        if cache is not None:
            rows = jax.tree.map(lambda array: array[0], (cache.layers, cache.padding))
            cache = eqx.tree_at(lambda c: (c.layers, c.padding), cache, rows)
        return self.logits(hidden[0]), cache

    def hidden_states(
        self,
        tokens: Int[Array, "seq"],
        cache: Cache | None = None,
        segments: Int[Array, "seq"] | None = None,
    ) -> tuple[tuple[Float[Array, "seq dim"], ...], None]:
        """As those of a `Transformer`, for a whole sequence: the layers run one after the
        other, each gathered from its stage. **Raises** `ValueError` if given a cache."""
        if cache is not None:
            raise ValueError("hidden_states of a model in stages takes no cache.")
        take = lambda stage, block: jax.tree.map(lambda leaf: leaf[stage], block)
        stages, blocks = range(self.layers.n_stages), self.layers.blocks
        layers = tuple(take(stage, block) for stage in stages for block in blocks)
        places, hidden = self.places(tokens, None, segments), [self.tok_embeddings(tokens)]
        for block in layers:
            x, _ = block(hidden[-1], places, None)
            hidden.append(x)
        return tuple(hidden), None

    def batch(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache | None = None,
        segments: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Cache | None]:
        """As that of a `Transformer`."""
        rows = None if cache is None else cache.layers
        x, rows, _ = self.layers(*self._start(tokens, cache, segments), rows)
        return x, None if cache is None else cache.after(rows, tokens.shape[1])

    def empty_cache(self, padding: Int[Array, "*batch"], **options: Any) -> Cache:
        """As that of a `Transformer`, with the layers of each stage together."""
        cache = Transformer.empty_cache(self, padding, **options)
        axis, size = cache.padding.ndim, len(self.layers.blocks)
        stack = lambda *leaves: jnp.stack(leaves, axis)
        layers = tuple(jax.tree.map(stack, *cache.layers[j::size]) for j in range(size))
        return eqx.tree_at(lambda c: c.layers, cache, layers)

    def with_router_logits(
        self,
        tokens: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq dim"], Float[Array, "batch layers seq experts"]]:
        """As that of a `Transformer`."""
        n_experts = self.config.moe.num_experts
        start = self._start(tokens, None, segments)
        x, _, router_logits = self.layers(*start, None, n_experts=n_experts)
        return x, router_logits

    def _start(
        self,
        tokens: Int[Array, "batch seq"],
        cache: Cache | None,
        segments: Int[Array, "batch seq"] | None,
    ) -> tuple[Float[Array, "batch seq dim"], Places]:
        """The embeddings of a batch, and where its tokens stand."""
        axes = None if cache is None else cache.axes
        places = jax.vmap(self.places, (0, axes, 0))(tokens, cache, segments)
        places = eqx.tree_at(lambda p: p.length, places, places.length[0])
        return jax.vmap(self.tok_embeddings)(tokens), places


def in_stages(
    model: Transformer, mesh: Mesh | AbstractMesh, *, microbatches: int | None = None
) -> Transformer:
    """The model with its layers in stages, if the mesh has an axis for them. `model` may be
    a skeleton. Arguments and errors are those of [`shard`][]."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {shown(mesh)}.")
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"microbatches must be 1 or more, got {microbatches}.")
    n_stages = mesh.shape.get("pipe", 1)
    complete(mesh, model.config)
    size = model.config.n_layers // n_stages
    if isinstance(model, PipelinedTransformer):
        stages = model.layers
        if stages.n_stages != n_stages:
            raise ValueError(
                f"The model is in {stages.n_stages} stages already, and the mesh has "
                f"pipe={n_stages}: shard the model that it was made from."
            )
        microbatches, blocks = microbatches or stages.microbatches, stages.blocks
    elif n_stages == 1:
        return model
    else:
        stack = lambda *leaves: jnp.stack(leaves)
        if isinstance(model.norm.weight, jax.ShapeDtypeStruct):
            stack = lambda *leaves: jax.eval_shape(lambda *x: jnp.stack(x), *leaves)
        layers = model.layers
        blocks = tuple(jax.tree.map(stack, *layers[j::size]) for j in range(size))
    stages = Stages(blocks, n_stages, microbatches or n_stages)
    return PipelinedTransformer(model, stages)


def _is_none(x: Any) -> bool:
    return x is None
