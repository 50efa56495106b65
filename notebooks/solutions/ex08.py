"""Right and wrong answers to the exercises of notebook 08. The notebook shows the right."""

import numpy as np


def messages(chosen, n_experts, n_devices):
    n_tokens, k = chosen.shape
    here = np.arange(n_tokens) // (n_tokens // n_devices)
    there = chosen // (n_experts // n_devices)
    matrix = np.zeros((n_devices, n_devices), int)
    np.add.at(matrix, (here[:, None].repeat(k, axis=1), there), 1)
    return matrix


def messages_wrong(chosen, n_experts, n_devices):
    return messages(chosen, n_experts, n_devices).T


def messages_wrong_2(chosen, n_experts, n_devices):
    return messages(chosen[:, :1], n_experts, n_devices)


def messages_wrong_3(chosen, n_experts, n_devices):
    here = np.arange(len(chosen)) // (len(chosen) // n_devices)
    matrix = np.zeros((n_devices, n_devices), int)
    np.add.at(matrix, (here[:, None].repeat(chosen.shape[1], 1), chosen % n_devices), 1)
    return matrix


def back(out, order):
    return out[np.argsort(order)]


def back_wrong(out, order):
    return out[order]


def back_wrong_2(out, order):
    return out


def back_wrong_3(out, order):
    return out[::-1]


microbatches = 27

microbatches_wrong = 30

microbatches_wrong_2 = 26

microbatches_wrong_3 = 36
