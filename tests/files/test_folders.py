"""What is wrong with a folder is said in one line, before memory is spent."""

import json
import logging
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from layouts import assert_same_bits, config_of, edit, halve, weights_of, write_raw

from mistral_eqx import ModelConfig, convert, load_model
from mistral_eqx.apps.main import main
from mistral_eqx.files import weights
from mistral_eqx.files.checkpoint import open_checkpoint
from mistral_eqx.files.config_json import config_to_json


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


def f8(tensors):
    for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)


def scaled(tensors, scale):
    name = "layers.0.attention.wk"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{name}.qscale_weight"] = scale


def two_scales(tensors):
    scaled(tensors, np.ones((), np.float32))
    tensors["layers.0.attention.wk.weight_scale"] = np.ones((), np.float32)


def int8(tensors):
    for name in tensors:
        tensors[name] = tensors[name].astype(np.int8)


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
}


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
    "f8": (
        raw_with(f8),
        "wk.weight is in FP8 and has no scale beside it, such as .*wk.qsc",
    ),
    "two scales": (
        raw_with(lambda tensors: two_scales(tensors)),
        "wk.weight is in FP8 and has 2 scales beside it",
    ),
    "a scale of another shape": (
        raw_with(lambda tensors: scaled(tensors, np.ones(5, np.float32))),
        r"qscale_weight has shape \(5,\), which is no scale of .*wk.weight",
    ),
    "int8": (
        raw_with(lambda tensors: int8(tensors)),
        "holds numbers of type I8. .* without quantization",
    ),
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
        lambda folder: write_raw(folder, multimodal={"whisper_model_args": {}}),
        "params.json has multimodal, which this model does not implement",
    ),
    "dora in params.json": (
        lambda folder: write_raw(folder, dora={"rank": 64}),
        "params.json has dora, which this model does not implement",
    ),
    "quantization": (
        lambda folder: write_raw(folder, quantization={"qformat_weight": "int4"}),
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
    "a lora adapter": (only_adapter, "holds a LoRA adapter, adapter_config.json, and no"),
    "hugging face vision": (
        hf_with(lambda folder: edit(folder / "config.json", model_type="llava")),
        "model_type 'llava'. Only text models .* none that sees or hears",
    ),
    "a wrapper around nothing": (
        hf_with(lambda folder: edit(folder / "config.json", model_type="mistral3")),
        "config.json cannot be used: text_config must be an object, got None",
    ),
    "two quantizations": (
        hf_with(
            lambda folder: edit(
                folder / "config.json",
                quantization_config={"quant_method": "fp8"},
                compression_config=COMPRESSED,
            )
        ),
        "config.json cannot be used: quantization_config and .* contradict each other",
    ),
    "hugging face quantization": (
        hf_with(
            lambda folder: edit(
                folder / "config.json", quantization_config={"quant_method": "awq"}
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
