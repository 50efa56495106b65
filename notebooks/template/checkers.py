"""The checkers of notebook NUMBER."""

import math
from collections.abc import Callable
from numbers import Real

from . import check_cases


def check_turn_NUMBER(turn_NUMBER: Callable) -> bool | None:
    def fault(answer, frequency, one, other):
        if not isinstance(answer, Real):
            return f"It gives {answer!r}, not a number."
        right = math.degrees(frequency * (other - one))
        slips = {
            math.radians(right): "These are radians.",
            -right: "It turns the wrong way: from the first position to the second.",
            math.degrees(frequency * other): "Where does the turn begin?",
        }
        for slip, told in slips.items():
            if math.isclose(answer, slip) and not math.isclose(answer, right):
                return told
        if not math.isclose(answer, right):
            return f"From {one} to {other} it is {right:.1f} degrees, not {answer:.4g}."

    cases = [(1.0, 2, 5), (0.01, 7, 3)]
    return check_cases("turn_NUMBER", turn_NUMBER, cases, fault)
