"""How probable a model finds texts."""

import argparse
import json

from ..text import score
from .options import add_adapter, add_devices, add_model, add_quantize, load_both
from .terminal import read_text


HELP = (
    "tell how probable a model finds texts: the sum of their tokens' log-probabilities, in "
    "nats, and the perplexity"
)
EXAMPLE = "score sonnet.txt psalm.txt"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="texts, plain or .xz; - for the piped one"
    )
    add_model(parser)
    add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_quantize(parser)
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    texts = [(file, read_text(file)) for file in options.files]
    for file, text in texts:
        if not text:
            raise ValueError(f"{file} is empty: there is nothing to score.")
    model, tokenizer = load_both(options)
    if not options.json:
        print(f"{'tokens':>10} {'logprob':>14} {'perplexity':>12}  text")
    for file, text in texts:
        scored = score(model, tokenizer, text)
        n, logprob, perplexity = len(scored.tokens), sum(scored.logprobs), scored.perplexity
        if options.json:
            fields = {"text": file, "tokens": n, "logprob": logprob}
            print(json.dumps({**fields, "perplexity": perplexity}))
        else:
            print(f"{n:10} {logprob:14.3f} {perplexity:12.4f}  {file}")
