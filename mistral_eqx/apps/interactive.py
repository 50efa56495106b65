"""Continues what you type."""

import argparse

from ..text import stream
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
from .terminal import RULE, ask, interruptible, show


HELP = "continue the prompts that you type, until Ctrl-D"
EXAMPLE = "interactive --max-tokens 100 --temperature 0.7"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser, positional=True)
    add_adapter(parser)
    add_max_tokens(parser, 35)
    add_temperature(parser, 0.7)
    add_quantize(parser)
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    check_max_tokens(options)
    model, tokenizer = load_both(options)
    lengths = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    for prompt in ask("Prompt: "):
        with interruptible():
            show(stream(model, tokenizer, prompt, **lengths), before=prompt)
        print(RULE)
