"""The weights in Hugging Face's format: other names and permuted rows, there and back.

The rows of wq and wk have another order within each head, because Mistral's rotary
embeddings turn neighbours, `(x[2i], x[2i + 1])`, and Hugging Face's turn
`(x[i], x[i + head_dim / 2])`.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from ..config import ModelConfig
from .weights import Index, StoredTensor, slab


# Mistral's names and Hugging Face's, without ".weight".
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_NAMES_IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
    "feed_forward.experts": "block_sparse_moe.experts",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def huggingface_name(name: str) -> str:
    """Hugging Face's name of a weight, from Mistral's; an unknown name stays."""
    return _translated(name, "", _NAMES, "model.", _NAMES_IN_LAYER)


def mistral_name(name: str) -> str:
    """Mistral's name of a weight, from Hugging Face's; an unknown name stays."""
    top = {there: here for here, there in _NAMES.items()}
    in_layer = {there: here for here, there in _NAMES_IN_LAYER.items()}
    return _translated(name, "model.", top, "", in_layer)


def _translated(
    name: str,
    prefix: str,
    top: Mapping[str, str],
    new_prefix: str,
    in_layer: Mapping[str, str],
) -> str:
    layer = re.fullmatch(
        re.escape(prefix) + r"(layers\.\d+\.)(.+?)((?:\.\d+\.w[123])?\.weight)", name
    )
    if layer is not None and layer[2] in in_layer:
        return f"{new_prefix}{layer[1]}{in_layer[layer[2]]}{layer[3]}"
    stem = name.removesuffix(".weight")
    return f"{top[stem]}.weight" if stem in top and stem != name else name


def to_huggingface(
    tensors: Mapping[str, StoredTensor], head_dim: int
) -> dict[str, StoredTensor]:
    """Hugging Face's names and rows for tensors with Mistral's."""
    return {
        huggingface_name(name): _permuted(tensor, (head_dim // 2, 2))
        if name.endswith((".wq.weight", ".wk.weight"))
        else tensor
        for name, tensor in tensors.items()
    }


def from_huggingface(
    tensors: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, StoredTensor]:
    """Mistral's names and rows for tensors with Hugging Face's."""
    if config.moe is not None:
        tensors = _unfused(tensors, config.moe.num_experts)
    return {
        mistral_name(name): _permuted(tensor, (2, config.head_dim // 2))
        if name.endswith((".q_proj.weight", ".k_proj.weight"))
        else tensor
        for name, tensor in tensors.items()
        # Old files keep the rotary frequencies, which follow from the config.
        if not name.endswith(".rotary_emb.inv_freq")
    }


def _permuted(tensor: StoredTensor, split: tuple[int, int]) -> StoredTensor:
    """The rows of each head, seen as a matrix of the shape `split`, transposed."""
    head_dim = split[0] * split[1]

    def read(index: Index) -> np.ndarray:
        rows = range(tensor.shape[0])[index[0]]
        # The rows wanted come from anywhere in their heads, and from no other head.
        first, last = rows.start // head_dim, -(-rows.stop // head_dim)
        whole = tensor.read((slice(first * head_dim, last * head_dim), *index[1:]))
        heads = whole.reshape(last - first, *split, -1).swapaxes(1, 2)
        heads = heads.reshape(whole.shape)
        return heads[rows.start - first * head_dim :][: len(rows)]

    return dataclasses.replace(tensor, read=read)


def _unfused(
    tensors: Mapping[str, StoredTensor], num_experts: int
) -> dict[str, StoredTensor]:
    """The names that Hugging Face's Mixtrals have had from the beginning. transformers 5
    can write its own instead, which fuse the experts of a layer, and w1 with w3 below."""
    out = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(model\.layers\.\d+\.)mlp\.(.+)", name)
        layer, rest = ("", "") if found is None else found.groups()
        moe = f"{layer}block_sparse_moe."
        fused = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}
        if rest == "gate.weight":
            out[f"{moe}gate.weight"] = tensor
        elif rest in fused and len(tensor.shape) == 3:
            parts = fused[rest]
            for expert in range(min(num_experts, tensor.shape[0])):
                for i, matrix in enumerate(parts):
                    part = slab(tensor, expert, i, len(parts))
                    out[f"{moe}experts.{expert}.{matrix}.weight"] = part
        else:
            out[name] = tensor
    return out


def unstack_experts(
    tensors: Mapping[str, StoredTensor], num_experts: int
) -> dict[str, StoredTensor]:
    """Mistral's names for those of the first Mixtral (`consolidated.00.pt` to `.07.pt`),
    which stacks the experts of a layer in one tensor for each of w1, w2 and w3, of which w2
    is transposed."""
    out = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(layers\.\d+\.)block_sparse_moe\.(w[123])", name)
        if found is None:
            name = name.replace(".block_sparse_moe.gate.", ".feed_forward.gate.")
            out[name] = tensor
            continue
        for expert in range(num_experts):
            to = f"{found[1]}feed_forward.experts.{expert}.{found[2]}.weight"
            out[to] = _expert(tensor, expert, num_experts, transposed=found[2] == "w2")
    return out


def _expert(
    stacked: StoredTensor, expert: int, num_experts: int, *, transposed: bool
) -> StoredTensor:
    rows = stacked.shape[0] // num_experts
    offset = expert * rows

    def read(index: Index) -> np.ndarray:
        if transposed:
            index = index[::-1]
        part = range(rows)[index[0]]
        part = slice(offset + part.start, offset + part.stop)
        out = stacked.read((part, *index[1:]))
        return out.T if transposed else out

    shape = (rows, *stacked.shape[1:])
    shape = shape[::-1] if transposed else shape
    return dataclasses.replace(stacked, shape=shape, read=read)
