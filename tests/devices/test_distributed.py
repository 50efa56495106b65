"""The same program in two processes, on two hosts that are this one, as in one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_model, random_tokens
from worker import program

import mistral_eqx as mx
from mistral_eqx.files.params import config_to_params
from mistral_eqx.learning.batches import Batch
from mistral_eqx.learning.training import loss
from mistral_eqx.text import TINY_MISTRAL


TESTS = Path(__file__).parents[1]
DEADLINE = 240
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "model"
    model = random_model(vocab_size=2048, n_heads=8)
    mx.save(model, folder, tokenizer=TINY_MISTRAL / "tokenizer.model")
    return str(folder)


@pytest.fixture
def start():
    """Starts a command for each of two processes; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    started = []

    def start(command):
        for process in range(2):
            started.append(
                subprocess.Popen(
                    [sys.executable, *command(coordinator, process)],
                    env=os.environ | SETTINGS,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def worker(folder, end):
    return lambda coordinator, process: [
        str(TESTS / "worker.py"), folder, coordinator, "2", str(process), end,
    ]  # fmt: skip


def results(processes):
    """What each process has printed, once all have ended."""
    deadline, found = time.monotonic() + DEADLINE, []
    for process in processes:
        out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
        assert process.returncode == 0, err
        found.append([line for line in out.splitlines() if not line.startswith("[Gloo]")])
    return found


def test_two_processes_make_what_one_does(model_folder, start):
    processes = start(worker(model_folder, "whole"))
    expected = program(model_folder)
    both = [json.loads(lines[-1]) for lines in results(processes)]
    # A process reads what its devices hold, once: the norms, and half of all else.
    norms = 5 * 32
    half = (expected.pop("read") - norms) // 2 + norms
    assert [made.pop("read") for made in both] == [half, half]
    assert both == [expected, expected]


def test_a_killed_process_ends_the_other(model_folder, start):
    """At once, because a connection is closed, and without waiting for a heartbeat."""
    living, dying = start(worker(model_folder, "killed"))
    _, err = living.communicate(timeout=DEADLINE)
    assert living.returncode == 1
    assert dying.wait(60) == -signal.SIGKILL
    assert "mistral_eqx: Process 0 cannot go on without the others: " in err
    assert "Gloo" in err and "heartbeat" not in err, err


def test_a_stopped_process_ends_the_other(model_folder, start):
    living, _ = start(worker(model_folder, "stopped"))
    _, err = living.communicate(timeout=DEADLINE)
    assert living.returncode != 0
    # Process 1, in the next line.
    assert "unhealthy (stopped sending heartbeats):\n1\n" in err, err


def command(*more, n=2):
    return lambda coordinator, process: [
        *("-m", "mistral_eqx", *more),
        *("--coordinator", coordinator, "--num-processes", str(n)),
        *("--process-id", str(process)),
    ]


def test_one_process_prints(model_folder, start):
    generate = ["generate", "To be", "--model", model_folder, "--max_tokens", "6"]
    processes = start(command(*generate, "--mesh", "data=2,model=4"))
    one = subprocess.run(
        [sys.executable, "-m", "mistral_eqx", *generate],
        env=os.environ | SETTINGS,
        capture_output=True,
        text=True,
    )
    first, second = results(processes)
    assert "\n".join(first) + "\n" == one.stdout and second == []


def test_one_process_writes_what_all_have_trained(tmp_path, start):
    (tmp_path / "params.json").write_text(
        json.dumps(config_to_params(random_model(vocab_size=300, n_layers=1).config))
    )
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog sat by the door\n" * 60)
    options = ["--params", tmp_path, "--corpus", text, "--batch-size", 4, "--seq-len", 16]
    options = [*map(str, options), "--steps", "3", "--learning-rate", "1"]
    processes = start(
        command("train", str(tmp_path / "two"), *options, "--mesh", "fsdp=4,model=2")
    )
    subprocess.run(
        [sys.executable, "-m", "mistral_eqx", "train", str(tmp_path / "one"), *options],
        env=os.environ | SETTINGS,
        check=True,
    )
    results(processes)
    assert sorted(os.listdir(tmp_path)) == ["one", "params.json", "text.txt", "two"]
    one, two = (mx.load_model(tmp_path / folder) for folder in ("one", "two"))
    tokens = jnp.asarray(np.reshape(random_tokens(4 * 17, 300), (4, 17)))
    start = mx.Transformer(one.config, key=jax.random.key(0))
    before, expected, found = (float(loss(m, Batch(tokens))) for m in (start, one, two))
    assert abs(found - expected) < 0.1 * abs(expected - before)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--coordinator", "here:1"], "--coordinator, --num-processes and --process-id"),
        (["--distributed"], "Several processes share one mesh: give --mesh."),
        (
            "--mesh model=2 --coordinator here --num-processes 2 --process-id 0".split(),
            "The coordinator must be HOST:PORT, got 'here'.",
        ),
        (
            "--mesh model=2 --coordinator h:1 --num-processes 2 --process-id 2".split(),
            "A process of 2 must have an id from 0 to 1, got 2.",
        ),
    ],
)
def test_mistakes(arguments, words, capsys):
    from mistral_eqx.apps.main import main

    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""
    chat = ["chat", "--mesh", "model=2", "--coordinator", "h:1"]
    assert main([*chat, "--num-processes", "2", "--process-id", "0"]) == 2
    assert "A conversation is held with one process" in capsys.readouterr().err


def test_a_process_needs_all_three():
    from mistral_eqx.devices.processes import connect

    with pytest.raises(ValueError, match="Give coordinator, num_processes and process_id"):
        connect("localhost:1234")
