"""Folders of weights: opened, checked, loaded straight onto devices.

A folder is in Mistral's own format (`params.json`, `consolidated.*`) or in Hugging Face's
(`config.json`, `model*.safetensors`, `pytorch_model*.bin`); in a GGUF, one file is all.
Opening it gives tensors under Mistral's names that have not been read. The path of a weight
in the model is its name, so a skeleton of the model without any numbers says which arrays
it needs, and each is read straight to where it belongs.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree
from tqdm import tqdm

from .. import arguments
from ..arguments import printable, say_once
from ..config import ModelConfig
from ..devices.sharding import shardings as shardings_on
from ..devices.stages import in_stages
from ..kernels import dtypes, quantized
from ..transformer import Transformer
from .adapters import Adapters, listed, open_adapter, with_adapters
from .folders import (
    CONFIGS,
    GGUF,
    HUGGINGFACE,
    check_no_adapter,
    located,
    read_config_as,
    weight_files,
)
from .gguf import gguf_files, open_gguf
from .huggingface import from_huggingface, huggingface_name, unstack_experts
from .llamacpp import from_gguf, gguf_name
from .names import skeleton, stored_parts, weight_name, weight_shapes
from .quantizing import quantized_tensors, with_stored_shapes
from .weights import (
    READABLE,
    Index,
    StackedTensors,
    StoredTensor,
    checked_dtype,
    common_dtype,
    open_safetensors,
    open_torch,
    stack,
)
from .wrappers import dequantized, text_model


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder that has been opened, and whose numbers have not been read.

    **Attributes:**

    - `folder`: where it is. A GGUF is a file.
    - `format`: `"mistral"`, `"huggingface"` or `"gguf"`.
    - `config`: of the model.
    - `files`: that hold the weights.
    - `tensors`: by Mistral's names, with Mistral's rows.
    - `vision`: the names of the tensors of a vision encoder, which are left on disk.
    """

    folder: Path
    format: str
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    vision: tuple[str, ...] = ()

    def check(self) -> None:
        """Compares the headers with what the config needs.

        **Raises:**

        `ValueError` that names the file, the key and what to do.
        """
        config_file, config = CONFIGS.get(self.format, "metadata"), self.config
        counts = {"layers": (config.n_layers, _LAYER)}
        if config.moe is not None:
            counts["experts"] = (config.moe.num_experts, _EXPERT)
        for what, (number, pattern) in counts.items():
            inside = {m[1] for m in map(pattern.search, self.tensors) if m is not None}
            if len(inside) != number:
                raise ValueError(
                    f"{self.folder} does not fit its {config_file}: that makes {number} "
                    f"{what}, and the files hold {len(inside)}. Are they of the same "
                    "model, and all there?"
                )
        shapes = weight_shapes(self.config)
        missing = [name for name in shapes if name not in self.tensors]
        extra = [name for name in self.tensors if name not in shapes]
        if missing or extra:
            in_file = {HUGGINGFACE: huggingface_name, GGUF: gguf_name}.get(self.format, str)
            told = [
                f"{what} {printable(', '.join(map(in_file, names[:5])))}"
                + (" and more" if len(names) > 5 else "")
                for what, names in (("lacks", missing), ("has the unknown", extra))
                if names
            ]
            files = ", ".join(file.name for file in self.files)
            raise ValueError(
                f"{self.folder} does not fit its {config_file}: {files} "
                f"{' and '.join(told)} ({len(missing)} missing, {len(extra)} too many)."
                + (_WITHOUT_OUTPUT if self._has_no_output(missing) else "")
            )
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise ValueError(
                    f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but "
                    f"{config_file} makes it {shape}. Are they of the same model?"
                )
            if tensor.dtype not in READABLE and tensor.blocks is None:
                raise ValueError(
                    f"{tensor.file}: {tensor.name} holds numbers of type {tensor.dtype}. "
                    f"Only {', '.join(READABLE)} can be read: get the weights without "
                    "quantization."
                )
        if any(tensor.dtype == "F64" for tensor in self.tensors.values()):
            say_once(f"{self.folder} holds float64 numbers, which become float32.")
        if self.vision:
            say_once(
                f"{self.folder} holds a vision encoder. Its {len(self.vision)} tensors are "
                "left on disk: only the text model is loaded."
            )

    def _has_no_output(self, missing: list[str]) -> bool:
        return missing == ["output.weight"] or "embed_tokens.weight" in self.tensors

    @property
    def dtype(self) -> np.dtype:
        """The type that holds all of the numbers as they are."""
        return common_dtype(self.tensors.values())


