"""Folders and GGUF files written, from a model in memory or from another format."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike
from tqdm import tqdm

from ..arguments import in_units, say_once
from ..config import ModelConfig
from ..tokenizer import Tokenizer, load_tokenizer
from ..transformer import Transformer
from .adapters import Adapters, listed
from .atomic import check_place, whole_file, whole_folder
from .checkpoint import open_checkpoint
from .config_json import config_to_json
from .folders import CONFIGS, GGUF, HUGGINGFACE, MISTRAL, holds_weights
from .gguf import read_metadata
from .gguf_export import TYPES, GgufFile
from .gguf_tokenizer import chat_template, tokenizer_file
from .huggingface import huggingface_name, to_huggingface
from .names import model_tensors, weight_shapes
from .params import config_to_params
from .weights import (
    NAMES,
    StoredTensor,
    checked_dtype,
    common_dtype,
    write_safetensors,
)


_TEMPLATE = "chat_template.jinja"
# What is not weights but goes with them: tokenizers, and what describes one.
_TOKENIZERS = ("tokenizer.model", "tokenizer.model.v*", "tekken.json", "tokenizer.json")
_DESCRIPTIONS = (
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    _TEMPLATE,
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def save(
    model: Transformer,
    folder: str | os.PathLike,
    *,
    format: str = MISTRAL,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    companions: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> None:
    """Writes a model as safetensors, with its config, or as a GGUF.

    **Arguments:**

    - `model`: what to write.
    - `folder`: to be made. It has another name until it is whole.
    - `format`: `"mistral"` for `params.json` and one `consolidated.safetensors`,
        `"huggingface"` for `config.json` and `model*.safetensors`, which transformers
        loads, or `"gguf"` for one file that llama.cpp loads, whose name ends in `.gguf`.
    - `dtype`: of the weights in the files. By default, the model's. A GGUF may also have
        `"q8_0"` and `"q4_0"`, which are eight and four bits.
    - `max_shard_size`: the most bytes in one file of Hugging Face's format: 5e9 or "5GB".
    - `tokenizer`: a [`Tokenizer`][mistral_eqx.Tokenizer] or the path of its file, to put
        beside the weights; with the former also what describes it in its folder.
    - `companions`: other files to put into the folder, by their names.
    - `force`: whether to replace a folder with a model in it.

    **Raises:**

    `FileExistsError` if `folder` is there already: nothing is overwritten without `force`.
    `ValueError` for an unknown format or dtype, or a model that the format cannot hold.
    """
    tensors = model_tensors(model)
    if tokenizer is not None and not hasattr(tokenizer, "path"):
        tokenizer = Tokenizer(tokenizer) if format == GGUF else Path(tokenizer)
    if format == GGUF:
        _write_gguf(model.config, tensors, Path(folder), dtype, tokenizer, force=force)
        return
    write_folder(
        model.config,
        tensors,
        Path(folder),
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        companions=tokenizer_files(tokenizer) | dict(companions or {}),
        force=force,
    )


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    adapter: Adapters | None = None,
    format: str | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Writes weights in another format or dtype, their tokenizer with them. Only a small
    part of the weights is in memory at any time.

    **Arguments:**

    - `source`: a folder or a GGUF that [`load_model`][] reads.
    - `adapter`: a LoRA adapter, or several, to merge into the weights, as in `load_model`.
    - `target`, `dtype`, `max_shard_size`, `force`: see [`save`][].
    - `format`: `"mistral"`, `"huggingface"` or `"gguf"`. By default, GGUF if the name of
        `target` ends in `.gguf`, and otherwise Hugging Face's, or Mistral's if `source` is
        Hugging Face's.

    **Raises:**

    As `load_model` and `save` do.
    """
    checkpoint = open_checkpoint(source, adapter)
    checkpoint.check()
    target = Path(target)
    if format is None and target.suffix == ".gguf":
        format = GGUF
    elif format is None:
        format = MISTRAL if checkpoint.format == HUGGINGFACE else HUGGINGFACE
    adapters = [] if adapter is None else listed(adapter)
    sources = [checkpoint.folder, *(Path(path) for path, _ in adapters)]
    order = weight_shapes(checkpoint.config)
    tensors = {name: checkpoint.tensors[name] for name in order}
    if format == GGUF:
        tokenizer = _tokenizer_of(checkpoint.folder)
        options = {"force": force, "sources": sources}
        _write_gguf(checkpoint.config, tensors, target, dtype, tokenizer, **options)
        return
    write_folder(
        checkpoint.config,
        tensors,
        target,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        companions=_companions(checkpoint.folder),
        force=force,
        sources=sources,
    )


