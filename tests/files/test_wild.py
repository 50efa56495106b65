"""Folders as they lie around: transformers is the authority on what they hold."""

import json
import logging
import shutil

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from layouts import (
    VARIANTS,
    assert_same_bits,
    bits,
    config_of,
    edit,
    weights_of,
    write_raw,
    write_torch,
)
from models import random_tokens
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx
from mistral_eqx import convert, load_model
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.params import config_from_params, config_to_params
from mistral_eqx.text import TINY_MISTRAL


TOKENS = random_tokens(40)


def theirs(folder):
    """The model of transformers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_logits(folder, model=None):
    model = theirs(folder) if model is None else model
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    logits, _ = eqx.filter_jit(load_model(folder, dtype="float32"))(jnp.asarray(TOKENS))
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)


def huggingface(folder, name="v0.3", **options):
    folder.parent.mkdir(exist_ok=True)
    convert(write_raw(folder.with_name("raw"), name), folder, **options)
    return folder


def test_tied_embeddings_whose_index_names_a_head(tmp_path):
    folder = huggingface(tmp_path / "hf", "Ministral 3", max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=places | {"lm_head.weight": "model-00001-of-00002.safetensors"})
    assert_same_logits(folder)
    # A name that no file holds is still an error where there is a head.
    folder = huggingface(tmp_path / "other" / "hf", max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    first = min(places.values())
    edit(path, weight_map=places | {"model.layers.9.mlp.weight": first})
    with pytest.raises(ValueError, match="names model.layers.9.mlp.weight, which"):
        load_model(folder)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_tied_embeddings_stored_as_the_head(with_metadata, tmp_path):
    folder = huggingface(tmp_path / "hf", "Ministral 3")
    model = theirs(folder)
    (folder / "model.safetensors").unlink()
    # Which of the two names is kept, safetensors decides.
    path = str(folder / "model.safetensors")
    safetensors.torch.save_model(model, path, metadata={"format": "pt"})
    tensors = load_file(path)
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & tensors.keys()) == 1
    assert_same_logits(folder, model)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight", None)
    if tensors["lm_head.weight"] is None:
        tensors = load_file(path)
    metadata = {"format": "pt", "model.embed_tokens.weight": "lm_head.weight"}
    save_file(tensors, path, metadata if with_metadata else None)
    assert_same_logits(folder, model)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_float64(suffix, tmp_path, caplog):
    folder = write_raw(tmp_path / "raw")
    wide = {name: w.astype(np.float64) for name, w in weights_of("v0.3").items()}
    if suffix == "pth":
        (folder / "consolidated.safetensors").unlink()
        tensors = {name: torch.from_numpy(w) for name, w in wide.items()}
        torch.save(tensors, folder / "consolidated.00.pth")
    else:
        save_file(wide, folder / "consolidated.safetensors")
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
    assert "holds float64 numbers, which become float32" in caplog.text
    assert model.dtype == jnp.float32
    assert_same_bits(folder, "v0.3")
    convert(folder, tmp_path / "again", format="mistral")
    stored = load_file(tmp_path / "again" / "consolidated.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float32)}


def test_numbers_beyond_float32(tmp_path):
    wide = {name: w.astype(np.float64) for name, w in weights_of("v0.3").items()}
    wide["norm.weight"] *= 1e300
    folder = write_raw(tmp_path / "raw", tensors=wide)
    with pytest.raises(ValueError, match="norm.weight holds numbers beyond float32"):
        convert(folder, tmp_path / "out", format="mistral")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"quantization_config": {}},
        {"max_position_embeddings": 4096.0, "hidden_size": 32.0, "vocab_size": "64"},
        {"rms_norm_eps": "1e-05"},
        {"attention_bias": None, "mlp_bias": False, "partial_rotary_factor": 1.0},
    ],
)
def test_values_that_can_only_mean_one_thing(changes, tmp_path):
    folder = huggingface(tmp_path / "hf")
    expected = read_config(folder)
    edit(folder / "config.json", **changes)
    again = read_config(folder)
    same = {"max_position_embeddings": None}
    assert config_to_params(again) | same == config_to_params(expected) | same
    assert_same_bits(folder, "v0.3")


def test_as_many_kv_heads_as_heads_where_none_are_named(tmp_path):
    folder = huggingface(tmp_path / "hf")
    edit(folder / "config.json", num_key_value_heads=None)
    assert read_config(folder).n_kv_heads == config_of("v0.3").n_heads


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "torch_dtype": "bfloat16", "n_ctx": 4096},
        {"tie_embeddings": False, "tie_word_embeddings": False},
        {"dim": 32.0, "norm_eps": "1e-5"},
    ],
)
def test_params_that_say_nothing_about_the_model(changes, tmp_path):
    folder = write_raw(tmp_path / "raw", **changes)
    assert config_to_params(read_config(folder)) == config_to_params(config_of("v0.3"))


@pytest.mark.parametrize("change", [{"tie_embeddings": True}, {"use_biases": True}])
def test_params_that_change_the_model_are_refused_by_name(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}, which this model does"):
        config_from_params(config_to_params(config_of("v0.3")) | change)


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_shards_without_an_index(format, tmp_path):
    folder = write_raw(tmp_path / "raw")
    stem = "consolidated"
    if format == "huggingface":
        convert(folder, tmp_path / "hf")
        folder, stem = tmp_path / "hf", "model"
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    names = sorted(tensors)
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, folder / f"{stem}-{i + 1:05}-of-00003.safetensors")
    assert_same_bits(folder, "v0.3")
    (folder / f"{stem}-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {stem}-00002-of-00003.safet"):
        load_model(folder)
    shutil.move(
        folder / f"{stem}-00003-of-00003.safetensors",
        folder / f"{stem}-00003-of-99999.safetensors",
    )
    with pytest.raises(FileNotFoundError, match="lacks .*Download the whole folder"):
        load_model(folder)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("file", ["adapter_config.json", "lora.safetensors"])
def test_adapters_are_refused_by_name(file, config, tmp_path):
    folder = huggingface(tmp_path / "hf")
    (folder / file).write_text("{}")
    message = f"holds a LoRA adapter beside the model, {file}: without it"
    with pytest.raises(ValueError, match=message):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=f"holds a LoRA adapter, {file}, and no model"):
        load_model(folder)


def test_fused_experts(tmp_path):
    """As transformers 5 writes them if it is not asked for the original names."""
    folder = huggingface(tmp_path / "hf", "Mixtral")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    fused = tmp_path / "fused"
    model.save_pretrained(fused, save_original_format=False)
    names = load_file(fused / "model.safetensors")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    assert_same_bits(fused, "Mixtral")


def test_a_mixtral_with_a_window(tmp_path, caplog):
    """transformers applies it, and so do we. Mistral's own files say it in vain."""
    folder = huggingface(tmp_path / "hf", "Mixtral")
    without = bits(folder)
    edit(folder / "config.json", sliding_window=8)
    assert read_config(folder).windows == (8, 8)
    assert_same_logits(folder)
    with pytest.raises(ValueError, match="Mistral's format has no Mixtral with a window"):
        convert(folder, tmp_path / "back")
    raw = write_raw(tmp_path / "again", "Mixtral", sliding_window=4096)
    with caplog.at_level(logging.WARNING):
        assert read_config(raw).windows == (None, None)
    assert "sliding_window of 4096, which is not applied" in caplog.text
    assert bits(raw).keys() == without.keys()


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
ROPES = {
    "no original context": {},
    "null": {"beta_fast": None, "original_max_position_embeddings": 16},
    "a factor": {"attention_factor": 0.7, "original_max_position_embeddings": 16},
    "no factor": {"attention_factor": 1.0, "original_max_position_embeddings": 16},
    "two scales": {
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "original_max_position_embeddings": 16,
    },
    "equal scales": {
        "mscale": 0.5,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_yarns(name, tmp_path):
    folder = huggingface(tmp_path / "hf")
    edit(folder / "config.json", rope_parameters=YARN | ROPES[name], rope_theta=None)
    edit(folder / "config.json", max_position_embeddings=64)
    assert_same_logits(folder)
    # And out again, in either format.
    config = read_config(folder)
    assert config_from_params(config_to_params(config)) == config
    convert(folder, tmp_path / "again", format="huggingface")
    assert_same_logits(tmp_path / "again", theirs(folder))


def test_several_ids_end_a_text(tmp_path):
    """Those of generation_config.json, at either of which transformers stops too."""
    folder = tmp_path / "folder"
    shutil.copytree(TINY_MISTRAL, folder, ignore=shutil.ignore_patterns("corpus"))
    model, tokenizer = mx.load(folder)
    assert tokenizer.eos_ids == (2,)
    whole = mx.generate(model, tokenizer, "To be, or not", max_tokens=20)
    end = whole.tokens[7]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    _, tokenizer = mx.load(folder)
    assert tokenizer.eos_ids == (2, end)
    done = mx.generate(model, tokenizer, "To be, or not", max_tokens=20)
    assert (done.reason, done.tokens) == ("eos", whole.tokens[: whole.tokens.index(end)])
    assert "".join(mx.stream(model, tokenizer, "To be, or not")) == done.text
    # The argument goes before the file.
    asked = mx.generate(model, tokenizer, "To be, or not", max_tokens=20, eos_ids=[])
    assert asked.tokens == whole.tokens
    for wrong in ("two", [1.5], {"a": 1}, True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ValueError, match="generation_config.json cannot be used"):
            mx.load(folder)


def test_names_in_a_file_cannot_move_the_cursor(tmp_path, capsys):
    from mistral_eqx.apps.main import main

    evil = "\x1b[2J\x07\r\u202e"
    tensors = weights_of("v0.3") | {f"{evil}a": np.zeros(1, np.float32)}
    for folder in (
        write_raw(tmp_path / "tensors", tensors=tensors),
        write_raw(tmp_path / "params", **{evil: 1}),
    ):
        assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told[:-1].isprintable() and "\\x1b[2J" in told
        with pytest.raises(ValueError) as caught:
            load_model(folder)
        assert str(caught.value).isprintable()


def test_torch_files_of_every_variant(tmp_path):
    for name in VARIANTS:
        folder = write_raw(tmp_path / name, name)
        (folder / "consolidated.safetensors").unlink()
        tensors = weights_of(name)
        write_torch(folder, tensors, [len(tensors)], "consolidated.{:02}.pth")
        assert_same_bits(folder, name)
