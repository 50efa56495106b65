"""GGUF files in and out: against the `gguf` library, transformers and llama.cpp."""

import dataclasses
import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from layouts import VARIANTS, assert_same_bits, config_of, weights_of, write_raw
from models import random_model, random_tokens

import mistral_eqx as mx
from mistral_eqx.config import MoEConfig, Yarn
from mistral_eqx.devices.mesh import make_mesh
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.gguf import open_gguf, read_metadata
from mistral_eqx.files.inspection import inspect_folder
from mistral_eqx.files.llamacpp import config_from_gguf, config_to_gguf, gguf_name
from mistral_eqx.text import TINY_MISTRAL


gguf = pytest.importorskip("gguf")
Q = gguf.GGMLQuantizationType
TOKENS = random_tokens(20)
# llama.cpp has no words for windows that differ from layer to layer.
ONE_WINDOW = [name for name in VARIANTS if name != "Ministral"]
# Wide enough for blocks of 256.
WIDE = {"dim": 256, "head_dim": 64, "hidden_dim": 256, "sliding_window": None}


def numbers(tensor):
    return tensor.array((slice(None),) * len(tensor.shape), np.dtype(np.float32))


def same_model(found, expected):
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def logits_of(model):
    logits, _ = jax.jit(lambda model, x: model(x))(model, jnp.array(TOKENS))
    return np.asarray(logits)


