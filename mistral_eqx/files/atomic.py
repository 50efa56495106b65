"""Folders and files that are whole or not there, with one writer at a time."""

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_new(target: Path) -> None:
    """Raises `OSError` unless something new can be made at `target`."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already. Move it, or choose another.")
    check_place(target)


def check_place(target: Path) -> None:
    """Raises `OSError` if nothing can be made at `target`, whatever is there."""
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{above} is a file: {target} cannot be made in it.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{above} cannot be written to, so {target} cannot be made.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder, if it is not there, and keeps other processes out of this function
    with the same folder. The lock ends with the process, however that ends. A folder that
    is empty in the end is not left behind.

    **Raises:**

    `FileExistsError` if another process is inside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not folder.exists() or not os.path.samestat(
                os.stat(folder), os.fstat(descriptor)
            )
        except BlockingIOError:
            taken = True
        except OSError:  # some network drives have no locks
            taken = False
        if taken:
            raise FileExistsError(
                f"Another process is writing to {folder} now. Wait until it is done, or "
                "write elsewhere."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it holds something, or has moved
                folder.rmdir()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder, which becomes `target` at the end, or is deleted after an
    error. What a killed process has left there is deleted too. An old `target` is there
    until the new one is: the two are exchanged in one step where the system can do that.

    **Raises:**

    `FileExistsError` if another process is writing the same folder, or if one was killed
    when the old `target` was not there any more and the new one was not yet.
    """
    partial = _partial(target)
    old = target.with_name(target.name + ".replaced.partial")
    with locked(partial):
        if old.exists() and not target.exists():
            raise FileExistsError(
                f"{old} is what {target} was before a writer was killed. Give it that name "
                "again, or delete it."
            )
        if old.exists():
            shutil.rmtree(old)
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            if not target.exists():
                partial.rename(target)
            elif _exchange(partial, target):
                shutil.rmtree(partial)
            else:
                target.rename(old)
                partial.rename(target)
                shutil.rmtree(old)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which becomes `target` at the end, or is deleted
    after an error. Otherwise it is as [`whole_folder`][]."""
    partial = _partial(target)
    with locked(partial):
        try:
            yield partial / target.name
            os.replace(partial / target.name, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _partial(target: Path) -> Path:
    """The folder that is written first. What it holds is deleted, so it must not be a link
    to something else."""
    partial = target.with_name(target.name + ".partial")
    if partial.is_symlink() or partial.is_file():
        raise FileExistsError(
            f"{partial} is in the way: {target.name} is written there first. Move it."
        )
    return partial


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step. Returns whether that was possible."""
    libc = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    here, exchange = -100, 2  # AT_FDCWD, and RENAME_EXCHANGE or macOS's RENAME_SWAP
    if hasattr(libc, "renameat2"):
        return libc.renameat2(here, names[0], here, names[1], exchange) == 0
    if hasattr(libc, "renamex_np"):
        return libc.renamex_np(*names, exchange) == 0
    return False
