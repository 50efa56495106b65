"""Builds the notebooks, with their outputs, from `src/`.

    python build.py [NUMBER ...]

Everything of a notebook is edited in `src/NN_slug.py` (py:percent). This runs it in a fresh
kernel, writes `NN_slug.ipynb`, its checks to `results/NN.json` and torch's answers to
`goldens/NN.npz`, and fills the table of README.md.
"""

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import resource
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).resolve().parent
SOURCES = sorted((NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))


def header(source: Path) -> dict[str, int]:
    """What a source says of itself: its `budget`, the seconds of CPU time that it may take
    as built (on an idle machine of two cores the clock shows somewhat less, on a busy one
    any amount more), and its `cover`, the figure that stands for it in README.md."""
    return jupytext.reads(source.read_text(), fmt="py:percent").metadata


def render(source: Path, seconds: float | None) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs: solutions are filled in from
    `solutions/`, and the time it took from the last build."""
    number = source.name[:2]
    text = source.read_text()
    solutions = NOTEBOOKS / "solutions" / f"ex{number}.py"

    def solution(match):
        code = _definition(solutions, match[1])
        lines = ["<details><summary>Solution</summary>", "", "```python"]
        lines += [*code.splitlines(), "```", "", "</details>"]
        return "\n".join(f"# {line}".rstrip() for line in lines)

    text = re.sub(r"# \{\{solution:(\w+)\}\}", solution, text)
    stated = "not measured yet" if seconds is None else f"{seconds:.0f} s of CPU time"
    text = text.replace("{{time}}", stated)
    notebook = jupytext.reads(text, fmt="py:percent")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell["metadata"] = {}
    notebook["metadata"] = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


def _definition(path: Path, name: str) -> str:
    text = path.read_text()
    for node in ast.parse(text).body:
        target = node.targets[0].id if isinstance(node, ast.Assign) else None
        if name in (getattr(node, "name", None), target):
            return ast.get_source_segment(text, node)
    raise ValueError(f"{path.name} has no {name}.")


def source_hash(source: Path) -> str:
    """Of everything that a notebook's cells are made from."""
    solutions = NOTEBOOKS / "solutions" / f"ex{source.name[:2]}.py"
    return hashlib.sha256(source.read_bytes() + solutions.read_bytes()).hexdigest()


def execute(
    notebook: nbformat.NotebookNode, *, timeout: int, env: dict[str, str]
) -> tuple[nbformat.NotebookNode, float]:
    """Runs a notebook in a fresh kernel and gives it back with the CPU seconds it took. The
    timeout is of a cell."""
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    # Compiled programs kept from an earlier run would make the first call look short.
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", **env}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # At Ctrl-C nbclient notes that it ends the kernel and goes on. The error that it then
    # raises depends on how far the kernel had ended.
    interrupted = lambda: getattr(client, "_async_cleanup_kernel_future", None) is not None
    try:
        client.execute(env=env)
    except Exception:
        if not interrupted():
            raise
    if interrupted():
        raise KeyboardInterrupt("while a notebook ran")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return notebook, cpu


def build(source: Path) -> None:
    number = source.name[:2]
    results, goldens = NOTEBOOKS / "results", NOTEBOOKS / "goldens"
    results.mkdir(exist_ok=True)
    goldens.mkdir(exist_ok=True)
    partial = {
        results / f"{number}.json": results / f"{number}.partial.json",
        goldens / f"{number}.npz": goldens / f"{number}.partial.npz",
    }
    env = dict(
        zip(
            ("MISTRAL_EQX_NOTEBOOK_RESULTS", "MISTRAL_EQX_NOTEBOOK_GOLDENS"),
            map(str, partial.values()),
        )
    )
    try:
        notebook, seconds = execute(render(source, None), timeout=600, env=env)
        # The time is only known now: the cells are rendered again, the outputs kept.
        for cell, timed in zip(notebook.cells, render(source, seconds).cells):
            cell["source"] = timed["source"]
        tidy(notebook)
        notebook["metadata"]["mistral_eqx"] = {
            "source_sha256": source_hash(source),
            "seconds": round(seconds),
        }
        path = NOTEBOOKS / f"{source.stem}.ipynb"
        picture = cover(notebook, header(source)["cover"])
        (NOTEBOOKS / "pictures").mkdir(exist_ok=True)
        (NOTEBOOKS / "pictures" / f"{number}.png").write_bytes(picture)
        nbformat.write(notebook, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        for final, part in partial.items():
            part.replace(final)
    finally:
        for part in partial.values():
            part.unlink(missing_ok=True)
    print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size // 1024} KB")


def cover(notebook: nbformat.NotebookNode, number: int) -> bytes:
    """One of the notebook's figures, as PNG."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return base64.b64decode(pictures[number])


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drops what differs from build to build, and would only be noise."""
    for cell in notebook.cells:
        cell["metadata"] = {}
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                output.traceback = []


def write_table() -> None:
    """Fills the table of README.md from the built notebooks."""
    rows = ["| | the question | CPU time | checks |", "|---|---|---|---|"]
    for source in SOURCES:
        path = NOTEBOOKS / f"{source.stem}.ipynb"
        if path.exists():
            notebook = nbformat.read(path, as_version=4)
            first = notebook.cells[0].source
            title, question = re.match(r"# (.+)\n\n\*\*(.+?)\*\*", first, re.S).groups()
            checks = json.loads((NOTEBOOKS / f"results/{source.name[:2]}.json").read_text())
            seconds = notebook.metadata.mistral_eqx.seconds
            picture = f'<img src="pictures/{source.name[:2]}.png" width="260">'
            link = f"[{title}]({path.name})"
            question = question.replace("\n", " ")
            rows.append(
                f"| {picture} | **{link}**<br>{question} | {seconds} s | {len(checks)} |"
            )
    readme = NOTEBOOKS / "README.md"
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    before, rest = readme.read_text().split(begin)
    _, after = rest.split(end)
    readme.write_text(before + begin + "\n".join(rows) + "\n" + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds notebooks with their outputs.")
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="01, say; all if none")
    numbers = parser.parse_args().numbers
    known = [source.name[:2] for source in SOURCES]
    if unknown := sorted(set(numbers) - set(known)):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    for source in SOURCES:
        if not numbers or source.name[:2] in numbers:
            build(source)
    write_table()


if __name__ == "__main__":
    main()
