"""How well a model predicts a text."""

import argparse
import math

from ..scoring import divergence
from ..text import score
from .options import (
    add_adapter,
    add_devices,
    add_model,
    add_quantize,
    load_both,
)
from .terminal import read_text, split_held_out


HELP = "measure how well a model predicts a text, in bits a byte"
EXAMPLE = "evaluate --held-out mistral_eqx/tiny_mistral/corpus/shakespeare.txt.xz"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a text, plain or .xz")
    add_model(parser)
    add_adapter(parser)
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="measure the last tenth only, which training never sees",
    )
    add_quantize(parser)
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
    if options.quantize is not None:
        exact, _ = load_both(options, quantize=None)
        before = -math.fsum(score(exact, tokenizer, text).logprobs)
        apart = divergence(exact, model, tokenizer.encode(text))
        print(f"not quantized   {before / math.log(2) / size:.4f} bits per byte")
        print(f"lost            {100 * (nats / before - 1):.3f} percent")
        print(f"KL divergence   {apart:.6f} nats per token")
