"""How fast a model runs here, and how close that is to what the hardware allows."""

from .config import ModelConfig


# Shapes to measure without weights on disk. "135m" is SmolLM2-135M's, "7b" Mistral's v0.1.
SHAPES = {
    "135m": ModelConfig(
        dim=576,
        n_layers=30,
        head_dim=64,
        hidden_dim=1536,
        n_heads=9,
        n_kv_heads=3,
        norm_eps=1e-5,
        vocab_size=49152,
        rope_theta=1e4,
        tied_embeddings=True,
    ),
    "1b": ModelConfig(
        dim=2048,
        n_layers=16,
        head_dim=64,
        hidden_dim=5632,
        n_heads=32,
        n_kv_heads=8,
        norm_eps=1e-5,
        vocab_size=32000,
        rope_theta=1e4,
    ),
    "7b": ModelConfig(
        dim=4096,
        n_layers=32,
        head_dim=128,
        hidden_dim=14336,
        n_heads=32,
        n_kv_heads=8,
        norm_eps=1e-5,
        vocab_size=32000,
        rope_theta=1e4,
        sliding_window=4096,
    ),
}
