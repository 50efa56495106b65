"""Whatever takes the place of a plain function computes the same: on random inputs, in
every dtype, for one sequence and for batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mistral_eqx import attention
from mistral_eqx.cache import LayerCache
from mistral_eqx.kernels import rings
from mistral_eqx.kernels.quantized import SCHEMES, quantized
from mistral_eqx.kernels.replaced import REPLACEABLE, plain, replaceable, replaces
from mistral_eqx.layers import FeedForward


DTYPES = [jnp.float32, jnp.bfloat16]


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def of_product(rng, dtype):
    for rows, width in (1, 24), (3, 24), (40, 24), (1, 4099), (2, 9000):
        yield (normal(rng, rows, width, dtype=dtype), normal(rng, 8, width, dtype=dtype))


def of_lookup(rng, dtype):
    tokens = jnp.array([3, 0, 11, 12, -1, 3], jnp.int32)
    yield tokens, normal(rng, 12, 5, dtype=dtype)


def of_turn(rng, dtype):
    positions = jnp.array([-3, 0, 1, 7, 32767], jnp.int32)
    yield positions, jnp.asarray(1e4 ** -np.linspace(0, 1, 8), jnp.float32)


def of_score(rng, dtype):
    for rows, head_dim in (1, 64), (3, 64), (20, 64), (3, 8):
        queries, keys = (rows, head_dim), (50, head_dim)
        yield (normal(rng, 2, *queries, dtype=dtype), normal(rng, 2, *keys, dtype=dtype))


def of_attend_ring(rng, dtype):
    for seq, slots, head_dim in (1, 40, 64), (1, 600, 64), (5, 600, 8), (5, 128, 64):
        for written in {seq, slots // 2, slots // 2 + 1, slots, 3 * slots + seq}:
            # Once around, most of a row is pads.
            around = written > slots
            window, padding = (slots // 2, written - slots // 3) if around else (None, 0)
            ring = lambda: normal(rng, 2, slots, head_dim, dtype=dtype)
            layer, length = LayerCache(ring(), ring()), jnp.int32(written)
            yield (
                normal(rng, seq, 6, head_dim, dtype=dtype),
                layer.keys,
                layer.values,
                attention.RingView(
                    jnp.arange(written - seq, written, dtype=jnp.int32) - padding,
                    layer.indices(length) - padding,
                    window,
                ),
                length,
            )


def of_attend_sequence(rng, dtype):
    texts = jnp.asarray(np.repeat([3, 0, 1, -1], [10, 1, 60, 29]), jnp.int32)
    for seq, window, segments in (1, 4, None), (7, None, None), (100, 9, texts):
        shape = lambda heads: normal(rng, seq, heads, 16, dtype=dtype)
        yield shape(4), shape(2), shape(2), attention.Band(segments, window)


def of_mix(rng, dtype):
    for seq, n_experts, top_k in (1, 4, 2), (30, 4, 2), (150, 4, 3), (6, 1, 1):
        make = lambda key: FeedForward(8, 12, dtype=dtype, key=key)
        experts = jax.vmap(make)(jax.random.split(jax.random.key(0), n_experts))
        logits = normal(rng, seq, n_experts)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), top_k)
        x = normal(rng, seq, 8, dtype=dtype)
        yield experts, x, chosen.astype(jnp.int32), weights.astype(dtype)


def of_quantized_product(rng, dtype):
    sizes = (1, 8, 64), (3, 8, 64), (40, 8, 64), (1, 8, 4416), (2, 8, 9024)
    # The last is multiplied in blocks.
    sizes += ((40, 256, 9024),)
    for (rows, n_out, width), scheme in itertools.product(sizes, SCHEMES):
        parts = quantized(normal(rng, n_out, width), scheme)
        yield normal(rng, rows, width, dtype=dtype), *parts
    groups = jnp.asarray(rng.integers(-127, 128, (8, 64)), jnp.int8)
    scales = jnp.asarray(rng.standard_normal((8, 2)), jnp.float16)
    yield normal(rng, 3, 64, dtype=dtype), groups, scales


INPUTS = {
    name.removeprefix("of_"): make for name, make in globals().items() if name[:3] == "of_"
}


def assert_same(found, expected, dtype):
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        size = np.abs(np.nan_to_num(theirs)).max()
        # A bfloat16 has 8 bits, and a chain of products rounds a few times.
        tolerance = 2e-5 if dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(size, 1))


def test_every_replaceable_function_is_tested():
    assert set(INPUTS) == set(REPLACEABLE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
def test_replaced_is_plain(name, dtype):
    function, cases = REPLACEABLE[name], [*INPUTS[name](np.random.default_rng(0), dtype)]
    with plain():
        by_definition = jax.jit(function)
        expected = [by_definition(*args) for args in cases]
    run = jax.jit(function)
    for args, expects in zip(cases, expected):
        assert_same(run(*args), expects, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
def test_a_batch_is_its_rows(name, dtype):
    function = REPLACEABLE[name]
    args = next(INPUTS[name](np.random.default_rng(1), dtype))
    shared = {
        "product": [1],
        "lookup": [1],
        "turn": [1],
        "mix": [0],
        "quantized_product": [1, 2],
        "attend_ring": [4],
    }.get(name, [])
    axes = tuple(None if i in shared else 0 for i in range(len(args)))
    stack = lambda arg: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), arg)
    batch = [arg if i in shared else stack(arg) for i, arg in enumerate(args)]
    found = jax.jit(jax.vmap(function, axes))(*batch)
    row = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    with plain():
        by_definition = jax.jit(function)
        for i in range(2):
            alone = [arg if j in shared else row(arg, i) for j, arg in enumerate(batch)]
            assert_same(row(found, i), by_definition(*alone), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [8, 64, 200])
def test_a_ring_in_blocks(dtype, block, monkeypatch):
    """As accelerators and meshes read it: the same, whatever is written, also where a
    whole block shows a query nothing."""
    monkeypatch.setattr(rings, "BLOCKS", (block,))
    rng, n = np.random.default_rng(2), 0
    run = jax.jit(lambda *arguments: rings.attend_blocks(*arguments))
    expect = jax.jit(attention.attend_ring.batched)
    for *arrays, view, written in of_attend_ring(rng, dtype):
        for window in (view.window, 3):
            rows = [x[None] for x in (*arrays, view.positions, view.held)]
            arguments = (*rows[:3], attention.RingView(*rows[3:], window), written)
            assert_same(run(*arguments), expect(*arguments), dtype)
            n += arrays[1].shape[1] % block == 0
    assert n > 4


def test_unwritten_blocks_are_not_read(monkeypatch):
    monkeypatch.setattr(rings, "BLOCKS", (16,))
    queries, ring = jnp.ones((1, 1, 2, 8)), jnp.full((1, 1, 64, 8), jnp.nan)
    ring = ring.at[:, :, :20].set(1.0).at[:, :, 20:32].set(0.0)
    slots, last = jnp.arange(64, dtype=jnp.int32), jnp.full((1, 1), 19, jnp.int32)
    view = attention.RingView(last, jnp.where(slots < 20, slots, -1)[None], None)
    out = rings.attend_blocks(queries, ring, ring, view, jnp.int32(20))
    np.testing.assert_allclose(out, jnp.ones((1, 1, 2, 8)), rtol=1e-6)


def test_a_ring_on_a_mesh_that_is_not_ours(monkeypatch):
    monkeypatch.setattr(rings, "BLOCKS", (40,))
    rng = np.random.default_rng(3)
    cases = of_attend_ring(rng, jnp.float32)
    *arrays, length = next(case for case in cases if case[1].shape[1] == 600)
    rows = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    expected = jax.jit(attention.attend_ring.batched)(*rows, length)
    mesh = jax.make_mesh((2,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("mine"))
    run = jax.jit(jax.vmap(attention.attend_ring, (0, 0, 0, 0, None)))
    found = run(*jax.device_put(rows, place), length)
    assert_same(found, expected, jnp.float32)


def test_the_mechanism():
    """A batch comes in one call, also through two `vmap`s; derivatives are the plain ones;
    arrays on a mesh take their own way; nothing happens while all is plain."""
    seen = []

    @replaceable(shared=("y",))
    def double(x, y):
        return 2 * x + y

    @replaces(double, on="cpu")
    def on_a_cpu(x, y):
        seen.append(x.shape)
        return 3 * x + y[None]

    @replaces(double, on="mesh")
    def on_a_mesh(x, y):
        return 4 * x + y[None]

    del REPLACEABLE["double"]
    x, y = jnp.ones((2, 5, 3)), jnp.zeros(3)
    twice = jax.vmap(jax.vmap(double, (0, None)), (0, None))
    np.testing.assert_array_equal(jax.jit(twice)(x, y), 3 * x)
    np.testing.assert_array_equal(jax.jit(double)(x[0, 0], y), [3, 3, 3])
    # As a batch of ten, and as a batch of one (and while `vmap` looks at the shapes).
    assert {(10, 3), (1, 3)} <= set(seen)
    gradient = jax.grad(lambda x: jnp.sum(twice(x, y)))(x)
    np.testing.assert_array_equal(gradient, 2 * jnp.ones_like(x))
    many = jax.vmap(double)(x[0], jnp.zeros((5, 3)))
    np.testing.assert_array_equal(many, 2 * x[0])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    np.testing.assert_array_equal(jax.jit(twice)(jax.device_put(x, place), y), 4 * x)
    with plain():
        np.testing.assert_array_equal(jax.jit(twice)(x, y), 2 * x)
    np.testing.assert_array_equal(jax.jit(twice)(x, y), 3 * x)
