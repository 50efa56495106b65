"""`config.json`, in and out: what Hugging Face's files say about a model."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..arguments import say_once
from ..config import Llama4Scaling, ModelConfig, MoEConfig, Yarn
from .params import plain_numbers
from .wrappers import check_quantization


_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
_OPTIONAL = {"head_dim", "n_kv_heads", "max_position_embeddings", "tied_embeddings"}
# The classes of transformers, and the window and theta that each has if config.json does
# not say.
_CLASSES = {
    "mistral": ("MistralForCausalLM", 4096, 1e4),
    "ministral": ("MinistralForCausalLM", 4096, 1e4),
    "ministral3": ("Ministral3ForCausalLM", None, None),
    "mixtral": ("MixtralForCausalLM", None, 1e6),
}
# What changes the numbers, and the values that leave them as they are here.
_NOT_IMPLEMENTED = {
    "quantization_config": ({},),
    "vision_config": ({},),
    "text_config": ({},),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
}


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Makes a config from the content of a `config.json`, as transformers 4 or 5 write it.

    **Raises:**

    `ValueError` that names what is missing, or what this model does not implement.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"config.json must hold an object, got {values!r}.")
    values = check_quantization(plain_numbers(values))
    if values.get("model_type") == "mistral3":
        values = _text_config(values)
    # The params.json of the first Mixtral is like a config.json, without a type.
    is_mixtral = "num_local_experts" in values
    model_type = values.get("model_type", "mixtral" if is_mixtral else None)
    if not isinstance(model_type, str) or model_type not in _CLASSES:
        raise ValueError(
            f"config.json has model_type {model_type!r}. Only text models of the types "
            f"{', '.join(_CLASSES)} are implemented, and none that sees or hears."
        )
    for key, harmless in _NOT_IMPLEMENTED.items():
        if values.get(key) not in (None, *harmless):
            raise ValueError(
                f"config.json has {key} ({values[key]!r}), which this model does not "
                "implement: running without it would give wrong text."
            )
    params = {
        here: values[there]
        for here, there in _KEYS.items()
        if values.get(there) is not None
    }
    if missing := sorted(_KEYS[key] for key in _KEYS.keys() - _OPTIONAL - params.keys()):
        raise ValueError(f"config.json lacks {', '.join(missing)}.")
    dim, heads = params["dim"], params["n_heads"]
    params.setdefault("n_kv_heads", heads)
    if "head_dim" not in params:
        whole = type(dim) is int and type(heads) is int and heads > 0
        params["head_dim"] = dim // heads if whole else 0
    if is_mixtral:
        per_token = values.get("num_experts_per_tok", 2)
        params["moe"] = MoEConfig(values["num_local_experts"], per_token)
    elif model_type == "mixtral":
        raise ValueError("config.json lacks num_local_experts.")
    config = ModelConfig(**params | _rope_from_json(values, model_type))
    window = _window_from_json(values, model_type, config.n_layers)
    return dataclasses.replace(config, sliding_window=window)


def _text_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `Mistral3ForConditionalGeneration` that is about the text model."""
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config must be an object, got {text!r}.")
    text = check_quantization(text)
    # The wrapper ties its own head to the text model's embeddings.
    tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return {"model_type": "mistral", **text, "tie_word_embeddings": tied}


