"""Continues the reference's three prompts."""

import argparse

from ..text import generate
from .options import (
    add_adapter,
    add_devices,
    add_max_tokens,
    add_model,
    add_quantize,
    add_temperature,
    check_max_tokens,
    load_both,
)
from .terminal import RULE


HELP = "continue three prompts, as the reference does"
EXAMPLE = "demo --max-tokens 35"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser, positional=True)
    add_adapter(parser)
    add_max_tokens(parser, 35)
    add_temperature(parser, 0.0)
    add_quantize(parser)
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    check_max_tokens(options)
    model, tokenizer = load_both(options)
    prompts = [
        "This is a test",
        "This is another test",
        "This is a third test, mistral AI is very good at testing. ",
    ]
    lengths = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    for completion in generate(model, tokenizer, prompts, **lengths):
        print(completion)
        print(RULE)
