import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from models import PARAMS

from mistral_eqx import Cache, ModelConfig
from mistral_eqx.cache import LayerCache, ring_size
from mistral_eqx.prompts import chunk_sizes


windows = st.none() | st.integers(1, 40)


@given(
    chunk=st.integers(1, 40),
    rings=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    length=st.integers(0, 500),
    n_tokens=st.integers(0, 500),
)
def test_chunks_do_not_straddle(chunk, rings, length, n_tokens):
    slots = tuple(chunk * ring for ring in rings)
    sizes = chunk_sizes(length, n_tokens, chunk=chunk, slots=slots)
    assert sum(sizes) == n_tokens
    powers = {1 << i for i in range(chunk.bit_length())}
    assert set(sizes) <= {chunk} | {power for power in powers if power < chunk}
    for size in sizes:
        for ring in slots:
            assert length % ring + size <= ring
        length += size


@given(chunk=st.integers(1, 300), n_tokens=st.integers(0, 5000), window=windows)
def test_few_chunks(chunk, n_tokens, window):
    slots = (ring_size(window, chunk=chunk, max_length=max(1, n_tokens)),)
    sizes = chunk_sizes(0, n_tokens, chunk=chunk, slots=slots)
    # Nothing but whole chunks, and the rest once in powers of two.
    whole, rest = divmod(n_tokens, chunk)
    assert sizes[:whole] == [chunk] * whole
    assert len(sizes) - whole == rest.bit_count()


@given(window=windows, chunk=st.integers(1, 40), max_length=st.integers(1, 200))
def test_ring_has_room_for_the_window_and_a_chunk(window, chunk, max_length):
    slots = ring_size(window, chunk=chunk, max_length=max_length)
    needed = max_length
    if window is not None:
        needed = min(needed, window - 1 + chunk)
    assert slots % chunk == 0
    assert needed <= slots < needed + chunk


@pytest.mark.parametrize("slots", [1, 5, 8])
def test_indices_are_the_last_written(slots):
    layer = LayerCache(jnp.zeros((1, slots, 2)), jnp.zeros((1, slots, 2)))
    lengths = jnp.arange(50, dtype=jnp.int32)
    ring = {}
    for length, indices in enumerate(jax.jit(jax.vmap(layer.indices))(lengths).tolist()):
        for slot, index in enumerate(indices):
            assert index == ring[slot] if slot in ring else index < 0
        ring[length % slots] = length


@given(n_tokens=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_write_is_a_ring(n_tokens):
    chunk, slots = 3, 6
    write = jax.jit(LayerCache.write)
    layer = LayerCache(jnp.zeros((2, slots, 2)), jnp.zeros((2, slots, 2)))
    keys, values = np.zeros((2, slots, 2)), np.zeros((2, slots, 2))
    length = 0
    for n in n_tokens:
        for size in chunk_sizes(length, n, chunk=chunk, slots=(slots,)):
            numbers = np.arange(length, length + size, dtype=np.float32)
            new = 1 + numbers[:, None, None] + np.array([[[0, 0.1], [0.2, 0.3]]])
            new = new.astype(np.float32)
            layer = write(layer, jnp.asarray(new), jnp.asarray(-new), jnp.int32(length))
            for i in range(size):
                keys[:, (length + i) % slots] = new[i]
                values[:, (length + i) % slots] = -new[i]
            length += size
    np.testing.assert_array_equal(layer.keys, keys.astype(np.float32))
    np.testing.assert_array_equal(layer.values, values.astype(np.float32))


def test_write_keeps_the_dtype():
    layer = LayerCache(
        jnp.zeros((1, 4, 2), jnp.bfloat16), jnp.zeros((1, 4, 2), jnp.bfloat16)
    )
    new = jnp.ones((2, 1, 2), jnp.bfloat16)
    layer = layer.write(new, new, jnp.int32(6))
    assert layer.keys.dtype == layer.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer.keys[0, :, 0], [0, 0, 1, 1])


def n_bytes(cache):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


@pytest.mark.parametrize("padding", [jnp.zeros((), int), jnp.zeros(3, int)])
def test_size(padding):
    def make(window, max_length):
        config = ModelConfig(**PARAMS | {"sliding_window": window})
        return Cache(config, padding, chunk=8, max_length=max_length, dtype=jnp.bfloat16)

    # A window of 8 and a chunk of 8, 2 layers of keys and values, 2 heads of 6, 2 bytes.
    small, large = make(8, 16), make(8, 10**6)
    assert small.slots == large.slots == (16, 16)
    assert n_bytes(small) == n_bytes(large) == 16 * 2 * 2 * 2 * 6 * 2 * padding.size
    assert make(None, 17).slots == (24, 24)
    assert make(8, 3).slots == (8, 8)


def test_arrays_are_not_shared():
    cache = Cache(
        ModelConfig(**PARAMS), jnp.zeros(2, int), chunk=4, max_length=8, dtype=jnp.float32
    )
    leaves = jax.tree.leaves(cache)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(pointers) == len(leaves) == 2 * 2 + 2
    assert cache.axes.length is None
    assert jax.tree.leaves(cache.axes) == [0] * 5
