"""Small folders in every format, written without the package."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from models import PARAMS

from mistral_eqx import ModelConfig
from mistral_eqx.config import Llama4Scaling, MoEConfig, Yarn
from mistral_eqx.files import checkpoint
from mistral_eqx.files.checkpoint import open_checkpoint
from mistral_eqx.files.config_json import config_to_json
from mistral_eqx.files.names import weight_shapes
from mistral_eqx.files.params import config_to_params


YARN = Yarn(4.0, 16, 4.0, 0.5, False)
SIZES = PARAMS | {"head_dim": 8, "sliding_window": None, "rope_theta": 1e6}
# The smallest of each kind.
VARIANTS = {
    "v0.1": {"sliding_window": 8, "rope_theta": 1e4},
    "v0.3": {},
    "Nemo": {"head_dim": 6},
    "Ministral": {"sliding_window": (None, 8), "rope_theta": 1e8},
    "Ministral 3": {
        "tied_embeddings": True,
        "yarn": YARN,
        "llama_4_scaling": Llama4Scaling(16, 0.1),
        "max_position_embeddings": 64,
    },
    "Mixtral": {"moe": MoEConfig(4, 2)},
}
variants = pytest.mark.parametrize("name", VARIANTS)


def config_of(name):
    return ModelConfig(**SIZES | VARIANTS[name])


@functools.cache
def weights_of(name):
    rng = np.random.default_rng(5)
    return {
        key: (rng.standard_normal(shape) / 4).astype(ml_dtypes.bfloat16)
        for key, shape in weight_shapes(config_of(name)).items()
    }


def write_raw(folder, name="v0.3", tensors=None, **params):
    """A folder in Mistral's format, made without the package."""
    folder.mkdir()
    params = config_to_params(config_of(name)) | params
    (folder / "params.json").write_text(json.dumps(params))
    tensors = weights_of(name) if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "consolidated.safetensors")
    return folder


def bits(folder):
    """Every tensor in a folder, under Mistral's name, with Mistral's rows."""
    tensors = open_checkpoint(folder).tensors
    whole = {
        name: tensor.array((slice(None),) * len(tensor.shape), np.dtype(ml_dtypes.bfloat16))
        for name, tensor in tensors.items()
    }
    return {name: array.view(np.uint16) for name, array in whole.items()}


def assert_same_bits(folder, name):
    read, expected = bits(folder), weights_of(name)
    assert read.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(read[key], array.view(np.uint16), err_msg=key)


def to_torch(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)


def write_torch(folder, tensors, sizes, pattern):
    """Cuts tensors into as many torch files as there are `sizes`."""
    torch = pytest.importorskip("torch")
    names = list(tensors)
    for i, size in enumerate(sizes):
        part, names = names[:size], names[size:]
        torch.save({n: to_torch(tensors[n]) for n in part}, folder / pattern.format(i))
    assert not names


def write_torrent(folder):
    """The first Mixtral: experts stacked, w2 transposed, a window in a string, the names
    of config.json."""
    tensors = dict(weights_of("Mixtral"))
    folder.mkdir()
    for layer in range(SIZES["n_layers"]):
        feed_forward = f"layers.{layer}.feed_forward"
        moe = f"layers.{layer}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = tensors.pop(f"{feed_forward}.gate.weight")
        for matrix in ("w1", "w2", "w3"):
            experts = [
                tensors.pop(f"{feed_forward}.experts.{e}.{matrix}.weight") for e in range(4)
            ]
            experts = [e.T for e in experts] if matrix == "w2" else experts
            tensors[f"{moe}.{matrix}"] = np.concatenate(experts)
    n_files = 8
    sizes = [len(tensors) // n_files] * (n_files - 1)
    sizes.append(len(tensors) - sum(sizes))
    write_torch(folder, tensors, sizes, "consolidated.{:02}.pt")
    params = config_to_json(config_of("Mixtral"), "bfloat16")
    for key in ("model_type", "architectures", "rope_theta", "head_dim"):
        del params[key]
    params |= {"sliding_window": "4096", "head_dim": 8}
    (folder / "params.json").write_text(json.dumps(params))


def stored_mixtral(name):
    """The array of the model that has this name: the experts' are stacked."""
    whole = weights_of("Mixtral")
    if ".experts." not in name:
        return whole[name]
    return np.stack([whole[name.replace("experts", f"experts.{e}")] for e in range(4)])


def assert_is_mixtral(model):
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        np.testing.assert_array_equal(leaf, stored_mixtral(checkpoint.weight_name(path)))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
