"""The checkers of the exercises, a module for each notebook. Each checker says "not done
yet", what is wrong, or "right", and returns `None`, `False` or `True`. The answers are in
`solutions/`.

Right answers are remembered in `.score.json` beside the notebooks, for the score of the
series. The file is yours alone: git ignores it, and deleting it starts anew.
"""

import ast
import json
import os
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
# Names another file for the right answers. If it is empty, nothing is remembered: so it is
# when notebooks are built or tested.
SCORE = "MISTRAL_EQX_NOTEBOOK_SCORE"
# The exercises that were tried in this kernel, and whether the last answer was right.
_tried: dict[str, bool] = {}


def verdict(name: str, wrong: str | None, praise: str = "") -> bool:
    """Prints whether an answer is right, and what is `wrong` if it is not."""
    print(
        f"{name}: not right yet. {wrong}" if wrong else f"{name}: right. {praise}".strip()
    )
    _tried[name] = wrong is None
    if wrong is None:
        _remember(name)
    return wrong is None


def todo(name: str) -> None:
    """Prints that nothing has been answered."""
    print(f"{name}: not done yet.")
    _tried[name] = False


def number(answer) -> int | float | None:
    """A number of Python, or of JAX or NumPy without axes, as Python's; `None` for anything
    else."""
    value = answer.item() if getattr(answer, "shape", None) == () else answer
    return None if isinstance(value, bool) or not isinstance(value, Real) else value


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
            wrong, failed = call(fault, answer, *arguments)
            if failed:
                wrong = f"It gives an answer of another kind: {answer!r:.60}."
        if wrong:
            break
    return verdict(name, wrong, praise)


def score() -> str:
    """How many exercises are right: of this notebook, and, for a reader, of the series."""
    told = f"{sum(_tried.values())} of {len(_tried)} right here"
    if _file() is not None:
        names = of_the_series()
        told += f", {len(names & _remembered())} of {len(names)} in the series"
    return f"Exercises: {told}."


def of_the_series() -> set[str]:
    """The names of all exercises: each has a `check_name` in one of the modules here."""
    names = set()
    for path in FOLDER.glob("ex[0-9][0-9].py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check_"):
                names.add(node.name.removeprefix("check_"))
    return names


def _file() -> Path | None:
    path = os.environ.get(SCORE, str(FOLDER.parent / ".score.json"))
    return Path(path) if path else None


def _remembered() -> set[str]:
    """A file that is not there or cannot be read counts as empty."""
    try:
        return set(map(str, json.loads(_file().read_text())))
    except (OSError, TypeError, ValueError):
        return set()


def _remember(name: str) -> None:
    path = _file()
    if path is not None:
        try:
            path.write_text(json.dumps(sorted(_remembered() | {name})) + "\n")
        except OSError:
            pass  # A folder that cannot be written to remembers nothing.
