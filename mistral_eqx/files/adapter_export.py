"""LoRA adapters in files: written in Mistral's format or in PEFT's."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..config import ModelConfig
from .adapters import ADAPTER_MODEL, LORA, PEFT_CONFIG, Thin
from .atomic import check_new, whole_folder
from .folders import MISTRAL
from .huggingface import huggingface_name, to_huggingface
from .params import config_to_params
from .weights import write_safetensors


PEFT = "peft"


def write_adapter(
    folder: Path,
    layers: Mapping[str, Thin],
    config: ModelConfig,
    *,
    format: str,
    dtype: np.dtype,
    base: str | None,
    companions: Mapping[str, bytes],
) -> None:
    """Writes an adapter.

    **Arguments:**

    - `folder`: to be made.
    - `layers`: by Mistral's names of the weights.
    - `config`: of the model that it is for.
    - `format`: `"mistral"` or `"peft"`.
    - `dtype`: of the numbers.
    - `base`: what the file calls the model that it is for.
    - `companions`: other files to put into the folder.
    """
    check_format(format)
    if format == PEFT:
        file, config_file = ADAPTER_MODEL, PEFT_CONFIG
        content = _peft_config(layers, config, base)
        b_s = to_huggingface({n: thin.b for n, thin in layers.items()}, config.head_dim)
        prefix = "base_model.model."
    else:
        file, config_file, prefix = LORA, "params.json", ""
        content, layers = _mistral_config(layers, config)
        b_s = {name: thin.b for name, thin in layers.items()}
    tensors = {}
    for (there, b), thin in zip(b_s.items(), layers.values()):
        stem = prefix + there.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": thin.a, f"{stem}.lora_B.weight": b}
    if jax.process_index() > 0:
        # Process 0 writes. This process takes part because its devices hold some numbers.
        write_safetensors(Path(os.devnull), tensors, dtype, progress=lambda _: None)
        return
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as partial:
        (partial / config_file).write_text(json.dumps(content, indent=4) + "\n")
        write_safetensors(partial / file, tensors, dtype, progress=lambda _: None)
        for name, companion in companions.items():
            (partial / name).write_bytes(companion)


def check_format(format: str) -> None:
    """Raises `ValueError` for what is no format of adapters."""
    if format not in (MISTRAL, PEFT):
        raise ValueError(
            f'An adapter\'s format must be "mistral" or "peft", got {format!r}.'
        )


def _peft_config(
    layers: Mapping[str, Thin], config: ModelConfig, base: str | None
) -> dict[str, Any]:
    modules = {huggingface_name(n).removesuffix(".weight"): t for n, t in layers.items()}
    ranks = {module: thin.a.shape[0] for module, thin in modules.items()}
    # PEFT scales by alpha / r.
    alphas = {module: thin.scale * ranks[module] for module, thin in modules.items()}
    most = lambda values: max(set(values), key=list(values).count)
    rank, alpha = most(ranks.values()), most(alphas.values())
    ends = {module.rpartition(".")[2] for module in modules}
    n_layers = config.n_layers * (1 if config.moe is None else config.moe.num_experts)
    everywhere = all(
        sum(module.endswith(f".{end}") for module in modules) in (config.n_layers, n_layers)
        for end in ends
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(ends if everywhere else modules),
        "rank_pattern": {m: n for m, n in ranks.items() if n != rank},
        "alpha_pattern": {m: n for m, n in alphas.items() if n != alpha},
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _mistral_config(
    layers: Mapping[str, Thin], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, Thin]]:
    """The content of params.json, and the layers with the one scale that it says."""
    scale = next(iter(layers.values())).scale

    def scaled(thin: Thin) -> Thin:
        if thin.scale == scale:
            return thin
        factor = np.float32(thin.scale / scale)
        read = lambda index: factor * thin.b.read(index).astype(np.float32)
        return Thin(thin.a, dataclasses.replace(thin.b, dtype="F32", read=read), scale)

    rank = max(thin.a.shape[0] for thin in layers.values())
    lora = {"enable": True, "rank": rank, "dropout": 0.0, "scaling": scale}
    scaled_layers = {name: scaled(thin) for name, thin in layers.items()}
    return config_to_params(config) | {"lora": lora}, scaled_layers
