"""Models whose layers have an adapter: from an adapter's files, and to files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .. import arguments
from ..devices.sharding import settled
from ..learning.lora import (
    LoRALinear,
    has_lora,
    linear_layers,
    replace_layers,
    weight_shape,
)
from .adapter_export import PEFT, check_format, write_adapter
from .adapters import Thin, is_pefts, open_adapter
from .checkpoint import open_checkpoint
from .folders import MISTRAL
from .names import stored_array, stored_parts, weight_shapes
from .weights import common_dtype


Model = TypeVar("Model", bound=eqx.Module)


def load_adapter(model: Model, folder: str | os.PathLike) -> Model:
    """A model with an adapter beside its weights, which stay as they are: to train it
    further, or where the weights are quantized. To merge an adapter while a model is loaded
    is `load(..., adapter=folder)`.

    **Arguments:**

    - `model`: a [`Transformer`][mistral_eqx.Transformer]. It stays as it is.
    - `folder`: of the adapter, in Mistral's format or in PEFT's.

    **Raises:**

    As `load` does; `ValueError` also for a model that has an adapter already.
    """
    if has_lora(model):
        raise ValueError("The model has an adapter already: merge it first.")
    config = model.config
    path = arguments.path("folder", folder)
    adapter = open_adapter(path, config, weight_shapes(config))
    if adapter.norms:
        raise ValueError(
            f"{adapter.path} replaces norms too, and can only be merged: give it to load "
            "as adapter=..."
        )

    def with_thin(name: str, layer: Any) -> Any:
        shape = weight_shape(layer)
        parts = stored_parts(f"{name}.weight", shape, config)
        thins = [adapter.layers[part] for part in parts if part in adapter.layers]
        if not thins:
            return layer
        rank, scale = max(thin.a.shape[0] for thin in thins), thins[0].scale
        *stack, n_out, n_in = shape
        a = np.zeros((*stack, rank, n_in), np.float32)
        b = np.zeros((*stack, n_out, rank), np.float32)
        for part, index in parts.items():
            if (thin := adapter.layers.get(part)) is not None:
                whole = (slice(None), slice(None))
                n = thin.a.shape[0]
                a[index][:n] = thin.a.read(whole)
                # The layers of a stack have one scale.
                b[index][:, :n] = thin.b.read(whole).astype(np.float32) * (
                    thin.scale / scale
                )
        return LoRALinear(layer, jnp.asarray(a), jnp.asarray(b), scale)

    return settled(replace_layers(model, with_thin))


def save_adapter(
    model: eqx.Module,
    folder: str | os.PathLike,
    *,
    format: str = PEFT,
    dtype: DTypeLike | None = None,
    base: str | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the adapter of a model, and not the model.

    **Arguments:**

    - `model`: that has been through [`add_lora`][mistral_eqx.add_lora].
    - `folder`: to be made.
    - `format`: `"peft"` for `adapter_model.safetensors` and `adapter_config.json`, which
        PEFT, vLLM and others load, or `"mistral"` for `lora.safetensors` and `params.json`,
        which mistral-inference does.
    - `dtype`: of the numbers; by default float32 for PEFT, and the model's for Mistral,
        whose readers want it so.
    - `base`: what the files call the model that the adapter is for.
    - `companions`: other files to put into the folder, by their names.

    **Raises:**

    `FileExistsError` if `folder` is there already; `ValueError` for a model without an
    adapter, or another format.
    """
    check_format(format)
    layers = {n: v for n, v in linear_layers(model) if isinstance(v, LoRALinear)}
    if not layers:
        raise ValueError("The model has no adapter: save it with save.")
    thins = {}
    for name, layer in layers.items():
        shape = weight_shape(layer.base)
        for part, first in stored_parts(f"{name}.weight", shape, model.config).items():
            a, b = (stored_array(part, matrix, first) for matrix in (layer.a, layer.b))
            thins[part] = Thin(a, b, layer.scale)
    if dtype is None:
        dtype = jnp.float32 if format == PEFT else model.dtype
    write_adapter(
        Path(arguments.path("folder", folder)),
        thins,
        model.config,
        format=format,
        dtype=np.dtype(dtype),
        base=base,
        companions=companions or {},
    )


def convert_adapter(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    model: str | os.PathLike,
    format: str | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes an adapter in the other format.

    **Arguments:**

    - `source`: the folder of an adapter.
    - `target`: the folder to make.
    - `model`: the folder of the model that the adapter is for.
    - `format`: `"peft"` or `"mistral"`; by default the one that it is not in.
    - `dtype`: of the numbers; by default as they are.

    **Raises:**

    As `load` and [`save_adapter`][] do.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    adapter = open_adapter(source, config, weight_shapes(config))
    if adapter.norms:
        raise ValueError(f"{adapter.path} replaces norms, which PEFT's format cannot.")
    if format is None:
        format = MISTRAL if is_pefts(adapter.matrices[0].file) else PEFT
    if dtype is None:
        dtype = common_dtype(adapter.matrices)
    write_adapter(
        Path(arguments.path("target", target)),
        adapter.layers,
        config,
        format=format,
        dtype=np.dtype(dtype),
        base=str(model),
        companions={},
    )
