"""`params.json`, in and out: what Mistral's own files say about a model."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..arguments import say_once
from ..config import Llama4Scaling, ModelConfig, MoEConfig, Yarn
from .wrappers import check_quantization


_OTHER_NAMES = {
    "_sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
}
# How the reference is run, not what the model is.
_WITHOUT_EFFECT = {
    *("max_batch_size", "expert_parallel", "expert_model_parallel", "n_ctx"),
    *("dtype", "torch_dtype", "name", "version", "bos_id", "eos_id", "pad_id"),
    "lora",  # what the merged weights were trained with
}
# The one value of each that this model implements, which newer files spell out.
_ONLY_VALUES = (
    ("model_type", "transformer"),
    ("activation", "silu"),
    ("use_biases", False),
    ("causal", True),
    ("num_shared_experts", 0),
    ("route_every_n", 1),
    ("tie_embeddings", False),
    ("tie_word_embeddings", False),
)


def config_from_params(params: Mapping[str, Any]) -> ModelConfig:
    """Makes a config from the content of a `params.json`.

    **Raises:**

    `ValueError` that names every missing and every unknown key, or the value that
    no model can have.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"params.json must hold an object, got {params!r}.")
    params = check_quantization(plain_numbers(params))
    # What sees the images is left on disk.
    if isinstance(params.get("vision_encoder"), Mapping):
        del params["vision_encoder"]
    for other, name in _OTHER_NAMES.items():
        if other in params:
            value = params.pop(other)
            if params.setdefault(name, value) != value:
                raise ValueError(
                    f"params.json has {other} ({value!r}) and {name} "
                    f"({params[name]!r}), which mean the same."
                )
    sections = {"yarn": Yarn, "llama_4_scaling": Llama4Scaling, "moe": MoEConfig}
    for name, section in sections.items():
        if params.get(name) is not None:
            params[name] = _from_mapping(section, params[name], f"{name} of params.json")
    window = params.get("sliding_window")
    if params.get("moe") is not None:
        # The first Mixtral files say 4096 or "4096". None was trained with a window.
        if window is not None:
            say_once(
                f"params.json has a sliding_window of {window}, which is not applied: no "
                "Mixtral was trained with one."
            )
        window = None
    elif isinstance(window, list):
        window = tuple(window)
    params["sliding_window"] = window
    return _from_mapping(ModelConfig, params, "params.json")


def config_to_params(config: ModelConfig) -> dict[str, Any]:
    """The content of a `params.json` that `config_from_params` reads back. It leaves out
    what newer models have and this one does not, for older readers."""
    params = dataclasses.asdict(config)
    optional = list(params)[list(params).index("max_position_embeddings") :]
    for name in optional:
        if not params[name]:
            del params[name]
    if config.yarn is not None and config.yarn.attention_factor is None:
        del params["yarn"]["attention_factor"]
    if config.moe is not None and config.smallest_window is not None:
        raise ValueError(
            "Mistral's format has no Mixtral with a window: its readers would ignore the "
            f"{config.smallest_window} tokens."
        )
    if isinstance(config.sliding_window, tuple):
        params["sliding_window"] = list(config.sliding_window)
    return params


def plain_numbers(value: Any) -> Any:
    """The content of a JSON file, with what can only be meant as a number as that number:
    64 for 64.0 and for "64", 1e-5 for "1e-05"."""
    if isinstance(value, list):
        return [plain_numbers(inner) for inner in value]
    if isinstance(value, Mapping):
        numbers = {key: plain_numbers(inner) for key, inner in value.items()}
        return numbers | {
            key: int(inner)
            for key, inner in numbers.items()
            if isinstance(inner, float) and inner.is_integer() and key not in _REALS
        }
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value) if set(value) & set(".eE") else int(value)
    return value


# The numbers that need not be whole.
_REALS = {
    *("norm_eps", "rms_norm_eps", "rope_theta", "factor", "alpha", "beta", "beta_fast"),
    *("beta_slow", "attention_factor", "mscale", "mscale_all_dim", "llama_4_scaling_beta"),
}
_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,30})?([eE][-+]?\d{1,3})?")


def _from_mapping(cls: type, values: Any, where: str) -> Any:
    """Makes a dataclass from a mapping with exactly its fields."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object, got {values!r}.")
    fields = dataclasses.fields(cls)
    names = {f.name for f in fields}
    without_effect = {
        key
        for key, value in values.items()
        if value is None or key in _WITHOUT_EFFECT or (key, value) in _ONLY_VALUES
    }
    missing = sorted(
        {f.name for f in fields if f.default is dataclasses.MISSING} - values.keys()
    )
    unknown = sorted(values.keys() - names - without_effect)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(unknown)}, which this model does not "
            "implement: running without it would give wrong text."
        )
    return cls(**{name: values[name] for name in names & values.keys()})
