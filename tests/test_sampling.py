"""What is drawn from is what transformers draws from, probability for probability."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from transformers.generation import logits_process as hf

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


OPTIONS = {
    "temperature": st.floats(0.1, 4.0),
    "top_k": st.none() | st.integers(1, 20),
    "top_p": st.just(1.0) | st.floats(0.05, 0.95),
    "min_p": st.just(0.0) | st.floats(0.01, 0.9),
    "repetition_penalty": st.just(1.0) | st.floats(0.5, 2.0),
}


def reference(logits, seen, options):
    """The probabilities of transformers' processors, in the order of its `generate`."""
    scores = torch.tensor(np.asarray(logits))[None]
    ids = torch.tensor([seen], dtype=torch.int64)
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(float(options["repetition_penalty"])),
        hf.TemperatureLogitsWarper(float(options["temperature"])),
    ]
    if options["top_k"] is not None:
        processors.append(hf.TopKLogitsWarper(options["top_k"]))
    if options["top_p"] < 1:
        processors.append(hf.TopPLogitsWarper(options["top_p"]))
    if options["min_p"] > 0:
        processors.append(hf.MinPLogitsWarper(options["min_p"]))
    for processor in processors:
        scores = processor(ids, scores)
    return torch.softmax(scores[0], dim=-1).numpy()


@eqx.filter_jit
def probabilities(sampling, logits, seen):
    return jax.nn.softmax(sampling.scores(logits, seen))


def compare(logits, seen, options):
    mask = np.zeros(len(logits), bool)
    mask[list(seen)] = True
    ours = probabilities(Sampling(**options), jnp.asarray(logits), jnp.asarray(mask))
    # A score is rounded by its own size, and a probability by as much of itself.
    largest = np.abs(logits).max() / options["temperature"]
    largest *= max(options["repetition_penalty"], 1 / options["repetition_penalty"])
    rtol = 4 * np.finfo(np.float32).eps * (1 + largest)
    np.testing.assert_allclose(ours, reference(logits, seen, options), rtol, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    seen=st.lists(st.integers(0, 39), min_size=1, max_size=20),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_probabilities_are_transformers(seed, seen, options):
    logits = 3 * np.random.default_rng(seed).standard_normal(40)
    compare(logits.astype(np.float32), seen, options)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.none() | st.integers(1, 16),
    top_p=st.just(1.0) | st.integers(1, 31).map(lambda n: n / 32 - 1 / 64),
)
def test_ties_are_transformers(seed, top_k, top_p):
    """Logits of a few values only. Whole multiples of ln 2 make probabilities of powers
    of two up to the sum, so no threshold lies within the rounding of another."""
    values = np.random.default_rng(seed).integers(0, 2, 16)
    logits = (values * np.log(2)).astype(np.float32)
    neutral = {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    compare(logits, [0], {**neutral, "top_k": top_k, "top_p": top_p})


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_equal_logits_are_cut_where_transformers_cuts_them(top_p):
    neutral = {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    logits = np.array([1.0, -0.0, 1.0, 0.0, 1.0, -1.0, 1.0, -0.0], np.float32)
    for equal in (np.zeros(8, np.float32), -np.ones(8, np.float32), logits):
        compare(equal, [0], {**neutral, "top_k": None, "top_p": top_p})
        compare(equal, [0], {**neutral, "top_k": 3, "top_p": 1.0})


def test_the_best_token_always_stays():
    logits = jnp.array([0.0, 5.0, 1.0])
    for options in ({"top_p": 1e-30}, {"top_k": 1}, {"min_p": 1.0}):
        scores = Sampling(1.0, **options).scores(logits)
        np.testing.assert_array_equal(scores, [-jnp.inf, 5.0, -jnp.inf])


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    sampling = Sampling(1.0, top_k=3)
    keys = jr.split(jr.key(0), 20_000)
    draws = jax.jit(jax.vmap(lambda key: sampling(logits, key=key)))(keys)
    shares = np.bincount(draws, minlength=4) / len(keys)
    np.testing.assert_allclose(shares, np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.02)


def test_greedy_obeys_the_penalty_and_no_filter():
    logits, key = jnp.array([1.0, 3.0, 2.0]), jr.key(0)
    assert Sampling()(logits, key=key) == 1
    assert Sampling(1e-9, top_k=3, min_p=0.1)(logits, key=key) == 1
    seen = jnp.array([False, True, False])
    assert Sampling(repetition_penalty=2.0)(logits, seen, key=key) == 2
    # A negative logit is multiplied.
    assert Sampling(repetition_penalty=3.0)(logits - 4, seen, key=key) == 2


def test_one_trace_for_all_values():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def choose(sampling, logits, seen, key):
        return sampling(logits, seen, key=key)

    logits, seen = jnp.arange(8.0), jnp.zeros(8, bool)
    for options in (
        {},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        {"repetition_penalty": 1.3},
    ):
        choose(Sampling(**options), logits, seen, jr.key(0))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
