import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from models import adapted, cast, close, random_model, random_tokens, trains
from test_parity import MIXTRAL, PACKAGE_CASES, hugging_face

import mistral_eqx as mx
from mistral_eqx.layers import Linear
from mistral_eqx.learning.batches import Batch, Slices
from mistral_eqx.learning.fitting import fit
from mistral_eqx.learning.lora import LoRALinear, linear_layers, trainable
from mistral_eqx.learning.training import loss, make_optimizer, start, train_step


TOKENS = jnp.array([random_tokens(20, seed=seed) for seed in range(3)])
CASES = {"dense": {}, "mixtral": PACKAGE_CASES[MIXTRAL]}
LOGITS = eqx.filter_jit(lambda model, tokens: jax.vmap(model)(tokens)[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_new_adapter_changes_nothing(case, scheme):
    """Not a bit. Compiled, XLA rounds once where it fuses a product and an addition, and
    which of them it fuses differs from program to program."""
    model = random_model(**CASES[case])
    model = model if scheme is None else mx.quantize(model, scheme)
    new = mx.add_lora(model, key=jax.random.key(0))
    with jax.disable_jit():
        found, expected = (m(TOKENS[0])[0] for m in (new, model))
    np.testing.assert_array_equal(found, expected)
    prompts = [random_tokens(9), random_tokens(4)]
    found, expected = (mx.prefill(m, prompts)[1] for m in (new, model))
    close(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_merged(case, dtype):
    base = cast(random_model(**CASES[case]), dtype)
    model = adapted(base, 0.2)
    merged = mx.merge_lora(model)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(merged))
    expected = LOGITS(model, TOKENS)
    assert np.abs(expected - LOGITS(base, TOKENS)).max() > 0.1 * np.abs(expected).max()
    close(LOGITS(merged, TOKENS), expected, 1e-4 if dtype == jnp.float32 else 0.2)
    # By hand, for one layer.
    name, layer = next((n, v) for n, v in linear_layers(model) if n.endswith("wk"))
    weight = dict(linear_layers(merged))[name].weight
    by_hand = layer.base.weight.astype(jnp.float32) + 2.0 * layer.b @ layer.a
    close(weight.astype(jnp.float32), by_hand, 1e-6 if dtype == jnp.float32 else 8e-3)


def test_which_layers():
    model = random_model(sliding_window=None, moe=PACKAGE_CASES[MIXTRAL]["moe"])

    def chosen(**options):
        model_ = mx.add_lora(model, key=jax.random.key(0), **options)
        return {n for n, v in linear_layers(model_) if isinstance(v, LoRALinear)}

    every = {name for name, _ in linear_layers(model)}
    gates = {name for name in every if name.endswith("gate")}
    assert chosen() == every - gates - {"output"}
    assert chosen(layers="attention") == {name for name in every if "attention" in name}
    assert chosen(layers=r"layers\.1.*w[qv]") == {
        "layers.1.attention.wq",
        "layers.1.attention.wv",
    }
    assert chosen(layers="output|gate") == gates | {"output"}


def test_init():
    model = mx.add_lora(random_model(), rank=5, key=jax.random.key(3))
    layer = model.layers[0].feed_forward.w2
    assert layer.a.shape == (5, 48) and layer.b.shape == (32, 5)
    # Kaiming's uniform distribution with a = sqrt(5), as in PEFT and mistral-finetune.
    torch.manual_seed(0)
    theirs = torch.empty(5, 48)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert jnp.abs(layer.a).max() <= 48**-0.5 and theirs.abs().max() <= 48**-0.5
    np.testing.assert_allclose(jnp.std(layer.a), theirs.std(), rtol=0.2)
    other = model.layers[1].feed_forward.w2
    assert (other.a != layer.a).any()


@trains
@pytest.mark.parametrize("case", CASES)
def test_memory_is_for_the_adapter_alone(case):
    """By bytes: gradients and moments exist for `a` and `b` and nothing else."""
    model = adapted(random_model(**CASES[case]), 0.2)
    adapter = sum(
        layer.a.nbytes + layer.b.nbytes
        for _, layer in linear_layers(model)
        if isinstance(layer, LoRALinear)
    )
    optimizer = make_optimizer(learning_rate=1e-2, steps=9, warmup=0)
    frozen, state = start(model, optimizer)
    held = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)
    assert held(state.weights) == adapter
    assert held(state.optimizer_state) == 2 * adapter
    value = lambda weights: loss(eqx.combine(weights, frozen), Batch(TOKENS))
    assert held(eqx.filter_jit(eqx.filter_grad(value))(state.weights)) == adapter
    before = jax.tree.map(jnp.copy, frozen)
    state, _ = train_step(frozen, state, Batch(jnp.copy(TOKENS)), optimizer)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


@pytest.mark.parametrize("case", ["dense"])
def test_gradients_are_pefts(case):
    model = adapted(random_model(**CASES[case]), 0.2)
    weights, frozen = eqx.partition(model, trainable(model))
    value, grads = eqx.filter_jit(
        eqx.filter_value_and_grad(lambda w: loss(eqx.combine(w, frozen), Batch(TOKENS)))
    )(weights)
    torch_model = hugging_face(mx.merge_lora(random_and_new(model)))
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names)
    theirs = peft.get_peft_model(torch_model, config)
    theirs.load_state_dict(as_pefts(model), strict=False)
    tokens = torch.tensor(np.asarray(TOKENS, np.int64))
    targets = tokens[:, 1:].contiguous()
    torch_value = theirs(tokens[:, :-1], labels=targets, shift_labels=targets).loss
    torch_value.backward()
    assert abs(value - torch_value.item()) < 1e-5
    grads = as_pefts(eqx.combine(grads, frozen))
    found = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == grads.keys()
    for name, grad in found.items():
        scale = grad.abs().max().item()
        assert scale > 1e-4
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-3 * scale)


