"""How fast a model runs here."""

import argparse
import json
import sys
import time

import jax

from ..devices.sharding import shard
from ..files.checkpoint import load_model
from ..files.released import RELEASED
from ..text import TINY_MISTRAL
from .measure import bench, check_options, table
from .options import (
    adapter_of,
    add_adapter,
    add_devices,
    add_dtype,
    add_model,
    add_quantize,
    adder,
    check_unused,
    folder_of,
    mesh_of,
)
from .random_weights import random_model


HELP = "measure how fast a model runs here: a table on a terminal, JSON elsewhere"
EXAMPLE = "bench --shape 1b --dtype bfloat16 --batch 8"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add_model(parser)
    add_adapter(parser)
    add(
        "--shape",
        choices=list(RELEASED),
        help="make random weights of this shape instead of loading a model",
    )
    add_dtype(
        parser, "the dtype of the weights; without it float32 on a CPU, if there is room"
    )
    add_quantize(parser)
    add("--batch", type=int, default=1, metavar="N", help="how many rows at once")
    add("--prompt", type=int, default=512, metavar="N", help="tokens to read in each row")
    add("--tokens", type=int, default=64, metavar="N", help="tokens to write in each row")
    add("--repeats", type=int, default=5, metavar="N", help="how often to time everything")
    add(
        "--contexts",
        metavar="N,N,...",
        help="lengths of context at which to time a step, or none; without it 1k to 32k, "
        "as far as the memory goes",
    )
    add("--json", action="store_true", help="print one JSON object on a terminal too")
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    if options.model is not None and options.shape is not None:
        raise ValueError("Give a model or --shape, not both.")
    if options.shape is not None:
        check_unused(options, "for the random weights of --shape", "adapter")
    numbers = {name: getattr(options, name) for name in ("batch", "prompt", "tokens")}
    numbers |= {"repeats": options.repeats, "contexts": lengths_of(options.contexts)}
    check_options(**numbers)
    mesh = mesh_of(options)
    jax.devices()  # starts the platform, which is not a part of loading
    start = time.perf_counter()
    if options.shape is not None:
        how = {"dtype": options.dtype, "quantize": options.quantize}
        model = random_model(RELEASED[options.shape], **how)
        model = model if mesh is None else shard(model, mesh)
    else:
        how = {"dtype": options.dtype, "quantize": options.quantize, "mesh": mesh}
        model = load_model(folder_of(options), adapter=adapter_of(options), **how)
    jax.block_until_ready(model)
    source = "load" if options.shape is None else "random weights"
    report = {
        "model": options.shape or str(options.model or TINY_MISTRAL.name),
        "source": source,
        "load": time.perf_counter() - start,
    }
    report |= bench(model, **numbers)
    if options.json or not sys.stdout.isatty():
        print(json.dumps(report))
    else:
        print(table(report))


def lengths_of(text: str | None) -> tuple[int, ...] | None:
    """The lengths in "1024,4096"; none in "none"."""
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f'--contexts must be like "1024,4096", or "none", got {text!r}.'
        ) from error
