import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mistral_eqx.rope import rotate, rotation


HEAD_DIM = 6
POSITIONS = jnp.array([0, 1, 2, 63, 64, 300, 4095], jnp.int32)


def random_heads(*, seq, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal((seq, 2, HEAD_DIM))
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_turns_neighbours_as_complex_numbers(theta):
    x = random_heads(seq=len(POSITIONS))
    turned = rotate(x, *rotation(POSITIONS, HEAD_DIM, theta))
    pairs = np.asarray(x, np.float64)[..., 0::2] + 1j * np.asarray(x)[..., 1::2]
    frequencies = theta ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM / 2))
    angles = np.asarray(POSITIONS)[:, None, None] * frequencies
    pairs = pairs * np.exp(1j * angles)
    # The last bit of a float32 frequency is 4e-4 radians by position 4095.
    np.testing.assert_allclose(turned[..., 0::2], pairs.real, atol=1e-3)
    np.testing.assert_allclose(turned[..., 1::2], pairs.imag, atol=1e-3)
    np.testing.assert_allclose(turned[:6, :, 0::2], pairs.real[:6], atol=1e-4)


@pytest.mark.parametrize("theta", [1e4, 1e6, 1e8])
def test_compiled_or_not_the_angles_are_the_same(theta):
    positions = jnp.array([0, 4095, 32767], jnp.int32)
    compiled = jax.jit(rotation, static_argnums=(1, 2))(positions, 128, theta)
    for our, other in zip(rotation(positions, 128, theta), compiled):
        np.testing.assert_allclose(our, other, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_the_angles_are_torchs_in_a_long_context_too(head_dim, theta):
    # A frequency that differs in its last bit turns by 2**-23 of the angle more or less.
    # One does, whose angle is 11 radians: 1e-6. At 32,767 radians it would be 4e-3.
    torch = pytest.importorskip("torch")
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.tensor([1.0, 4095.0, 32767.0]), frequencies)
    cos, sin = rotation(jnp.array([1, 4095, 32767], jnp.int32), head_dim, theta)
    np.testing.assert_allclose(cos, angles.cos().numpy(), atol=4e-6)
    np.testing.assert_allclose(sin, angles.sin().numpy(), atol=4e-6)


@given(query=st.integers(0, 4000), key=st.integers(0, 4000), shift=st.integers(0, 4000))
@settings(max_examples=20, deadline=None)
def test_a_score_depends_on_the_distance_alone(query, key, shift):
    q, k = random_heads(seq=2, seed=1), random_heads(seq=2, seed=2)

    def scores(query, key):
        at = lambda position: rotation(jnp.full(2, position, jnp.int32), HEAD_DIM, 1e4)
        return jnp.sum(rotate(q, *at(query)) * rotate(k, *at(key)), axis=-1)

    np.testing.assert_allclose(
        scores(query, key), scores(query + shift, key + shift), atol=1e-2
    )


def test_position_zero_turns_nothing_and_lengths_stay():
    x = random_heads(seq=len(POSITIONS))
    turned = rotate(x, *rotation(POSITIONS, HEAD_DIM, 1e4))
    np.testing.assert_array_equal(turned[0], x[0])
    assert np.abs(turned - x)[1:].max(axis=(1, 2)).min() > 0.1
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_bfloat16_is_turned_in_float32():
    x = random_heads(seq=len(POSITIONS), dtype=jnp.bfloat16)
    cos, sin = rotation(POSITIONS, HEAD_DIM, 1e4)
    assert cos.dtype == sin.dtype == jnp.float32
    turned = rotate(x, cos, sin)
    exact = rotate(x.astype(jnp.float32), cos, sin)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))