def without_context(config):
    return dataclasses.replace(config, max_position_embeddings=None)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_by_library(
    path, model, kind=Q.F32, *, split=0, apart=False, changes=None, tokens=True
):
    """A model as llama.cpp's own converter writes it, by the `gguf` library alone."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(64)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.moe is not None:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.num_experts_per_tok)
    if tokens:
        writer.add_tokenizer_model("llama")
        names = ["<unk>", "<s>", "</s>", *map(chr, range(64, 61 + config.vocab_size))]
        writer.add_token_list(names)
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    for change in changes or ():
        change(writer)
    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    parts = dict(zip("qkvo", ("attn_q", "attn_k", "attn_v", "attn_output")))
    parts = {f"attention.w{c}": there for c, there in parts.items()}
    parts |= {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    parts |= {"feed_forward.gate": "ffn_gate_inp"}
    stacks = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
    parts |= {f"feed_forward.{w}": there for w, there in stacks.items()}

    def add(name, array):
        array = np.asarray(array, np.float32)
        if array.ndim == 1 or "ffn_gate_inp" in name or kind == Q.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)

    for path_, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path_, simple=True, separator=".")
        stem = name.removesuffix(".weight")
        if stem in names:
            add(f"{names[stem]}.weight", leaf)
            continue
        _, layer, part = stem.split(".", 2)
        if "experts" not in part:
            add(f"blk.{layer}.{parts[part]}.weight", leaf)
        elif apart:
            for i, expert in enumerate(leaf):
                add(f"blk.{layer}.{stacks[part[-2:]]}.{i}.weight", expert)
        else:
            add(f"blk.{layer}.{stacks[part[-2:]]}_exps.weight", leaf)
    finish(writer)


# --- in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "variant", [{}, {"tied_embeddings": True}, {"moe": MoEConfig(4, 2)}]
)
def test_what_the_library_writes(variant, apart, tmp_path):
    model = random_model(sliding_window=None, **variant)
    write_by_library(tmp_path / "model.gguf", model, apart=apart)
    found = mx.load_model(tmp_path / "model.gguf", dtype=jnp.float32)
    same_model(found, model)
    assert without_context(found.config) == model.config
    # The folder says as much, with a vision encoder in it too.
    shutil.copy(tmp_path / "model.gguf", tmp_path / "mmproj-model.gguf")
    same_model(mx.load_model(tmp_path, dtype=jnp.float32), model)
    told = inspect_folder(tmp_path)
    assert told["agreement"] == "the files hold what the config says"
    assert told["format"].startswith("gguf: model.gguf")
    assert "model.gguf, 64 ids" in told["tokenizer"]


def test_a_split_file(tmp_path):
    model = random_model(sliding_window=None)
    write_by_library(tmp_path / "model.gguf", model, split=5)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    for name in (files[0], files[-1], tmp_path):
        same_model(mx.load_model(name, dtype=jnp.float32), model)
    assert read_config(files[1]) == read_config(files[0])
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {files[1].name}"):
        mx.load_model(files[0])


KINDS = [kind for kind in Q if kind in gguf.GGML_QUANT_SIZES]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_every_type(kind, tmp_path):
    """The numbers of any slice are the library's. What it cannot read is refused."""
    length, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (6, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", raw, raw_shape=raw.shape, raw_dtype=kind)
    finish(writer)
    try:
        expected = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        expected = None
    if expected is None and kind != Q.F64:
        with pytest.raises(ValueError, match=f"x holds numbers of type {kind.name}"):
            open_gguf(tmp_path / "x.gguf")
        return
    tensor = open_gguf(tmp_path / "x.gguf")["x"]
    expected = raw.view(np.float64) if kind == Q.F64 else expected
    for rows, columns in ((0, 6), (0, 2 * length)), ((2, 5), (0, 1)), ((1, 2), (1, 2)):
        columns = (min(columns[0], 2 * length - 1), columns[1])
        part = slice(*rows), slice(*columns)
        np.testing.assert_array_equal(tensor.read(part), expected[part])
    assert tensor.shape == (6, 2 * length) and tensor.dtype == kind.name


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1])
def test_logits_are_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = random_model(**WIDE)
    write_by_library(tmp_path / "model.gguf", model, kind, tokens=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    found = logits_of(mx.load_model(tmp_path / "model.gguf", dtype=jnp.float32))
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2)])
@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0])
def test_blocks_stay_as_they_are(kind, moe, tmp_path):
    """Whichever scheme the other tensors get."""
    model = random_model(**WIDE, moe=moe)
    write_by_library(tmp_path / "model.gguf", model, kind)
    full = mx.load_model(tmp_path / "model.gguf", dtype=jnp.float32)
    stored = open_gguf(tmp_path / "model.gguf")["blk.1.attn_v.weight"].blocks
    blocks = stored.read((slice(None), slice(None)))
    blocks = blocks.reshape(len(blocks), -1, 34 if kind == Q.Q8_0 else 18)
    for scheme in "int8", "int4":
        small = mx.load_model(tmp_path / "model.gguf", dtype=jnp.float32, quantize=scheme)
        layer = small.layers[1].attention.wv
        values = np.asarray(layer.values).view(np.uint8)
        np.testing.assert_array_equal(
            values.reshape(blocks[..., 2:].shape), blocks[..., 2:]
        )
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        np.testing.assert_array_equal(layer.scales, scales)
        expected = logits_of(full)
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(logits_of(small), expected, rtol=0, atol=atol)
    axes = {"model": 2} if moe is None else {"expert": 2, "model": 2}
    for mesh in make_mesh(axes), make_mesh({"pipe": 2}):
        spread = mx.load_model(
            tmp_path / "model.gguf", dtype=jnp.float32, quantize=scheme, mesh=mesh
        )
        same_model(jax.device_get(spread), jax.device_get(mx.shard(small, mesh)))


