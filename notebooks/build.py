"""Builds the notebooks, with their outputs, from `src/`.

    python build.py [NUMBER ...]            builds these notebooks, or all
    python build.py --new 11_slug           begins a notebook, from template/
    python build.py --knobs [NUMBER ...]    runs every value of their knobs, and no more
    python build.py --site FOLDER           makes web pages of the built notebooks

Everything of a notebook is edited in `src/NN_slug.py` (py:percent). The build runs it in a
fresh kernel, writes `NN_slug.ipynb`, its checks to `results/NN.json` and torch's answers to
`goldens/NN.npz`, and fills the table of README.md. It also runs every value of the knobs.
"""

import argparse
import ast
import base64
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

import fresh


NOTEBOOKS = Path(__file__).resolve().parent
SOURCES = sorted((NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))


def header(source: Path) -> dict[str, int]:
    """What a source says of itself: its `budget`, the seconds of CPU time that it may take
    as built (on an idle machine of two cores the clock shows somewhat less, on a busy one
    any amount more), and its `cover`, the figure that stands for it in README.md."""
    return jupytext.reads(source.read_text(), fmt="py:percent").metadata


# The first code cell of every notebook

START = """\
# Finds the helpers wherever Jupyter was started{clones}.
import importlib.util
import subprocess
import sys
from pathlib import Path


package = importlib.util.find_spec("mistral_eqx")
places = [Path.cwd(), *Path.cwd().parents, Path("repository").resolve()]
places += Path(package.origin).parents if package and package.origin else []
root = next((place for place in places if (place / "notebooks/nbtools.py").exists()), None)
if root is None:
{otherwise}
sys.path[:0] = [str(root / "notebooks"), str(root)]"""

CLONE = """\
    root = Path("repository").resolve()
    clone = ["git", "clone", "--quiet", "--depth=1", "{repository}", str(root)]
    install = [sys.executable, "-m", "pip", "install", "--quiet", f"{{root}}[train]"]
    for command in (clone, install):
        subprocess.run(command, check=True)"""

NOT_FOUND = """\
    raise ModuleNotFoundError("Clone the repository, and start Jupyter in it.")"""


def start(repository: str | None) -> str:
    """The first code cell of every notebook. It looks for the helpers in the folder in
    which the kernel was started, in those above it, and beside the package. If there are
    none, as on Colab and Kaggle, it clones the repository, where it is published. (Jupyter
    and matplotlib are there already.)"""
    if repository:
        clones, otherwise = " (else clones them)", CLONE.format(repository=repository)
        return START.format(clones=clones, otherwise=otherwise)
    return START.format(clones="", otherwise=NOT_FOUND).replace("import subprocess\n", "")


def repository() -> str | None:
    """Where the repository is published: `Repository` of pyproject's `[project.urls]`."""
    pyproject = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text())
    return pyproject["project"].get("urls", {}).get("Repository")


# From a source to cells


def render(source: Path, seconds: float | None) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs: its first code cell is `start`, solutions
    are filled in from `solutions/`, and the time it took from the last build."""
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
    notebook.cells.insert(1, nbformat.v4.new_code_cell(start(repository())))
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
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        if name in [
            getattr(target, "id", getattr(target, "name", None)) for target in targets
        ]:
            return ast.get_source_segment(text, node)
    raise ValueError(f"{path.name} has no {name}.")


# Running it


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
    # Compiled programs kept from an earlier run would make the first call look short. And
    # nobody's right answers are those of the reader.
    quiet = {"JAX_ENABLE_COMPILATION_CACHE": "false", "MISTRAL_EQX_NOTEBOOK_SCORE": ""}
    env = {**os.environ, **quiet, **env}
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
            "source_sha256": fresh.source_hash(source),
            "package_sha256": fresh.package_hash(),
            "seconds": round(seconds),
            "jax": importlib.metadata.version("jax"),
            "knob_values": run_knobs(source),
        }
        path = NOTEBOOKS / f"{source.stem}.ipynb"
        picture = cover(notebook, header(source)["cover"])
        (NOTEBOOKS / "pictures").mkdir(exist_ok=True)
        (NOTEBOOKS / "pictures" / f"{number}.png").write_bytes(picture)
        if number == "00":  # The map that it shows is a picture of its own.
            import nb00

            nb00.write_map(NOTEBOOKS / "pictures" / "map.svg")
        nbformat.write(notebook, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        for final, part in partial.items():
            if part.exists():  # A notebook may ask torch for nothing.
                part.replace(final)
    finally:
        for part in partial.values():
            part.unlink(missing_ok=True)
    print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size // 1024} KB")


def run_knobs(source: Path) -> int:
    """Runs the sections of knobs with their other values, in a process of their own, and
    says how many values these were."""
    run = "import sys, knobs, pathlib; print(knobs.run(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", run, str(source)]
    ended = subprocess.run(command, cwd=NOTEBOOKS, stdout=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        raise RuntimeError(f"a knob of {source.name} does not work: its error is above")
    return int(ended.stdout)


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


# A new notebook


def new(slug: str) -> Path:
    """Begins a notebook from `template/`: its source, its solutions and its checkers."""
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", slug):
        raise ValueError(
            f"{slug!r} names no notebook: it takes two digits, an underscore and words in "
            "small letters, as in 11_speculative_decoding"
        )
    number, title = slug[:2], slug[3:].replace("_", " ").capitalize()
    if taken := [source.name for source in SOURCES if source.name[:2] == number]:
        raise ValueError(f"there is a notebook {number} already: src/{taken[0]}")
    made = {
        "source.py": NOTEBOOKS / "src" / f"{slug}.py",
        "solutions.py": NOTEBOOKS / "solutions" / f"ex{number}.py",
        "checkers.py": NOTEBOOKS / "exercises" / f"ex{number}.py",
    }
    for template, path in made.items():
        text = (NOTEBOOKS / "template" / template).read_text()
        path.write_text(text.replace("NUMBER", number).replace("TITLE", title))
    return made["source.py"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds notebooks with their outputs.")
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="01, say; all if none")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--new", metavar="NN_SLUG", help="begin a notebook: 11_slug, say")
    others.add_argument("--knobs", action="store_true", help="run every value of the knobs")
    others.add_argument(
        "--site", metavar="FOLDER", type=Path, help="web pages of the built notebooks"
    )
    options = parser.parse_args()
    known = [source.name[:2] for source in SOURCES]
    if unknown := sorted(set(options.numbers) - set(known)):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    if options.numbers and (options.new or options.site):
        parser.error("--new and --site take no numbers")
    chosen = [s for s in SOURCES if not options.numbers or s.name[:2] in options.numbers]
    if options.new:
        try:
            source = new(options.new)
        except ValueError as error:
            parser.error(str(error))
        print(f"src/{source.name} is begun: python build.py {source.name[:2]}")
    elif options.site:
        import website

        print(f"{website.make(options.site)} is the first of the pages.")
    elif options.knobs:
        for source in chosen:
            print(f"{source.name}: {run_knobs(source)} other values work")
    else:
        for source in chosen:
            build(source)
        write_table()


if __name__ == "__main__":
    main()
