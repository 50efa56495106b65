"""The checkers of the exercises, a module for each notebook. Each checker says "not done
yet", what is wrong, or "right", and returns `None`, `False` or `True`. The answers are in
`solutions/`."""

from collections.abc import Callable


def verdict(name: str, wrong: str | None, praise: str = "") -> bool:
    """Prints whether an answer is right, and what is `wrong` if it is not."""
    print(
        f"{name}: not right yet. {wrong}" if wrong else f"{name}: right. {praise}".strip()
    )
    return wrong is None


def todo(name: str) -> None:
    """Prints that nothing has been answered."""
    print(f"{name}: not done yet.")


def call(function: Callable, *arguments):
    """The answer, and what is wrong if the function fails."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"It raised {type(error).__name__}: {error}"
