"""The weights in files of any format: their names, types and shapes, and any slice of them.

Nothing here knows what a Mistral looks like. A [`StoredTensor`][] is a promise: opening a
file reads its header, and numbers are read when a slice is asked for, and that slice alone.
"""

import dataclasses
import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ..arguments import printable


# The types that a model can have, by their names in safetensors.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
# Those that can be read. JAX has no float64 by default, so these numbers become float32;
# those in FP8 are read together with their scales, and become bfloat16.
READABLE = DTYPES | {
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# Those of weights that are quantized while they are read.
_SIZES = {name: dtype.itemsize for name, dtype in READABLE.items()} | {"I8": 1, "U8": 1}
_KEPT = DTYPES | {"F64": DTYPES["F32"], "F8_E4M3": DTYPES["BF16"]}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Index = tuple[slice, ...]


def checked_dtype(dtype: Any) -> np.dtype:
    """Raises `ValueError` for a dtype that weights cannot have."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in NAMES:
        raise ValueError(
            "dtype must be bfloat16, float16 or float32, got "
            f"{dtype if found is None else found}. (A GGUF may also be q8_0 or q4_0.)"
        )
    return found


# How many bytes are read at once, so that little beside the result is ever in memory.
PIECE = 2**24


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read.

    **Arguments:**

    - `file`: where it is.
    - `name`: what the file calls it.
    - `dtype`: of its numbers, in the words of safetensors: `"BF16"`.
    - `shape`: its lengths.
    - `read`: takes a slice for each axis and returns that part.
    - `blocks`: the bytes of a GGUF's blocks, of which `read` makes numbers.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    blocks: "StoredTensor | None" = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def kept_dtype(self) -> np.dtype:
        """The type of the numbers in a model that is loaded or written as it is."""
        if self.blocks is not None:
            return DTYPES["BF16"]
        return _KEPT.get(self.dtype, DTYPES["F32"])

    def pieces(self, index: Index) -> Iterator[tuple[slice, np.ndarray]]:
        """Reads the part at `index` in pieces of rows, each with its place in the part."""
        bounds = [range(n)[part] for n, part in zip(self.shape, index)]
        rows, rest = bounds[0], [len(part) for part in bounds[1:]]
        size = _SIZES.get(self.dtype, 4)
        step = max(1, PIECE // (size * int(np.prod(rest)) or 1))
        # Whole heads of up to 256 rows: they may have to be permuted.
        step = max(256, step // 256 * 256)
        for start in range(0, len(rows), step):
            place = slice(start, min(start + step, len(rows)))
            part = rows[place]
            yield place, self.read((slice(part.start, part.stop), *index[1:]))

    def array(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """Reads the part at `index` as numbers of another type."""
        shape = [len(range(n)[part]) for n, part in zip(self.shape, index)]
        out = _aligned(shape, dtype)
        self.fill(out, index)
        return out

    def fill(self, out: np.ndarray, index: Index) -> None:
        """Reads the part at `index` into an array of its shape."""
        for place, piece in self.pieces(index):
            out[place] = piece


@dataclasses.dataclass(frozen=True)
class StackedTensors:
    """Several tensors of one shape, as one with an axis before theirs."""

    tensors: tuple["StoredTensor | StackedTensors", ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.tensors), *self.tensors[0].shape)

    @property
    def size(self) -> int:
        return len(self.tensors) * self.tensors[0].size

    def array(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """Reads the part at `index` as numbers of another type."""
        out = _aligned([len(range(n)[part]) for n, part in zip(self.shape, index)], dtype)
        self.fill(out, index)
        return out

    def fill(self, out: np.ndarray, index: Index) -> None:
        """Reads the part at `index` into an array of its shape."""
        for place, tensor in zip(out, self.tensors[index[0]]):
            tensor.fill(place, index[1:])


def stack(
    tensors: Sequence[StoredTensor], shape: tuple[int, ...]
) -> StoredTensor | StackedTensors:
    """The tensors, in the order of its axes before theirs, as one of this shape."""
    if len(shape) == len(tensors[0].shape):
        return tensors[0]
    size = len(tensors) // shape[0]
    parts = (tensors[i * size : (i + 1) * size] for i in range(shape[0]))
    return StackedTensors(tuple(stack(part, shape[1:]) for part in parts))


def common_dtype(tensors: Iterable[StoredTensor]) -> np.dtype:
    """The type that holds the numbers of all tensors as they are."""
    dtypes = {tensor.kept_dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else DTYPES["F32"]


def slab(
    stacked: StoredTensor, number: int, part: int = 0, n_parts: int = 1
) -> StoredTensor:
    """One of the matrices of a stack, or one of the parts that its rows are cut into."""
    n_rows = stacked.shape[1] // n_parts

    def read(index: Index) -> np.ndarray:
        rows = range(n_rows)[index[0]]
        rows = slice(part * n_rows + rows.start, part * n_rows + rows.stop)
        return stacked.read((slice(number, number + 1), rows, *index[1:]))[0]

    shape = (n_rows, stacked.shape[2])
    return dataclasses.replace(stacked, shape=shape, read=read)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.safetensors` file, by name. Raises `ValueError` if damaged."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}
            tensors = {
                name: StoredTensor(
                    path,
                    name,
                    header.get_dtype(),
                    tuple(header.get_shape()),
                    functools.partial(_read_safetensors, path, name),
                )
                for name, header in headers.items()
            }
            if any(tensor.dtype == "F8_E4M3" for tensor in tensors.values()):
                tensors = _with_fp8(path, tensors)
            # A tensor with two names is stored once, and the metadata has the other name.
            for name, other in (file.metadata() or {}).items():
                if other in tensors:
                    tensors.setdefault(name, tensors[other])
            return tensors
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or not whole ({printable(str(error))}). Download it again."
        ) from error


def _with_fp8(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same, but that those in FP8 are read here. The library knows the type, and has no
    name for it in NumPy."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

    def read(offset: int, shape: tuple[int, ...], index: Index) -> np.ndarray:
        stored = np.memmap(path, np.uint8, "r", offset=offset, shape=shape)
        return np.array(stored[index]).view(READABLE["F8_E4M3"])

    def own(name: str, tensor: StoredTensor) -> StoredTensor:
        offset = 8 + size + header[name]["data_offsets"][0]
        return dataclasses.replace(
            tensor, read=functools.partial(read, offset, tensor.shape)
        )

    return {
        name: own(name, tensor) if tensor.dtype == "F8_E4M3" else tensor
        for name, tensor in tensors.items()
    }


def _read_safetensors(path: Path, name: str, index: Index) -> np.ndarray:
    # Opened again for each piece, because pages of an open map stay in memory once read.
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[index]


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.pth`, `.pt` or `.bin` file, by name. They stay on disk, and no
    code that the file may hold is run.

    **Raises:**

    `ImportError` without PyTorch; `ValueError` if the file is damaged, wants code to be
    run, or holds anything but tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} can only be read with PyTorch: install torch, or get the weights as "
            "safetensors."
        ) from error
    try:
        # What was saved before PyTorch 1.6 is not a zip file and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds code besides tensors, which is never run. Get "
            "the weights as safetensors from where you trust."
        ) from error
    except Exception as error:  # torch documents none of what a damaged file raises
        first_line = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged or not whole ({printable(first_line)}). Download it again."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in loaded.items()
    ):
        raise ValueError(f"{path} holds other things than named tensors.")
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    names |= {torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}

    def stored(name: str, tensor: torch.Tensor) -> StoredTensor:
        dtype = names.get(tensor.dtype, str(tensor.dtype))

        def read(index: Index) -> np.ndarray:
            # Through bytes, because torch gives NumPy no bfloat16.
            part = tensor[index].contiguous().view(torch.uint8)
            return part.numpy().view(READABLE[dtype])

        return StoredTensor(path, name, dtype, tuple(tensor.shape), read)

    return {name: stored(name, tensor) for name, tensor in loaded.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    dtype: np.dtype | None,
    *,
    progress: Callable[[int], None],
) -> None:
    """Writes a `.safetensors` file a piece at a time, where the library's own writer would
    hold all of it in memory.

    **Arguments:**

    - `path`: of the file.
    - `tensors`: by their names in it.
    - `dtype`: to convert to; `None` to keep each tensor's.
    - `progress`: is told the bytes written.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        target = tensor.kept_dtype if dtype is None else dtype
        stop = offset + tensor.size * target.itemsize
        header[name] = {
            "dtype": NAMES[target],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            target = tensor.kept_dtype if dtype is None else dtype
            for _, piece in tensor.pieces((slice(None),) * len(tensor.shape)):
                piece = np.ascontiguousarray(converted(piece, target, tensor))
                file.write(piece.view(np.uint8).data)
                progress(piece.nbytes)


def converted(piece: np.ndarray, dtype: np.dtype, tensor: StoredTensor) -> np.ndarray:
    """A piece of a tensor as numbers of another type. Raises `ValueError` if some are
    beyond its largest."""
    if piece.dtype == dtype:
        return piece
    with np.errstate(over="ignore"):
        converted = piece.astype(dtype)
    if np.isinf(converted).any() and not np.isinf(piece).any():
        largest = float(ml_dtypes.finfo(dtype).max)
        raise ValueError(
            f"{tensor.file}: {tensor.name} holds numbers beyond {dtype}'s largest, "
            f"{largest:.6g}. Convert to another dtype."
        )
    return converted


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, as XLA's do. On a CPU it becomes
    JAX's own without being copied once more."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
