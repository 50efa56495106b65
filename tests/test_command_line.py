"""The command line as a user meets it: in a terminal, in a pipe, and with mistakes."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pexpect
import pytest

import mistral_eqx as mx
from mistral_eqx.__main__ import main
from mistral_eqx.files.checkpoint import read_config
from mistral_eqx.text import TINY_MISTRAL


COMMAND = [sys.executable, "-m", "mistral_eqx"]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb", "COLUMNS": "90"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the embedded one's tokenizer, too small to be waited for."""
    config = read_config(TINY_MISTRAL).to_params()
    config |= {"dim": 16, "n_layers": 1, "hidden_dim": 16, "head_dim": 4, "n_heads": 2}
    model = mx.Transformer(mx.ModelConfig.from_params(config), key=jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    folder = tmp_path_factory.mktemp("models") / "small"
    mx.save(model, folder, tokenizer=TINY_MISTRAL / "tokenizer.model")
    return str(folder)


def run(*arguments, stdin=b""):
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, env=ENVIRONMENT
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def terminal(*arguments):
    return pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *arguments],
        env=ENVIRONMENT,
        encoding="utf-8",
        timeout=120,
        echo=False,
        # What is started in the background may have been told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_piped_text_is_plain_and_the_same_as_from_python(folder, capsys):
    options = {"max_tokens": 6, "temperature": 0.7, "seed": 3}
    expected = mx.generate(*mx.load(folder), ["To be"] * 2, **options)
    arguments = ["--model", folder, "--max_tokens", "6", "--seed", "3", "--n", "2"]
    code, out, err = run("generate", *arguments, stdin=b"To be\n")
    rule = "\n=====================\n"
    assert (code, out, err) == (0, rule.join(map(str, expected)) + "\n", "")
    assert main(["generate", "To be", *arguments, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [c.text for c in expected]


def test_beams_and_stop_strings(folder, capsys):
    (best, _) = mx.beam_search(*mx.load(folder), "To be", n_beams=3, n_best=2, max_tokens=5)
    beams = ["generate", "To be", "--model", folder, "--beams", "3", "--max_tokens", "5"]
    assert main(beams) == 0
    assert capsys.readouterr().out == f"{best}\n"
    stop = ["generate", "To be", "--model", folder, "--stop", "a", "--stop", "e"]
    assert main([*stop, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["reason"] == "stop" and not set("ae") & set(made["text"])


def test_score(folder, tmp_path, capsys):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, ("To be or not to be", "Verily")):
        file.write_text(text)
    assert main(["score", *map(str, files), "--model", folder, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scored = mx.score(*mx.load(folder), "Verily")
    assert lines[1]["text"] == str(files[1])
    assert lines[1]["logprob"] == pytest.approx(sum(scored.logprobs))
    assert lines[1]["perplexity"] == pytest.approx(scored.perplexity)
    assert main(["score", str(files[0]), "--model", folder]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_demo(folder, capsys):
    assert main(["demo", folder, "--max_tokens", "3", "--temperature", "0.5"]) == 0
    assert capsys.readouterr().out.count("=====================") == 3


def test_interactive_in_a_terminal(folder):
    child = terminal("interactive", folder, "--max_tokens", "100000")
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


def test_chat_in_a_terminal(folder):
    child = terminal("chat", folder, "--max_tokens", "100000", "--system", "Be brief.")
    child.expect_exact("> ")
    child.sendline("Hello")
    child.expect(r"\w+")
    child.sendintr()
    child.expect_exact("\n> ")
    child.sendline("[INST]")
    child.expect_exact("mistral_eqx: Message 3 contains [INST]")
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


def test_chat_in_a_pipe(folder):
    code, out, _ = run("chat", folder, "--max_tokens", "3", stdin=b"Hello\n\nWhy?\n")
    assert code == 0 and len(out.splitlines()) >= 2 and "> " not in out


def test_a_closed_pipe_is_no_error(folder):
    command = [*COMMAND, "demo", folder, "--max_tokens", "2"]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--temperature", "hot"], "temperature"),
        (["generate", "x", "--top_p", "0"], "top_p"),
        (["generate", "x", "--top_p", "1.5"], "top_p"),
        (["generate", "x", "--top_k", "0"], "top_k"),
        (["generate", "x", "--stop", ""], "stop"),
        (["generate", "x", "--max_tokens", "-1"], "max_tokens"),
        (["generate", "x", "--n", "0"], "--n"),
        (["generate", "x", "--beams", "5000"], "n_beams"),
        (["generate", "x", "--file", "y"], "not both"),
        (["generate", "--file", "nowhere"], "nowhere"),
        (["generate", "x", "--model", "nowhere"], "nowhere"),
        (["generate", "caf\udce9"], "UTF-8"),
        (["score", "nowhere"], "nowhere"),
        (["chat", "--top_k", "0"], "top_k"),
        (["sing"], "sing"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, folder, capsys):
    if "--beams" in arguments:
        arguments = [*arguments, "--model", folder]
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_invalid_utf8_on_standard_input(folder):
    for command in (["generate", "--model", folder], ["chat", folder], ["score", "-"]):
        code, out, err = run(*command, stdin=b"caf\xe9\n")
        assert code == 2 and out == "" and "not UTF-8" in err
        assert "Traceback" not in err


def test_compiled_programs_are_kept(folder, tmp_path):
    def start(home, *arguments):
        environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(home)}
        del environment["JAX_ENABLE_COMPILATION_CACHE"]
        command = [*COMMAND, *arguments, "generate", "To be", "--model", folder]
        command += ["--max_tokens", "3"]
        done = subprocess.run(command, capture_output=True, env=environment)
        kept = {path.name for path in home.rglob("*-cache")}
        return done.returncode, done.stdout, done.stderr, kept

    code, out, err, kept = start(tmp_path / "cache")
    assert (code, err) == (0, b"")
    assert any("decode" in name for name in kept)
    assert start(tmp_path / "cache") == (0, out, b"", kept)
    assert start(tmp_path / "none", "--no-compilation-cache") == (0, out, b"", set())
    (tmp_path / "file").write_text("no folder can be made here")
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
