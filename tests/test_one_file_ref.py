"""The one-file port by itself: its names, files, errors, quirk, `generate`, command line.

That its numbers are Mistral's is test_parity.py's to show.
"""

import ast
import functools
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from models import close
from safetensors.numpy import save_file

import one_file_ref
from one_file_ref import BadModelError, ModelArgs, Tokenizer, Transformer, generate


SOURCE = Path(one_file_ref.__file__)
EMBEDDED = SOURCE.parent / "mistral_eqx" / "tiny_mistral"
VOCAB_SIZE = 300
PARAMS = {
    "dim": 16,
    "n_layers": 2,
    "head_dim": 6,
    "hidden_dim": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "sliding_window": 4,
    "norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
}
LAYER_NAMES = [
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "attention.wo.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
]
NAMES = {"tok_embeddings.weight", "norm.weight", "output.weight"} | {
    f"layers.{i}.{name}" for i in range(2) for name in LAYER_NAMES
}
SHORT, LONG = "the owl", "the cat and the dog sat by the fire and the owl saw"
V7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
}


@pytest.fixture(scope="session")
def tokenizer_bytes():
    animals, verbs = (
        ["cat", "dog", "owl", "fox", "hen"],
        ["sat", "ran", "sang", "slept", "saw"],
    )
    lines = [
        f"the {a} {v} by the fire and the {b} {v} too"
        for a in animals
        for b in animals
        for v in verbs
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_bytes)
    return Tokenizer(str(path))


@functools.cache
def make_model(**changes):
    model = Transformer(ModelArgs(**(PARAMS | changes)), key=jax.random.key(0))
    # as initialised, attention would hardly look anywhere in particular
    return jax.tree.map(
        lambda leaf: leaf * 4 if leaf.ndim == 2 and leaf.shape[0] < VOCAB_SIZE else leaf,
        model,
    )


def state_dict(model):
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in paths
    }


@pytest.fixture
def folder(tmp_path, tokenizer_bytes):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes)
    save_file(state_dict(make_model()), tmp_path / "consolidated.safetensors")
    return tmp_path


def change_params(folder, **changes):
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(
        json.dumps({name: value for name, value in params.items() if value != "absent"})
    )


def change_weights(folder, change):
    weights = state_dict(make_model())
    change(weights)
    save_file(weights, folder / "consolidated.safetensors")


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["one_file_ref.py", *map(str, arguments)])
    try:
        one_file_ref.main()
    except SystemExit as error:
        return error.code
    return 0


def in_steps(model, ids, n_prefill):
    """Logits [len(ids), vocab_size]: `n_prefill` tokens at once, the others one by one."""
    ids = jnp.asarray(ids)[None]
    logits, cache = model.forward(
        ids[:, :n_prefill], jnp.arange(n_prefill), model.empty_cache(1, ids.shape[1])
    )
    parts = [logits]
    for i in range(n_prefill, ids.shape[1]):
        logits, cache = model.forward(ids[:, i : i + 1], jnp.array([i]), cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)[0]


def some_ids(n):
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, n, dtype=np.int32)


# The file


def test_same_names_in_the_same_order():
    reference = """
        ModelArgs repeat_kv _reshape_for_broadcast apply_rotary_emb Attention
        Attention.__init__ Attention.forward FeedForward FeedForward.__init__
        FeedForward.forward RMSNorm RMSNorm.__init__ RMSNorm._norm RMSNorm.forward
        TransformerBlock TransformerBlock.__init__ TransformerBlock.forward
        precompute_freqs_cis Transformer Transformer.__init__ Transformer.forward
        Transformer.from_folder Tokenizer Tokenizer.__init__ Tokenizer.eos_id
        Tokenizer.pad_id Tokenizer.encode Tokenizer.decode generate demo
    """.split()
    names = []
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            names += [
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
            ]
    assert [name for name in names if name in reference] == reference


