"""The programs of a model, compiled for chips that need not be there."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..config import ModelConfig
from ..decoding import DecodeState, decode, prefill_chunk
from ..devices.chips import chip_named, described_devices
from ..devices.programs import Program, read_program
from ..devices.sharding import (
    cache_shardings,
    row_shardings,
    rows_here,
    shardings,
    whole_sharding,
)
from ..devices.stages import in_stages
from ..files.inspection import cache_skeleton
from ..files.names import skeleton
from ..kernels import quantized
from ..kernels.replaced import made_for
from ..prompts import default_chunk
from ..transformer import Transformer


# Smaller arrays may be copied: it costs nothing.
_LARGE = 2**20


def compile_programs(
    config: ModelConfig,
    mesh: Mapping[str, int],
    chip: str,
    *,
    batch: int = 1,
    context: int = 4096,
    dtype: DTypeLike = jnp.bfloat16,
    quantize: str | None = None,
    train: bool = False,
) -> Iterator[tuple[str, Program]]:
    """Compiles what a model runs, from shapes alone, and yields each program's name and
    what it needs: a chunk of a prompt, a block of decode steps, and a training step.

    **Arguments:**

    - `chip`: see [`described_devices`][mistral_eqx.devices.chips.described_devices].
    - `train`: whether to compile the training step too, of `batch` rows of `context`
        tokens.
    - The others are those of [`plan`][mistral_eqx.files.inspection.plan].

    **Raises:**

    `ValueError` if the mesh has more devices than the chip's slice, and as `plan` does.
    """
    info, devices = described_devices(chip)
    n = math.prod(mesh.values())
    if n > len(devices):
        raise ValueError(f"The mesh has {n} devices, and {chip} has {len(devices)}.")
    whole = skeleton(config, jnp.dtype(dtype))
    held = whole
    if quantize is not None:
        held = eqx.filter_eval_shape(quantized.quantize, whole, quantize)
    place = _Places(mesh, devices[:n], held)
    chunk = default_chunk(config, info, rows=rows_here(batch, place.model))

    def make_state(model, cache):
        logits = jnp.zeros((batch, config.vocab_size), jnp.float32)
        options = {"max_tokens": 1, "key": jax.random.key(0)}
        return DecodeState.start(model, cache, logits, **options)

    bare = jax.tree.map(_bare, place.model)
    cache = cache_skeleton(bare, rows=batch, context=context, chunk=chunk, dtype=dtype)
    state = place.state(eqx.filter_eval_shape(make_state, bare, cache))
    cache = place.cache(cache)
    tokens = place.rows(jax.ShapeDtypeStruct((batch, chunk), jnp.int32))
    steps = place.whole(jax.ShapeDtypeStruct((), jnp.int32))
    large = [*_shapes(place.model), *_shapes(cache)]
    build = functools.partial(_compile, info.platform, large)
    yield f"prefill, a chunk of {chunk}", build(prefill_chunk, place.model, cache, tokens)
    yield "decode, a step", build(decode, place.model, state, steps)
    if train:
        place = _Places(mesh, devices[:n], whole)
        yield (
            f"training, {batch} x {context}",
            _training_step(place, info.platform, batch, context),
        )


def bound(program: Program, chip: str, batch: int) -> float | None:
    """The most tokens a second that decode steps can make if a chip's memory is read at its
    full bandwidth, everything that comes in once; `None` if that is not known."""
    bandwidth = chip_named(chip).bandwidth
    if math.isnan(bandwidth):
        return None
    return batch * bandwidth / program.arguments


def _training_step(place: "_Places", platform: str, batch: int, context: int) -> Program:
    from ..learning.batches import Batch
    from ..learning.training import make_optimizer, start, train_step

    optimizer = make_optimizer(learning_rate=1e-4, steps=10, warmup=1)
    frozen, state = eqx.filter_eval_shape(lambda m: start(m, optimizer), place.model)
    like_model = jax.tree.structure(state.weights)
    is_model = lambda node: jax.tree.structure(node) == like_model
    put = lambda node: place.like_model(node) if is_model(node) else place.whole(node)
    state = jax.tree.map(put, state, is_leaf=is_model)
    tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
    arguments = (frozen, state, place.rows(tokens))

    # Equinox's own wrapper takes numbers only.
    def step(frozen, state, tokens):
        batch = Batch(tokens)
        return train_step.__wrapped__(frozen, state, batch, optimizer, recompute=True)

    return _compile(platform, None, jax.jit(step, donate_argnums=1), *arguments)


def _compile(
    platform: str,
    large: Sequence[tuple[int, ...]] | None,
    function: Callable,
    *arguments: PyTree,
) -> Program:
    began = time.monotonic()
    with made_for(platform):
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
        compiled = lowered.compile()
    return read_program(compiled, time.monotonic() - began, large)


def _shapes(tree: PyTree) -> Iterator[tuple[int, ...]]:
    """Of the large arrays of a tree: a device's part of each, and the whole."""
    for leaf in jax.tree.leaves(tree):
        part = leaf.sharding.shard_shape(leaf.shape)
        if math.prod(part) >= _LARGE:
            yield from {part, leaf.shape}


class _Places:
    """Where the arrays of a model, a cache and a batch would lie, on one device or on a
    mesh of devices that are not here."""

    def __init__(
        self, mesh: Mapping[str, int], devices: list[jax.Device], model: Transformer
    ):
        self._mesh = None
        if len(devices) == 1:
            self._one = SingleDeviceSharding(devices[0])
            self.model = self.whole(model)
            return
        types = (AxisType.Auto,) * len(mesh)
        grid = np.array(devices).reshape(tuple(mesh.values()))
        mesh = Mesh(grid, tuple(mesh), axis_types=types)
        model = in_stages(model, mesh)
        self._places = shardings(model, mesh)
        self._mesh = self._places.norm.weight.mesh
        self.model = _put(model, self._places)

    def like_model(self, tree: PyTree) -> PyTree:
        if self._mesh is None:
            return self.whole(tree)
        return _put(tree, jax.tree.map(lambda _, place: place, tree, self._places))

    def cache(self, cache: PyTree) -> PyTree:
        if self._mesh is None:
            return self.whole(cache)
        return _put(cache, cache_shardings(cache, self._mesh))

    def rows(self, tree: PyTree) -> PyTree:
        if self._mesh is None:
            return self.whole(tree)
        return _put(tree, row_shardings(tree, self._mesh))

    def whole(self, tree: PyTree) -> PyTree:
        place = self._one if self._mesh is None else whole_sharding(self._mesh)
        return _put(tree, jax.tree.map(lambda _: place, tree))

    def state(self, state: DecodeState) -> DecodeState:
        others = lambda s: (s.cache, s.sampling, s.eos_ids)
        rows = self.rows(eqx.tree_at(others, state, (None, None, None)))
        shared = self.whole((state.sampling, state.eos_ids))
        is_none = lambda node: node is None
        return eqx.tree_at(
            others, rows, (self.cache(state.cache), *shared), is_leaf=is_none
        )


def _bare(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _put(tree: PyTree, places: PyTree) -> PyTree:
    described = lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
    )
    return jax.tree.map(described, tree, places)
