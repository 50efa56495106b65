import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from models import PARAMS, cast, close, random_model, random_tokens

from mistral_eqx import Transformer, generation, load_model, save
from mistral_eqx.files import export
from mistral_eqx.files.names import weight_name


DTYPES = {"BF16": jnp.bfloat16, "F16": jnp.float16, "F32": jnp.float32}
LAYER_SHAPES = {
    "attention.wq.weight": (24, 32),
    "attention.wk.weight": (12, 32),
    "attention.wv.weight": (12, 32),
    "attention.wo.weight": (32, 24),
    "feed_forward.w1.weight": (48, 32),
    "feed_forward.w2.weight": (32, 48),
    "feed_forward.w3.weight": (48, 32),
    "attention_norm.weight": (32,),
    "ffn_norm.weight": (32,),
}
SHAPES = {
    "tok_embeddings.weight": (64, 32),
    "norm.weight": (32,),
    "output.weight": (64, 32),
} | {f"layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER_SHAPES.items()}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    save(random_model(), path)
    return path


def change_params(folder, **changes):
    path = folder / "params.json"
    params = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in params.items() if value != "absent"}
    path.write_text(json.dumps(kept))


def change_weights(folder, change):
    path = folder / "consolidated.safetensors"
    weights = safetensors.numpy.load_file(path)
    change(weights)
    safetensors.numpy.save_file(weights, path)


def assert_same(model, other):
    assert model.config == other.config
    assert jax.tree.structure(model) == jax.tree.structure(other)
    for leaf, another in zip(jax.tree.leaves(model), jax.tree.leaves(other)):
        assert leaf.dtype == another.dtype
        np.testing.assert_array_equal(leaf, another)


