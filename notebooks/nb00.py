"""The museum of notebook 00, whose exhibits are one broken line each, and the map of the
model."""

import functools
import html
import math
import sys
import types
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import mistral_eqx as mx
import nbtools as nb
from mistral_eqx.cache import ring_size
from mistral_eqx.prompts import default_chunk


# The museum


class Bug(NamedTuple):
    """A line of `one_file_ref.py`, and what stands there instead."""

    line: str
    broken: str


BUGS = {
    "half-split RoPE": Bug(
        "view_as_complex = lambda x: jax.lax.complex(x[..., 0], x[..., 1])",
        "view_as_complex = lambda x: "
        "jax.lax.complex(*jnp.split(x.reshape(*x.shape[:-2], -1), 2, axis=-1))",
    ),
    "eps misplaced": Bug(
        "return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)",
        "return x / (jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) + self.eps)",
    ),
    "softmax in bfloat16": Bug(
        "scores = scores.astype(jnp.float32)",
        "scores = scores.astype(jnp.bfloat16)",
    ),
    "wo transposed": Bug(
        "return self.wo(output), (cache_k, cache_v)",
        "return output @ self.wo.weight, (cache_k, cache_v)",
    ),
    "w1, w3 swapped": Bug(
        "return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))",
        "return self.w2(jax.nn.silu(self.w3(x)) * self.w1(x))",
    ),
    "window off by one": Bug(
        "mask = jnp.triu(mask, k=-args.sliding_window)",
        "mask = jnp.triu(mask, k=1 - args.sliding_window)",
    ),
    "position + 1": Bug(
        "logits, cache = model.forward(next_token[:, None], jnp.array([cur_pos]), cache)",
        "logits, cache = model.forward("
        "next_token[:, None], jnp.array([cur_pos + 1]), cache)",
    ),
}
PORT = nb.NOTEBOOKS.parent / "one_file_ref.py"
PROMPT, WRITTEN, PASSAGES = 100, 44, 4  # tokens, tokens, texts


def program(bug: str | None) -> str:
    """The text of the one-file port, with a broken line or as it is."""
    text = PORT.read_text(encoding="utf-8")
    if bug is None:
        return text
    line, broken = BUGS[bug]
    if text.count(line) != 1:
        raise ValueError(f"{PORT.name} has {text.count(line)} times the line: {line}")
    return text.replace(line, broken)


def show_line(bug: str) -> None:
    """Shows the line, and what it becomes."""
    line, broken = BUGS[bug]
    nb.show_code(f"`{PORT.name}`, one line of it", f"- {line}\n+ {broken}", "diff")


class Run(NamedTuple):
    """What a program wrote behind the prompt, and its loss in nats a token."""

    text: str
    loss: float


@functools.cache
def run(bug: str | None) -> Run:
    """Runs the one-file port with a line of it broken, or as it is. It continues greedily a
    text that it was not trained on. Beside this it reads four such texts to the end: the
    first tokens of each at once, the others one by one, as if it had written them."""
    port = types.ModuleType("broken_port")
    # Where jaxtyping and dataclasses look for the module of a class.
    sys.modules[port.__name__] = port
    port.__file__ = str(PORT)
    exec(compile(program(bug), f"{PORT.name}, {bug}", "exec"), port.__dict__)
    model = port.Transformer.from_folder(nb.MODEL, dtype=jnp.float32)
    read = passages()
    ids = types.SimpleNamespace(encode=list, decode=list, pad_id=-1)
    # Each bug is compiled anew, and runs for less time than good programs take to compile.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        texts, logprobs = port.generate([read[0][:PROMPT], *read], model, ids, WRITTEN)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    before, after = tokenizer().decode(read[0][:PROMPT]), tokenizer().decode(texts[0])
    return Run(after[len(before) :], float(-np.mean(logprobs[1:])))


@functools.cache
def tokenizer() -> mx.Tokenizer:
    return mx.Tokenizer(nb.MODEL / "tokenizer.model")


