"""What is in a folder."""

import argparse

from ..files.inspection import inspect_folder
from .options import add_model, folder_of


HELP = "say what is in a folder, without reading its weights"
EXAMPLE = "inspect --model mistral-7B-v0.3"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)


def run(options: argparse.Namespace) -> int:
    """The exit status is 1 if what is there cannot be used."""
    found = inspect_folder(folder_of(options))
    for name, value in found.items():
        print(f"{name:<12}{value}")
    return int(any(value.startswith("NO: ") for value in found.values()))
