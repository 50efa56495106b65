"""Any folder in, either format out, bit for bit; and what is wrong said clearly."""

import functools
import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models import PARAMS, random_tokens

import mistral_eqx
from mistral_eqx import ModelConfig, convert, load_model, save
from mistral_eqx.apps.main import main
from mistral_eqx.config import Llama4Scaling, MoEConfig, Yarn
from mistral_eqx.files import checkpoint, weights
from mistral_eqx.files.checkpoint import open_checkpoint, read_config, weight_shapes
from mistral_eqx.files.huggingface import (
    config_from_json,
    config_to_json,
    huggingface_name,
    mistral_name,
)
from mistral_eqx.files.inspection import inspect_folder
from mistral_eqx.files.params import config_from_params, config_to_params
from mistral_eqx.files.released import names_of


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
    return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)


def write_torch(folder, tensors, sizes, pattern):
    """Cuts tensors into as many torch files as there are `sizes`."""
    names = list(tensors)
    for i, size in enumerate(sizes):
        part, names = names[:size], names[size:]
        torch.save({n: to_torch(tensors[n]) for n in part}, folder / pattern.format(i))
    assert not names


# --- in -----------------------------------------------------------------------------------


@variants
def test_there_and_back_is_the_same_bits(name, tmp_path):
    raw = write_raw(tmp_path / "raw", name)
    convert(raw, tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert_same_bits(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "back")
    assert_same_bits(tmp_path / "back", name)
    there, back = read_config(raw), read_config(tmp_path / "back")
    assert back.max_position_embeddings in (there.max_position_embeddings, 32768)
    same = {"max_position_embeddings": None}
    assert config_to_params(there) | same == config_to_params(back) | same


@variants
def test_transformers_reads_what_is_written(name, tmp_path):
    convert(write_raw(tmp_path / "raw", name), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.bfloat16
    )
    assert config_from_json(model.config.to_dict()).windows == config_of(name).windows
    if name == "Mixtral":
        # transformers merges the experts, and writes them apart again.
        model.save_pretrained(tmp_path / "theirs")
        assert_same_bits(tmp_path / "theirs", name)
    tokens = random_tokens(40)
    with torch.no_grad():
        theirs = model.float()(torch.tensor([tokens])).logits[0].numpy()
    ours, _ = eqx.filter_jit(load_model(tmp_path / "raw", dtype="float32"))(
        jnp.asarray(tokens)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@variants
@pytest.mark.parametrize("version", [4, 5])
def test_what_transformers_writes_is_read(name, version, tmp_path):
    convert(write_raw(tmp_path / "raw", name), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.bfloat16
    )
    folder = tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="30KB")
    if version == 4:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        values["torch_dtype"] = values.pop("dtype")
        path.write_text(json.dumps(values))
    assert_same_bits(folder, name)
    written, ours = read_config(folder), config_of(name)
    assert (written.windows, written.rope_theta) == (ours.windows, ours.rope_theta)
    assert (written.yarn, written.llama_4_scaling) == (ours.yarn, ours.llama_4_scaling)
    assert (written.moe, written.tied_embeddings) == (ours.moe, ours.tied_embeddings)


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


@pytest.mark.parametrize("suffix", ["pth", "pt"])
@pytest.mark.parametrize("n_files", [1, 3])
def test_torch_files(suffix, n_files, tmp_path):
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    tensors = weights_of("v0.3")
    sizes = [len(tensors)] if n_files == 1 else [3, 4, len(tensors) - 7]
    write_torch(folder, tensors, sizes, "consolidated.{:02}." + suffix)
    assert_same_bits(folder, "v0.3")
    convert(folder, tmp_path / "again", format="mistral")
    assert_same_bits(tmp_path / "again", "v0.3")


@pytest.mark.parametrize("n_files", [1, 2])
def test_huggingface_torch_files(n_files, tmp_path):
    convert(write_raw(tmp_path / "raw"), tmp_path / "hf")
    folder = tmp_path / "hf"
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.unlink()
    # As old versions did: frequencies, and every tied or untied head.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, ml_dtypes.bfloat16)
    if n_files == 1:
        write_torch(folder, tensors, [len(tensors)], "pytorch_model.bin")
    else:
        write_torch(folder, tensors, [5, len(tensors) - 5], "pytorch_model-{}.bin")
        places = {n: f"pytorch_model-{int(i >= 5)}.bin" for i, n in enumerate(tensors)}
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    assert_same_bits(folder, "v0.3")


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


def stored_mixtral(name):
    """The array of the model that has this name: the experts' are stacked."""
    whole = weights_of("Mixtral")
    if ".experts." not in name:
        return whole[name]
    return np.stack([whole[name.replace("experts", f"experts.{e}")] for e in range(4)])


def assert_is_mixtral(model):
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        np.testing.assert_array_equal(leaf, stored_mixtral(checkpoint.weight_name(path)))


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_a_saved_mixtral(format, tmp_path):
    """Experts are stacked in the model and one by one in the files."""
    model = load_model(write_raw(tmp_path / "raw", "Mixtral"), dtype="bfloat16")
    save(model, tmp_path / "saved", format=format, max_shard_size="30KB")
    assert_same_bits(tmp_path / "saved", "Mixtral")
    again = load_model(tmp_path / "saved", dtype="bfloat16")
    assert again.config.moe == model.config.moe
    assert_is_mixtral(again)


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


def test_both_formats_in_one_folder(tmp_path, caplog):
    folder = write_raw(tmp_path / "both")
    convert(folder, tmp_path / "hf")
    for file in (tmp_path / "hf").iterdir():
        shutil.copy(file, folder)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(folder).format == "mistral"
        open_checkpoint(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder} holds the weights in Mistral's and in Hugging Face's format. Mistral's "
        "are used."
    ]
    # Half a format is none.
    (folder / "consolidated.safetensors").unlink()
    assert open_checkpoint(folder).format == "huggingface"
    assert_same_bits(folder, "v0.3")


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_names_are_a_bijection(data):
    name = data.draw(st.sampled_from(sorted(weight_shapes(config_of("Mixtral")))))
    other = data.draw(st.sampled_from(sorted(weight_shapes(config_of("v0.3")))))
    for ours in (name, other):
        theirs = huggingface_name(ours)
        assert theirs != ours
        assert mistral_name(theirs) == ours
    assert (huggingface_name(name) == huggingface_name(other)) == (name == other)
    assert huggingface_name(name + ".lora") == name + ".lora"


