"""The checkers of notebook 06."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from . import call, number, todo, verdict


def check_banned(banned: Callable) -> bool | None:
    wrong = None
    for tokens, n in (
        ([5, 6, 7, 5, 6], 3),
        ([5, 6, 7, 5, 6, 8, 5, 6], 3),
        ([1, 2, 3, 4], 2),
        ([4, 4, 4], 2),
        ([9, 8, 9, 7, 9], 2),
        ([3], 3),
    ):
        answer, wrong = call(banned, list(tokens), n)
        if answer is NotImplemented:
            return todo("banned")
        expected = {t for t in range(10) if _repeats([*tokens, t], n)}
        if wrong is None and not isinstance(answer, set | frozenset | list | tuple):
            wrong = f"It gives {type(answer).__name__}, not a set of ids."
        if wrong is None and set(map(_plain, answer)) != expected:
            found = set(map(_plain, answer))
            wrong = f"banned({tokens}, {n}) is {expected or '{}'}, not {found or '{}'}. "
            wrong += _of_banned(found, expected, tokens)
        if wrong:
            break
    return verdict("banned", wrong, "No n-gram comes twice now.")


def _plain(token):
    value = number(token)
    return repr(token) if value is None else int(value)


def _repeats(tokens: list[int], n: int) -> bool:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return bool(grams) and grams[-1] in grams[:-1]


def _of_banned(found: set, expected: set, tokens: list[int]) -> str:
    """What a wrong answer looks like."""
    if found == set(tokens):
        return "These are all tokens of the text: only those that end a known n-gram count."
    if expected and found and found < expected:
        return "It stops at the first match: the beginning may stand in several places."
    if expected and not found:
        return "It finds nothing: compare n - 1 tokens, not n, because the last is to come."
    return (
        "Look for the last n - 1 tokens earlier in the text; what followed them is banned."
    )


def check_draws(draws: Callable) -> bool | None:
    logits = jnp.array([4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0])
    n = 4000
    answer, wrong = call(draws, logits, n, jax.random.key(7))
    if answer is NotImplemented:
        return todo("draws")
    if wrong is None and np.shape(answer) != (n,):
        wrong = f"The shape is {np.shape(answer)}, not {(n,)}."
    if wrong is None:
        other, wrong = call(draws, logits, n, jax.random.key(8))
    if wrong is None:
        try:
            wrong = _of_draws(np.asarray(answer, int), np.asarray(other, int), logits)
        except Exception:
            wrong = "It gives something else than token ids."
    return verdict("draws", wrong)


def _of_draws(answer: np.ndarray, other: np.ndarray, logits) -> str | None:
    if answer.min() < 0 or answer.max() >= logits.size:
        return f"Ids go from 0 to {logits.size - 1}."
    if len(set(answer)) == 1:
        many = [draw_of_one_key(logits, seed) for seed in range(2)]
        if answer[0] == other[0] == 0 and many != [0, 0]:
            return "It always takes the most probable token: nothing is drawn."
        return "All draws are the same token: they share one key, so they share the noise."
    if np.array_equal(answer, other):
        return "Another key gives the same draws: the key is not used."
    exact = np.asarray(jax.nn.softmax(logits))
    flat = np.asarray(jax.nn.softmax(jax.nn.softmax(logits)))
    share = np.bincount(answer, minlength=logits.size) / answer.size
    distance = lambda p: float(np.abs(share - p).sum()) / 2
    if distance(exact) < 0.05:
        return None
    if distance(flat) < 0.05:
        return (
            "The draws are almost uniform: `categorical` takes logits, not probabilities."
        )
    return f"Half the summed difference to the distribution is {distance(exact):.2f}."


def draw_of_one_key(logits, seed: int) -> int:
    """What a single key of the checker draws: not always the most probable token."""
    return int(jax.random.categorical(jax.random.key(7 + seed), logits))


def check_gap(gap: float) -> bool | None:
    if gap is NotImplemented:
        return todo("gap")
    gap = number(gap)
    right = 1.5 * math.log(20)
    slips = {
        math.log(20): "That is the gap at temperature 1: where does the temperature go?",
        math.log(20) / 1.5: "The temperature is on the wrong side: heat widens the gap.",
        1.5 * math.log10(20): "Logits are in nats: take the natural logarithm.",
        1.5 * 0.95: "min-p compares a quotient of probabilities, not their difference.",
    }
    if gap is None:
        return verdict("gap", "It should be a number of nats.")
    if abs(gap - right) <= 0.02:
        return verdict("gap", None)
    hints = [hint for slip, hint in slips.items() if abs(gap - slip) <= 0.02]
    wrong = hints[0] if hints else "Divide both logits by 1.5; their quotient must be 0.05."
    return verdict("gap", wrong)
