"""What a built notebook was made from, as hashes: a test finds those that were built before
something changed."""

import ast
import functools
import hashlib
import io
import tokenize
from fnmatch import fnmatch
from pathlib import Path


NOTEBOOKS = Path(__file__).resolve().parent
# Parts of the package that no notebook comes to: the command line, chats, files of other
# programs and the kernels of GPUs. A change of these makes no notebook old.
APART = (
    "__main__.py", "apps/*", "chat.py", "templates.py", "files/*gguf*", "files/hub.py",
    "files/inspection.py", "files/llamacpp.py", "files/sandbox.py", "kernels/cuda.py",
)  # fmt: skip


def source_hash(source: Path) -> str:
    """Of a notebook's text, its solutions, and the code that stands behind its cells: its
    own helpers and checkers, and the helpers of all notebooks."""
    number = source.name[:2]
    digest = hashlib.sha256(source.read_bytes())
    solutions = NOTEBOOKS / "solutions" / f"ex{number}.py"
    if solutions.exists():  # 00 has no exercises.
        digest.update(solutions.read_bytes())
    own = [f"exercises/ex{number}.py", f"nb{number}.py"]
    for name in [*own, "nbtools.py", "torch_mistral.py"]:
        if (NOTEBOOKS / name).exists():
            digest.update(code_of(NOTEBOOKS / name).encode())
    return digest.hexdigest()


@functools.cache
def package_hash(root: Path = NOTEBOOKS.parent) -> str:
    """Of what the notebooks are about: the code of both ports, and the embedded model."""
    package, digest = root / "mistral_eqx", hashlib.sha256()
    for path in [root / "one_file_ref.py", *sorted(package.rglob("*.py"))]:
        name = path.relative_to(root).as_posix()
        if not any(fnmatch(name, f"mistral_eqx/{part}") for part in APART):
            digest.update(f"{name}\n{code_of(path)}\n".encode())
    for path in sorted((package / "tiny_mistral").glob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_of(path: Path) -> str:
    """The lines of a module without comments, docstrings and blank lines. A dump of its
    syntax tree would leave these out as well, but differs between versions of Python."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            for row in range(docstring.lineno - 1, docstring.end_lineno):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())
