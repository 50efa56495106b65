"""Models by their name on Hugging Face's hub: from its cache here, or fetched."""

import os
import re
from pathlib import Path


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What goes with the weights in either format.
_BESIDE = ("*.json", "tokenizer.model*", "*.jinja")
_MISTRAL, _HUGGINGFACE = "consolidated*.safetensors", "model*.safetensors"
_PART = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_ADAPTERS = ("adapter_model.*", "*lora*.safetensors")


def local_folder(folder: str | os.PathLike, *, adapter: bool = False) -> Path:
    """The folder itself; or, if there is none and it is a name like "org/model", where the
    hub's cache has that model, or that adapter. It is fetched if it is not there, in
    Mistral's format if the hub has it so.

    **Raises:**

    `FileNotFoundError` if it is neither a folder nor in the cache, and cannot be fetched.
    """
    name = os.fspath(folder)
    if Path(name).exists() or not _NAME.fullmatch(name):
        return Path(name)
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(
            f"There is no folder {name}. To load a model of that name from Hugging Face's "
            "hub: pip install huggingface_hub."
        ) from error
    try:
        found = huggingface_hub.snapshot_download(name, local_files_only=True)
        if _is_whole(Path(found)):
            return Path(found)
    except LocalEntryNotFoundError:
        pass
    try:
        files = [Path(file) for file in huggingface_hub.list_repo_files(name)]
        has_own = any(f.match(_MISTRAL) for f in files) and Path("params.json") in files
        weights = _ADAPTERS if adapter else (_MISTRAL if has_own else _HUGGINGFACE,)
        if not any(file.match(pattern) for file in files for pattern in weights):
            raise ValueError(f"it has no {' or '.join(weights)}.")
        patterns = [*_BESIDE, *weights]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of the hub's, of HTTP's and of the network's libraries
        raise FileNotFoundError(
            f"There is no folder {name}, nor a whole model of that name in Hugging Face's "
            f"cache, and it cannot be fetched: {str(error).strip().splitlines()[0]}"
        ) from error


def _is_whole(snapshot: Path) -> bool:
    """Whether the cache has all weights: one file, or all parts of it. If they were
    interrupted on their way, `model-00001-of-00003.safetensors` may be there alone."""
    parts = [_PART.fullmatch(file.name) for file in snapshot.glob("*.safetensors")]
    totals = [int(part[1]) for part in parts if part is not None]
    return len(totals) < len(parts) or (bool(totals) and len(totals) >= max(totals))
