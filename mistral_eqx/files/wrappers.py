"""What today's releases put around a text model: a vision encoder, and weights in FP8."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .weights import Index, StoredTensor


# The tensors of what sees, in Mistral's files and in Hugging Face's.
_VISION = re.compile(
    r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\."
    r"|(model\.)?(vision_tower|multi_modal_projector)\."
)
# Where Hugging Face's wrappers keep the text model; the second is the older way.
_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
# The scale of a weight, in Mistral's words and in those of Hugging Face's two formats.
_SCALES = ("qscale_weight", "weight_scale_inv", "weight_scale")
# Scales of activations and of caches, which are not quantized here.
_UNUSED = re.compile(
    r".*\.(qscale_act|activation_scale|input_scale|[kv]_scale|output_scale)$"
    r"|.*fake_quantizer.*"
)


def text_model(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of the text model, under the names that they have where nothing is around
    it; and the names of those of the vision encoder."""
    text, vision = {}, []
    for name, tensor in tensors.items():
        if _VISION.match(name):
            vision.append(name)
            continue
        for prefix, instead in _PREFIXES.items():
            if name.startswith(prefix):
                name = instead + name.removeprefix(prefix)
                break
        text[name] = tensor
    return text, vision


def check_quantization(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config without what it says about weights in FP8.

    **Raises:**

    `ValueError` that names any other quantization, or two that contradict each other.
    """
    values = dict(values)
    found = {}
    for key in ("quantization", "quantization_config", "compression_config"):
        section = values.get(key)
        if isinstance(section, Mapping) and section and _is_fp8(section):
            found[key] = values.pop(key)
    methods = [section.get("quant_method", "fp8") for section in found.values()]
    if any(method != methods[0] for method in methods):
        raise ValueError(
            f"{' and '.join(found)} contradict each other: {found!r}. Only one can be true."
        )
    return values


def _is_fp8(section: Mapping[str, Any]) -> bool:
    if "qformat_weight" in section:
        return section["qformat_weight"] == "fp8_e4m3"
    if section.get("quant_method") == "fp8":
        return True
    groups = section.get("config_groups")
    if section.get("quant_method") != "compressed-tensors" or not groups:
        return False
    groups = groups.values() if isinstance(groups, Mapping) else []
    weights = [g.get("weights") if isinstance(g, Mapping) else None for g in groups]
    return all(
        isinstance(w, Mapping) and (w.get("num_bits"), w.get("type")) == (8, "float")
        for w in weights
    )


def dequantized(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with those in FP8 as what they stand for: the stored number times its
    scale. A scale is of a whole tensor, of a row, or of a block. The numbers are multiplied
    in float32 while they are read.

    **Raises:**

    `ValueError` for a tensor without a scale, or with one that does not fit it.
    """
    out = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if _UNUSED.fullmatch(name) or (last in _SCALES and f"{stem}.weight" in tensors):
            continue
        if tensor.dtype == "F8_E4M3":
            keys = [f"{stem}.{key}" for key in _SCALES if f"{stem}.{key}" in tensors]
            if last != "weight" or len(keys) != 1:
                told = "no scale" if not keys else f"{len(keys)} scales"
                raise ValueError(
                    f"{tensor.file}: {name} is in FP8 and has {told} beside it, such as "
                    f"{stem}.{_SCALES[0]}. Without the right one its numbers mean nothing."
                )
            tensor = _scaled(tensor, tensors[keys[0]])
        out[name] = tensor
    return out


def _scaled(tensor: StoredTensor, scale: StoredTensor) -> StoredTensor:
    grid = _grid(tensor, scale)
    if grid is None:
        raise ValueError(
            f"{scale.file}: {scale.name} has shape {scale.shape}, which is no scale of "
            f"{tensor.name} with shape {tensor.shape}: it must be one number, one for each "
            "row, or one for each of equal blocks."
        )

    @functools.cache
    def scales() -> np.ndarray:
        numbers = scale.read((slice(None),) * len(scale.shape))
        return np.asarray(numbers).astype(np.float32).reshape(grid)

    def read(index: Index) -> np.ndarray:
        numbers = tensor.read(index).astype(np.float32)
        # The block of every row and column that was asked for.
        blocks = [
            np.arange(n)[part] // (n // blocks)
            for n, part, blocks in zip(tensor.shape, index, grid)
        ]
        return numbers * scales()[np.ix_(*blocks)]

    return dataclasses.replace(tensor, read=read)


def _grid(tensor: StoredTensor, scale: StoredTensor) -> tuple[int, int] | None:
    """Into how many blocks the rows and the columns are cut; `None` if it cannot be."""
    if len(tensor.shape) != 2:
        return None
    grid = (1, 1) if scale.size == 1 else (*scale.shape, 1)[:2]
    if len(grid) != 2 or len(scale.shape) > 2:
        return None
    fits = all(g > 0 and n % g == 0 for n, g in zip(tensor.shape, grid))
    return grid if fits else None
