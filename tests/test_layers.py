import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_eqx.layers import Embedding, FeedForward, Linear, RMSNorm


KEY = jax.random.key(0)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_linear_is_a_matrix_product(leading, dtype):
    linear = Linear(24, 10, dtype=dtype, key=KEY)
    x = normal(*leading, 24, dtype=dtype)
    out = linear(x)
    assert out.dtype == dtype and linear.weight.shape == (10, 24)
    exact = np.asarray(x, np.float64) @ np.asarray(linear.weight, np.float64).T
    # One rounding, of the result: half a unit in its last place.
    tolerance = max(float(jnp.finfo(dtype).eps) / 2, 1e-6)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), exact, rtol=1.01 * tolerance, atol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_linear_sums_in_float32(rows):
    linear = Linear(1000, 3, dtype=jnp.bfloat16, key=KEY)
    ones = jnp.ones_like(linear.weight)
    linear = jax.tree.map(lambda _: ones, linear)
    # In bfloat16 a sum of ones goes no further than 256.
    out = linear(jnp.ones((rows, 1000), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1000)


def test_linear_starts_with_variance_kept():
    out = Linear(400, 300, dtype=jnp.float32, key=KEY)(normal(200, 400))
    assert abs(float(out.std()) - 1) < 0.02


def test_embedding_is_a_row():
    embedding = Embedding(7, 4, dtype=jnp.float32, key=KEY)
    tokens = jnp.array([3, 0, 6, 3])
    np.testing.assert_array_equal(
        embedding(tokens), embedding.weight[np.array([3, 0, 6, 3])]
    )


def test_embedding_of_no_token_is_nan():
    embedding = Embedding(7, 4, dtype=jnp.float32, key=KEY)
    out = eqx.filter_jit(embedding)(jnp.array([6, 7, -1, 10**9, -(10**9)]))
    np.testing.assert_array_equal(out[0], embedding.weight[6])
    assert np.isnan(out[1:]).all()


def test_norm():
    norm = RMSNorm(16, 1e-2, dtype=jnp.float32)
    norm = jax.tree.map(lambda _: normal(16, seed=1), norm)
    x = normal(5, 16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(axis=-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(x), exact * np.asarray(norm.weight), rtol=1e-5)
    assert np.isfinite(norm(jnp.zeros((1, 16)))).all()


def test_norm_rounds_before_the_weight():
    x, weight = normal(200, 16, dtype=jnp.bfloat16), normal(16, seed=1, dtype=jnp.bfloat16)
    norm = jax.tree.map(lambda _: weight, RMSNorm(16, 1e-5, dtype=jnp.bfloat16))
    wide = np.asarray(x, np.float32)
    wide = jnp.asarray(wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5))
    right = wide.astype(jnp.bfloat16) * weight[None]
    wrong = (wide * weight.astype(jnp.float32)[None]).astype(jnp.bfloat16)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    # Another last bit of the root may move a rounding here and there.
    assert (out != right).mean() < 0.01
    assert (wrong != right).mean() > 0.1


def test_norm_squares_in_float32():
    norm = RMSNorm(4, 1e-5, dtype=jnp.float16)
    out = norm(jnp.full((1, 4), 1000, jnp.float16))  # 1000 squared is past float16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=1e-3)


def test_feed_forward():
    feed_forward = eqx.filter_jit(FeedForward)(8, 12, dtype=jnp.float32, key=KEY)
    x = normal(5, 8)
    w1, w2, w3 = (
        np.asarray(linear.weight, np.float64)
        for linear in (feed_forward.w1, feed_forward.w2, feed_forward.w3)
    )
    gate = np.asarray(x) @ w1.T
    exact = (gate / (1 + np.exp(-gate)) * (np.asarray(x) @ w3.T)) @ w2.T
    np.testing.assert_allclose(feed_forward(x), exact, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept(dtype):
    def make_and_run(key):
        feed_forward = FeedForward(8, 12, dtype=dtype, key=key)
        embedding = Embedding(7, 8, dtype=dtype, key=key)
        norm = RMSNorm(8, 1e-5, dtype=dtype)
        x = embedding(jnp.array([3, 5]))
        return feed_forward, embedding, norm, x, norm(x), feed_forward(x)

    leaves = jax.tree.leaves(jax.eval_shape(make_and_run, KEY))
    assert len(leaves) == 8 and all(leaf.dtype == dtype for leaf in leaves)
