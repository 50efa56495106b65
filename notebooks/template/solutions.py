"""Right and wrong answers to the exercises of notebook NUMBER. The notebook shows the
right one. Each of the three wrong ones is a different mistake."""

import math


def turn_NUMBER(frequency, one, other):
    return math.degrees(frequency * (other - one))


def turn_NUMBER_wrong(frequency, one, other):
    return frequency * (other - one)


def turn_NUMBER_wrong_2(frequency, one, other):
    return math.degrees(frequency * (one - other))


def turn_NUMBER_wrong_3(frequency, one, other):
    return math.degrees(frequency * other)
