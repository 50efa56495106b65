"""What is done otherwise on a CPU: the same results, and nothing copied whole."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from models import cast, random_model

from mistral_eqx.attention import RingView, attend, attend_ring
from mistral_eqx.decoding import DecodeState, decode, prefill
from mistral_eqx.kernels import cpu
from mistral_eqx.kernels.replaced import plain
from mistral_eqx.layers import product


def normal(seed, shape, dtype=jnp.float32):
    return jr.normal(jr.key(seed), shape, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 128, 129])
@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 4096), (6, 4099), (6, 9000)])
def test_a_product_is_a_product(dtype, rows, size):
    x, weight = normal(0, (rows, size[1]), dtype), normal(1, size, dtype)
    out = jax.jit(cpu.project)(x, weight)
    # Exact products of what is stored: only the order of the sums may differ.
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    assert out.dtype == jnp.float32
    # A float32's last bit of what is summed is 2**-24, and 1e-7 of it is what is seen.
    error = np.abs(out - x @ weight.T)
    np.testing.assert_array_less(error, 2**-21 * (np.abs(x) @ np.abs(weight).T))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_row_that_is_no_number_spoils_no_other(dtype, bad):
    x = normal(0, (2, 100), dtype).at[0].set(bad)
    out = jax.jit(cpu.project)(x, normal(1, (8, 100), dtype))
    assert jnp.isnan(out[0]).all()
    assert jnp.isfinite(out[1]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("width", [1000, 9000])
def test_few_rows_copy_no_matrix(dtype, rows, width):
    x, weight = normal(0, (rows, width), dtype), normal(1, (512, width), dtype)
    compiled = jax.jit(cpu.project).lower(x, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.nbytes / 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_batch_go_together(dtype):
    x, weight = normal(0, (5, 1, 16), dtype), normal(1, (8, 16), dtype)
    batched = jax.vmap(product, in_axes=(0, None))
    np.testing.assert_array_equal(batched(x, weight), product(x, weight))
    program = jax.jit(batched).lower(x, weight).as_text()
    kind = {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    assert f"tensor<5x16x{kind}>" in program
    each = jax.vmap(product)(x, jnp.stack([weight * i for i in range(5)]))
    for i in range(5):
        np.testing.assert_allclose(
            np.asarray(each[i], np.float32),
            np.asarray(product(x[i], weight * i), np.float32),
            rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5,
            atol=1e-5,
        )


def test_gradients_are_the_products():
    x, weight = normal(0, (3, 1, 16)), normal(1, (8, 16))

    def loss(product):
        return lambda x, w: jnp.sum(jax.vmap(product, in_axes=(0, None))(x, w) ** 2)

    einsum = loss(lambda x, w: jnp.einsum("si,oi->so", x, w))
    got = jax.jit(jax.grad(loss(product), argnums=(0, 1)))(x, weight)
    expected = jax.grad(einsum, argnums=(0, 1))(x, weight)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("slots", [24, 128, 640])
def test_attention_reads_what_is_written(slots):
    queries, keys, values = (
        normal(i, shape)
        for i, shape in enumerate([(3, 4, 8), (2, slots, 8), (2, slots, 8)])
    )
    first = jax.jit(attend_ring)
    edges = {slots // 4, slots // 4 + 1, slots // 2, slots // 2 + 1}
    for written in {3, slots} | edges:
        held = jnp.arange(slots) < written
        mask = jnp.broadcast_to(held, (3, slots))
        unwritten = jnp.where(held[None, :, None], 0, 1e9)
        # The three tokens stand behind all that was written.
        held = jnp.where(held, 0, -1).astype(jnp.int32)
        view = RingView(jnp.full(3, slots, jnp.int32), held, None)
        out = first(queries, keys + unwritten, values, view, jnp.int32(written))
        np.testing.assert_allclose(out, attend(queries, keys, values, mask), atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_one_token_attends_as_any(batch):
    queries, keys, values = (
        normal(i, (batch, *shape))
        for i, shape in enumerate([(1, 6, 64), (2, 100, 64), (2, 100, 64)])
    )
    last = jnp.arange(69, 69 + batch, dtype=jnp.int32)[:, None]
    slots = jnp.broadcast_to(jnp.arange(100, dtype=jnp.int32), (batch, 100))
    batched = jax.vmap(attend_ring, (0, 0, 0, 0, None))
    view, length = RingView(last, slots, None), jnp.int32(80)
    attend_to = lambda q, k: batched(q, k, values, view, length)
    square = lambda q, k: jnp.sum(attend_to(q, k) ** 2)

    def run():
        out = jax.jit(attend_to)(queries, keys)
        return out, *jax.jit(jax.grad(square, argnums=(0, 1)))(queries, keys)

    found = run()
    with plain():
        expected = run()
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_copies_neither_weights_nor_cache(dtype, batch):
    model = cast(
        random_model(dim=128, vocab_size=32768, sliding_window=None, head_dim=64), dtype
    )
    cache, logits = prefill(model, [[1, 2, 3]] * batch, max_tokens=2048)
    state = DecodeState.start(model, cache, logits, max_tokens=10, key=jr.key(0))
    compiled = decode.lower(model, state, jnp.int32(9)).compile()
    ring = cache.layers[0].keys
    assert ring.dtype == jnp.float32
    # The first slots of a layer's keys and values, and what sampling needs. The table in
    # float32 would be 17 MB, the rings of all layers 4 times that of one.
    expected = 2 * ring.nbytes / 4 + 16 * logits.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < expected < 8e6
