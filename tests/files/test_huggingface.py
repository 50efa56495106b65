"""Hugging Face's names and rows, there and back, and as transformers has them."""

import json

import equinox as eqx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings, strategies as st
from layouts import (
    assert_same_bits,
    config_of,
    variants,
    weights_of,
    write_raw,
    write_torch,
)
from models import close, random_tokens

from mistral_eqx import convert, load_model
from mistral_eqx.files.checkpoint import open_checkpoint
from mistral_eqx.files.config_json import config_from_json
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.huggingface import huggingface_name, mistral_name
from mistral_eqx.files.names import weight_shapes
from mistral_eqx.files.params import config_to_params


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
    close(ours, theirs, 3e-5)


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
