"""Right and wrong answers to the exercises of notebook 10. The notebook shows the right."""

import jax.numpy as jnp


def with_zero_point(row):
    low, high = jnp.minimum(row.min(), 0), jnp.maximum(row.max(), 0)
    scale = (high - low) / 255
    zero = jnp.round(-low / scale)
    values = jnp.clip(jnp.round(row / scale) + zero, 0, 255)
    return values, scale, zero


def with_zero_point_wrong(row):  # symmetric, with the zero in the middle
    scale = 2 * jnp.abs(row).max() / 255
    return jnp.clip(jnp.round(row / scale) + 128, 0, 255), scale, 128


def with_zero_point_wrong_2(row):  # the zero point is not a whole number
    scale = (row.max() - row.min()) / 255
    return jnp.round((row - row.min()) / scale), scale, -row.min() / scale


def with_zero_point_wrong_3(row):  # the zero point with the other sign
    low, high = jnp.minimum(row.min(), 0), jnp.maximum(row.max(), 0)
    scale = (high - low) / 255
    zero = jnp.round(-low / scale)
    return jnp.clip(jnp.round(row / scale) - zero, 0, 255), scale, zero


diagnosis = {"A": "axis", "B": "toward zero", "C": "halves", "D": "twice", "E": "wraps"}

diagnosis_wrong = {**diagnosis, "B": "wraps", "E": "toward zero"}

diagnosis_wrong_2 = {**diagnosis, "C": "nibbles"}

diagnosis_wrong_3 = {"A": "axis", "B": "toward zero", "D": "twice", "E": "wraps"}


per_layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
gigabytes = (
    (32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096) + 32000 * 4096) * 4.5 / 8
    + 32000 * 4096 * 2
) / 1e9

gigabytes_wrong = (32 * per_layer + 2 * 32000 * 4096) / 2 / 1e9

gigabytes_wrong_2 = (32 * per_layer + 2 * 32000 * 4096) * 4.5 / 8 / 1e9

gigabytes_wrong_3 = gigabytes * 1e9 / 2**30
