"""The arrays of a model under the names that Mistral's files have for them.

The path of a weight in the model is its name, but for what the model stacks: the experts of
a layer, and the layers of stages.
"""

import functools
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike

from ..config import ModelConfig
from ..devices.processes import to_host
from ..kernels.quantized import is_quantized
from ..learning.lora import has_lora
from ..transformer import Transformer
from .weights import NAMES, StoredTensor


_STAGED = re.compile(r"layers\.blocks\.(\d+)\.(.*)")


@functools.lru_cache(maxsize=16)
def skeleton(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Transformer:
    """The model without any numbers: every array is a shape and a dtype."""
    return eqx.filter_eval_shape(Transformer, config, dtype=dtype, key=jr.key(0))


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every weight, as Mistral's files have them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(skeleton(config))
    return {
        name: leaf.shape[len(index) :]
        for path, leaf in leaves
        for name, index in stored_parts(weight_name(path), leaf.shape, config).items()
    }


def weight_name(path: tuple) -> str:
    """The name of a weight in Mistral's files, from its path in the model:
    `.layers[0].attention.wq.weight` is `layers.0.attention.wq.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def stored_parts(
    name: str, shape: tuple[int, ...], config: ModelConfig
) -> dict[str, tuple[int, ...]]:
    """The names in Mistral's files of what is one array in the model, and the index of each
    in it: itself, or slices, since the model stacks the experts of a layer, and the layers
    of stages."""
    parts = {name: ()}
    if (staged := _STAGED.match(name)) is not None:
        first, size = int(staged[1]), config.n_layers // shape[0]
        numbers = [(stage, first + stage * size) for stage in range(shape[0])]
        parts = {f"layers.{n}.{staged[2]}": (stage,) for stage, n in numbers}
    if ".experts." in name:
        parts = {
            part.replace(".experts.", f".experts.{expert}."): (*index, expert)
            for part, index in parts.items()
            for expert in range(config.moe.num_experts)
        }
    return parts


def stored_array(name: str, array: jax.Array, first: tuple[int, ...]) -> StoredTensor:
    """What is at an index in an array of a model, as if it were in a file."""
    kind = NAMES.get(array.dtype, str(array.dtype))
    read = lambda index: to_host(array[(*first, *index)])
    shape = array.shape[len(first) :]
    return StoredTensor(Path("the model"), name, kind, shape, read)


def model_tensors(model: Transformer) -> dict[str, StoredTensor]:
    """The weights of a model under Mistral's names, as if they were in a file. Raises
    `ValueError` for a model with quantized weights, or with an adapter."""
    if is_quantized(model):
        raise ValueError(
            "A quantized model cannot be saved: no format has its numbers. Save the "
            "model that it was made from, and quantize it when it is loaded."
        )
    if has_lora(model):
        raise ValueError(
            "The model has an adapter. Merge it first, with merge_lora, or save the "
            "adapter alone, with save_adapter."
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    # What the model stacks is written one by one.
    return {
        name: stored_array(name, leaf, first)
        for path, leaf in leaves
        for name, first in stored_parts(weight_name(path), leaf.shape, model.config).items()
    }