def test_every_signature_is_annotated_and_the_package_is_not_imported():
    tree = ast.parse(SOURCE.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert node.returns is not None, node.name
            assert [
                a.arg for a in arguments if a.annotation is None and a.arg != "self"
            ] == [], node.name
            annotations = [ast.unparse(a.annotation) for a in arguments if a.annotation] + [
                ast.unparse(node.returns)
            ]
            assert not {"Array", "jax.Array"} & set(annotations), (
                f"{node.name}: an array without a shape"
            )
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("mistral_eqx") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not node.module.startswith(
                ("mistral_eqx", "__future__")
            )


# Loading


def test_leaf_paths_are_the_checkpoints_names():
    model = make_model()
    assert set(state_dict(model)) == NAMES
    assert model.layers[0].feed_forward.w2.weight.shape == (
        PARAMS["dim"],
        PARAMS["hidden_dim"],
    )  # [out, in]
    assert model.layers[0].attention.wo.weight.shape == (
        16,
        24,
    )  # head_dim is not dim / n_heads


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_weights_arrive_in_the_dtype_of_the_platform(folder, monkeypatch, stored, backend):
    weights = {
        name: weight.astype(stored) for name, weight in state_dict(make_model()).items()
    }
    save_file(weights, folder / "consolidated.safetensors")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loaded = state_dict(Transformer.from_folder(folder))
    for name, weight in weights.items():
        assert loaded[name].dtype == ("float32" if backend == "cpu" else stored)
        np.testing.assert_array_equal(
            loaded[name].astype(np.float32), weight.astype(np.float32)
        )


@pytest.mark.parametrize("room, expected", [(2, "float32"), (1.99, "bfloat16")])
def test_float32_must_fit_in_half_of_the_memory(folder, monkeypatch, room, expected):
    weights = state_dict(make_model())
    size = sum(4 * weight.size for weight in weights.values())
    weights = {name: weight.astype("bfloat16") for name, weight in weights.items()}
    save_file(weights, folder / "consolidated.safetensors")
    monkeypatch.setattr(
        os, "sysconf", {"SC_PHYS_PAGES": room * size, "SC_PAGE_SIZE": 1}.get
    )
    loaded = state_dict(Transformer.from_folder(folder))
    assert {str(weight.dtype) for weight in loaded.values()} == {expected}


def test_dtype_can_be_chosen(folder):
    model = Transformer.from_folder(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    assert model.empty_cache(1, 3)[0][0].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pth_and_safetensors_are_the_same_model(folder, monkeypatch, dtype):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(
        jax, "default_backend", lambda: "gpu"
    )  # so that the dtype is the file's
    weights = {
        name: weight.astype(dtype) for name, weight in state_dict(make_model()).items()
    }
    save_file(weights, folder / "consolidated.safetensors")
    from_safetensors = state_dict(Transformer.from_folder(folder))
    (folder / "consolidated.safetensors").unlink()
    tensors = {
        name: torch.tensor(w.astype(np.float32)).to(getattr(torch, dtype))
        for name, w in weights.items()
    }
    torch.save(tensors, folder / "consolidated.00.pth")
    from_pth = state_dict(Transformer.from_folder(folder))
    for name, weight in from_safetensors.items():
        assert from_pth[name].dtype == weight.dtype == dtype
        np.testing.assert_array_equal(from_pth[name], weight)


def test_safetensors_is_preferred(folder):
    (folder / "consolidated.00.pth").write_text("never opened")
    Transformer.from_folder(folder)


@pytest.mark.parametrize(
    "window, theta, expected",
    [
        pytest.param(4, "absent", 1e4, id="v0.1"),
        pytest.param(None, "absent", 1e6, id="v0.2"),
        pytest.param("absent", None, 1e6, id="v0.2 without a window's name"),
        pytest.param("absent", 1000000.0, 1e6, id="v0.3"),
        pytest.param("absent", 1000000, 1e6, id="v0.3 with an integer"),
        pytest.param(4, 5e5, 5e5, id="both"),
    ],
)
def test_the_released_versions_load(folder, window, theta, expected):
    change_params(folder, sliding_window=window, rope_theta=theta)
    model = Transformer.from_folder(folder)
    assert model.args.rope_theta == expected
    assert model.args.sliding_window == (None if window == "absent" else window)


def test_theta_and_window_reach_the_model():
    ids, model = some_ids(7), make_model(sliding_window=None)
    logits = in_steps(model, ids, 7)
    np.testing.assert_array_equal(
        in_steps(make_model(sliding_window=None, rope_theta=1e6), ids, 7), logits
    )
    assert (
        np.abs(
            in_steps(make_model(sliding_window=None, rope_theta=1e4), ids, 7) - logits
        ).max()
        > 1e-2
    )
    windowed = in_steps(make_model(sliding_window=4, rope_theta=1e6), ids, 7)
    close(windowed[:5], logits[:5], 3e-5)
    assert np.abs(windowed[5:] - logits[5:]).max() > 1e-2


@pytest.mark.parametrize(
    "params, parameters",
    [
        (
            V7B | {"norm_eps": 1e-5, "sliding_window": 4096, "vocab_size": 32000},
            7_241_732_096,
        ),
        (
            V7B | {"norm_eps": 1e-5, "rope_theta": 1000000.0, "vocab_size": 32768},
            7_248_023_552,
        ),
    ],
)
def test_the_real_configurations_have_the_published_size(params, parameters):
    model = eqx.filter_eval_shape(Transformer, ModelArgs(**params), key=jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters


def test_tokenizer_of_v03_by_its_own_name(folder, monkeypatch, capsys):
    (folder / "tokenizer.model").rename(folder / "tokenizer.model.v3")
    assert run_main(monkeypatch, folder, "--max_tokens", 0) == 0
    assert capsys.readouterr() == ("", "")


# Errors


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def wrong_shape(weights):
    weights["layers.1.attention.wk.weight"] = weights[
        "layers.1.attention.wk.weight"
    ].T.copy()


FAULTS = {
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "is not a folder"),
    "no params": (lambda f: (f / "params.json").unlink(), "has no params.json"),
    "params cut": (lambda f: truncate(f / "params.json", 20), "params.json cannot be used"),
    "params in binary": (
        lambda f: (f / "params.json").write_bytes(b"\xff\xfe\x00"),
        "params.json cannot be used",
    ),
    "params a list": (
        lambda f: (f / "params.json").write_text("[]"),
        "params.json cannot be used",
    ),
    "key that moves the cursor": (
        lambda f: change_params(f, **{"\x1b[31mred": 1}),
        "argument '[31mred'",
    ),
    "key missing": (lambda f: change_params(f, dim="absent"), "argument: 'dim'"),
    "key unknown": (lambda f: change_params(f, moe={"num_experts": 8}), "argument 'moe'"),
    "text for a number": (lambda f: change_params(f, dim="16"), "dim cannot be '16'"),
    "null for a number": (lambda f: change_params(f, dim=None), "dim cannot be None"),
    "true for a number": (
        lambda f: change_params(f, n_layers=True),
        "n_layers cannot be True",
    ),
    "no window is null": (
        lambda f: change_params(f, sliding_window=0),
        "sliding_window cannot be 0",
    ),
    "no negative window": (
        lambda f: change_params(f, sliding_window=-1),
        "sliding_window cannot be -1",
    ),
    "theta": (lambda f: change_params(f, rope_theta=0), "rope_theta cannot be 0"),
    "theta too large": (
        lambda f: change_params(f, rope_theta=10**400),
        "rope_theta cannot be 1000",
    ),
    "window too large": (
        lambda f: change_params(f, sliding_window=2**40),
        "sliding_window cannot be 1099511627776",
    ),
    "eps": (lambda f: change_params(f, norm_eps=math.inf), "norm_eps cannot be inf"),
    "heads": (
        lambda f: change_params(f, n_kv_heads=3),
        "n_heads, n_kv_heads, head_dim cannot be 4, 3, 6",
    ),
    "odd head": (
        lambda f: change_params(f, head_dim=5),
        "n_heads, n_kv_heads, head_dim cannot be 4, 2, 5",
    ),
    "no weights": (
        lambda f: (f / "consolidated.safetensors").unlink(),
        "has no consolidated.safetensors or consolidated.00.pth",
    ),
    "weights cut": (
        lambda f: truncate(f / "consolidated.safetensors", 9000),
        "consolidated.safetensors cannot be used",
    ),
    "weights empty": (
        lambda f: truncate(f / "consolidated.safetensors", 0),
        "consolidated.safetensors cannot be used",
    ),
    "weight missing": (
        lambda f: change_weights(f, lambda w: w.pop("norm.weight")),
        "norm.weight is missing, or unknown",
    ),
    "weights missing": (
        lambda f: change_params(f, n_layers=3),
        "layers.2.attention.wk.weight is missing",
    ),
    "weights left over": (
        lambda f: change_params(f, n_layers=1),
        "layers.1.attention.wk.weight is missing",
    ),
    "weight unknown": (
        lambda f: change_weights(f, lambda w: w.update(extra=w["norm.weight"])),
        "extra is missing, or unknown",
    ),
    "shape": (
        lambda f: change_weights(f, wrong_shape),
        "layers.1.attention.wk.weight is (16, 12), not (12, 16)",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        "has no tokenizer.model or tokenizer.model.v3",
    ),
    "tokenizer empty": (
        lambda f: truncate(f / "tokenizer.model", 0),
        "tokenizer.model cannot be used",
    ),
    "tokenizer cut": (
        lambda f: truncate(f / "tokenizer.model", 2000),
        "tokenizer.model cannot be used",
    ),
    "tokenizer a text": (
        lambda f: (f / "tokenizer.model").write_text("not a model"),
        "tokenizer.model cannot be used",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_line_and_status_2(
    folder, monkeypatch, capfd, fault, unchecked
):
    damage, message = FAULTS[fault]
    damage(folder)
    assert run_main(monkeypatch, folder) == 2
    out, err = (
        capfd.readouterr()
    )  # at the level of the process, for what a C++ library may write
    assert out == ""
    assert (
        err.startswith("one_file_ref.py: ") and err.endswith("\n") and err.count("\n") == 1
    )
    assert message in err and err[:-1].isprintable()


def test_a_name_that_is_too_long():
    command = [sys.executable, one_file_ref.__file__, "x" * 300]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert b"File name too long" in done.stderr


def test_too_many_tokens(folder, monkeypatch, capfd):
    assert run_main(monkeypatch, folder, "--max_tokens", 10**12) == 2
    assert "--max_tokens must be" in capfd.readouterr().err


def test_too_little_memory(folder, monkeypatch, capfd):
    def generate(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")

    monkeypatch.setattr(one_file_ref, "generate", generate)
    assert run_main(monkeypatch, folder) == 2
    assert capfd.readouterr().err == (
        "one_file_ref.py: RESOURCE_EXHAUSTED: Out of memory\n"
    )


def test_a_reader_that_has_seen_enough(folder):
    command = [sys.executable, one_file_ref.__file__, folder, "--max_tokens", "3"]
    pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipe.stdout.close()
    assert pipe.stderr.read() == b"" and pipe.wait(300) == 0
    pipe.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_in_a_line(folder):
    command = [sys.executable, one_file_ref.__file__, folder, "--max_tokens", "3"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 10, VOCAB_SIZE + 10])
def test_a_tokenizer_of_another_size_is_refused(folder, monkeypatch, capfd, vocab_size):
    change_params(folder, vocab_size=vocab_size)
    save_file(
        state_dict(make_model(vocab_size=vocab_size)), folder / "consolidated.safetensors"
    )
    assert run_main(monkeypatch, folder) == 2
    assert capfd.readouterr().err.endswith(
        f"the tokenizer has {VOCAB_SIZE} tokens and the model {vocab_size}\n"
    )


def test_a_pth_without_torch_says_what_to_install(folder, monkeypatch, capfd):
    (folder / "consolidated.safetensors").rename(folder / "consolidated.00.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_main(monkeypatch, folder) == 2
    err = capfd.readouterr().err
    assert "pip install torch" in err and err.count("\n") == 1


@pytest.mark.parametrize("content", ["text", "tensor", "cut", "unsafe"])
def test_a_broken_pth_is_one_line_and_status_2(folder, monkeypatch, capfd, content):
    torch = pytest.importorskip("torch")
    (folder / "consolidated.safetensors").unlink()
    path = folder / "consolidated.00.pth"
    weights = {
        name: torch.tensor(weight) for name, weight in state_dict(make_model()).items()
    }
    torch.save(
        {"tensor": torch.ones(3), "unsafe": weights | {"code": print}}.get(
            content, weights
        ),
        path,
    )
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "cut":
        truncate(path, 9000)
    assert run_main(monkeypatch, folder) == 2
    err = capfd.readouterr().err
    assert "not a complete file of named tensors" in err and err.count("\n") == 1


def test_errors_can_be_caught_by_a_program(folder):
    (folder / "consolidated.safetensors").unlink()
    with pytest.raises(ValueError, match="has no consolidated.safetensors"):
        Transformer.from_folder(folder)


# The window


def test_quirk_prefill_sees_one_key_more_than_decoding():
    # the mask is triu(diagonal=-W), which leaves W + 1 keys; the rotating buffer holds W
    window, ids = 4, some_ids(20)
    model = make_model()
    prefill, decode = in_steps(model, ids, len(ids)), in_steps(model, ids, 1)
    # the first W queries have no more than W keys
    close(prefill[:window], decode[:window], 3e-5)
    assert (np.abs(prefill[window:] - decode[window:]).max(axis=1) > 1e-2).all()
    # one key less in the mask, and prefill does as decoding does; one slot more, and
    # decoding does as prefill does
    mended = in_steps(make_model(sliding_window=window - 1), ids, len(ids))
    close(mended, decode, 3e-5)
    larger = in_steps(make_model(sliding_window=window + 1), ids, 1)
    close(prefill, larger, 3e-5)


def test_quirk_at_the_seam():
    # with one layer, a step after the prefill does not depend on how the rest came in
    window, ids = 4, some_ids(20)
    model = make_model(sliding_window=window, n_layers=1)
    decode = in_steps(model, ids, 1)
    for n_prefill in (2, window + 1, 19):
        close(in_steps(model, ids, n_prefill)[n_prefill:], decode[n_prefill:], 3e-5)


@pytest.mark.parametrize("n_prefill", [1, 5])
def test_without_a_window_decoding_is_prefill(n_prefill):
    model, ids = make_model(sliding_window=None), some_ids(12)
    close(in_steps(model, ids, n_prefill), in_steps(model, ids, 12), 3e-5)


def test_the_cache_rotates():
    window, n = 4, 3 * 4 + 2
    model, ids = make_model(sliding_window=window), jnp.asarray(some_ids(n))[None]
    _, at_once = model.forward(ids, jnp.arange(n), model.empty_cache(1, n))
    by_one = model.empty_cache(1, n)
    for i in range(n):
        _, by_one = model.forward(ids[:, i : i + 1], jnp.array([i]), by_one)
    assert at_once[0][0].shape == (1, window, 2, 6)
    # the first layer's come from the embeddings alone, where the quirk does not reach
    for a, b in zip(at_once[0], by_one[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # slot s holds the last position p with p % W == s: 12, 13, 10, 11
    _, last = model.forward(ids[:, 12:13], jnp.array([12]), model.empty_cache(1, n))
    np.testing.assert_allclose(at_once[0][1][:, 0], last[0][1][:, 0], atol=1e-5)


def test_the_cache_without_a_window_is_as_long_as_the_text():
    assert make_model(sliding_window=None).empty_cache(3, 17)[1][1].shape == (3, 17, 2, 6)


# The numbers that other tests would not see


def test_rotary_embedding_turns_neighbouring_pairs():
    freqs_cis = one_file_ref.precompute_freqs_cis(6, jnp.array([0, 1, 100]), 1e4)
    angles = np.outer([0, 1, 100], 1e4 ** -(np.arange(3) / 3))
    np.testing.assert_allclose(freqs_cis, np.exp(1j * angles), atol=1e-5)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 6)).astype(np.float32)
    turned, _ = one_file_ref.apply_rotary_emb(jnp.asarray(x), jnp.asarray(x), freqs_cis)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(turned[..., 0::2], pairs.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 1::2], pairs.imag, atol=1e-5)


def test_angles_are_the_same_whether_compiled_or_not():
    positions = jnp.array([0, 4095, 32767])
    compiled = jax.jit(lambda p: one_file_ref.precompute_freqs_cis(128, p, 1e4))(positions)
    np.testing.assert_allclose(
        compiled, one_file_ref.precompute_freqs_cis(128, positions, 1e4), atol=1e-5
    )


def test_norm_rounds_before_the_weight():
    x, weight = jax.random.normal(jax.random.key(0), (2, 64, 16), jnp.bfloat16)
    norm = one_file_ref.RMSNorm(16, 1e-5)
    norm = eqx.tree_at(lambda n: n.weight, norm, weight[0])
    wide = np.asarray(x, np.float32)
    wide = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    rounded = (jnp.asarray(wide).astype(jnp.bfloat16) * weight[:1]).astype(jnp.float32)
    late = (
        (jnp.asarray(wide) * weight[:1].astype(jnp.float32))
        .astype(jnp.bfloat16)
        .astype(jnp.float32)
    )
    out = np.asarray(norm(x), np.float32)
    assert norm(x).dtype == jnp.bfloat16
    # a reciprocal root in the last bit may move a rounding, so count rather than compare
    assert (out != rounded).mean() < 0.01 < 0.1 < (out != late).mean()


def test_bfloat16_stays_near_float32():
    model, ids = make_model(), some_ids(12)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    wide, out = in_steps(model, ids, 6), in_steps(narrow, ids, 6)
    assert out.dtype == np.float32
    assert np.abs(out - wide).mean() < 0.05 * np.abs(wide).mean()


def test_weights_are_all_that_a_gradient_reaches():
    model = make_model()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    ids = jnp.asarray(some_ids(6))[None]
    grads = eqx.filter_grad(lambda m: m(ids, jnp.arange(6), m.empty_cache(1, 6))[0].sum())(
        model
    )
    assert {
        name for name, grad in state_dict(grads).items() if np.abs(grad).max() > 0
    } == NAMES


# generate


def greedy_by_hand(model, ids, n_prefill, n):
    """One row, `n` past the prefill: its ids and each one's log-probability."""
    ids = list(ids)
    total = n_prefill + n
    logits, cache = model.forward(
        jnp.asarray(ids[:n_prefill])[None],
        jnp.arange(n_prefill),
        model.empty_cache(1, total),
    )
    rows = list(np.asarray(logits[0]))
    for i in range(n_prefill, total):
        if len(ids) <= i:
            ids.append(int(rows[-1].argmax()))
        logits, cache = model.forward(jnp.array([[ids[i]]]), jnp.array([i]), cache)
        rows.append(np.asarray(logits[0, 0]))
    logprobs = [
        row[token] - np.log(np.exp(row).sum())
        for row, token in zip(rows, ids[1:total], strict=False)
    ]
    return ids[:total], logprobs


@pytest.mark.parametrize("window, n_kv_heads", [(4, 2), (8, 1), (None, 4)])
def test_a_ragged_batch_is_each_row_by_itself(tokenizer, window, n_kv_heads):
    model, max_tokens = make_model(sliding_window=window, n_kv_heads=n_kv_heads), 30
    prompts = [SHORT, LONG, SHORT + " saw the hen", "the fox ran by the fire"]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    lengths = [len(ids) for ids in encoded]
    assert len(set(lengths)) > 2 and max(lengths) < min(lengths) + max_tokens
    texts, logprobs = generate(prompts, model, tokenizer, max_tokens)
    assert (
        logprobs.shape == (4, min(lengths) - 1 + max_tokens)
        and logprobs.dtype == jnp.float32
    )
    for i, ids in enumerate(encoded):
        by_hand, expected = greedy_by_hand(model, ids, min(lengths), max_tokens)
        assert texts[i] == tokenizer.decode(by_hand)
        assert by_hand[: len(ids)] == ids  # what is given stays as given
        np.testing.assert_allclose(logprobs[i], expected, atol=5e-4)


def test_a_long_prompt_is_cut_where_the_tokens_end(tokenizer):
    texts, _ = generate([SHORT, LONG], make_model(), tokenizer, 4)
    ids = tokenizer.encode(LONG)[: len(tokenizer.encode(SHORT)) + 4]
    assert texts[1] == tokenizer.decode(ids)


def test_padding_is_never_embedded(tokenizer, monkeypatch):
    assert tokenizer.pad_id == -1
    seen, forward = [], Transformer.forward

    def spy(self, input_ids, positions, cache):
        seen.append(
            (np.asarray(input_ids).min(), np.asarray(positions)[-1], cache[0][0].shape)
        )
        return forward(self, input_ids, positions, cache)

    monkeypatch.setattr(Transformer, "forward", spy)
    generate([SHORT, LONG], make_model(), tokenizer, 12)
    assert min(least for least, _, _ in seen) >= 0
    # positions go on by one, and the cache keeps its length
    assert np.diff([position for _, position, _ in seen]).tolist() == [1] * 12
    assert {shape for _, _, shape in seen} == {(2, 4, 2, 6)}


def test_a_prompt_of_nothing_but_bos(tokenizer):
    model = make_model()
    assert tokenizer.encode("") == [1]
    texts, logprobs = generate(["", SHORT], model, tokenizer, 9)
    by_hand, _ = greedy_by_hand(model, [1], 1, 9)
    assert texts[0] == tokenizer.decode(by_hand) and texts[1].startswith(SHORT)
    assert logprobs.shape == (2, 9)


def test_no_tokens_are_no_texts(tokenizer):
    texts, logprobs = generate([SHORT, LONG], make_model(), tokenizer, 0)
    assert texts == [] and logprobs.shape == (2, len(tokenizer.encode(SHORT)) - 1)


def test_what_generate_refuses(tokenizer):
    with pytest.raises(ValueError, match="generate needs a prompt"):
        generate([], make_model(), tokenizer, 3)
    with pytest.raises(ValueError, match="max_tokens of 0 or more"):
        generate([SHORT], make_model(), tokenizer, -1)
    with pytest.raises(BadModelError, match="not among the model's 50"):
        generate([LONG], make_model(vocab_size=50), tokenizer, 3)


@pytest.mark.parametrize("window", [4, None])
def test_decoding_is_traced_once(tokenizer, monkeypatch, window):
    traces, precompute = [], one_file_ref.precompute_freqs_cis

    def count(dim, positions, theta):
        traces.append(positions.shape[0])
        return precompute(dim, positions, theta)

    monkeypatch.setattr(one_file_ref, "precompute_freqs_cis", count)
    model = make_model(
        sliding_window=window, norm_eps=3e-5
    )  # met by no other test, so nothing is compiled yet
    generate([SHORT, LONG], model, tokenizer, 20)
    assert traces == [len(tokenizer.encode(SHORT)), 1]
    generate([SHORT, LONG], model, tokenizer, 20)
    generate(
        [SHORT, SHORT + "s"], jax.tree.map(lambda leaf: leaf * 2, model), tokenizer, 20
    )
    assert len(traces) == 2


# The command line


def test_the_script_prints_as_the_reference_does(folder):
    run = subprocess.run(
        [sys.executable, SOURCE, folder, "--max_tokens", "5"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("==")] == [
        "====================="
    ] * 3
    assert lines[-1] == "=====================" and lines[0].startswith("This is a test")


def test_the_script_fails_without_a_traceback(tmp_path):
    run = subprocess.run(
        [sys.executable, SOURCE, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert (
        run.stderr
        == f"one_file_ref.py: {tmp_path} has no tokenizer.model or tokenizer.model.v3\n"
    )


@pytest.mark.parametrize(
    "max_tokens, message",
    [("-1", "must be 0 or more, not -1"), ("many", "invalid int value")],
)
def test_bad_max_tokens(folder, monkeypatch, capsys, max_tokens, message):
    assert run_main(monkeypatch, folder, f"--max_tokens={max_tokens}") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_is_quiet(folder, tmp_path):
    # a tokenizer in place of the real one presses Ctrl-C when it is made
    (tmp_path / "sentencepiece.py").write_text(
        "import os, signal\n"
        # What starts in the background may have been told to ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def SentencePieceProcessor(**_): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    run = subprocess.run(
        [sys.executable, SOURCE, folder],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


def test_the_embedded_model_is_the_default():
    run = subprocess.run(
        [sys.executable, SOURCE], capture_output=True, text=True, timeout=300
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("=====================\n") == 3
