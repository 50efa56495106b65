"""`finetune`, `merge` and `--adapter`, as they are typed."""

import itertools
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import fails, run
from models import trains
from safetensors.numpy import load_file

import mistral_eqx as mx
from mistral_eqx.learning import fitting
from mistral_eqx.learning.training import train_step
from mistral_eqx.text import TINY_MISTRAL


TEXT = "the cat sat on the mat, and the dog sat by the door\n" * 60
TALK = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am the cat."},
]
# The tokenizer of the embedded model has no template, so it is Mistral's first.
OPTIONS = ["--batch-size", 2, "--seq-len", 24, "--learning-rate", 1e-2]
LORA = [*OPTIONS, "--lora-rank", 4]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def talk(tmp_path):
    path = tmp_path / "talk.jsonl"
    other = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "No."}]
    lines = [json.dumps({"messages": m}) for m in (TALK, other)] * 4
    path.write_text("\n".join(lines))
    return path


def log_of(folder):
    """What the log says, but for how fast it was."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@trains
def test_an_answer_is_learnt(talk, tmp_path, capsys):
    model, tokenizer = mx.load()
    before = mx.chat(model, tokenizer, TALK[:1], max_tokens=8)
    assert before.text != TALK[1]["content"]
    out = tmp_path / "adapter"
    # More than the template and the words of a question does not fit.
    options = [*LORA, "--seq-len", 40, "--steps", 30]
    assert run("finetune", out, "--data", talk, *options) == 0
    told = capsys.readouterr()
    assert "7 examples of" in told.err and "of 5,388,032 (2.02%), an adapter" in told.err
    held_out = [line["held_out"] for line in log_of(out) if "held_out" in line]
    assert f"{held_out[0]:.4f} to {held_out[-1]:.4f} nats a token" in told.out
    assert held_out[-1] < 0.1 * held_out[0]
    assert sorted(os.listdir(out)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "log.jsonl",
    ]
    assert sorted(os.listdir(tmp_path)) == ["adapter", "talk.jsonl"]
    model, tokenizer = mx.load(adapter=out)
    answer = mx.chat(model, tokenizer, TALK[:1], max_tokens=8)
    assert answer.text == TALK[1]["content"] and answer.reason == "eos"
    # The same from the command line, merged for good, and in Mistral's format.
    merged, lora = tmp_path / "merged", tmp_path / "lora"
    assert run("merge", merged, "--adapter", out) == 0
    assert run("convert", out, lora, "--model", TINY_MISTRAL) == 0
    assert sorted(os.listdir(lora)) == ["lora.safetensors", "params.json"]
    prompt = "[INST] Who are you? [/INST]"
    generate = ["generate", prompt, "--temperature", 0, "--max-tokens", 8]
    capsys.readouterr()
    for options in (["--adapter", out], ["--adapter", lora], ["--model", merged]):
        assert run(*generate, *options) == 0
        assert capsys.readouterr().out.rstrip().endswith("I am the cat.")
    # An adapter that counts for nothing, and then more of the same.
    for weights in (
        ["--adapter", f"{out}=0"],
        ["--adapter", f"{out}=0.5", "--adapter", f"{out}=-0.5"],
    ):
        assert run(*generate, *weights) == 0
        assert "I am the cat" not in capsys.readouterr().out
    more = [
        *OPTIONS,
        "--seq-len",
        40,
        "--steps",
        2,
        "--adapter",
        out,
        "--learning-rate",
        1e-4,
    ]
    assert run("finetune", tmp_path / "more", "--data", talk, *more) == 0
    more = [line["held_out"] for line in log_of(tmp_path / "more") if "held_out" in line]
    np.testing.assert_allclose(more[0], held_out[-1], rtol=1e-3)


@trains
@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_all_of_a_model(format, saved, text, tmp_path, capsys):
    folder = tmp_path / "model"
    mx.convert(saved, folder, format=format, dtype="bfloat16")
    out = tmp_path / "out"
    options = [*OPTIONS, "--steps", 5, "--parts", 2, "--recompute", "--full"]
    assert run("finetune", out, "--model", folder, "--data", text, *options) == 0
    assert "(100.00%), all of the model" in capsys.readouterr().err
    assert set(os.listdir(folder)) | {"log.jsonl"} == set(os.listdir(out))
    before, after = (mx.load_model(f, dtype="bfloat16") for f in (folder, out))
    for leaf, other in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        assert leaf.dtype == other.dtype == jnp.bfloat16 and (leaf != other).any()
    weights = load_file(next(out.glob("*.safetensors")))
    assert {str(weight.dtype) for weight in weights.values()} == {"bfloat16"}
    losses = [line["loss"] for line in log_of(out) if "loss" in line]
    assert losses[-1] < losses[0]


# The command line, which prints its steps and sends itself a signal when one begins.
SIGNALLED = """
import os, sys
from mistral_eqx.apps.main import main
from mistral_eqx.learning import fitting