@functools.cache
def passages() -> list[list[int]]:
    """Texts of Shakespeare that the model was not trained on, each with a BOS before it."""
    bos, *tokens = nb.held_out(1 + PASSAGES * (PROMPT + WRITTEN))
    length = PROMPT + WRITTEN - 1
    return [[bos, *tokens[i * length : (i + 1) * length]] for i in range(PASSAGES)]


def beside(bug: str) -> None:
    """Shows the end of the prompt, and how the port and the broken port continue it."""
    prompt = tokenizer().decode(passages()[0][:PROMPT]).splitlines()[-3:]
    sound, broken = run(None), run(bug)
    heads = ["as it is", bug]
    losses = [f"{run.loss:.2f} nats a token" for run in (sound, broken)]
    texts = [_lines(run.text) for run in (sound, broken)]
    nb.say("The text so far:\n\n> " + _lines("\n".join(prompt)))
    nb.table(["", *heads], [["it writes", *texts], ["loss", *losses]])


def museum() -> dict[str, Run]:
    """Shows each bug beside the text that it makes, and gives these back."""
    runs, rows = {name: run(name) for name in BUGS}, []
    for name, (text, loss) in [("(none)", run(None)), *runs.items()]:
        same = name in runs and text == run(None).text
        rows.append([name, f"{loss:.3f}", "*the same text*" if same else _lines(text)])
    nb.table(["bug", "loss", "what it writes"], rows)
    return runs


WHY_SILENT = {
    0: "Several of these bugs move the probabilities by so little that the most probable "
    "token stays the same, all the way.",
    1: "There are more whose loss hardly moves either.",
    6: "Weights that are used in the wrong way show at once.",
}
WHY_WORST = {
    "better": "Its loss is larger. So on (geometric) average it gives the token that comes "
    "a smaller probability than a model would that knows nothing."
}


def changes(runs: dict[str, Run]) -> list[float]:
    """How much each bug changes the loss, the least first."""
    return sorted(abs(broken.loss - run(None).loss) for broken in runs.values())


def knows_nothing() -> float:
    """The loss of a model that finds all tokens equally probable."""
    return math.log(tokenizer().vocab_size)


def excess(runs: dict[str, Run]) -> float:
    """How much larger the largest loss is than that of knowing nothing."""
    return max(broken.loss for broken in runs.values()) - knows_nothing()


def against_nothing(runs: dict[str, Run]) -> str:
    return "worse" if excess(runs) > 0 else "better"


def _lines(text: str) -> str:
    # As HTML, so that a table can hold it, and no star or bar of it means anything.
    lines = [html.escape(line.strip(), quote=False) for line in text.split("\n")]
    return "<br>".join(filter(None, lines)).replace("*", "&#42;").replace("_", "&#95;")


def bars(runs: dict[str, Run]) -> None:
    """Draws the loss of each bug, and that of knowing nothing."""
    names = ["(none)", *sorted(runs, key=lambda name: runs[name].loss)]
    losses = [run(None).loss, *(runs[name].loss for name in names[1:])]
    nothing = knows_nothing()
    _, axis = plt.subplots(figsize=(7, 3.6))
    axis.barh(names, losses, color=["#6b6b6b"] + ["#31688e"] * len(runs))
    for row, loss in enumerate(losses):
        axis.text(0.15, row, f"{loss:.3f}", va="center", color="white")
    axis.axvline(nothing, color="black", linestyle="--", marker="")
    axis.text(nothing - 0.1, 0, "knows nothing", ha="right", va="center", fontsize=10)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="loss on unseen Shakespeare (nats a token)")
    axis.set_xlim(0, max(losses) * 1.13)
    nb.caption(
        "three bars cannot be told from that of the port as it is. The longest bar passes "
        f"the dashed line, at ln {tokenizer().vocab_size} = {nothing:.2f} nats: a wrong "
        "program can be worse than one that knows nothing."
    )


# The map


class Box(NamedTuple):
    """A part of the model: the notebook about it, its source, the names of its weights in
    a block or in the model, and how shapes go through it."""

    title: str
    notebook: str
    source: str
    weights: tuple[str, ...]
    flow: tuple[str, ...]


class Around(NamedTuple):
    """What is done with the whole model."""

    title: str
    notebook: str
    source: str


