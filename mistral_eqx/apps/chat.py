"""A conversation."""

import argparse
import sys

from ..chat import Chat
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
from .terminal import ask, complain, interruptible, show, text


HELP = "talk with a model in the template of its tokenizer (needs the extra chat)"
EXAMPLE = 'chat --model mistral-7B-Instruct-v0.3 --system "Answer briefly."'


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_adapter(parser)
    adder(parser)("--system", metavar="TEXT", help="what to tell the model first")
    parser.add_argument(
        "--show-reasoning",
        action="store_true",
        help="show what a model that reasons thinks, and the tools that it calls",
    )
    add_sampling(parser, max_tokens=256)
    add_quantize(parser)
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    sampling = sampling_of(options)
    system = None if options.system is None else text(options.system)
    model, tokenizer = load_both(options)
    sampling["with_reasoning"] = options.show_reasoning
    talk = Chat(model, tokenizer, system=system, **sampling)
    if sys.stdin.isatty():
        print("/reset forgets the conversation, Ctrl-C ends an answer, Ctrl-D the chat.")
    if options.model is None:
        print("The embedded model read plays, not conversations.", file=sys.stderr)
    for message in ask("> "):
        if message == "/reset":
            talk.reset()
        elif message.strip():
            try:
                with interruptible():
                    show(talk.stream(message))
            except ValueError as error:
                # A message that cannot be sent is no reason to lose those before it.
                if options.debug or not sys.stdin.isatty():
                    raise
                complain(error)
