"""What a folder holds, told from its config and its headers. No weights are read."""

import collections
import os
from pathlib import Path

from .checkpoint import open_checkpoint
from .config import ModelConfig
from .tokenizer import check_vocabulary, load_tokenizer


# dim, n_layers, head_dim, hidden_dim, n_heads, n_kv_heads, vocab_size, then whether there
# is a window, and the experts.
_RELEASED = {
    (4096, 32, 128, 14336, 32, 8, 32000, True, None): "Mistral 7B v0.1",
    (4096, 32, 128, 14336, 32, 8, 32000, False, None): "Mistral 7B v0.2",
    (4096, 32, 128, 14336, 32, 8, 32768, False, None): "Mistral 7B v0.3, Mathstral 7B",
    (6144, 56, 128, 16384, 48, 8, 32768, False, None): "Codestral 22B, Mistral Small 22B",
    (12288, 88, 128, 28672, 96, 8, 32768, False, None): "Mistral Large 2",
    (5120, 40, 128, 14336, 32, 8, 131072, False, None): "Mistral Nemo 12B",
    (5120, 40, 128, 32768, 32, 8, 131072, False, None): "Mistral Small 24B",
    (4096, 36, 128, 12288, 32, 8, 131072, True, None): "Ministral 8B",
    (3072, 26, 128, 9216, 32, 8, 131072, False, None): "Ministral 3 3B",
    (4096, 34, 128, 14336, 32, 8, 131072, False, None): "Ministral 3 8B",
    (5120, 40, 128, 16384, 32, 8, 131072, False, None): "Ministral 3 14B",
    (4096, 32, 128, 14336, 32, 8, 32000, False, 8): "Mixtral 8x7B",
    (6144, 56, 128, 16384, 48, 8, 32000, False, 8): "Mixtral 8x22B v0.1",
    (6144, 56, 128, 16384, 48, 8, 32768, False, 8): "Mixtral 8x22B v0.3",
    (256, 6, 32, 704, 8, 2, 2048, True, None): "the tiny Mistral of mistral_eqx",
}


def variant(config: ModelConfig) -> str | None:
    """The released model that has this shape, or `None`."""
    shape = (
        config.dim,
        config.n_layers,
        config.head_dim,
        config.hidden_dim,
        config.n_heads,
        config.n_kv_heads,
        config.vocab_size,
        config.smallest_window is not None,
        None if config.moe is None else config.moe.num_experts,
    )
    return _RELEASED.get(shape)


def inspect_folder(folder: str | os.PathLike) -> dict[str, str]:
    """Describes a folder of weights, under a few headings.

    **Raises:**

    `FileNotFoundError` or `ValueError` as [`load_model`][mistral_eqx.load_model] does, but
    not for files that do not fit their config: that is part of the description.
    """
    checkpoint = open_checkpoint(folder)
    config, tensors = checkpoint.config, checkpoint.tensors
    try:
        checkpoint.check()
        agreement = "the files hold what the config says"
    except ValueError as error:
        agreement = f"NO: {error}"
    census = collections.Counter(tensor.dtype for tensor in tensors.values())
    parameters = sum(tensor.size for tensor in tensors.values())
    size = sum(file.stat().st_size for file in checkpoint.files)
    cache = 4 * config.n_layers * config.n_kv_heads * config.head_dim
    files = checkpoint.files[0].name
    if len(checkpoint.files) > 1:
        files += f" to {checkpoint.files[-1].name}"
    return {
        "model": variant(config) or "not the shape of a released Mistral",
        "format": f"{checkpoint.format}: {files}, {_bytes(size)}",
        "shape": f"{config.n_layers} layers of width {config.dim}, {config.n_heads} query "
        f"and {config.n_kv_heads} kv heads of {config.head_dim}, hidden "
        f"{config.hidden_dim}, vocabulary {config.vocab_size}"
        + (", tied embeddings" if config.tied_embeddings else "")
        + ("" if config.moe is None else f", {config.moe.num_experts} experts"),
        "parameters": f"{parameters:,}",
        "dtypes": ", ".join(f"{n} tensors {dtype}" for dtype, n in census.most_common()),
        "window": _window(config),
        "theta": _theta(config),
        "tokenizer": _tokenizer(checkpoint.folder, config),
        "memory": f"{_bytes(2 * parameters)} in bfloat16, {_bytes(4 * parameters)} in "
        f"float32, and {_bytes(cache)} or {_bytes(2 * cache)} for each token in the cache",
        "agreement": agreement,
    }


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.1f} kB"


def _window(config: ModelConfig) -> str:
    if config.smallest_window is None:
        return "none"
    if len(set(config.windows)) == 1:
        return f"{config.smallest_window} tokens"
    period = ", ".join("none" if w is None else str(w) for w in config.sliding_window)
    return f"{period} tokens, repeated over the layers"


def _theta(config: ModelConfig) -> str:
    theta = f"{config.rope_theta:g}"
    if config.yarn is not None:
        context = config.yarn.original_max_position_embeddings
        theta += f", stretched {config.yarn.factor:g} times from {context} tokens (YaRN)"
    if config.llama_4_scaling is not None:
        theta += f", queries scaled by {config.llama_4_scaling.beta:g} (Llama 4)"
    return theta


def _tokenizer(folder: Path, config: ModelConfig) -> str:
    try:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size)
    except FileNotFoundError:
        return "none"
    except (ValueError, ImportError) as error:
        return f"NO: {error}"
    return f"{tokenizer.path.name}, {tokenizer.vocab_size} ids"
