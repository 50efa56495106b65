"""A model with adapters merged into it."""

import argparse

from ..files.export import convert
from ..files.folders import located
from .options import adapter_of, add_adapter, add_dtype, add_model, folder_of


HELP = "merge adapters into a model, and write it"
EXAMPLE = "merge merged --model mistral-7B-v0.3 --adapter my_adapter"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="DST", help="the folder to make, or a GGUF")
    add_model(parser)
    add_adapter(parser)
    add_dtype(parser, "the dtype of the weights to write; without it that of the model")
    parser.add_argument("--force", action="store_true", help="replace a model in DST")


def run(options: argparse.Namespace) -> None:
    adapter = adapter_of(options)
    if adapter is None:
        raise ValueError("There is nothing to merge: give --adapter.")
    source = folder_of(options)
    _, format = located(source)
    if options.target.endswith(".gguf"):
        format = "gguf"
    convert(
        source,
        options.target,
        adapter=adapter,
        format=format,
        dtype=options.dtype,
        force=options.force,
    )
