import errno
import itertools
import json
import logging
import os
import shutil
import signal
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from models import cast, random_tokens, small_model, trains

import mistral_eqx as mx
from mistral_eqx.devices import mesh as devices_mesh
from mistral_eqx.learning import fitting
from mistral_eqx.learning.batches import Slices
from mistral_eqx.learning.fitting import fit
from mistral_eqx.learning.training import train_step


STREAM = np.array(random_tokens(300), np.int32)
OPTIONS = {"steps": 6, "batch_size": 2, "warmup": 2}


def text(tokens=STREAM, seq_len=12):
    return Slices("the text", tokens, seq_len=seq_len, bos_id=1)


TEXT = text()


def assert_same(model, other):
    for leaf, another in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, another)


@trains
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,model=2"])
def test_a_step_is_compiled_once(mesh, adapter, caplog):
    model = jax.device_put(small_model(norm_eps=3e-5), jax.devices()[0])
    if mesh is not None:
        model = mx.shard(model, devices_mesh.make_mesh(devices_mesh.parse_mesh(mesh)))
    if adapter:
        model = mx.add_lora(model, rank=2, key=jax.random.key(0))
    with jax.log_compiles():
        fit(model, TEXT, TEXT, **OPTIONS | {"batch_size": 4})
    messages = [record.getMessage() for record in caplog.records]
    compiled = [text for text in messages if "XLA compilation of jit(train_step)" in text]
    assert len(compiled) == 1


@pytest.fixture
def killed_after(monkeypatch):
    def arrange(n):
        steps = iter(range(n))

        def step(*arguments, **options):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return train_step(*arguments, **options)

        monkeypatch.setattr(fitting, "train_step", step)

    return arrange


@trains
def test_a_killed_run_goes_on(tmp_path, monkeypatch, killed_after, capsys):
    unbroken = fit(small_model(), TEXT, TEXT, **OPTIONS)
    assert capsys.readouterr() == ("", "")  # which is no terminal
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    # A step past the last checkpoint, and then in the next run before the first.
    for n in (3, 1):
        killed_after(n)
        with pytest.raises(KeyboardInterrupt):
            fit(small_model(), TEXT, TEXT, **options)
        assert "run" in os.listdir(tmp_path)
        assert set(os.listdir(tmp_path)) <= {"run", "run.previous"}
    monkeypatch.setattr(fitting, "train_step", train_step)
    assert_same(fit(small_model(), TEXT, TEXT, **options), unbroken)
    # The run is over: no further step, and the same model.
    killed_after(0)
    assert_same(fit(small_model(), TEXT, TEXT, **options), unbroken)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (unbroken, small_model())))
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "checkpoint.eqx"
    with jax.numpy_dtype_promotion("standard"):
        fit(small_model(), TEXT, TEXT, **OPTIONS | {"steps": 1}, checkpoint=path)
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
            changed = options | {name: value}
            data = text(seq_len=changed.pop("seq_len", 12))
            fit(small_model(), data, data, **changed)
    with pytest.raises(ValueError, match="another run: text changed"):
        fit(small_model(), text(STREAM[1:]), TEXT, **options)
    for changes in ({"n_layers": 2}, {"dim": 32}, {"vocab_size": 65}):
        with pytest.raises(ValueError, match=f"{checkpoint} is not .* another shape"):
            fit(small_model(**changes), TEXT, TEXT, **options)
    with pytest.raises(ValueError, match=f"{checkpoint} is .* another run: dtype"):
        fit(cast(small_model(), jnp.bfloat16), TEXT, TEXT, **options)
    assert checkpoint.read_bytes() == before


@trains
def test_an_adapter_goes_on_with_its_own_base_alone(tmp_path):
    """Of models that differ in one matrix, and of weights in eight bits and full."""
    model = small_model()
    options = OPTIONS | {"steps": 1, "checkpoint": tmp_path / "checkpoint"}
    adapted = lambda base: mx.add_lora(base, key=jax.random.key(0))
    fit(adapted(model), TEXT, TEXT, **options)
    fit(adapted(model), TEXT, TEXT, **options)
    place = lambda m: m.layers[0].attention.wo.weight
    other = eqx.tree_at(place, model, 2 * place(model))
    for base in (other, mx.quantize(model, "int8")):
        with pytest.raises(ValueError, match="another run: adapter|another shape"):
            fit(adapted(base), TEXT, TEXT, **options)


@trains
@pytest.mark.parametrize("size", [0, 10, 1000, -1])
def test_a_damaged_checkpoint(checkpoint, size):
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    options = OPTIONS | {"steps": 1, "checkpoint": checkpoint}
    with pytest.raises(ValueError, match=f"{checkpoint} is damaged, or no checkpoint"):
        fit(small_model(), TEXT, TEXT, **options)


@trains
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_flipped_bit_is_noticed(written, data):
    content = bytearray(written.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = written.with_name("damaged")
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=f"{damaged} is damaged, or no checkpoint"):
        fit(small_model(), TEXT, TEXT, **OPTIONS | {"steps": 1}, checkpoint=damaged)


