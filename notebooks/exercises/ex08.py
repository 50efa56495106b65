"""The checkers of notebook 08."""

from collections.abc import Callable

import numpy as np

from . import call, number, todo, verdict


def check_messages(messages: Callable) -> bool | None:
    wrong = None
    for n_tokens, n_experts, n_devices in ((8, 4, 2), (24, 8, 4), (16, 8, 8), (5, 3, 1)):
        rng = np.random.default_rng(n_tokens)
        chosen = np.array([rng.permutation(n_experts)[:2] for _ in range(n_tokens)])
        answer, wrong = call(messages, chosen.copy(), n_experts, n_devices)
        if answer is NotImplemented:
            return todo("messages")
        if wrong is None:
            wrong = _wrong_messages(answer, chosen, n_experts, n_devices)
        if wrong:
            break
    return verdict("messages", wrong, "Rows sum to what a device has, columns to its load.")


def _wrong_messages(answer, chosen, n_experts: int, n_devices: int) -> str | None:
    expected = _sent(chosen, n_experts, n_devices)
    told = f"For {len(chosen)} tokens, {n_experts} experts and {n_devices} devices"
    try:
        answer = np.asarray(answer, float)
    except (TypeError, ValueError):
        return f"{told} the answer should be a matrix of numbers."
    if answer.shape != expected.shape:
        return f"{told} the shape should be {expected.shape}, and is {answer.shape}."
    if (answer == expected).all():
        return None
    if (answer == expected.T).all():
        return f"{told} rows and columns are exchanged: [i, j] is what i sends to j."
    if answer.sum() < expected.sum():
        return (
            f"{told} there are {expected.sum()} pairs of a token and an expert, and you "
            f"count {answer.sum():g}. A token has two experts."
        )
    if (answer.sum(axis=1) == expected.sum(axis=1)).all():
        return (
            f"{told} every device sends as many as it should, but not to where the expert "
            f"is: device 0 has the experts below {n_experts // n_devices}."
        )
    i, j = np.argwhere(answer != expected)[0]
    return f"{told}, {i} sends {expected[i, j]} pairs to {j}, not {answer[i, j]:g}."


def _sent(chosen, n_experts: int, n_devices: int) -> np.ndarray:
    """By going through the pairs one by one."""
    matrix = np.zeros((n_devices, n_devices), int)
    tokens_here = np.array_split(chosen, n_devices)
    experts_here = np.array_split(np.arange(n_experts), n_devices)
    for i, tokens in enumerate(tokens_here):
        for j, experts in enumerate(experts_here):
            matrix[i, j] = np.isin(tokens, experts).sum()
    return matrix


def check_back(back: Callable) -> bool | None:
    wrong = None
    for expert in ([1, 0], [2, 0, 1, 0], [1, 2, 0, 3, 0, 1]):
        expert = np.array(expert)
        # Not in rising order, so that sorting the rows is no answer either.
        rows = np.stack([10.0 * ((np.arange(len(expert)) * 5 + 3) % 7), expert], axis=1)
        order = np.argsort(expert, kind="stable")
        answer, wrong = call(back, rows[order].copy(), order.copy())
        if answer is NotImplemented:
            return todo("back")
        if wrong is None:
            wrong = _wrong_rows(answer, rows, order)
        if wrong:
            break
    return verdict("back", wrong)


def _wrong_rows(answer, rows: np.ndarray, order: np.ndarray) -> str | None:
    try:
        if np.shape(answer) != rows.shape:
            return f"The shape should be {rows.shape}, and is {np.shape(answer)}."
        if np.array_equal(answer, rows):
            return None
        told = f"With order = {order.tolist()}"
        if np.array_equal(answer, rows[order]):
            return f"{told} the rows come back as they came: still sorted by expert."
        if np.array_equal(answer, rows[order][order]):
            return (
                f"{told} they were sorted once more, not sorted back. Only for a "
                "permutation that is its own inverse, as of two rows, is that the same."
            )
        bad = int(np.argmax((np.asarray(answer) != rows).any(axis=1)))
        return f"{told} token {bad} gets a row that is not its own."
    except (TypeError, ValueError):
        return "The answer should be an array of the rows."


def check_microbatches(microbatches: int) -> bool | None:
    if microbatches is NotImplemented:
        return todo("microbatches")
    microbatches = number(microbatches)
    if microbatches is None:
        return verdict("microbatches", "The answer should be a number.")
    if not microbatches >= 1 or microbatches != int(min(microbatches, 10**9)):
        return verdict("microbatches", "The answer should be a whole number, 1 or more.")
    m = int(microbatches)
    # A schedule of four stages, cell by cell.
    idle = lambda m: sum(not 0 <= t - s < m for s in range(4) for t in range(m + 3))
    share = lambda m: idle(m) / (4 * (m + 3))
    wrong = None
    if share(m) > 0.1:
        wrong = f"With {m} microbatches {share(m):.1%} is wasted: more than a tenth."
    elif share(m - 1) <= 0.1 and abs(3 / m - 0.1) < 1e-9:
        wrong = (
            f"With {m}, three turns are a tenth of {m}. But the turns are {m} and three "
            "more, so fewer will do."
        )
    elif share(m - 1) <= 0.1:
        wrong = f"{share(m):.1%} is wasted with {m}, which is enough; but so are fewer."
    return verdict("microbatches", wrong)
