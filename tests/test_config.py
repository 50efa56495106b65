import dataclasses
import math

import pytest
from hypothesis import given, strategies as st
from models import PARAMS

from mistral_eqx import ModelConfig
from mistral_eqx.files.params import config_from_params, config_to_params


REQUIRED = sorted(PARAMS.keys() - {"rope_theta", "sliding_window"})
INTEGERS = sorted(PARAMS.keys() - {"norm_eps", "rope_theta"})


@given(
    dim=st.integers(1, 10**6),
    half=st.integers(1, 10**4),
    n_kv_heads=st.integers(1, 64),
    groups=st.integers(1, 64),
    norm_eps=st.floats(1e-12, 1),
    rope_theta=st.none() | st.floats(1, 1e12),
    sliding_window=st.none() | st.integers(1, 10**6),
)
def test_params_and_back(
    dim, half, n_kv_heads, groups, norm_eps, rope_theta, sliding_window
):
    params = PARAMS | {
        "dim": dim,
        "head_dim": 2 * half,
        "n_heads": n_kv_heads * groups,
        "n_kv_heads": n_kv_heads,
        "norm_eps": norm_eps,
        "rope_theta": rope_theta,
        "sliding_window": sliding_window,
    }
    config = config_from_params(params)
    told = {key: value for key, value in params.items() if value is not None}
    assert told.items() <= config_to_params(config).items()
    assert config.sliding_window == sliding_window
    assert config_from_params(config_to_params(config)) == config


@pytest.mark.parametrize(
    "changes, theta",
    [
        ({"sliding_window": 4096}, 1e4),  # v0.1
        ({"sliding_window": None}, 1e6),
        ({}, 1e6),
        ({"sliding_window": 4096, "rope_theta": 1e6}, 1e6),
        ({"sliding_window": None, "rope_theta": 1e4}, 1e4),
        ({"rope_theta": None}, 1e6),
        ({"rope_theta": 100_000_000}, 1e8),
    ],
)
def test_theta_follows_the_released_weights(changes, theta, unchecked):
    params = {name: PARAMS[name] for name in REQUIRED} | changes
    config = config_from_params(params)
    assert config.rope_theta == theta and type(config.rope_theta) is float
    assert config.sliding_window == changes.get("sliding_window")


def test_is_static():
    config = ModelConfig(**PARAMS)
    assert hash(config) == hash(ModelConfig(**PARAMS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 64


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_key_is_named(name):
    params = {key: value for key, value in PARAMS.items() if key != name}
    with pytest.raises(ValueError, match=f"params.json lacks {name}"):
        config_from_params(params)


@pytest.mark.parametrize("name", ["adapter", "quantization", "multimodal"])
def test_unknown_key_is_named(name):
    with pytest.raises(ValueError, match=f"params.json has {name}, .* not implement"):
        config_from_params(PARAMS | {name: {}})


@pytest.mark.parametrize("params", [None, [], [["dim", 1]], "dim", 3])
def test_params_must_be_an_object(params, unchecked):
    with pytest.raises(ValueError, match="must hold an object"):
        config_from_params(params)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 4.5, "four", True, None, [4], math.nan])
def test_sizes_are_positive_integers(name, value, unchecked):
    if name == "sliding_window" and value in (None, [4]):
        return
    with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
        config_from_params(PARAMS | {name: value})


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-5, math.nan, math.inf, "1e", True, [1.0]])
def test_constants_are_positive_numbers(name, value, unchecked):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        config_from_params(PARAMS | {name: value})


@pytest.mark.parametrize("name", ["dim", "n_layers", "vocab_size"])
def test_a_number_may_be_written_in_other_ways(name, unchecked):
    expected = config_from_params(PARAMS)
    for value in (float(PARAMS[name]), str(PARAMS[name])):
        assert config_from_params(PARAMS | {name: value}) == expected
    assert config_from_params(PARAMS | {"norm_eps": "1e-05"}).norm_eps == 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"n_layers": 2**20}, {"moe": {"num_experts": 2**30, "num_experts_per_tok": 2}}],
)
def test_absurd_counts_are_refused(changes):
    with pytest.raises(ValueError, match="must be at most 1024, got 10"):
        config_from_params(PARAMS | {"sliding_window": None} | changes)


def test_heads():
    with pytest.raises(ValueError, match=r"n_heads \(4\) must be a multiple of n_kv_heads"):
        config_from_params(PARAMS | {"n_kv_heads": 3})
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        config_from_params(PARAMS | {"head_dim": 7})