def tokenizer_files(tokenizer: Tokenizer | Path | None) -> dict[str, Path | bytes]:
    """What to write so that a tokenizer is read again, by the names of the files."""
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, Path):
        return {tokenizer.name: tokenizer}
    if tokenizer.path.suffix == ".gguf":
        return _in_metadata(tokenizer.path)
    return _found(tokenizer.path.parent, (tokenizer.path.name, *_DESCRIPTIONS))


def _found(folder: Path, patterns: Sequence[str]) -> dict[str, Path | bytes]:
    files = (file for pattern in patterns for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): file for file in files}


def _companions(source: Path) -> dict[str, Path | bytes]:
    """What goes with the weights of a folder or a GGUF, by the names of the files."""
    folder = source.parent if source.is_file() else source
    files = _found(folder, (*_TOKENIZERS, *_DESCRIPTIONS))
    if source == folder or any("token" in name or "tekken" in name for name in files):
        return files
    return _in_metadata(source)


def _in_metadata(source: Path) -> dict[str, Path | bytes]:
    """The tokenizer and the chat template of a GGUF."""
    metadata = read_metadata(source)
    if "tokenizer.ggml.tokens" not in metadata:
        return {}
    name, content = tokenizer_file(metadata, source)
    found = {name: content}
    template = chat_template(metadata)
    return found if template is None else found | {_TEMPLATE: template.encode()}


