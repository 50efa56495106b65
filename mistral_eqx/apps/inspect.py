"""What is in a folder."""

import argparse

from ..files.inspection import inspect_folder
from .options import add_model, folder_of


HELP = "say what is in a folder, without reading its weights"
EXAMPLE = "inspect --model mistral-7B-v0.3"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)


def run(options: argparse.Namespace) -> None:
    for name, value in inspect_folder(folder_of(options)).items():
        print(f"{name:<12}{value}")
