"""Mixtral's experts by the kernel of a TPU, interpreted, held to the plain definition."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import cast, close

from mistral_eqx.kernels import experts as blocks, grouped
from mistral_eqx.kernels.quantized import QuantizedLinear, quantized
from mistral_eqx.kernels.replaced import made_for
from mistral_eqx.layers import FeedForward, Linear
from mistral_eqx.moe import mix


DIM, HIDDEN = 128, 256
run = jax.jit(functools.partial(grouped.mix_grouped, interpret=True))
by_definition = jax.jit(jax.vmap(mix.plain, in_axes=(None, 0, 0, 0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="dtype")
def experts_of(n, dim=DIM, hidden=HIDDEN, *, dtype=jnp.float32):
    make = lambda key: FeedForward(dim, hidden, dtype=jnp.float32, key=key)
    return cast(jax.vmap(make)(jax.random.split(jax.random.key(0), n)), dtype)


def routed(batch, seq, n_experts, top_k=2, dim=DIM, dtype=jnp.float32):
    rng = np.random.default_rng(seq)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(batch, seq, *shape)), dtype)
    chosen = rng.random((batch, seq, n_experts)).argsort(-1)[..., :top_k]
    return normal(dim), jnp.asarray(chosen, jnp.int32), normal(top_k)


# Decode with one row and with several, one tile with pads, several tiles.
@pytest.mark.parametrize("batch, seq", [(1, 1), (8, 1), (1, 21), (2, 100)])
def test_the_kernel_is_plain(batch, seq):
    experts, arrays = experts_of(4), routed(batch, seq, 4)
    close(run(experts, *arrays), by_definition(experts, *arrays), 1e-5)


def test_in_bfloat16(promote):
    experts, arrays = (
        experts_of(4, dtype=jnp.bfloat16),
        routed(1, 21, 4, dtype=jnp.bfloat16),
    )
    out = run(experts, *arrays)
    assert out.dtype == jnp.bfloat16
    close(out, by_definition(experts, *arrays), 3e-2)


def test_experts_that_are_elsewhere():
    """On a mesh a device has some of the experts. Rows of others belong to no group, and
    the kernel leaves there what was in memory."""
    experts, (x, chosen, weights) = experts_of(4), routed(1, 30, 4)
    halves = [jax.tree.map(lambda leaf: leaf[i : i + 2], experts) for i in (0, 2)]
    parts = [run(half, x, chosen - i, weights) for half, i in zip(halves, (0, 2))]
    close(sum(parts), by_definition(experts, x, chosen, weights), 1e-5)
    np.testing.assert_array_equal(run(halves[0], x, chosen + 7, weights), 0)


@pytest.mark.parametrize("seq", [1, 150])
def test_only_the_chosen_experts_are_read(seq):
    experts, arrays = experts_of(6), routed(1, seq, 3)
    poisoned = jax.tree.map(lambda leaf: leaf.at[3:].set(jnp.nan), experts)
    close(run(poisoned, *arrays), by_definition(experts, *arrays), 1e-5)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(itemsize):
    """At Mixtral's sizes, also divided by eight, all columns go in at once: then the kernel
    reads an expert's weights once, however many rows they multiply."""
    for k, n in ((4096, 14336), (14336, 4096), (4096, 1792), (1792, 4096), (128, 384)):
        rows, k_tile, n_tile = grouped.tiles(128, itemsize, 1024, k, n)
        assert k % k_tile == 0 and n % n_tile == 0
        assert k_tile == k or (itemsize, k) == (4, 14336)
        # Twice, with the sums in float32, in the 16 MiB that a kernel may have.
        memory = 2 * itemsize * (rows + n_tile) * k_tile + 12 * rows * n_tile
        assert memory < 2**24


@pytest.mark.parametrize("kind", ["quantized", "narrow"])
def test_what_the_kernel_does_not_know_goes_in_blocks(kind):
    narrow = kind == "narrow"
    experts = experts_of(4, *((8, 12) if narrow else (DIM, HIDDEN)))
    if not narrow:
        small = lambda linear: QuantizedLinear(*quantized(linear.weight, "int8"))
        is_linear = lambda node: isinstance(node, Linear)
        experts = jax.tree.map(small, experts, is_leaf=is_linear)
    arrays = routed(1, 20, 4, dim=8 if narrow else DIM)
    assert not grouped.is_known(experts)
    found = jax.jit(grouped.mix_grouped)(experts, *arrays)  # not interpreted
    close(found, by_definition(experts, *arrays), 1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """Programs are made as for a TPU, with its kernel interpreted. Gives the shapes of what
    goes through the kernel, and through blocks."""
    kernel, loop = [], []

    def in_kernel(experts, x, *arrays):
        kernel.append(x.shape)
        return grouped.mix_grouped(experts, x, *arrays, interpret=True)

    def in_blocks(experts, x, *arrays):
        loop.append(x.shape)
        return blocks.mix_in_large_blocks(experts, x, *arrays)

    monkeypatch.setitem(mix.others, "cpu", in_kernel)
    monkeypatch.setitem(mix.others, "any", in_blocks)
    mix.derived.discard("cpu")
    with made_for("tpu"):
        yield kernel, loop
    mix.derived.add("cpu")


def test_gradients_are_those_of_blocks(interpreted):
    kernel, loop = interpreted
    experts, (x, chosen, weights) = experts_of(4), routed(1, 30, 4)

    def loss(function):
        rows = jax.vmap(function, in_axes=(None, 0, 0, 0))
        return lambda *moving: jnp.sum(rows(*moving[:2], chosen, moving[2]) ** 2)

    gradient = lambda f: jax.jit(jax.grad(loss(f), (0, 1, 2)))(experts, x, weights)
    found = gradient(mix)
    assert kernel and loop
    for grad, expected in zip(*map(jax.tree.leaves, (found, gradient(mix.plain)))):
        close(grad, expected, 1e-4)
    value = lambda f: eqx.filter_jit(loss(f))(experts, x, weights)
    close(value(mix), value(mix.plain), 1e-4)
