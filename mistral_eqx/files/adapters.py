"""LoRA adapters in files: opened in Mistral's format or in PEFT's, and merged.

Mistral's is a `lora.safetensors` under Mistral's names of the layers, with a `params.json`
whose "lora" says the scale. PEFT's is an `adapter_model.safetensors` under Hugging Face's
names, with an `adapter_config.json`. The rows of `b` are in the order that those of the
weight have in the same format.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import arguments
from ..arguments import printable, say_once
from ..config import ModelConfig
from .folders import read_json_file
from .hub import local_folder
from .huggingface import from_huggingface
from .weights import (
    NAMES,
    READABLE,
    Index,
    StoredTensor,
    open_safetensors,
    open_torch,
)
from .wrappers import text_model


# What a file of an adapter is called, in Mistral's format and in PEFT's.
LORA, ADAPTER_MODEL = "lora.safetensors", "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
# An adapter's path, several, or several with the weights to add them with.
Adapters = str | os.PathLike | Sequence[str | os.PathLike] | Mapping[Any, float]
# What an adapter_config.json may say without changing the numbers, or is read below.
_KNOWN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "megatron_core", "runtime_config", "eva_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# How `a` and `b` began does not matter, but for these, which change the base as well.
_CHANGE_BASE = re.compile(r"pissa|olora|loftq|corda|lora_ga")


@dataclasses.dataclass(frozen=True)
class Thin:
    """What an adapter adds to one weight: `scale * b @ a`."""

    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that has been opened, and whose numbers have not been read.

    **Attributes:**

    - `path`: where it is.
    - `layers`: by Mistral's names of the weights, with Mistral's rows.
    - `norms`: weights of norms that take the place of the model's.
    """

    path: Path
    layers: Mapping[str, Thin]
    norms: Mapping[str, StoredTensor]

    @property
    def matrices(self) -> list[StoredTensor]:
        """Every `a` and every `b`."""
        return [part for thin in self.layers.values() for part in (thin.a, thin.b)]


def listed(adapter: Adapters) -> list[tuple[str, float]]:
    """The paths of one or several adapters, and the weights to add them with."""
    if isinstance(adapter, str | os.PathLike):
        return [(arguments.path("adapter", adapter), 1.0)]
    what = "a path, several, or a dict from paths to weights"
    if isinstance(adapter, Mapping):
        pairs = list(adapter.items())
    else:
        pairs = [(path, 1.0) for path in arguments.items("adapter", adapter, what)]
    pairs = [
        (arguments.path("adapter", path), arguments.number("an adapter's weight", weight))
        for path, weight in pairs
    ]
    for path, weight in pairs:
        if not math.isfinite(weight):
            raise ValueError(f"The weight of {path} must be finite, got {weight}.")
    return pairs