def signalled(frozen, state, *rest, **more):
    print(state.step, flush=True)
    if int(state.step) == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
    return train_step(frozen, state, *rest, **more)

train_step, fitting.train_step = fitting.train_step, signalled
sys.exit(main(sys.argv[3:]))
"""


@trains
def test_a_killed_run_learns_the_same(saved, text, tmp_path):
    """With SIGKILL behind a checkpoint, and then with Ctrl-C between two."""
    command = ["finetune", "--model", saved, "--data", text, *LORA, "--steps", 9]
    command += ["--checkpoint-every", 3]
    assert run(*command, tmp_path / "whole") == 0
    expected = log_of(tmp_path / "whole")
    assert sum("loss" in line for line in expected) == 9
    work = tmp_path / "out.training"
    # What the log says when the signal comes: a step is told when the next one is under
    # way. Ctrl-C waits for the step that it meets.
    for first, step, how, told in ((0, 5, signal.SIGKILL, 4), (3, 7, signal.SIGINT, 8)):
        words = [step, int(how), *command, tmp_path / "out"]
        child = subprocess.run(
            [sys.executable, "-c", SIGNALLED, *map(str, words)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert not (tmp_path / "out").exists()
        last = json.loads((work / "log.jsonl").read_text().splitlines()[-1])
        assert last["step"] == told, child.stderr
        assert [*map(int, child.stdout.split())] == [*range(first, step + 1)]
        assert child.returncode == (130 if how == signal.SIGINT else -how), child.stderr
    assert "Start the command again to go on" in child.stderr
    assert run(*command, tmp_path / "out") == 0
    assert log_of(tmp_path / "out") == expected
    one, two = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("whole", "out")
    )
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, two[name])
    assert not work.exists()


@trains
def test_a_run_that_diverges(saved, text, tmp_path, monkeypatch, capsys):
    steps = itertools.count(1)

    def poisoned(frozen, state, *rest, **more):
        state, outcome = train_step(frozen, state, *rest, **more)
        nan = float("nan") if next(steps) == 5 else 0.0
        return state, jax.tree.map(lambda x: x + nan, outcome)

    monkeypatch.setattr(fitting, "train_step", poisoned)
    command = ["finetune", tmp_path / "out", "--model", saved, "--data", text, *LORA]
    command += ["--steps", 9, "--checkpoint-every", 2]
    assert run(*command) == 2
    told = capsys.readouterr().err
    assert "At step 5 the loss" in told and "is kept in" in told and "Lower the" in told
    assert (tmp_path / "out.training" / "checkpoint.eqx").exists()
    assert not (tmp_path / "out").exists()


def test_a_dry_run(saved, text, tmp_path, capsys):
    command = ["finetune", tmp_path / "out", "--model", saved, "--data", text, *LORA]
    assert run(*command, "--dry-run", "--quantize", "int8", "--epochs", 3) == 0
    told = capsys.readouterr()
    assert told.out == "" and "an adapter" in told.err and "of weights" in told.err
    n = int(told.err.split("a text of ")[1].split(" tokens")[0].replace(",", ""))
    assert f"steps       {round(3 * n / 24 / 2)} of 2 x 24 tokens" in told.err
    assert sorted(os.listdir(tmp_path)) == ["text.txt"]


def test_errors(saved, folder, text, talk, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["finetune", out, "--model", saved, "--seq-len", 24]
    error = lambda *words: fails(capsys, *command, *words)
    assert "--data" in fails(capsys, "finetune", out)
    assert "is there already" in fails(capsys, "finetune", tmp_path, "--data", text)
    for more in (["--quantize", "int8"], ["--adapter", "x"], ["--format", "peft"]):
        line = error("--data", text, "--full", *more)
        assert f"{more[0]} means nothing with --full" in line
    line = error("--data", text, "--adapter", "x", "--lora-rank", 4)
    assert "--lora-rank means nothing for an adapter that is there" in line
    assert "none" in error("--data", tmp_path / "none.jsonl")
    (tmp_path / "file").touch()
    line = fails(capsys, "finetune", tmp_path / "file" / "out", "--data", text)
    assert "cannot be made in it" in line
    assert "texts and .jsonl files" in error("--data", text, talk)
    assert "rank must be 1 or more, got 0" in error("--data", text, "--lora-rank", 0)
    assert "No layer's name fits 'q_proj'" in error("--data", text, "--layers", "q_proj")
    assert "seq_len must be 1 or more" in error("--data", talk, "--seq-len", 0)
    for wrong in (0, "inf"):
        assert "--epochs must be above 0" in error("--data", talk, "--epochs", wrong)
    assert "batch_size must be 1 or more" in error("--data", talk, "--batch-size", 0)
    assert "parts must be 1 or more" in error("--data", talk, "--parts", 0)
    assert "seed must be 0 or more" in error("--data", talk, "--seed", -1, "--dry-run")
    for name in ("talk.json", "talk.jsonl.xz", "talk.JSONL"):
        assert "names end in .jsonl" in error("--data", tmp_path / name)
    assert "held-out share must be" in error("--data", text, "--held-out", 2)
    assert "fewer than one sequence" in error("--data", text, "--seq-len", 100_000)
    assert "nothing to learn from" in error("--data", talk, "--held-out", 0.99)
    assert "line 1: the conversation has" in error("--data", talk, "--seq-len", 10)
    (tmp_path / "empty.jsonl").touch()
    assert "is empty" in error("--data", tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": TALK[:1]}))
    line = error("--data", tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 1: the conversation does not end with an answer" in line
    # A tokenizer of another model, which would be read as other words.
    mx.train_tokenizer(TEXT, folder / "tokenizer.model", vocab_size=300)
    line = fails(capsys, "finetune", out, "--model", folder, "--data", text)
    assert "The tokenizer has 300 ids, but the model has 2048" in line
    # An adapter for another model.
    small = mx.add_lora(mx.load()[0], key=jax.random.key(0))
    mx.save_adapter(small, tmp_path / "other")
    line = fails(capsys, "convert", tmp_path / "other", out)
    assert "An adapter is converted with --model" in line
    words = "Is it an adapter for this model?"
    assert words in error("--data", text, "--adapter", tmp_path / "other")
    adapted = ["--model", saved, "--adapter", tmp_path / "other"]
    assert words in fails(capsys, "generate", "a", *adapted)
    assert words in fails(capsys, "merge", out, *adapted)
    assert "nothing to merge" in fails(capsys, "merge", out)
    line = fails(capsys, "convert", saved, out, *adapted)
    assert "Give --model for an adapter or --adapter for a model" in line
    assert words in fails(capsys, "convert", saved, out, *adapted[2:])
    assert "no adapter" in fails(capsys, "chat", "--adapter", tmp_path / "none")
    assert not out.exists() and not list(tmp_path.glob("out*"))


@pytest.fixture
def labelled(tmp_path):
    path = tmp_path / "labelled.jsonl"
    animals, things = ("cat", "dog", "cow", "pig"), ("mat", "door", "bed", "cup")
    lines = [{"text": f"a {name}", "label": "animal"} for name in animals]
    lines += [{"text": f"a {name}", "label": "thing"} for name in things]
    path.write_text("\n".join(map(json.dumps, lines * 3)))
    return path


@trains
def test_labels_are_learnt(labelled, saved, tmp_path, capsys):
    """A new head on a model, which is then trained further, as a whole."""
    out, again = tmp_path / "classifier", tmp_path / "again"
    command = ["finetune", "--data", labelled, *OPTIONS, "--seq-len", 8]
    options = ["--lora-rank", 4, "--steps", 60, "--batch-size", 8]
    assert run(*command, *options, "--model", saved, out) == 0
    told = capsys.readouterr()
    assert "22 texts of" in told.err and "with 2 labels" in told.err
    assert "nats a label" in told.out
    classifier, tokenizer = mx.load_classifier(out)
    assert classifier.labels == ("animal", "thing")
    found = mx.classify(classifier, tokenizer, ["a dog", "a cup", "a cow", "a bed"])
    assert [str(one) for one in found] == ["animal", "thing", "animal", "thing"]
    options = ["--steps", 1, "--full", "--learning-rate", 1e-9]
    assert run(*command, *options, "--model", out, again) == 0
    classifier, _ = mx.load_classifier(again)
    close = dict(rtol=0, atol=1e-3)
    for one, other in zip(found, mx.classify(classifier, tokenizer, ["a dog", "a cup"])):
        np.testing.assert_allclose(
            [*one.probabilities.values()], [*other.probabilities.values()], **close
        )
    capsys.readouterr()
    # What does not go together.
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "a", "label": "plant"}))
    command = ["finetune", tmp_path / "no", "--model", out, "--seq-len", 8]
    line = fails(capsys, *command, "--data", more)
    assert "the label 'plant'" in line and "labels are animal, thing" in line
    assert "for its" not in line
    talk = tmp_path / "text.jsonl"
    talk.write_text(json.dumps({"text": "a"}))
    assert 'must have a "label"' in fails(capsys, *command, "--data", talk)
    line = fails(capsys, *command, "--data", labelled, "--quantize", "int8")
    assert "saved as a whole: give no --quantize" in line
    more.write_text(json.dumps({"text": "a " * 20, "label": "thing"}))
    assert "line 1: the text has" in fails(capsys, *command, "--data", more)
    more.write_text(json.dumps({"text": "a", "label": ["thing"]}))
    assert "line 1: its label must be" in fails(capsys, *command, "--data", more)
