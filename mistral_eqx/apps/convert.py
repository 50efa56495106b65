"""A model or an adapter in another format, or in another dtype."""

import argparse
from pathlib import Path

from ..files.adapted import convert_adapter
from ..files.export import convert
from ..files.folders import adapter_files, holds_weights
from ..files.gguf_export import TYPES
from .options import adapter_of, add_adapter, add_dtype, adder, check_unused, given


HELP = "write a model in another format, or in another dtype"
EXAMPLE = "convert mistral-7B-v0.3 mistral-7B-v0.3-hf --to huggingface"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    parser.add_argument("source", metavar="SRC", help="the folder of the model, or a GGUF")
    parser.add_argument("target", metavar="DST", help="the folder to make, or a GGUF")
    add(
        "--to",
        choices=["mistral", "huggingface", "gguf", "peft"],
        help="the format to write; without it that of DST's name, or the one that SRC is "
        "not in",
    )
    add_dtype(parser, "the dtype of the weights to write; without it that of SRC")
    add("--type", choices=TYPES, help="the type of the weights in a GGUF")
    add(
        "--max-shard-size",
        metavar="SIZE",
        help="the most bytes in a file of Hugging Face's format (default: 5GB); Mistral's "
        "is one file",
    )
    add(
        "--model",
        metavar="FOLDER",
        help="if SRC is a LoRA adapter: the model that it is for",
    )
    add_adapter(parser)
    add("--force", action="store_true", help="replace a model that is in DST")


def run(options: argparse.Namespace) -> None:
    if options.type is not None and options.dtype is not None:
        raise ValueError("Give --type for a GGUF or --dtype for a folder, not both.")
    if options.model is not None:
        if options.adapter is not None:
            raise ValueError("Give --model for an adapter or --adapter for a model.")
        check_unused(options, "for an adapter", "type", "max_shard_size", "force")
        names = {"format": options.to, "dtype": options.dtype}
        convert_adapter(options.source, options.target, model=options.model, **names)
        return
    source = Path(options.source)
    if options.to == "peft" or (adapter_files(source) and not holds_weights(source)):
        raise ValueError("An adapter is converted with --model, the model that it is for.")
    if options.to == "gguf" or options.target.endswith(".gguf"):
        check_unused(options, "for a GGUF, which is one file", "max_shard_size")
    elif options.type is not None:
        raise ValueError("--type is of a GGUF: say --to gguf, or give --dtype.")
    if options.to == "mistral":
        check_unused(options, "for Mistral's format", "max_shard_size")
    convert(
        options.source,
        options.target,
        adapter=adapter_of(options),
        format=options.to,
        dtype=options.type or options.dtype,
        force=options.force,
        **given({"max_shard_size": options.max_shard_size}),
    )
