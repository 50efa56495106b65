"""Trains a tokenizer."""

import argparse
from pathlib import Path

from ..files.atomic import check_new
from ..learning.tokenizers import train_tokenizer
from .options import add_corpus, adder
from .terminal import read_text, split_held_out


HELP = "train a tokenizer with Mistral's settings"
EXAMPLE = "train-tokenizer my_tokenizer.model --vocab-size 2048"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="the file to make")
    add_corpus(parser)
    adder(parser)(
        "--vocab-size",
        type=int,
        default=2048,
        metavar="N",
        help="how many pieces, the 256 bytes and 3 control ids among them",
    )


def run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    check_new(out)
    texts = [split_held_out(read_text(file))[0] for file in options.corpus]
    train_tokenizer("\n".join(texts), out, vocab_size=options.vocab_size)
