"""Attention by the kernels of TPUs and GPUs, held to the plain definition: the TPU's kernel
is interpreted, and the GPU's has a twin that XLA makes. The traps of both have a test."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from models import close, random_model, random_tokens

from mistral_eqx import attention
from mistral_eqx.cache import LayerCache
from mistral_eqx.decoding import prefill
from mistral_eqx.devices.sharding import shard
from mistral_eqx.kernels import cuda, tpu
from mistral_eqx.kernels.replaced import made_for, plain


MODULES = {"tpu": tpu, "cuda": cuda}
HOW = {"tpu": {"interpret": True}, "cuda": {"implementation": "xla"}}
KERNELS = {
    platform: functools.partial(module.attend_sequence, **HOW[platform])
    for platform, module in MODULES.items()
}
TO_RINGS = {
    platform: functools.partial(module.attend_ring, **HOW[platform])
    for platform, module in MODULES.items()
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


@pytest.mark.parametrize("platform", MODULES)
def test_heads_that_a_kernel_does_not_know(platform):
    """They are attended to as everywhere else."""
    module = MODULES[platform]
    queries, keys, values, band = arguments("texts", jnp.float32)
    narrow = [x[..., :20] for x in (queries, keys, values)]
    found = jax.jit(module.attend_sequence)(*narrow, band)
    np.testing.assert_array_equal(found, by_definition(*narrow, band))


# Tokens of a chunk, slots, the window, how many were written, and the pads of two rows.
RINGS = {
    "the first chunk": (128, 384, None, 128, [0, 100]),
    "several blocks": (256, 1024, None, 640, [0, 300]),
    "a full ring": (128, 384, None, 384, [5, 0]),
    "a window before it goes round": (128, 384, 200, 256, [0, 20]),
    "a window that goes round": (128, 384, 200, 896, [0, 700]),
    "a narrow window": (128, 640, 50, 1408, [0, 1300]),
    "the widest window that fits": (128, 384, 257, 768, [0, 640]),
    "a window and room for everything": (128, 384, 300, 384, [0, 250]),
    "only pads": (128, 256, 100, 384, [0, 1 << 30]),
}


def a_ring(case, dtype=jnp.float32):
    seq, slots, window, written, pads = RINGS[case]
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(2, *shape, 128)), dtype)
    layer, length = LayerCache(normal(2, slots), normal(2, slots)), jnp.int32(written)
    padding = jnp.asarray(pads, jnp.int32)[:, None]
    positions = jnp.arange(written - seq, written, dtype=jnp.int32)[None] - padding
    held = layer.indices(length)[None] - padding
    view = attention.RingView(positions, held, window)
    return normal(seq, 4), layer.keys, layer.values, view, length


def attended(platform, arguments, tolerance):
    """What a kernel makes of a ring, after a look at each token that is no pad."""
    found = jax.jit(TO_RINGS[platform])(*arguments)
    expected = jax.jit(attention.attend_ring.batched)(*arguments)
    real = (arguments[3].positions >= 0)[..., None, None]
    close(jnp.where(real, found, 0), jnp.where(real, expected, 0), tolerance)
    return found


@pytest.mark.parametrize("platform", TO_RINGS)
@pytest.mark.parametrize("case", RINGS)
def test_a_chunk_attends_to_its_ring(platform, case):
    """What comes of pads nobody asks for, if it is finite."""
    assert jnp.all(jnp.isfinite(attended(platform, a_ring(case), 2e-5)))


@pytest.mark.parametrize("platform", TO_RINGS)
@pytest.mark.parametrize("wider", [0, 1], ids=["the chunk", "the ring"])
def test_a_ring_in_another_dtype(platform, wider, promote):
    queries, *ring, view, length = a_ring("a window that goes round")
    narrow = lambda x: x.astype(jnp.bfloat16)
    if wider == 0:
        ring = map(narrow, ring)
    else:
        queries = narrow(queries)
    found = attended(platform, (queries, *ring, view, length), 2e-2)
    assert found.dtype == queries.dtype


@pytest.mark.parametrize(
    "case", ["the first chunk", "a narrow window", "a window before it goes round"]
)
def test_blocks_that_nobody_sees_are_not_read(case):
    queries, keys, values, view, length = a_ring(case)
    seen = view.mask.any(axis=(0, 1))
    block = next(n for n in (512, 256, 128) if len(seen) % n == 0)
    unseen = ~jnp.repeat(seen.reshape(-1, block).any(axis=1), block)
    assert unseen.any()
    spoilt = jnp.where(unseen[:, None], jnp.nan, values)
    run = jax.jit(TO_RINGS["tpu"])
    np.testing.assert_array_equal(
        run(queries, keys, spoilt, view, length), run(queries, keys, values, view, length)
    )


@pytest.mark.parametrize("platform", MODULES)
@pytest.mark.parametrize(
    "seq, slots, head_dim", [(1, 384, 128), (128, 200, 128), (128, 384, 64)]
)
def test_chunks_that_a_kernel_does_not_know(platform, seq, slots, head_dim):
    """A single token, a ring of another length, narrower heads, and for cuDNN float32: in
    blocks."""
    queries, keys, values, view, length = a_ring("the first chunk")
    cut = lambda x: x[..., :head_dim]
    ring = lambda x: cut(x)[:, :, :slots]
    arguments = (
        cut(queries)[:, :seq],
        ring(keys),
        ring(values),
        attention.RingView(view.positions[:, :seq], view.held[:, :slots], None),
        length,
    )
    found = jax.jit(MODULES[platform].attend_ring)(*arguments)
    close(found, jax.jit(attention.attend_ring.batched)(*arguments), 2e-5)


@pytest.fixture(params=MODULES)
def traced(request, monkeypatch):
    """Programs are made as for a TPU or a GPU, and its kernels run here. Gives the shapes
    of the queries for which a kernel was traced."""
    shapes = []

    def here(function, kernel):
        def counted(*arguments):
            shapes.append(arguments[0].shape)
            return kernel(*arguments)

        monkeypatch.setitem(function.others, "cpu", counted)

    here(attention.attend_sequence, KERNELS[request.param])
    here(attention.attend_ring, TO_RINGS[request.param])
    attention.attend_sequence.derived.add("cpu")
    with made_for(request.param):
        yield shapes
    attention.attend_sequence.derived.discard("cpu")


def loss(model, tokens, segments):
    hidden, _ = model.batch(tokens, None, segments)
    logits = jax.vmap(model.logits)(hidden)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])


def test_training_goes_through_the_kernel(traced):
    """Forwards and in reverse, the rows of a batch in one call; on a mesh each device has
    its own rows and heads. Two devices share each kv head."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128}
    model = random_model(**sizes, sliding_window=20, vocab_size=64)
    tokens = jax.random.randint(jax.random.key(2), (4, 50), 0, 64)
    segments = jnp.asarray(np.repeat([0, 1], [20, 30]), jnp.int32)[None]
    segments = jnp.broadcast_to(segments, tokens.shape)
    step = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    found = step(model, tokens, segments)
    assert (4, 50, 4, 128) in traced
    traced.clear()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spread = step(shard(model, mesh), tokens, segments)
    assert (2, 50, 1, 128) in traced
    with plain():
        expected = step(model, tokens, segments)
    for got in (found, spread):
        leaves = zip(*map(jax.tree.leaves, (got, expected)), strict=True)
        for ours, theirs in leaves:
            close(ours, theirs, 1e-4)


def test_a_prompt_goes_through_the_kernel(traced):
    """A chunk at a time, round a ring and behind pads, and on a mesh each device with its
    own rows and heads. Two devices share each kv head."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128}
    model = random_model(**sizes, sliding_window=100, vocab_size=64)
    prompts = [random_tokens(384 - cut, 64, seed=cut) for cut in (0, 200, 9, 1)]
    _, found = prefill(model, prompts, chunk=128)
    assert (4, 128, 4, 128) in traced
    traced.clear()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    _, spread = prefill(shard(model, mesh), prompts, chunk=128)
    assert (2, 128, 1, 128) in traced
    with plain():
        _, expected = prefill(model, prompts, chunk=128)
    close(found, expected, 1e-4)
    close(spread, expected, 1e-4)


def test_derivatives_forwards_where_no_accelerator_is():
    model = random_model()
    tokens = jnp.arange(9, dtype=jnp.int32)[None]
    run = lambda x: loss(eqx.tree_at(lambda m: m.norm.weight, model, x), tokens, None)
    weight = model.norm.weight
    step = jnp.ones_like(weight)
    _, forwards = jax.jvp(run, (weight,), (step,))
    close(forwards, jnp.vdot(jax.grad(run)(weight), step), 1e-4)
