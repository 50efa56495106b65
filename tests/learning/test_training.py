import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from models import random_model, random_tokens, small_model, trains
from test_parity import (
    MIXTRAL,
    PACKAGE_CASES,
    hugging_face,
    hugging_face_weights,
    state_dict,
)

from mistral_eqx import Transformer, scoring
from mistral_eqx.learning.batches import Batch
from mistral_eqx.learning.training import loss, make_optimizer, start, train_step


BATCH = jnp.array([random_tokens(25, seed=seed) for seed in range(3)])


def test_loss_of_no_opinion():
    model = eqx.tree_at(
        lambda m: m.output.weight, random_model(), replace_fn=jnp.zeros_like
    )
    assert abs(eqx.filter_jit(loss)(model, Batch(BATCH)) - math.log(64)) < 1e-5


def test_loss_of_a_new_model():
    config = random_model().config
    model = eqx.filter_jit(Transformer)(config, key=jax.random.key(0))
    # Logits of variance 1 cost half a nat.
    assert abs(eqx.filter_jit(loss)(model, Batch(BATCH)) - math.log(64) - 0.5) < 0.25


def test_loss_is_the_score():
    model = random_model()
    scores = np.array([scoring.score(model, row.tolist()).logprobs for row in BATCH])
    assert abs(eqx.filter_jit(loss)(model, Batch(BATCH)) + scores.mean()) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": None}, PACKAGE_CASES[MIXTRAL]], ids=str
)
def test_gradients_are_transformers(changes):
    model = random_model(**changes)
    grad_of_loss = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    value, grads = grad_of_loss(model, Batch(BATCH), balance=0.1)
    # transformers balances the experts over all tokens that it is given: those that have
    # one behind them.
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    torch_model = hugging_face(model, **changes if model.config.moe else {})
    tokens = torch.tensor(np.asarray(BATCH, np.int64))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    torch_value = torch_model(inputs, labels=labels, shift_labels=labels).loss
    torch_value.backward()
    assert abs(value - torch_value.item()) < 1e-5
    theirs = dict(torch_model.named_parameters())
    for name, grad in hugging_face_weights(state_dict(grads), model.config).items():
        expected = theirs.pop(name).grad
        scale = expected.abs().max()
        assert scale > 1e-3
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-3 * scale.item())
    assert not theirs


@trains
def test_one_batch_is_learnt_by_heart():
    optimizer = make_optimizer(learning_rate=1e-2, steps=100, warmup=5, weight_decay=0.0)
    model = small_model()
    frozen, state = start(model, optimizer)
    losses = []
    for _ in range(100):
        batch = Batch(jnp.array(BATCH))
        state, outcome = train_step(frozen, state, batch, optimizer)
        losses.append(float(outcome.loss))
    assert losses[0] > 4 and losses[-1] < 0.1
    assert int(state.step) == 100


@trains
def test_optimizer():
    optimizer = make_optimizer(learning_rate=1e-2, steps=20, warmup=4, weight_decay=0.5)
    params = {"weight": jnp.full((2, 2), 3.0), "norm": jnp.full(2, 3.0)}
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e6), params)
    state, rates = optimizer.init(params), []
    for _ in range(25):
        updates, state = optimizer.update(grads, state, params)
        # Adam of a constant gradient is the learning rate.
        rates.append(-float(updates["norm"][0]))
        decay = rates[-1] - -float(updates["weight"][0, 0])
        np.testing.assert_allclose(-decay, 0.5 * 3.0 * rates[-1], rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(rates[:5], np.arange(5) * 2.5e-3, rtol=1e-3)
    assert all(b < a for a, b in zip(rates[4:], rates[5:20]))
    np.testing.assert_allclose(rates[20:], 1e-2 / 50, rtol=1e-3)


@trains
def test_gradients_are_clipped():
    optimizer = make_optimizer(learning_rate=1.0, steps=10, warmup=0)
    params = {"weight": jnp.zeros((2, 2))}
    for size in (2.0, 1e6):
        grads = {"weight": jnp.full((2, 2), size)}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        (adam,) = [
            part
            for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu"))
            if hasattr(part, "mu")
        ]
        # Of norm 1, of which Adam's mean takes a tenth.
        np.testing.assert_allclose(optax.global_norm(adam.mu), 0.1, rtol=1e-3)
