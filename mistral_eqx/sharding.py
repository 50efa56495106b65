"""One model on many devices: which part of every array each of them holds.

A mesh names what its axes are for, and has any of these:

- `data`: the rows of a batch, each on some of the devices. Every one has the whole model.
- `fsdp`: rows too, but the weights are spread as well and gathered as they are needed
    (ZeRO-3, arXiv 1910.02054): for training.
- `model`: heads, hidden features and vocabulary (Megatron's tensor parallelism, arXiv
    1909.08053). Attention and feed-forward network cost one all-reduce each.
- `expert`: the experts of a Mixtral.
- `pipe`: layers, in as many stages. A batch goes through them in microbatches, so that the
    stages work at the same time (GPipe, arXiv 1811.06965).

No other module has a `PartitionSpec`. An array says itself which mesh it is on, also while
it is traced, so that caches and batches follow the model they are for.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32, PyTree

from .cache import Cache, LayerCache
from .config import ModelConfig


AXES = ("data", "fsdp", "expert", "pipe", "model")
# Where there are fewer kv heads than devices along `model`, that axis is split in two: kv
# heads are spread over the first part, and the devices of the second, which share a kv
# head, hold it each. Query heads and all else are spread over both.
_SHARING = "sharing_kv_head"
_MODEL = ("model", _SHARING)
# The embeddings and the output belong to no stage: all of them share the vocabulary.
_VOCAB = ("pipe", *_MODEL)
_ROWS = ("data", "fsdp")
_WHOLE = PartitionSpec()
# The axes that each dimension of a weight is spread over, by the end of its name. What is
# not here, the norms and a router, every device has whole.
_WEIGHTS = {
    "tok_embeddings.weight": (_VOCAB, "fsdp"),
    "wq.weight": (_MODEL, "fsdp"),
    "wk.weight": ("model", "fsdp"),
    "wv.weight": ("model", "fsdp"),
    "wo.weight": ("fsdp", _MODEL),
    "w1.weight": (_MODEL, "fsdp"),
    "w2.weight": ("fsdp", _MODEL),
    "w3.weight": (_MODEL, "fsdp"),
    "output.weight": (_VOCAB, "fsdp"),
}


def shard(model: eqx.Module, mesh: Mesh, *, microbatches: int | None = None) -> eqx.Module:
    """Spreads a model over the devices of a mesh.

    The result is used as any model is: [`prefill`][mistral_eqx.prefill],
    [`generate`][mistral_eqx.generate] and a training step see where it is, and put caches
    and batches where they belong.

    **Arguments:**

    - `model`: a [`Transformer`][mistral_eqx.Transformer]. It stays as it is.
    - `mesh`: of the axes that the head of this module names; `jax.make_mesh((2, 4),
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
    # Unlike `eqx.filter_shard`, also from one set of devices to another.
    return jax.device_put(model, shardings(model, mesh))


def in_stages(
    model: eqx.Module, mesh: Mesh | AbstractMesh, *, microbatches: int | None = None
) -> eqx.Module:
    """The model with its layers in stages, if the mesh has an axis for them. `model` may be
    a skeleton. Arguments and errors are those of [`shard`][]."""
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"microbatches must be 1 or more, got {microbatches}.")
    n_stages = mesh.shape.get("pipe", 1)
    _complete(mesh, model.config)
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


def shardings(model: eqx.Module, mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """The sharding of every array of a model, in a tree like it. `model` may be a skeleton
    without numbers, as `eqx.filter_eval_shape` makes it; for an axis `pipe` it has been
    through [`in_stages`][]. Raises as [`shard`][] does."""
    mesh = _complete(mesh, model.config)

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = next((_WEIGHTS[end] for end in _WEIGHTS if name.endswith(end)), ())
        if ".experts." in name:
            spec = ("expert", *spec)
        if name.startswith("layers.blocks."):
            spec = ("pipe", *spec)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, model)


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
        mesh = _mesh_of(jax.tree.leaves(self.blocks)[0])
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
            in_specs=(stages, stages, _WHOLE, _WHOLE, rows_and_stages, _WHOLE),
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
    mesh = _mesh_of(experts.w1.weight)
    if mesh is None or all(mesh.shape[a] == 1 for a in mesh.shape if a != "pipe"):
        return mix(experts, x, chosen, weights)
    n_experts, sums = experts.w1.weight.shape[0], ("expert", *_MODEL)

    def here(first, experts, x, chosen, weights):
        mixed = mix(experts, x, chosen - first[0], weights)
        return jax.lax.psum(mixed.astype(jnp.float32), sums).astype(x.dtype)

    def spec(path, leaf):
        inside, outside = ("expert", _MODEL), ("expert", None, _MODEL)
        of_w2 = "w2" in jax.tree_util.keystr(path)
        return PartitionSpec(*(outside if of_w2 else inside))

    rows, each = _rows(x.shape[0], mesh), n_experts // mesh.shape["expert"]
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


def stage_cache(cache: Cache, model: eqx.Module) -> Cache:
    """Gives the layers of a new cache to the stages of a model, if it has any."""
    if not isinstance(model.layers, Stages):
        return cache
    axis, size = cache.padding.ndim, len(model.layers.blocks)
    stack = lambda *leaves: jnp.stack(leaves, axis)
    layers = tuple(jax.tree.map(stack, *cache.layers[j::size]) for j in range(size))
    return eqx.tree_at(lambda c: c.layers, cache, layers)


def mesh_of(model: eqx.Module) -> Mesh | AbstractMesh | None:
    """The mesh that [`shard`][] has put a model on; `None` if it was not. Inside a jitted
    function too."""
    return _mesh_of(model.norm.weight)


def _mesh_of(array: Array) -> Mesh | AbstractMesh | None:
    traced = isinstance(array, jax.core.Tracer)
    sharding = jax.typeof(array).sharding if traced else array.sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if mesh is not None and _SHARING in mesh.axis_names else None


def n_row_groups(model: eqx.Module) -> int:
    """How many parts a batch is spread in: the devices along `data` and `fsdp`."""
    mesh = mesh_of(model)
    return 1 if mesh is None else row_groups(mesh)


def row_groups(mesh: Mesh | AbstractMesh) -> int:
    """As [`n_row_groups`][], for the mesh of a sharded model."""
    return math.prod(mesh.shape[axis] for axis in _ROWS)


def shard_rows(tree: PyTree[Array], model: eqx.Module) -> PyTree[Array]:
    """Spreads arrays, whose first axis is that of a batch, as the model needs them. If the
    rows cannot be divided, every device has all of them."""
    mesh = mesh_of(model)
    if mesh is None:
        return _beside(tree, model)
    return jax.tree.map(
        lambda x: eqx.filter_shard(x, NamedSharding(mesh, _rows(x.shape[0], mesh))), tree
    )


def replicate(tree: PyTree[Array], model: eqx.Module) -> PyTree[Array]:
    """Gives arrays whole to every device that the model is on."""
    mesh = mesh_of(model)
    if mesh is None:
        return _beside(tree, model)
    return eqx.filter_shard(tree, NamedSharding(mesh, _WHOLE))


def _beside(tree: PyTree[Array], model: eqx.Module) -> PyTree[Array]:
    """Puts arrays on the one device that a model was put on. What a program makes of the
    model is there; given anything else at first, it would be compiled for both."""
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
    rows = _WHOLE
    if cache.padding.ndim == 1:
        rows = _rows(cache.padding.shape[0], mesh)
    stages = ("pipe",) * (cache.layers[0].keys.ndim - 3 - cache.padding.ndim)
    layers = NamedSharding(mesh, PartitionSpec(*rows, *stages, "model"))
    places = jax.tree.map(lambda _: layers, cache)
    return eqx.tree_at(
        lambda c: (c.length, c.padding),
        places,
        (NamedSharding(mesh, _WHOLE), NamedSharding(mesh, rows)),
    )


def fill_rows(prompts: Sequence[Sequence[int]], model: eqx.Module) -> list[Sequence[int]]:
    """Prompts, and copies of the first until they can be divided among the devices."""
    return [*prompts, *[prompts[0]] * (-len(prompts) % n_row_groups(model))]


def to_host(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """The numbers of arrays, wherever they are; other processes' devices too."""

    def fetch(x: Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 30,
) -> None:
    """Joins the processes of a program that runs on several hosts; before anything else is
    asked of JAX. Then `jax.devices()` are those of all of them, and a mesh may span them.

    **Arguments:**

    - `coordinator`: the host and the port of process 0. It is found without on a TPU
        slice and under Slurm.
    - `num_processes`, `process_id`: how many there are, and which one this is.
    - `heartbeat_timeout`: seconds of silence after which a process counts as dead, and
        those that are left end with a message.

    **Raises:**

    `ValueError` for an address or a number that cannot be.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"The coordinator must be HOST:PORT, got {coordinator!r}.")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"A process of {num_processes} must have an id from 0 to "
                f"{num_processes - 1}, got {process_id}."
            )
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=120,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )


def wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


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


def _rows(n: int, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    divides = n % row_groups(mesh) == 0
    return PartitionSpec(_ROWS if divides else None)


def _complete(mesh: Mesh | AbstractMesh, config: ModelConfig) -> Mesh | AbstractMesh:
    """The same devices in the same order under all the axes that the specs speak of, those
    that the mesh lacks of size 1. They are of type Auto, whatever the mesh's were: the
    compiler finds where the collectives go."""
    sizes = dict(mesh.shape)
    if _SHARING in sizes:  # ours already
        sizes = {axis: size for axis, size in sizes.items() if axis in AXES}
        sizes["model"] *= mesh.shape[_SHARING]
    _check_axes(sizes)
    _check_sizes(sizes, config)
    sizes = {**sizes, **{axis: 1 for axis in AXES if axis not in sizes}}
    complete = {}
    for axis, size in sizes.items():
        complete[axis] = math.gcd(size, config.n_kv_heads) if axis == "model" else size
        if axis == "model":
            complete[_SHARING] = size // complete[axis]
    names, shape = tuple(complete), tuple(complete.values())
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, names, axis_types=types)
    return Mesh(mesh.devices.reshape(shape), names, axis_types=types)


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
        would = [i for i in range(1, n + 1) if _indivisible(axis, i, config) is None]
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
