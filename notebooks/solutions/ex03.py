"""Right and wrong answers to the exercises of notebook 03. The notebook shows the right."""

import numpy as np


def band(n, window):
    return np.triu(np.tril(np.ones((n, n), bool)), 1 - window)


def band_wrong(n, window):
    return np.triu(np.tril(np.ones((n, n), bool)), -window)


def band_wrong_2(n, window):
    return band(n, window).T


def band_wrong_3(n, window):
    return np.triu(np.tril(np.ones((n, n), bool)), 2 - window)


# A layer moves 4,095 positions, and 32 of them 131,040.
layers_needed = -(-131_072 // (4_096 - 1))  # 33

layers_needed_wrong = 32

layers_needed_wrong_2 = 131_072 / 4_095

layers_needed_wrong_3 = 34


def scores(n, window):
    return sum(min(t + 1, window) for t in range(n))


def scores_wrong(n, window):
    return n * window


def scores_wrong_2(n, window):
    return n * (n + 1) // 2


def scores_wrong_3(n, window):
    return sum(min(t, window - 1) for t in range(n))
