"""The loop around a training step, which goes on after it was killed."""

import collections
import contextlib
import json
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .. import arguments
from ..devices.processes import any_process, to_host
from ..devices.sharding import n_row_groups, shard_rows
from .batches import Batch, Labelled, LabelledRows, Packed, Slices
from .checkpoints import read_checkpoint, write_checkpoint
from .lora import LoRALinear, linear_layers
from .training import (
    Model,
    Outcome,
    TrainState,
    evaluate,
    make_optimizer,
    make_schedule,
    start,
    train_step,
)


Data = Slices | Packed | LabelledRows


def fit(
    model: Model,
    data: Data,
    held_out: Data | None,
    *,
    steps: int,
    batch_size: int = 8,
    parts: int = 1,
    learning_rate: float = 2e-3,
    warmup: int = 200,
    weight_decay: float = 0.1,
    recompute: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 250,
    checkpoint_minutes: float | None = None,
    log: str | os.PathLike | None = None,
) -> Model:
    """Trains a model to predict each token from those before it, or a classifier to predict
    labels. Its adapter is trained if it has one (see [`add_lora`][mistral_eqx.add_lora]),
    and otherwise all of it.

    **Arguments:**

    - `model`: where to start. Trained float32 arrays are donated: use the model that is
        returned. A bfloat16 model is trained with float32 copies of its weights.
    - `data`, `held_out`: what to learn from, and what is only ever measured.
    - `steps`, `batch_size`: how much to train; `steps` counts from the start of the run,
        those before an interruption included.
    - `parts`, `recompute`: see [`train_step`][]; both save memory.
    - `learning_rate`, `warmup`, `weight_decay`: see [`make_optimizer`][].
    - `seed`: for the choice of rows.
    - `checkpoint`: a file for the state of the run. If it is there, the run goes on from
        it, or from the one before it, if it is damaged. Ctrl-C writes it too.
    - `checkpoint_every`: steps from one checkpoint, and one held-out loss, to the next.
    - `checkpoint_minutes`: write a checkpoint also after so many minutes.
    - `log`: a file that gets a JSON object a line, for every step.

    **Returns:**

    The trained model.

    **Raises:**

    `ValueError` for an option outside its range, if the checkpoint is of another run (other
    arguments, data or model), or if the model is quantized and has no adapter;
    [`Diverged`][], which is a `ValueError`, if the loss is no number any more.
    """
    integer = arguments.integer
    steps, warmup = integer("steps", steps), integer("warmup", warmup)
    batch_size = integer("batch_size", batch_size, least=1)
    parts = integer("parts", parts, least=1)
    checkpoint_every = integer("checkpoint_every", checkpoint_every, least=1)
    seed = integer("seed", seed, most=2**63 - 1)
    learning_rate = arguments.number("learning_rate", learning_rate)
    if not 0 < learning_rate < np.inf:
        raise ValueError(f"learning_rate must be above 0, got {learning_rate}.")
    if batch_size % parts != 0:
        raise ValueError(
            f"batch_size ({batch_size}) cannot be divided into {parts} parts: make it a "
            "multiple of that."
        )
    groups = n_row_groups(model)
    if batch_size // parts % groups != 0:
        raise ValueError(
            f"batch_size ({batch_size}) cannot be divided among {parts} x the {groups} "
            "groups of devices along the mesh's data and fsdp: make it a multiple of that."
        )
    rates = {"learning_rate": learning_rate, "steps": steps, "warmup": warmup}
    optimizer = make_optimizer(**rates, weight_decay=weight_decay)
    schedule = make_schedule(**rates)
    frozen, state = start(model, optimizer)
    run = {
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": data.seq_len,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "parts": parts,
        "seed": seed,
        "dtype": state.dtype.name,
        "text": data.checksum,
        "adapter": _adapter(model, frozen),
    }
    if checkpoint is not None:
        checkpoint = Path(arguments.path("checkpoint", checkpoint))
        stored = read_checkpoint(checkpoint, state, run)
        state = state if stored is None else stored
    begun, written = int(state.step), time.monotonic()

    def place(batch: Batch | Labelled) -> Batch | Labelled:
        here = eqx.combine(state.weights, frozen)  # the model's own may be gone
        return shard_rows(jax.tree.map(jnp.asarray, batch), here)

    def measure(done: int) -> None:
        told.held_out(done, _held_out_loss(frozen, state, held_out, batch_size, place))

    options = {"parts": parts, "recompute": recompute}
    log = _Log(log, begun)
    told = _Told(log, steps, begun, schedule, batch_size * data.seq_len, checkpoint)
    with told, _interruptible() as interrupted:
        if held_out is not None and begun == 0:
            measure(0)
        for step in range(begun, steps):
            batch = place(data.batch(batch_size, seed=seed, step=step))
            state, outcome = train_step(frozen, state, batch, optimizer, **options)
            done = step + 1
            told.step(done, outcome)
            is_due = done % checkpoint_every == 0 or done == steps
            if is_due and held_out is not None:
                told.finish()
                measure(done)
            minutes = (time.monotonic() - written) / 60
            is_late = checkpoint_minutes is not None and minutes > checkpoint_minutes
            stops, is_late = any_process(bool(interrupted), is_late)
            if is_due or stops or is_late:
                told.finish()
                if checkpoint is not None:
                    write_checkpoint(checkpoint, state, run)
                written = time.monotonic()
            if stops:
                raise KeyboardInterrupt
    return state.model(frozen)