AROUND = (
    Around("two ports", "01", "one_file_ref.py"),
    Around("compile", "05", "mistral_eqx/decoding.py"),
    Around("many devices", "07", "mistral_eqx/devices/sharding.py"),
    Around("experts", "08", "mistral_eqx/moe.py"),
    Around("train, LoRA", "09", "mistral_eqx/learning/training.py"),
    Around("fewer bits", "10", "mistral_eqx/kernels/quantized.py"),
)


def boxes(config: mx.ModelConfig) -> dict[str, Box]:
    """The parts of a model in the order in which a token meets them, with the shapes that
    its modules have."""
    model = skeleton(config)
    block, vocab_size = model.layers[0], model.tok_embeddings.weight.shape[0]
    shape = lambda linear: "[" + ", ".join(map(str, linear.weight.shape)) + "]"
    stream = f"[T, {config.dim}]"
    heads = f"[T, {config.n_heads}, {config.head_dim}]"
    kv_heads = f"[T, {config.n_kv_heads}, {config.head_dim}]"
    attention, feed = block.attention, block.feed_forward
    window = attention.window
    chunk = default_chunk(config)
    slots = ring_size(window, chunk=chunk, max_length=2**20)
    return {
        "embed": Box(
            "Embedding", "02", "mistral_eqx/layers.py", ("tok_embeddings",),
            (f"ids [T] → table {shape(model.tok_embeddings)} → {stream}",),
        ),
        "norm1": Box(
            "RMSNorm", "02", "mistral_eqx/layers.py", ("attention_norm",),
            (f"{stream} → {stream}",),
        ),
        "qkv": Box(
            "Queries, keys, values", "02", "mistral_eqx/attention.py",
            ("attention.wq", "attention.wk", "attention.wv"),
            (
                f"wq {shape(attention.wq)} → q {heads}",
                f"wk, wv {shape(attention.wk)} → k, v {kv_heads}",
            ),
        ),
        "rope": Box(
            "RoPE", "02", "mistral_eqx/rope.py", (),
            (f"turns the {config.head_dim // 2} pairs of each q and k",),
        ),
        "cache": Box(
            "Rolling buffer", "04", "mistral_eqx/cache.py", (),
            (f"keeps k, v: [{config.n_kv_heads}, {slots} slots, {config.head_dim}] each",),
        ),
        "window": Box(
            "Window", "03", "mistral_eqx/attention.py", ("attention.wo",),
            (
                f"a query sees {window} keys → {heads}",
                f"wo {shape(attention.wo)} → {stream}",
            ),
        ),
        "norm2": Box(
            "RMSNorm", "02", "mistral_eqx/layers.py", ("ffn_norm",),
            (f"{stream} → {stream}",),
        ),
        "feed": Box(
            "SwiGLU", "02", "mistral_eqx/layers.py",
            ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            (
                f"w1, w3 {shape(feed.w1)} → [T, {config.hidden_dim}] twice",
                f"w2 {shape(feed.w2)} → {stream}",
            ),
        ),
        "output": Box(
            "RMSNorm, output", "02", "mistral_eqx/transformer.py", ("norm", "output"),
            (f"output {shape(model.output)} → logits [T, {vocab_size}]",),
        ),
        "choose": Box(
            "Choose a token", "06", "mistral_eqx/sampling.py", (),
            (f"the last row [{vocab_size}] → an id",),
        ),
    }  # fmt: skip


def skeleton(config: mx.ModelConfig) -> mx.Transformer:
    """A model without numbers."""
    return eqx.filter_eval_shape(mx.Transformer, config, key=jax.random.key(0))


def mapped_parameters(config: mx.ModelConfig) -> int:
    """How many numbers the weights have that the map shows."""
    model, total = skeleton(config), 0
    for box in boxes(config).values():
        for name in box.weights:
            # A weight of the model, or one of every block.
            first = name.split(".")[0]
            owners = [model] if hasattr(model, first) else model.layers
            for owner in owners:
                part = functools.reduce(getattr, name.split("."), owner)
                total += part.weight.size
    return total


