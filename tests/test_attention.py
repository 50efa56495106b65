import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from models import PARAMS, close

from mistral_eqx import Attention, ModelConfig
from mistral_eqx.attention import attend, visible
from mistral_eqx.cache import LayerCache
from mistral_eqx.rope import Places


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def by_hand(queries, keys, values, mask):
    """In float64, a query and a head at a time."""
    groups = queries.shape[1] // keys.shape[0]
    out = np.zeros(queries.shape)
    for i, query in enumerate(np.asarray(queries, np.float64)):
        for head in range(queries.shape[1]):
            seen = np.flatnonzero(mask[i])
            k = np.asarray(keys, np.float64)[head // groups, seen]
            v = np.asarray(values, np.float64)[head // groups, seen]
            weights = np.exp(k @ query[head] / np.sqrt(query.shape[-1]))
            out[i, head] = weights @ v / weights.sum()
    return out


@given(
    queries=st.lists(st.integers(-3, 12), min_size=5, max_size=5),
    keys=st.lists(st.integers(-20, 12), min_size=8, max_size=8),
    window=st.none() | st.integers(1, 6),
)
@settings(deadline=None, max_examples=40)
def test_a_query_sees_itself_and_the_window_before(queries, keys, window):
    seen = visible(jnp.array(queries, jnp.int32), jnp.array(keys, jnp.int32), window)
    for i, query in enumerate(queries):
        wanted = range(0 if window is None else max(0, query - window + 1), query + 1)
        assert seen[i].tolist() == [key in wanted for key in keys]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_grouped_queries(heads, kv_heads):
    queries, keys = normal(5, heads, 6), normal(kv_heads, 9, 6, seed=1)
    values = normal(kv_heads, 9, 6, seed=2)
    mask = np.random.default_rng(3).random((5, 9)) < 0.5
    mask[:, 0] = True
    out = attend(queries, keys, values, jnp.asarray(mask))
    np.testing.assert_allclose(out, by_hand(queries, keys, values, mask), atol=1e-5)


def test_what_is_masked_does_not_matter():
    queries, keys, values = normal(1, 2, 6), normal(2, 4, 6), normal(2, 4, 6)
    mask = jnp.array([[True, False, True, False]])
    out = attend(queries, keys, values, mask)
    changed = attend(
        queries,
        keys.at[:, 1].set(1e30),
        values.at[:, 1].set(-1e30).at[:, 3].set(1e30),
        mask,
    )
    np.testing.assert_array_equal(out, changed)


def test_who_sees_nothing_is_finite():
    out = attend(normal(2, 2, 6), normal(2, 4, 6), normal(2, 4, 6), jnp.zeros((2, 4), bool))
    assert np.isfinite(out).all()


def test_large_scores_do_not_overflow():
    queries = 1e4 * normal(3, 2, 6)
    out = attend(queries, 1e4 * normal(2, 4, 6), normal(2, 4, 6), jnp.ones((3, 4), bool))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("seq", [150, 1100])
@pytest.mark.parametrize("window", [8, 70, None])
def test_a_long_sequence_in_blocks(seq, window):
    """Without a cache attention goes block by block; through one ring it does not."""
    config = ModelConfig(**PARAMS | {"sliding_window": window, "dim": 8, "n_heads": 2})
    attention = Attention(config, dtype=jnp.float32, key=jax.random.key(0))
    x, positions = normal(seq, 8), jnp.arange(seq, dtype=jnp.int32)
    places = Places(config, positions)
    ring = jnp.zeros((config.n_kv_heads, seq, config.head_dim))

    @eqx.filter_jit
    def run(attention, cache):
        return attention(x, places, cache)

    out, nothing = run(attention, None)
    assert nothing is None
    expected, cache = run(attention, LayerCache(ring, ring))
    np.testing.assert_allclose(out, expected, atol=1e-5)

    mask = np.tri(seq, dtype=bool) & ~np.tri(seq, k=-(window or seq), dtype=bool)
    queries = np.random.default_rng(0).permutation(seq)[:30]
    pairs = attention.wq(x).reshape(seq, 2, config.head_dim)[queries]
    cos, sin = (np.asarray(a)[queries, None] for a in (places.cos, places.sin))
    real, imaginary = np.asarray(pairs)[..., 0::2], np.asarray(pairs)[..., 1::2]
    turned = np.stack(
        [real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1
    ).reshape(pairs.shape)
    rows = by_hand(turned, cache.keys, cache.values, mask[queries])
    rows = rows.reshape(30, -1) @ np.asarray(attention.wo.weight, np.float64).T
    close(out[queries], rows, 3e-5)