class Diverged(ValueError):
    """The loss is no number any more."""

    def __init__(self, step: int, loss: float, checkpoint: Path | None):
        kept = ""
        if checkpoint is not None and checkpoint.exists():
            kept = f" The last good checkpoint is kept in {checkpoint}."
        super().__init__(
            f"At step {step} the loss or its gradient is no number (loss {loss}): training "
            f"has diverged. Lower the learning rate.{kept}"
        )


def _held_out_loss(
    frozen: Model,
    state: TrainState,
    held_out: Data,
    batch_size: int,
    place: Any,
) -> float:
    """The mean loss of a token."""
    found = [evaluate(frozen, state, place(b)) for b in held_out.measured(batch_size)]
    totals, counts = zip(*to_host(found))
    return float(sum(map(float, totals)) / max(1, sum(map(int, counts))))


def _adapter(model: Model, frozen: Model) -> list[Any]:
    """What an adapter and its base are, beside the numbers that are trained: `[]` without
    one. Of each frozen array the first row says which it is."""
    scales = [(n, v.scale) for n, v in linear_layers(model) if isinstance(v, LoRALinear)]
    if not scales:
        return []
    arrays = [leaf for leaf in jax.tree.leaves(frozen) if eqx.is_array(leaf)]
    rows = jax.jit(lambda leaves: [leaf[(0,) * (leaf.ndim - 1)] for leaf in leaves])(arrays)
    base = zlib.crc32(b"".join(row.tobytes() for row in to_host(rows)))
    return [zlib.crc32(repr(scales).encode()), base]


@contextlib.contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Yields a list, which is not empty any more once Ctrl-C was pressed. A second one
    interrupts at once."""
    pressed: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Told:
    """Tells what the steps have found, on a progress bar and in a log."""

    def __init__(
        self,
        log: "_Log",
        steps: int,
        begun: int,
        schedule: Callable[[int], float],
        tokens: int,
        checkpoint: Path | None,
    ):
        self._log, self._schedule, self._tokens = log, schedule, tokens
        self._checkpoint, self._shown = checkpoint, {}
        # What a step has found is fetched when the next one is under way.
        self._pending: tuple[int, Outcome] | None = None
        self._bar = tqdm(
            total=steps, initial=begun, unit="step", desc="train", disable=None
        )
        # When the last steps began.
        self._times = collections.deque([(begun, time.monotonic())], maxlen=11)

    def __enter__(self) -> None:
        self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def step(self, done: int, outcome: Outcome) -> None:
        """A step is under way. The one before it is told."""
        self.finish()
        self._pending = done, outcome
        self._times.append((done, time.monotonic()))
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update()

    def finish(self) -> None:
        """Waits for the step that is under way. Raises [`Diverged`][] if its loss is no
        number."""
        if self._pending is None:
            return
        (done, outcome), self._pending = self._pending, None
        value, norm = (float(x) for x in to_host((outcome.loss, outcome.grad_norm)))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Diverged(done, value, self._checkpoint)
        (first, began), (last, now) = self._times[0], self._times[-1]
        rate = self._tokens * (last - first) / max(now - began, 1e-9)
        found = {"learning_rate": float(self._schedule(done - 1)), "grad_norm": norm}
        self._log.add(done, loss=value, **found, tokens_per_second=round(rate, 1))
        self._shown |= {"loss": f"{value:.3f}", "tokens/s": f"{rate:,.0f}"}

    def held_out(self, done: int, value: float) -> None:
        self._log.add(done, held_out=value)
        self._shown["held out"] = f"{value:.3f}"
        self._times.clear()
        self._times.append((done, time.monotonic()))


class _Log:
    """A file with a JSON object a line. Lines of steps that are made again are dropped."""

    def __init__(self, path: str | os.PathLike | None, begun: int):
        self._path = None if path is None or jax.process_index() > 0 else Path(path)
        if self._path is None:
            return
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= begun:
                        kept.append(line)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._path)

    def add(self, step: int, **values: float) -> None:
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
