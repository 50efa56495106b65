import errno
import itertools
import logging
import math
import os
import shutil
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from models import cast, random_model, random_tokens
from test_parity import (
    MIXTRAL,
    PACKAGE_CASES,
    hugging_face,
    hugging_face_weights,
    state_dict,
)

import mistral_eqx as mx
from mistral_eqx import Transformer, scoring
from mistral_eqx.devices import mesh as devices_mesh
from mistral_eqx.learning import training
from mistral_eqx.learning.training import (
    fit,
    loss,
    make_optimizer,
    sample_batch,
    start,
    train_step,
)


SMALL = {"n_layers": 1, "dim": 16, "hidden_dim": 16}
STREAM = np.array(random_tokens(300), np.int32)
OPTIONS = {"bos_id": 1, "steps": 6, "batch_size": 2, "seq_len": 12, "warmup": 2}
BATCH = jnp.array([random_tokens(25, seed=seed) for seed in range(3)])


def small_model(**changes):
    """A new one each time: training gives away the memory of its model."""
    return jax.tree.map(jnp.copy, random_model(**SMALL | changes))


@pytest.fixture
def promote():
    """Optax mixes dtypes, which the other tests refuse."""
    with jax.numpy_dtype_promotion("standard"):
        yield


trains = pytest.mark.usefixtures("promote")


def assert_same(model, other):
    for leaf, another in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, another)


def test_loss_of_no_opinion():
    model = eqx.tree_at(
        lambda m: m.output.weight, random_model(), replace_fn=jnp.zeros_like
    )
    assert abs(eqx.filter_jit(loss)(model, BATCH) - math.log(64)) < 1e-5


def test_loss_of_a_new_model():
    config = random_model().config
    model = eqx.filter_jit(Transformer)(config, key=jax.random.key(0))
    # Logits of variance 1 cost half a nat.
    assert abs(eqx.filter_jit(loss)(model, BATCH) - math.log(64) - 0.5) < 0.25


def test_loss_is_the_score():
    model = random_model()
    scores = np.array([scoring.score(model, row.tolist()).logprobs for row in BATCH])
    assert abs(eqx.filter_jit(loss)(model, BATCH) + scores.mean()) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": None}, PACKAGE_CASES[MIXTRAL]], ids=str
)
def test_gradients_are_transformers(changes):
    model = random_model(**changes)
    grad_of_loss = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    value, grads = grad_of_loss(model, BATCH, balance=0.1)
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
    state = start(model, optimizer)
    losses = []
    for _ in range(100):
        state, value = train_step(state, jnp.array(BATCH), optimizer)
        losses.append(float(value))
    assert losses[0] > 4 and losses[-1] < 0.1
    assert int(state.step) == 100


@trains
@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,model=2"])
def test_a_step_is_compiled_once(mesh, caplog):
    model = jax.device_put(small_model(norm_eps=3e-5), jax.devices()[0])
    if mesh is not None:
        model = mx.shard(model, devices_mesh.make_mesh(devices_mesh.parse_mesh(mesh)))
    with jax.log_compiles():
        fit(model, STREAM, STREAM, **OPTIONS | {"batch_size": 4})
    messages = [record.getMessage() for record in caplog.records]
    compiled = [text for text in messages if "XLA compilation of jit(train_step)" in text]
    assert len(compiled) == 1


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


def test_batches():
    stream = np.arange(100, 120, dtype=np.int32)
    options = {"batch_size": 50, "seq_len": 18, "bos_id": 1}
    batch = sample_batch(stream, **options, seed=0, step=0)
    assert batch.shape == (50, 19)
    assert (batch[:, 0] == 1).all()
    assert (np.diff(batch[:, 1:], axis=1) == 1).all()
    assert set(batch[:, 1].tolist()) == {100, 101, 102}
    again = sample_batch(stream, **options, seed=0, step=0)
    np.testing.assert_array_equal(again, batch)
    for seed, step in ((1, 0), (0, 1)):
        other = sample_batch(stream, **options, seed=seed, step=step)
        assert (other != batch).any()
    whole = sample_batch(stream, **options | {"seq_len": 20}, seed=0, step=0)
    assert (whole[:, 1:] == stream).all()


@pytest.fixture
def killed_after(monkeypatch):
    def arrange(n):
        steps = iter(range(n))

        def step(*arguments):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return train_step(*arguments)

        monkeypatch.setattr(training, "train_step", step)

    return arrange


