"""The command line as a user meets it: in a terminal, in a pipe, and with mistakes."""

import json
import lzma
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pexpect
import pytest
from commands import commands_with, fails, record_models, run, typed
from models import PARAMS

import mistral_eqx as mx
from mistral_eqx import scoring
from mistral_eqx.apps.main import main
from mistral_eqx.apps.terminal import read_text, split_held_out
from mistral_eqx.files import export
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.params import config_from_params, config_to_params
from mistral_eqx.learning import training
from mistral_eqx.text import TINY_MISTRAL


TEXT = "the cat sat on the mat, and the dog sat by the door\n" * 60
SEPARATOR = "=====================\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def params(tmp_path):
    """The folder of a model to train."""
    folder = tmp_path / "params"
    folder.mkdir()
    params = PARAMS | {"vocab_size": 300, "n_layers": 1}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def test_demo(folder, capsys):
    assert run("demo", folder, "--max_tokens", 5) == 0
    out, err = capsys.readouterr()
    prompts = ["This is a test", "This is another test", "This is a third test, mistral AI"]
    texts = out.split(SEPARATOR)
    assert len(texts) == 4 and texts[3] == "" and err == ""
    for prompt, text in zip(prompts, texts):
        assert text.startswith(prompt) and len(text) > len(prompt) + 1
    model, tokenizer = mx.load(folder)
    prompts[2] += " is very good at testing. "
    completions = mx.generate(model, tokenizer, prompts, max_tokens=5)
    assert [f"{completion}\n" for completion in completions] == texts[:3]


def report(capsys):
    out, err = capsys.readouterr()
    assert err == ""
    return {line[:16].strip(): float(line[16:]) for line in out.splitlines()}


def test_evaluate(folder, text, tmp_path, capsys):
    assert run("evaluate", text, "--model", folder) == 0
    told = report(capsys)
    model, tokenizer = mx.load(folder)
    scores = mx.score(model, tokenizer, TEXT).logprobs
    nats = -float(np.sum(scores, dtype=np.float64))
    assert told == {
        "tokens": len(scores),
        "bytes": len(TEXT),
        "nats per token": round(nats / len(scores), 4),
        "bits per byte": round(nats / np.log(2) / len(TEXT), 4),
    }
    compressed = tmp_path / "text.txt.xz"
    compressed.write_bytes(lzma.compress(TEXT.encode()))
    assert run("evaluate", compressed, "--model", folder) == 0
    assert report(capsys) == told
    assert run("evaluate", "--held-out", text, "--model", folder) == 0
    assert report(capsys)["bytes"] == len(TEXT) / 10


def test_what_quantizing_costs(folder, text, capsys):
    assert run("evaluate", text, "--model", folder, "--quantize", "int8") == 0
    out = capsys.readouterr().out
    told = {line[:16].strip(): float(line[16:].split()[0]) for line in out.splitlines()}
    (model, tokenizer), bits = mx.load(folder), len(TEXT) * np.log(2)
    small = mx.quantize(model, "int8")
    logprobs = [mx.score(m, tokenizer, TEXT).logprobs for m in (model, small)]
    exact, loss = (-np.sum(each, dtype=np.float64) for each in logprobs)
    assert told["bits per byte"] == pytest.approx(loss / bits, abs=1e-4)
    assert told["not quantized"] == pytest.approx(exact / bits, abs=1e-4)
    assert told["lost"] == pytest.approx(100 * (loss / exact - 1), abs=2e-3)
    # One text, shorter than a slice.
    ids = jnp.asarray(tokenizer.encode(TEXT)[:256])
    logits = [np.asarray(m(ids)[0], np.float64) for m in (model, small)]
    p, q = (each - np.logaddexp.reduce(each, axis=-1, keepdims=True) for each in logits)
    kl = np.sum(np.exp(p) * (p - q), axis=-1).mean()
    assert kl > 1e-6
    assert scoring.divergence(model, small, ids.tolist()) == pytest.approx(kl, rel=1e-3)
    assert scoring.divergence(model, model, ids.tolist()) == 0
    assert told["KL divergence"] == pytest.approx(kl, rel=0.5)


