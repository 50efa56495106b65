"""What config.json cannot say."""

import pytest
from layouts import SIZES, YARN

from mistral_eqx import ModelConfig
from mistral_eqx.config import Llama4Scaling, MoEConfig
from mistral_eqx.files.config_json import config_to_json


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sliding_window": (16, 8)}, "one length of window and none"),
        ({"llama_4_scaling": Llama4Scaling(16, 0.1)}, "no class for this model"),
        ({"llama_4_scaling": Llama4Scaling(9, 0.1), "yarn": YARN}, "no class for this"),
        ({"yarn": YARN, "moe": MoEConfig(4, 2)}, "no class for this model"),
    ],
)
def test_what_transformers_has_no_class_for(changes, message):
    with pytest.raises(ValueError, match=message):
        config_to_json(ModelConfig(**SIZES | changes), "bfloat16")


def test_a_window_as_long_as_the_context_is_none():
    changes = {"sliding_window": (64, 8), "max_position_embeddings": 64}
    values = config_to_json(ModelConfig(**SIZES | changes), "bfloat16")
    assert values["layer_types"] == ["full_attention", "sliding_attention"]
    assert values["sliding_window"] == 8