def _tokenizer_of(source: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(source)
    except FileNotFoundError:
        return None


def _write_gguf(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    target: Path,
    dtype: DTypeLike | None,
    tokenizer: Tokenizer | None,
    *,
    force: bool,
    sources: Sequence[Path] = (),
) -> None:
    if target.suffix != ".gguf":
        raise ValueError(f"The name of a GGUF must end in .gguf, got {target.name!r}.")
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder, and a GGUF is a file.")
    dtype = common_dtype(tensors.values()) if dtype is None else dtype
    kind = dtype if dtype in TYPES else NAMES[checked_dtype(dtype)].lower()
    path = None if tokenizer is None else tokenizer.path
    if path is None or path.name == "tokenizer.json":
        path = None
        say_once(
            f"{target} gets no tokenizer: there is no tokenizer.model and no tekken.json. "
            "Keep the tokenizer beside it."
        )
    template = None if tokenizer is None else tokenizer.chat_template
    file = GgufFile(config, tensors, kind, path, template)
    if jax.process_index() > 0:
        file.write(Path(os.devnull), lambda _: None)
        return
    target = _checked_target(target, force=force, sources=sources)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _room_for(target, file.size), whole_file(target) as partial:
        with tqdm(
            desc="write", total=file.size, unit="B", unit_scale=True, disable=None
        ) as bar:
            file.write(partial, bar.update)


def write_folder(
    config: ModelConfig,
    tensors: dict[str, StoredTensor],
    folder: Path,
    *,
    format: str,
    dtype: DTypeLike | None,
    companions: Mapping[str, Path | bytes],
    force: bool,
    max_shard_size: int | str = "5GB",
    sources: Sequence[Path] = (),
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Writes tensors under Mistral's names as a folder in a format. `changes` are what is
    otherwise in its config; the other arguments are those of [`save`][]."""
    # All checks come before the first byte is written.
    if format not in CONFIGS:
        raise ValueError(f"format must be mistral, huggingface or gguf, got {format!r}.")
    dtype = None if dtype is None else checked_dtype(dtype)
    sizes = {
        name: tensor.size * (tensor.kept_dtype if dtype is None else dtype).itemsize
        for name, tensor in tensors.items()
    }
    if format == HUGGINGFACE:
        stored = common_dtype(tensors.values()) if dtype is None else dtype
        content = config_to_json(config, str(stored)) | dict(changes or {})
        shards = _shards(sizes, _bytes(max_shard_size))
        new_names = {name: huggingface_name(name) for name in tensors}
        tensors = to_huggingface(tensors, config.head_dim)
    else:
        content = config_to_params(config)
        shards = {"consolidated.safetensors": list(tensors)}
        new_names = {name: name for name in tensors}
    if jax.process_index() > 0:
        # Process 0 writes. This process takes part because its devices hold some numbers.
        for names in shards.values():
            content = {new_names[name]: tensors[new_names[name]] for name in names}
            write_safetensors(Path(os.devnull), content, dtype, progress=lambda _: None)
        return
    for file in companions.values():
        if isinstance(file, Path) and not file.is_file():
            raise FileNotFoundError(f"There is no tokenizer at {file}.")
    folder = _checked_target(folder, force=force, sources=sources)
    folder.parent.mkdir(parents=True, exist_ok=True)
    total = sum(sizes.values())
    with _room_for(folder, total), whole_folder(folder) as partial:
        _write_json(partial / CONFIGS[format], content)
        for name, file in companions.items():
            content = file if isinstance(file, bytes) else file.read_bytes()
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        if format == HUGGINGFACE:
            _describe_tokenizer(partial)
        bar = tqdm(desc="write", total=total, unit="B", unit_scale=True, disable=None)
        with bar:
            for shard, names in shards.items():
                content = {new_names[name]: tensors[new_names[name]] for name in names}
                write_safetensors(partial / shard, content, dtype, progress=bar.update)
        if len(shards) > 1:
            places = {new_names[n]: file for file, names in shards.items() for n in names}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            _write_json(partial / "model.safetensors.index.json", index)


@contextlib.contextmanager
def _room_for(target: Path, size: int) -> Iterator[None]:
    """Raises `OSError` if there is no room for so many bytes, now or while they are
    written."""
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise OSError(
            f"{target} needs {in_units(size)}, and only {in_units(free)} are free."
        )
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{target} cannot be written: {os.strerror(error.errno)}. Nothing is left of "
            "it. Make room, or choose another disk."
        ) from error


def _describe_tokenizer(folder: Path) -> None:
    """Adds what transformers needs to see in a folder that it has a sentencepiece model
    which begins a text with the BOS id, unless the folder says so already."""
    models = sorted(folder.glob("tokenizer.model*"))
    if not models or (folder / "tokenizer_config.json").exists():
        return
    if not (folder / "tokenizer.model").exists():
        shutil.copyfile(models[-1], folder / "tokenizer.model")
    content = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", content)


def _checked_target(folder: Path, *, force: bool, sources: Sequence[Path]) -> Path:
    """What to write, behind symbolic links, which stay. Raises if it must not be."""
    folder = folder.resolve()
    if not folder.name:
        raise FileExistsError(f"{folder} is no place for a model: give a folder to make.")
    check_place(folder)
    if not folder.exists():
        return folder
    if not force:
        raise FileExistsError(
            f"{folder} is there already. Move it, choose another, or force it."
        )
    is_gguf = folder.suffix == ".gguf" and folder.is_file()
    if not is_gguf and not holds_weights(folder):
        raise FileExistsError(f"{folder} holds no model, and is not replaced.")
    for kept in sources:
        if kept.resolve().is_relative_to(folder):
            raise FileExistsError(f"{folder} holds what is converted, and is not replaced.")
    return folder


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Cuts a list of tensors into files of `limit` bytes, or of one larger tensor."""
    shards, size = [[]], 0
    for name, n in sizes.items():
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": names
        for i, names in enumerate(shards, 1)
    }


def _bytes(size: int | str) -> int:
    """5000000000 from "5GB"."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", str(size).strip().upper())
    number = 0 if found is None else int(float(found[1]) * units[found[2] or ""])
    if number < 1:
        raise ValueError(f'max_shard_size must be like "5GB" or "500MB", got {size!r}.')
    return number


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