def test_generate_quantizes(capsys):
    model, tokenizer = mx.load(quantize="int8")
    (expected,) = mx.generate(model, tokenizer, ["To be"], max_tokens=5)
    shell = ["--max-tokens", 5, "--temperature", 0, "--quantize", "int8"]
    assert run("generate", "To be", "--json", *shell) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == expected.tokens
    assert told["logprobs"] == pytest.approx(expected.logprobs, rel=1e-5)


def test_every_command_quantizes(folder, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    length = ["--max-tokens", 3]
    small = ["--tokens", 4, "--prompt", 8, "--repeats", 1, "--contexts", "none"]
    learn = ["--data", text, "--held-out", 0, "--seq-len", 4]
    commands = [
        ["demo", *length],
        ["interactive", *length],
        ["generate", "To be", *length],
        ["generate", "To be", *length, "--beams", 2],
        ["chat", *length],
        ["score", text],
        ["evaluate", text],
        ["bench", *small],
        ["finetune", tmp_path / "out", *learn],
    ]
    # What `plan` makes of it is tested in devices/test_sharding.py.
    assert {words[0] for words in commands} == commands_with("--quantize") - {"plan"}
    models = record_models(monkeypatch)
    for command in commands:
        typed(monkeypatch)
        status = run(*command, "--model", folder, "--quantize", "int8")
        assert status == (2 if command[0] == "finetune" else 0)
        # `evaluate` compares with the weights as they are.
        n_used = 2 if command[0] == "evaluate" else 1
        used = [{leaf.dtype for leaf in jax.tree.leaves(model)} for model in models]
        assert len(used) == n_used and jnp.dtype("int8") in used[0], command
        models.clear()
        out, err = capsys.readouterr()
        assert len(out) > 0 or err.endswith("mistral_eqx: enough\n")
        if command[0] == "bench":
            assert json.loads(out)["quantize"] == "int8"
    with pytest.raises(SystemExit):
        run("generate", "To be", "--quantize", "int3")
    assert "int3" in capsys.readouterr().err


# Each option that draws, and a value that is not the default.
DRAWN = {
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "seed": 3,
    "stop": ["x", "y"],
    "max_tokens": 4,
}


@pytest.mark.parametrize(
    "command,use",
    [
        ("demo", "generate"),
        ("interactive", "stream"),
        ("generate", "generate"),
        ("chat", "Chat"),
    ],
)
def test_what_is_drawn_is_as_asked(command, use, monkeypatch):
    """Each option that the command has comes to the function that draws."""
    has = {name for name in DRAWN if command in commands_with("--" + dashed(name))}
    assert has >= {"temperature", "max_tokens"}
    words = []
    for name in has:
        values = DRAWN[name] if name == "stop" else [DRAWN[name]]
        words += [word for value in values for word in ("--" + dashed(name), value)]
    calls = []

    def draw(model, tokenizer, *prompts, **options):
        calls.append(options)
        return iter(())

    module = f"mistral_eqx.apps.{command}"
    monkeypatch.setattr(f"{module}.load_both", lambda options: (None, None))
    monkeypatch.setattr(f"{module}.{use}", draw)
    typed(monkeypatch, b"" if command == "chat" else b"To be\n")
    assert run(command, *words) == 0
    (options,) = calls
    assert {name: options.get(name) for name in has} == {name: DRAWN[name] for name in has}


def dashed(name):
    return name.replace("_", "-")


def test_held_out_is_the_last_tenth():
    learnt, held_out = split_held_out(TEXT)
    assert learnt + held_out == TEXT
    assert 9 * len(held_out) <= len(learnt) + 9 <= 9 * len(held_out) + 9


@pytest.mark.parametrize("text", ["", "x", "a\rb\n", "é🦙" * 5, "\ufeff\ufeff"])
def test_read_text_changes_line_ends_and_byte_order_marks_only(tmp_path, text):
    for name, content in (
        ("plain", text.encode()),
        ("compressed.xz", lzma.compress(text.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == text.removeprefix("\ufeff")
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n".encode())
    assert read_text(tmp_path / "windows") == f"{text}\n"


def test_train(params, text, tmp_path, capsys):
    out = tmp_path / "deep" / "trained"
    options = ["--params", params, "--corpus", text, "--batch-size", 2, "--seq-len", 16]
    with jax.numpy_dtype_promotion("standard"):
        assert run("train", out, *options, "--steps", 4) == 0
    assert os.listdir(out.parent) == ["trained"]
    assert set(os.listdir(out)) == {
        "params.json",
        "consolidated.safetensors",
        "tokenizer.model",
    }
    model, tokenizer = mx.load(out)
    assert tokenizer.vocab_size == model.config.vocab_size == 300
    learnt, _ = split_held_out(TEXT)
    mx.train_tokenizer(learnt, tmp_path / "expected.model", vocab_size=300)
    expected = (tmp_path / "expected.model").read_bytes()
    assert (out / "tokenizer.model").read_bytes() == expected
    capsys.readouterr()
    # What it makes is a model like any other.
    assert run("evaluate", text, "--model", out) == 0
    capsys.readouterr()
    # And is not overwritten.
    before = (out / "consolidated.safetensors").read_bytes()
    assert "is there already" in fails(capsys, "train", out, *options, "--steps", 4)
    assert (out / "consolidated.safetensors").read_bytes() == before


def test_train_a_mixtral(params, text, tmp_path, capsys):
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    path = params / "params.json"
    values = json.loads(path.read_text()) | {"moe": moe, "sliding_window": None}
    path.write_text(json.dumps(values))
    options = ["--params", params, "--corpus", text, "--batch-size", 2, "--seq-len", 16]
    with jax.numpy_dtype_promotion("standard"):
        assert run("train", tmp_path / "trained", *options, "--steps", 4) == 0
    capsys.readouterr()
    assert run("inspect", "--model", tmp_path / "trained") == 0
    assert "4 experts" in capsys.readouterr().out
    for command in (["score", text], ["generate", "--max_tokens", 5, "To be"]):
        assert run(*command, "--model", tmp_path / "trained") == 0


def test_train_goes_on(params, text, tmp_path, monkeypatch, capsys):
    # Killed behind its last checkpoint, while it writes the model.
    options = ["--params", params, "--corpus", text, "--batch-size", 2, "--seq-len", 16]
    options += ["--steps", 3]
    work = tmp_path / "trained.training"

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with jax.numpy_dtype_promotion("standard"):
        with monkeypatch.context() as patch:
            patch.setattr(export, "save", killed)
            assert run("train", tmp_path / "trained", *options) == 130
        assert capsys.readouterr() == ("", "Interrupted.\n")
        assert sorted(os.listdir(work)) == ["checkpoint.eqx", "tokenizer.model"]
        # Not with other options,
        line = fails(capsys, "train", tmp_path / "trained", *options, "--seed", 1)
        assert "another run: seed" in line and str(work) in line
        # and with the same no step is left to do.
        monkeypatch.setattr(training, "train_step", killed)
        assert run("train", tmp_path / "trained", *options) == 0
    assert not work.exists()
    assert mx.load(tmp_path / "trained")[1].vocab_size == 300


def test_train_tokenizer(text, tmp_path, capsys):
    out = tmp_path / "tokenizer.model"
    options = ["--corpus", text, text, "--vocab-size", 300]
    assert run("train-tokenizer", out, *options) == 0
    assert capsys.readouterr() == ("", "")
    assert mx.Tokenizer(out).vocab_size == 300
    learnt, _ = split_held_out(TEXT)
    mx.train_tokenizer(f"{learnt}\n{learnt}", tmp_path / "expected", vocab_size=300)
    assert out.read_bytes() == (tmp_path / "expected").read_bytes()
    assert "is there already" in fails(capsys, "train-tokenizer", out, *options)


def test_train_with_a_given_tokenizer(params, text, tmp_path, capsys):
    tokenizer = tmp_path / "given.model"
    mx.train_tokenizer(TEXT.upper(), tokenizer, vocab_size=300)
    options = ["--params", params, "--corpus", text, "--batch-size", 1, "--seq-len", 8]
    options += ["--steps", 0, "--tokenizer", tokenizer]
    assert run("train", tmp_path / "trained", *options) == 0
    trained = tmp_path / "trained" / "tokenizer.model"
    assert trained.read_bytes() == tokenizer.read_bytes()
    # One of another size is refused, and leaves nothing behind.
    embedded = TINY_MISTRAL / "tokenizer.model"
    line = fails(capsys, "train", tmp_path / "b", *options, "--tokenizer", embedded)
    assert "tokenizer has 2048 ids, but the model has 300" in line
    assert not (tmp_path / "b.training").exists()
    # A run that was interrupted keeps its own.
    work = tmp_path / "c.training"
    work.mkdir()
    (work / "checkpoint.eqx").touch()
    (work / "tokenizer.model").write_bytes(b"mine")
    line = fails(capsys, "train", tmp_path / "c", *options)
    assert "c.training holds a run with another tokenizer" in line
    assert (work / "tokenizer.model").read_bytes() == b"mine"


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_errors(folder, text, params, tmp_path, capsys):
    none = tmp_path / "none"
    assert f"no folder {none}" in fails(capsys, "demo", none)
    assert "max_tokens must be 0 or more" in fails(
        capsys, "demo", folder, "--max_tokens=-1"
    )
    assert "invalid int value: 'x'" in fails(capsys, "demo", folder, "--max_tokens", "x")
    assert "COMMAND" in fails(capsys)
    assert "invalid choice: 'sing'" in fails(capsys, "sing")
    assert str(none) in fails(capsys, "evaluate", none, "--model", folder)
    assert str(tmp_path) in fails(capsys, "evaluate", tmp_path, "--model", folder)
    (tmp_path / "empty").touch()
    assert "is empty" in fails(capsys, "evaluate", tmp_path / "empty", "--model", folder)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "as UTF-8 text" in fails(
        capsys, "evaluate", tmp_path / "binary", "--model", folder
    )
    compressed = tmp_path / "cut.xz"
    compressed.write_bytes(lzma.compress(TEXT.encode())[:-20])
    assert "cut.xz cannot be read" in fails(
        capsys, "evaluate", compressed, "--model", folder
    )
    (tmp_path / "short").write_text("the cat")
    options = ["--params", params, "--steps", 1]
    trained = tmp_path / "trained"
    tokenizer = tmp_path / "tokenizer.model"
    mx.train_tokenizer(TEXT, tokenizer, vocab_size=300)
    for name, value in (("--tokenizer", none), ("--params", none), ("--corpus", none)):
        assert str(none) in fails(capsys, "train", trained, *options, name, value)
    line = fails(capsys, "train", trained, *options, "--corpus", tmp_path / "short")
    assert "tokenizer with 300 ids cannot be learnt" in line
    options += ["--tokenizer", tokenizer]
    line = fails(capsys, "train", trained, *options, "--corpus", tmp_path / "short")
    assert "tokens, fewer than one sequence of 256: give more of it" in line
    options += ["--corpus", text, "--seq-len", 16]
    for name in ("batch_size", "seq_len"):
        option = "--" + name.replace("_", "-")
        line = fails(capsys, "train", trained, *options, f"{option}=0")
        assert f"{name} must be 1 or more, got 0" in line
    line = fails(capsys, "train-tokenizer", none, "--corpus", text, "--vocab-size", 9999)
    assert "tokenizer with 9999 ids cannot be learnt" in line
    assert not trained.exists() and not none.exists()
    cut(folder / "consolidated.safetensors", 10_000)
    assert "damaged or not whole" in fails(capsys, "demo", folder)
    cut(folder / "params.json", 10)
    assert "params.json cannot be used" in fails(capsys, "demo", folder)


def test_debug_shows_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        run("--debug", "demo", tmp_path / "none")


@pytest.mark.parametrize(
    "command", [[], ["demo"], ["evaluate"], ["train"], ["train-tokenizer"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*command, "--help")
    assert exit.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: python -m mistral_eqx") and err == ""


def shell(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "mistral_eqx", *map(str, arguments)],
        cwd=Path(mx.__file__).parents[1],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_from_a_shell(folder, tmp_path):
    """As a user has it: without this suite's checks, with an exit status."""
    good = shell("demo", folder, "--max_tokens", 3)
    bad = shell("demo", tmp_path / "none")
    closed = shell("demo", folder, "--max_tokens", 3)
    closed.stdout.close()  # as `head` does, once it has seen enough
    out, err = good.communicate(timeout=300)
    assert (good.returncode, err, out.count(SEPARATOR)) == (0, "", 3)
    out, err = bad.communicate(timeout=300)
    assert (bad.returncode, out) == (2, "")
    assert err == f"mistral_eqx: There is no folder {tmp_path / 'none'}.\n"
    assert (closed.stderr.read(), closed.wait(timeout=300)) == ("", 0)


def test_embedded_model_demo(capsys):
    assert run("demo", "--max_tokens", 20) == 0
    assert capsys.readouterr().out.count(SEPARATOR) == 3


def test_embedded_model_compresses_what_it_has_not_read(capsys, tmp_path):
    """Better than xz -9 of the whole texts, which needs 2.49 and 1.75 bits a byte."""
    for name, bound in (("shakespeare", 2.49), ("king_james_bible", 1.75)):
        _, unseen = split_held_out(read_text(TINY_MISTRAL / "corpus" / f"{name}.txt.xz"))
        (tmp_path / name).write_text(unseen[:50_000])
        assert run("evaluate", tmp_path / name) == 0
        assert report(capsys)["bits per byte"] < bound


COMMAND = [sys.executable, "-m", "mistral_eqx"]
# What a command compiles is kept for the next ones, in a folder of these tests.
KEPT = tempfile.TemporaryDirectory()
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "1",
    "TERM": "dumb",
    "COLUMNS": "90",
    "XDG_CACHE_HOME": KEPT.name,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with the embedded one's tokenizer, too small to be waited for."""
    config = config_to_params(read_config(TINY_MISTRAL))
    config |= {"dim": 16, "n_layers": 1, "hidden_dim": 16, "head_dim": 4, "n_heads": 2}
    model = mx.Transformer(config_from_params(config), key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    small = tmp_path_factory.mktemp("models") / "small"
    mx.save(model, small, tokenizer=TINY_MISTRAL / "tokenizer.model")
    return str(small)


def piped(*arguments, stdin=b""):
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, env=os.environ | SETTINGS
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def fed(capsys, monkeypatch):
    """Runs a command in this process, with some bytes on standard input."""

    def feed(*arguments, stdin=b""):
        typed(monkeypatch, stdin)
        return main(list(arguments)), *capsys.readouterr()

    return feed


def terminal(*arguments):
    return pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *arguments],
        env=os.environ | SETTINGS,
        encoding="utf-8",
        timeout=120,
        echo=False,
        # What is started in the background may have been told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_piped_text_is_plain_and_the_same_as_from_python(small, capsys):
    options = {"max_tokens": 6, "temperature": 0.7, "seed": 3}
    expected = mx.generate(*mx.load(small), ["To be"] * 2, **options)
    arguments = ["--model", small, "--max_tokens", "6", "--seed", "3", "--n", "2"]
    code, out, err = piped("generate", *arguments, stdin=b"To be\n")
    rule = "\n=====================\n"
    assert (code, out, err) == (0, rule.join(map(str, expected)) + "\n", "")
    assert main(["generate", "To be", *arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [c.text for c in expected]


def test_beams_and_stop_strings(small, capsys):
    (best, _) = mx.beam_search(*mx.load(small), "To be", n_beams=3, n_best=2, max_tokens=5)
    beams = ["generate", "To be", "--model", small, "--beams", "3", "--max_tokens", "5"]
    assert main(beams) == 0
    assert capsys.readouterr().out == f"{best}\n"
    stop = ["generate", "To be", "--model", small, "--stop", "a", "--stop", "e"]
    assert main([*stop, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["reason"] == "stop" and not set("ae") & set(made["text"])


def test_score(small, tmp_path, capsys):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("To be or not to be", "Verily")):
        file.write_text(text)
    assert main(["score", *map(str, files), "--model", small, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = mx.score(*mx.load(small), "Verily")
    assert lines[1]["text"] == str(files[1])
    assert lines[1]["logprob"] == pytest.approx(sum(scored.logprobs))
    assert lines[1]["perplexity"] == pytest.approx(scored.perplexity)
    assert main(["score", str(files[0]), "--model", small]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_demo_at_a_temperature(small, capsys):
    outs = []
    for temperature in ("0", "0.5"):
        words = ["demo", small, "--max_tokens", "8", "--temperature", temperature]
        assert main(words) == 0
        outs.append(capsys.readouterr().out)
        assert outs[-1].count("=====================") == 3
    # What is drawn is not what is most probable, of 2048 tokens that are almost alike.
    assert outs[0] != outs[1]


def test_interactive_in_a_terminal(small):
    child = terminal("interactive", small, "--max_tokens", "100000")
    child.expect_exact("Prompt: ")
    child.sendline("To be")
    child.expect_exact("To be")
    child.expect(r"\w+")  # text comes before the end, which is far away
    child.sendintr()
    child.expect_exact("=====================")
    child.expect_exact("Prompt: ")
    child.sendintr()
    child.expect_exact("Prompt: ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_chat_in_a_terminal(small):
    child = terminal(
        "chat", "--model", small, "--max_tokens", "100000", "--system", "Be brief."
    )
    child.expect_exact("> ")
    child.sendline("Hello")
    child.expect(r"\w+")
    child.sendintr()
    child.expect_exact("\n> ")
    child.sendline("[INST]")
    # Behind the system prompt, and what there is of the first question and its answer.
    child.expect(r"mistral_eqx: Message [13] contains \[INST\]")
    child.expect_exact("> ")
    child.sendline("/reset")
    child.expect_exact("> ")
    child.sendline("[/INST]")
    child.expect_exact("mistral_eqx: Message 1 contains")
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_chat_in_a_pipe(small):
    code, out, _ = piped(
        "chat", "--model", small, "--max_tokens", "3", stdin=b"Hello\n\nWhy?\n"
    )
    assert code == 0 and len(out.splitlines()) >= 2 and "> " not in out


def test_lines_from_windows(small, fed, tmp_path):
    """A carriage return is no part of a prompt, nor of a command, and a byte order mark is
    none of a text."""
    options = ["--model", small, "--max_tokens", "3"]
    for command in ("generate", "interactive", "chat"):
        plain = fed(command, *options, stdin=b"Hello\n/reset\nWhy?\n")
        windows = fed(command, *options, stdin=b"\xef\xbb\xbfHello\r\n/reset\r\nWhy?\r\n")
        assert plain[0] == 0 and windows == plain
    (tmp_path / "plain").write_bytes(b"To be\nor not\n")
    (tmp_path / "windows").write_bytes(b"\xef\xbb\xbfTo be\r\nor not\r\n")
    outs = [
        fed("generate", *options, "--file", str(tmp_path / name))
        for name in ("plain", "windows")
    ]
    assert outs[0] == outs[1] and outs[0][0] == 0


def test_a_closed_pipe_is_no_error(small):
    command = [*COMMAND, "demo", small, "--max_tokens", "2"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | SETTINGS
    )
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--temperature", "hot"], "temperature"),
        (["generate", "x", "--top-p", "0"], "top_p"),
        (["generate", "x", "--top-p", "1.5"], "top_p"),
        (["generate", "x", "--top-k", "0"], "top_k"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--max_tokens", "-1"], "max_tokens"),
        (["generate", "x", "--n", "0"], "--n"),
        (["generate", "x", "--beams", "5000"], "n_beams"),
        (["generate", "x", "--file", "y"], "not both"),
        (["generate", "--file", "nowhere"], "nowhere"),
        (["generate", "x", "--model", "nowhere"], "nowhere"),
        (["generate", "caf\udce9"], "UTF-8"),
        (["score", "nowhere"], "nowhere"),
        (["chat", "--top-k", "0"], "top_k"),
        # Options that would change nothing.
        (["plan", "--train"], "--train means nothing without --compile"),
        (["bench", "--shape", "1b", "--adapter", "x"], "--adapter means nothing"),
        (["convert", "x", "y", "--model", "z", "--force"], "--force means nothing"),
        (["convert", "x", "y", "--model", "z", "--type", "f16"], "--type means nothing"),
        (["convert", "x", "y.gguf", "--max-shard-size", "1GB"], "which is one file"),
        (["convert", "x", "y", "--to", "peft"], "converted with --model"),
        (["convert", str(TINY_MISTRAL), "y", "--max-shard-size", ""], "max_shard_size"),
        (["sing"], "sing"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, small, capsys):
    if "--beams" in arguments:
        arguments = [*arguments, "--model", small]
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_invalid_utf8_on_standard_input(small, fed):
    for command in (
        ["generate", "--model", small],
        ["chat", "--model", small],
        ["score", "-"],
    ):
        code, out, err = fed(*command, stdin=b"caf\xe9\n")
        assert code == 2 and out == "" and "not UTF-8" in err and err.count("\n") == 1


def test_compiled_programs_are_kept(small, tmp_path):
    def start(home, *arguments):
        environment = os.environ | SETTINGS | {"XDG_CACHE_HOME": str(home)}
        command = [*COMMAND, *arguments, "generate", "To be", "--model", small]
        command += ["--max_tokens", "3"]
        done = subprocess.run(command, capture_output=True, env=environment)
        kept = {path.name for path in home.rglob("*-cache")}
        return done.returncode, done.stdout, done.stderr, kept

    code, out, err, kept = start(tmp_path / "cache")
    assert (code, err) == (0, b"")
    assert any("decode" in name for name in kept)
    assert start(tmp_path / "cache") == (0, out, b"", kept)
    # As a process leaves them that was killed while it wrote.
    for file in (tmp_path / "cache").rglob("*-cache"):
        file.write_bytes(file.read_bytes()[:-20])
    code, again, err, _ = start(tmp_path / "cache")
    assert (code, again) == (0, out)
    assert err.count(b"\n") == 1 and b"cache/mistral_eqx are damaged" in err
    assert start(tmp_path / "none", "--no-compilation-cache") == (0, out, b"", set())
    (tmp_path / "file").write_text("no small can be made here")
    assert start(tmp_path / "file" / "home") == (0, out, b"", set())


def test_debug_shows_the_traceback():
    for arguments in (["--debug", "score", "nowhere"], ["score", "nowhere", "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(arguments)


@pytest.mark.parametrize("command", ["demo", "interactive", "generate", "chat", "score"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"example: python -m mistral_eqx {command}" in capsys.readouterr().out


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_may_be_closed(closed):
    command = f"{sys.executable} -m mistral_eqx generate To --max-tokens 1 {closed}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, env=os.environ | SETTINGS
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (done.stdout == b"") == (closed == ">&-")


def test_too_little_memory_is_told_in_a_line(monkeypatch, capsys):
    def allocate(options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nAt: here")

    monkeypatch.setattr("mistral_eqx.apps.demo.run", allocate)
    assert main(["demo"]) == 2
    told = "mistral_eqx: There is not enough memory: RESOURCE_EXHAUSTED: Out of memory\n"
    assert capsys.readouterr().err == told


def test_a_process_without_memory_does_not_wait_for_the_others(monkeypatch, capsys):
    def allocate(options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr("mistral_eqx.apps.demo.run", allocate)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        main(["demo"])
    assert "cannot go on without the others" in capsys.readouterr().err
