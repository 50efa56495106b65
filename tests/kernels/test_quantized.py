"""Weights in eight and four bits: the numbers, and models that hold them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import close, random_model, random_tokens

import mistral_eqx as mx
from mistral_eqx.config import MoEConfig
from mistral_eqx.decoding import prefill_chunk
from mistral_eqx.devices.mesh import make_mesh, parse_mesh
from mistral_eqx.kernels import cpu
from mistral_eqx.kernels.quantized import QuantizedLinear, quantized, quantized_product
from mistral_eqx.layers import Linear
from mistral_eqx.learning.batches import Slices
from mistral_eqx.learning.fitting import fit


SIZES = {"dim": 128, "head_dim": 32, "hidden_dim": 128}
VARIANTS = {
    "dense": {},
    "tied": {"tied_embeddings": True},
    "experts": {"sliding_window": None, "moe": MoEConfig(4, 2)},
}
TOKENS = random_tokens(24)


def model_of(variant):
    return random_model(**SIZES, **VARIANTS[variant])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linears(model, kind):
    is_one = lambda node: isinstance(node, kind)
    found, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_one)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): node for path, node in found if is_one(node)}


def full(model):
    """The model with the weights that the quantized one stands for."""

    def weight(layer):
        eye = jnp.eye(layer.values.shape[-1] * (1 + (layer.values.dtype == jnp.uint8)))
        make = lambda values, scales: quantized_product.plain(eye, values, scales).T
        for _ in layer.values.shape[2:]:
            make = jax.vmap(make)
        linear = Linear(1, 1, dtype=jnp.float32, key=jax.random.key(0))
        weight = make(layer.values, layer.scales)
        return eqx.tree_at(lambda linear: linear.weight, linear, weight)

    is_one = lambda node: isinstance(node, QuantizedLinear)
    change = lambda node: weight(node) if is_one(node) else node
    return jax.tree.map(change, model, is_leaf=is_one)


def logits_of(model):
    logits, _ = jax.jit(lambda model, x: model(x))(model, jnp.array(TOKENS))
    return np.asarray(logits)


def written(model, prompts):
    key = jax.random.key(0)
    rows = mx.generation.generate(model, prompts, max_tokens=8, chunk=4, key=key)
    return [row.tokens for row in rows]


def assert_close(found, expected):
    size = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * size)


# --- numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", mx.kernels.quantized.SCHEMES)
def test_the_nearest_numbers(scheme):
    weight = normal(6, 128)
    weight[2] = 0
    values, scales = map(np.asarray, quantized(jnp.asarray(weight), scheme))
    n_groups = {"int8": 1, "int4": 4}[scheme]
    assert values.nbytes == 6 * {"int8": 128, "int4": 64}[scheme]
    assert scales.shape == (6, n_groups)
    eye = jnp.eye(128)
    held = np.asarray(quantized_product(eye, values, scales)).T
    # A number is off by half a step; int4's scale has the precision of float16, and its
    # largest positive number is 7 steps of 8.
    step = np.repeat(np.abs(scales), 128 // n_groups, axis=1)
    allowed = 0.5 * step if scheme == "int8" else 1.01 * step
    assert (np.abs(held - weight) <= allowed * 1.001).all()
    assert (held[2] == 0).all()
    assert np.abs(held - weight).max() > 0


def test_int4_is_ggufs_q4_0():
    gguf = pytest.importorskip("gguf")
    weight = normal(8, 96)
    weight[3, :32] = 0
    values, scales = map(np.asarray, quantized(jnp.asarray(weight), "int4"))
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.quantize(weight, q4_0).reshape(8, 3, 18)
    np.testing.assert_array_equal(scales, theirs[..., :2].copy().view(np.float16)[..., 0])
    np.testing.assert_array_equal(values.reshape(8, 3, 16), theirs[..., 2:])
    held = quantized_product(jnp.eye(96), jnp.asarray(values), jnp.asarray(scales)).T
    expected = gguf.quants.dequantize(theirs.reshape(8, 54), q4_0)
    np.testing.assert_array_equal(held, expected)


# --- models -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_that_of_its_weights(variant, scheme):
    model = model_of(variant)
    small = mx.quantize(model, scheme)
    names = set(linears(model, Linear))
    gates = {name for name in names if name.endswith(".gate")}
    assert linears(small, QuantizedLinear).keys() == (names - gates) | {"output"}
    assert set(linears(small, Linear)) == gates
    assert bool(gates) == (variant == "experts")
    assert_close(logits_of(small), logits_of(full(small)))
    wrong = (
        np.abs(logits_of(small) - logits_of(model)).max() / np.abs(logits_of(model)).max()
    )
    assert 1e-4 < wrong < {"int8": 0.2, "int4": 1}[scheme]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_is_quantized(variant, dtype, scheme, tmp_path):
    model = model_of(variant)
    for format in "mistral", "huggingface":
        mx.save(model, tmp_path / format, format=format)
        found = mx.load_model(tmp_path / format, dtype=dtype, quantize=scheme)
        expected = mx.quantize(mx.load_model(tmp_path / format, dtype=jnp.float32), scheme)
        ours, structure = jax.tree.flatten(found)
        theirs, expected_structure = jax.tree.flatten(expected)
        assert structure == expected_structure
        for one, other in zip(ours, theirs):
            np.testing.assert_array_equal(one, other.astype(one.dtype))
        layers = linears(expected, QuantizedLinear)
        for name, layer in linears(found, QuantizedLinear).items():
            assert layer.values.dtype == layers[name].values.dtype
            assert layer.scales.dtype == layers[name].scales.dtype
        assert found.tok_embeddings.weight.dtype == dtype


@pytest.mark.parametrize(
    "variant, mesh, scheme",
    [
        ("dense", "model=2", "int8"),
        ("dense", "data=2,fsdp=2,model=2", "int4"),
        ("dense", "pipe=2", "int8"),
        ("tied", "model=4", "int4"),
        ("experts", "expert=4", "int8"),
        ("experts", "pipe=2,expert=2,model=2", "int4"),
    ],
)
def test_on_many_devices(variant, mesh, scheme, tmp_path):
    model = model_of(variant)
    small = mx.quantize(model, scheme)
    prompts = [TOKENS[:9], TOKENS[9:14]]
    expected = written(small, prompts)
    mesh = make_mesh(parse_mesh(mesh))
    spread = mx.shard(small, mesh)
    assert written(spread, prompts) == expected
    mx.save(model, tmp_path / "saved")
    loaded = mx.load_model(tmp_path / "saved", mesh=mesh, quantize=scheme)
    for one, other in zip(*map(jax.tree.leaves, (loaded, spread)), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
    # No device holds all of a matrix that the mesh parts, nor all of its scales.
    if mesh.shape.get("model", 1) > 1:
        layer = next(iter(linears(spread, QuantizedLinear).values()))
        for part in layer.values, layer.scales:
            held = part.addressable_shards[0].data.size
            assert held < part.size or part.shape[-1] == 1


def test_loading_holds_no_full_weight(tmp_path):
    """No more rows are made floats at once than a block's."""
    model = random_model(dim=32, vocab_size=4096)
    mx.save(model, tmp_path / "saved")
    largest = []
    array = mx.files.weights.StoredTensor.array

    def record(self, index, dtype):
        out = array(self, index, dtype)
        if out.dtype == np.float32 and out.shape[-1] > 1:
            largest.append((out.nbytes, self.name))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.files.weights.StoredTensor, "array", record)
        mx.load_model(tmp_path / "saved", dtype=jnp.bfloat16, quantize="int8")
    assert max(size for size, name in largest if name == "output.weight") == 256 * 32 * 4
    # Each is read once.
    read = sum(size for size, name in largest if name == "output.weight")
    assert read == 4096 * 32 * 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU multiplies")
