"""What a folder holds, and what it needs, told from its config and its headers. No weights
are read."""

import collections
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..arguments import in_units
from ..cache import Cache
from ..config import ModelConfig
from ..devices.chips import Chip, chip_here
from ..devices.mesh import row_groups
from ..devices.sharding import cache_shardings, shardings
from ..devices.stages import in_stages
from ..kernels import quantized
from ..kernels.rings import SCORES
from ..prompts import default_chunk, next_power_of_two
from ..tokenizer import check_vocabulary, load_tokenizer
from ..transformer import Transformer
from .checkpoint import open_checkpoint, open_trunk
from .heads import is_classifier, labels_of, take_head
from .names import skeleton
from .released import names_of


GB = 10**9
# The memories of common accelerators, of which a tenth is left alone.
_SIZES = (8, 16, 24, 40, 80)


def inspect_folder(folder: str | os.PathLike) -> dict[str, str]:
    """Describes a folder of weights, under a few headings.

    **Raises:**

    `FileNotFoundError` or `ValueError` as [`load_model`][mistral_eqx.load_model] does, but
    not for files that do not fit their config: that is part of the description.
    """
    labels = labels_of(folder) if is_classifier(folder) else ()
    checkpoint = open_trunk(folder) if labels else open_checkpoint(folder)
    config, tensors = checkpoint.config, checkpoint.tensors
    kind = ", ".join(names_of(config)) or "not the shape of a released Mistral"
    if labels:
        kind = f"a classifier with the labels {', '.join(labels)}"
    try:
        if labels:
            checkpoint, _ = take_head(checkpoint, len(labels))
        checkpoint.check()
        agreement = "the files hold what the config says"
    except ValueError as error:
        agreement = f"NO: {error}"
    census = collections.Counter(tensor.dtype for tensor in tensors.values())
    parameters = sum(tensor.size for tensor in tensors.values())
    size = sum(file.stat().st_size for file in checkpoint.files)
    cache = 4 * config.n_layers * config.n_kv_heads * config.head_dim
    files = checkpoint.files[0].name
    if len(checkpoint.files) > 1:
        files += f" to {checkpoint.files[-1].name}"
    return {
        "model": kind,
        "format": f"{checkpoint.format}: {files}, {in_units(size)}",
        "shape": f"{config.n_layers} layers of width {config.dim}, {config.n_heads} query "
        f"and {config.n_kv_heads} kv heads of {config.head_dim}, hidden "
        f"{config.hidden_dim}, vocabulary {config.vocab_size}"
        + (", tied embeddings" if config.tied_embeddings and not labels else "")
        + ("" if config.moe is None else f", {config.moe.num_experts} experts"),
        "vision": f"{len(checkpoint.vision)} tensors, which are left on disk"
        if checkpoint.vision
        else "none",
        "parameters": f"{parameters:,}",
        "dtypes": ", ".join(f"{n} tensors {dtype}" for dtype, n in census.most_common()),
        "window": _window(config),
        "theta": _theta(config),
        "tokenizer": _tokenizer(checkpoint.folder, config),
        "memory": f"{in_units(2 * parameters)} in bfloat16, {in_units(4 * parameters)} in "
        f"float32, and {in_units(cache)} or {in_units(2 * cache)} for each token in the "
        "cache",
        "agreement": agreement,
    }


