"""The shapes of the models that Mistral has released, and of three small ones."""

from typing import Any

from ..config import Llama4Scaling, ModelConfig, MoEConfig, Yarn


def _shape(
    dim: int, n_layers: int, hidden_dim: int, vocab_size: int, **more: Any
) -> ModelConfig:
    heads = {"head_dim": 128, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5}
    sizes = {"dim": dim, "n_layers": n_layers, "hidden_dim": hidden_dim}
    return ModelConfig(**heads | sizes | {"vocab_size": vocab_size} | more)


_EXPERTS = {"moe": MoEConfig(num_experts=8, num_experts_per_tok=2)}
_LONG = {
    "yarn": Yarn(16.0, 16384, beta=32.0, alpha=1.0, apply_scale=False),
    "llama_4_scaling": Llama4Scaling(16384, beta=0.1),
    "max_position_embeddings": 262144,
}
# The layers of Ministral 8B see all, or the last 32k tokens, in turns of four.
_TURNS = {"sliding_window": (131072, 32768, 32768, 32768), "rope_theta": 1e8}

RELEASED = {
    "mistral-7b-v0.1": _shape(4096, 32, 14336, 32000, sliding_window=4096),
    "mistral-7b-v0.2": _shape(4096, 32, 14336, 32000),
    "mistral-7b-v0.3": _shape(4096, 32, 14336, 32768),
    "mathstral-7b": _shape(4096, 32, 14336, 32768),
    "mixtral-8x7b": _shape(4096, 32, 14336, 32000, **_EXPERTS),
    "mixtral-8x22b-v0.1": _shape(6144, 56, 16384, 32000, n_heads=48, **_EXPERTS),
    "mixtral-8x22b-v0.3": _shape(6144, 56, 16384, 32768, n_heads=48, **_EXPERTS),
    "codestral-22b": _shape(6144, 56, 16384, 32768, n_heads=48),
    "mistral-small-22b": _shape(6144, 56, 16384, 32768, n_heads=48),
    "mistral-large-2": _shape(12288, 88, 28672, 32768, n_heads=96),
    "mistral-nemo-12b": _shape(5120, 40, 14336, 131072),
    "mistral-small-24b": _shape(5120, 40, 32768, 131072, rope_theta=1e8),
    "ministral-8b": _shape(4096, 36, 12288, 131072, **_TURNS),
    "ministral-3-3b": _shape(3072, 26, 9216, 131072, tied_embeddings=True, **_LONG),
    "ministral-3-8b": _shape(4096, 34, 14336, 131072, **_LONG),
    "ministral-3-14b": _shape(5120, 40, 16384, 131072, **_LONG),
    # Small ones: the model of this package, SmolLM2-135M, and a shape of a billion weights.
    "tiny-mistral": _shape(
        *(256, 6, 704, 2048), n_heads=8, n_kv_heads=2, head_dim=32, sliding_window=64
    ),
    "135m": _shape(
        *(576, 30, 1536, 49152),
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        rope_theta=1e4,
        tied_embeddings=True,
    ),
    "1b": _shape(2048, 16, 5632, 32000, head_dim=64, rope_theta=1e4),
}


def names_of(config: ModelConfig) -> list[str]:
    """The models in `RELEASED` whose weights have the shapes of this config's, and that
    have a window, experts and a vocabulary as it does."""

    def shape(c: ModelConfig) -> tuple:
        sizes = (c.dim, c.n_layers, c.head_dim, c.hidden_dim, c.n_heads, c.n_kv_heads)
        experts = None if c.moe is None else c.moe.num_experts
        return (*sizes, c.vocab_size, c.smallest_window is not None, experts)

    return [name for name, other in RELEASED.items() if shape(other) == shape(config)]
