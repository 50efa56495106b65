"""GGUF files, as llama.cpp has them: metadata, and tensors that have not been read.

Nothing here knows what a Mistral looks like. A file has a header, a list of keys with
values of any type, a list of tensors, and their numbers, which lie in blocks of one row:
one number in float32, 32 or 256 of them in fewer bits. The format is described in ggml's
`docs/gguf.md`; what the blocks mean is left to the `gguf` library (extra `gguf`).
"""

import dataclasses
import functools
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..arguments import printable
from .weights import Index, StoredTensor


# The types whose numbers NumPy has, by GGUF's ids.
_PLAIN = {
    0: ("F32", np.dtype(np.float32)),
    1: ("F16", np.dtype(np.float16)),
    28: ("F64", np.dtype(np.float64)),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
# Values in the metadata by the ids of their types: two are of any length.
_STRING, _ARRAY = 8, 9
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# More than any model has, so that a spoilt number makes no long loop.
_MOST = 2**16


@dataclasses.dataclass(frozen=True)
class Block:
    """How the numbers of a type are stored.

    **Attributes:**

    - `name`: "Q8_0".
    - `length`: how many numbers a block has.
    - `size`: its bytes.
    - `decode`: from whole blocks to numbers, along the last axis.
    """

    name: str
    length: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The file, or all files of a model that is split, of which it is one. Raises
    `FileNotFoundError` if one is missing."""
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return (path,)
    stem, _, total = found.groups()
    numbers = range(1, min(int(total), _MOST) + 1)
    files = [path.with_name(f"{stem}-{i:05}-of-{total}.gguf") for i in numbers]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                printable(f"{path.parent} lacks {file.name}, but has {path.name}. ")
                + "Download all parts."
            )
    return tuple(files)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file, or of the first of several. Raises `ValueError` if the file
    is damaged."""
    return _header(gguf_files(path)[0])[0]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, by their names. Raises as `open_gguf` does."""
    infos = [info for file in gguf_files(path) for info in _header(file)[1].items()]
    return {name: shape for name, (shape, _, _) in infos}


def open_gguf(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of all files of a model that is split, by name. Those in
    fewer bits become float32 while they are read.

    **Raises:**

    `ValueError` for a damaged file or a type that is not known, `ImportError` for numbers
    that only `gguf` can read, if it is not installed.
    """
    tensors = {}
    for file in gguf_files(path):
        metadata, infos, start = _header(file)
        for name, (shape, kind, offset) in infos.items():
            if name in tensors:
                raise ValueError(
                    printable(f"{file} and {tensors[name].file} both hold {name}.")
                )
            block = _block(file, name, kind)
            tensors[name] = _tensor(file, name, shape, block, start + offset)
    return tensors


def _tensor(
    path: Path, name: str, shape: tuple[int, ...], block: Block, offset: int
) -> StoredTensor:
    if shape[-1] % block.length != 0:
        raise ValueError(
            printable(
                f"{path} is damaged: {name} has rows of {shape[-1]} numbers, which are no "
                f"whole blocks of {block.name}."
            )
        )
    stored = (*shape[:-1], shape[-1] // block.length * block.size)
    # Python's integers: these come from a header, and may be of any size.
    size = 1
    for length in stored:
        size *= length
    if offset + size > path.stat().st_size:
        raise ValueError(
            printable(f"{path} is damaged or not whole: it ends before {name} does. ")
            + "Download it again."
        )

    def read_blocks(index: Index) -> np.ndarray:
        content = np.memmap(path, np.uint8, "r", offset=offset, shape=stored)
        return np.ascontiguousarray(content[index])

    def read(index: Index) -> np.ndarray:
        columns = range(shape[-1])[index[-1]]
        first, last = columns.start // block.length, -(-columns.stop // block.length)
        part = slice(first * block.size, last * block.size)
        numbers = block.decode(read_blocks((*index[:-1], part)))
        skipped = columns.start - first * block.length
        return numbers[..., skipped : skipped + len(columns)]

    blocks = None
    if block.length > 1:
        blocks = StoredTensor(path, name, "U8", stored, read_blocks)
    return StoredTensor(path, name, block.name, shape, read, blocks)


def _block(path: Path, name: str, kind: int) -> Block:
    if kind in _PLAIN:
        label, dtype = _PLAIN[kind]
        return Block(label, 1, dtype.itemsize, lambda blocks: blocks.view(dtype))
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"{path} holds quantized numbers, which can only be read with gguf: "
            "pip install 'mistral_eqx[gguf]'."
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(kind)
        length, size = gguf.GGML_QUANT_SIZES[kind]
        decode = functools.partial(gguf.quants.dequantize, qtype=kind)
        decode(np.zeros((1, size), np.uint8))
    except (ValueError, KeyError, NotImplementedError) as error:
        label = kind.name if isinstance(kind, gguf.GGMLQuantizationType) else kind
        raise ValueError(
            printable(f"{path}: {name} holds numbers of type {label}, ")
            + "which the gguf library cannot read. Get the model in another type."
        ) from error
    return Block(kind.name, length, size, decode)


# --- headers ------------------------------------------------------------------------------

Header = tuple[Mapping[str, Any], Mapping[str, tuple[tuple[int, ...], int, int]], int]


def _header(path: Path) -> Header:
    """The metadata; the shape, the type and the offset of each tensor, by its name; and
    where the offsets begin."""
    if not path.is_file():
        raise FileNotFoundError(printable(f"There is no file {path}."))
    told = path.stat()
    return _read_header(path, told.st_mtime_ns, told.st_size)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, changed: int, size: int) -> Header:
    if size < 24:
        raise ValueError(printable(f"{path} is not a GGUF file: it has {size} bytes."))
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _Reader(content).header()
            except (ValueError, struct.error, RecursionError) as error:
                raise ValueError(
                    printable(f"{path} is damaged or not a GGUF file: {error} ")
                    + "Download it again."
                ) from error


class _Reader:
    """Reads field after field, and nothing beyond the end of the file."""

    def __init__(self, content: mmap.mmap):
        self._content, self._place = content, 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF.")
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 can be read.")
        n_tensors, n_values = self._number("Q"), self._number("Q")
        if max(n_tensors, n_values) > _MOST:
            raise ValueError(f"it claims {n_tensors} tensors and {n_values} values.")
        metadata = self._named(n_values, lambda: self._value(self._number("I")))
        tensors = self._named(n_tensors, self._info)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"its general.alignment is {alignment!r}.")
        return metadata, tensors, -(-self._place // alignment) * alignment

    def _named(self, n: int, read: Callable[[], Any]) -> dict[str, Any]:
        values = {}
        for _ in range(n):
            name = self._text()
            if name in values:
                raise ValueError(f"it has {name} twice.")
            values[name] = read()
        return values

    def _info(self) -> tuple[tuple[int, ...], int, int]:
        n_axes = self._number("I")
        if not 1 <= n_axes <= 4:
            raise ValueError(f"a tensor has {n_axes} axes.")
        # The innermost axis comes first.
        shape = tuple(self._number("Q") for _ in range(n_axes))[::-1]
        if 0 in shape:
            raise ValueError(f"a tensor has the shape {shape}.")
        return shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"a value has the type {kind}.")
        inner, n = self._number("I"), self._number("Q")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner]).newbyteorder("<")
            return np.frombuffer(self._bytes(n * dtype.itemsize), dtype).tolist()
        if n > len(self._content) - self._place:
            raise ValueError(f"it claims a list of {n} values.")
        return [self._value(inner, depth + 1) for _ in range(n)]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _number(self, kind: str) -> Any:
        size = struct.calcsize("<" + kind)
        return struct.unpack("<" + kind, self._bytes(size))[0]

    def _bytes(self, n: int) -> bytes:
        if n > len(self._content) - self._place:
            raise ValueError("it ends in the middle of its header.")
        self._place += n
        return self._content[self._place - n : self._place]
