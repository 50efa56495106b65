"""A model in the other format, or in another dtype."""

import argparse

from ..files.export import convert
from .options import add_dtype, adder


HELP = "write a model in the other format, or in another dtype"
EXAMPLE = "convert mistral-7B-v0.3 mistral-7B-v0.3-hf --to huggingface"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    parser.add_argument("source", metavar="SRC", help="the folder of the model")
    parser.add_argument("target", metavar="DST", help="the folder to make")
    add(
        "--to",
        choices=["mistral", "huggingface"],
        help="the format to write; without it the one that SRC is not in",
    )
    add_dtype(parser, "the dtype of the weights to write; without it that of SRC")
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="the most bytes in a file of Hugging Face's format; Mistral's is one file",
    )
    add("--force", action="store_true", help="replace a model that is in DST")


def run(options: argparse.Namespace) -> None:
    convert(
        options.source,
        options.target,
        format=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        force=options.force,
    )
