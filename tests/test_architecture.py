"""The package's imports go strictly downwards, one floor at a time (and never to torch)."""

import ast
import builtins
from pathlib import Path

import pytest

import mistral_eqx


PACKAGE = Path(mistral_eqx.__file__).parent
FLOORS = {
    "config": 0,
    "kernels.replaced": 0,
    "kernels.dtypes": 0,
    "arguments": -1,
    "layers": 2,
    "sampling": 1,
    "files.weights": 0,
    "files.hub": 0,
    "files.wrappers": 1,
    "files.atomic": 0,
    "files.quantizing": 6,
    "files.adapters": 5,
    "files.adapter_export": 6,
    "files.names": 8,
    "files.adapted": 10,
    "files.heads": 11,
    "heads.classifier": 5,
    "heads.texts": 9,
    "devices.processes": 0,
    "rope": 1,
    "cache": 1,
    "devices.mesh": 1,
    "files.huggingface": 1,
    "files.config_json": 3,
    "files.gguf": 1,
    "files.llamacpp": 2,
    "files.gguf_tokenizer": 2,
    "files.gguf_export": 3,
    "files.folders": 4,
    "files.vocabulary": 5,
    "learning.tokenizers": 0,
    "files.params": 2,
    "files.released": 1,
    "attention": 3,
    "moe": 3,
    "transformer": 4,
    "devices.stages": 5,
    "devices.sharding": 6,
    "devices.fsdp": 7,
    "devices.chips": 0,
    "devices.programs": 0,
    "kernels.cpu": 4,
    "kernels.rings": 4,
    "kernels.tpu": 5,
    "kernels.cuda": 5,
    "devices.attention": 5,
    "kernels.quantized": 5,
    "kernels.experts": 8,
    "kernels.grouped": 9,
    "devices.experts": 4,
    "files.checkpoint": 9,
    "prompts": 7,
    "decoding": 8,
    "scoring": 9,
    "learning.checkpoints": 7,
    "learning.batches": 0,
    "learning.lora": 7,
    "learning.training": 8,
    "learning.fitting": 9,
    "learning.examples": 14,
    "generation": 10,
    "files.export": 10,
    "tokenizer": 8,
    "beams": 9,
    "files.inspection": 12,
    "writer": 11,
    "text": 12,
    "files.sandbox": 0,
    "templates": 11,
    "chat": 13,
    "apps.terminal": 1,
    "apps.measure": 10,
    "apps.random_weights": 9,
    "apps.compiling": 13,
    "apps.options": 14,
    "apps.main": 16,
    "__main__": 17,
}
COMMANDS = "demo interactive generate chat score evaluate convert inspect plan bench "
COMMANDS += "train finetune merge"
FLOORS |= {f"apps.{name}": 15 for name in [*COMMANDS.split(), "train_tokenizer"]}
WINGS = ("kernels", "devices", "files", "learning", "heads", "apps")
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path):
    """The names of the modules of the package, and of other packages, that are imported."""
    own, other = set(), set()
    here = path.relative_to(PACKAGE).parent.parts if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            other.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1]
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from . import cpu` names a module, and `from .cpu import project` does not.
            inside = [".".join(filter(None, (module, a.name))) for a in node.names]
            own |= {name if name in FILES else module for name in inside}
    return own, other


def test_every_module_has_a_floor():
    assert set(FILES) == set(FLOORS)


@pytest.mark.parametrize("module", FLOORS)
def test_imports_go_down(module):
    own, other = imports(FILES[module])
    assert all(FLOORS[name] < FLOORS[module] for name in own), own
    assert "mistral_eqx" not in other
    assert "one_file_ref" not in other
    # Only to read what torch wrote, and not before.
    assert "torch" not in other or module == "files.weights"


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_has_a_map(wing):
    """The docstring of a wing has a line for each of its modules, and fits a screen."""
    text = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
    modules = {path.name for path in (PACKAGE / wing).glob("*.py")} - {"__init__.py"}
    assert all(f"| `{module}` |" in text for module in modules)
    assert text.count("| `") == len(modules)
    assert len(text.splitlines()) <= 40


def test_only_devices_speaks_of_partition_specs():
    for module, path in FILES.items():
        assert module.startswith("devices.") or "PartitionSpec" not in path.read_text()


MODEL = ("config", "layers", "rope", "cache", "attention", "moe", "transformer")
FOREIGN = {
    *("platform_dependent", "default_backend", "optimization_barrier", "custom_vmap"),
    *("cpu", "gpu", "tpu", "mesh", "sharding", "Mesh", "NamedSharding", "PartitionSpec"),
    *("device_put", "devices", "shard_map", "filter_shard", "Path", "open"),
}


@pytest.mark.parametrize("module", MODEL)
def test_the_model_is_plain_mathematics(module):
    """It imports itself, the mechanism of `replaced` and checks of numbers alone, and names
    no platform, no device and no file."""
    own, _ = imports(FILES[module])
    assert own <= {*MODEL, "kernels.replaced", "arguments"}
    tree = ast.parse(FILES[module].read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & FOREIGN


def test_the_model_is_read_in_an_afternoon():
    lines = [len(FILES[module].read_text().splitlines()) for module in MODEL]
    assert sum(lines) < 1100


def test_torch_is_not_imported_with_the_package():
    tree = ast.parse((PACKAGE / "files" / "weights.py").read_text())
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("torch" in ast.unparse(node) for node in imported)


def test_one_file_port_stands_alone():
    _, other = imports(PACKAGE.parent / "one_file_ref.py")
    assert "mistral_eqx" not in other


def test_every_name_is_known():
    """The linter cannot tell: to it, the axes in jaxtyping's annotations are names."""
    for module, path in FILES.items():
        used, known = set(), {*dir(builtins), "__file__"}
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Name(id=name, ctx=ast.Load()):
                    used.add(name)
                case ast.Name(id=name) | ast.arg(arg=name) | ast.ExceptHandler(name=name):
                    known.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    known.add(name)
                case ast.Import(names=names) | ast.ImportFrom(names=names):
                    known |= {(a.asname or a.name).split(".")[0] for a in names}
                case ast.MatchAs(name=name) | ast.MatchStar(name=name):
                    known.add(name)
        assert used <= known, (module, used - known)