def both_counts(model: mx.Transformer) -> dict[str, int]:
    """The numbers on the map, and those of the model, as `nb.check` takes them."""
    counted = sum(leaf.size for leaf in jax.tree.leaves(model))
    return {"value": mapped_parameters(model.config), "eq": counted}


def links(config: mx.ModelConfig) -> list[str]:
    """The rows of the map as a table, for where a picture has no links."""
    rows = {box.title: (box.notebook, box.source) for box in boxes(config).values()}
    rows |= {a.title: (a.notebook, a.source) for a in AROUND}
    return [f"| {title} | [{n}] | [{Path(s).name}] |" for title, (n, s) in rows.items()]


def targets(config: mx.ModelConfig) -> list[str]:
    """Where the links of that table lead."""
    rows = [*boxes(config).values(), *AROUND]
    leads = {f"[{row.notebook}]: {_notebook(row.notebook)}" for row in rows}
    leads |= {f"[{Path(row.source).name}]: ../{row.source}" for row in rows}
    return sorted(leads)


def _notebook(number: str) -> str:
    (source,) = (nb.NOTEBOOKS / "src").glob(f"{number}_*.py")
    return f"{source.stem}.ipynb"


WIDTH, HEIGHT = 720, 1018  # the proportions of A4; letter has a margin left
LEFT, RIGHT, STREAM = 92, 704, 46


class Drawing:
    """Shapes of an SVG, in black on white."""

    def __init__(self, up: str):
        self.up = up  # from the picture to the folder of the notebooks
        self.parts: list[str] = []

    def text(self, x, y, text, size=20, *, bold=False, mono=False, anchor="start", **look):
        look = {"font-size": size, "text-anchor": anchor} | look
        if bold:
            look["font-weight"] = "bold"
        if mono:
            look["font-family"] = "Menlo, Consolas, DejaVu Sans Mono, monospace"
        self._add("text", html.escape(text), x=x, y=y, **look)

    def box(self, x, y, width, height, **look):
        look = {"fill": "white", "stroke": "black", "stroke-width": 1.5, "rx": 6} | look
        self._add("rect", x=x, y=y, width=width, height=height, **look)

    def line(self, *points, width=1.5, **look):
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        look = {"fill": "none", "stroke": "black", "stroke-width": width} | look
        self._add("path", d=path, **look)

    def arrow(self, *points, width=1.5):
        (x0, y0), (x, y) = points[-2:]
        self.line(*points, width=width)
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        back, side = 6 + 2 * width, 3 + 1.5 * width
        one = (x - back * dx - side * dy, y - back * dy - side * dx)
        two = (x - back * dx + side * dy, y - back * dy + side * dx)
        self.line((x, y), one, two, (x, y), fill="black", width=1)

    def chip(self, x, y, number):
        self.parts.append(f'<a href="{self.up}{_notebook(number)}">')
        self._add("circle", cx=x, cy=y, r=15, fill="black")
        look = {"anchor": "middle", "fill": "white", "bold": True}
        self.text(x, y + 6, number, 17, **look)
        self.parts.append("</a>")

    def source(self, x, y, path, anchor="end"):
        self.parts.append(f'<a href="{self.up}../{path}">')
        look = {"mono": True, "anchor": anchor, "text-decoration": "underline"}
        self.text(x, y, Path(path).name, 16, **look)
        self.parts.append("</a>")

    def plus(self, x, y):
        self._add("circle", cx=x, cy=y, r=12, fill="white", stroke="black")
        self.line((x - 7, y), (x + 7, y), width=2)
        self.line((x, y - 7), (x, y + 7), width=2)

    def _add(self, kind, inside="", **look):
        attributes = " ".join(f'{name}="{value}"' for name, value in look.items())
        self.parts.append(f"<{kind} {attributes}>{inside}</{kind}>")


