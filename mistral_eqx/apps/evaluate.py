"""How well a model predicts a text."""

import argparse
import math

from ..text import score
from .options import add_devices, add_model, load_both
from .terminal import read_text, split_held_out


HELP = "measure how well a model predicts a text, in bits a byte"
EXAMPLE = "evaluate --held-out mistral_eqx/tiny_mistral/corpus/shakespeare.txt.xz"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a text, plain or .xz")
    add_model(parser)
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="measure the last tenth only, which training never sees",
    )
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    text = read_text(options.file)
    if options.held_out:
        _, text = split_held_out(text)
    if not text:
        raise ValueError(f"{options.file} is empty.")
    model, tokenizer = load_both(options)
    scored = score(model, tokenizer, text)
    nats, size = -math.fsum(scored.logprobs), len(text.encode())
    print(f"tokens          {len(scored.tokens)}")
    print(f"bytes           {size}")
    print(f"nats per token  {nats / len(scored.tokens):.4f}")
    print(f"bits per byte   {nats / math.log(2) / size:.4f}")
