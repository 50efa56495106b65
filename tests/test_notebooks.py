"""The notebooks: each runs in a fresh kernel without a network and finds what it found when
it was built; its sources, its outputs, its exercises and its torch are held to account."""

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest

import mistral_eqx as mx


NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS / "solutions")]

import build  # noqa: E402
import exercises  # noqa: E402
import fresh  # noqa: E402
import knobs  # noqa: E402
import nb00  # noqa: E402
import nbtools  # noqa: E402
from exercises import ex03  # noqa: E402


SOURCES = {source.name[:2]: source for source in build.SOURCES}
NUMBERS = sorted(SOURCES)


@pytest.fixture(autouse=True)
def no_score(monkeypatch):
    """Right answers of the tests are not the reader's."""
    monkeypatch.setenv(exercises.SCORE, "")


@pytest.fixture(params=NUMBERS)
def number(request):
    return request.param


@pytest.fixture
def shipped(number):
    return nbformat.read(NOTEBOOKS / f"{SOURCES[number].stem}.ipynb", as_version=4)


def outputs(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", [])]


def code_cells(notebook):
    """Without the first, which all notebooks have in common."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"][1:]


# Running them


# Put before everything else on the kernel's path: without a network, and with torch for the
# oracle alone. Whoever has no torch gets what it answered at the build.
SITECUSTOMIZE = """
import builtins, re, socket, sys

reach = socket.socket.connect

def connect(self, address):
    local = ("127.0.0.1", "::1", "localhost")
    if isinstance(address, tuple) and address[0] not in local:
        raise OSError(f"a notebook asked for {address}, and must run without a network")
    return reach(self, address)

socket.socket.connect = connect

bring = builtins.__import__

def asked_by_oracle():
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("nbtools.py"):
        frame = frame.f_back
    return frame is not None

def import_(name, globals=None, *rest, **more):
    here = (globals or {}).get("__name__", "")
    torch = name.split(".")[0] in ("torch", "transformers")
    if torch and re.match("__main__$|nb|ex", here) and not asked_by_oracle():
        raise ModuleNotFoundError(f"No module named {name!r} for {here}", name=name)
    return bring(name, globals, *rest, **more)

builtins.__import__ = import_
"""


def test_runs_and_finds_what_it_found(number, tmp_path, capsys):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    results, goldens = tmp_path / "results.json", tmp_path / "goldens.npz"
    env = {
        "PYTHONPATH": f"{tmp_path}:{NOTEBOOKS.parent}",
        "MISTRAL_EQX_NOTEBOOK_RESULTS": str(results),
        "MISTRAL_EQX_NOTEBOOK_GOLDENS": str(goldens),
    }
    notebook = build.render(SOURCES[number], None)
    # Machines are slow and busy at times: a hang is found, slowness is not a failure.
    notebook, seconds = build.execute(notebook, timeout=600, env=env)

    recorded = json.loads((NOTEBOOKS / f"results/{number}.json").read_text())
    found = json.loads(results.read_text())
    assert [check["name"] for check in found] == [check["name"] for check in recorded]
    built = nbformat.read(NOTEBOOKS / f"{SOURCES[number].stem}.ipynb", as_version=4)
    same_jax = built.metadata.mistral_eqx.jax == jax.__version__
    for now, then in zip(found, recorded):
        assert consistent(now, then, same_jax), (now, then)
    assert not [o.text for o in outputs(notebook) if o.get("name") == "stderr"]

    golden = {}
    if (path := NOTEBOOKS / f"goldens/{number}.npz").exists():
        with np.load(path) as file:
            golden = dict(file)
    without = importlib.util.find_spec("torch") is None
    if without or not golden:
        assert not goldens.exists()
    else:
        with np.load(goldens) as file:
            live = dict(file)
        assert live.keys() == golden.keys()
        for name in live:
            # Times are nobody's, and rounding in bfloat16 is another on another CPU.
            if not name.startswith("seconds") and golden[name].dtype.kind == "f":
                scale = np.abs(golden[name]).max()
                assert np.abs(live[name] - golden[name]).max() <= 0.05 * scale + 1e-3, name
    torch = "without" if without else "with"
    with capsys.disabled():
        print(
            f"\n{number} {torch} torch: {len(found)} checks, {seconds:.0f} s of CPU", end=""
        )


def test_torch_is_for_the_oracle_alone(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    ask = "import nbtools as nb; answer = nb.Oracle('01')('logits', lambda twin: look())"
    for code, works in (
        ("import torch", False),
        (f"{ask}; import torch", False),
        (ask, True),
    ):
        look = "def look():\n    import torch\n    return torch.ones(2)\n"
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{NOTEBOOKS}:{NOTEBOOKS.parent}"}
        run = [sys.executable, "-c", look + code]
        ended = subprocess.run(run, env=env, capture_output=True, text=True)
        assert (ended.returncode == 0) == works, ended.stderr
        assert works or "No module named 'torch' for __main__" in ended.stderr


def test_without_torch_it_has_answered(number, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = NOTEBOOKS / f"goldens/{number}.npz"
    if path.exists():
        oracle = nbtools.Oracle(number)
        with np.load(path) as file:
            for name in file:
                np.testing.assert_array_equal(oracle(name, fails), file[name])


COUNTS = re.compile("bytes|equations|parameters|programs|messages|all-[a-z]+s")


def consistent(now, then, same_jax):
    """The bounds hold, for the notebook asserted them. Rounding, which they are mostly of,
    is of the same order on every machine. What JAX counts is the same for the same JAX."""
    kind, bound, value = then["kind"], then["bound"], then["value"]
    if same_jax and isinstance(value, int) and COUNTS.search(then["name"]):
        return now == then
    if kind not in ("lt", "gt"):
        return (now["kind"], now["bound"]) == (kind, bound)
    # Some bounds are measured, too.
    if now["kind"] != kind or abs(now["bound"] - bound) > 0.9 * abs(bound):
        return False
    if kind == "lt":
        return now["value"] <= value + 9 * abs(value) + 1e-4
    return now["value"] >= value - 0.9 * abs(value) - 1e-4


def test_bounds_are_compared():
    then = {"name": "a gap", "kind": "lt", "bound": 1.0, "value": 0.01}
    assert consistent(then, then, True)
    assert not consistent({**then, "value": 0.5}, then, True)
    assert not consistent({**then, "bound": 2.0}, then, True)
    negative = {"name": "a gap", "kind": "gt", "bound": -0.3, "value": -0.28}
    assert consistent(negative, negative, True)
    assert not consistent({**negative, "value": -0.6}, negative, True)
    counted = {"name": "messages", "kind": "gt", "bound": 5, "value": 20}
    assert not consistent({**counted, "value": 21}, counted, True)
    assert consistent({**counted, "value": 21}, counted, False)


@pytest.mark.parametrize("sign", ["SIGINT", "SIGTERM"])
def test_interrupted_run_says_so(sign):
    cell = f"import os, signal, time\nos.kill(os.getppid(), signal.{sign})\ntime.sleep(120)"
    run = (
        "import build, signal, nbformat.v4 as v4\n"
        # What is started in the background may have been told to ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"notebook = v4.new_notebook(cells=[v4.new_code_cell({cell!r})])\n"
        "build.execute(notebook, timeout=120, env={})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", run], cwd=NOTEBOOKS, capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert ended.stderr.strip().endswith("KeyboardInterrupt: while a notebook ran")


def test_failing_check_fails_the_notebook():
    with pytest.raises(AssertionError, match="2 < 1"):
        nbtools.check("a lie", 2, lt=1)


# What is shipped


def test_cells_are_the_source(number, shipped):
    built = shipped.metadata.mistral_eqx
    source = SOURCES[number]
    rendered = build.render(source, built.seconds)
    told = f"python notebooks/build.py {number}: the source is newer than the notebook"
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells(rendered) == cells(shipped), told
    assert built.source_sha256 == fresh.source_hash(source), told


def test_notebooks_are_of_this_package():
    stale = []
    for number, source in SOURCES.items():
        notebook = nbformat.read(NOTEBOOKS / f"{source.stem}.ipynb", as_version=4)
        if notebook.metadata.mistral_eqx.get("package_sha256") != fresh.package_hash():
            stale.append(number)
    assert not stale, (
        f"notebooks {', '.join(stale)} were built with another package: "
        f"python notebooks/build.py {' '.join(stale)}"
    )


def test_wording_makes_no_notebook_stale(tmp_path):
    def hashed(module, code, apart="pass"):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (root / "mistral_eqx" / "apps").mkdir(parents=True)
        (root / "mistral_eqx" / "tiny_mistral").mkdir()
        (root / "one_file_ref.py").write_text("pass")
        (root / "mistral_eqx" / module).write_text(code)
        (root / "mistral_eqx" / "apps" / "main.py").write_text(apart)
        return fresh.package_hash(root)

    code = hashed("rope.py", "def f():\n    return '# no comment'\n")
    worded = (
        'def f():  # a comment\n    """A docstring."""\n\n    return \'# no comment\'\n'
    )
    assert hashed("rope.py", worded) == code
    assert hashed("rope.py", worded, apart="import sys") == code
    assert hashed("rope.py", worded.replace("no", "another")) != code
    assert hashed("ropes.py", worded) != code


def test_outputs_are_clean(number, shipped):
    path = NOTEBOOKS / f"{SOURCES[number].stem}.ipynb"
    assert path.stat().st_size <= 900 * 1024
    code = [cell for cell in shipped.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    for output in outputs(shipped):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr)/", text)
    assert shipped.metadata.mistral_eqx.seconds <= build.header(SOURCES[number])["budget"]


def test_is_a_lesson(number, shipped):
    rules = door(shipped) if number == "00" else standard(shipped)
    assert not [rule for rule, met in rules.items() if not met]


def standard(notebook):
    """The rules for a notebook, and whether it meets them. Prose is text between cells,
    without the code in it; what cells say is not counted."""
    prose = prose_of(notebook)
    undone = [o for o in outputs(notebook) if "not done yet" in o.get("text", "")]
    solutions = prose.count("<summary>Solution</summary>")
    words = len(re.sub(r"```.*?```", "", prose, flags=re.S).split())
    code = code_cells(notebook)
    lines = [len(cell.source.strip().splitlines()) for cell in code]
    pictures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    captions = [o for o in outputs(notebook) if "What to see" in str(o.get("data", {}))]
    in_a_row = "".join(cell.cell_type[0] for cell in notebook.cells[2:])
    everything = "\n".join(cell.source for cell in notebook.cells)
    before_figure = 0
    for cell in code:
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            break
        # Neither empty lines nor imports count.
        before_figure += len(re.findall(r"^(?!import |from ).*\S", cell.source, re.M))
    return {
        "1,500 to 3,000 words": 1500 <= words <= 3000,
        "4 words a line": words >= 4 * sum(lines),
        "a median cell of 8 lines": statistics.median(lines) <= 8,
        "no cell over 40 lines": max(lines) <= 40,
        "3 code cells in a row": "cccc" not in in_a_row,
        "a figure within 40 lines": before_figure <= 40,
        "3 figures, each with its caption": len(pictures) == len(captions) >= 3,
        "4 takeaways": everything.count("**Takeaway.**") >= 4,
        "2 predictions": len(re.findall(r"\*\*Predict\.?\*\*", everything)) >= 2,
        "8 checks": sum(source.count("nb.check(") for source in everything.splitlines())
        >= 8,
        "3 exercises, none done": len(undone) == solutions >= 3,
        "a knob": "nb.knob(" in everything,
    }


def prose_of(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def door(notebook):
    """The rules for 00, which is no lesson: whoever opens it has two minutes. From its map,
    from the table below the map and from its paths, links lead to every notebook."""
    table, paths = prose_of(notebook).split("## Where to go next")
    paths, targets = paths.split("\n[01]: ")
    (picture,) = [
        o.data["image/svg+xml"]
        for o in outputs(notebook)
        if "image/svg+xml" in o.get("data", {})
    ]
    words = re.sub(r"^\|.*", "", f"{table} {paths}", flags=re.M).split()
    lines = "\n".join(cell.source for cell in code_cells(notebook)).splitlines()
    pictures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    captions = [o for o in outputs(notebook) if "What to see" in str(o.get("data", {}))]
    others = {number: SOURCES[number].stem for number in NUMBERS if number != "00"}
    linked = all(
        f"[{number}]: {name}.ipynb" in f"[01]: {targets}"
        and f'href="{name}.ipynb"' in picture
        and f"[{number}]" in table
        and f"[{number}]" in paths
        for number, name in others.items()
    )
    return {
        "25 lines of code": sum(bool(line.strip()) for line in lines) <= 25,
        "400 to 900 words": 400 <= len(words) <= 900,
        "a figure with its caption": len(pictures) == len(captions) == 1,
        "three links to every notebook": linked,
        "2 to 4 checks": 2 <= "\n".join(lines).count("nb.check(") <= 4,
        "a prediction": "**Predict.**" in table,
        "a knob": "nb.knob(" in "\n".join(lines),
    }


def test_map_is_of_this_model():
    """The picture is what would be drawn now, and the table below it has its links."""
    config = mx.load_model(mx.text.TINY_MISTRAL).config
    told = "python notebooks/build.py 00: the map is not of this model any more"
    picture = (NOTEBOOKS / "pictures" / "map.svg").read_text(encoding="utf-8")
    assert picture == nb00.draw_map(config, up="../"), told
    shown = SOURCES["00"].read_text(encoding="utf-8").splitlines()
    for row in [*nb00.links(config), *nb00.targets(config)]:
        assert f"# {row}" in shown, row
    links = re.findall('href="(.+?)"', picture)
    assert len(links) == 2 * len(nb00.links(config)) + 2  # There are two norms in a block.
    assert all((NOTEBOOKS / "pictures" / link).exists() for link in links)


def test_museum_breaks_one_line_each():
    lines = nb00.PORT.read_text(encoding="utf-8").splitlines()
    for name in nb00.BUGS:
        broken = nb00.program(name).splitlines()
        assert sum(a != b for a, b in zip(lines, broken, strict=True)) == 1, name
    (knob,) = [
        call
        for cell in build.render(SOURCES["00"], None).cells
        if cell.cell_type == "code"
        for call in knobs.knobs_of(cell.source)
    ]
    assert ast.literal_eval(knob.keywords[0].value) == tuple(nb00.BUGS)


def test_copies_nothing(number):
    tree = ast.parse(SOURCES[number].read_text())
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own = set()
    for path in [
        *Path(mx.__file__).parent.glob("*.py"),
        NOTEBOOKS.parent / "one_file_ref.py",
    ]:
        nodes = ast.parse(path.read_text()).body
        own |= {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert not (classes | functions) & (own - {"loss"})
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            assert not any(alias.name.startswith("_") for alias in node.names)


def shown_code(number, notebook):
    """The outputs that show code of the package. The first two notebooks have none."""
    found = [o for o in outputs(notebook) if "source" in o.get("metadata", {})]
    assert (len(found) > 0) == (number not in ("00", "01"))
    return found


def test_shown_code_is_the_code(number, shipped):
    for output in shown_code(number, shipped):
        file, name = output.metadata["source"].split(" · ")
        thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)
        told = "run `python notebooks/build.py`: the code shown is not the code any more"
        assert nbtools.source_of(thing)[1] in output.data["text/markdown"], told


def test_readme_links_to_everything():
    readme = (NOTEBOOKS / "README.md").read_text()
    for number, source in SOURCES.items():
        assert f"({source.stem}.ipynb)" in readme
        assert f"pictures/{number}.png" in readme
    rendered = (build.render(source, None) for source in SOURCES.values())
    documents = [readme, *map(prose_of, rendered)]
    for link in re.findall(r'(?:\]\(|src=")([^)":#]+)[)"#]', "\n".join(documents)):
        assert (NOTEBOOKS / link).exists(), link


# The first cell


def run_start(monkeypatch, folder, package, repository=None):
    """Runs the first cell in a folder, and says what is first on the path."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    exec(build.start(repository), {})
    return sys.path


def test_start_finds_the_helpers(tmp_path, monkeypatch):
    here = [str(NOTEBOOKS), str(NOTEBOOKS.parent)]
    for folder in (NOTEBOOKS, NOTEBOOKS / "src", NOTEBOOKS.parent):
        assert run_start(monkeypatch, folder, None) == here
    package = importlib.machinery.ModuleSpec("mistral_eqx", None, origin=mx.__file__)
    assert run_start(monkeypatch, tmp_path, package) == here
    with pytest.raises(ModuleNotFoundError, match="Clone the repository"):
        run_start(monkeypatch, tmp_path, None)


def test_start_clones_where_there_is_a_repository(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    url = "https://example.org/mistral.git"
    clone = tmp_path / "repository"
    paths = run_start(monkeypatch, tmp_path, None, url)
    assert paths == [str(clone / "notebooks"), str(clone)]
    assert ran[0][:2] == ["git", "clone"] and ran[0][-2:] == [url, str(clone)]
    assert ran[1][1:4] == ["-m", "pip", "install"] and ran[1][-1] == f"{clone}[train]"
    # Run again, it finds the clone.
    (clone / "notebooks").mkdir(parents=True)
    (clone / "notebooks" / "nbtools.py").touch()
    assert run_start(monkeypatch, tmp_path, None, url) == paths and len(ran) == 2


# Knobs


def test_knobs_work(number, shipped):
    """The build has run every value of every knob, with this very source and package. With
    another JAX they may do something else, so they are run again."""
    built = shipped.metadata.mistral_eqx
    _, sections = knobs.split(build.render(SOURCES[number], None))
    assert len([*knobs.turns(sections)]) == built.knob_values
    if built.jax != jax.__version__:
        assert build.run_knobs(SOURCES[number]) == built.knob_values


def test_broken_knob_is_told(tmp_path):
    source = tmp_path / "03_knob.py"
    cells = "# %%\nimport nbtools as nb\n\n# %% [markdown]\n# ## Part\n\n"
    cells += "# %%\nn = nb.knob(2, of=(1, 2))\nnb.check('n', n, eq=2)\n"
    source.write_text("# %% [markdown]\n# # Title\n\n" + cells)
    run = f"import knobs, pathlib; knobs.run(pathlib.Path({str(source)!r}))"
    ended = subprocess.run(
        [sys.executable, "-c", run], cwd=NOTEBOOKS, capture_output=True, text=True
    )
    assert "with the knob at 1, the section 'Part' fails" in ended.stderr
    with pytest.raises(ValueError, match="cannot be 3: choose one of 1, 2"):
        nbtools.knob(3, of=(1, 2))


# A new notebook, and the site


def test_new_notebook_builds(tmp_path):
    root = NOTEBOOKS.parent
    for name in ("mistral_eqx", "notebooks"):
        apart = shutil.ignore_patterns("*.ipynb", "[0-9][0-9]_*.py", "__pycache__")
        shutil.copytree(root / name, tmp_path / name, ignore=apart)
    for name in ("one_file_ref.py", "pyproject.toml"):
        shutil.copy(root / name, tmp_path / name)
    command = [sys.executable, "build.py"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    kind = dict(cwd=tmp_path / "notebooks", env=env, capture_output=True, text=True)
    ended = subprocess.run([*command, "--new", "11_a_new_one"], **kind)
    assert ended.stdout == "src/11_a_new_one.py is begun: python build.py 11\n", (
        ended.stderr
    )
    again = subprocess.run([*command, "--new", "11_another"], **kind)
    assert "there is a notebook 11 already: src/11_a_new_one.py" in again.stderr
    bad = subprocess.run([*command, "--new", "Another"], **kind)
    assert "'Another' names no notebook" in bad.stderr

    built = subprocess.run([*command, "11"], **kind)
    assert built.returncode == 0, built.stderr
    notebook = nbformat.read(tmp_path / "notebooks" / "11_a_new_one.ipynb", as_version=4)
    assert notebook.cells[0].source.startswith("# A new one\n")
    assert notebook.metadata.mistral_eqx.knob_values == 2
    met = [rule for rule, met in standard(notebook).items() if met]
    assert {"3 code cells in a row", "a figure within 40 lines", "a knob"} <= set(met)
    check = (
        "import ex11\nfrom exercises.ex11 import check_turn_11 as check\n"
        "print([check(getattr(ex11, 'turn_11' + n)) for n in ('', *ENDS)])"
    ).replace("ENDS", str(("_wrong", "_wrong_2", "_wrong_3")))
    env["PYTHONPATH"] += f":{tmp_path / 'notebooks' / 'solutions'}"
    checked = subprocess.run([sys.executable, "-c", check], **kind).stdout.splitlines()
    assert checked.pop() == "[True, False, False, False]"
    assert len(set(checked)) == 4


def test_shown_code_is_monospaced_and_coloured_everywhere(number, shipped):
    for output in shown_code(number, shipped):
        page = output.data["text/html"]
        assert "<pre style=" in page and "font-family:monospace" in page
        assert "color:#" in page


def test_site_needs_no_network():
    pytest.importorskip("nbconvert")
    import website

    notebook = nbformat.read(NOTEBOOKS / f"{SOURCES['03'].stem}.ipynb", as_version=4)
    page = website.page(notebook, before=["index"], after=[SOURCES["04"].stem])
    assert not re.search(r"<script|<link|<iframe|@import", page)
    assert not re.search(r'src="(?!data:image/png|pictures/)', page)
    assert 'href="04_the_rolling_buffer.html"' in page and ".ipynb" not in page
    assert "font-family:monospace" in page and "<details>" in page
    assert f"<title>{notebook.cells[0].source.splitlines()[0][2:]}</title>" in page


def test_site_is_read_on_a_telephone_and_without_eyes():
    pytest.importorskip("nbconvert")
    import website

    notebook = nbformat.read(NOTEBOOKS / f"{SOURCES['03'].stem}.ipynb", as_version=4)
    page = website.page(notebook, before=[], after=[])
    assert "No description has been provided" not in page
    assert page.count('<img alt="') == page.count("What to see: ") + page.count(
        'src="pictures/'
    )
    links = re.findall(r'<li><a href="#([^"]+)">', page)
    assert len(links) == len(re.findall("<h2 ", page)) > 3
    assert all(page.count(f'id="{link}"') == 1 for link in links)
    # Numbers are not broken at a minus sign, and sentences not squeezed into single words.
    assert "<td>1e-05</td>" not in page and '<td class="short">' in page
    assert "max-width: 100%" in page and "overflow-x: auto" in page


def test_pictures_of_the_site_are_there():
    named = [
        name
        for number in NUMBERS
        for cell in build.render(SOURCES[number], None).cells
        for name in re.findall(r"\]\((pictures/[^)]+)\)", cell.source)
    ]
    assert named
    for name in named:
        assert (NOTEBOOKS / name).exists(), name
        assert (NOTEBOOKS / name).stat().st_size < 1e6


def test_no_notebook_needs_mathjax(number):
    """Which the pages do not have."""
    for cell in build.render(SOURCES[number], None).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"\$[^$]+\$|\\\(|\\\[", cell.source)


# Exercises


def answers():
    for number in NUMBERS:
        if not (NOTEBOOKS / "exercises" / f"ex{number}.py").exists():
            continue  # 00 has none.
        module = importlib.import_module(f"ex{number}")
        for checker in sorted(vars(importlib.import_module(f"exercises.ex{number}"))):
            if checker.startswith("check_") and checker != "check_cases":
                exercise = checker.removeprefix("check_")
                wrong = [f"{exercise}_wrong{end}" for end in ("", "_2", "_3")]
                wrong = [getattr(module, name) for name in wrong]
                yield pytest.param(
                    number, exercise, getattr(module, exercise), wrong,
                    id=f"{number}-{exercise}",
                )  # fmt: skip


ANSWERS = [*answers()]


@pytest.mark.parametrize(("number", "exercise", "right", "wrong"), ANSWERS)
def test_exercise(number, exercise, right, wrong, capsys):
    checkers = importlib.import_module(f"exercises.ex{number}")
    check = getattr(checkers, f"check_{exercise}")
    if callable(right):
        stub = lambda *_: NotImplemented
    elif isinstance(right, dict):
        stub = dict.fromkeys(right, NotImplemented)
    else:
        stub = NotImplemented
    assert check(stub) is None
    assert capsys.readouterr().out == f"{exercise}: not done yet.\n"
    assert check(right) is True
    assert capsys.readouterr().out.startswith(f"{exercise}: right.")
    assert [check(answer) for answer in wrong] == [False] * 3
    told = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{exercise}: not right yet. ") for line in told)
    assert len(set(told)) == len(told) == 3, told


def fails(*_):
    raise ZeroDivisionError("mine")


NOTHING = [None, -1.5, "x", [], {}, (1, 2)]


@pytest.mark.parametrize(("number", "exercise", "right", "wrong"), ANSWERS)
def test_nonsense_is_not_right(number, exercise, right, wrong):
    check = getattr(importlib.import_module(f"exercises.ex{number}"), f"check_{exercise}")
    answers = [fails, *NOTHING]
    if callable(right):
        answers = [None, fails, *(lambda *_, it=it: it for it in NOTHING)]
    assert not any(check(answer) for answer in answers)


@pytest.mark.parametrize(("number", "exercise", "right", "wrong"), ANSWERS)
def test_answer_stands_in_no_cell_above(number, exercise, right, wrong):
    answer = expression(NOTEBOOKS / "solutions" / f"ex{number}.py", exercise)
    given = set()
    for cell in build.render(SOURCES[number], None).cells:
        if cell.cell_type == "code":
            nodes = ast.walk(ast.parse(cell.source))
            given |= {ast.unparse(node) for node in nodes if isinstance(node, ast.expr)}
        elif answer and "<summary>Solution</summary>" in cell.source:
            if re.search(rf"^(def {exercise}\(|{exercise} = )", cell.source, re.M):
                break
    assert answer not in given


def expression(path, name):
    """What a solution returns at last, or is, if that is more than a name or a constant."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            value = node.value
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            value = [n for n in ast.walk(node) if isinstance(n, ast.Return)][-1].value
        else:
            continue
        return None if isinstance(value, ast.Name | ast.Constant) else ast.unparse(value)


def test_score(tmp_path, monkeypatch):
    names = exercises.of_the_series()
    assert len(names) == len(ANSWERS), "two exercises have the same name"
    monkeypatch.setattr(exercises, "_tried", {})
    for name in ("band", "layers_needed", "scores"):
        exercises.todo(name)
    exercises.verdict("band", None)
    exercises.verdict("scores", "It is wrong.")
    assert exercises.score() == "Exercises: 1 of 3 right here."
    # A reader's answers are remembered.
    monkeypatch.setenv(exercises.SCORE, str(tmp_path / "score.json"))
    assert exercises.score().endswith(
        f"1 of 3 right here, 0 of {len(names)} in the series."
    )
    exercises.verdict("band", None)
    exercises.verdict("scores", None)
    monkeypatch.setattr(exercises, "_tried", {"slot": False})
    assert exercises.score().endswith(
        f"0 of 1 right here, 2 of {len(names)} in the series."
    )
    (tmp_path / "score.json").write_text("{broken")
    assert exercises.score().endswith(f"0 of {len(names)} in the series.")


def test_broken_answer_is_told(capsys):
    assert ex03.check_band(fails) is False
    assert "It raised ZeroDivisionError: mine" in capsys.readouterr().out


# The torch of the notebooks, against an outside authority


def test_torch_twin_is_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch_mistral

    params = dict(dim=64, n_layers=2, head_dim=16, hidden_dim=96, n_heads=4, n_kv_heads=2)
    params |= dict(norm_eps=1e-5, vocab_size=128, rope_theta=1e4, sliding_window=8)
    torch.manual_seed(0)
    twin = torch_mistral.Transformer(params).eval()
    config = transformers.MistralConfig(
        hidden_size=64, num_hidden_layers=2, head_dim=16, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, sliding_window=8,
        attn_implementation="eager",
    )  # fmt: skip
    authority = transformers.MistralForCausalLM(config).eval()
    names = {
        "tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm",
        "layers": "model.layers", "attention.w": "self_attn.",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    }  # fmt: skip
    state = {}
    for name, weight in twin.state_dict().items():
        for heads, which in ((4, "wq"), (2, "wk")):
            if f"attention.{which}." in name:
                weight = weight.view(heads, 8, 2, 64).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = re.sub(
                rf"(^|\.){re.escape(ours)}(?=\.|[qkvo]\.)", rf"\g<1>{theirs}", name
            )
        state[re.sub(r"self_attn\.([qkvo])\.", r"self_attn.\1_proj.", name)] = weight
    authority.load_state_dict(state)
    tokens = torch.randint(128, (2, 24))
    with torch.no_grad():
        expected = authority(tokens).logits
        found = twin(tokens)
        cache = twin.empty_cache(2)
        stepped = [twin(tokens[:, [t]], t, cache) for t in range(24)]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(stepped, 1), expected, atol=1e-5, rtol=1e-4)
