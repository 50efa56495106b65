"""The command line, called in this process as it is typed."""

import argparse
import functools
import io
import pkgutil

from mistral_eqx.apps.main import COMMANDS, main


def run(*arguments):
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """The one line on standard error of a command that ends with an error of the user's."""
    try:
        status = run(*arguments)
    except SystemExit as error:  # argparse's
        status = error.code
    out, error = capsys.readouterr()
    assert status == 2 and out == ""
    assert error.startswith("mistral_eqx: ") and error.endswith("\n")
    assert error.count("\n") == 1
    return error


@functools.cache
def actions():
    """What each command takes, as argparse has it."""
    found = {}
    for name, command in COMMANDS.items():
        command.add_options(parser := argparse.ArgumentParser(add_help=False))
        found[name] = parser._actions
    return found


def commands_with(option):
    """The names of the commands that have an option."""
    return {
        n
        for n, taken in actions().items()
        if any(option in a.option_strings for a in taken)
    }


def typed(monkeypatch, content=b"To be\n"):
    """What the next command reads from standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


# What a command gives its model to.
USES = [
    "demo.generate",
    "generate.generate",
    "generate.beam_search",
    "interactive.stream",
    "chat.Chat",
    "score.score",
    "evaluate.score",
    "bench.bench",
]


def record_models(monkeypatch):
    """A list, which gets each model that a command uses. Training ends with an error of the
    user's before its first step."""
    models = []

    def recording(function):
        def record(model, *arguments, **options):
            models.append(model)
            return function(model, *arguments, **options)

        return record

    def enough(*arguments, **options):
        raise ValueError("enough")

    for name in USES:
        path = f"mistral_eqx.apps.{name}"
        monkeypatch.setattr(path, recording(pkgutil.resolve_name(path)))
    monkeypatch.setattr("mistral_eqx.learning.fitting.fit", recording(enough))
    return models
