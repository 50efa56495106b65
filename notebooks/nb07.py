"""The plots of notebook 07, what it counts, and what it asks of a compiler for chips that
are not here.

`python nb07.py` writes `goldens/07_v5e.json`; it needs libtpu.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

import mistral_eqx as mx
from mistral_eqx.apps.compiling import compile_programs
from mistral_eqx.devices.programs import COLLECTIVES, Program, read_program
from mistral_eqx.files.inspection import cache_skeleton
from mistral_eqx.files.names import skeleton


RECORDED = Path(__file__).resolve().parent / "goldens" / "07_v5e.json"
CHIP = "v5e:2x4"
_MESSAGE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")


def held(tree) -> int:
    """The bytes that device 0 holds of the arrays of a tree."""
    first = lambda x: x.addressable_shards[0].data.nbytes
    return sum(first(x) for x in jax.tree.leaves(tree))


def distance(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def program(function, *arguments) -> Program:
    """The compiled program of a jitted function, as the package reads it."""
    return read_program(function.lower(*arguments).compile(), 0.0, None)


def message_lines(function, *arguments) -> list[str]:
    """The lines of a compiled program that send something."""
    lines = function.lower(*arguments).compile().as_text().splitlines()
    return [line.strip().removeprefix("ROOT ") for line in lines if _MESSAGE.search(line)]


def message_shape(line: str) -> tuple[str, list[int]]:
    """The kind of a message, and the shape of what it delivers; of several arrays, that of
    the first."""
    shape = re.search(r"= \(?\w+\[([\d,]*)\]", line)[1]
    return _MESSAGE.search(line)[1], [int(n) for n in shape.split(",") if n]


def kinds_of_messages(function, *arguments) -> dict[str, int]:
    """How often each message is in a program: `{"all-reduce [4, 64, 256]": 13}`."""
    found = map(message_shape, message_lines(function, *arguments))
    return dict(collections.Counter(f"{kind} {shape}" for kind, shape in found))


def random_mixtral(config: mx.ModelConfig) -> mx.Transformer:
    """A model of one layer, whose feed-forward network is four small experts."""
    moe = mx.config.MoEConfig(num_experts=4, num_experts_per_tok=2)
    changes = {"moe": moe, "n_layers": 1, "hidden_dim": 64}
    config = dataclasses.replace(config, **changes)
    generator = np.random.default_rng(0)
    # Numbers of NumPy, which need no compiling.
    normal = lambda x: generator.normal(0, x.shape[-1] ** -0.5, x.shape)
    fill = lambda x: jnp.asarray(np.ones(x.shape) if x.ndim == 1 else normal(x), x.dtype)
    return jax.tree.map(fill, skeleton(config))


def skeletons(config: mx.ModelConfig, *, rows: int, tokens: int) -> tuple:
    """The shapes of a model in bfloat16 and of its cache."""
    model = skeleton(config, jnp.bfloat16)
    options = {"rows": rows, "context": tokens, "chunk": 256, "dtype": jnp.bfloat16}
    return model, cache_skeleton(model, **options)


def gibibytes(shapes, shardings) -> float:
    """What a device holds of arrays of these shapes."""
    size = lambda x, place: np.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings))) / 2**30


def _owners(array) -> dict[tuple, list[int]]:
    """Which devices hold each part of an array: the part as starts and stops."""
    owners = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        part = tuple(i.indices(n)[:2] for i, n in zip(index, array.shape))
        owners.setdefault(part, []).append(device.id)
    return owners


def _shade(devices: list[int], axis, x, y, width, height, size=9) -> None:
    colour = plt.get_cmap("viridis")(0.12 + 0.82 * min(devices) / 7)
    kind = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.5}
    axis.add_patch(Rectangle((x, y), width, height, **kind))
    if len(devices) == 8:
        text = "all"
    else:
        text = " ".join(map(str, sorted(devices)))
        if len(devices) == 4 and width < 110:
            text = text[:3] + "\n" + text[4:]
    dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colour)) < 0.5
    axis.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size,
        color="white" if dark else "black",
    )  # fmt: skip


def draw_mesh(mesh) -> None:
    """A mesh of two axes, with the devices in it."""
    rows, columns = mesh.devices.shape
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.6 * rows))
    for row, column in np.ndindex(rows, columns):
        _shade([mesh.devices[row, column].id], axis, column, row, 1, 1, size=12)
    down, across = mesh.axis_names
    axis.set(xlim=(0, columns), ylim=(rows, 0), xlabel=f"{across} (column)")
    axis.set(ylabel=f"{down} (row)")
    axis.set_xticks(np.arange(columns) + 0.5, range(columns))
    axis.set_yticks(np.arange(rows) + 0.5, range(rows))
    axis.grid(False)


def draw_placed(placed: dict) -> None:
    """One grid for each of some small arrays: the devices that hold each number."""
    figure, axes = plt.subplots(2, 2, figsize=(7, 5.4))
    for axis, (name, array) in zip(axes.flat, placed.items()):
        for ((top, bottom), (left, right)), devices in _owners(array).items():
            for row in range(top, bottom):
                for column in range(left, right):
                    _shade(devices, axis, column, row, 1, 1, size=11)
        axis.set(xlim=(0, 4), ylim=(4, 0), xlabel="column", ylabel="row", title=name)
        axis.set_xticks(np.arange(4) + 0.5, range(4))
        axis.set_yticks(np.arange(4) + 0.5, range(4))
        axis.grid(False)


def draw_block(block) -> None:
    """The matrices of a block to scale, each part with the devices that hold it."""
    attention, feed_forward = block.attention, block.feed_forward
    rows = [
        [(name, getattr(attention, name).weight) for name in ("wq", "wk", "wv", "wo")],
        [(name, getattr(feed_forward, name).weight) for name in ("w1", "w3", "w2")],
    ]
    figure, axis = plt.subplots(figsize=(7, 6.2))
    down = 0
    for row in rows:
        right = 0
        for name, weight in row:
            height, width = weight.shape
            axis.text(right, down - 12, f"{name} {height} × {width}", fontsize=10)
            for ((top, bottom), (left, end)), devices in _owners(weight).items():
                place = (right + left, down + top, end - left, bottom - top)
                size = 9 if bottom - top < 40 else 10 if end - left < 70 else 12
                _shade(devices, axis, *place, size=size)
            right += width + 40
        down += max(weight.shape[0] for _, weight in row) + 90
    axis.set(xlim=(-5, 1320), ylim=(down - 60, -50), aspect="equal")
    axis.set(xlabel="inputs of the matrix", ylabel="outputs of the matrix")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def draw_counted(counted: dict[str, tuple[int, dict[str, int]]]) -> None:
    """For each mesh the messages that were predicted, and those that were found."""
    places, width = np.arange(len(counted)), 0.36
    predicted = [expected for expected, _ in counted.values()]
    found = [sum(kinds.values()) for _, kinds in counted.values()]
    figure, axis = plt.subplots(figsize=(7, 3.4))
    kind = {"color": "0.75", "edgecolor": "0.25", "label": "predicted"}
    axis.bar_label(axis.bar(places - width / 2, predicted, width, **kind))
    kind = {"color": "0.25", "edgecolor": "0.25", "label": "found in the program"}
    axis.bar_label(axis.bar(places + width / 2, found, width, **kind))
    axis.set_xticks(places, counted)
    axis.set_yticks(range(0, 16, 5))
    axis.set(xlabel="mesh", ylabel="messages", ylim=(0, 18))
    axis.legend(ncols=2, loc="upper center")


def draw_work(timed: dict[str, tuple]) -> None:
    """For each mesh the operations of a device and of all, and the time they take."""
    names, work = [*timed], np.array([flops for flops, _ in timed.values()]) / 1e9
    devices = np.array([1 if name == "model 1" else 8 for name in names])
    times = [time for _, time in timed.values()]
    low, middle, high = 1000 * np.array([[t.low, t.median, t.high] for t in times]).T
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.8))
    axes[0].barh(names, work * devices, color="0.85", edgecolor="0.4", label="all devices")
    axes[0].barh(names, work, color="0.3", label="a device")
    errors = np.array([middle - low, high - middle])
    axes[1].barh(names, middle, xerr=errors, color="0.6", capsize=3)
    axes[0].set(xlabel="work (billion operations)", ylabel="mesh")
    axes[1].set(xlabel="time of 8 × 64 tokens (ms, median and quartiles)", ylabel="mesh")
    axes[0].legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for axis in axes:
        axis.invert_yaxis()


def draw_seen(seen: dict[str, list[float]], columns: list[str], words) -> None:
    """Faults down, checks across; `words` says what stands in a cell."""
    figure, axis = plt.subplots(figsize=(7, 3))
    values = np.array(list(seen.values()), bool)
    axis.imshow(np.where(values, 0.75, 0.06), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (i, j), told in np.ndenumerate(values):
        axis.text(
            j, i, words[i][j], ha="center", va="center", fontsize=9.5,
            color="white" if told else "black",
        )  # fmt: skip
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(seen)), list(seen))
    axis.set(xlabel="what is compared with the sound program", ylabel="fault")
    axis.grid(False)


def compile_tiny(chip: str = CHIP) -> dict[str, dict]:
    """What the embedded model's programs need and send on eight chips."""
    config = mx.load(dtype=jnp.float32)[0].config
    mesh = {"data": 2, "model": 4}
    return _compiled(config, mesh, chip, batch=8, context=256, dtype=jnp.float32)


def compile_7b() -> dict[str, dict]:
    return _compiled(mx.RELEASED["mistral-7b-v0.3"], {"model": 8}, CHIP)


def _compiled(config, mesh, chip, **options) -> dict[str, dict]:
    return {
        name.split(",")[0]: {
            "arguments": program.arguments,
            "temporaries": program.temporaries,
            "collectives": program.collectives,
        }
        for name, program in compile_programs(config, mesh, chip, **options)
    }


def recorded() -> dict:
    return json.loads(RECORDED.read_text())


def tiny_on_v5e() -> tuple[dict, str]:
    """`compile_tiny` by a process of its own, if libtpu is installed and answers; else what
    was recorded. Returns where it comes from too."""
    if importlib.util.find_spec("libtpu") is not None:
        code = "import json, nb07; print(json.dumps(nb07.compile_tiny()))"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=RECORDED.parent.parent,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if ran.returncode == 0:
            return json.loads(ran.stdout.splitlines()[-1]), "compiled just now"
    return recorded()["tiny"], f"recorded in `goldens/{RECORDED.name}`"


if __name__ == "__main__":
    found = {"chip": CHIP, "tiny": compile_tiny(), "7b": compile_7b()}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")