@trains
def test_a_killed_run_goes_on(tmp_path, monkeypatch, killed_after, capsys):
    unbroken = fit(small_model(), STREAM, STREAM, **OPTIONS)
    assert capsys.readouterr() == ("", "")  # which is no terminal
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    # A step past the last checkpoint, and then in the next run before the first.
    for n in (3, 1):
        killed_after(n)
        with pytest.raises(KeyboardInterrupt):
            fit(small_model(), STREAM, STREAM, **options)
        assert "run" in os.listdir(tmp_path)
        assert set(os.listdir(tmp_path)) <= {"run", "run.previous"}
    monkeypatch.setattr(training, "train_step", train_step)
    assert_same(fit(small_model(), STREAM, STREAM, **options), unbroken)
    # The run is over: no further step, and the same model.
    killed_after(0)
    assert_same(fit(small_model(), STREAM, STREAM, **options), unbroken)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (unbroken, small_model())))
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "checkpoint.eqx"
    with jax.numpy_dtype_promotion("standard"):
        fit(small_model(), STREAM, STREAM, **OPTIONS | {"steps": 1}, checkpoint=path)
    return path


@pytest.fixture
def checkpoint(written, tmp_path):
    return shutil.copy(written, tmp_path / "checkpoint.eqx")


OTHER_RUNS = {
    "steps": 2,
    "batch_size": 3,
    "seq_len": 13,
    "learning_rate": 1e-4,
    "warmup": 1,
    "seed": 5,
}


@trains
def test_a_checkpoint_of_another_run(checkpoint):
    before = checkpoint.read_bytes()
    options = OPTIONS | {"steps": 1, "checkpoint": checkpoint}
    for name, value in OTHER_RUNS.items():
        with pytest.raises(ValueError, match=f"{checkpoint} is .* another run: {name}"):
            fit(small_model(), STREAM, STREAM, **options | {name: value})
    with pytest.raises(ValueError, match="another run: text changed"):
        fit(small_model(), STREAM[1:], STREAM, **options)
    for changes in ({"n_layers": 2}, {"dim": 32}, {"vocab_size": 65}):
        with pytest.raises(ValueError, match=f"{checkpoint} is not .* another shape"):
            fit(small_model(**changes), STREAM, STREAM, **options)
    with pytest.raises(ValueError, match=f"{checkpoint} is not .* another shape"):
        fit(cast(small_model(), jnp.bfloat16), STREAM, STREAM, **options)
    assert checkpoint.read_bytes() == before


@trains
@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_a_damaged_checkpoint(checkpoint, size):
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    options = OPTIONS | {"steps": 1, "checkpoint": checkpoint}
    with pytest.raises(ValueError, match=f"{checkpoint} is damaged, or no checkpoint"):
        fit(small_model(), STREAM, STREAM, **options)


@trains
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_flipped_bit_is_noticed(written, data):
    content = bytearray(written.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = written.with_name("damaged")
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=f"{damaged} is damaged, or no checkpoint"):
        fit(small_model(), STREAM, STREAM, **OPTIONS | {"steps": 1}, checkpoint=damaged)


@trains
@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'"x"', b'{"run": 3}', b""])
def test_the_checkpoint_before_a_damaged_one_is_used(content, tmp_path, caplog):
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    unbroken = fit(small_model(), STREAM, STREAM, **options)
    # A whole file, but that of another program.
    content += b"\n"
    (tmp_path / "run").write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    with caplog.at_level(logging.WARNING):
        assert_same(fit(small_model(), STREAM, STREAM, **options), unbroken)
    assert "run is damaged, or no checkpoint." in caplog.text
    assert caplog.text.rstrip().endswith("The one before it is used.")


@trains
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    unbroken = fit(small_model(), STREAM, STREAM, **OPTIONS)
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    save, calls = np.save, itertools.count()

    def full(file, array, **more):
        # In the middle of the second checkpoint.
        if next(calls) == len(jax.tree.leaves(unbroken)) * 3 + 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, array, **more)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="run cannot be written: No space left on device. Th"):
        fit(small_model(), STREAM, STREAM, **options)
    assert os.listdir(tmp_path) == ["run"]
    monkeypatch.undo()
    assert_same(fit(small_model(), STREAM, STREAM, **options), unbroken)


def test_too_short_a_text():
    with pytest.raises(ValueError, match="tokens has 11 ids, fewer than one .* of 12"):
        fit(small_model(), STREAM[:11], STREAM, **OPTIONS)
    with pytest.raises(ValueError, match="held_out has 11 ids, fewer than one .* of 12"):
        fit(small_model(), STREAM, STREAM[:11], **OPTIONS)


@pytest.mark.parametrize("name", ["batch_size", "seq_len"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got {value}"):
        fit(small_model(), STREAM, STREAM, **OPTIONS | {name: value})


def test_no_steps():
    assert_same(fit(small_model(), STREAM, STREAM, **OPTIONS | {"steps": 0}), small_model())