@trains
@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'"x"', b'{"run": 3}', b""])
def test_the_checkpoint_before_a_damaged_one_is_used(content, tmp_path, caplog):
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    unbroken = fit(small_model(), TEXT, TEXT, **options)
    # A whole file, but that of another program.
    content += b"\n"
    (tmp_path / "run").write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    with caplog.at_level(logging.WARNING):
        assert_same(fit(small_model(), TEXT, TEXT, **options), unbroken)
    assert "run is damaged, or no checkpoint." in caplog.text
    assert caplog.text.rstrip().endswith("The one before it is used.")


@trains
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    unbroken = fit(small_model(), TEXT, TEXT, **OPTIONS)
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    save, calls = np.save, itertools.count()

    def full(file, array, **more):
        # In the middle of the second checkpoint.
        if next(calls) == len(jax.tree.leaves(unbroken)) * 3 + 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, array, **more)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="run cannot be written: No space left on device. Th"):
        fit(small_model(), TEXT, TEXT, **options)
    assert os.listdir(tmp_path) == ["run"]
    monkeypatch.undo()
    assert_same(fit(small_model(), TEXT, TEXT, **options), unbroken)


def test_too_short_a_text():
    with pytest.raises(ValueError, match="the text has 11 tokens, fewer than one .* 12"):
        text(STREAM[:11])


@pytest.mark.parametrize("name", ["batch_size", "parts", "checkpoint_every"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got {value}"):
        fit(small_model(), TEXT, TEXT, **OPTIONS | {name: value})
    with pytest.raises(ValueError, match=f"seq_len must be 1 or more, got {value}"):
        text(seq_len=value)


def test_parts_divide_a_batch():
    with pytest.raises(ValueError, match=r"batch_size \(2\) cannot be divided into 4"):
        fit(small_model(), TEXT, TEXT, **OPTIONS, parts=4)


def losses(path):
    """What the log says, but for how fast it was."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@trains
def test_the_log_of_a_killed_run_is_that_of_an_unbroken_one(
    tmp_path, monkeypatch, killed_after
):
    fit(small_model(), TEXT, TEXT, **OPTIONS, checkpoint_every=2, log=tmp_path / "whole")
    expected = losses(tmp_path / "whole")
    assert [line["step"] for line in expected if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in expected if "held_out" in line] == [0, 2, 4, 6]
    rates = [line["learning_rate"] for line in expected if "loss" in line]
    assert rates[0] == 0 and max(rates) == rates[2] == pytest.approx(2e-3)
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}
    for n in (3, 2):
        killed_after(n)
        with pytest.raises(KeyboardInterrupt):
            fit(small_model(), TEXT, TEXT, **options, log=tmp_path / "log")
    with open(tmp_path / "log", "a") as file:
        file.write('{"step": 5, "lo')  # as a kill may leave it
    monkeypatch.setattr(fitting, "train_step", train_step)
    fit(small_model(), TEXT, TEXT, **options, log=tmp_path / "log")
    assert losses(tmp_path / "log") == expected


@trains
def test_ctrl_c_saves(tmp_path, monkeypatch):
    unbroken = fit(small_model(), TEXT, TEXT, **OPTIONS)
    options = OPTIONS | {"checkpoint": tmp_path / "run"}
    steps = itertools.count(1)

    def interrupted(*arguments, **more):
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return train_step(*arguments, **more)

    monkeypatch.setattr(fitting, "train_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), TEXT, TEXT, **options)
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(fit(small_model(), TEXT, TEXT, **options), unbroken)
    # Three steps, and then the three that were left.
    assert next(steps) == 7


@trains
def test_a_checkpoint_after_some_minutes(tmp_path, monkeypatch):
    minutes, written = [0], []

    def of_a_minute(*arguments, **options):
        minutes[0] += 1
        return train_step(*arguments, **options)

    monkeypatch.setattr(fitting, "train_step", of_a_minute)
    monkeypatch.setattr(fitting.time, "monotonic", lambda: 60.0 * minutes[0])
    monkeypatch.setattr(
        fitting, "write_checkpoint", lambda p, s, r: written.append(int(s.step))
    )
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 5}
    fit(small_model(), TEXT, None, **options | {"steps": 8}, checkpoint_minutes=1.5)
    # After each two minutes; the fifth step begins to count anew, and the last is due.
    assert written == [2, 4, 5, 7, 8]


@trains
def test_a_run_that_diverges(tmp_path, monkeypatch):
    model = small_model()
    options = OPTIONS | {"checkpoint": tmp_path / "run", "checkpoint_every": 2}

    def poisoned(frozen, state, *rest, **more):
        if int(state.step) == 3:
            nan = lambda leaf: leaf + jnp.nan
            state = eqx.tree_at(lambda s: s.weights.norm.weight, state, replace_fn=nan)
        return train_step(frozen, state, *rest, **more)

    monkeypatch.setattr(fitting, "train_step", poisoned)
    words = r"At step 4 the loss .* \(loss nan\).* last good checkpoint is kept in .*run"
    with pytest.raises(fitting.Diverged, match=words):
        fit(model, TEXT, TEXT, **options)
    monkeypatch.setattr(fitting, "train_step", train_step)
    unbroken = fit(small_model(), TEXT, TEXT, **OPTIONS)
    assert_same(fit(small_model(), TEXT, TEXT, **options), unbroken)


def test_no_steps():
    assert_same(fit(small_model(), TEXT, TEXT, **OPTIONS | {"steps": 0}), small_model())
