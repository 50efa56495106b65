import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from models import random_model, random_tokens, small_model, trains

from mistral_eqx import Transformer
from mistral_eqx.config import MoEConfig
from mistral_eqx.learning.batches import Batch, Example, Packed, Slices, packed
from mistral_eqx.learning.fitting import fit
from mistral_eqx.learning.training import loss, make_optimizer, start, train_step


MIXTRAL = {"sliding_window": None, "head_dim": 8, "moe": MoEConfig(4, 2)}


def example(n, seed=0):
    return Example(random_tokens(n, seed=seed), [i % 3 > 0 for i in range(n)])


def test_slices():
    stream = np.arange(100, 120, dtype=np.int32)
    text = Slices("the text", stream, seq_len=18, bos_id=1)
    batch = text.batch(50, seed=0, step=0).tokens
    assert batch.shape == (50, 19)
    assert (batch[:, 0] == 1).all()
    assert (np.diff(batch[:, 1:], axis=1) == 1).all()
    assert set(batch[:, 1].tolist()) == {100, 101, 102}
    again = text.batch(50, seed=0, step=0).tokens
    np.testing.assert_array_equal(again, batch)
    for seed, step in ((1, 0), (0, 1)):
        assert (text.batch(50, seed=seed, step=step).tokens != batch).any()
    whole = Slices("the text", stream, seq_len=20, bos_id=1)
    assert (whole.batch(50, seed=0, step=0).tokens[:, 1:] == stream).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 50))
@settings(deadline=None)
def test_every_example_has_one_place(lengths, room):
    rows = packed(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= room for row in rows)
    # No two rows would fit into one.
    used = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > room


def test_packed_rows_hold_the_examples():
    examples = [example(n, seed=n) for n in (5, 9, 3, 12, 7)]
    data = Packed(examples, seq_len=15)
    found = []
    for tokens, segments, learnt in zip(data.tokens, data.segments, data.learnt):
        for segment in set(segments.tolist()) - {-1}:
            here = segments == segment
            assert not learnt[here][0]
            found.append((tokens[here].tolist(), learnt[here][1:].tolist()))
        assert not learnt[segments == -1].any()
    expected = [(list(e.tokens), list(e.learnt)[1:]) for e in examples]
    assert sorted(found) == sorted(expected)


def test_every_row_comes_once_an_epoch():
    examples = [Example([1, i, i], [True] * 3) for i in range(2, 12)]
    data = Packed(examples, seq_len=2)
    seen = [data.batch(4, seed=3, step=step).tokens[:, 1] for step in range(5)]
    seen = np.concatenate(seen).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(2, 12))
    assert seen[:10] != seen[10:]
    other = data.batch(4, seed=4, step=0).tokens[:, 1].tolist()
    assert other != seen[:4]


def test_what_fills_up_a_measured_batch_counts_for_nothing():
    data = Packed([Example([1, i, i], [True] * 3) for i in range(2, 7)], seq_len=2)
    batches = list(data.measured(4))
    assert [b.tokens.shape for b in batches] == [(4, 3), (4, 3)]
    assert sum(int(b.learnt.sum()) for b in batches) == 10


@pytest.mark.parametrize("changes", [{}, {"sliding_window": None}, MIXTRAL], ids=str)
def test_a_packed_example_is_read_as_if_alone(changes):
    model = random_model(**changes)
    examples = [example(n, seed=n) for n in (6, 11, 20, 9)]
    data = Packed(examples, seq_len=46)
    assert data.n_rows == 1
    tokens, segments = jnp.asarray(data.tokens), jnp.asarray(data.segments)

    @eqx.filter_jit
    def logits(model, tokens, segments):
        if model.config.moe is None:
            hidden, _ = model.batch(tokens, None, segments)
        else:
            hidden, _ = model.with_router_logits(tokens, segments)
        return jax.vmap(model.logits)(hidden)

    together = logits(model, tokens, segments)[0]
    row = data.tokens[0].tolist()
    for e in examples:
        n = len(e.tokens)
        starts = [i for i in range(47) if row[i : i + n] == e.tokens]
        alone = logits(model, jnp.asarray(e.tokens)[None], None)[0]
        here = together[starts[0] : starts[0] + n]
        np.testing.assert_allclose(here, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    # And so are the losses.
    loss_of = eqx.filter_jit(lambda model, batch: loss(model, batch, balance=0.0))
    losses, counts = [], []
    for e in examples:
        learnt = np.array([[False, *e.learnt[1:]]])
        batch = Batch(jnp.asarray([e.tokens]), None, jnp.asarray(learnt))
        losses.append(float(loss_of(model, batch)))
        counts.append(int(learnt.sum()))
    whole = Batch(tokens, segments, jnp.asarray(data.learnt))
    expected = np.dot(losses, counts) / sum(counts)
    assert abs(loss_of(model, whole) - expected) < 1e-5


@trains
@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_and_its_parts_give_the_same_step(recompute):
    examples = [example(n % 17 + 3, seed=n) for n in range(40)]
    rows = Packed(examples, seq_len=20).batch(8, seed=0, step=0)
    optimizer = make_optimizer(learning_rate=1e-2, steps=9, warmup=0)
    stepped = []
    for parts, again in ((1, False), (4, recompute)):
        # A new model. Others magnify what is rounded.
        model = Transformer(random_model().config, key=jax.random.key(0))
        frozen, state = start(model, optimizer)
        batch = jax.tree.map(jnp.asarray, rows)
        options = {"parts": parts, "recompute": again}
        state, outcome = train_step(frozen, state, batch, optimizer, **options)
        stepped.append((outcome, state.optimizer_state[1][0].mu, state.weights))
    (one, moments, _), (other, moments_in_parts, _) = stepped
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-6)
    np.testing.assert_allclose(one.grad_norm, other.grad_norm, rtol=1e-5)
    apart = optax.tree.norm(optax.tree.sub(moments, moments_in_parts))
    assert apart < 1e-6 * optax.tree.norm(moments)


@trains
def test_logits_in_parts(monkeypatch):
    """A long sequence's logits are made for a part at a time."""
    from mistral_eqx.learning import training

    model = random_model()
    batch = Batch(jnp.array([random_tokens(24, seed=seed) for seed in range(2)]))
    value = eqx.filter_value_and_grad(lambda m: loss(m, batch))
    run = lambda: eqx.filter_jit(lambda m: value(m))(model)
    expected, grads = run()
    monkeypatch.setattr(training, "_LOGITS", 1000)
    found, in_parts = run()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(in_parts), jax.tree.leaves(grads)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@trains
def test_bfloat16_has_float32_masters():
    """Steps that bfloat16 alone would round away add up."""
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small_model())
    data = Packed([example(9, seed=n) for n in range(8)], seq_len=8)
    optimizer = make_optimizer(learning_rate=1e-5, steps=50, warmup=0, weight_decay=0.0)
    frozen, state = start(model, optimizer)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.weights))
    for step in range(30):
        batch = jax.tree.map(jnp.asarray, data.batch(4, seed=0, step=step))
        state, _ = train_step(frozen, state, batch, optimizer)
    now = state.model(frozen)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(now))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.weights, model)
    # 30 steps of 1e-5 at most, and more than 10 of them.
    assert all(1e-4 < float(m) < 1e-2 for m in jax.tree.leaves(moved))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), small_model())
    with pytest.raises(ValueError, match="float16 model cannot be trained"):
        fit(half, data, None, steps=1)
