"""Writers that are killed, full disks and folders that cannot be written to: old or new is
whole, and what happened is told in a line."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from models import random_model

import mistral_eqx as mx


TESTS = Path(__file__).parent


@pytest.fixture
def models(tmp_path):
    """Two models of the same shape."""
    model = random_model(vocab_size=2048)
    for name, factor in (("one", 1.0), ("two", 2.0)):
        changed = jax.tree.map(lambda leaf, f=factor: f * leaf, model)
        mx.save(changed, tmp_path / name, dtype="bfloat16")
    return tmp_path


def test_killed_at_every_write(models):
    done = subprocess.run(
        [sys.executable, TESTS / "killed.py", models], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kinds = []
    for line in done.stdout.splitlines():
        kind, *words = line.split()
        found = dict(zip(words[::2], map(int, words[1::2])))
        # The last step is behind the last write.
        states = {"step-0", "step-1", "step-2"} if kind == "train" else {"old", "new"}
        assert found.keys() == states and sum(found.values()) >= 8, line
        kinds.append(kind)
    assert kinds == ["convert", "convert-new", "convert-gguf", "save", "train"]


def run(*arguments, file_size=None):
    def limit():
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.run(
        [sys.executable, "-m", "mistral_eqx", "--no-compilation-cache", *arguments],
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        preexec_fn=limit,
    )


def assert_one_line(done, *words):
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mistral_eqx: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


def test_no_room_for_a_file(models):
    before = sorted(os.listdir(models))
    out = str(models / "out")
    done = run("convert", str(models / "one"), out, file_size=50_000)
    assert_one_line(done, f"{out} cannot be written: File too large", "Make room")
    assert sorted(os.listdir(models)) == before


def test_no_room_for_a_checkpoint(models):
    """The run ends in a line, and goes on from the last good checkpoint."""
    text = models / "text"
    text.write_text("the cat sat on the mat, and the dog sat by the door\n" * 200)
    options = ["--corpus", str(text), "--params", str(models / "one"), "--steps", "2"]
    options += ["--batch-size", "1", "--seq-len", "16", "--tokenizer"]
    options += [str(Path(mx.__file__).parent / "tiny_mistral" / "tokenizer.model")]
    done = run("train", str(models / "out"), *options, file_size=500_000)
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert "checkpoint.eqx cannot be written: File too large. The last good one" in told
    assert os.listdir(models / "out.training") == ["tokenizer.model"]
    done = run("train", str(models / "out"), *options)
    assert done.returncode == 0, done.stderr
    assert not (models / "out.training").exists()
    mx.load(models / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(models):
    models.chmod(0o500)
    try:
        done = run("convert", str(models / "one"), str(models / "out"))
    finally:
        models.chmod(0o700)
    assert_one_line(done, "Permission denied")


def test_a_target_that_is_a_file(models):
    (models / "file").write_text("mine")
    for target, word in (("file", "is there already"), ("file/out", "file is a file: ")):
        for more in ([], ["--force"]):
            target_path = str(models / target)
            done = run("convert", str(models / "one"), target_path, *more)
            assert_one_line(done, "holds no model" if more and target == "file" else word)
    assert (models / "file").read_text() == "mine"


def test_two_runs_of_training_in_one_folder(models):
    from mistral_eqx.files.atomic import locked

    with locked(models / "out.training"):
        done = run("train", str(models / "out"), "--steps", "1")
    assert_one_line(done, "Another process is writing to", "out.training")
