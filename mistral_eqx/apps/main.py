"""The parser of all commands, and what happens to errors."""

import argparse
import contextlib
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax

from ..arguments import say_once
from ..devices.processes import connect
from . import (
    bench,
    chat,
    convert,
    demo,
    evaluate,
    finetune,
    generate,
    inspect,
    interactive,
    merge,
    plan,
    score,
    train,
    train_tokenizer,
)
from .terminal import complain


COMMANDS = {
    "demo": demo,
    "interactive": interactive,
    "generate": generate,
    "chat": chat,
    "score": score,
    "evaluate": evaluate,
    "convert": convert,
    "inspect": inspect,
    "plan": plan,
    "bench": bench,
    "train": train,
    "finetune": finetune,
    "merge": merge,
    "train-tokenizer": train_tokenizer,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 1 if `inspect` finds what cannot be
    used, 2 for an error of the user's, which is told in one line, 130 if interrupted."""
    # A stream that the shell has closed is `None`.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    options = make_parser().parse_args(arguments)
    if not options.no_compilation_cache:
        _keep_programs()
    try:
        with contextlib.redirect_stdout(_output(options)):
            status = options.run(options) or 0
            sys.stdout.flush()
        return status
    except jax.errors.JaxRuntimeError as error:
        if options.debug:
            raise
        if jax.process_count() == 1:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            complain(f"There is not enough memory: {str(error).splitlines()[0]}")
            return 2
        complain(f"Process {jax.process_index()} cannot go on without the others: {error}")
        # The others will not come to say goodbye, which JAX would wait for.
        os._exit(1)
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has seen enough. Python would complain once more
            # when it closes standard output at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _keep_programs() -> None:
    """Compiled programs are kept in the user's cache folder for the next time, unless JAX
    was told of another folder (`JAX_COMPILATION_CACHE_DIR`)."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder /= "mistral_eqx"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written to is no reason to stop
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Many of them take less than JAX thinks worth keeping, and seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    warnings.showwarning = functools.partial(_warn, warnings.showwarning)


def _warn(show: Callable, message: Warning, *more) -> None:
    """JAX compiles anew what it cannot read, and warns of each program in several lines."""
    if "persistent compilation cache" in str(message):
        say_once(
            f"Compiled programs in {jax.config.jax_compilation_cache_dir} are damaged, and "
            "are compiled again. Delete the folder to be rid of this."
        )
    else:
        show(message, *more)


def _output(options: argparse.Namespace) -> io.TextIOBase:
    """Joins the other processes, if there are to be any. One of them prints."""
    names = ("coordinator", "num_processes", "process_id")
    given = {name: getattr(options, name, None) for name in names}
    n_given = sum(value is not None for value in given.values())
    if n_given == 0 and not getattr(options, "distributed", False):
        return sys.stdout
    if 0 < n_given < 3:
        raise ValueError("Give --coordinator, --num-processes and --process-id together.")
    if options.mesh is None:
        raise ValueError("Several processes share one mesh: give --mesh.")
    if options.run in (interactive.run, chat.run):
        raise ValueError("A conversation is held with one process, not with several.")
    connect(*given.values())
    return sys.stdout if jax.process_index() == 0 else open(os.devnull, "w")


class Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mistral_eqx: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m mistral_eqx", description="Mistral in JAX and Equinox.")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="keep no compiled programs in the user's cache folder, and use none",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=f"example: python -m mistral_eqx {command.EXAMPLE}",
        )
        sub.set_defaults(run=command.run)
        # Here too, because people add it at the end.
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        command.add_options(sub)
    return parser