def plan(
    config: ModelConfig,
    mesh: Mapping[str, int],
    *,
    batch: int = 1,
    context: int = 4096,
    dtype: DTypeLike = jnp.bfloat16,
    quantize: str | None = None,
    chip: Chip | None = None,
) -> dict[str, str]:
    """What every device of a mesh will hold, under a few headings.

    **Arguments:**

    - `config`: of the model.
    - `mesh`: its axes and their sizes. No such devices are needed.
    - `batch`, `context`: how many rows of how many tokens the cache is to hold.
    - `dtype`: of the weights and the cache.
    - `quantize`: `"int8"` or `"int4"`, if the weights are to be quantized.
    - `chip`: of which the mesh is; by default what this process has.

    **Raises:**

    `ValueError` as [`shard`][mistral_eqx.shard] does, or for a number below 1.
    """
    needs = reckon(
        config,
        mesh,
        batch=batch,
        context=context,
        dtype=dtype,
        quantize=quantize,
        chip=chip,
    )
    total, n_devices = needs.weights + needs.cache + needs.work, math.prod(mesh.values())
    fits = (f"{size} GB: {'yes' if total <= 0.9 * size * GB else 'no'}" for size in _SIZES)
    parameters = f"{needs.parameters:,} parameters"
    return {
        "model": f"{', '.join(names_of(config)) or 'a Mistral'}: {parameters}",
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        + f" = {n_devices} device{'s' if n_devices > 1 else ''}",
        "weights": f"{in_units(needs.weights)} a device, of {in_units(needs.all_weights)} "
        f"in {quantize or jnp.dtype(dtype).name}",
        "cache": f"{in_units(needs.cache)} a device, of {in_units(needs.whole_cache)} for "
        f"{needs.rows} x {context} tokens",
        "work": f"about {in_units(needs.work)} a device, while prompts are read",
        "together": f"{in_units(total)} a device",
        "fits": ", ".join(fits) + " (a tenth left free)",
    }


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that a device of a mesh needs, with a model and a cache.

    **Attributes:**

    - `weights`, `cache`: a device's part of them.
    - `all_weights`, `whole_cache`: all that the devices hold together, each part once.
    - `work`: about how many a chunk of a prompt needs at once.
    - `parameters`: of the model.
    - `rows`: of the cache: as many as were asked for, and more where the devices cannot
        share those evenly.
    """

    weights: int
    all_weights: int
    cache: int
    whole_cache: int
    work: int
    parameters: int
    rows: int


def reckon(
    config: ModelConfig,
    mesh: Mapping[str, int],
    *,
    batch: int,
    context: int,
    dtype: DTypeLike,
    quantize: str | None,
    chip: Chip | None,
) -> Needs:
    """The numbers of [`plan`][], which has the same arguments."""
    for name, number in (("batch", batch), ("context", context)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}.")
    model = skeleton(config, jnp.dtype(dtype))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    if quantize is not None:
        model = eqx.filter_eval_shape(quantized.quantize, model, quantize)
    devices = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    model = in_stages(model, devices)
    places = shardings(model, devices)
    complete = places.norm.weight.mesh
    n_groups = row_groups(complete)
    rows = -(-batch // n_groups) * n_groups
    chip = chip or chip_here()
    rows_here = rows // n_groups
    chunk = default_chunk(config, chip, rows=rows_here)
    cache = cache_skeleton(model, rows=rows, context=context, chunk=chunk, dtype=dtype)
    all_weights, weights = _held(model, places)
    whole_cache, cached = _held(cache, cache_shardings(cache, complete))
    # What a chunk of a prompt needs at once, in float32: the scores of a layer and their
    # softmax, or the insides of its feed-forward network, and the logits.
    n = mesh.get("model", 1)
    tokens = chunk * (rows_here // math.gcd(rows_here, mesh.get("pipe", 1)))
    scores = tokens * config.n_heads * max(cache.slots)
    # Accelerators make the scores in blocks, or keep none at all.
    if chip is not None and chip.platform != "cpu":
        scores = min(scores, SCORES)
    inside = tokens * 3 * config.hidden_dim
    work = max(2 * scores, inside) // n + rows_here * 3 * config.vocab_size
    work *= jnp.dtype(jnp.float32).itemsize
    return Needs(weights, all_weights, cached, whole_cache, work, parameters, rows)


def cache_skeleton(
    model: Transformer, *, rows: int, context: int, chunk: int, dtype: DTypeLike
) -> Cache:
    """The cache that a skeleton of a model makes for prompts of so many rows and tokens,
    read in such chunks."""

    def make():
        return model.empty_cache(
            jnp.zeros(rows, jnp.int32),
            chunk=chunk,
            max_length=next_power_of_two(context),
            dtype=dtype,
        )

    return eqx.filter_eval_shape(make)


def step_bytes(
    config: ModelConfig, *, rows: int, seq_len: int, dtype: DTypeLike, recompute: bool
) -> int:
    """About how many bytes a training step of `rows` sequences needs beside weights,
    gradients and moments: what every layer keeps for the gradient, or with `recompute` what
    goes into each and all of one, and the logits of a part of the tokens."""
    tokens, itemsize = rows * seq_len, jnp.dtype(dtype).itemsize
    attended = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    kept = tokens * (6 * config.dim + 2 * attended + 4 * config.hidden_dim) * itemsize
    # Half of all pairs of tokens, as scores and as probabilities.
    keys = min(seq_len // 2, config.smallest_window or seq_len)
    kept += tokens * config.n_heads * keys * (4 + itemsize)
    whole = config.n_layers * kept
    if recompute:
        whole = config.n_layers * tokens * config.dim * itemsize + kept
    return whole + 12 * min(tokens * config.vocab_size, 2**26)


def _held(tree: PyTree, places: PyTree) -> tuple[int, int]:
    """The bytes of a tree's arrays, and those of a device's part of them."""
    leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf, _ in leaves)
    parts = ((math.prod(s.shard_shape(x.shape)), x.dtype.itemsize) for x, s in leaves)
    return whole, sum(size * itemsize for size, itemsize in parts)


def _window(config: ModelConfig) -> str:
    if config.smallest_window is None:
        return "none"
    if len(set(config.windows)) == 1:
        return f"{config.smallest_window} tokens"
    period = ", ".join("none" if w is None else str(w) for w in config.sliding_window)
    return f"{period} tokens, repeated over the layers"


def _theta(config: ModelConfig) -> str:
    theta = f"{config.rope_theta:g}"
    if config.yarn is not None:
        context = config.yarn.original_max_position_embeddings
        theta += f", stretched {config.yarn.factor:g} times from {context} tokens (YaRN)"
    if config.llama_4_scaling is not None:
        theta += f", queries scaled by {config.llama_4_scaling.beta:g} (Llama 4)"
    return theta


def _tokenizer(folder: Path, config: ModelConfig) -> str:
    try:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size)
    except FileNotFoundError:
        return "none"
    except (ValueError, ImportError) as error:
        return f"NO: {error}"
    return f"{tokenizer.path.name}, {tokenizer.vocab_size} ids"