def draw_map(config: mx.ModelConfig, up: str = "") -> str:
    """The map of a model as SVG, on one page.

    **Arguments:**

    - `config`: of the model.
    - `up`: the way from the picture to the folder of the notebooks, for its links.
    """
    pen, parts = Drawing(up), boxes(config)
    total = sum(leaf.size for leaf in jax.tree.leaves(skeleton(config)))
    pen.box(0, 0, WIDTH, HEIGHT, stroke="none", rx=0)
    pen.text(16, 36, "mistral_eqx on one page", 28, bold=True)
    told = f"{total:,} parameters; a text of T tokens. A black number is a notebook."
    pen.text(16, 64, told, 18)

    # The stream begins at the embedding.
    end = _part(pen, parts["embed"], 80, LEFT, RIGHT)
    y = end + 10
    pen.box(16, y, RIGHT - 16, 0)
    frame = len(pen.parts) - 1
    told = f"{config.n_layers} blocks; the thick line is x [T, {config.dim}]"
    pen.text(LEFT, y + 25, told, 19, bold=True)
    top, y, halves = y, y + 36, []
    for names in (["norm1", "qkv", "rope", "cache", "window"], ["norm2", "feed"]):
        first = y
        for name in names:
            last = y
            y = _part(pen, parts[name], y, LEFT, RIGHT - 12) + 7
        halves.append((first + 20, last + 43))
        y += 4
    pen.parts[frame] = ""
    under = Drawing(up)
    under.box(16, top, RIGHT - 16, y - top - 2, fill="#f2f2f2", rx=10)
    pen.parts.insert(frame, under.parts[0])
    output = y + 8
    end_of_output = _part(pen, parts["output"], output, LEFT, RIGHT)
    pen.line((LEFT, end - 30), (STREAM, end - 30), (STREAM, output + 22), width=6)
    pen.arrow((STREAM, output + 22), (LEFT, output + 22), width=6)
    for out, back in halves:
        pen.arrow((STREAM, out), (LEFT, out))
        pen.arrow((LEFT, back), (STREAM + 12, back))
        pen.plus(STREAM, back)
    y = _part(pen, parts["choose"], end_of_output + 8, LEFT, RIGHT)
    # And back to the beginning, with one token more.
    pen.line((LEFT, y - 30), (7, y - 30), (7, 98), width=1.5, **{"stroke-dasharray": "6 4"})
    pen.arrow((7, 98), (LEFT, 98))

    pen.text(16, y + 32, "The whole model", 19, bold=True)
    wide = (RIGHT - 16 - 2 * 8) / 3
    for i, (title, number, source) in enumerate(AROUND):
        left, row = 16 + (wide + 8) * (i % 3), y + 42 + 64 * (i // 3)
        pen.box(left, row, wide, 58)
        pen.text(left + 10, row + 25, title, 20, bold=True)
        pen.chip(left + wide - 22, row + 20, number)
        pen.source(left + 10, row + 48, source, "start")
    if y + 42 + 64 * -(-len(AROUND) // 3) > HEIGHT:
        raise ValueError("the map is longer than a page")
    look = "font-family:Helvetica,Arial,sans-serif;max-width:100%;height:auto"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" style="{look}" role="img">\n'
        "<title>The model, part by part, with the shapes of its arrays</title>\n"
        + "\n".join(part for part in pen.parts if part)
        + "\n</svg>\n"
    )


def _part(pen: Drawing, box: Box, y: float, left: float, right: float) -> float:
    """Draws a box of the model, and says where it ends. A norm is a line high."""
    flat = box.title == "RMSNorm"
    height = 40 if flat else 36 + 25 * len(box.flow)
    pen.box(left, y, right - left, height)
    pen.text(left + 12, y + 27, box.title, 22, bold=True)
    pen.chip(right - 22, y + 20, box.notebook)
    pen.source(right - 46, y + 26, box.source)
    for i, flow in enumerate(box.flow):
        place = (left + 156, y + 27) if flat else (left + 12, y + 52 + 25 * i)
        pen.text(*place, flow, 19)
    return y + height


def show_map(config: mx.ModelConfig) -> None:
    """Shows the map, whose boxes are links where the viewer keeps them."""
    picture = draw_map(config)
    display({"image/svg+xml": picture, "text/plain": "The map of the model"}, raw=True)


def write_map(path: Path) -> None:
    """Writes the map of the embedded model beside the other pictures."""
    path.write_text(draw_map(mx.load()[0].config, up="../"), encoding="utf-8")
