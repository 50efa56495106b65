"""Weights that become eight or four bits while they are read."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np

from ..kernels.quantized import quantized
from .weights import Index, StoredTensor


# How many rows are read and quantized at once. Tensors are read in multiples of that.
_ROWS = 256
_NAMES = {np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}
_NAMES |= {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


def quantized_tensors(
    tensors: Mapping[str, StoredTensor], scheme: str
) -> dict[str, StoredTensor]:
    """The tensors of a model, and `values` and `scales` for the weights of every layer that
    is quantized. A model whose embeddings are its output gets an output of its own."""
    out = dict(tensors)
    sources = {"output.weight": tensors["tok_embeddings.weight"], **tensors}
    for name, tensor in sources.items():
        stem = name.removesuffix(".weight")
        if len(tensor.shape) == 2 and not stem.endswith((".gate", "tok_embeddings")):
            layer = _Layer(tensor, scheme)
            out[f"{stem}.values"], out[f"{stem}.scales"] = layer.stored()
    return out


class _Layer:
    """Values and scales of one weight. The scales are kept from when the values are read
    until they are read themselves, so that the file is read once."""

    def __init__(self, tensor: StoredTensor, scheme: str):
        self._tensor, self._scales = tensor, {}
        self._quantize = jax.jit(functools.partial(quantized, scheme=scheme))

    def stored(self) -> tuple[StoredTensor, StoredTensor]:
        shape = jax.ShapeDtypeStruct(self._tensor.shape, np.float32)
        reads = (self._read_values, self._read_scales)
        return tuple(
            dataclasses.replace(
                self._tensor, dtype=_NAMES[part.dtype], shape=part.shape, read=read
            )
            for part, read in zip(jax.eval_shape(self._quantize, shape), reads)
        )

    def _read_values(self, index: Index) -> np.ndarray:
        return self._cut([self._made(i)[0] for i in self._blocks(index)], index)

    def _read_scales(self, index: Index) -> np.ndarray:
        # Another device may have asked for them before.
        blocks = self._blocks(index)
        kept = {i: self._scales.pop(i, None) for i in blocks}
        scales = [self._made(i)[1] if kept[i] is None else kept[i] for i in blocks]
        return self._cut(scales, index)

    def _blocks(self, index: Index) -> range:
        """The numbers of the blocks that hold the rows asked for."""
        rows = range(self._tensor.shape[0])[index[0]]
        return range(rows.start // _ROWS, -(-rows.stop // _ROWS))

    def _made(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(block * _ROWS, min((block + 1) * _ROWS, self._tensor.shape[0]))
        weight = self._tensor.array((rows, slice(None)), np.dtype(np.float32))
        values, scales = map(np.asarray, self._quantize(weight))
        self._scales[block] = scales
        return values, scales

    def _cut(self, blocks: list[np.ndarray], index: Index) -> np.ndarray:
        rows = range(self._tensor.shape[0])[index[0]]
        first = rows.start // _ROWS * _ROWS
        return np.concatenate(blocks)[rows.start - first : rows.stop - first, index[1]]
