"""What llama.cpp calls things: the names of a model's weights, and its config as metadata.

The rows of wq and wk are in Mistral's own order, because llama.cpp turns neighbours too.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Llama4Scaling, ModelConfig, MoEConfig, Yarn
from .gguf import read_metadata, read_shapes
from .weights import DTYPES, NAMES, StoredTensor, slab


# llama.cpp's names and Mistral's, without ".weight".
_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
}
_NAMES_IN_LAYER = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "ffn_gate_inp": "feed_forward.gate",
}
_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_STACKED = {f"{name}_exps": to for name, to in _EXPERTS.items()}

# --- weights ------------------------------------------------------------------------------


def from_gguf(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Mistral's names for tensors with llama.cpp's. An unknown name stays."""
    out = {}
    for name, tensor in tensors.items():
        layer, part, expert = _split(name)
        if part in _STACKED and len(tensor.shape) == 3:
            for i in range(min(tensor.shape[0], 1024)):
                out[_expert_name(layer, i, _STACKED[part])] = _expert(tensor, i)
        elif part in _EXPERTS and expert is not None:
            out[_expert_name(layer, expert, _EXPERTS[part])] = tensor
        elif part in _NAMES_IN_LAYER and layer is not None:
            out[f"layers.{layer}.{_NAMES_IN_LAYER[part]}.weight"] = tensor
        elif part in _NAMES and layer is None:
            out[f"{_NAMES[part]}.weight"] = tensor
        else:
            out[name] = tensor
    return _as_they_were(out)


def _expert_name(layer: str | None, expert: int | str, matrix: str) -> str:
    return f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight"


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight, from Mistral's; an unknown name stays. The experts of a
    layer are one tensor there."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if layer is None:
        names = {to: there for there, to in _NAMES.items()}
        stem = name.removesuffix(".weight")
        return f"{names[stem]}.weight" if stem in names else name
    names = {to: there for there, to in _NAMES_IN_LAYER.items()}
    names |= {f"feed_forward.experts.{w}": there for there, w in _STACKED.items()}
    part = re.sub(r"experts\.\d+\.", "experts.", layer[2])
    return f"blk.{layer[1]}.{names[part]}.weight" if part in names else name


