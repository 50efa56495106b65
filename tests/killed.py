"""Kills writers at each of their writes and looks at what they leave.

    python tests/killed.py FOLDER

FOLDER holds two models, `one` and `two`. A child kills itself with SIGKILL before it opens
a file to write, renames, makes or deletes something; and it is killed behind the first
bytes of each file. Wherever that is, the target holds the old content or the new one,
whole, nothing else of the user's has changed, and the next writer goes on from there and
cleans up. Prints for each kind of writer how many times each content was found.
"""

import collections
import os
import resource
import shutil
import signal
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

# Imported once, and not by each child.
import gguf  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx
from mistral_eqx.learning.checkpoints import read_checkpoint, write_checkpoint


STEPS = 3
# Each kind of writer, and the name of what it writes.
TARGETS = {
    "convert": "out",
    "convert-new": "out",
    "convert-gguf": "out.gguf",
    "save": "out",
    "train": "run",
}
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
NOT_REACHED = 3


def write(kind: str, source: Path, target: Path) -> None:
    """Writes a model, or the checkpoints that are left to write of a run."""
    if kind == "save":
        mx.save(mx.load_model(source, dtype="bfloat16"), target, force=True)
    elif kind == "train":
        state = read_checkpoint(target, state_after(0), {}) or state_after(0)
        for step in range(int(state["step"]), STEPS):
            write_checkpoint(target, state_after(step + 1), {})
    else:
        format = "gguf" if kind == "convert-gguf" else "mistral"
        mx.convert(source, target, format=format, force=True)


def state_after(step: int) -> dict[str, jax.Array]:
    """The step comes last in a checkpoint."""
    numbers = np.full(1000, step, np.float32)
    return {"numbers": jnp.asarray(numbers), "step": jnp.asarray(step, jnp.int32)}


def die_at(moment: int) -> Callable[[], bool]:
    """Has this process killed at a moment of its writing: the first is 0. Returns a
    function that says whether the moment has come."""
    came = 0

    def comes() -> bool:
        nonlocal came
        came += 1
        return came == moment + 1

    def watch(event: str, arguments: tuple) -> None:
        opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # The exchange of two folders is a function of the C library, which is looked up.
        exchanges = event == "ctypes.dlsym" and arguments[1].startswith("rename")
        if not (opens or exchanges or event in WRITES):
            return
        if comes():
            os.kill(os.getpid(), signal.SIGKILL)
        if opens and comes():
            # The kernel kills when a file becomes larger, which Python asks it not to do.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    sys.addaudithook(watch)
    return lambda: came > moment


def child(work: Callable[[], bool]) -> int:
    """Works in another process. Returns how that ended: with 0 if `work` returns true."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            status = 0 if work() else NOT_REACHED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def content(path: Path) -> dict[str, bytes]:
    """The files at or in a path."""
    files = [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def step_of(run: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 without one."""
    for path in (run, run.with_name("run.previous")):
        if path.exists() and len(stored := path.read_bytes()) > 4:
            if zlib.crc32(stored[:-4]).to_bytes(4, "little") == stored[-4:]:
                numbers = np.frombuffer(stored[-8:-4], np.int32)
                return int(numbers[0])
    return 0


def main(folder: Path, kind: str) -> None:
    place, before = folder / "place", folder / "before"
    target = place / TARGETS[kind]
    # What is there before, and what a writer that lives makes of it.
    place.mkdir()
    (place / "mine").write_text("mine")
    if kind not in ("convert-new", "train"):
        assert child(lambda: write(kind, folder / "one", target) or True) == 0
    shutil.copytree(place, before)
    assert child(lambda: write(kind, folder / "two", target) or True) == 0
    old, new, after = content(before / target.name), content(target), content(place)
    assert old != new

    def killed(moment: int) -> bool:
        # First it goes on from what the child before it has left, and another one that
        # had more files.
        if (partial := target.with_name(target.name + ".partial")).is_dir():
            (partial / "more").touch()
        write(kind, folder / "two", target)
        assert content(place) == after
        shutil.rmtree(place)
        shutil.copytree(before, place)
        comes = die_at(moment)
        write(kind, folder / "two", target)
        return comes()

    moment = step = 0
    found = collections.Counter()
    while (status := child(lambda: killed(moment))) != NOT_REACHED:
        # A small file is whole before the kernel kills.
        assert status in (-signal.SIGKILL, -signal.SIGXFSZ, 0), (kind, moment)
        is_new = content(target) == new
        assert is_new or status != 0, (kind, moment)
        if kind == "train":
            # What was there at an earlier moment is not lost at a later one.
            assert step <= (step := step_of(target)), moment
            found[f"step-{step}"] += 1
        else:
            assert is_new or content(target) == old, (kind, moment)
            found["new" if is_new else "old"] += 1
        assert (place / "mine").read_text() == "mine"
        moment += 1
    assert content(place) == after
    print(kind, *(f"{name} {n}" for name, n in sorted(found.items())))
    shutil.rmtree(place)
    shutil.rmtree(before)


if __name__ == "__main__":
    for kind in TARGETS:
        main(Path(sys.argv[1]), kind)
