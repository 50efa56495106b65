"""The checkers of the exercises, a module for each notebook. Each checker says "not done
yet", what is wrong, or "right", and returns `None`, `False` or `True`. The answers are in
`solutions/`."""

from collections.abc import Callable, Iterable


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


def check_cases(
    name: str,
    function: Callable,
    cases: Iterable[tuple],
    fault: Callable,
    praise: str = "",
) -> bool | None:
    """Calls an answer with the arguments of each case, until one is wrong: `fault` gets the
    answer and the arguments, and says what is, or `None`."""
    wrong = None
    for arguments in cases:
        answer, wrong = call(function, *arguments)
        if answer is NotImplemented:
            return todo(name)
        if wrong is None:
            wrong = fault(answer, *arguments)
        if wrong:
            break
    return verdict(name, wrong, praise)
