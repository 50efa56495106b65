"""Which files hold a model: in a folder in Mistral's own format or in Hugging Face's, or a
GGUF."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import arguments
from ..arguments import printable, say_once
from ..config import ModelConfig
from .config_json import config_from_json
from .gguf import gguf_files
from .hub import local_folder
from .llamacpp import read_gguf_config
from .params import config_from_params


MISTRAL, HUGGINGFACE, GGUF = "mistral", "huggingface", "gguf"
CONFIGS = {MISTRAL: "params.json", HUGGINGFACE: "config.json"}
# Where each format keeps its weights, the best first: one file, an index of several, or
# several without an index.
_WEIGHTS = {
    MISTRAL: (
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "consolidated-[0-9]*-of-[0-9]*.safetensors",
        "consolidated.[0-9][0-9].pth",
        "consolidated.[0-9][0-9].pt",
    ),
    HUGGINGFACE: (
        "model.safetensors",
        "model.safetensors.index.json",
        "model-[0-9]*-of-[0-9]*.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
}
_ADAPTERS = ("adapter_config.json", "adapter_model.*", "*lora*.safetensors")


def read_config(folder: str | os.PathLike) -> ModelConfig:
    """Reads and checks a folder's `params.json` or `config.json`, or a GGUF's metadata.
    Raises as [`load_model`][] does."""
    return read_config_as(*located(folder))


def read_config_as(folder: Path, format: str) -> ModelConfig:
    path = folder if format == GGUF else folder / CONFIGS[format]
    try:
        if format == GGUF:
            return read_gguf_config(path)
        content = read_json_object(path)
        # The first Mixtral's params.json has the names of a config.json.
        of_huggingface = format == HUGGINGFACE or "hidden_size" in content
        return (config_from_json if of_huggingface else config_from_params)(content)
    except ValueError as error:
        raise ValueError(printable(f"{path} cannot be used: {error}")) from error


def located(folder: str | os.PathLike) -> tuple[Path, str]:
    """Where a model is, and in which format. A GGUF file may also be named by the folder
    that holds it and no other model.

    **Raises:**

    `FileNotFoundError` if there is no model, `ValueError` if it is not clear which one.
    """
    path = local_folder(folder)
    file = gguf_in(path)
    return (path, format_of(path)) if file is None else (file, GGUF)


def gguf_in(path: Path) -> Path | None:
    """The GGUF file itself, or the only one in a folder without other weights."""
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(printable(f"There is no file {path}."))
        return path
    if any(_found(path, pattern) for known in _WEIGHTS.values() for pattern in known):
        return None
    # A vision encoder is a file of its own, and parts of a split file follow the first.
    files = [f for f in _found(path, "*.gguf") if not f.name.startswith("mmproj")]
    firsts = sorted({gguf_files(file)[0] for file in files})
    if len(firsts) > 1:
        names = ", ".join(file.name for file in firsts[:5])
        raise ValueError(printable(f"{path} holds several models: name one of {names}."))
    return firsts[0] if firsts else None


def format_of(folder: Path) -> str:
    """The format of a folder: the one whose config and weights are both there. Mistral's
    comes first: its rows need not be permuted."""
    if not folder.exists():
        raise FileNotFoundError(printable(f"There is no folder {folder}."))
    if not folder.is_dir():
        advice = "Name the folder it is in."
        if folder.suffix.lower() == ".gguf":
            advice = "The name of a GGUF must end in .gguf."
        raise FileNotFoundError(f"There is no folder {folder}: it is a file. {advice}")
    configs = [f for f in CONFIGS if (folder / CONFIGS[f]).is_file()]
    whole = [f for f in configs if any(_found(folder, pattern) for pattern in _WEIGHTS[f])]
    adapters = adapter_files(folder)
    if adapters and not whole:
        raise ValueError(
            f"{folder} holds a LoRA adapter, {adapters[0].name}, and no model. Load the "
            "model that it was trained for, with adapter=... or --adapter."
        )
    if not configs:
        raise FileNotFoundError(
            f"There is no params.json in {folder}, and no config.json. It comes with the "
            "weights: download the whole folder."
        )
    if len(whole) == 2:
        say_once(
            f"{folder} holds the weights in Mistral's and in Hugging Face's format. "
            "Mistral's are used."
        )
    return (whole or configs)[0]


def holds_weights(folder: Path) -> bool:
    """Whether a folder has the config and the weights of a model, in any format."""
    return any(
        (folder / name).is_file()
        and any(_found(folder, pattern) for pattern in _WEIGHTS[format])
        for format, name in CONFIGS.items()
    )


def adapter_files(folder: Path) -> list[Path]:
    """The files of a LoRA adapter in a folder."""
    return [file for pattern in _ADAPTERS for file in _found(folder, pattern)]


def check_no_adapter(folder: Path) -> None:
    """Raises `ValueError` if there is an adapter beside a model, because nobody has said
    whether to load the model with it or without."""
    if folder.is_dir() and (adapters := adapter_files(folder)):
        raise ValueError(
            f"{folder} holds a LoRA adapter beside the model, {adapters[0].name}: without "
            "it the model would write other text. Name the folder once more as the adapter "
            "(adapter=... or --adapter) to merge it, or move it away."
        )


def _found(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def weight_files(
    folder: Path, format: str
) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The files that hold the weights, and what their index says, if they have one."""
    for pattern in _WEIGHTS[format]:
        files = _found(folder, pattern)
        if not files:
            continue
        if pattern.endswith(".index.json"):
            return _read_index(files[0])
        if "-of-" in pattern:
            _check_count(files)
            return tuple(files), None
        for number, file in enumerate(files):
            if len(files) > 1 and f".{number:02}." not in file.name:
                raise FileNotFoundError(
                    f"{folder} lacks consolidated.{number:02}{file.suffix}, but has "
                    f"{files[-1].name}. Download the whole folder."
                )
        return tuple(files), None
    raise FileNotFoundError(
        f"There is no {_WEIGHTS[format][0]} in {folder}, nor any other weights that go "
        f"with its {CONFIGS[format]}. Download the whole folder."
    )


