"""The state of a training run in a file, for a run that goes on after it was killed."""

import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..arguments import say_once
from ..devices.processes import to_host
from ..devices.sharding import place_like


class Damaged(ValueError):
    """A checkpoint that cannot be read."""


def write_checkpoint(path: Path, state: PyTree, run: dict[str, Any]) -> None:
    """Writes a checkpoint: a line of JSON with what the run is, the arrays, a checksum. The
    one before is kept as `path` with `.previous` behind its name.

    **Raises:**

    `OSError` if it cannot be written. The last good one is still there then.
    """
    partial = path.with_name(path.name + ".partial")
    # Every process has a part of the numbers, and one of them writes.
    writes = jax.process_index() == 0
    try:
        with open(partial if writes else os.devnull, "w+b") as file:
            header = {"run": run, "arrays": _shapes(state)}
            file.write(json.dumps(header).encode() + b"\n")
            for leaf in jax.tree.leaves(state):
                np.save(file, to_host(leaf), allow_pickle=False)
            if writes:
                size = file.tell()
                file.write(_checksum(file, size))
        if writes:
            if path.exists():
                path.replace(_previous(path))
            partial.replace(path)
    except OSError as error:
        if writes:
            partial.unlink(missing_ok=True)
        why = error.strerror or error
        raise OSError(
            f"The checkpoint {path} cannot be written: {why}. The last good one is kept. "
            "Make room and start the run again: it goes on from there."
        ) from error


def read_checkpoint(path: Path, like: PyTree, run: dict[str, Any]) -> PyTree | None:
    """Reads the newest checkpoint that is whole.

    **Arguments:**

    - `path`: as it was written to.
    - `like`: a state of the same run. The arrays come to where its are.
    - `run`: what the run is.

    **Returns:**

    The state; `None` if there is no checkpoint.

    **Raises:**

    `ValueError` for a checkpoint of another run, or if none is whole.
    """
    paths = [p for p in (path, _previous(path)) if p.exists()]
    for i, one in enumerate(paths):
        try:
            return place_like(_read(one, like, run), like)
        except Damaged as error:
            if i + 1 == len(paths):
                raise
            say_once(f"{error} The one before it is used.")
    return None


def _read(path: Path, like: PyTree, run: dict[str, Any]) -> PyTree:
    leaves, treedef = jax.tree.flatten(like)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size - 4
            if size < 0 or _checksum(file, size) != file.read(4):
                raise ValueError("Its checksum is another.")
            file.seek(0)
            header = json.loads(file.readline())
            stored, shapes = dict(header["run"]), header["arrays"]
            changed = sorted(name for name in run if run[name] != stored.get(name))
            fits = not changed and shapes == _shapes(like)
            arrays = [np.load(file) for _ in leaves] if fits else []
    except (ValueError, TypeError, KeyError, EOFError, RecursionError) as error:
        raise Damaged(
            f"{path} is damaged, or no checkpoint. Move it away to start anew."
        ) from error
    if changed:
        raise ValueError(
            f"{path} is a checkpoint of another run: {', '.join(changed)} changed. "
            "Go on as that run began, or move it away to start anew."
        )
    if not fits:
        raise ValueError(
            f"{path} is not a checkpoint of this run: its model or optimizer has another "
            "shape. Move it away to start anew."
        )
    # NumPy stores a bfloat16 as two bytes of no type.
    arrays = [jnp.asarray(a.view(leaf.dtype)) for a, leaf in zip(arrays, leaves)]
    return jax.tree.unflatten(treedef, arrays)


def _shapes(state: PyTree) -> list[Any]:
    return [[list(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(state)]


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Of the first bytes of a file."""
    file.seek(0)
    checksum = 0
    while size > 0 and (piece := file.read(min(size, 2**24))):
        checksum, size = zlib.crc32(piece, checksum), size - len(piece)
    return checksum.to_bytes(4, "little")