def test_types_that_differ_are_quantized_where_they_are_stacked(tmp_path):
    """As in a Q4_K_M, whose layers are of two types."""
    model = random_model(**WIDE)
    write_by_library(tmp_path / "model.gguf", model, Q.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama")
    for key, value in read_metadata(tmp_path / "model.gguf").items():
        if key.startswith("llama."):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    for name, tensor in open_gguf(tmp_path / "model.gguf").items():
        array = numbers(tensor)
        if name == "blk.1.attn_v.weight":
            writer.add_tensor(name, array)
        elif tensor.blocks is None:
            writer.add_tensor(name, array)
        else:
            quantized = gguf.quants.quantize(array, Q.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=Q.Q8_0)
    finish(writer)
    small = mx.load_model(tmp_path / "mixed.gguf", dtype=jnp.float32, quantize="int8")
    groups = [layer.attention.wv.scales.shape[1] for layer in small.layers]
    assert groups == [1, 1] and small.layers[0].attention.wk.scales.shape[1] == 8


# --- config -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_WINDOW)
def test_config_there_and_back(name):
    config = config_of(name)
    arch, values = config_to_gguf(config)
    metadata = {"general.architecture": arch}
    metadata |= {
        f"{arch}.{key}": float(np.float32(value)) if isinstance(value, float) else value
        for key, value in values.items()
    }
    shapes = {"token_embd.weight": (config.vocab_size, config.dim)}
    if not config.tied_embeddings:
        shapes["output.weight"] = shapes["token_embd.weight"]
    found = config_from_gguf(metadata, shapes)
    assert without_context(found) == without_context(config)


@pytest.mark.parametrize("scale", [{}, {"apply_scale": True}, {"attention_factor": 1.25}])
def test_yarn_there_and_back(scale):
    yarn = dataclasses.replace(Yarn(4.0, 16, 4.0, 0.5, False), **scale)
    config = dataclasses.replace(config_of("v0.3"), yarn=yarn)
    arch, values = config_to_gguf(config)
    metadata = {"general.architecture": arch}
    metadata |= {f"{arch}.{key}": value for key, value in values.items()}
    shapes = dict.fromkeys(["token_embd.weight", "output.weight"], (64, 32))
    assert config_from_gguf(metadata, shapes).yarn == yarn


def test_names_are_the_librarys():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in weights_of("Mixtral").keys() | weights_of("v0.3").keys():
        stem = name.removesuffix(".weight")
        if ".experts." in stem:
            stem = stem.replace(".experts.0", ".experts.1")
            expected = (
                f"blk.{stem.split('.')[1]}."
                + {
                    "w1": "ffn_gate_exps",
                    "w2": "ffn_down_exps",
                    "w3": "ffn_up_exps",
                }[stem[-2:]]
            )
        elif stem.endswith("feed_forward.gate"):
            expected = f"blk.{stem.split('.')[1]}.ffn_gate_inp"
        else:
            expected = names.get_name(stem)
        assert gguf_name(name) == f"{expected}.weight", name


# --- out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_WINDOW)
def test_the_square(name, tmp_path):
    """Every way through the three formats gives the same bits."""
    raw = write_raw(tmp_path / "raw", name)
    mx.convert(raw, tmp_path / "one.gguf")
    assert_same_bits(tmp_path / "one.gguf", name)
    mx.convert(raw, tmp_path / "hf", format="huggingface")
    mx.convert(tmp_path / "hf", tmp_path / "two.gguf", format="gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    for format in ("mistral", "huggingface"):
        mx.convert(tmp_path / "two.gguf", tmp_path / f"back {format}", format=format)
        assert_same_bits(tmp_path / f"back {format}", name)
        config = read_config(tmp_path / f"back {format}")
        assert without_context(config) == without_context(config_of(name))
    mx.convert(tmp_path / "one.gguf", tmp_path / "wide.gguf", dtype="f32")
    mx.convert(tmp_path / "wide.gguf", tmp_path / "three.gguf", dtype="bf16")
    assert (tmp_path / "three.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    # The library reads what is written, and finds the same.
    reader = gguf.GGUFReader(tmp_path / "one.gguf")
    ours = open_gguf(tmp_path / "one.gguf")
    assert {tensor.name for tensor in reader.tensors} == ours.keys()
    for tensor in reader.tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(numbers(ours[tensor.name]), theirs)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantized_out(kind, tmp_path):
    model = random_model(**WIDE)
    mx.save(model, tmp_path / "saved")
    mx.convert(tmp_path / "saved", tmp_path / "one.gguf", dtype=kind)
    mx.save(model, tmp_path / "two.gguf", format="gguf", dtype=kind)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    for tensor in gguf.GGUFReader(tmp_path / "one.gguf").tensors:
        outer = tensor.name in ("token_embd.weight", "output.weight")
        expected = Q.Q8_0 if outer else Q[kind.upper()]
        is_matrix = len(tensor.shape) > 1
        assert tensor.tensor_type == (expected if is_matrix else Q.F32)
    weight = np.asarray(model.layers[0].attention.wq.weight)
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(weight, Q[kind.upper()]), Q[kind.upper()]
    )
    found = numbers(open_gguf(tmp_path / "one.gguf")["blk.0.attn_q.weight"])
    np.testing.assert_array_equal(found, expected)


def test_a_single_expert(tmp_path):
    model = random_model(sliding_window=None, moe=MoEConfig(1, 1))
    mx.save(model, tmp_path / "model.gguf", format="gguf")
    same_model(mx.load_model(tmp_path / "model.gguf", dtype=jnp.float32), model)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    raw = write_raw(tmp_path / "raw")
    target = tmp_path / "out" / "model.gguf"
    mx.convert(raw, target)
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        mx.convert(raw, target)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx.files.gguf_export.GgufFile, "_encoded", fail)
    with pytest.raises(KeyboardInterrupt):
        mx.convert(raw, target, force=True)
    with pytest.raises(KeyboardInterrupt):
        mx.convert(raw, tmp_path / "out" / "new.gguf")
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    assert target.read_bytes() == before
    monkeypatch.undo()
    mx.convert(raw, target, force=True, dtype="f32")
    assert len(target.read_bytes()) > len(before)
    with pytest.raises(FileExistsError, match="holds what is converted"):
        mx.convert(target, target, force=True)


@pytest.mark.parametrize(
    "name, target, options, message",
    [
        ("Ministral", "x.gguf", {}, "layers have different windows"),
        ("v0.3", "x.bin", {"format": "gguf"}, "must end in .gguf, got 'x.bin'"),
        ("v0.3", "x.gguf", {"dtype": "q5_k"}, "dtype must be"),
        ("v0.3", "x.gguf", {"dtype": "int8"}, "dtype must be"),
        ("Nemo", "x.gguf", {"dtype": "q8_0"}, "attn_output.weight is 24 wide"),
    ],
)
def test_what_cannot_be_written(name, target, options, message, tmp_path):
    raw = write_raw(tmp_path / "raw", name)
    with pytest.raises(ValueError, match=message):
        mx.convert(raw, tmp_path / target, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("name", ["v0.3", "Ministral 3"])
def test_llama_cpp_writes_the_same(name, tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    changes = {"head_dim": 64, "dim": 256, "hidden_dim": 256, "sliding_window": None}
    changes |= {"vocab_size": 2048, **VARIANTS[name]}
    model = random_model(**changes)
    path = tmp_path / "model.gguf"
    tokenizer = TINY_MISTRAL / "tokenizer.model"
    mx.save(model, path, format="gguf", dtype="f32", tokenizer=tokenizer)
    assert_llama_cpp_agrees(path, model)


def test_llama_cpp_reads_the_embedded_model(tmp_path):
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    mx.convert(TINY_MISTRAL, tmp_path / "model.gguf", dtype="f32")
    model, tokenizer = mx.load(tmp_path / "model.gguf", dtype=jnp.float32)
    # llama.cpp has no window for this architecture: a text shorter than it.
    theirs = assert_llama_cpp_agrees(tmp_path / "model.gguf", model)
    text = "To be, or not to be"
    assert theirs.tokenize(text.encode()) == tokenizer.encode(text)


def assert_llama_cpp_agrees(path, model):
    import llama_cpp

    options = {"n_ctx": 64, "type_k": 0, "type_v": 0, "verbose": False}
    if model.config.yarn is not None:  # otherwise this wrapper has its own
        options |= {"yarn_beta_fast": model.config.yarn.beta}
        options |= {"yarn_beta_slow": model.config.yarn.alpha}
    theirs = llama_cpp.Llama(str(path), **options)
    theirs.eval(TOKENS)
    found = []
    for _ in range(20):
        pointer = theirs._ctx.get_logits()
        logits = np.ctypeslib.as_array(pointer, shape=(theirs.n_vocab(),))
        found.append(int(logits.argmax()))
        theirs.eval(found[-1:])
    key = jax.random.key(0)
    (ours,) = mx.generation.generate(model, [TOKENS], max_tokens=20, key=key)
    assert ours.tokens == found
    return theirs


# --- tokenizers ---------------------------------------------------------------------------

TEXTS = [
    "To be, or not to be: that is the question.",
    "  two  blanks, a tab\t and\n\nlines\r\n  ",
    "Äöü ß 中文 日本語 😀 👩‍👩‍👧 العربية",
    "<s> </s> [INST] [/INST] <unk> <0x41> ▁",
    "x = [1, 23, 456]; print('don't')  # 3.14159",
    "",
    "A",
]


def shipped():
    mistral_common = pytest.importorskip("mistral_common")
    folder = Path(mistral_common.__file__).parent / "data"
    return sorted([*folder.glob("*.model*"), *folder.glob("tekken*")])


SHIPPED = 8 if importlib.util.find_spec("mistral_common") is None else len(shipped())


@pytest.mark.parametrize("i", range(SHIPPED))
def test_mistrals_tokenizers_there_and_back(i, tmp_path):
    path = shipped()[i]
    name = "tekken.json" if path.suffix == ".json" else "tokenizer.model"
    folder = tmp_path / "saved"
    tokenizer = mx.Tokenizer(path)
    vocab_size = tokenizer.vocab_size + 3
    mx.save(random_model(vocab_size=vocab_size, n_layers=1, sliding_window=None), folder)
    shutil.copy(path, folder / name)
    mx.convert(folder, tmp_path / "model.gguf")
    found = mx.load_tokenizer(tmp_path / "model.gguf")
    assert found.vocab_size == vocab_size
    assert (found.bos_id, found.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert found.eos_ids == (tokenizer.eos_id,)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert found.encode(text) == ids, text
        assert found.decode(ids) == tokenizer.decode(ids)
    for control in "[INST]", "[TOOL_CALLS]", "[THINK]":
        assert found.control_id(control) == tokenizer.control_id(control)
    # Out of the GGUF it is a file that is read again.
    mx.convert(tmp_path / "model.gguf", tmp_path / "hf", format="huggingface")
    again = mx.load_tokenizer(tmp_path / "hf")
    assert all(again.encode(text) == found.encode(text) for text in TEXTS)


@pytest.mark.parametrize("words", ["gpt-2", "llama-bpe", "tekken"])
def test_a_bpe_of_others(words, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    model.pre_tokenizer = level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=level.alphabet(), show_progress=False
    )
    model.train_from_iterator(TEXTS * 20, trainer)
    content = json.loads(model.to_str())["model"]
    names = ["<s>", "</s>", "<|im_end|>"]
    tokens = [*content["vocab"], *names]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(content["vocab"]) + [3, 3, 4])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_eot_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}<|im_end|>")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = mx.load_tokenizer(tmp_path / "x.gguf")
    assert tokenizer.eos_ids == (len(tokens) - 2, len(tokens) - 1)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        if words == "gpt-2":
            assert ids == model.encode(text).ids
        assert tokenizer.decode(ids) == text
    ids = mx.encode_chat(tokenizer, [{"role": "user", "content": "a<|im_end|></s>"}])
    assert [ids[0], ids[-1]] == [len(tokens) - 3, len(tokens) - 1]
    assert not set(ids[1:-1]) & set(range(len(tokens) - 3, len(tokens)))


def test_a_tokenizer_beside_comes_first(tmp_path):
    mx.convert(TINY_MISTRAL, tmp_path / "model.gguf")
    inside = mx.load_tokenizer(tmp_path / "model.gguf")
    assert inside.path.name == "model.gguf"
    with pytest.raises(ValueError, match="its metadata have none. Put .*beside it"):
        mx.encode_chat(inside, [{"role": "user", "content": "Hello"}])
    shutil.copy(TINY_MISTRAL / "tokenizer.model", tmp_path)
    assert mx.load_tokenizer(tmp_path / "model.gguf").path.name == "tokenizer.model"
    model, tokenizer = mx.load(tmp_path)
    expected = mx.generate(*mx.load(), "To be", max_tokens=5)
    assert mx.generate(model, tokenizer, "To be", max_tokens=5) == expected


# --- what is wrong ------------------------------------------------------------------------


def spoil(path, place, content):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


BAD = {
    "empty": (lambda p: cut(p, 0), "is not a GGUF file: it has 0 bytes"),
    "magic": (lambda p: spoil(p, 0, b"GGJT"), "does not begin with GGUF"),
    "version": (lambda p: spoil(p, 4, struct.pack("<I", 9)), "its version is 9"),
    "big-endian": (lambda p: spoil(p, 4, struct.pack(">I", 3)), "its version is 50331648"),
    "tensors": (lambda p: spoil(p, 8, b"\xff" * 8), "claims 18446744073709551615 tensors"),
    "header cut": (lambda p: cut(p, 300), "ends in the middle of its header"),
    "data cut": (lambda p: cut(p, p.stat().st_size - 99), "ends before .* does. Download"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged(name, tmp_path):
    path = tmp_path / "model.gguf"
    write_by_library(path, random_model(sliding_window=None))
    change, message = BAD[name]
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        mx.load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale, which this model does not"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope.scaling.type is 'longrope'",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)),
            "unknown rope",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(24, np.float32)),
            "has the unknown blk.0.attn_q.bias",
        ),
    ],
)
def test_what_is_not_implemented(change, message, tmp_path):
    path = tmp_path / "model.gguf"
    write_by_library(path, random_model(sliding_window=None), changes=[change])
    with pytest.raises(ValueError, match=message) as error:
        mx.load_model(path)
    assert str(path) in str(error.value)