def _check_count(files: list[Path]) -> None:
    """Raises `FileNotFoundError` if some of the files 1 to n, as their names have it, are
    not there."""
    first, _, total = files[0].stem.rpartition("-of-")
    stem, _, digits = first.rpartition("-")
    names = {file.name for file in files}
    # More than there are files would only make the loop long.
    for number in range(1, min(int(total), len(files) + 1) + 1):
        wanted = f"{stem}-{number:0{len(digits)}}-of-{total}.safetensors"
        if wanted not in names:
            raise FileNotFoundError(
                f"{files[0].parent} lacks {wanted}, but has {files[-1].name}. Download the "
                "whole folder."
            )


def _read_index(path: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    try:
        places = read_json_object(path).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError("it has no weight_map.")
        for file in places.values():
            if not isinstance(file, str) or Path(file).name != file or len(file) > 255:
                raise ValueError(
                    f"its weight_map names {file!r}, which is no file beside it."
                )
    except ValueError as error:
        raise ValueError(printable(f"{path} cannot be used: {error}")) from error
    files = sorted(set(places.values()))
    for file in files:
        if not (path.parent / file).is_file():
            raise FileNotFoundError(
                f"{path} names {printable(file)}, which is not there. Download the whole "
                "folder."
            )
    return tuple(path.parent / file for file in files), places


def read_json_file(path: Path) -> dict[str, Any]:
    """As [`read_json_object`][], with the file's name in the error."""
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(printable(f"{path} cannot be used: {error}")) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:  # what else json raises is a ValueError
        raise ValueError("it is nested too deeply.") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must hold an object, got {arguments.shown(content)}.")
    return content
