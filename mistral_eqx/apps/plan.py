"""What a model needs of every device: reckoned, or compiled for chips that are not here."""

import argparse

from ..arguments import in_units
from ..config import ModelConfig
from ..devices.chips import CHIPS, chip_named
from ..devices.mesh import parse_mesh
from ..devices.programs import Program
from ..files.folders import read_config
from ..files.inspection import plan
from ..files.released import RELEASED
from .compiling import bound, compile_programs
from .options import add_dtype, add_model, add_quantize, adder, check_unused, folder_of


_SINGLE = [name for name, chip in CHIPS.items() if chip.platform != "tpu"]
HELP = (
    "say what a model needs of every device; a folder with its params.json or config.json "
    "is enough"
)
EXAMPLE = "plan --model mistral-7B-v0.3 --mesh model=8 --batch 8 --context 32768"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add_model(parser)
    add(
        "--shape",
        choices=list(RELEASED),
        help="plan for a released model of which no file is there",
    )
    add(
        "--mesh",
        default="model=1",
        metavar="AXIS=N,...",
        help="how many devices each axis gets, as in data=2,model=4",
    )
    add("--batch", type=int, default=1, metavar="N", help="how many rows at once")
    add(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="how many tokens of each row the cache holds",
    )
    add_dtype(parser, "the dtype of weights and cache", default="bfloat16")
    add_quantize(parser)
    add(
        "--compile",
        metavar="CHIP",
        help="compile the real programs for this chip, which need not be there, and say "
        f"what they need: a slice such as v5e:2x4, or one of {', '.join(_SINGLE)}",
    )
    add("--train", action="store_true", help="compile the training step too")


def run(options: argparse.Namespace) -> None:
    if options.model is not None and options.shape is not None:
        raise ValueError("Give a model or --shape, not both.")
    if options.compile is None:
        check_unused(options, "without --compile", "train")
    if options.shape is not None:
        config = RELEASED[options.shape]
    else:
        config = read_config(folder_of(options))
    told = plan(
        config,
        parse_mesh(options.mesh),
        batch=options.batch,
        context=options.context,
        dtype=options.dtype,
        quantize=options.quantize,
        chip=None if options.compile is None else chip_named(options.compile),
    )
    for name, value in told.items():
        print(f"{name:<12}{value}")
    if options.compile is not None:
        _tell_compiled(options, config)


def _tell_compiled(options: argparse.Namespace, config: ModelConfig) -> None:
    programs = compile_programs(
        config,
        parse_mesh(options.mesh),
        options.compile,
        batch=options.batch,
        context=options.context,
        dtype=options.dtype,
        quantize=options.quantize,
        train=options.train,
    )
    for name, program in programs:
        print(f"\n{name}, compiled for {options.compile} in {program.seconds:.0f} s")
        print(
            f"  memory      {in_units(program.arguments)} come in, "
            f"{in_units(program.temporaries)} are made on the way, and "
            f"{in_units(program.aliased)} are changed in place, on each device"
        )
        print(f"  collectives {collectives_of(program)}")
        if program.copies is not None:
            print(
                f"  copies      {'; '.join(program.copies) or 'of no weight and no ring'}"
            )
        if program.accessed:
            print(f"  accesses    {in_units(program.accessed)}, as the compiler counts")
        if name.startswith("decode"):
            most = bound(program, options.compile, options.batch)
            if most is not None:
                print(
                    f"  bound       {most:,.0f} tokens a second, if all that comes in is "
                    "read once"
                )


def collectives_of(program: Program) -> str:
    """How many collectives of each kind a program has, in words."""
    if program.collectives is None:
        return "not known: this JAX cannot read the compiler's text, a newer one may"
    found = (f"{n} {kind}" for kind, n in sorted(program.collectives.items()))
    return ", ".join(found) or "none"
