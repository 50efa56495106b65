"""Looks at the disk before each step of a writer: that is what a kill there would leave.

    python tests/killed.py FOLDER convert|save|train

Python tells of every file that is opened, renamed, made or removed. Before each of these
the folder is copied. Every copy must hold the old model or the new one, whole; the next
writer goes on from there, and leaves what the first one left. Prints how many copies hold
which.
"""

import collections
import ctypes  # noqa: F401  before it is listened to
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mistral_eqx as mx
from mistral_eqx.learning.batches import Slices
from mistral_eqx.learning.fitting import fit


# Folders are exchanged by a function of the system's library, which is looked up first.
STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"}
# What the target holds, in the order in which a writer makes it so.
STATES = {"convert": ("one", "two"), "save": ("one", "two"), "train": ("nothing", "whole")}


class Moments:
    """Copies of a folder, made before every step while this is a context."""

    def __init__(self, folder: Path):
        self._folder, self._listens = folder, False
        self.copies: list[Path] = []
        sys.addaudithook(self._see)  # it cannot be taken away

    def __enter__(self) -> "Moments":
        self._listens = True
        return self

    def __exit__(self, *error: Any) -> None:
        self._listens = False

    def _see(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if self._listens and (event in STEPS or writes):
            self._listens = False
            copy = self._folder.with_name(f"{self._folder.name}-{len(self.copies)}")
            self.copies.append(shutil.copytree(self._folder, copy))
            self._listens = True


def write(kind: str, folder: Path) -> list[np.ndarray]:
    """Writes the second model over the first, or trains. Returns the numbers."""
    if kind == "convert":
        mx.convert(folder / "two", folder / "out", format="mistral", force=True)
    elif kind == "save":
        mx.save(mx.load_model(folder / "two", dtype="bfloat16"), folder / "out", force=True)
    else:
        ids = np.arange(300, dtype=np.int32) % 60
        text = Slices("the text", ids, seq_len=8, bos_id=1)
        model = fit(
            mx.load_model(folder / "one", dtype="float32"),
            text,
            None,
            steps=2,
            batch_size=1,
            checkpoint=folder / "run",
            checkpoint_every=1,
        )
        return list(map(np.asarray, jax.tree.leaves(model)))
    return list(map(np.asarray, jax.tree.leaves(mx.load_model(folder / "out"))))


def state(kind: str, folder: Path) -> str:
    """One of the `STATES`, or "damaged"."""
    if kind == "train":
        files = [folder / "run", folder / "run.previous"]
        return "whole" if any(map(is_whole, files)) else "nothing"
    digests = {name: digest(folder / name) for name in ("one", "two", "out")}
    same = [name for name in ("one", "two") if digests[name] == digests["out"]]
    return same[0] if same else "damaged"


def digest(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, by their names."""
    files = folder.iterdir() if folder.exists() else ()
    return {file.name: hashlib.md5(file.read_bytes()).digest() for file in files}


def is_whole(path: Path) -> bool:
    import zlib

    if not path.exists():
        return False
    content = path.read_bytes()
    return zlib.crc32(content[:-4]).to_bytes(4, "little") == content[-4:]


def main(folder: Path, kind: str) -> None:
    if kind != "train":
        mx.convert(folder / "one", folder / "out", format="mistral")
    with Moments(folder) as moments:
        expected = write(kind, folder)
    found = [state(kind, copy) for copy in moments.copies]
    # First the old, then the new, and never the old again.
    assert found == sorted(found, key=STATES[kind].index), found
    for copy in moments.copies:
        for ours, theirs in zip(write(kind, copy), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert sorted(os.listdir(copy)) == sorted(os.listdir(folder)), copy
        shutil.rmtree(copy)
    counts = collections.Counter(found)
    print(*(f"{name} {counts[name]}" for name in STATES[kind]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
