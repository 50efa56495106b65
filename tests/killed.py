"""Kills writers at random moments and looks at what they leave.

    python tests/killed.py FOLDER convert|save|train KILLS

A child writes again and again, and is killed with SIGKILL. Whatever the moment, the target
holds the old model or the new one, whole, and the next writer goes on from there and cleans
up. Prints how many times each was found.
"""

import collections
import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

import mistral_eqx as mx
from mistral_eqx.files.atomic import whole_folder
from mistral_eqx.learning.batches import Slices
from mistral_eqx.learning.fitting import fit


def write(kind: str, folder: Path) -> None:
    """Writes one model, and then the other."""
    if kind == "convert":
        for source in ("one", "two"):
            mx.convert(folder / source, folder / "out", format="mistral", force=True)
    elif kind == "save":
        for source in ("one", "two"):
            model = mx.load_model(folder / source, dtype="bfloat16")
            mx.save(model, folder / "out", force=True)
    else:
        ids = np.arange(300, dtype=np.int32) % 60
        text = Slices("the text", ids, seq_len=8, bos_id=1)
        fit(
            mx.load_model(folder / "one", dtype="float32"),
            *(text, text),
            steps=2000,
            batch_size=1,
            checkpoint=folder / "run",
            checkpoint_every=1,
        )


def state(kind: str, folder: Path) -> str:
    """What the target holds: "one", "two", "nothing" or "damaged"."""
    if kind == "train":
        files = [folder / "run", folder / "run.previous"]
        return "whole" if any(map(is_whole, files)) else "nothing"
    out = folder / "out"
    if not out.exists():
        return "nothing"
    digest = lambda f: hashlib.md5((f / "consolidated.safetensors").read_bytes()).digest()
    found = [name for name in ("one", "two") if digest(folder / name) == digest(out)]
    files = sorted(os.listdir(out))
    return found[0] if found and "params.json" in files else "damaged"


def is_whole(path: Path) -> bool:
    import zlib

    if not path.exists():
        return False
    content = path.read_bytes()
    return zlib.crc32(content[:-4]).to_bytes(4, "little") == content[-4:]


def main(folder: Path, kind: str, kills: int) -> None:
    rng, found = random.Random(0), collections.Counter()
    for i in range(kills):
        child = os.fork()
        if child == 0:
            while True:
                write(kind, folder)
        # The first is killed as soon as it has written once; the others at any time.
        until = time.monotonic() + 60
        while i == 0 and state(kind, folder) == "nothing" and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found[state(kind, folder)] += 1
    if kind == "convert":
        # What is left is no obstacle, and is gone afterwards.
        mx.convert(folder / "one", folder / "out", format="mistral", force=True)
        assert state(kind, folder) == "one"
        assert sorted(os.listdir(folder)) == ["one", "out", "two"]
    with whole_folder(folder / "lock"):
        pass
    print(*(f"{name} {n}" for name, n in sorted(found.items())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
