"""Options that several commands share, and what is made of them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from .. import arguments
from ..devices.mesh import AXES, make_mesh, parse_mesh
from ..kernels.quantized import SCHEMES
from ..sampling import Sampling, SamplingOptions
from ..text import TINY_MISTRAL, load
from ..tokenizer import Tokenizer
from ..transformer import Transformer


CORPUS = (
    TINY_MISTRAL / "corpus" / "shakespeare.txt.xz",
    TINY_MISTRAL / "corpus" / "king_james_bible.txt.xz",
)
DTYPES = ("bfloat16", "float16", "float32")


def adder(parser: argparse.ArgumentParser | Any) -> Callable[..., None]:
    """`add_argument` that puts the default behind the help text."""

    def add(name: str, *more: str, help: str, **options: Any) -> None:
        if options.get("default") not in (None, [], argparse.SUPPRESS):
            help += " (default: %(default)s)"
        parser.add_argument(name, *more, help=help, **options)

    return add


def add_model(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """`--model`; also as the first word, where the reference has it so."""
    if positional:
        parser.add_argument(
            "folder", nargs="?", metavar="MODEL", help="the same as --model"
        )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the folder of the model, or a GGUF file; without it the model that comes "
        "with the package",
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="FOLDER[=WEIGHT]",
        help="a LoRA adapter to merge into the weights; may be given several times",
    )


def add_quantize(parser: argparse.ArgumentParser | Any) -> None:
    parser.add_argument(
        "--quantize",
        choices=SCHEMES,
        help="hold the weights in eight bits, in a quarter of float32's memory with next "
        "to no loss, or in four",
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "devices", "Spread the model over several devices or several hosts."
    )
    add = adder(group)
    add(
        "--mesh",
        metavar="AXIS=N,...",
        help="how many devices each axis gets, as in data=2,model=4; the axes are "
        + ", ".join(AXES),
    )
    add(
        "--distributed",
        action="store_true",
        help="join the other processes of a TPU slice or of a Slurm job",
    )
    add("--coordinator", metavar="HOST:PORT", help="the address of process 0")
    add("--num-processes", type=int, metavar="N", help="how many processes there are")
    add("--process-id", type=int, metavar="I", help="the number of this process, from 0")


def add_max_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    adder(parser)(
        "--max-tokens",
        "--max_tokens",
        type=int,
        default=default,
        metavar="N",
        help="the most tokens to write",
    )


def add_temperature(parser: argparse.ArgumentParser, default: float) -> None:
    adder(parser)(
        "--temperature",
        type=float,
        default=default,
        metavar="T",
        help="0 writes the most probable text, 1 draws from what the model finds probable",
    )


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    add_max_tokens(parser, max_tokens)
    add_temperature(parser, 0.7)
    add = adder(parser)
    add("--top-k", type=int, metavar="K", help="draw from the K most probable tokens only")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens that have the probability P together",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw no token that is less than P times as probable as the best one",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1, tokens that the text has already become less probable",
    )
    add("--seed", type=int, default=0, metavar="N", help="another seed draws another text")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before this one; may be given several times",
    )


def add_dtype(parser: argparse.ArgumentParser | Any, help: str, **options: Any) -> None:
    adder(parser)("--dtype", choices=DTYPES, help=help, **options)


def add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="FILE",
        default=CORPUS,
        help="texts, plain or .xz, of which the last tenth is held out; without it the "
        "Shakespeare and the King James Bible that come with the package",
    )


def folder_of(options: argparse.Namespace) -> str | Path:
    """The folder of the model that was asked for, or of the embedded one."""
    if getattr(options, "folder", None) is not None:
        if options.model is not None:
            raise ValueError("Give the model once: as the first word, or with --model.")
        return options.folder
    return TINY_MISTRAL if options.model is None else options.model


def load_both(options: argparse.Namespace, **changes: Any) -> tuple[Transformer, Tokenizer]:
    """The model and its tokenizer, on the mesh that was asked for. `changes` are other
    arguments of [`load`][mistral_eqx.load]."""
    asked = {"adapter": adapter_of(options), "mesh": mesh_of(options)}
    asked["quantize"] = getattr(options, "quantize", None)
    return load(folder_of(options), **asked | changes)


def adapter_of(options: argparse.Namespace) -> dict[str, float] | None:
    """The adapters that were asked for, and their weights."""
    given = getattr(options, "adapter", None)
    if given is None:
        return None
    found = {}
    for text in given:
        path, equals, weight = text.rpartition("=")
        try:
            pair = (path, float(weight)) if equals else (text, 1.0)
        except ValueError:  # a folder may have that character in its name
            pair = (text, 1.0)
        found[pair[0]] = found.get(pair[0], 0.0) + pair[1]
    return found


def mesh_of(options: argparse.Namespace) -> Mesh | None:
    """The mesh that was asked for, in the order of the devices."""
    return None if options.mesh is None else make_mesh(parse_mesh(options.mesh))


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling`, checked before a model is loaded for minutes."""
    check_max_tokens(options)
    if "" in options.stop:
        raise ValueError("A stop string is empty: every text would end at once.")
    numbers = {name: getattr(options, name) for name in SamplingOptions.__annotations__}
    Sampling(**numbers)
    others = {name: getattr(options, name) for name in ("max_tokens", "seed", "stop")}
    return numbers | others


def check_unused(options: argparse.Namespace, why: str, *names: str) -> None:
    """Raises `ValueError` if one of these options was given: it would change nothing."""
    for name in names:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} means nothing {why}.")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are not `None`: the others are left to the defaults of what is called."""
    return {name: value for name, value in options.items() if value is not None}


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raises `ValueError` for an option that is below 1, or more than 32 bits hold."""
    for name in names:
        arguments.integer(name, getattr(options, name), least=1)
    arguments.integer("seed", options.seed, most=2**63 - 1)


def check_max_tokens(options: argparse.Namespace) -> None:
    if options.max_tokens < 0:
        raise ValueError(f"max_tokens must be 0 or more, got {options.max_tokens}.")