def _split(name: str) -> tuple[str | None, str, str | None]:
    """The layer, the part and the expert that a name speaks of."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(?:\.(\d+))?\.weight", name)
    return (None, name, None) if found is None else found.groups()


def _expert(stacked: StoredTensor, expert: int) -> StoredTensor:
    out = slab(stacked, expert)
    if stacked.blocks is not None:
        out = dataclasses.replace(out, blocks=slab(stacked.blocks, expert))
    return out


def _as_they_were(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """llama.cpp keeps norms and routers in float32. If they hold numbers of the type that
    all matrices have, they were of this type before, and are again."""
    small = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype == "F32"
        and (len(tensor.shape) == 1 or name.endswith(".feed_forward.gate.weight"))
    }
    dtypes = {tensors[name].kept_dtype for name in tensors.keys() - small.keys()}
    if len(dtypes) != 1 or dtypes == {DTYPES["F32"]}:
        return dict(tensors)
    (dtype,) = dtypes

    def cast(tensor: StoredTensor) -> StoredTensor | None:
        numbers = tensor.array((slice(None),) * len(tensor.shape), DTYPES["F32"])
        with np.errstate(over="ignore"):
            cast = numbers.astype(dtype)
        if not np.array_equal(cast.astype(np.float32), numbers):
            return None
        return dataclasses.replace(
            tensor, dtype=NAMES[dtype], read=lambda index: cast[index]
        )

    found = {name: cast(tensor) for name, tensor in small.items()}
    if any(tensor is None for tensor in found.values()):
        return dict(tensors)
    return {name: found.get(name, tensor) for name, tensor in tensors.items()}


# --- config -------------------------------------------------------------------------------

# Metadata that does not change what the model computes.
_WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
# The one value of each that this model implements.
_ONLY_VALUES = {
    "attention.causal": True,
    "rope.scale_linear": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "expert_weights_norm": True,
    "expert_shared_count": 0,
    "leading_dense_block_count": 0,
}


def read_gguf_config(path: Path) -> ModelConfig:
    """The config of the model in a file. Raises `ValueError` for a damaged file, or a model
    that is not implemented."""
    return config_from_gguf(read_metadata(path), read_shapes(path))


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """Makes a config from a GGUF's metadata.

    **Arguments:**

    - `metadata`: all of it.
    - `shapes`: of the tensors, which say whether the embeddings are the output as well.

    **Raises:**

    `ValueError` that names a missing or an unknown key, or a value that no model can have.
    """
    arch = metadata.get("general.architecture")
    if arch not in ("llama", "mistral3"):
        raise ValueError(
            f"general.architecture is {arch!r}, and only llama and mistral3 are Mistrals."
        )
    table = shapes.get("token_embd.weight")
    if table is None:
        raise ValueError("it has no token_embd.weight.")
    values = {
        key.removeprefix(f"{arch}."): _plain(value)
        for key, value in metadata.items()
        if key.startswith(f"{arch}.")
    }
    values = {
        key: value
        for key, value in values.items()
        if key not in _WITHOUT_EFFECT
        and (key not in _ONLY_VALUES or value != _ONLY_VALUES[key])
    }

    def take(key: str, *default: Any) -> Any:
        if key not in values and not default:
            raise ValueError(f"it lacks {arch}.{key}.")
        return values.pop(key, *default)

    config = {
        "dim": take("embedding_length"),
        "n_layers": take("block_count"),
        "hidden_dim": take("feed_forward_length", None),
        "n_heads": take("attention.head_count"),
        "norm_eps": take("attention.layer_norm_rms_epsilon"),
        "rope_theta": take("rope.freq_base", 1e4),
        "sliding_window": take("attention.sliding_window", None) or None,
        "max_position_embeddings": take("context_length", None),
        "vocab_size": table[0],
        "tied_embeddings": "output.weight" not in shapes,
    }
    n_heads = config["n_heads"]
    config["n_kv_heads"] = take("attention.head_count_kv", n_heads)
    if not all(type(config[key]) is int and config[key] > 0 for key in ("dim", "n_heads")):
        raise ValueError(f"no model has {config['dim']} features and {n_heads} heads.")
    head_dim = take("attention.key_length", config["dim"] // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if take(key, head_dim) != head_dim:
            raise ValueError(
                f"{arch}.{key} is not the width of a head, {head_dim}, which this model "
                "does not implement."
            )
    config["head_dim"] = head_dim
    config["moe"] = _moe(take)
    config["hidden_dim"] = take("expert_feed_forward_length", config["hidden_dim"])
    config["yarn"] = _yarn(take)
    beta = take("attention.temperature_scale", None) or None
    length = take("attention.temperature_length", None)
    if beta is not None:
        if length is None and config["yarn"] is not None:
            length = config["yarn"].original_max_position_embeddings
        config["llama_4_scaling"] = Llama4Scaling(length, beta)
    if values:
        unknown = ", ".join(f"{arch}.{key}" for key in sorted(values))
        raise ValueError(
            f"it has {unknown}, which this model does not implement: running without it "
            "would give wrong text."
        )
    return ModelConfig(**config)


def _moe(take: Any) -> MoEConfig | None:
    n_experts, chosen = take("expert_count", 0), take("expert_used_count", 0)
    return None if n_experts == chosen == 0 else MoEConfig(n_experts, chosen)


def _yarn(take: Any) -> Yarn | None:
    kind, factor = take("rope.scaling.type", "none"), take("rope.scaling.factor", 1.0)
    length = take("rope.scaling.original_context_length", None)
    # Of these, llama.cpp takes 32 and 1 where a file is silent.
    beta = take("rope.scaling.yarn_beta_fast", 32.0)
    alpha = take("rope.scaling.yarn_beta_slow", 1.0)
    of_all = take("rope.scaling.yarn_log_multiplier", 0.0)
    own = take("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn") or (kind == "linear" and factor != 1):
        raise ValueError(
            f"rope.scaling.type is {kind!r} with a factor of {factor!r}, which this model "
            "does not implement."
        )
    if kind != "yarn":
        return None
    yarn = Yarn(factor, length, beta, alpha, apply_scale=of_all == 0)
    if of_all not in (0, 1) or own != 1:
        # As llama.cpp computes it.
        scale = (0.1 * math.log(factor) + 1) / (0.1 * of_all * math.log(factor) + 1)
        yarn = dataclasses.replace(yarn, apply_scale=False, attention_factor=own * scale)
    return yarn


def _plain(value: Any) -> Any:
    """A float32 as the shortest decimal number that it is: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_to_gguf(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The architecture in llama.cpp's words, and the metadata that `config_from_gguf` reads
    back, without the name of the architecture before each key.

    **Raises:**

    `ValueError` for a model that llama.cpp has no words for.
    """
    if isinstance(config.sliding_window, tuple):
        raise ValueError(
            "GGUF has no words for a model whose layers have different windows, as "
            f"{config.windows[:4]}."
        )
    values = {
        "context_length": config.max_position_embeddings or 32768,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        values["attention.sliding_window"] = config.sliding_window
    if config.moe is not None:
        values["expert_count"] = config.moe.num_experts
        values["expert_used_count"] = config.moe.num_experts_per_tok
    yarn, scaling = config.yarn, config.llama_4_scaling
    if yarn is not None:
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = yarn.factor
        length = yarn.original_max_position_embeddings
        values["rope.scaling.original_context_length"] = length
        values["rope.scaling.yarn_beta_fast"] = yarn.beta
        values["rope.scaling.yarn_beta_slow"] = yarn.alpha
        is_plain = yarn.apply_scale and yarn.attention_factor is None
        values["rope.scaling.yarn_log_multiplier"] = 0.0 if is_plain else 1.0
        if yarn.attention_factor is not None:
            values["rope.scaling.attn_factor"] = yarn.attention_factor
    if scaling is not None:
        length = scaling.original_max_position_embeddings
        if yarn is None or yarn.original_max_position_embeddings != length:
            raise ValueError(
                "GGUF has no words for a llama_4_scaling with another "
                "original_max_position_embeddings than yarn's."
            )
        values["attention.temperature_scale"] = scaling.beta
    return "llama" if yarn is None else "mistral3", values