def test_other_things(tmp_path):
    path = tmp_path / "model.gguf"
    write_by_library(path, random_model(sliding_window=None))
    with pytest.raises(FileNotFoundError, match="There is no file .*none.gguf"):
        mx.load(tmp_path / "none.gguf")
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="several models: name one of model.gguf, other"):
        mx.load(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture is 'qwen2'"):
        mx.load_model(tmp_path / "qwen.gguf")
    with pytest.raises(FileNotFoundError, match="There is no tokenizer in .*qwen.gguf"):
        mx.load_tokenizer(tmp_path / "qwen.gguf")


def test_without_the_library(tmp_path, monkeypatch):
    model = random_model(**WIDE)
    write_by_library(tmp_path / "floats.gguf", model)
    write_by_library(tmp_path / "blocks.gguf", model, Q.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    same_model(mx.load_model(tmp_path / "floats.gguf", dtype=jnp.float32), model)
    for call in (
        lambda: mx.load_model(tmp_path / "blocks.gguf"),
        lambda: mx.save(model, tmp_path / "x.gguf", format="gguf"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'mistral_eqx\[gguf\]'"):
            call()


def test_norms_that_were_never_bfloat16(tmp_path):
    """Stay in float32, and so does the model by default."""
    model = random_model(sliding_window=None)
    cast = jax.tree.map(lambda a: a if a.ndim == 1 else a.astype(jnp.bfloat16), model)
    mx.save(cast, tmp_path / "model.gguf", format="gguf", dtype="bf16")
    mx.convert(tmp_path / "model.gguf", tmp_path / "raw", format="mistral")
    found = mx.load_model(tmp_path / "raw", dtype=jnp.float32)
    np.testing.assert_array_equal(found.norm.weight, model.norm.weight)
    assert ml_dtypes.bfloat16(1.1) != np.float32(1.1)
