import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from mistral_eqx import Sampling


LOGITS = jnp.array([0.5, -1.0, 2.0, 1.0, -30.0], jnp.float32)
# No subnormal numbers: XLA takes them for zeros, and so for ties.
some_logits = hnp.arrays(
    np.float32, 5, elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
)


@eqx.filter_jit
def choose(sampling, logits, key):
    return sampling(logits, key=key)


def draws(sampling, logits, n):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.jit(jax.vmap(lambda key: sampling(logits, key=key)))(keys))


@given(logits=some_logits, seed=st.integers(0, 100))
@settings(deadline=None)
def test_greedy_is_the_first_of_the_best(logits, seed):
    token = choose(Sampling(), jnp.asarray(logits), jax.random.key(seed))
    assert token == logits.argmax() and token.dtype == jnp.int32


@given(logits=some_logits, temperature=st.floats(1e-44, 1e-7))
@settings(deadline=None)
def test_cold_is_greedy(logits, temperature):
    token = choose(Sampling(temperature), jnp.asarray(logits), jax.random.key(0))
    assert logits[token] >= logits.max() - 1e-4


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1e30])
def test_draws_follow_the_distribution(temperature):
    n = 20_000
    counts = np.bincount(draws(Sampling(temperature), LOGITS, n), minlength=len(LOGITS))
    expected = n * np.asarray(jax.nn.softmax(LOGITS / temperature))
    # Five standard deviations of a count.
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all(), counts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_key_decides(temperature):
    sampling = Sampling(temperature)
    token = [int(sampling(LOGITS, key=jax.random.key(3))) for _ in range(3)]
    assert len(set(token)) == 1
    assert len(set(draws(sampling, LOGITS, 100).tolist())) == (4 if temperature else 1)


def test_another_temperature_is_no_other_program():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def choose(sampling, logits, key):
        return sampling(logits, key=key)

    for temperature in (0.0, 0.7, 1.0):
        choose(Sampling(temperature), LOGITS, jax.random.key(0))


@pytest.mark.parametrize("temperature", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be 0 .* or more, got"):
        Sampling(temperature)