@given(start=st.integers(0, 31), length=st.integers(1, 32), column=st.integers(0, 31))
@settings(max_examples=30, deadline=None)
def test_any_slice_of_permuted_rows(start, length, column, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    convert(write_raw(folder / "raw"), folder / "hf")
    name = "layers.1.attention.wq.weight"
    tensor = open_checkpoint(folder / "hf").tensors[name]
    index = (slice(start, start + length), slice(column, None))
    part = tensor.array(index, np.dtype(np.float32))
    np.testing.assert_array_equal(part, weights_of("v0.3")[name][index].astype(np.float32))


# --- onto devices -------------------------------------------------------------------------


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


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PIECE", 1)
    array = np.arange(1000 * 6, dtype=np.float32).reshape(1000, 6)
    safetensors.numpy.save_file({"x": array}, tmp_path / "x.safetensors")
    tensor = weights.open_safetensors(tmp_path / "x.safetensors")["x"]
    index = (slice(100, 900), slice(1, 5))
    assert [piece.shape for _, piece in tensor.pieces(index)] == [
        (256, 4), (256, 4), (256, 4), (32, 4)
    ]  # fmt: skip
    np.testing.assert_array_equal(tensor.array(index, np.dtype(np.float32)), array[index])


# --- out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_save_then_load_is_the_identity(format, tmp_path):
    model = load_model(write_raw(tmp_path / "raw"), dtype="bfloat16")
    save(model, tmp_path / "saved", format=format)
    assert_same_bits(tmp_path / "saved", "v0.3")
    again = load_model(tmp_path / "saved", dtype="bfloat16")
    assert again.config.windows == model.config.windows
    for leaf, other in zip(jax.tree.leaves(model), jax.tree.leaves(again)):
        np.testing.assert_array_equal(leaf, other)


def test_the_one_file_port_reads_what_is_written(tmp_path):
    import one_file_ref

    convert(write_raw(tmp_path / "first"), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "raw")
    theirs = one_file_ref.Transformer.from_folder(tmp_path / "raw", jnp.float32)
    ours = load_model(tmp_path / "raw", dtype="float32")
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(leaf, other)


def test_save_in_another_dtype(tmp_path):
    raw = write_raw(tmp_path / "raw")
    convert(raw, tmp_path / "wide", dtype="float32")
    assert open_checkpoint(tmp_path / "wide").dtype == np.float32
    assert (
        json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"
    )
    assert_same_bits(tmp_path / "wide", "v0.3")
    tensors = dict(weights_of("v0.3"))
    tensors["norm.weight"] = np.full(32, 1e5, ml_dtypes.bfloat16)
    write_raw(tmp_path / "large", tensors=tensors)
    with pytest.raises(ValueError, match="norm.weight holds numbers beyond float16"):
        convert(tmp_path / "large", tmp_path / "f16", dtype="float16")
    assert not list(tmp_path.glob("f16*"))


def test_tokenizers_are_carried_along(tmp_path):
    raw = write_raw(tmp_path / "raw")
    for name in ("tokenizer.model.v3", "tekken.json", "notes.txt"):
        (raw / name).write_text(name)
    convert(raw, tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.model.v3").read_text() == "tokenizer.model.v3"
    assert (tmp_path / "hf/tekken.json").is_file()
    assert not (tmp_path / "hf/notes.txt").exists()
    model = load_model(raw)
    save(model, tmp_path / "saved", tokenizer=raw / "tokenizer.model.v3")
    assert (tmp_path / "saved/tokenizer.model.v3").is_file()
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        save(model, tmp_path / "none", tokenizer=raw / "tokenizer.model")


def test_nothing_is_overwritten(tmp_path):
    raw = write_raw(tmp_path / "raw")
    for name in ("hf", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        convert(raw, tmp_path / "hf")
    with pytest.raises(FileExistsError, match="holds no model, and is not replaced"):
        convert(raw, tmp_path / "full", force=True)
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="holds what is converted"):
        convert(raw, raw, force=True)
    (tmp_path / "hf/config.json").write_text("{}")
    convert(raw, tmp_path / "hf", force=True)
    assert_same_bits(tmp_path / "hf", "v0.3")
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "hf", "full"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(error, tmp_path, monkeypatch):
    raw = write_raw(tmp_path / "raw")
    convert(raw, tmp_path / "hf")
    read = weights._read_safetensors

    def fail(path, name, index):
        if name == "layers.1.attention.wo.weight":
            raise error
        return read(path, name, index)

    monkeypatch.setattr(weights, "_read_safetensors", fail)
    for target in ("new", "hf"):
        with pytest.raises(type(error)):
            convert(raw, tmp_path / target, format="huggingface", force=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "hf"}
    assert_same_bits(tmp_path / "hf", "v0.3")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "gguf"}, "format must be mistral or huggingface, got 'gguf'"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, got int8"),
        ({"max_shard_size": "5 apples"}, 'max_shard_size must be like "5GB"'),
        ({"max_shard_size": 0}, "max_shard_size must be like"),
    ],
)
def test_options_are_checked_first(options, message, tmp_path):
    raw = write_raw(tmp_path / "raw")
    with pytest.raises(ValueError, match=message):
        convert(raw, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


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


# --- what is wrong ------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def raw_with(change):
    """A folder in Mistral's format in which the tensors have been changed."""

    def break_(folder):
        tensors = dict(weights_of("v0.3"))
        change(tensors)
        write_raw(folder, tensors=tensors)

    return break_


def hf_with(change):
    """A folder in Hugging Face's format, in three files, that has been changed."""

    def break_(folder):
        convert(write_raw(folder.with_name("raw")), folder, max_shard_size="25KB")
        change(folder)

    return break_


def torch_with(content):
    def break_(folder):
        write_raw(folder)
        (folder / "consolidated.safetensors").unlink()
        (folder / "consolidated.00.pth").write_bytes(content)

    return break_


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def f8(tensors):
    for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def add_to(shard):
    tensors = safetensors.numpy.load_file(shard)
    tensors["surplus"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, shard)


def only_adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


INDEX = "model.safetensors.index.json"
BAD = {
    "no folder": (lambda folder: None, "There is no folder .*bad"),
    "a file": (lambda folder: folder.write_text(""), "bad: it is a file. Name the folder"),
    "an empty folder": (lambda folder: folder.mkdir(), "no params.json in"),
    "no weights": (
        lambda folder: (write_raw(folder) / "consolidated.safetensors").unlink(),
        "no consolidated.safetensors in .*, nor any other weights",
    ),
    "no config": (
        lambda folder: (write_raw(folder) / "params.json").unlink(),
        "no params.json in .*download the whole folder",
    ),
    "a truncated file": (
        lambda folder: halve(write_raw(folder) / "consolidated.safetensors"),
        "consolidated.safetensors is damaged or not whole .* Download it again",
    ),
    "a truncated shard": (
        hf_with(lambda folder: halve(first_shard(folder))),
        "model-00001-of-.* is damaged or not whole .* Download it again",
    ),
    "a missing shard": (
        hf_with(lambda folder: first_shard(folder).unlink()),
        "index.json names model-00001-of-.*, which is not there. Download",
    ),
    "an index without names": (
        hf_with(
            lambda folder: edit(folder / "model.safetensors.index.json", weight_map={})
        ),
        "index.json cannot be used: it has no weight_map",
    ),
    "an index that points elsewhere": (
        hf_with(lambda folder: edit(folder / INDEX, weight_map={"a": "../secret"})),
        "its weight_map names '../secret', which is no file beside it",
    ),
    "an index that lacks a name": (
        hf_with(lambda folder: add_to(first_shard(folder))),
        "index of .* does not name surplus, which model-00001-of-",
    ),
    "a key too many": (
        raw_with(lambda tensors: tensors.update(more=np.zeros(1, np.float32))),
        r"consolidated.safetensors has the unknown more \(0 missing, 1 too many\)",
    ),
    "a key too few": (
        raw_with(lambda tensors: tensors.pop("norm.weight")),
        r"consolidated.safetensors lacks norm.weight \(1 missing, 0 too many\)",
    ),
    "a wrong shape": (
        raw_with(lambda tensors: tensors.update({"norm.weight": np.zeros(33, np.float32)})),
        r"norm.weight has shape \(33,\), but params.json makes it \(32,\)",
    ),
    "f8": (raw_with(f8), "holds numbers of type F8_E4M3. .* without quantization"),
    "a layer too many": (
        lambda folder: write_raw(folder, n_layers=3),
        "params.json: that makes 3 layers, and the files hold 2",
    ),
    "another model's config": (
        lambda folder: write_raw(folder, n_kv_heads=4),
        r"attention.wk.weight has shape \(16, 32\), but params.json makes it \(32, 32\)",
    ),
    "a hugging face config that contradicts": (
        hf_with(lambda folder: edit(folder / "config.json", intermediate_size=50)),
        r"mlp.gate_proj.weight has shape \(48, 32\), but config.json makes it",
    ),
    "vision": (
        lambda folder: write_raw(folder, vision_encoder={"hidden_size": 1024}),
        "params.json has vision_encoder, which this model does not implement",
    ),
    "lora in params.json": (
        lambda folder: write_raw(folder, lora={"rank": 64}),
        "params.json has lora, which this model does not implement",
    ),
    "quantization": (
        lambda folder: write_raw(folder, quantization={"qformat_weight": "fp8_e4m3"}),
        "params.json has quantization, which this model does not implement",
    ),
    "latent attention": (
        lambda folder: write_raw(folder, qk_nope_head_dim=64, q_lora_rank=1024),
        "params.json has q_lora_rank, qk_nope_head_dim, which this model does not",
    ),
    "shared experts": (
        lambda folder: write_raw(
            folder,
            moe={"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1},
        ),
        "moe of params.json has num_shared_experts, which this model does not implement",
    ),
    "mamba": (
        lambda folder: write_raw(folder, model_type="mamba"),
        "params.json has model_type, which this model does not implement",
    ),
    "biases": (
        lambda folder: write_raw(folder, use_biases=True),
        "params.json has use_biases, which this model does not implement",
    ),
    "a lora adapter": (only_adapter, "holds a LoRA adapter and no model"),
    "hugging face vision": (
        hf_with(lambda folder: edit(folder / "config.json", model_type="mistral3")),
        "model_type 'mistral3'. Only text models .* none that sees or hears",
    ),
    "hugging face quantization": (
        hf_with(
            lambda folder: edit(
                folder / "config.json", quantization_config={"quant_method": "fp8"}
            )
        ),
        "config.json has quantization_config .* which this model does not implement",
    ),
    "another rope": (
        hf_with(
            lambda folder: edit(
                folder / "config.json", rope_scaling={"rope_type": "linear", "factor": 2}
            )
        ),
        "rotary embeddings of the type 'linear'",
    ),
    "params.json that is no JSON": (
        lambda folder: (write_raw(folder) / "params.json").write_text("{"),
        "params.json cannot be used: ",
    ),
    "an old pickle that runs code": (
        torch_with(pickle.dumps(Bomb(), protocol=2)),
        "00.pth is damaged, or holds code besides tensors, which is never run",
    ),
    "a torch file that runs code": (
        lambda folder: (
            torch_with(b"")(folder),
            torch.save({"a": Bomb()}, folder / "consolidated.00.pth"),
        ),
        "00.pth is damaged, or holds code besides tensors, which is never run",
    ),
    "a torch file that is none": (torch_with(b"not a pickle at all"), "is damaged"),
    "a torch file of other things": (
        torch_with(pickle.dumps({"a": 1}, protocol=2)),
        "is damaged|holds other things",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name, tmp_path, monkeypatch, capsys, unchecked):
    break_, message = BAD[name]
    folder = tmp_path / "bad"
    break_(folder)
    monkeypatch.chdir(tmp_path)

    def no_memory(*args, **kwargs):
        raise AssertionError("memory was spent")

    monkeypatch.setattr(jax, "make_array_from_callback", no_memory)
    monkeypatch.setattr(weights.StoredTensor, "pieces", no_memory)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(folder)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert sorted(tmp_path.iterdir()) == before
    assert not (tmp_path / "exploded").exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("mistral_eqx: ")


def test_a_torch_file_that_is_cut_or_split_or_incomplete(tmp_path):
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    tensors = weights_of("v0.3")
    sizes = [3, 4, len(tensors) - 7]
    write_torch(folder, tensors, sizes, "consolidated.{:02}.pth")
    halve(folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="consolidated.01.pth is damaged or not whole"):
        load_model(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match="lacks consolidated.01.pth, but has"):
        load_model(folder)
    (folder / "consolidated.02.pth").unlink()
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    with pytest.raises(ValueError, match="both hold .* split across files"):
        load_model(folder)


def test_without_torch(tmp_path, monkeypatch):
    folder = write_raw(tmp_path / "raw")
    (folder / "consolidated.safetensors").unlink()
    torch.save({}, folder / "consolidated.00.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="only be read with PyTorch: install torch"):
        load_model(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yarn", "default", "mixtral", "ministral3", "sliding_attention"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["factor", "rope_type", "beta"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
KEYS = [
    *ModelConfig.__dataclass_fields__,
    *config_to_json(config_of("Ministral 3"), "bfloat16"),
    *("_sliding_window", "layer_types", "num_local_experts", "rope_scaling", "lora"),
]


@pytest.fixture(scope="module")
def mutable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutable")
    raw = write_raw(folder / "raw", "Ministral 3")
    convert(raw, folder / "hf")
    return raw, folder / "hf"


def assert_loads_or_tells(folder):
    """Whatever is wrong is a ValueError or a FileNotFoundError of ours, with a file."""
    try:
        opened = open_checkpoint(folder)
        opened.check()
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error) and len(str(error)) > len(str(folder)) + 20


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_configs(data, mutable, unchecked):
    folder = data.draw(st.sampled_from(mutable))
    path = next(folder.glob("*.json"))
    whole = path.read_bytes()
    values = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(KEYS))
        if data.draw(st.booleans()):
            values.pop(key, None)
        elif isinstance(values.get(key), dict) and values[key] and data.draw(st.booleans()):
            values[key][data.draw(st.sampled_from(sorted(values[key])))] = data.draw(JSON)
        else:
            values[key] = data.draw(JSON)
    try:
        path.write_text(json.dumps(values))
        assert_loads_or_tells(folder)
    finally:
        path.write_bytes(whole)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_headers(data, mutable, unchecked):
    folder = data.draw(st.sampled_from(mutable))
    path = next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = bytearray(whole[:length])
    for _ in range(data.draw(st.integers(1, 4))):
        # The length and the text; a digit for a digit keeps it readable.
        at = data.draw(st.integers(0, length - 1))
        is_digit = header[at : at + 1].isdigit()
        header[at] = data.draw(st.sampled_from(b"0123456789" if is_digit else range(256)))
    kept = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    try:
        path.write_bytes((bytes(header) + whole[length:])[:kept])
        assert_loads_or_tells(folder)
    finally:
        path.write_bytes(whole)


# --- params.json --------------------------------------------------------------------------


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


# --- the command line ---------------------------------------------------------------------


def test_convert_and_inspect_as_commands(tmp_path):
    """As a user runs them: results on standard output, and nothing else."""
    raw = write_raw(tmp_path / "raw", "v0.1")
    command = [sys.executable, "-m", "mistral_eqx"]
    root = Path(mistral_eqx.__file__).parents[1]
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=root)
    done = run([*command, "convert", raw, tmp_path / "hf", "--max-shard-size", "20KB"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_same_bits(tmp_path / "hf", "v0.1")
    done = run([*command, "inspect", "--model", tmp_path / "hf"])
    assert done.returncode == 0 and done.stderr == ""
    parameters = sum(array.size for array in weights_of("v0.1").values())
    for told in ("8 tokens", f"{parameters:,}", "huggingface: model-00001-of-0", "none"):
        assert told in done.stdout


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