def test_names_are_mistrals():
    leaves, _ = jax.tree_util.tree_flatten_with_path(random_model())
    names = [weight_name(path) for path, _ in leaves]
    assert len(set(names)) == len(names)
    assert {name: leaf.shape for name, (_, leaf) in zip(names, leaves)} == SHAPES


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("window", [8, None])
def test_save_then_load(tmp_path, stored, window):
    model = cast(random_model(sliding_window=window), DTYPES[stored])
    save(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert_same(load_model(tmp_path / "model", dtype=DTYPES[stored]), model)
    # On a CPU float32 is the default, and loses nothing.
    assert_same(load_model(tmp_path / "model"), cast(model, jnp.float32))


@pytest.mark.parametrize("stored", DTYPES)
def test_file_is_what_others_read(tmp_path, stored):
    model = cast(random_model(), DTYPES[stored])
    save(model, tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "consolidated.safetensors")
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    assert {weight.dtype for weight in weights.values()} == {dtypes[stored]}
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        weight = weights.pop(weight_name(path)).float().numpy()
        np.testing.assert_array_equal(weight, np.asarray(leaf, np.float32))
    assert not weights
    params = json.loads((tmp_path / "model" / "params.json").read_text())
    assert params == PARAMS


@pytest.mark.parametrize("stored", DTYPES)
def test_too_large_for_float32(tmp_path, monkeypatch, stored):
    save(cast(random_model(), DTYPES[stored]), tmp_path / "model")
    monkeypatch.setattr(os, "sysconf", lambda name: 256)  # pages, and bytes in each
    assert load_model(tmp_path / "model").dtype == DTYPES[stored]
    assert load_model(tmp_path / "model", dtype=jnp.float32).dtype == jnp.float32


def test_other_dtype(folder):
    assert_same(load_model(folder, dtype=jnp.bfloat16), cast(random_model(), jnp.bfloat16))


def test_nothing_is_overwritten(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=f"{folder} is there already"):
        save(random_model(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_killed_while_saving(tmp_path, monkeypatch):
    def killed(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "deep" / "model"
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_safetensors", killed)
        with pytest.raises(KeyboardInterrupt):
            save(random_model(), path)
    assert not path.exists()
    save(random_model(), path)
    assert os.listdir(path.parent) == ["model"]
    assert_same(load_model(path), random_model())


def cut(size):
    def damage(folder):
        path = folder / "consolidated.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(name):
    return lambda folder: (folder / name).unlink()


def weights(change):
    return lambda folder: change_weights(folder, change)


def params(**changes):
    return lambda folder: change_params(folder, **changes)


WK = "layers.1.attention.wk.weight"
int8 = lambda weights: weights.update({WK: weights[WK].astype(np.int8)})
float8 = lambda weights: weights.update({WK: weights[WK].astype(ml_dtypes.float8_e4m3fn)})
shape = lambda weights: weights.update({WK: weights[WK].T.copy()})
less = lambda weights: weights.pop(WK)
more = lambda weights: weights.update(lora=weights[WK])
many = lambda weights: [weights.pop(name) for name in SHAPES if "layers.1" in name]
PARAMS_FILE, WEIGHTS_FILE = "params.json", "consolidated.safetensors"
# What happens to the folder, and what the error says: the file, the key, what to do.
FAULTS = {
    "params missing": (without(PARAMS_FILE), ["no params.json in", "download"]),
    "params empty": (replace(PARAMS_FILE, b""), [PARAMS_FILE, "cannot be used"]),
    "params cut": (replace(PARAMS_FILE, b'{"dim": 32,'), [PARAMS_FILE, "line 1"]),
    "params binary": (replace(PARAMS_FILE, b"\xff\xfe"), [PARAMS_FILE, "utf-8"]),
    "params a list": (replace(PARAMS_FILE, b"[32]"), [PARAMS_FILE, "hold an object"]),
    "params null": (replace(PARAMS_FILE, b"null"), [PARAMS_FILE, "hold an object"]),
    "key missing": (params(head_dim="absent"), [PARAMS_FILE, "lacks head_dim"]),
    "key unknown": (params(dora={}), [PARAMS_FILE, "has dora", "not implement"]),
    "window 0": (params(sliding_window=0), [PARAMS_FILE, "sliding_window", "got 0"]),
    "window -1": (params(sliding_window=-1), [PARAMS_FILE, "sliding_window", "got -1"]),
    "window text": (params(sliding_window="x"), [PARAMS_FILE, "sliding_window", "'x'"]),
    "weights missing": (without(WEIGHTS_FILE), ["no consolidated.safetensors in"]),
    "weights empty": (cut(0), [WEIGHTS_FILE, "damaged or not whole", "again"]),
    "weights 5 bytes": (cut(5), [WEIGHTS_FILE, "damaged or not whole"]),
    "weights cut in the header": (cut(300), [WEIGHTS_FILE, "damaged or not whole"]),
    "weights cut": (cut(20_000), [WEIGHTS_FILE, "damaged or not whole"]),
    "weights a byte short": (cut(-1), [WEIGHTS_FILE, "damaged or not whole"]),
    "weights a text": (replace(WEIGHTS_FILE, b"x" * 999), [WEIGHTS_FILE, "damaged"]),
    "weight missing": (weights(less), [WEIGHTS_FILE, f"lacks {WK}", "1 missing"]),
    "layer missing": (weights(many), ["makes 2 layers", "hold 1"]),
    "weight too many": (weights(more), [WEIGHTS_FILE, "unknown lora", "1 too many"]),
    "both": (
        weights(lambda w: (less(w), w.update(lora=w["norm.weight"]))),
        [WEIGHTS_FILE, f"lacks {WK} and has the unknown lora"],
    ),
    "weight turned": (weights(shape), [WEIGHTS_FILE, WK, "(32, 12)", "(12, 32)"]),
    "other dim": (params(hidden_dim=50), [WEIGHTS_FILE, "w1.weight", "(50, 32)"]),
    "weight int8": (weights(int8), [WEIGHTS_FILE, "type I8", "quantization"]),
    "weight float8": (weights(float8), [WEIGHTS_FILE, "in FP8 and has no scale"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_folder(folder, unchecked, fault):
    damage, messages = FAULTS[fault]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_model(folder)
    told = str(error.value)
    assert str(folder) in told and "\n" not in told
    for message in messages:
        assert message in told


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path / 'none'}"):
        load_model(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path / 'file'}"):
        load_model(tmp_path / "file")


def shard(skeleton, mesh):
    """The first axis that can be divided among all devices."""

    def sharding(leaf):
        for axis, size in enumerate(leaf.shape):
            if size % mesh.size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, "model"))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(sharding, skeleton)


def test_sharded_is_unsharded(folder):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    model = load_model(folder)
    shardings = shard(eqx.filter_eval_shape(lambda: model), mesh)
    sharded = load_model(folder, shardings=shardings)
    assert_same(sharded, model)
    for leaf, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings)):
        assert leaf.sharding == sharding
        # Rows of wq, columns of wk: an eighth is on each device.
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    tokens = random_tokens(24)
    run = eqx.filter_jit(lambda model, tokens: model(tokens)[0])
    close(run(sharded, jnp.asarray(tokens)), run(model, jnp.asarray(tokens)), 3e-5)
    prompts = [tokens, tokens[:3]]
    texts = [
        generation.generate(any_model, prompts, max_tokens=32, key=jax.random.key(0))
        for any_model in (model, sharded)
    ]
    sharded_rows = [row.tokens for row in texts[1]]
    assert [row.tokens for row in texts[0]] == sharded_rows


def test_one_sharding_for_all(folder):
    sharding = SingleDeviceSharding(jax.devices()[3])
    model = load_model(folder, shardings=sharding)
    assert {leaf.sharding for leaf in jax.tree.leaves(model)} == {sharding}
    assert isinstance(model, Transformer)


def test_saving_a_sharded_model(folder, tmp_path):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    model = random_model()
    sharded = jax.device_put(model, shard(model, mesh))
    save(sharded, tmp_path / "again")
    for name in (PARAMS_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
