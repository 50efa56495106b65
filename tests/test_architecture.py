"""The package's imports go strictly downwards, one floor at a time (and never to torch)."""

import ast
from pathlib import Path

import pytest

import mistral_eqx


PACKAGE = Path(mistral_eqx.__file__).parent
FLOORS = {
    "config": 0,
    "batching": 0,
    "cpu": 1,
    "layers": 2,
    "sampling": 0,
    "weights": 0,
    "rope": 1,
    "cache": 1,
    "huggingface": 1,
    "attention": 3,
    "sharding": 2,
    "moe": 3,
    "transformer": 4,
    "checkpoint": 5,
    "reading": 5,
    "training": 5,
    "generation": 6,
    "export": 6,
    "tokenizer": 6,
    "beams": 7,
    "inspection": 7,
    "text": 8,
    "chat": 9,
    "bench": 7,
    "__main__": 10,
    "__init__": 11,
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(path):
    """The names of the modules of the package, and of other packages, that are imported."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            other.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module is None:
            own |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own.add(node.module)
    return own, other


def test_every_module_has_a_floor():
    assert set(MODULES) == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own, other = imports(PACKAGE / f"{module}.py")
    assert all(FLOORS[name] < FLOORS[module] for name in own), own
    assert "mistral_eqx" not in other
    assert "one_file_ref" not in other
    # Only to read what torch wrote, and not before.
    assert "torch" not in other or module == "weights"


def test_torch_is_not_imported_with_the_package():
    tree = ast.parse((PACKAGE / "weights.py").read_text())
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("torch" in ast.unparse(node) for node in imported)


def test_one_file_port_stands_alone():
    _, other = imports(PACKAGE.parent / "one_file_ref.py")
    assert "mistral_eqx" not in other
