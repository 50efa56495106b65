"""Whatever way tokens take to their experts, the sum is that over all experts, masked."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from benchmarks.experts import count_flops
from hypothesis import given, strategies as st
from models import PARAMS, cast, close, random_model, random_tokens
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mistral_eqx import ModelConfig, Transformer
from mistral_eqx.config import MoEConfig
from mistral_eqx.kernels.experts import _summed, block_sizes, mix_in_large_blocks
from mistral_eqx.layers import FeedForward, product
from mistral_eqx.learning.training import load_balancing_loss
from mistral_eqx.moe import (
    MixtureOfExperts,
    mix,
    route,
)


DIM, HIDDEN = 8, 12


def assert_close(out, expected):
    """Equal but for the order of float32 sums: relative to the largest number, because a
    small one may be a difference of large ones."""
    size = max(1.0, float(np.abs(np.asarray(expected)).max()))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * size)


def normal(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def experts_of(n, dim=DIM, hidden=HIDDEN):
    make = lambda key: FeedForward(dim, hidden, dtype=jnp.float32, key=key)
    return jax.vmap(make)(jax.random.split(jax.random.key(0), n))


def routed(shape, n_experts, top_k, seed=0):
    """Different experts for each token, the first ones more often, with any weights."""
    rng = np.random.default_rng(seed)
    liked = rng.random((*shape, n_experts)) + np.arange(n_experts) / n_experts
    chosen = np.argsort(liked, axis=-1)[..., :top_k].astype(np.int32)
    return jnp.asarray(chosen), normal(*shape, top_k, seed=seed + 1)


def exact(experts, x, chosen, weights):
    """A loop over tokens, in double precision."""
    experts, x, weights = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (experts, x, weights)
    )
    w1, w2, w3 = (linear.weight for linear in (experts.w1, experts.w2, experts.w3))
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:-1]):
        for expert, weight in zip(np.asarray(chosen[place]), weights[place]):
            if 0 <= expert < len(w1):
                gate = w1[expert] @ x[place]
                inner = gate / (1 + np.exp(-gate)) * (w3[expert] @ x[place])
                out[place] += weight * (w2[expert] @ inner)
    return out


# Blocks of one, of 16, of more; a single expert; all of them.
SIZES = [(1, 4, 2), (7, 4, 2), (40, 4, 2), (150, 4, 3), (50, 1, 1)]
sizes = pytest.mark.parametrize("seq, n_experts, top_k", SIZES)


@sizes
@pytest.mark.parametrize("function", [mix, mix.plain])
def test_the_chosen_experts(function, seq, n_experts, top_k):
    experts, x = experts_of(n_experts), normal(seq, DIM)
    chosen, weights = routed((seq,), n_experts, top_k)
    out = jax.jit(function)(experts, x, chosen, weights)
    assert_close(out, exact(experts, x, chosen, weights))


@pytest.mark.parametrize("seq", [3, 40])
def test_all_tokens_for_one_expert(seq):
    experts, x = experts_of(4), normal(seq, DIM)
    chosen, weights = jnp.full((seq, 1), 2, jnp.int32), jnp.ones((seq, 1))
    alone = jax.tree.map(lambda leaf: leaf[2], experts)
    assert_close(jax.jit(mix)(experts, x, chosen, weights), alone(x))


@pytest.mark.parametrize("seq", [1, 30])
def test_a_batch_is_its_rows(seq):
    experts, x = experts_of(4), normal(5, seq, DIM)
    chosen, weights = routed((5, seq), 4, 2)
    run = jax.vmap(mix, in_axes=(None, 0, 0, 0))
    out = jax.jit(run)(experts, x, chosen, weights)
    assert_close(out, exact(experts, x, chosen, weights))
    # A batch of batches, an axis that is not the first, and one that some do not have.
    nested = jax.jit(jax.vmap(run, in_axes=(None, 0, None, 1)))
    twice = nested(experts, jnp.stack([x, -x]), chosen, jnp.stack([weights, weights], 1))
    assert_close(twice[0], out)
    other = exact(experts, -x, chosen, weights)
    assert_close(twice[1], other)


def test_many_models():
    experts = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), experts_of(4))
    x, (chosen, weights) = normal(6, DIM), routed((6,), 4, 2)
    run = jax.jit(jax.vmap(mix, in_axes=(0, None, None, None)))
    out = run(experts, x, chosen, weights)
    for i in range(2):
        model = jax.tree.map(lambda leaf: leaf[i], experts)
        expected = exact(model, x, chosen, weights)
        close(out[i], expected, 3e-5)


@pytest.mark.parametrize("seq", [2, 30])
def test_experts_that_are_elsewhere(seq):
    """Devices with two experts each add up to one with all four."""
    experts, x = experts_of(4), normal(seq, DIM)
    chosen, weights = routed((seq,), 4, 2)
    here = [jax.tree.map(lambda leaf: leaf[i : i + 2], experts) for i in (0, 2)]
    for function in (mix, mix.plain):
        run = jax.jit(function)
        parts = [run(e, x, chosen - i, weights) for e, i in zip(here, (0, 2))]
        assert all(np.abs(part).max() > 0.1 for part in parts)
        expected = exact(experts, x, chosen, weights)
        assert_close(sum(parts), expected)


def test_derivatives():
    seq = 30
    experts, x = experts_of(4), normal(3, seq, DIM)
    chosen, weights = routed((3, seq), 4, 2)

    def value(function, transform=lambda f: f):
        def square(experts, x, weights):
            rows = jax.vmap(transform(function), in_axes=(None, 0, 0, 0))
            return jnp.sum(rows(experts, x, chosen, weights) ** 2)

        return square

    arguments = (experts, x, weights)
    gradient = lambda f: jax.jit(jax.grad(f, (0, 1, 2)))(*arguments)
    expected = gradient(value(mix.plain))
    each = jax.jit(
        jax.vmap(
            jax.grad(lambda e, x, c, w: jnp.sum(mix(e, x, c, w) ** 2), (0, 1, 3)),
            in_axes=(None, 0, 0, 0),
        )
    )(experts, x, chosen, weights)
    each = (jax.tree.map(lambda leaf: jnp.sum(leaf, 0), each[0]), *each[1:])
    for grads in (gradient(value(mix)), gradient(value(mix, jax.checkpoint)), each):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3),
            grads,
            expected,
        )
    step = jax.tree.map(lambda a: 1e-3 * jnp.ones_like(a), arguments)
    # Forwards, which only the plain program can.
    _, forward = jax.jvp(value(mix.plain), arguments, step)
    backward = sum(
        float(jnp.vdot(g, s))
        for g, s in zip(jax.tree.leaves(expected), jax.tree.leaves(step))
    )
    np.testing.assert_allclose(forward, backward, rtol=1e-3)


# --- the router ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_a_softmax_of_the_chosen(dtype):
    logits = 3 * normal(50, 8)
    chosen, weights = route(logits.astype(dtype), 2)
    logits = np.asarray(logits.astype(dtype), np.float64)
    all_of_them = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.sort(all_of_them, axis=-1)[:, :-3:-1]
    expected = best / best.sum(-1, keepdims=True)
    np.testing.assert_array_equal(
        chosen, np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    )
    assert weights.dtype == dtype
    # Computed in float32 and rounded once.
    error = 1e-6 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(weights, np.float64), expected, rtol=error)


def test_ties_go_to_the_first():
    chosen, weights = route(jnp.zeros((3, 4)), 2)
    np.testing.assert_array_equal(chosen, [[0, 1]] * 3)
    np.testing.assert_array_equal(weights, 0.5)


@pytest.mark.parametrize("seq", [5, 40])
def test_a_token_that_is_no_number_spoils_no_other(seq):
    config = ModelConfig(**PARAMS | {"sliding_window": None, "moe": MoEConfig(4, 2)})
    moe = eqx.filter_jit(MixtureOfExperts(config, dtype=jnp.float32, key=jax.random.key(0)))
    x = normal(seq, config.dim)
    spoilt = moe(x.at[3].set(jnp.nan))
    assert np.isnan(spoilt[3]).all()
    others = np.arange(seq) != 3
    assert_close(spoilt[others], moe(x)[others])


@pytest.mark.parametrize("layers, n_experts, top_k", [(1, 8, 2), (3, 4, 1), (2, 3, 3)])
def test_load_balancing_loss_is_transformers(layers, n_experts, top_k):
    logits = 2 * normal(layers, 20, n_experts)
    theirs = load_balancing_loss_func(
        tuple(torch.tensor(np.asarray(layer)) for layer in logits), n_experts, top_k
    )
    ours = load_balancing_loss(logits, top_k)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)


def test_load_balancing_loss_of_extremes():
    even = jnp.eye(4) * 1e-3
    np.testing.assert_allclose(load_balancing_loss(even, 1), 1, rtol=1e-3)
    one = jnp.zeros((9, 4)).at[:, 2].set(50)
    np.testing.assert_allclose(load_balancing_loss(one, 1), 4, rtol=1e-3)


@pytest.mark.parametrize("seq", [1, 7, 40, 150])
def test_in_large_blocks(seq):
    """As on a GPU, whose product of one token is a sum in one loop."""
    experts, x = experts_of(4), normal(2, seq, DIM)
    chosen, weights = routed((2, seq), 4, 2)
    out = jax.jit(mix_in_large_blocks)(experts, x, chosen, weights)
    assert_close(out, exact(experts, x, chosen, weights))
    one, weight = x[:1, 0], experts.w1.weight[0]
    assert_close(_summed(one, weight), product(one, weight))


# --- the cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch, seq", [(1, 1), (3, 1), (1, 40), (2, 30)])
def test_only_the_chosen_experts_are_read(batch, seq):
    experts, x = experts_of(8), normal(batch, seq, DIM)
    chosen, weights = routed((batch, seq), 3, 2)
    poisoned = jax.tree.map(lambda leaf: leaf.at[3:].set(jnp.nan), experts)
    run = jax.jit(jax.vmap(mix, in_axes=(None, 0, 0, 0)))
    out = run(poisoned, x, chosen, weights)
    assert_close(out, exact(experts, x, chosen, weights))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch, seq", [(1, 1), (4, 1), (1, 64)])
def test_no_copy_of_all_experts(batch, seq, dtype):
    """In a loop, as in decode: out of which XLA would carry what does not change in it."""
    experts = jax.eval_shape(lambda: cast(experts_of(8, 256, 512), dtype))
    x = jax.ShapeDtypeStruct((batch, seq, 256), dtype)
    chosen, weights = (jax.ShapeDtypeStruct((batch, seq, 2), d) for d in (jnp.int32, dtype))

    def loop(experts, x, chosen, weights):
        run = jax.vmap(mix, in_axes=(None, 0, 0, 0))
        body = lambda _, x: run(experts, x, chosen, weights)
        return jax.lax.fori_loop(0, 10, body, x)

    compiled = jax.jit(loop).lower(experts, x, chosen, weights).compile()
    # One expert in float32 and the tokens, where all of them are eight times that.
    one = 3 * 256 * 512 * 4 + 20 * batch * seq * 512 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * one


@pytest.mark.parametrize(
    "batch, seq, most", [(1, 1, 1), (8, 1, 1), (1, 256, 1.3), (1, 512, 1.3), (4, 300, 1.3)]
)
def test_the_work_is_that_of_the_chosen_experts(batch, seq, most):
    experts, x = experts_of(8), normal(batch, seq, DIM)
    chosen, weights = routed((batch, seq), 8, 2)
    ways = [jax.vmap(f, in_axes=(None, 0, 0, 0)) for f in (mix, mix.plain)]
    sparse, dense = (jax.make_jaxpr(run)(experts, x, chosen, weights) for run in ways)
    needed = batch * seq * 2 * 2 * 3 * DIM * HIDDEN
    assert needed <= count_flops(sparse) <= most * needed
    # Large blocks, for accelerators.
    assert needed <= count_flops(sparse, "rocm") <= max(1, 2 * (most > 1)) * needed
    assert count_flops(dense) >= 4 * needed  # so that the count can be trusted


@given(st.integers(1, 3000), st.integers(1, 64))
def test_blocks_suffice_whatever_is_chosen(n_pairs, n_experts):
    block, n_blocks = block_sizes(n_pairs, n_experts)
    used = min(n_pairs, n_experts)
    # The worst: one pair each for all experts, and what is left for one.
    assert used - 1 + -(-(n_pairs - used + 1) // block) <= n_blocks
    spread = [n_pairs // used + (i < n_pairs % used) for i in range(used)]
    assert sum(-(-n // block) for n in spread) <= n_blocks


# --- the model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, parameters",
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "hidden_dim": 14336}, 46_702_792_704),
        (
            {"dim": 6144, "n_layers": 56, "n_heads": 48, "hidden_dim": 16384},
            140_620_634_112,
        ),
    ],
    ids=["8x7B", "8x22B"],
)
def test_released_models(changes, parameters):
    common = {
        "head_dim": 128,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "vocab_size": 32000,
        "moe": MoEConfig(8, 2),
    }
    config = ModelConfig(**common | changes)
    model = eqx.filter_eval_shape(
        Transformer, config, dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters
    experts = model.layers[0].feed_forward.experts
    assert experts.w1.weight.shape == (8, config.hidden_dim, config.dim)
    assert experts.w2.weight.shape == (8, config.dim, config.hidden_dim)
    tokens = jax.ShapeDtypeStruct((2, 600), jnp.int32)
    model = eqx.tree_at(lambda m: m.layers, model, model.layers[:1])  # they are alike
    run = lambda model, tokens: jax.vmap(model)(tokens)[0]
    logits = eqx.filter_eval_shape(run, model, tokens)
    assert logits.shape == (2, 600, 32000) and logits.dtype == jnp.float32


def mixtral():
    return random_model(sliding_window=None, moe=MoEConfig(4, 2))


def test_router_logits_are_of_every_layer():
    model, tokens = mixtral(), jnp.asarray(random_tokens(20))
    run = eqx.filter_jit(Transformer.with_router_logits)
    (last,), (router_logits,) = run(model, tokens[None])
    assert router_logits.shape == (2, 20, 4)
    hidden, _ = eqx.filter_jit(Transformer.hidden_states)(model, tokens)
    assert_close(last, hidden[-1])
    # Experts of zeros add nothing to what the first layer's router was given.
    ffn = lambda m: m.layers[0].feed_forward.experts.w2.weight
    silent = eqx.tree_at(ffn, model, replace_fn=jnp.zeros_like)
    hidden, _ = eqx.filter_jit(Transformer.hidden_states)(silent, tokens)
    first = model.layers[0].router_logits(hidden[1])
    assert_close(router_logits[0], first)
