"""A model written as a GGUF, which llama.cpp reads (extra `gguf`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..config import ModelConfig
from .gguf_tokenizer import tokenizer_metadata
from .llamacpp import config_to_gguf, gguf_name
from .weights import DTYPES, StoredTensor, converted


# The types that can be written, and what `gguf` calls a file whose most tensors are such.
TYPES = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}


class GgufFile:
    """A GGUF to be written: all that can be wrong with it is found before the first byte.

    **Attributes:** `size`, in bytes, but for the header.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, StoredTensor],
        kind: str,
        tokenizer: Path | None,
        chat_template: str | None,
    ):
        """**Arguments:**

        - `config`, `tensors`: of a model, in Mistral's names.
        - `kind`: of the matrices: one of `TYPES`. Norms and routers are always float32, and
            embeddings and the output Q8_0 in a file of Q4_0.
        - `tokenizer`: the file of a sentencepiece model or of a Tekken.
        - `chat_template`: to go with it.

        **Raises:**

        `ValueError` for what llama.cpp has no words for, or a width that has no blocks;
        `ImportError` without gguf.
        """
        self._gguf, self._kind = _import_gguf(), kind
        arch, values = config_to_gguf(config)
        self._arch, self._metadata = arch, {f"{arch}.{k}": v for k, v in values.items()}
        file_type = self._gguf.LlamaFileType[TYPES[kind]]
        self._metadata["general.file_type"] = int(file_type)
        self._metadata["general.quantization_version"] = 2
        self._metadata["tokenizer.ggml.model"] = "no_vocab"
        if tokenizer is not None:
            found = tokenizer_metadata(tokenizer, config.vocab_size)
            self._metadata |= {f"tokenizer.ggml.{k}": v for k, v in found.items()}
            if chat_template is not None:
                self._metadata["tokenizer.chat_template"] = chat_template
        self._tensors: dict[str, list[StoredTensor]] = {}
        for name, tensor in tensors.items():
            self._tensors.setdefault(gguf_name(name), []).append(tensor)
        self._kinds = {n: self._kind_of(n, t[0].shape) for n, t in self._tensors.items()}
        self.size = sum(self._size(name) for name in self._tensors)

    def write(self, path: Path, progress: Callable[[int], Any]) -> None:
        """Writes the file; `progress` is told how many bytes were added."""
        writer = self._gguf.GGUFWriter(path, self._arch)
        for key, value in self._metadata.items():
            _add(writer, key, value)
        for name, parts in self._tensors.items():
            kind = self._kinds[name]
            length, size = self._gguf.GGML_QUANT_SIZES[kind]
            shape = (*parts[0].shape[:-1], parts[0].shape[-1] // length * size)
            # The experts of a layer are one tensor.
            shape = (len(parts), *shape) if name.endswith("_exps.weight") else shape
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), self._size(name), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "ab") as file:
            for name, parts in self._tensors.items():
                file.write(bytes(-file.tell() % writer.data_alignment))
                for tensor in parts:
                    for _, piece in tensor.pieces((slice(None),) * len(tensor.shape)):
                        content = self._encoded(piece, tensor, self._kinds[name])
                        file.write(content.data)
                        progress(content.nbytes)
            file.write(bytes(-file.tell() % writer.data_alignment))

    def _kind_of(self, name: str, shape: tuple[int, ...]) -> Any:
        kinds = self._gguf.GGMLQuantizationType
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return kinds.F32
        is_outer = name in ("token_embd.weight", "output.weight")
        kind = "q8_0" if self._kind == "q4_0" and is_outer else self._kind
        kind = kinds[kind.upper()]
        length, _ = self._gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % length != 0:
            raise ValueError(
                f"{name} is {shape[-1]} wide, and {kind.name} needs a multiple of "
                f"{length}: write it as bf16 or f16."
            )
        return kind

    def _size(self, name: str) -> int:
        length, size = self._gguf.GGML_QUANT_SIZES[self._kinds[name]]
        return sum(tensor.size for tensor in self._tensors[name]) // length * size

    def _encoded(self, piece: np.ndarray, tensor: StoredTensor, kind: Any) -> np.ndarray:
        if kind.name in DTYPES:
            out = converted(piece, DTYPES[kind.name], tensor)
        else:
            out = self._gguf.quants.quantize(piece.astype(np.float32), kind)
        return np.ascontiguousarray(out).view(np.uint8)


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "A GGUF can only be written with gguf: pip install 'mistral_eqx[gguf]'."
        ) from error
    return gguf
