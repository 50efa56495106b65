"""What a model needs of every device."""

import argparse

from ..devices.mesh import parse_mesh
from ..files.inspection import plan
from .options import add_dtype, add_model, adder, folder_of


HELP = (
    "say what a model needs of every device; a folder with its params.json or config.json "
    "is enough"
)
EXAMPLE = "plan --model mistral-7B-v0.3 --mesh model=8 --batch 8 --context 32768"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add_model(parser)
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


def run(options: argparse.Namespace) -> None:
    told = plan(
        folder_of(options),
        parse_mesh(options.mesh),
        batch=options.batch,
        context=options.context,
        dtype=options.dtype,
    )
    for name, value in told.items():
        print(f"{name:<12}{value}")
