"""The shape of a model: the keys of Mistral's `params.json`, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `params.json` says about a model. Hashable, so that it can be static.

    Nothing in it says how the model is run: no dtype, no batch size, no mesh.

    **Arguments:**

    - `dim`: width of the residual stream.
    - `n_layers`: number of transformer blocks.
    - `head_dim`: width of one attention head; even, and not always `dim / n_heads`.
    - `hidden_dim`: width inside the feed-forward network.
    - `n_heads`: query heads; a multiple of `n_kv_heads`.
    - `n_kv_heads`: key and value heads, each shared by `n_heads / n_kv_heads` queries.
    - `norm_eps`: added to the mean square in RMSNorm.
    - `vocab_size`: number of token ids.
    - `rope_theta`: base of the rotary frequencies. `None` follows the released
        weights, whose oldest files do not say: 1e4 with a window, 1e6 without.
    - `sliding_window`: how many keys a query sees, itself included; `None` for all.

    **Raises:**

    `ValueError` for a combination that no model can have.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float | None = None
    sliding_window: int | None = None

    def __post_init__(self):
        if self.rope_theta is None:
            theta = 1e6 if self.sliding_window is None else 1e4
            object.__setattr__(self, "rope_theta", theta)
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            optional = name == "sliding_window" and value is None
            # `True` is an `int` in Python, and JSON has `true`.
            if not optional and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
            object.__setattr__(self, name, float(value))
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads "
                f"({self.n_kv_heads}): each kv head serves as many query heads."
            )
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"head_dim must be even, got {self.head_dim}: rotary embeddings turn "
                "pairs of features."
            )

    @staticmethod
    def from_params(params: Mapping[str, Any]) -> "ModelConfig":
        """Makes a config from the content of a `params.json`.

        **Raises:**

        `ValueError` that names every missing and every unknown key, or the value that
        no model can have.
        """
        if not isinstance(params, Mapping):
            raise ValueError(f"params.json must hold an object, got {params!r}.")
        fields = dataclasses.fields(ModelConfig)
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        missing = sorted(required - params.keys())
        unknown = sorted(params.keys() - {f.name for f in fields})
        if missing:
            raise ValueError(f"params.json lacks {', '.join(missing)}.")
        if unknown:
            raise ValueError(
                f"params.json has {', '.join(unknown)}, which this model does not "
                "implement: running without it would give wrong text."
            )
        return ModelConfig(**params)

    def to_params(self) -> dict[str, Any]:
        """The content of a `params.json` that `from_params` reads back."""
        return dataclasses.asdict(self)


_POSITIVE_INTEGERS = (
    "dim",
    "n_layers",
    "head_dim",
    "hidden_dim",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "sliding_window",
)