def open_adapter(
    path: str | os.PathLike, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Adapter:
    """Opens an adapter for a model.

    **Arguments:**

    - `path`: a folder in either format, or a `lora.safetensors`.
    - `config`: of the model.
    - `shapes`: of the model's weights, by Mistral's names.

    **Raises:**

    `FileNotFoundError` if there is none; `ValueError` if it is damaged, of another model,
    or has what is not implemented, which is named.
    """
    path = local_folder(path, adapter=True)
    file = _adapter_file(path)
    open_file = open_safetensors if file.suffix == ".safetensors" else open_torch
    tensors, _ = text_model(_of_adapter(open_file(file)))
    folder = file.parent
    if (folder / PEFT_CONFIG).is_file() and is_pefts(file):
        values = read_json_file(folder / PEFT_CONFIG)
        try:
            _check_peft(values)
        except ValueError as error:
            told = f"{folder / PEFT_CONFIG} cannot be used: {error}"
            raise ValueError(printable(told)) from error
        adapter = _from_peft(path, tensors, values, config)
    else:
        adapter = _from_mistral(path, tensors, folder, file)
    _check(adapter, shapes)
    return adapter


def with_adapters(
    tensors: Mapping[str, StoredTensor], adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, StoredTensor]:
    """The tensors of a model with adapters merged into them, a slice at a time when they
    are read: `weight + sum(times * scale * b @ a)`, summed in float32."""
    out, added = dict(tensors), {}
    for adapter, times in adapters:
        for name, thin in adapter.layers.items():
            scaled = dataclasses.replace(thin, scale=times * thin.scale)
            added.setdefault(name, []).append(scaled)
        for name, norm in adapter.norms.items():
            if out[name] is not tensors[name]:
                raise ValueError(
                    f"{adapter.path} and another adapter both replace {name}: they cannot "
                    "be merged together."
                )
            out[name] = norm
    return out | {name: _merged(tensors[name], thins) for name, thins in added.items()}


def _merged(tensor: StoredTensor, thins: Sequence[Thin]) -> StoredTensor:
    def read(index: Index) -> np.ndarray:
        rows, columns = index
        total = tensor.read(index).astype(np.float32)
        for thin in thins:
            a = thin.a.read((slice(None), columns)).astype(np.float32)
            b = thin.b.read((rows, slice(None))).astype(np.float32)
            total += np.float32(thin.scale) * (b @ a)
        return total

    # A GGUF's blocks have other numbers now.
    dtype = NAMES[tensor.kept_dtype]
    return dataclasses.replace(tensor, dtype=dtype, read=read, blocks=None)


def _adapter_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(printable(f"There is no adapter {path}."))
    names = (LORA, ADAPTER_MODEL, "adapter_model.bin")
    files = [path / name for name in names if (path / name).is_file()]
    files = files or sorted(path.glob("*lora*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"There is no adapter in {path}: no {LORA} and no {ADAPTER_MODEL}."
        )
    if len(files) > 1 and files[0].name == LORA:
        raise ValueError(
            f"{path} holds two adapters, {files[0].name} and {files[1].name}: put one of "
            "them into a folder of its own."
        )
    return files[0]


def is_pefts(file: Path) -> bool:
    """Whether the name of a file with an adapter is that of PEFT's format."""
    return file.name.startswith("adapter_model.")


def _of_adapter(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Without PEFT's prefix, nor its copy of the weight of an output that it adapts."""
    return {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("lm_head.base_layer.weight")
    }


def _check_peft(values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        kind = arguments.shown(values.get("peft_type"))
        raise ValueError(f"its peft_type is {kind}. Only LORA is implemented.")
    for name, value in values.items():
        if name in _KNOWN or value in (None, False, {}, []):
            continue
        if (name, value) == ("bias", "none"):
            continue
        if name == "init_lora_weights" and not _CHANGE_BASE.match(str(value)):
            continue
        raise ValueError(
            f"it has {name} ({value!r}), which is not implemented: without it the model "
            "would write other text."
        )
    for name in ("r", "lora_alpha"):
        number = values.get(name)
        if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
            raise ValueError(f"{name} must be a number above 0, got {number!r}.")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{name} must be an object, got {arguments.shown(patterns)}.")
        for pattern, number in patterns.items():
            if not isinstance(number, int | float) or number <= 0:
                raise ValueError(f"{name} has {number!r} for {pattern!r}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} has {pattern!r}: {error}.") from error


def _from_peft(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    values: Mapping[str, Any],
    config: ModelConfig,
) -> Adapter:
    pairs = _pairs(path, tensors, {})
    scales = {}
    for module, (a, _) in pairs.items():
        rank = _by_pattern(values.get("rank_pattern"), module, values["r"])
        alpha = _by_pattern(values.get("alpha_pattern"), module, values["lora_alpha"])
        if a.shape[0] != rank:
            raise ValueError(
                f"{path / PEFT_CONFIG} says rank {rank} of {printable(module)}, which has "
                f"{a.shape[0]}. Are the files of one adapter?"
            )
        scales[module] = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    layers = {}
    for module, (a, b) in pairs.items():
        # Under the name of the weight, whose rows are those of `b`.
        ((name, b),) = from_huggingface({f"{module}.weight": b}, config).items()
        layers[name] = Thin(a, b, scales[module])
    return Adapter(path, layers, {})


def _from_mistral(
    path: Path, tensors: Mapping[str, StoredTensor], folder: Path, file: Path
) -> Adapter:
    norms = {name: t for name, t in tensors.items() if name.endswith("norm.weight")}
    pairs = _pairs(path, tensors, norms)
    params = folder / "params.json"
    section = read_json_file(params).get("lora") if params.is_file() else None
    if not isinstance(section, Mapping) or "scaling" not in section:
        say_once(f"No params.json beside {file} says its scaling, which is taken to be 2.")
        section = {"scaling": 2.0}
    scale = section["scaling"]
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"{params} says that lora's scaling is {arguments.shown(scale)}.")
    layers = {f"{stem}.weight": Thin(a, b, float(scale)) for stem, (a, b) in pairs.items()}
    return Adapter(path, layers, norms)


def _pairs(
    path: Path, tensors: Mapping[str, StoredTensor], others: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """`a` and `b` by the name of their layer in the file."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if name in others:
            continue
        match = re.fullmatch(r"(.+)\.lora_([AB])\.(default\.)?weight", name)
        if match is None:
            raise ValueError(
                printable(
                    f"{tensor.file} has {tensor.name}, which is not implemented: an "
                    "adapter may hold lora_A and lora_B of linear layers."
                )
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError(f"{path} holds no lora_A and no lora_B: it is no adapter.")
    for layer, parts in found.items():
        if len(parts) == 1:
            (there,) = parts
            lacks = "B" if there == "A" else "A"
            raise ValueError(printable(f"{path} lacks lora_{lacks} of {layer}."))
    return {layer: (parts["A"], parts["B"]) for layer, parts in found.items()}


def _by_pattern(
    patterns: Mapping[str, Any] | None, module: str, default: int | float
) -> int | float:
    """The number of the first pattern that fits the end of a module's name, as in PEFT."""
    fits = (n for key, n in (patterns or {}).items() if _fits(key, module))
    return next(fits, default)


def _fits(pattern: str, module: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _check(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    hint = "Is it an adapter for this model?"
    for name in [*adapter.layers, *adapter.norms]:
        if name not in shapes:
            raise ValueError(
                printable(f"{adapter.path} has {name}, which the model does not: {hint}")
            )
    for name, thin in adapter.layers.items():
        a, b = thin.a.shape, thin.b.shape
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shapes[name] or b[1] != a[0]:
            raise ValueError(
                f"{adapter.path} has lora_A {a} and lora_B {b} for {name}, whose shape is "
                f"{shapes[name]}: {hint}"
            )
    for name, norm in adapter.norms.items():
        if norm.shape != shapes[name]:
            raise ValueError(
                f"{adapter.path} has shape {norm.shape} for {name}, whose shape is "
                f"{shapes[name]}: {hint}"
            )
    for tensor in [*adapter.matrices, *adapter.norms.values()]:
        if tensor.dtype not in READABLE:
            raise ValueError(
                f"{tensor.file}: {tensor.name} holds numbers of type {tensor.dtype}, which "
                "cannot be read."
            )
