"""Continues a text."""

import argparse
import dataclasses
import json
import sys

from ..text import beam_search, generate, stream
from .options import (
    add_adapter,
    add_devices,
    add_model,
    add_quantize,
    add_sampling,
    adder,
    load_both,
    sampling_of,
)
from .terminal import RULE, read_text, show, text


HELP = "continue a text, given as an argument, in a file, or piped in"
EXAMPLE = 'generate "To be, or not" --n 3 --seed 1'


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    add("--file", metavar="FILE", help="read the text from this file")
    add_model(parser)
    add_adapter(parser)
    add_sampling(parser, max_tokens=128)
    add("--n", type=int, default=1, metavar="N", help="how many texts to write")
    add(
        "--beams",
        type=int,
        metavar="N",
        help="search for the most probable texts with N beams instead of drawing; of the "
        "other options only --n, --max-tokens, --json and --model count then",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object a line: prompt, text, reasoning, tool_calls, tokens, "
        "logprobs, reason, score",
    )
    add_quantize(parser)
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    if options.n < 1:
        raise ValueError(f"--n must be 1 or more, got {options.n}.")
    if options.prompt is not None and options.file is not None:
        raise ValueError("Give a prompt or --file, not both.")
    if options.file is not None:
        prompt = read_text(options.file)
    elif options.prompt not in (None, "-"):
        prompt = text(options.prompt)
    elif sys.stdin.isatty():
        raise ValueError("There is no prompt: give one, or --file, or pipe it in.")
    else:
        prompt = read_text("-")
    if options.file is not None or options.prompt in (None, "-"):
        prompt = prompt.removesuffix("\n")  # the end of a file is not of the prompt
    sampling = sampling_of(options)
    model, tokenizer = load_both(options)
    if options.beams is not None:
        (completions,) = beam_search(
            model,
            tokenizer,
            [prompt],
            n_beams=options.beams,
            n_best=options.n,
            max_tokens=options.max_tokens,
        )
    elif sys.stdout.isatty() and options.n == 1 and not options.json:
        show(stream(model, tokenizer, prompt, **sampling), before=prompt)
        return
    else:
        completions = generate(model, tokenizer, [prompt] * options.n, **sampling)
    for i, completion in enumerate(completions):
        if options.json:
            fields = dataclasses.asdict(completion)
            del fields["alternatives"]
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(*([RULE] if i > 0 else []), completion, sep="\n")
