"""Right and wrong answers to the exercises of notebook 02. The notebook shows the right."""

import jax.numpy as jnp


def grouped(queries, keys):
    seq, heads, head_dim = queries.shape
    slots, kv_heads, _ = keys.shape
    queries = queries.reshape(seq, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("tkgd,skd->kgts", queries, keys)
    return scores.reshape(heads, seq, slots)


def grouped_wrong(queries, keys):  # heads take turns
    seq, heads, head_dim = queries.shape
    slots, kv_heads, _ = keys.shape
    queries = queries.reshape(seq, heads // kv_heads, kv_heads, head_dim)
    scores = jnp.einsum("tgkd,skd->gkts", queries, keys)
    return scores.reshape(heads, seq, slots)


def grouped_wrong_2(queries, keys):  # copies
    keys = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    return jnp.einsum("thd,shd->hts", queries, keys)


def grouped_wrong_3(queries, keys):  # the axes are in another order
    return jnp.moveaxis(grouped(queries, keys), 0, 1)


def from_halves(weight, heads):
    rows, dim = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, dim)
    return halves.swapaxes(1, 2).reshape(rows, dim)


def from_halves_wrong(weight, heads):  # the way there
    rows, dim = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, dim)
    return pairs.swapaxes(1, 2).reshape(rows, dim)


def from_halves_wrong_2(weight, heads):  # across the heads
    rows, dim = weight.shape
    return weight.reshape(2, rows // 2, dim).swapaxes(0, 1).reshape(rows, dim)


def from_halves_wrong_3(weight, heads):  # the axes are not exchanged
    rows, dim = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, dim).reshape(rows, dim)


slow_pairs = 24

slow_pairs_wrong = 48

slow_pairs_wrong_2 = 15

slow_pairs_wrong_3 = 4