_LAYER = re.compile(r"^layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# The names of the head, which a model with tied embeddings may or may not store.
_HEADS = {"lm_head.weight", "output.weight"}
_WITHOUT_OUTPUT = (
    " A model without an output makes vectors, with load_embedder, or labels, with "
    "load_classifier."
)


def open_checkpoint(
    folder: str | os.PathLike, adapter: Adapters | None = None
) -> Checkpoint:
    """Opens a folder in either format, without reading any weights. With an adapter, the
    tensors are those of the merged model.

    **Raises:**

    `FileNotFoundError` for a missing folder or file, `ValueError` for a damaged one.
    """
    checkpoint = _open(arguments.path("folder", folder), alone=adapter is None)
    if adapter is None:
        return checkpoint
    checkpoint.check()
    config, shapes = checkpoint.config, weight_shapes(checkpoint.config)
    adapters = [(open_adapter(p, config, shapes), times) for p, times in listed(adapter)]
    tensors = with_adapters(checkpoint.tensors, adapters)
    return dataclasses.replace(checkpoint, tensors=tensors)


def open_trunk(folder: str | os.PathLike) -> Checkpoint:
    """A folder of a model whose output is not wanted, or is none. To the model its
    embeddings are its output then."""
    return _open(arguments.path("folder", folder), trunk=True)


def _open(folder: str, *, alone: bool = True, trunk: bool = False) -> Checkpoint:
    folder, format = located(folder)
    if alone:
        check_no_adapter(folder)
    config = read_config_as(folder, format)
    if trunk:
        config = dataclasses.replace(config, tied_embeddings=True)
    if format == GGUF:
        tensors = from_gguf(open_gguf(folder))
        if trunk:
            tensors.pop("output.weight", None)
        return Checkpoint(folder, format, config, gguf_files(folder), tensors)
    files, names = weight_files(folder, format)
    tensors = {}
    for file in tqdm(files, "open", unit="file", delay=1, disable=None):
        opened = (open_safetensors if file.suffix == ".safetensors" else open_torch)(file)
        if twice := sorted(opened.keys() & tensors.keys()):
            raise ValueError(
                f"{file} and {tensors[twice[0]].file} both hold {twice[0]}. Weights split "
                "across files by their rows or columns cannot be read."
            )
        tensors |= opened
    wrong = [] if names is None else sorted(names.keys() ^ tensors.keys())
    if config.tied_embeddings:
        wrong = [name for name in wrong if name not in _HEADS]
    if wrong:
        wrong = wrong[0]
        told = (
            f"names {wrong}, which {names[wrong]} does not hold"
            if wrong in names
            else f"does not name {wrong}, which {tensors[wrong].file.name} holds"
        )
        told = printable(f"The index of {folder} {told}.")
        raise ValueError(f"{told} Download the folder again.")
    tensors, vision = text_model(dequantized(tensors))
    if format == HUGGINGFACE:
        if trunk and "embed_tokens.weight" in tensors:  # a MistralModel alone
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        tensors = from_huggingface(tensors, config)
    elif config.moe is not None:
        tensors = unstack_experts(tensors, config.moe.num_experts)
    if config.tied_embeddings:
        # Some files keep the embeddings twice, or as the head. There is one array.
        head = tensors.pop("output.weight", None)
        if head is not None:
            tensors.setdefault("tok_embeddings.weight", head)
    return Checkpoint(folder, format, config, files, tensors, tuple(vision))


def load_model(
    folder: str | os.PathLike,
    *,
    adapter: Adapters | None = None,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    mesh: Mesh | None = None,
    shardings: PyTree | None = None,
) -> Transformer:
    """Loads a model from a folder in Mistral's own format or in Hugging Face's, or from a
    GGUF file. If a folder has both formats, Mistral's is read.

    **Arguments:**

    - `folder`: holds `params.json` and `consolidated.safetensors` (or
        `consolidated.00.pth`, ...), or `config.json` and `model.safetensors` (or several
        with an index, or `pytorch_model.bin`); or the path of a GGUF file.
    - `adapter`: the folder of a LoRA adapter, in Mistral's format or in PEFT's, to merge
        into the weights while they are read; or several, or a dict from folders to the
        weights to add them with: `{"poems": 0.7, "prose": 0.3}`.
    - `dtype`: of the weights. By default they keep the file's, except on a CPU, where
        float32 is exact and is chosen if the model fits in half of the machine's memory
        that way; bfloat16 is up to twice as fast.
    - `quantize`: `"int8"` or `"int4"`, as in [`quantize`][mistral_eqx.quantize]. Each
        weight is quantized while it is read, so that no more than a part of one is in
        memory in another form. `dtype` is then that of the embeddings and of what goes
        through the model. What a GGUF holds in Q8_0 or Q4_0 stays exactly as it is.
    - `mesh`: to spread the model over as [`shard`][mistral_eqx.shard] does. Each device
        then reads its own part of the files, in every process.
    - `shardings`: instead of a mesh, a tree like the model with a `jax.sharding.Sharding`
        at each array, or one sharding for all.

    **Returns:**

    The model.

    **Raises:**

    `FileNotFoundError` for a missing folder or file; `ValueError` for one whose content
    is damaged or does not belong to the other's, or a model that is not implemented. The
    message names the file, the key and what to do.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("Give a mesh or shardings, not both.")
    if quantize is not None:
        quantized.check_scheme(quantize)
    checkpoint = open_checkpoint(folder, adapter)
    checkpoint.check()
    options = {"dtype": dtype, "quantize": quantize, "mesh": mesh}
    return load_checkpoint(checkpoint, **options, shardings=shardings)


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None,
    quantize: str | None,
    mesh: Mesh | None,
    shardings: PyTree | None = None,
) -> Transformer:
    """As [`load_model`][], from a folder that has been opened and checked."""
    config, tensors = checkpoint.config, checkpoint.tensors
    model = skeleton(config)
    if quantize is not None:
        model = eqx.filter_eval_shape(quantized.quantize, model, quantize)
        tensors = quantized_tensors(tensors, quantize)
        model = with_stored_shapes(model, tensors)
    if mesh is not None:
        model = in_stages(model, mesh)
        shardings = shardings_on(model, mesh)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = [shardings] * len(leaves)
    else:
        shardings = treedef.flatten_up_to(shardings)
    dtype = _default_dtype(checkpoint) if dtype is None else checked_dtype(dtype)
    dtype = np.dtype(dtype)
    bar = tqdm(
        desc="load",
        total=sum(leaf.size * _dtype(path, leaf, dtype).itemsize for path, leaf in leaves),
        unit="B",
        unit_scale=True,
        disable=None,
    )
    weights = []
    with bar:
        for (path, leaf), sharding in zip(leaves, shardings):
            parts = stored_parts(weight_name(path), leaf.shape, config)
            tensor = stack([tensors[part] for part in parts], leaf.shape)
            read = _read_once(tensor, _dtype(path, leaf, dtype))
            weights.append(jax.make_array_from_callback(tensor.shape, sharding, read))
            bar.update(weights[-1].size * weights[-1].dtype.itemsize)
    return jax.tree_util.tree_unflatten(treedef, weights)


def _dtype(path: tuple, leaf: jax.ShapeDtypeStruct, dtype: np.dtype) -> np.dtype:
    """That of an array of the model. Quantized weights have their own."""
    return leaf.dtype if path[-1].name in ("values", "scales") else dtype


def _read_once(
    tensor: StoredTensor | StackedTensors, dtype: np.dtype
) -> Callable[[Index], np.ndarray]:
    """Reads the parts of a tensor; what several devices hold, once."""
    parts = {}

    def read(index):
        place = tuple((part.start, part.stop) for part in index)
        if place not in parts:
            parts[place] = tensor.array(index, dtype)
        return parts[place]

    return read


def _default_dtype(checkpoint: Checkpoint) -> DTypeLike:
    n_weights = sum(tensor.size for tensor in checkpoint.tensors.values())
    return dtypes.weights_dtype(n_weights, checkpoint.dtype, dtypes.machine_memory())
