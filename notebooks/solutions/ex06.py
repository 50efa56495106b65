"""Right and wrong answers to the exercises of notebook 06. The notebook shows the right."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def banned(tokens, n):
    end = tokens[len(tokens) - n + 1 :]
    starts = range(len(tokens) - n + 1)
    return {tokens[i + n - 1] for i in starts if tokens[i : i + n - 1] == end}


def banned_wrong(tokens, n):
    return set(tokens)


def banned_wrong_2(tokens, n):
    end = tokens[len(tokens) - n :]
    starts = range(len(tokens) - n)
    return {tokens[i + n] for i in starts if tokens[i : i + n] == end}


def banned_wrong_3(tokens, n):
    end = tokens[len(tokens) - n + 1 :]
    for i in range(len(tokens) - n + 1):
        if tokens[i : i + n - 1] == end:
            return {tokens[i + n - 1]}
    return set()


def draws(logits, n, key):
    keys = jax.random.split(key, n)
    return jax.vmap(jax.random.categorical, in_axes=(0, None))(keys, logits)


def draws_wrong(logits, n, key):
    keys = jax.random.split(key, n)
    p = jax.nn.softmax(logits)
    return jax.vmap(jax.random.categorical, in_axes=(0, None))(keys, p)


def draws_wrong_2(logits, n, key):
    return jnp.full(n, jax.random.categorical(key, logits))


def draws_wrong_3(logits, n, key):
    return jnp.full(n, jnp.argmax(logits))


gap = 1.5 * np.log(1 / 0.05)
gap_wrong = math.log(1 / 0.05)
gap_wrong_2 = math.log(1 / 0.05) / 1.5
gap_wrong_3 = 1.5 * math.log10(1 / 0.05)
