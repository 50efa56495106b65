"""`params.json`, in and out: what Mistral's own files say about a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import Llama4Scaling, ModelConfig, MoEConfig, Yarn


_OTHER_NAMES = {
    "_sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
}
# How the reference is run, not what the model is.
_WITHOUT_EFFECT = {"max_batch_size", "expert_parallel", "expert_model_parallel"}
# The one value of each that this model implements, which newer files spell out.
_ONLY_VALUES = (
    ("model_type", "transformer"),
    ("activation", "silu"),
    ("use_biases", False),
    ("causal", True),
    ("num_shared_experts", 0),
    ("route_every_n", 1),
)


def config_from_params(params: Mapping[str, Any]) -> ModelConfig:
    """Makes a config from the content of a `params.json`.

    **Raises:**

    `ValueError` that names every missing and every unknown key, or the value that
    no model can have.
    """
    if not isinstance(params, Mapping):
        raise ValueError(f"params.json must hold an object, got {params!r}.")
    params = dict(params)
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
        window = None
    elif isinstance(window, str) and window.isdecimal():
        window = int(window)
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
    if isinstance(config.sliding_window, tuple):
        params["sliding_window"] = list(config.sliding_window)
    return params


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
