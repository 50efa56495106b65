"""The helpers of the notebooks: everything hidden that they use is in this file.

`check` holds a number to a bound and records it, `guess` puts a prediction next to what was
measured, `show_source` and `show_diff` print the code that runs, `timeit` waits for the
device, and `Oracle` answers for PyTorch.
"""

import ast
import dataclasses
import difflib
import html
import inspect
import io
import json
import lzma
import operator
import os
import platform
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from PIL import Image
from pygments.lexers import get_lexer_by_name
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES

import exercises
import mistral_eqx as mx


NOTEBOOKS = Path(__file__).resolve().parent
MODEL = Path(mx.__file__).parent / "tiny_mistral"
# Where to write the checks and the answers of torch; only the build and the tests do.
RESULTS = "MISTRAL_EQX_NOTEBOOK_RESULTS"
GOLDENS = "MISTRAL_EQX_NOTEBOOK_GOLDENS"

plt.rcParams.update(
    {
        "figure.figsize": (7, 3.6),
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.25,
        "image.cmap": "viridis",
        "legend.frameon": False,
        # Dark to light and with a dash and a marker each: readable without colour.
        "axes.prop_cycle": plt.cycler(
            color=["#000000", "#31688e", "#b5367a", "#1f9e89", "#e07b00", "#8a8a8a"],
            linestyle=["-", "--", "-.", ":", "-", "--"],
            marker=["o", "s", "^", "D", "v", "x"],
        ),
    }
)


def versions() -> None:
    """Prints what this notebook ran on."""
    import equinox

    try:
        import torch

        torch_version = torch.__version__
    except ImportError:
        torch_version = "absent: its answers come from a file"
    say(
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"equinox {equinox.__version__}, torch {torch_version}; "
        f"{jax.default_backend()}, {os.cpu_count()} cores."
    )


def say(text: str) -> None:
    """Shows a sentence whose numbers come from the cell it stands in."""
    display(Markdown(textwrap.dedent(text)))


def caption(text: str) -> None:
    """Shows the open figure, and below it what there is to see."""
    plt.show()
    say(f"*What to see: {text}*")


