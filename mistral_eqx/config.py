"""The shape of a model, with the names of Mistral's `params.json`."""

import dataclasses
import math

from .arguments import check_flag, check_integer, check_number, is_positive_integer


# The most layers, and the most experts: several times what any model has. They are counted
# one by one, long before any weight is read.
_MOST = 1024


@dataclasses.dataclass(frozen=True)
class Yarn:
    """How rotary frequencies are stretched for contexts longer than those trained on.
    YaRN (arXiv 2309.00071).

    **Arguments:**

    - `factor`: how many times longer.
    - `original_max_position_embeddings`: the context trained on, in tokens.
    - `beta`: pairs that turn more often than this within that context are left alone.
    - `alpha`: pairs that turn less often than this are slowed down by `factor`; between
        the two, by something between.
    - `apply_scale`: whether the angles' cosine and sine are also scaled, by
        `0.1 * log(factor) + 1`.
    - `attention_factor`: scales them by this instead.
    """

    factor: float
    original_max_position_embeddings: int
    beta: float
    alpha: float
    apply_scale: bool
    attention_factor: float | None = None

    def __post_init__(self):
        check_integer("yarn.original_max_position_embeddings", self)
        for name in ("factor", "beta", "alpha"):
            check_number(f"yarn.{name}", self)
        if self.factor < 1 or self.beta <= self.alpha:
            raise ValueError(
                "yarn.factor must be 1 or more and yarn.beta greater than yarn.alpha, got "
                f"{self.factor}, {self.beta} and {self.alpha}."
            )
        check_flag("yarn.apply_scale", self)
        if self.attention_factor is not None:
            check_number("yarn.attention_factor", self)

    @property
    def scale(self) -> float:
        """What the angles' cosine and sine are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.apply_scale else 1.0


@dataclasses.dataclass(frozen=True)
class Llama4Scaling:
    """Multiplies the query at position `p` by
    `1 + beta * log(1 + floor(p / original_max_position_embeddings))`, so that attention
    stays decided among many keys."""

    original_max_position_embeddings: int
    beta: float

    def __post_init__(self):
        check_integer("llama_4_scaling.original_max_position_embeddings", self)
        check_number("llama_4_scaling.beta", self)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A sparse mixture of experts in place of every feed-forward network.

    **Arguments:**

    - `num_experts`: how many there are.
    - `num_experts_per_tok`: how many of them each token goes through.
    """

    num_experts: int
    num_experts_per_tok: int

    def __post_init__(self):
        for name in ("num_experts", "num_experts_per_tok"):
            check_integer(f"moe.{name}", self, _MOST)
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"moe.num_experts_per_tok ({self.num_experts_per_tok}) must not be more "
                f"than moe.num_experts ({self.num_experts})."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `params.json` says about a model. Hashable, so that it can be static.

    Nothing in it says how the model is run: no dtype, no batch size, no mesh.

    **Arguments:**

    - `dim`: width of the residual stream.
    - `n_layers`: number of transformer blocks.
    - `head_dim`: width of one attention head; even, and not always `dim / n_heads`.
    - `hidden_dim`: width inside the feed-forward network, or inside each expert.
    - `n_heads`: query heads; a multiple of `n_kv_heads`.
    - `n_kv_heads`: key and value heads, each shared by `n_heads / n_kv_heads` queries.
    - `norm_eps`: added to the mean square in RMSNorm.
    - `vocab_size`: number of token ids.
    - `rope_theta`: base of the rotary frequencies. `None` follows the released
        weights, whose oldest files do not say: 1e4 with a window, 1e6 without.
    - `sliding_window`: how many keys a query sees, itself included; `None` for all. A
        tuple of these is repeated over the layers, as in Ministral 8B.
    - `max_position_embeddings`: the longest context trained for, in tokens. Nothing here
        depends on it; other programs want to know.
    - `tied_embeddings`: whether the logits are products with the embeddings themselves.
    - `yarn`, `llama_4_scaling`: how long contexts are treated; see [`Yarn`][] and
        [`Llama4Scaling`][].
    - `moe`: the experts of a Mixtral; see [`MoEConfig`][].

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
    sliding_window: int | tuple[int | None, ...] | None = None
    max_position_embeddings: int | None = None
    tied_embeddings: bool = False
    yarn: Yarn | None = None
    llama_4_scaling: Llama4Scaling | None = None
    moe: MoEConfig | None = None

    def __post_init__(self):
        if self.rope_theta is None:
            theta = 1e6 if self.sliding_window is None else 1e4
            object.__setattr__(self, "rope_theta", theta)
        sizes = ("dim", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size")
        for name in sizes:
            check_integer(name, self)
        check_integer("n_layers", self, _MOST)
        if self.max_position_embeddings is not None:
            check_integer("max_position_embeddings", self)
        for name in ("norm_eps", "rope_theta"):
            check_number(name, self)
        check_flag("tied_embeddings", self)
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
        if self.yarn is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for yarn, got {self.rope_theta}.")
        period = self._window_period
        if not period or not all(w is None or is_positive_integer(w) for w in period):
            raise ValueError(
                "sliding_window must be a positive integer, null, or a list of these (in "
                f"Python: None, a tuple), got {self.sliding_window!r}."
            )
        if self.n_layers % len(period) != 0:
            raise ValueError(
                f"sliding_window has {len(period)} entries, which cannot be repeated over "
                f"{self.n_layers} layers."
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many keys a query sees in each layer; `None` for all."""
        return self._window_period * (self.n_layers // len(self._window_period))

    @property
    def smallest_window(self) -> int | None:
        """The smallest of `windows`; `None` if no layer has one."""
        return min((w for w in self.windows if w is not None), default=None)

    @property
    def _window_period(self) -> tuple[int | None, ...]:
        window = self.sliding_window
        return window if isinstance(window, tuple) else (window,)