def test_blocks_of_any_number_of_rows(monkeypatch):
    """32,002 ids, which derived models have, are 2 times a prime number."""
    heights, project = [], cpu.project

    def spy(x, weight):
        heights.append(weight.shape[0])
        return project(x, weight)

    monkeypatch.setattr(cpu, "project", spy)
    values, scales = quantized(jnp.asarray(normal(32002, 64)), "int8")
    x = jnp.asarray(normal(16, 64))
    found = jax.jit(quantized_product)(x, values, scales)
    close(found, x @ (values.astype(jnp.float32) * scales).T, 1e-5)
    assert set(heights) == {16384}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU multiplies")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_loop_makes_floats_while_it_reads(scheme, rows):
    weight = jnp.asarray(normal(1024, 1024))
    parts = quantized(weight, scheme)

    def many(x, parts):
        step = lambda i, x: quantized_product(x, *parts)
        return jax.lax.fori_loop(0, 8, step, x)

    compiled = jax.jit(many).lower(jnp.ones((rows, 1024)), parts).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.nbytes / 16


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU multiplies")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_become_floats_one_after_another(scheme):
    """A chunk of a prompt needs room for the floats of one weight or two, not of all."""
    sizes = {"dim": 256, "hidden_dim": 1024, "n_layers": 4}
    model = random_model(**sizes, n_heads=4, n_kv_heads=4, head_dim=64)

    def room(model):
        cache = model.empty_cache(
            jnp.zeros(1, jnp.int32), chunk=16, max_length=32, dtype=jnp.float32
        )
        tokens = jnp.zeros((1, 16), jnp.int32)
        compiled = prefill_chunk.lower(model, cache, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert room(mx.quantize(model, scheme)) < room(model) + 4 * 256 * 1024 * 4


# --- what cannot be -----------------------------------------------------------------------


def test_what_cannot_be_quantized(tmp_path):
    model = random_model()
    small = mx.quantize(model, "int8")
    with pytest.raises(ValueError, match="quantized already"):
        mx.quantize(small, "int8")
    with pytest.raises(ValueError, match='must be "int8" or "int4", got \'int3\''):
        mx.quantize(model, "int3")
    with pytest.raises(ValueError, match=r"layers.0.attention.wo is 24 wide.*use int8"):
        mx.quantize(model, "int4")
    mx.save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match='must be "int8" or "int4", got \'int3\''):
        mx.load_model(tmp_path / "missing", quantize="int3")
    with pytest.raises(ValueError, match=r"layers.0.attention.wo is 24 wide.*use int8"):
        mx.load_model(tmp_path / "saved", quantize="int4")
    with pytest.raises(ValueError, match="cannot be saved"):
        mx.save(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="cannot be trained"):
        text = Slices("text", np.array(TOKENS), seq_len=4, bos_id=1)
        fit(small, text, text, steps=1)
    mesh = make_mesh({"model": 4})
    narrow = mx.quantize(
        random_model(dim=32, head_dim=8, hidden_dim=64, n_kv_heads=4), "int4"
    )
    with pytest.raises(ValueError, match="groups .* among 4 devices. .*int8"):
        mx.shard(narrow, mesh)
