"""Arguments of public functions, checked at the call, and what people are told.

An error names the argument, what came, and what may come.
"""

import functools
import logging
import operator
import os
from collections.abc import Mapping
from typing import Any


# The largest size or count that fits in the 32 bits of JAX's integers.
LARGEST = 2**31 - 1


def integer(name: str, value: Any, *, least: int = 0, most: int = LARGEST) -> int:
    """`value` as an `int`, if it is a whole number of Python, NumPy or JAX in the range.

    **Raises:**

    `TypeError` for anything else, `ValueError` for a number outside the range.
    """
    try:
        # `True` is an `int` in Python.
        number = None if isinstance(value, bool) else operator.index(value)
    except Exception:  # an array of another size raises JAX's own errors
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {shown(value)}.")
    if number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}.")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}.")
    return number


def number(name: str, value: Any, what: str = "a number") -> float:
    """`value` as a `float`, if it is a number of Python, NumPy or JAX. Raises `TypeError`
    otherwise; `what` says in the message what may come."""
    try:
        result = None if isinstance(value, bool | str | bytes) else float(value)
    except Exception:  # an array of another size raises JAX's own errors
        result = None
    if result is None:
        raise TypeError(f"{name} must be {what}, got {shown(value)}.")
    return result


def text(name: str, value: Any) -> str:
    """`value`, if it is a text that can be written as UTF-8.

    **Raises:**

    `TypeError` for anything but a `str`, `ValueError` for one with half a character.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text (str), got {shown(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {value[error.start]!r} at character {error.start}: that is half "
            "of a surrogate pair and not a character."
        ) from error
    return value


def texts(name: str, value: Any) -> list[str]:
    """The texts of a sequence, or the one text that `value` is. Raises as [`text`][]."""
    if isinstance(value, str):
        return [text(name, value)]
    several = items(name, value, "a text (str) or several of them")
    return [text(f"{name}[{i}]", one) for i, one in enumerate(several)]


def items(name: str, value: Any, what: str) -> list[Any]:
    """What a sequence, an array or an iterator holds. Raises `TypeError` for anything else,
    a text among it; `what` says in the message what may come."""
    try:
        if isinstance(value, str | bytes | Mapping):
            raise TypeError
        return list(value)
    except TypeError as error:
        raise TypeError(f"{name} must be {what}, got {shown(value)}.") from error


def path(name: str, value: Any) -> str:
    """`value`, if it can be a path. Raises `TypeError` or `ValueError` otherwise."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path (str or Path), got {shown(value)}.")
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded or max(map(len, encoded.split(os.sep.encode()))) > 255:
        raise ValueError(f"{name} cannot be a path, got {shown(value)}.")
    return os.fspath(value)


def is_positive_integer(value: Any) -> bool:
    # `True` is an `int` in Python, and JSON has `true`.
    return type(value) is int and 0 < value <= LARGEST


def check_integer(name: str, owner: Any, most: int = LARGEST) -> None:
    """Checks an attribute that came from a file: `moe.num_experts` is `num_experts` of the
    owner. Raises `ValueError` for what is no positive integer, and above `most`."""
    value = getattr(owner, name.split(".")[-1])
    if not is_positive_integer(value):
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}.")


def check_number(name: str, owner: Any) -> None:
    """As `check_integer`, for a positive number; makes it a `float` where the file had an
    integer."""
    field = name.split(".")[-1]
    value = getattr(owner, field)
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{name} must be a positive number, got {value!r}.")
    object.__setattr__(owner, field, float(value))


def check_flag(name: str, owner: Any) -> None:
    """As `check_integer`, for true or false."""
    value = getattr(owner, name.split(".")[-1])
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}.")


def shown(value: Any) -> str:
    """What a message shows of a value: its type, and the beginning of its `repr`."""
    try:
        told = repr(value)
    except Exception:
        told = ""
    told = told if len(told) <= 60 else told[:57] + "..."
    return f"{printable(told)} ({type(value).__name__})"


def printable(text: str) -> str:
    """The text with control characters escaped: what stands in a file must not be able to
    move the cursor of a terminal. Words that are too long to read lose their middle."""
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    words = (w if len(w) <= 200 else f"{w[:100]}...{w[-50:]}" for w in escaped.split(" "))
    return " ".join(words)


def in_units(n: int | float) -> str:
    """A number of bytes, as a person says it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.1f} kB"


@functools.cache
def say_once(message: str) -> None:
    """Tells in a line on standard error what a user may want to know."""
    logging.getLogger("mistral_eqx").warning(printable(message))
