"""Runs the sections of a notebook that have a knob, with every value that the knob may
have: `kv_heads = nb.knob(2, of=(1, 2, 4, 8))`. A section goes from its `## ` heading to the
next, and must work behind the cells before the first heading, without the others.

A section runs here, not in a kernel, and without torch, as for a reader who has none: it
may ask torch for nothing that depends on its knob.
"""

import ast
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat

import build


class Turn(NamedTuple):
    """A section with a knob turned to another value than the notebook's."""

    title: str
    value: object
    cells: list[str]


def run(source: Path) -> int:
    """Runs every turn of a notebook, and says how many there were."""
    setup, sections = split(build.render(source, None))
    turned = list(turns(sections))
    if not turned:
        return 0
    os.environ.update(MPLBACKEND="agg", MISTRAL_EQX_NOTEBOOK_SCORE="")
    os.chdir(build.NOTEBOOKS)
    sys.modules["torch"] = None
    names = {"__name__": "__main__"}
    _run(setup, names)
    before = dict(names)
    import matplotlib.pyplot as plt

    for title, value, cells in turned:
        try:
            _run(cells, names)
        except Exception as error:
            told = f"{source.name}: with the knob at {value!r}, the section {title!r} fails"
            raise RuntimeError(told) from error
        plt.close("all")
        # The functions of the setup look into this dictionary, so it is kept.
        names.clear()
        names.update(before)
    return len(turned)


def _run(cells: list[str], names: dict) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in cells:
            exec(cell, names)


def turns(sections: dict[str, list[str]]) -> Iterator[Turn]:
    """Each knob with each of its values, other than the one that the notebook has."""
    for title, cells in sections.items():
        for i, cell in enumerate(cells):
            for call in knobs_of(cell):
                default, of = ast.literal_eval(call.args[0]), call.keywords[0].value
                for value in ast.literal_eval(of):
                    if value != default:
                        old = ast.get_source_segment(cell, call)
                        new = f"nb.knob({value!r}, of={ast.unparse(of)})"
                        changed = cell.replace(old, new)
                        yield Turn(title, value, [*cells[:i], changed, *cells[i + 1 :]])


def knobs_of(cell: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "nb.knob"]


def split(notebook: nbformat.NotebookNode) -> tuple[list[str], dict[str, list[str]]]:
    """The code before the first `## ` heading, and that below each of them."""
    setup, sections = [], {}
    cells = setup
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cells.append(cell.source)
        elif headings := re.findall(r"^## (.+)$", cell.source, re.M):
            cells = sections.setdefault(headings[-1], [])
    return setup, sections
