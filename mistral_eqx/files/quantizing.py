"""Weights that become eight or four bits while they are read, or are so already."""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import numpy as np

from ..kernels.quantized import GROUP, quantized
from ..transformer import Transformer
from .weights import Index, StoredTensor


# How many rows are read and quantized at once. Tensors are read in multiples of that.
_ROWS = 256
_NAMES = {np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}
_NAMES |= {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


# The types of a GGUF that are values and scales already.
_STAYING = ({"Q8_0"}, {"Q4_0"})


def quantized_tensors(
    tensors: Mapping[str, StoredTensor], scheme: str
) -> dict[str, StoredTensor]:
    """The tensors of a model, and `values` and `scales` for the weights of every layer that
    is quantized. A model whose embeddings are its output gets an output of its own."""
    sources = {"output.weight": tensors["tok_embeddings.weight"], **tensors}
    layers = {
        name.removesuffix(".weight"): tensor
        for name, tensor in sources.items()
        if len(tensor.shape) == 2
        and not name.endswith((".gate.weight", "tok_embeddings.weight"))
    }
    # The model may stack those that differ in nothing but numbers, so they are of one kind.
    kinds = {}
    for stem, tensor in layers.items():
        kinds.setdefault(re.sub(r"\d+", "0", stem), set()).add(tensor.dtype)
    out = dict(tensors)
    for stem, tensor in layers.items():
        if kinds[re.sub(r"\d+", "0", stem)] in _STAYING:
            parts = _as_stored(tensor)
        else:
            parts = _Layer(tensor, scheme).stored()
        out[f"{stem}.values"], out[f"{stem}.scales"] = parts
    return out


def with_stored_shapes(
    model: Transformer, tensors: Mapping[str, StoredTensor]
) -> Transformer:
    """A skeleton with the values and scales that the tensors have: those of a GGUF have a
    scale for each 32 numbers."""
    dtypes = {name: dtype for dtype, name in _NAMES.items()}

    def stored(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if path[-1].name not in ("values", "scales"):
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        tensor = tensors[name.replace(".experts.", ".experts.0.")]
        shape = (*leaf.shape[:-2], *tensor.shape)
        return jax.ShapeDtypeStruct(shape, dtypes[tensor.dtype])

    return jax.tree_util.tree_map_with_path(stored, model)


def _as_stored(tensor: StoredTensor) -> tuple[StoredTensor, StoredTensor]:
    """Values and scales of a tensor in Q8_0 or Q4_0. A block is a scale and its numbers."""
    rows, width = tensor.shape[0], tensor.shape[1] // GROUP
    size = tensor.blocks.shape[1] // width
    dtype = np.dtype(np.int8 if tensor.dtype == "Q8_0" else np.uint8)

    def part(cut: slice, dtype: np.dtype) -> StoredTensor:
        each = len(range(size)[cut]) // dtype.itemsize

        def read(index: Index) -> np.ndarray:
            columns = range(width * each)[index[1]]
            first, last = columns.start // each, -(-columns.stop // each)
            raw = tensor.blocks.read((index[0], slice(first * size, last * size)))
            raw = raw.reshape(len(raw), -1, size)[..., cut]
            numbers = np.ascontiguousarray(raw).view(dtype).reshape(len(raw), -1)
            return numbers[:, columns.start - first * each :][:, : len(columns)]

        shape, name = (rows, width * each), _NAMES[dtype]
        return dataclasses.replace(tensor, dtype=name, shape=shape, read=read, blocks=None)

    return part(slice(2, size), dtype), part(slice(0, 2), np.dtype(np.float16))


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
                self._tensor,
                dtype=_NAMES[part.dtype],
                shape=part.shape,
                read=read,
                blocks=None,
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