def table(header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Shows a table; floats with three digits."""
    say(_table(header, rows))


def _table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join(lines)


def _short(value) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.3g}"
    return str(value)


def _cell(value) -> str:
    # A bar would end the cell.
    return _short(value).replace("|", "&#124;")


_checks: list[dict] = []


def check(
    name: str,
    value,
    *,
    lt: float | None = None,
    gt: float | None = None,
    eq=None,
    near: float | None = None,
    rtol: float = 0.02,
) -> None:
    """Asserts that a value is below, above, equal to or near a bound, prints it with a
    tick, and records it."""
    value = value.item() if hasattr(value, "item") else value
    bounds = {"lt": lt, "gt": gt, "eq": eq, "near": near}
    ((kind, bound),) = ((k, b) for k, b in bounds.items() if b is not None)
    passed = {
        "lt": lambda: value < bound,
        "gt": lambda: value > bound,
        "eq": lambda: value == bound,
        "near": lambda: abs(value - bound) <= rtol * abs(bound),
    }[kind]()
    sign = {"lt": "<", "gt": ">", "eq": "=", "near": "≈"}[kind]
    shown = f"{name}: {_short(value)} {sign} {_short(bound)}"
    assert passed, f"✗ {shown} does not hold"
    print(f"✓ {shown}")
    _checks.append({"name": name, "value": value, "kind": kind, "bound": bound})
    if path := os.environ.get(RESULTS):
        Path(path).write_text(json.dumps(_checks, indent=1) + "\n")


def recap() -> None:
    """Shows every check of the notebook that has passed, folded away, and below them how
    many exercises are right."""
    signs = {"lt": "below", "gt": "above", "eq": "exactly", "near": "near"}
    rows = [
        (c["name"], c["value"], f"{signs[c['kind']]} {_short(c['bound'])}") for c in _checks
    ]
    checks = _table(["checked", "measured", "required"], rows)
    summary = f"The {len(rows)} checks of this notebook, all of which hold"
    say(f"<details><summary>{summary}</summary>\n\n{checks}\n\n</details>")
    print(exercises.score())


def guess(what: str, guessed, measured, why: dict | None = None) -> None:
    """Puts a prediction next to what was measured. `None` is no prediction: then the
    answer is folded away. `why` says, for each tempting answer, why it is not the one."""
    answer, reasons = f"**{_short(measured)}**", why or {}
    if guessed is None:
        others = ((a, reason) for a, reason in reasons.items() if a != measured)
        told = [f"*Why not “{a}”?* {reason}" for a, reason in others]
        folded = ["<details><summary>What it is</summary>", f"It is {answer}.", *told]
        paragraphs = [f"**{what}**: you have not guessed.", *folded, "</details>"]
        say("\n\n".join(paragraphs))
    elif guessed == measured:
        say(f"**{what}**: you said {guessed}, and it is {answer}.")
    else:
        reason = reasons.get(guessed, "")
        say(f"**{what}**: you said {guessed}; it is {answer}. {reason}".strip())


def knob(value, *, of: Sequence):
    """A number of a notebook that a reader may change: `slots = nb.knob(8, of=(4, 8, 16))`.
    The tests run its section with every value that is in `of`; others are refused."""
    if value not in of:
        choices = ", ".join(map(str, of))
        raise ValueError(f"This knob cannot be {value}: choose one of {choices}.")
    return value


class Timing(NamedTuple):
    """Seconds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


def timeit(function: Callable, *, repeats: int = 7) -> Timing:
    """Times a call until the device is done with it, after one call that is not counted."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), float(low), float(high))


def source_of(thing) -> tuple[str, str]:
    """Where something is defined, and its source without the docstring. Things of torch
    are named "file:qualified.name", so that torch need not be there to read them."""
    if isinstance(thing, str):
        file, name = thing.split(":")
        tree = ast.parse((NOTEBOOKS / file).read_text())
        for part in name.split("."):
            tree = next(n for n in tree.body if getattr(n, "name", None) == part)
        return f"notebooks/{file} · {name}", ast.unparse(_undocumented(tree))
    # Through what jit and jaxtyping wrap around it.
    thing = inspect.unwrap(thing)
    path = Path(inspect.getsourcefile(thing)).resolve().relative_to(NOTEBOOKS.parent)
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    tree = ast.parse("\n".join(lines)).body[0]
    for node in sorted(ast.walk(tree), key=lambda n: -getattr(n, "lineno", 0)):
        if ast_docstring := _docstring(node):
            del lines[ast_docstring.lineno - 1 : ast_docstring.end_lineno]
    text = "\n".join(line for line in lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return f"{path.as_posix()} · {thing.__qualname__}", text


def _docstring(node) -> ast.Expr | None:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    if isinstance(node, documented) and ast.get_docstring(node) and len(node.body) > 1:
        return node.body[0]
    return None


def _undocumented(tree):
    for node in ast.walk(tree):
        if _docstring(node):
            node.body = node.body[1:]
    return tree


def show_source(*things) -> None:
    """Shows the code that runs: what is read is what is tested."""
    for thing in things:
        place, source = source_of(thing)
        show_code(f"`{place}`", source, "python", metadata={"source": place})


def show_diff(torch_thing: str, thing) -> None:
    """Shows what changes from torch (`-`) to Equinox (`+`)."""
    (torch_place, torch_source), (place, source) = source_of(torch_thing), source_of(thing)
    # Both through the same formatter, so that a quote or a line break is no difference.
    old, new = (
        ast.unparse(ast.parse(text)).splitlines() for text in (torch_source, source)
    )
    lines = difflib.unified_diff(old, new, n=99, lineterm="")
    body = "\n".join(list(lines)[3:])
    show_code(f"`{torch_place}` to `{place}`", body, "diff")


def show_code(title: str, code: str, language: str, metadata: dict | None = None) -> None:
    """Shows code below a title, once as Markdown, for whatever reads notebooks as text, and
    once as HTML, for JupyterLab, GitHub and pages made by nbconvert. nbconvert shows the
    Markdown of an output in a proportional font and without colours, so the HTML has both
    in itself. The class names are for pages that drop styles and have a style sheet."""
    style, spans = get_style_by_name("default"), []
    for kind, text in get_lexer_by_name(language).get_tokens(code):
        look, text = style.style_for_token(kind), html.escape(text, quote=False)
        if look["color"] and text.strip():
            css = f"color:#{look['color']}" + ";font-weight:bold" * look["bold"]
            text = (
                f'<span class="{STANDARD_TYPES.get(kind, "")}" style="{css}">{text}</span>'
            )
        spans.append(text)
    css = "font-family:monospace;white-space:pre;overflow-x:auto;line-height:1.35"
    named = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(title))
    block = (
        f'<div class="highlight"><pre style="{css}">{"".join(spans).rstrip()}</pre></div>'
    )
    data = {
        "text/html": f"<p>{named}</p>\n{block}",
        "text/markdown": f"{title}\n```{language}\n{code}\n```",
        "text/plain": f"{title}\n{code}",
    }
    display(data, raw=True, metadata=metadata or {})


def shakespeare() -> str:
    """His works. The last tenth is held out: the embedded model has not read it."""
    with lzma.open(MODEL / "corpus" / "shakespeare.txt.xz", "rt", encoding="utf-8") as file:
        return file.read()


def passage(start: float, n_characters: int) -> str:
    """A part of his works, from the first line that begins behind that share of them."""
    text = shakespeare()
    return text[text.index("\n", int(start * len(text))) + 1 :][:n_characters]


def held_out(n_tokens: int, *, start: float = 0.95) -> list[int]:
    """Tokens of Shakespeare that the embedded model has never been trained on. The first id
    is BOS."""
    tokenizer = mx.Tokenizer(MODEL / "tokenizer.model")
    return tokenizer.encode(passage(start, 8 * n_tokens))[:n_tokens]


def named(tree) -> dict:
    """The arrays of a model, or of its gradient, by the names of its weights."""
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {spell(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_config(model, **changes):
    """A model of either port with the same leaves under another configuration."""
    old = model.config if isinstance(model, mx.Transformer) else model.args
    config = dataclasses.replace(old, **changes)
    skeleton = eqx.filter_eval_shape(type(model), config, key=jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(model))


def film(
    path: str,
    told: str,
    frames: Callable[[], Iterable[Image.Image]],
    pauses: Sequence[int],
    same: Callable[[str, str], bool] = operator.eq,
) -> str:
    """Makes a moving picture, and gives back what the file tells of itself. It carries
    `told`, what it shows, as a comment: if the file tells the same already, no frame is
    drawn. `pauses` are in milliseconds."""
    path = NOTEBOOKS / path
    if not path.exists() or not same(_comment(path), told):
        first, *others = frames()
        first.save(
            path,
            save_all=True,
            append_images=others,
            comment=told,
            duration=list(pauses),
            loop=0,
            optimize=True,
        )
    return _comment(path)


def _comment(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.info.get("comment", b"").decode()


def as_image(figure) -> Image.Image:
    """A figure as a frame of a film. It is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return Image.open(buffer).convert("RGB")


class Oracle:
    """Answers for torch: live where it is installed, else what it answered when the
    notebook was built. `oracle("name", lambda twin: ...)` gives an array; `twin` is the
    model of `torch_mistral.py` with the embedded weights."""

    def __init__(self, number: str):
        self._path = NOTEBOOKS / "goldens" / f"{number}.npz"
        self._twins, self._answers = {}, {}
        try:
            import torch

            self.live = True
            torch.manual_seed(0)
            # The model is too small to share out.
            torch.set_num_threads(1)
            say(f"PyTorch {torch.__version__} answers live.")
        except ImportError:
            self.live = False
            with np.load(self._path) as file:
                self._answers = dict(file)
            say(f"PyTorch is not installed: its answers come from `{self._path.name}`.")

    def twin(self, dtype: str = "float32"):
        import torch_mistral

        if dtype not in self._twins:
            self._twins[dtype] = torch_mistral.load(MODEL, dtype)
        return self._twins[dtype]

    def __call__(
        self, name: str, compute: Callable, *, dtype: str = "float32"
    ) -> np.ndarray:
        if self.live:
            import torch

            with torch.no_grad():
                answer = compute(self.twin(dtype))
            if isinstance(answer, torch.Tensor):
                answer = answer.float().numpy()
            self._answers[name] = np.asarray(answer)
            if path := os.environ.get(GOLDENS):
                np.savez_compressed(path, **self._answers)
        return self._answers[name]