def _rope_from_json(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """`rope_theta`, `yarn` and `llama_4_scaling`. transformers 4 writes `rope_theta` and
    `rope_scaling`, transformers 5 `rope_parameters` with all of them in."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}.")
    _, _, default = _CLASSES[model_type]
    theta = rope.get("rope_theta", values.get("rope_theta", default))
    if theta is None:
        raise ValueError("config.json lacks rope_parameters.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(
            f"config.json has rotary embeddings of the type {kind!r}. Only 'default' and "
            "'yarn' are implemented."
        )
    params = {"rope_theta": theta}
    context = _given(rope, "original_max_position_embeddings")
    context = values.get("max_position_embeddings") if context is None else context
    if kind == "yarn":
        if rope.get("truncate", True) is not True:
            raise ValueError(
                f"config.json has a yarn with truncate {rope['truncate']!r}, which this "
                "model does not implement."
            )
        yarn = Yarn(
            factor=rope.get("factor"),
            original_max_position_embeddings=context,
            beta=_given(rope, "beta_fast", 32.0),
            alpha=_given(rope, "beta_slow", 1.0),
            apply_scale=True,
        )
        params["yarn"] = _scaled(yarn, rope)
    if model_type == "ministral3" and rope.get("llama_4_scaling_beta"):
        params["llama_4_scaling"] = Llama4Scaling(context, rope["llama_4_scaling_beta"])
    return params


def _given(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value of a key; the default also where it is null."""
    value = values.get(key)
    return default if value is None else value


def _scaled(yarn: Yarn, rope: Mapping[str, Any]) -> Yarn:
    """With the factor that transformers would scale the angles' cosine and sine by."""

    def scale_of(key: str) -> float:
        mscale = rope.get(key)
        if type(mscale) not in (int, float):
            raise ValueError(f"yarn's {key} must be a number, got {mscale!r}.")
        return 0.1 * mscale * math.log(yarn.factor) + 1

    factor = rope.get("attention_factor")
    if factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        factor = scale_of("mscale") / scale_of("mscale_all_dim")
    if factor in (None, yarn.scale):
        return yarn
    if factor == 1:
        return dataclasses.replace(yarn, apply_scale=False)
    return dataclasses.replace(yarn, attention_factor=factor)


def _window_from_json(
    values: Mapping[str, Any], model_type: str, n_layers: int
) -> int | tuple[int | None, ...] | None:
    _, default, _ = _CLASSES[model_type]
    window = values.get("sliding_window", default)
    if "model_type" not in values:  # the first Mixtral; see config_from_params
        say_once(
            f"params.json has a sliding_window of {window}, which is not applied: no "
            "Mixtral was trained with one."
        )
        return None
    types = values.get("layer_types")
    if types is None:
        return window
    windows = {"sliding_attention": window, "full_attention": None}
    if (
        not isinstance(types, list)
        or len(types) != n_layers
        or not all(isinstance(t, str) and t in windows for t in types)
        or (window is None and "sliding_attention" in types)
    ):
        raise ValueError(
            f"layer_types must name {' or '.join(windows)} for each of {n_layers} layers, "
            f"and sliding_window the window of the first, got {types!r} and {window!r}."
        )
    period = next(
        n
        for n in range(1, n_layers + 1)
        if n_layers % n == 0 and types == types[:n] * (n_layers // n)
    )
    windows = tuple(windows[t] for t in types[:period])
    return windows[0] if period == 1 else windows


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` that transformers 4 and 5 read.

    **Arguments:**

    - `config`: of the model.
    - `dtype`: of its weights: `"bfloat16"`.

    **Raises:**

    `ValueError` for a model that transformers has no class for.
    """
    windows = _windows_to_json(config)
    if len(set(windows)) > 1:
        model_type = "ministral"
    elif config.yarn is not None or config.llama_4_scaling is not None:
        model_type = "ministral3"
    else:
        model_type = "mistral" if config.moe is None else "mixtral"
    architecture, _, _ = _CLASSES[model_type]
    values = {
        "architectures": [architecture],
        "model_type": model_type,
        **{there: getattr(config, here) for here, there in _KEYS.items()},
        "max_position_embeddings": _context(config),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": config.rope_theta,
        "sliding_window": max((w for w in windows if w is not None), default=None),
        "torch_dtype": dtype,
    }
    if model_type == "ministral":
        values["layer_types"] = [
            "full_attention" if window is None else "sliding_attention"
            for window in windows
        ]
    if config.moe is not None:
        values["num_local_experts"] = config.moe.num_experts
        values["num_experts_per_tok"] = config.moe.num_experts_per_tok
    if config.yarn is not None or config.llama_4_scaling is not None:
        values["rope_parameters"] = _rope_to_json(config, model_type)
    return values


def _context(config: ModelConfig) -> int:
    if config.max_position_embeddings is not None:
        return config.max_position_embeddings
    if config.yarn is not None:
        return int(config.yarn.factor * config.yarn.original_max_position_embeddings)
    return 32768


def _windows_to_json(config: ModelConfig) -> tuple[int | None, ...]:
    """The windows with one length at most. One that is as long as the longest context is no
    different from none (Ministral 8B's 131072)."""
    windows = config.windows
    if len(set(windows) - {None}) > 1:
        context = config.max_position_embeddings or 2**31
        windows = tuple(None if w is None or w >= context else w for w in windows)
    if len(set(windows) - {None}) > 1:
        raise ValueError(
            "Hugging Face's format knows one length of window and none, but the windows "
            f"of this model are {sorted(set(config.windows) - {None})}. If the longest is "
            "as long as the context, say so with max_position_embeddings in params.json."
        )
    return windows


def _rope_to_json(config: ModelConfig, model_type: str) -> dict[str, Any]:
    yarn, scaling = config.yarn, config.llama_4_scaling
    if (
        yarn is None
        or config.moe is not None
        or (scaling is not None and model_type != "ministral3")
        or (
            scaling is not None
            and scaling.original_max_position_embeddings
            != yarn.original_max_position_embeddings
        )
    ):
        raise ValueError(
            "Hugging Face's format has no class for this model: llama_4_scaling comes with "
            "a yarn of the same original_max_position_embeddings, with one window in all "
            "layers, and both without moe."
        )
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta,
        "beta_slow": yarn.alpha,
        "mscale": 1.0,
        "mscale_all_dim": 0.0 if yarn.apply_scale else 1.0,
        "attention_factor": yarn.attention_factor,
        "llama_4_scaling_beta": 0.0 if scaling is None else scaling.beta,
    }
