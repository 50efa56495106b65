"""The helpers of notebook 08: modules that note who was called with what, and its
figures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as P
from PIL import Image

import mistral_eqx as mx
import nbtools as nb
from mistral_eqx.kernels.experts import block_sizes, dispatch


plt.rcParams.update({"figure.dpi": 84, "font.size": 12})
GREY, AGAIN, NONSENSE = "#c9c9c9", -2, -1


def corpus(tokenizer, n_letters: int = 1_000_000) -> np.ndarray:
    """Tokens of the part of Shakespeare that the embedded model was trained on too."""
    return np.array(tokenizer.encode(nb.shakespeare()[:n_letters]))


def parts_of(config, k: int | None = None) -> dict[str, int]:
    """How many parameters a model of this shape has, by part; with `k`, those that a token
    goes through that takes `k` experts in each layer."""
    model = eqx.filter_eval_shape(mx.Transformer, config, key=jax.random.key(0))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    networks = [block.feed_forward for block in model.layers]
    experts = size([getattr(network, "experts", network) for network in networks])
    vocabulary = size([model.tok_embeddings, model.output])
    rest = size(model) - experts - vocabulary
    if k is not None:
        experts = experts * k // config.moe.num_experts
    return {"attention, norms, router": rest, "vocabulary": vocabulary, "experts": experts}


def random_model(config) -> mx.Transformer:
    """A model with random weights, spread as those of `mx.Transformer(config, key=key)`.
    They are NumPy's, which need no compiling and are the same on every machine."""
    generator = np.random.default_rng(0)
    normal = lambda x: generator.normal(0, x.shape[-1] ** -0.5, x.shape)
    fill = lambda x: jnp.asarray(np.ones(x.shape) if x.ndim == 1 else normal(x), x.dtype)
    return jax.tree.map(
        fill, eqx.filter_eval_shape(mx.Transformer, config, key=jax.random.key(0))
    )


