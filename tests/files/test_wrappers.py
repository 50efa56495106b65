"""Vision encoders around text models, and weights in FP8, as transformers reads them."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layouts import config_of, edit, weights_of, write_raw
from models import random_tokens
from safetensors.numpy import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import mistral_eqx as mx
from mistral_eqx import convert, load_model
from mistral_eqx.files.checkpoint import open_checkpoint
from mistral_eqx.files.config_json import config_to_json
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.inspection import inspect_folder


TOKENS = random_tokens(40)
VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
}


def wrapped(folder, name, tied):
    """A small `Mistral3ForConditionalGeneration` around one of the variants."""
    text = config_to_json(config_of(name), "float32")
    rope = text.pop("rope_parameters", None)
    text["rope_parameters"] = rope or {
        "rope_type": "default",
        "rope_theta": text["rope_theta"],
    }
    text["tie_word_embeddings"] = tied
    config = transformers.Mistral3Config(
        text_config=text,
        vision_config=VISION,
        image_token_index=5,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return model


def assert_same_logits(folder, model, relative=1e-5):
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()
    logits, _ = eqx.filter_jit(load_model(folder, dtype="float32"))(jnp.asarray(TOKENS))
    bound = relative * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["v0.3", "Ministral 3"])
@pytest.mark.parametrize("names", ["new", "old"])
def test_a_text_model_in_a_wrapper(names, name, tied, tmp_path, caplog):
    folder = tmp_path / "wrapped"
    model = wrapped(folder, name, tied)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert all(n.split(".")[0] != "model" for n in tensors), "transformers writes the old"

    def renamed(name):
        inner = name.removeprefix("language_model.")
        if name == "language_model.lm_head.weight":
            return inner
        if name.startswith("language_model.model."):
            return "model.language_model." + inner.removeprefix("model.")
        return f"model.{name}"

    if names == "new":
        tensors = {renamed(name): array for name, array in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        assert_same_logits(folder, model)
    assert "holds a vision encoder. Its" in caplog.text
    told = inspect_folder(folder)
    vision = [n for n in tensors if "vision_tower" in n or "multi_modal" in n]
    assert told["vision"] == f"{len(vision)} tensors, which are left on disk"
    assert told["agreement"] == "the files hold what the config says"
    convert(folder, tmp_path / "text", format="huggingface")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert_same_logits(folder, text)


def test_a_raw_folder_with_a_vision_encoder(tmp_path):
    plain = write_raw(tmp_path / "plain", "Ministral 3")
    vision = {
        f"{start}.weight": np.zeros((4, 4), np.float32)
        for start in ("vision_encoder.patch_conv", "vision_language_adapter.w_in")
        + ("patch_merger.merging_layer", "pre_mm_projector_norm")
    }
    folder = write_raw(
        tmp_path / "vision",
        "Ministral 3",
        tensors=weights_of("Ministral 3") | vision,
        vision_encoder={"hidden_size": 4},
    )
    assert len(open_checkpoint(folder).vision) == 4
    for leaf, other in zip(*(jax.tree.leaves(load_model(f)) for f in (plain, folder))):
        np.testing.assert_array_equal(leaf, other)


def in_fp8(weight, grid):
    """The weight in FP8, and its scales in a grid of blocks."""
    rows, columns = weight.shape
    blocks = weight.astype(np.float32).reshape(
        grid[0], rows // grid[0], grid[1], columns // grid[1]
    )
    scale = np.abs(blocks).max(axis=(1, 3)) / 448
    quantized = (blocks / scale[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
    exact = quantized.astype(np.float32) * scale[:, None, :, None]
    return quantized.reshape(weight.shape), scale, exact.reshape(weight.shape)


# How the scales are named and shaped, and what the config says.
SCHEMES = {
    "Mistral's": (
        "qscale_weight",
        lambda scale: scale.reshape(()),
        {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}},
    ),
    "Hugging Face's": (
        "weight_scale_inv",
        lambda scale: scale.reshape(()),
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
    ),
    "in blocks": (
        "weight_scale_inv",
        lambda scale: scale,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}},
    ),
    "by row": (
        "weight_scale",
        lambda scale: scale.astype(ml_dtypes.bfloat16),
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            }
        },
    ),
}


@pytest.fixture(params=SCHEMES)
def quantized(request, tmp_path):
    """A folder in FP8, and the same in float32, as exact as it can be."""
    key, shaped, config = SCHEMES[request.param]
    raw = write_raw(tmp_path / "raw")
    folder, file = raw, "consolidated.safetensors"
    if request.param != "Mistral's":
        convert(raw, tmp_path / "hf", dtype="float32")
        folder, file = tmp_path / "hf", "model.safetensors"
    tensors, exact = load_file(folder / file), {}
    for name, weight in list(tensors.items()):
        exact[name] = weight.astype(np.float32)
        if (
            weight.ndim < 2
            or "embed" in name
            or name in ("output.weight", "lm_head.weight")
        ):
            continue
        rows, columns = weight.shape
        grid = {"in blocks": (rows // 4, columns // 4), "by row": (rows, 1)}
        numbers, scale, _ = in_fp8(weight, grid.get(request.param, (1, 1)))
        stem, scale = name.removesuffix("weight"), shaped(scale)
        tensors |= {name: numbers, stem + key: scale}
        # What is no weight is left out.
        tensors[stem + "qscale_act"] = np.ones((), np.float32)
        tensors[stem + "activation_scale"] = np.ones((), np.float32)
        grid = np.asarray(scale).astype(np.float32).reshape(grid.get(request.param, (1, 1)))
        whole = np.kron(grid, np.ones((rows // grid.shape[0], columns // grid.shape[1])))
        exact[name] = numbers.astype(np.float32) * whole.astype(np.float32)
    save_file(tensors, folder / file, {"format": "pt"})
    expected = tmp_path / "expected"
    expected.mkdir()
    for other in folder.glob("*.json"):
        (expected / other.name).write_bytes(other.read_bytes())
    save_file(exact, expected / file, {"format": "pt"})
    edit(next(folder.glob("*.json")), **config)
    return folder, expected


def test_fp8_is_multiplied_by_its_scales(quantized, tmp_path):
    folder, expected = quantized
    assert read_config(folder) == read_config(expected)
    for dtype in ("float32", "bfloat16"):
        models = (load_model(f, dtype=dtype) for f in (folder, expected))
        for leaf, other in zip(*map(jax.tree.leaves, models), strict=True):
            np.testing.assert_array_equal(leaf, other)
    # Without a wish for another dtype it is bfloat16 in files.
    convert(folder, tmp_path / "out", format="mistral")
    stored = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert stored["layers.0.attention.wq.weight"].dtype == ml_dtypes.bfloat16
    assert not any("scale" in name for name in stored)
    assert inspect_folder(folder)["agreement"] == "the files hold what the config says"


def test_each_device_reads_its_part_of_fp8(quantized):
    folder, expected = quantized
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    skeleton = eqx.filter_eval_shape(
        mx.Transformer, read_config(folder), key=jax.random.key(0)
    )
    for axes in (("model", None), (None, "model")):
        spread = NamedSharding(mesh, PartitionSpec(*axes))
        whole = NamedSharding(mesh, PartitionSpec())
        places = jax.tree.map(lambda x, s=spread: s if x.ndim == 2 else whole, skeleton)
        model = load_model(folder, dtype="float32", shardings=places)
        same = load_model(expected, dtype="float32")
        for leaf, other in zip(*map(jax.tree.leaves, (model, same)), strict=True):
            np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("grid", [(1, 1), (8, 4)])
def test_transformers_dequantizes_to_the_same_bits(grid, tmp_path):
    """By its own operation: reading a whole model in FP8 needs another library there."""
    name = "layers.0.attention.wq.weight"
    numbers, scale, _ = in_fp8(weights_of("v0.3")[name], grid)
    tensors = weights_of("v0.3") | {name: numbers, f"{name}_scale_inv": scale}
    folder = write_raw(tmp_path / "raw", tensors=tensors)
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(numbers.view(np.uint8)).view(torch.float8_e4m3fn),
        torch.from_numpy(scale),
        torch.bfloat16,
    )
    ours = load_model(folder, dtype="bfloat16").layers[0].attention.wq.weight
    expected = theirs.view(torch.int16).numpy()
    np.testing.assert_array_equal(np.asarray(ours).view(np.int16), expected)
