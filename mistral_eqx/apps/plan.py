"""What a model needs of every device."""

import argparse

from ..devices.mesh import parse_mesh
from ..files.folders import read_config
from ..files.inspection import plan
from ..files.released import RELEASED
from .options import add_dtype, add_model, add_quantize, adder, folder_of


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


def run(options: argparse.Namespace) -> None:
    if options.model is not None and options.shape is not None:
        raise ValueError("Give a model or --shape, not both.")
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
    )
    for name, value in told.items():
        print(f"{name:<12}{value}")