def fair_choices(n_tokens: int, n_experts: int, top_k: int = 2) -> np.ndarray:
    """`[draws, tokens, top_k]`: what routers choose that prefer nothing, drawn often enough
    for 8,192 tokens or more in all."""
    scores = np.random.default_rng(0).random(
        (max(1, 8192 // n_tokens), n_tokens, n_experts)
    )
    return np.argsort(-scores, axis=-1)[..., :top_k]


# --- who was called with what ---------------------------------------------------------


class Noting(eqx.Module):
    """In place of the experts: notes its number and the rows that it is given. It has a
    leading axis `experts`, as they have."""

    number: jax.Array
    notes: list = eqx.field(static=True)

    def __call__(self, rows):
        note = lambda n, r: self.notes.append((int(n), np.asarray(r[:, 0], int) - 1))
        io_callback(note, None, self.number, rows)
        return rows


def noted_blocks(chosen, n_experts: int) -> list[tuple[int, np.ndarray]]:
    """What the package's `dispatch` really runs: for each block its expert and the numbers
    of its tokens, -1 where it is padded."""
    notes = []
    experts = Noting(jnp.arange(n_experts, dtype=jnp.int32), notes)
    x = 1.0 + jnp.arange(chosen.shape[0], dtype=jnp.float32)[:, None] * jnp.ones((1, 2))
    jax.block_until_ready(dispatch(experts, x, chosen, jnp.ones(chosen.shape)))
    jax.effects_barrier()
    return sorted(notes, key=lambda note: note[0])


class Watched(eqx.Module):
    """A block that does what it does, and notes what came out."""

    block: eqx.Module
    number: jax.Array
    notes: list = eqx.field(static=True)

    def attend(self, *args):
        return self.block.attend(*args)

    def feed(self, x):
        out = self.block.feed(x)

        def note(number, mean):
            self.notes.append((int(number), np.asarray(mean)))
            return np.float32(0)

        tell = lambda *args: io_callback(note, jax.ShapeDtypeStruct((), "float32"), *args)
        mesh = jax.typeof(x).sharding.mesh
        # A callback must know of every axis of the mesh.
        tell = jax.shard_map(
            tell,
            mesh=mesh,
            in_specs=(P(), P()),
            out_specs=P(),
            axis_names=set(mesh.axis_names) - {"pipe"},
            check_vma=False,
        )
        # Added, so that the note is made before anything goes on.
        return out + tell(self.number, jnp.mean(out, axis=0))


def watched(model, notes: list):
    blocks = [Watched(b, jnp.int32(i), notes) for i, b in enumerate(model.layers)]
    return eqx.tree_at(lambda m: m.layers, model, tuple(blocks))


def recognised(notes: list, hidden: np.ndarray, n_stages: int, n_micro: int) -> np.ndarray:
    """`[stage, turn]`: the microbatch that came out of a stage, told by its numbers, which
    must be those of one device; `AGAIN` if the stage had made the same before, `NONSENSE`
    if no microbatch looks like that. `hidden` is `[layer, row, token, feature]`."""
    size = hidden.shape[0] // n_stages
    truth = np.stack([hidden[:, m::n_micro].mean(axis=(1, 2)) for m in range(n_micro)])
    rows = []
    for stage in range(n_stages):
        layer, row = (stage + 1) * size - 1, []
        for number, mean in notes:
            if number == layer:
                gaps = np.abs(truth[:, layer] - mean[None, :]).max(axis=1)
                found = int(gaps.argmin()) if gaps.min() < 1e-4 else NONSENSE
                row.append(AGAIN if found >= 0 and found in row else found)
        rows.append(row)
    return np.array(rows)


# --- figures --------------------------------------------------------------------------


def plot_parameters(rows: dict[str, tuple[dict, dict]]) -> None:
    """For each model, the billions of each part: all of them, and those of one token."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    labels, place = [], 0
    names = list(next(iter(rows.values()))[0])
    colours = dict(zip(names, ["#000000", "#31688e", "#8fd0bf"]))
    for model, (whole, active) in rows.items():
        for kind, parts in (("in memory", whole), ("for one token", active)):
            left = 0
            for name, n in parts.items():
                label = name if place == 0 else None
                axis.barh(place, n / 1e9, left=left, color=colours[name], label=label)
                left += n / 1e9
            axis.text(left + 0.5, place, f"{left:.1f}", va="center", fontsize=12)
            labels.append(f"{model}\n{kind}")
            place += 1
        place += 0.4
    ticks = [i + 0.4 * (i // 2) for i in range(len(labels))]
    axis.set_yticks(ticks, labels, fontsize=11)
    axis.invert_yaxis()
    axis.set(xlabel="parameters (billions)")
    axis.set_xlim(0, 53)
    axis.legend(fontsize=11, loc="upper right")
    axis.grid(axis="y", visible=False)


def plot_reads(batches, curves: dict[str, np.ndarray]) -> None:
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for name, values in curves.items():
        axis.semilogx(batches, values, label=name, base=2, markevery=1, markersize=5)
    axis.set_xticks(batches, batches)
    axis.set(
        xlabel="texts decoded together (one token each)", ylabel="weights read (billions)"
    )
    axis.set_ylim(0, 50)
    axis.legend(fontsize=11, loc="center right")


def plot_blocks(blocks, n_blocks: int, n_experts: int) -> None:
    """The slots of `dispatch`, a row for each block that ran, and for those skipped."""
    block = len(blocks[0][1])
    figure, axis = plt.subplots(figsize=(7, 0.36 * n_blocks + 0.9))
    shades = plt.get_cmap("viridis")(np.linspace(0.15, 0.95, n_experts))
    for row in range(n_blocks):
        expert, tokens = blocks[row] if row < len(blocks) else (None, [-1] * block)
        for slot, token in enumerate(tokens):
            colour = shades[expert] if token >= 0 else "white"
            hatch = "////" if expert is None else None
            axis.add_patch(
                plt.Rectangle((slot, row), 1, 1, fc=colour, ec=GREY, hatch=hatch, lw=0.6)
            )
            if token >= 0:
                light = "white" if expert < 0.6 * n_experts else "black"
                size = 10 if block <= 16 else 6
                axis.text(
                    *(slot + 0.5, row + 0.52, token),
                    ha="center", va="center", fontsize=size, color=light,
                )  # fmt: skip
    labels = [
        f"expert {blocks[i][0]}" if i < len(blocks) else "skipped" for i in range(n_blocks)
    ]
    axis.set_yticks(np.arange(n_blocks) + 0.5, labels, fontsize=11)
    axis.set(
        xlim=(0, block), ylim=(n_blocks, 0), xlabel="slot of the block, with its token"
    )
    axis.grid(False)


def plot_rows(lengths, computed: dict[str, np.ndarray], dropped: dict[str, np.ndarray]):
    figure, axes = plt.subplots(2, 1, figsize=(7, 5.4), sharex=True)
    names = ["blocks", "capacity 1.25", "all experts", "capacity 1", "capacity 2"]
    styles = dict(zip(names, plt.rcParams["axes.prop_cycle"]))  # the same in both panels
    for name, values in computed.items():
        axes[0].plot(lengths, values, label=name, markersize=5, **styles[name])
    for name, values in dropped.items():
        axes[1].plot(lengths, 100 * values, label=name, markersize=5, **styles[name])
    axes[0].set(ylabel="rows computed\nfor each that is needed", ylim=(0, 4.4))
    axes[1].set(xlabel="tokens", ylabel="pairs dropped (%)", ylim=(-1, None))
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(lengths[::2], [f"{n:,}" for n in lengths[::2]])
    axes[0].legend(fontsize=11, loc="center right")
    axes[1].legend(fontsize=11, loc="upper right")


def plot_load(loads: dict[str, np.ndarray], fair: float) -> None:
    """For each way of training, the load of every expert in each layer and in all."""
    figure, axes = plt.subplots(len(loads), 1, figsize=(7, 6.6), sharex=True)
    for axis, (name, load) in zip(axes, loads.items()):
        shown = np.vstack([load, load.mean(axis=0)]) / fair
        image = axis.imshow(shown, vmin=0, vmax=4, aspect="auto", cmap="viridis")
        for place in np.ndindex(shown.shape):
            colour = "black" if shown[place] > 2.2 else "white"
            axis.text(
                *(place[1], place[0], f"{shown[place]:.1f}"),
                ha="center", va="center", fontsize=11, color=colour,
            )  # fmt: skip
        axis.axhline(len(load) - 0.5, color="white", linewidth=3, linestyle="-", marker="")
        labels = [f"layer {i + 1}" for i in range(len(load))]
        axis.set_yticks(range(len(load) + 1), [*labels, "all layers"], fontsize=11)
        axis.set_title(name, fontsize=12)
        axis.grid(False)
    axes[-1].set(xlabel="expert")
    figure.colorbar(image, ax=axes, label="tokens (1.0 is the fair share)")


def plot_map(words, shares: dict[str, np.ndarray]) -> None:
    """For each layer, how much of each expert every token takes."""
    figure, axes = plt.subplots(len(shares), 1, figsize=(7, 5.4), sharex=True)
    for axis, (name, share) in zip(axes, shares.items()):
        image = axis.imshow(share.T, vmin=0, vmax=1, aspect="auto", cmap="Greys")
        axis.set(ylabel=f"{name}\nexpert")
        axis.set_yticks(range(0, share.shape[1]))
        axis.tick_params(axis="y", labelsize=9)
        axis.grid(False)
        axis.set_xticks(np.arange(-0.5, len(words)), minor=True)
        axis.grid(which="minor", color="0.85", linewidth=0.5)
    axes[-1].set_xticks(range(len(words)), words, rotation=90, fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the output")


def plot_parts(norms: np.ndarray) -> None:
    figure, axis = plt.subplots(figsize=(7, 0.35 * len(norms) + 1.6))
    image = axis.imshow(norms, aspect="auto", cmap="Greys", vmin=0)
    axis.set(xlabel="token", ylabel="device")
    axis.set_yticks(range(len(norms)))
    axis.grid(False)
    figure.colorbar(image, label="length of its part")


def _paint(axis, grid: np.ndarray, upto: int | None = None) -> None:
    n_micro = grid.max() + 1
    shades = plt.get_cmap("viridis")(np.linspace(0.2, 0.95, n_micro))
    for stage, turn in np.ndindex(grid.shape):
        value = grid[stage, turn]
        if upto is not None and turn > upto:
            continue
        waste = value < 0
        axis.add_patch(
            plt.Rectangle(
                *((turn + 0.03, stage + 0.05), 0.94, 0.9),
                fc="white" if waste else shades[value],
                ec="0.55",
                hatch="////" if value == AGAIN else "...." if waste else None,
                lw=0.8,
            )  # fmt: skip
        )
        if not waste:
            light = "white" if value < 0.6 * n_micro else "black"
            axis.text(
                *(turn + 0.5, stage + 0.5, str(value)),
                ha="center", va="center", color=light, fontsize=11,
            )  # fmt: skip
    n_stages, turns = grid.shape
    axis.set(xlim=(0, turns), ylim=(n_stages, 0), xlabel="turn")
    axis.set_xticks(np.arange(turns) + 0.5, range(turns))
    axis.set_yticks(np.arange(n_stages) + 0.5, [f"stage {s}" for s in range(n_stages)])
    axis.grid(False)


def plot_schedule(grid: np.ndarray) -> None:
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(grid) + 1.5))
    _paint(axis, grid)
    handles = [
        plt.Rectangle((0, 0), 1, 1, fc="white", ec="0.55", hatch=hatch)
        for hatch in ("....", "////")
    ]
    labels = ["made from zeros", "made once more"]
    place = dict(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=11)
    axis.legend(handles, labels, **place)


def plot_microbatches(counts, wasted, formula, reads) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.8), sharex=True)
    axes[0].plot(counts, 100 * formula, label="(p - 1) / (m + p - 1)", marker="")
    axes[0].plot(
        list(wasted), [100 * share for share in wasted.values()], "o",
        color="#b5367a", label="counted in the package", linestyle="",
    )  # fmt: skip
    axes[0].set(ylabel="stage runs wasted (%)", ylim=(0, None))
    axes[0].legend(fontsize=11)
    axes[1].plot(counts, reads)
    axes[1].set(
        xlabel="microbatches m",
        ylabel="experts read by a\nlayer in all turns",
        ylim=(0, None),
    )
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(counts, counts)


def film(grid: np.ndarray, path: str) -> str:
    """The schedule as a moving picture, a frame for each turn. It tells the schedule."""
    turns = range(grid.shape[1])
    frames = lambda: (_frame(grid, turn) for turn in turns)
    return nb.film(path, str(grid.tolist()), frames, [*[900] * (len(turns) - 1), 2500])


def _frame(grid: np.ndarray, turn: int) -> Image.Image:
    """Above, who is where in this turn; below, the turns up to now."""
    n_stages, turns = grid.shape
    n_micro = grid.max() + 1
    shades = plt.get_cmap("viridis")(np.linspace(0.2, 0.95, n_micro))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(6.4, 4.4), height_ratios=(1.2, 2), dpi=80
    )
    done = [m for m in range(n_micro) if m in grid[-1, :turn]]
    waiting = [m for m in range(n_micro) if m not in grid[0, : turn + 1]]
    queue = lambda x, step, numbers: [(x + step * i, m) for i, m in enumerate(numbers)]
    for stage in range(n_stages):
        above.add_patch(plt.Rectangle((stage, 0), 0.86, 1, fc="white", ec="0.3", lw=1.5))
        above.text(stage + 0.43, 1.12, f"stage {stage}", ha="center", fontsize=12)
        value = grid[stage, turn]
        if value < 0:
            word = "zeros" if value == NONSENSE else f"{n_micro - 1}\nagain"
            place = dict(ha="center", va="center", color="0.25", fontsize=10)
            above.text(stage + 0.43, 0.5, word, **place)
        if stage + 1 < n_stages:
            above.annotate(
                "", (stage + 1, 0.5), (stage + 0.86, 0.5), arrowprops={"arrowstyle": "->"}
            )
    tiles = [(s + 0.43, grid[s, turn]) for s in range(n_stages) if grid[s, turn] >= 0]
    tiles += queue(-0.25, -0.4, waiting) + queue(n_stages + 0.15, 0.4, done[::-1])
    for x, m in tiles:
        box = dict(boxstyle="round,pad=0.35", fc=shades[m], ec="0.2")
        light = "white" if m < 0.6 * n_micro else "black"
        above.text(x, 0.5, str(m), ha="center", va="center", color=light, bbox=box)
    reach = 0.4 * n_micro + 0.1
    above.set(xlim=(-reach, n_stages + reach), ylim=(-0.1, 1.4))
    above.axis("off")
    above.set_title(f"turn {turn}: waiting, at work, done", fontsize=11)
    _paint(below, grid, upto=turn)
    return nb.as_image(figure).quantize(64)


def expert_rows(chosen: np.ndarray, n_experts: int) -> tuple[int, int]:
    """Rows computed for such choices, and how often an expert's weights are read, by the
    rule of `block_sizes`."""
    block, _ = block_sizes(chosen.size, n_experts)
    blocks = sum(-(-n // block) for n in np.bincount(chosen.ravel(), minlength=n_experts))
    return int(blocks * block), int(blocks)
