"""params.json in all its dialects."""

import json

import pytest
from layouts import SIZES, config_of

from mistral_eqx.files.params import config_from_params, config_to_params


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_size": 8},
        {"max_seq_len": 32768},
        {"max_position_embeddings": 32768, "model_type": "transformer"},
        {"activation": "silu", "use_biases": False, "causal": True},
        {"vision_encoder": None, "lora": None, "quantization": None, "moe": None},
        {"tied_embeddings": False, "yarn": None, "llama_4_scaling": None},
    ],
)
def test_keys_that_change_no_number(changes):
    plain = config_of("v0.3")
    config = config_from_params(config_to_params(plain) | changes)
    assert config_to_params(config) | {"max_position_embeddings": 0} == config_to_params(
        plain
    ) | {"max_position_embeddings": 0}


@pytest.mark.parametrize(
    "window, windows",
    [
        (None, (None,) * 4),
        (8, (8,) * 4),
        ("8", (8,) * 4),
        ([8], (8,) * 4),
        ([16, 8], (16, 8, 16, 8)),
        ([None, 8, 8, 8], (None, 8, 8, 8)),
    ],
)
@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_windows(key, window, windows):
    params = SIZES | {"n_layers": 4, key: window}
    if key != "sliding_window":
        del params["sliding_window"]
    config = config_from_params(params)
    assert config.windows == windows
    assert config.smallest_window == (None if window is None else 8)
    assert config_from_params(json.loads(json.dumps(config_to_params(config)))) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sliding_window": [8, 8, 8]}, "has 3 entries, which cannot be repeated over 2"),
        ({"sliding_window": []}, "sliding_window must be a positive integer, null, or"),
        ({"sliding_window": [8, 0]}, "sliding_window must be a positive integer, null, or"),
        ({"sliding_window": 8, "_sliding_window": 16}, "which mean the same"),
        ({"yarn": {"factor": 4}}, "yarn of params.json lacks alpha, apply_scale, beta"),
        ({"yarn": 4}, "yarn of params.json must be an object, got 4"),
        ({"llama_4_scaling": {"beta": 1, "gamma": 2}}, "llama_4_scaling of params.json la"),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "must not be more than"),
        ({"tied_embeddings": 1}, "tied_embeddings must be true or false, got 1"),
    ],
)
def test_params_that_cannot_be(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        config_from_params(SIZES | changes)
