"""What a folder holds, told without reading its weights."""

import numpy as np
import pytest
from commands import run
from layouts import weights_of, write_raw

from mistral_eqx import ModelConfig
from mistral_eqx.config import MoEConfig
from mistral_eqx.files import weights
from mistral_eqx.files.inspection import inspect_folder
from mistral_eqx.files.names import weight_shapes
from mistral_eqx.files.released import names_of


def test_inspect_reads_no_weights(tmp_path, monkeypatch):
    folder = write_raw(tmp_path / "raw", "Ministral 3", hidden_dim=50)
    monkeypatch.setattr(weights.StoredTensor, "pieces", None)
    told = inspect_folder(folder)
    assert "NO: " in told["agreement"] and "w1.weight has shape" in told["agreement"]
    assert told["theta"].startswith("1e+06, stretched 4 times from 16 tokens (YaRN)")
    assert told["dtypes"] == f"{len(weights_of('Ministral 3'))} tensors BF16"


@pytest.mark.parametrize(
    "changes, names, parameters",
    [
        ({"sliding_window": 4096}, ["mistral-7b-v0.1"], 7_241_732_096),
        ({}, ["mistral-7b-v0.2"], 7_241_732_096),
        (
            {"vocab_size": 32768},
            ["mistral-7b-v0.3", "mathstral-7b"],
            7_248_023_552,
        ),
        (
            {"dim": 5120, "n_layers": 40, "vocab_size": 131072},
            ["mistral-nemo-12b"],
            12_247_782_400,
        ),
        ({"moe": MoEConfig(8, 2)}, ["mixtral-8x7b"], 46_702_792_704),
        ({"dim": 4095}, [], None),
    ],
)
def test_released_models_have_names_and_sizes(changes, names, parameters):
    released = {
        "dim": 4096,
        "n_layers": 32,
        "head_dim": 128,
        "hidden_dim": 14336,
        "n_heads": 32,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "vocab_size": 32000,
    }
    config = ModelConfig(**released | changes)
    assert names_of(config) == names
    if names:
        shapes = weight_shapes(config).values()
        assert sum(int(np.prod(shape)) for shape in shapes) == parameters


def test_what_cannot_be_used_has_its_own_exit_status(tmp_path, capsys):
    good = write_raw(tmp_path / "good", "Ministral 3")
    bad = write_raw(tmp_path / "bad", "Ministral 3", hidden_dim=50)
    assert run("inspect", "--model", good) == 0
    assert run("inspect", "--model", bad) == 1
    assert "NO: " in capsys.readouterr().out
