"""Text from files, pipes and people, and to people."""

import contextlib
import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from ..arguments import printable


RULE = "====================="


def complain(error: Exception | str) -> None:
    """Tells an error in one line: libraries tell theirs in several."""
    print("mistral_eqx:", printable(" ".join(str(error).split())), file=sys.stderr)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, which may be compressed with xz, or of standard input if `path`
    is "-". Lines end as everywhere but on Windows, and a byte order mark is no part of the
    text. Raises `ValueError` if it is not text, or damaged."""
    if path == "-":
        if jax.process_count() > 1:
            raise ValueError("Several processes cannot share a pipe: give a file.")
        return _plain(_decode(sys.stdin.buffer.read()))
    path = Path(path)
    open_text = lzma.open if path.suffix == ".xz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            return _plain(file.read())
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _plain(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"Standard input is not UTF-8 text: {error}") from error


def text(argument: str) -> str:
    """An argument, or a line from a terminal: Python hides bytes that are not UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument!r} is not UTF-8 text.") from error
    return argument


def ask(question: str) -> Iterator[str]:
    """Lines that are typed, up to Ctrl-D, or piped. Ctrl-C takes back a line."""
    if not sys.stdin.isatty():
        for i, line in enumerate(sys.stdin.buffer):
            line = _decode(line).removesuffix("\n").removesuffix("\r")
            yield line.removeprefix("\ufeff") if i == 0 else line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  makes the line editable
    while True:
        try:
            yield text(input(question))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def show(pieces: Iterator[str], *, before: str = "") -> None:
    """Prints text as it comes, or as a whole where nobody watches."""
    if sys.stdout.isatty():
        print(before, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print(before + "".join(pieces), flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends what is inside, and nothing more."""
    try:
        yield
    except KeyboardInterrupt:
        print()


def split_held_out(text: str) -> tuple[str, str]:
    """The first nine tenths of a text to train on, and the last to measure with."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]
