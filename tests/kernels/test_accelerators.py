"""Attention by the kernels of TPUs and GPUs, held to the plain definition: the TPU's kernel
is interpreted, and the GPU's has a twin that XLA makes. The traps of both have a test."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from models import close, random_model

from mistral_eqx import attention
from mistral_eqx.devices.sharding import shard
from mistral_eqx.kernels import cuda, tpu
from mistral_eqx.kernels.replaced import made_for, plain


KERNELS = {
    "tpu": functools.partial(tpu.attend_sequence, interpret=True),
    "cuda": functools.partial(cuda.attend_sequence, implementation="xla"),
}
# Numbers of tokens, the window, and the lengths of the texts if there are several. Blocks
# of the TPU's kernel have 128 tokens or 512.
CASES = {
    "shorter than a block": (70, None, None),
    "a window": (300, 17, None),
    "a window of one": (130, 1, None),
    "a window that is longer": (128, 4096, None),
    "several blocks": (1100, 600, None),
    "texts": (261, None, [100, 1, 129, 31]),
    "texts under a window": (261, 40, [100, 1, 129, 31]),
}


def arguments(case, dtype, batch=2):
    seq, window, texts = CASES[case]
    rng = np.random.default_rng(0)
    normal = lambda heads: jnp.asarray(rng.normal(size=(batch, seq, heads, 128)), dtype)
    segments = None
    if texts is not None:
        # Pads of a row that is not full are a text of their own, as `learning` has them.
        row = np.repeat([0, 1, 2, -1], texts).astype(np.int32)
        segments = jnp.stack([jnp.asarray(row)] * (batch - 1) + [jnp.zeros(seq, jnp.int32)])
    band = attention.Band(segments, window)
    return normal(4), normal(2), normal(2), band


by_definition = jax.jit(jax.vmap(attention.attend_sequence.plain))


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_plain(platform, case):
    queries, keys, values, band = arguments(case, jnp.float32)
    found = jax.jit(KERNELS[platform])(queries, keys, values, band)
    close(found, by_definition(queries, keys, values, band), 2e-5)


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("case", ["a window", "texts under a window"])
def test_gradients_are_plain(platform, case):
    *arrays, band = arguments(case, jnp.float32, batch=1)
    weights = jax.random.normal(jax.random.key(1), arrays[0].shape)
    total = lambda way: lambda *arrays: jnp.sum(way(*arrays, band) * weights)
    gradients = lambda way: jax.jit(jax.grad(total(way), (0, 1, 2)))(*arrays)
    for found, expected in zip(gradients(KERNELS[platform]), gradients(by_definition)):
        close(found, expected, 5e-5)


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("window", [None, 5])
def test_nobody_sees_the_future(platform, window):
    """A window alone leaves cuDNN's right side open."""
    queries, keys, values, _ = arguments("shorter than a block", jnp.float32)
    band = attention.Band(None, window)
    run = jax.jit(KERNELS[platform])
    before = run(queries, keys, values, band)
    after = run(queries, keys.at[:, 40:].set(9.0), values.at[:, 40:].set(9.0), band)
    np.testing.assert_array_equal(before[:, :40], after[:, :40])
    assert jnp.all(jnp.any(before[:, 40:] != after[:, 40:], axis=(0, 2, 3)))


@pytest.mark.parametrize("platform", KERNELS)
def test_a_window_is_of_so_many_tokens(platform):
    """Both kernels count the tokens on the left without the query's own."""
    queries, keys, values, _ = arguments("shorter than a block", jnp.float32)
    band = attention.Band(None, 5)
    # A token's value is its own number, so that attention is a mean of what it sees.
    numbers = jnp.arange(70.0)[None, :, None, None] * jnp.ones_like(values)
    run = jax.jit(KERNELS[platform])
    means = run(jnp.zeros_like(queries), keys, numbers, band)[0, :, 0, 0]
    expected = [np.arange(max(0, i - 4), i + 1).mean() for i in range(70)]
    np.testing.assert_allclose(means, expected, rtol=1e-5)


@pytest.mark.parametrize("platform", KERNELS)
def test_bfloat16_is_summed_in_float32(platform, promote):
    """Of 300 ones in bfloat16, a sum in bfloat16 would stop at 256."""
    queries, keys, values, _ = arguments("a window", jnp.bfloat16)
    band = attention.Band(None, None)
    run = jax.jit(KERNELS[platform])
    out = run(jnp.zeros_like(queries), keys, jnp.ones_like(values), band)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 1, rtol=1e-2)
    found = run(queries, keys, values, band)
    close(found, by_definition(queries, keys, values, band), 2e-2)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_heads_that_a_kernel_does_not_know(platform):
    """They are attended to as everywhere else."""
    module = {"tpu": tpu, "cuda": cuda}[platform]
    queries, keys, values, band = arguments("texts", jnp.float32)
    narrow = [x[..., :20] for x in (queries, keys, values)]
    found = jax.jit(module.attend_sequence)(*narrow, band)
    np.testing.assert_array_equal(found, by_definition(*narrow, band))


@pytest.fixture
def interpreted(monkeypatch):
    """Programs are made as for a TPU, with its kernel interpreted. Gives how often the
    kernel was traced."""
    function, traced = attention.attend_sequence, []

    def kernel(*arguments):
        traced.append(arguments[0].shape)
        return KERNELS["tpu"](*arguments)

    monkeypatch.setitem(function.others, "cpu", kernel)
    function.derived.add("cpu")
    with made_for("tpu"):
        yield traced
    function.derived.discard("cpu")


def loss(model, tokens, segments):
    hidden, _ = model.batch(tokens, None, segments)
    logits = jax.vmap(model.logits)(hidden)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])


def test_training_goes_through_the_kernel(interpreted):
    """Forwards and in reverse, the rows of a batch in one call; on a mesh each device has
    its own rows and heads. Two devices share each kv head."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128}
    model = random_model(**sizes, sliding_window=20, vocab_size=64)
    tokens = jax.random.randint(jax.random.key(2), (4, 50), 0, 64)
    segments = jnp.asarray(np.repeat([0, 1], [20, 30]), jnp.int32)[None]
    segments = jnp.broadcast_to(segments, tokens.shape)
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    found = step(model, tokens, segments)
    assert (4, 50, 4, 128) in interpreted
    interpreted.clear()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spread = step(shard(model, mesh), tokens, segments)
    assert (2, 50, 1, 128) in interpreted
    with plain():
        expected = step(model, tokens, segments)
    for got in (found, spread):
        leaves = zip(*map(jax.tree.leaves, (got, expected)), strict=True)
        for ours, theirs in leaves:
            close(ours, theirs, 1e-4)


def test_derivatives_forwards_where_no_accelerator_is():
    model = random_model()
    tokens = jnp.arange(9, dtype=jnp.int32)[None]
    run = lambda x: loss(eqx.tree_at(lambda m: m.norm.weight, model, x), tokens, None)
    weight = model.norm.weight
    step = jnp.ones_like(weight)
    _, forwards = jax.jvp(run, (weight,), (step,))
    close(forwards, jnp.vdot(jax.grad(run)(weight), step), 1e-4)
