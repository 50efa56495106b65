"""Each device reads its own part of any folder."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layouts import (
    SIZES,
    assert_is_mixtral,
    assert_same_bits,
    weights_of,
    write_raw,
    write_torrent,
)

import mistral_eqx
from mistral_eqx import ModelConfig, convert, load_model, save
from mistral_eqx.config import MoEConfig
from mistral_eqx.files import checkpoint, weights
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.huggingface import huggingface_name


def test_consolidated_shards_with_an_index(tmp_path):
    """As Mistral Large's."""
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    tensors, places = weights_of("v0.3"), {}
    for i, names in enumerate([list(tensors)[:5], list(tensors)[5:]], 1):
        file = f"consolidated-{i:05}-of-00002.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in names}, folder / file)
        places |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "consolidated.safetensors.index.json").write_text(index)
    assert_same_bits(folder, "v0.3")


def test_the_first_mixtral(tmp_path):
    folder = tmp_path / "torrent"
    write_torrent(folder)
    assert read_config(folder).windows == (None, None)
    assert read_config(folder).rope_theta == 1e6
    assert_same_bits(folder, "Mixtral")
    convert(folder, tmp_path / "raw", format="mistral")
    assert_same_bits(tmp_path / "raw", "Mixtral")
    convert(folder, tmp_path / "hf", format="huggingface")
    for layout in (folder, tmp_path / "raw", tmp_path / "hf"):
        assert_is_mixtral(load_model(layout, dtype="bfloat16"))


@pytest.mark.parametrize("n_experts", [1, 3])
def test_any_number_of_experts(n_experts, tmp_path):
    config = ModelConfig(**SIZES, moe=MoEConfig(n_experts, 1))
    model = mistral_eqx.Transformer(config, key=jax.random.key(0))
    save(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config.moe == config.moe
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("format", ["mistral", "huggingface", "torrent"])
def test_each_device_reads_its_part_of_the_experts(format, axis, tmp_path, monkeypatch):
    """Whole experts, rows or columns of each."""
    folder = tmp_path / "folder"
    if format == "torrent":
        write_torrent(folder)
    else:
        convert(write_raw(tmp_path / "raw", "Mixtral"), folder, format=format)
    read_bytes = []
    fill = weights.StoredTensor.fill

    def record(self, out, index):
        read_bytes.append((self.name, out.shape))
        fill(self, out, index)

    monkeypatch.setattr(weights.StoredTensor, "fill", record)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))
    skeleton = eqx.filter_eval_shape(
        mistral_eqx.Transformer, read_config(folder), key=jax.random.key(0)
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(
        lambda leaf: spread if leaf.ndim == 3 else replicated, skeleton
    )
    model = load_model(folder, dtype="bfloat16", shardings=shardings)
    assert_is_mixtral(model)
    stacked = [leaf for leaf in jax.tree.leaves(model) if leaf.ndim == 3]
    assert len(stacked) == 3 * SIZES["n_layers"]
    for leaf in stacked:
        assert leaf.sharding == spread
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    # No number of an expert is read twice.
    asked = sum(np.prod(shape) for name, shape in read_bytes if len(shape) == 2)
    others = sum(4 * leaf.size for leaf in jax.tree.leaves(model) if leaf.ndim == 2)
    assert asked <= sum(leaf.size for leaf in stacked) + others


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_each_device_reads_its_own_part(format, tmp_path, monkeypatch):
    folder = write_raw(tmp_path / "raw")
    if format == "huggingface":
        convert(folder, tmp_path / "hf")
        folder = tmp_path / "hf"
    asked = {}
    read = weights._read_safetensors

    def record(path, name, index):
        part = read(path, name, index)
        asked.setdefault(name, []).append(part.shape)
        return part

    monkeypatch.setattr(weights, "_read_safetensors", record)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    by_rows = NamedSharding(mesh, PartitionSpec("model", None))
    by_columns = NamedSharding(mesh, PartitionSpec(None, "model"))
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path, leaf):
        if leaf.ndim == 1:
            return replicated
        name = checkpoint.weight_name(path)
        return by_columns if name.endswith(("wo.weight", "w2.weight")) else by_rows

    skeleton = eqx.filter_eval_shape(
        mistral_eqx.Transformer, read_config(folder), key=jax.random.key(0)
    )
    shardings = jax.tree_util.tree_map_with_path(sharding, skeleton)
    model = load_model(folder, dtype="bfloat16", shardings=shardings)
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        name = checkpoint.weight_name(path)
        whole = weights_of("v0.3")[name]
        np.testing.assert_array_equal(leaf, whole)
        in_file = huggingface_name(name) if format == "huggingface" else name
        if leaf.ndim == 2:
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
            # 16 rows of wk are two heads of 8, over four devices: whole heads are read.
            least = 8 if name.endswith("wk.weight") and format == "huggingface" else 0
            rows, columns = leaf.addressable_shards[0].data.shape
            assert asked[in_file] == [(max(rows, least), columns)] * 4


def test_dtypes(tmp_path):
    folder = write_raw(tmp_path / "raw")
    kept = load_model(folder, dtype="bfloat16")
    wide = load_model(folder)
    assert kept.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    for leaf, other in zip(jax.tree.leaves(kept), jax.tree.leaves(wide)):
        np.testing.assert_array_equal(leaf.astype(jnp.float32), other)
