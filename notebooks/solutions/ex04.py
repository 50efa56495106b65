"""Right and wrong answers to the exercises of notebook 04. The notebook shows the right."""

import jax
import jax.numpy as jnp


def seen(position, written, window, slots):
    oldest = max(0, position - window + 1, written - slots)
    return {token % slots for token in range(oldest, position + 1)}


def seen_wrong(position, written, window, slots):
    oldest = max(0, position - window, written - slots)
    return {token % slots for token in range(oldest, position + 1)}


def seen_wrong_2(position, written, window, slots):
    return {token % slots for token in range(position - window + 1, position + 1)}


def seen_wrong_3(position, written, window, slots):
    oldest = max(0, position - window + 1)
    return {token % slots for token in range(oldest, position + 1)}


def write_chunk(ring, rows, length):
    places = (length + jnp.arange(len(rows))) % len(ring)
    return ring.at[places].set(rows)


def write_chunk_wrong(ring, rows, length):
    start = length % len(ring)
    return jax.lax.dynamic_update_slice_in_dim(ring, rows, start, axis=0)


def write_chunk_wrong_2(ring, rows, length):
    return ring.at[length % len(ring) + jnp.arange(len(rows))].set(rows)


def write_chunk_wrong_3(ring, rows, length):
    start = length % len(ring)
    start = start if start + len(rows) <= len(ring) else 0
    return jax.lax.dynamic_update_slice_in_dim(ring, rows, start, axis=0)


# 4,095 + 1,000 slots, rounded up to 6,000, in each of which 32 layers keep keys and values
# of 8 heads that are 128 wide, in numbers of two bytes.
cache_mib = -(-(4095 + 1000) // 1000) * 1000 * 32 * 2 * 8 * 128 * 2 / 2**20
cache_mib_wrong = 4096 * 32 * 2 * 8 * 128 * 2 / 2**20
cache_mib_wrong_2 = 5095 * 32 * 2 * 8 * 128 * 2 / 2**20
cache_mib_wrong_3 = 6000 * 32 * 2 * 32 * 128 * 2 / 2**20