def random_and_new(model):
    """The base of a model with an adapter, with an adapter that adds nothing."""
    zero = lambda path, leaf: leaf * 0 if path[-1].name == "b" else leaf
    return jax.tree_util.tree_map_with_path(zero, model)


HF_NAMES = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
HF_NAMES |= {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def as_pefts(model):
    """Written here once more, by hand: PEFT's names, and the rows of wq and wk."""
    out, head_dim = {}, model.config.head_dim
    for name, layer in linear_layers(model):
        if not isinstance(layer, LoRALinear):
            continue
        _, i, part, end = name.split(".")
        part = {"attention": "self_attn", "feed_forward": "mlp"}[part]
        stem = f"base_model.model.model.layers.{i}.{part}.{HF_NAMES[end]}"
        b = np.asarray(layer.b)
        if end in ("wq", "wk"):
            heads = b.reshape(-1, head_dim // 2, 2, b.shape[1])
            b = heads.swapaxes(1, 2).reshape(b.shape)
        for letter, matrix in (("A", np.asarray(layer.a)), ("B", b)):
            out[f"{stem}.lora_{letter}.default.weight"] = torch.tensor(matrix)
    return out


@trains
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_quantized_base(case, scheme):
    changes = CASES[case] | {"dim": 32, "hidden_dim": 64, "head_dim": 8}
    base = mx.quantize(random_model(**changes), scheme)
    new = mx.add_lora(base, rank=4, key=jax.random.key(0))
    stream = Slices("the text", np.arange(100, dtype=np.int32) % 9, seq_len=12, bos_id=1)
    options = {"batch_size": 4, "warmup": 2, "learning_rate": 1e-2}
    learnt = fit(new, stream, None, steps=30, **options)
    rows = stream.batch(4, seed=5, step=0)
    before, after = (loss(m, jax.tree.map(jnp.asarray, rows)) for m in (base, learnt))
    assert after < 0.6 * before
    for (name, one), (_, other) in zip(linear_layers(base), linear_layers(learnt)):
        kept = other.base if isinstance(other, LoRALinear) else other
        jax.tree.map(np.testing.assert_array_equal, kept, one)
    with pytest.raises(ValueError, match="is quantized, and cannot hold an adapter"):
        mx.merge_lora(learnt)


def test_errors():
    model = random_model()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        mx.add_lora(model, rank=0, key=key)
    with pytest.raises(TypeError, match="rank must be a whole number, got 1.5"):
        mx.add_lora.__wrapped__(model, rank=1.5, key=key)
    with pytest.raises(ValueError, match="scale must be a finite number, got inf"):
        mx.add_lora(model, scale=float("inf"), key=key)
    with pytest.raises(ValueError, match="No layer's name fits 'q_proj'.*attention.wq"):
        mx.add_lora(model, layers="q_proj", key=key)
    with pytest.raises(ValueError, match="must be a regular expression, got '\\('"):
        mx.add_lora(model, layers="(", key=key)
    with pytest.raises(ValueError, match="has an adapter already"):
        mx.add_lora(mx.add_lora(model, key=key), key=key)
    with pytest.raises(ValueError, match="quantized model cannot be trained"):
        trainable(mx.quantize(model, "int8"))


def test_everything_is_trained_without_an_adapter():
    model = random_model()
    assert all(jax.tree.leaves(trainable(model)))
    assert isinstance(mx.merge_lora(model).layers[0].attention.wq, Linear)
