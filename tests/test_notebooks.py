"""The notebooks: each runs in a fresh kernel without a network and finds what it found when
it was built; its sources, its outputs, its exercises and its torch are held to account."""

import ast
import importlib
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

import mistral_eqx as mx


NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS / "solutions")]

import build  # noqa: E402
import nbtools  # noqa: E402
from exercises import ex03  # noqa: E402


SOURCES = {source.name[:2]: source for source in build.SOURCES}
NUMBERS = sorted(SOURCES)


@pytest.fixture(params=NUMBERS)
def number(request):
    return request.param


@pytest.fixture
def shipped(number):
    return nbformat.read(NOTEBOOKS / f"{SOURCES[number].stem}.ipynb", as_version=4)


def outputs(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", [])]


# Running them


# Put before everything else on the kernel's path: without a network, and without torch
# where that is asked for.
SITECUSTOMIZE = """
import socket, sys

reach = socket.socket.connect

def connect(self, address):
    local = ("127.0.0.1", "::1", "localhost")
    if isinstance(address, tuple) and address[0] not in local:
        raise OSError(f"a notebook asked for {address}, and must run without a network")
    return reach(self, address)

socket.socket.connect = connect

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize(
    ("number", "absent"),
    [(n, ()) for n in NUMBERS] + [("01", ("torch", "transformers"))],
)
def test_runs_and_finds_what_it_found(number, absent, tmp_path, capsys):
    custom = f"ABSENT = {absent!r}\n{SITECUSTOMIZE}"
    (tmp_path / "sitecustomize.py").write_text(custom)
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
    for now, then in zip(found, recorded):
        assert consistent(now, then), (now, then)
    assert not [o.text for o in outputs(notebook) if o.get("name") == "stderr"]

    with np.load(NOTEBOOKS / f"goldens/{number}.npz") as file:
        golden = dict(file)
    without = absent or importlib.util.find_spec("torch") is None
    if without:
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


def consistent(now, then):
    """The bounds hold, for the notebook asserted them. Rounding, which they are mostly of,
    is of the same order on every machine."""
    kind, bound, value = then["kind"], then["bound"], then["value"]
    if kind not in ("lt", "gt"):
        return (now["kind"], now["bound"]) == (kind, bound)
    # Some bounds are measured, too.
    if now["kind"] != kind or abs(now["bound"] - bound) > 0.9 * abs(bound):
        return False
    if kind == "lt":
        return now["value"] <= value + 9 * abs(value) + 1e-4
    return now["value"] >= value - 0.9 * abs(value) - 1e-4


def test_bounds_are_compared():
    then = {"kind": "lt", "bound": 1.0, "value": 0.01}
    assert consistent(then, then)
    assert not consistent({**then, "value": 0.5}, then)
    assert not consistent({**then, "bound": 2.0}, then)
    negative = {"kind": "gt", "bound": -0.3, "value": -0.28}
    assert consistent(negative, negative)
    assert not consistent({**negative, "value": -0.6}, negative)


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
    fresh = build.render(source, built.seconds)
    told = "run `python notebooks/build.py`: the source is newer than the notebook"
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells(fresh) == cells(shipped), told
    assert built.source_sha256 == build.source_hash(source), told


def test_outputs_are_clean(number, shipped):
    path = NOTEBOOKS / f"{SOURCES[number].stem}.ipynb"
    assert path.stat().st_size <= 600 * 1024
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
    code = [c.source for c in shipped.cells if c.cell_type == "code"]
    prose = " ".join(c.source for c in shipped.cells if c.cell_type == "markdown")
    lines = [len(source.strip().splitlines()) for source in code]
    assert max(lines) <= 40
    assert statistics.median(lines) <= 10
    assert 3 <= len(prose.split()) / sum(lines) <= 15
    pictures = [o for o in outputs(shipped) if "image/png" in o.get("data", {})]
    captions = [o for o in outputs(shipped) if "What to see" in str(o.get("data", {}))]
    assert len(pictures) == len(captions) >= 3
    assert prose.count("**Takeaway.**") + sum("**Takeaway.**" in c for c in code) >= 4
    assert (
        sum("**Predict.**" in c.source or "**Predict**" in c.source for c in shipped.cells)
        >= 2
    )
    undone = [o for o in outputs(shipped) if "not done yet" in o.get("text", "")]
    assert len(undone) == prose.count("<summary>Solution</summary>") >= 3
    assert len(json.loads((NOTEBOOKS / f"results/{number}.json").read_text())) >= 8


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


def test_shown_code_is_the_code(shipped):
    for output in outputs(shipped):
        place = output.get("metadata", {}).get("source")
        if place is not None:
            file, name = place.split(" · ")
            thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            for part in name.split("."):
                thing = getattr(thing, part)
            told = (
                "run `python notebooks/build.py`: the code shown is not the code any more"
            )
            assert nbtools.source_of(thing)[1] in output.data["text/markdown"], told


def test_readme_links_to_everything():
    readme = (NOTEBOOKS / "README.md").read_text()
    for number, source in SOURCES.items():
        assert f"({source.stem}.ipynb)" in readme
        assert f"pictures/{number}.png" in readme
    documents = [readme, *(source.read_text() for source in SOURCES.values())]
    for link in re.findall(r'(?:\]\(|src=")([^)":#]+)[)"#]', "\n".join(documents)):
        assert (NOTEBOOKS / link).exists(), link


# Exercises


def answers():
    for number in NUMBERS:
        module = importlib.import_module(f"ex{number}")
        for name in sorted(vars(module)):
            if name.endswith("_wrong"):
                exercise = name.removesuffix("_wrong")
                right, wrong = getattr(module, exercise), getattr(module, name)
                yield pytest.param(
                    number, exercise, right, wrong, id=f"{number}-{exercise}"
                )


@pytest.mark.parametrize(("number", "exercise", "right", "wrong"), [*answers()])
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
    assert "not done yet" in capsys.readouterr().out
    assert check(right) is True
    assert "right" in capsys.readouterr().out
    assert check(wrong) is False
    assert "not right yet" in capsys.readouterr().out


def test_broken_answer_is_told():
    def broken(n, window):
        raise ZeroDivisionError("mine")

    assert ex03.check_band(broken) is False


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
