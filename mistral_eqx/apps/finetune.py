"""Trains a model further: a LoRA adapter for it, or all of it."""

import argparse
import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ..arguments import in_units
from ..devices.sharding import rows_here, settled
from ..files.adapted import load_adapter, save_adapter
from ..files.adapter_export import PEFT
from ..files.atomic import check_new, locked
from ..files.checkpoint import load_model, open_trunk
from ..files.export import save
from ..files.folders import GGUF, MISTRAL
from ..files.heads import (
    is_classifier,
    labels_of,
    load_classifier,
    load_embedder,
    save_classifier,
)
from ..files.inspection import step_bytes
from ..heads.classifier import Classifier
from ..learning.batches import LabelledRows, Packed, Slices
from ..learning.examples import (
    check_share,
    has_labels,
    read_examples,
    read_labelled,
    slices_of,
    split,
)
from ..learning.lora import LAYERS, add_lora, has_lora, merge_lora, trainable
from ..tokenizer import Tokenizer, load_checked_tokenizer
from ..transformer import Transformer
from .options import (
    add_devices,
    add_dtype,
    add_model,
    add_quantize,
    adder,
    check_counts,
    check_unused,
    folder_of,
    given,
    mesh_of,
)
from .terminal import read_text


HELP = (
    "train a model further, on texts or conversations; a killed run goes on if it is "
    "started again with the same options"
)
EXAMPLE = "finetune my_adapter --model mistral-7B-v0.3 --data conversations.jsonl"
LEARNING_RATES = {"adapter": 2e-4, "model": 1e-5}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    parser.add_argument(
        "out", metavar="OUT", help="the folder to make, of an adapter or of a model"
    )
    add_model(parser)
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.jsonl files, each line with a "text", with "messages", or with a "text" and '
        'a "label"; or texts, plain or .xz',
    )
    add(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="the share of the data to measure the loss on: examples chosen at random, or "
        "the end of each text",
    )
    _add_adapter(parser)
    add("--epochs", type=float, default=1.0, metavar="N", help="how often to see the data")
    add("--steps", type=int, metavar="N", help="how many steps to train, instead")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences in a step")
    add("--seq-len", type=int, default=512, metavar="N", help="tokens in a sequence")
    add(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="the highest learning rate, behind the warm-up (default: 2e-4 for an adapter, "
        "1e-5 for all of a model)",
    )
    add("--warmup", type=int, metavar="N", help="steps up to it (default: a twentieth)")
    add("--weight-decay", type=float, default=0.1, metavar="X", help="that of AdamW")
    add("--seed", type=int, default=0, metavar="N", help="another seed, another model")
    add("--checkpoint-every", type=int, default=250, metavar="N", help="steps between two")
    add(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="minutes after which to write one anyway",
    )
    add("--dry-run", action="store_true", help="say what would happen, and stop")
    memory = parser.add_argument_group("memory", "For models that hardly fit.")
    add_quantize(memory)
    add_dtype(memory, "the dtype of the weights that are not trained")
    add = adder(memory)
    add("--parts", type=int, default=1, metavar="N", help="split a batch into N parts")
    add(
        "--recompute",
        action="store_true",
        help="compute the insides of each layer again for the gradient: a third more work",
    )
    add_devices(parser)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter", "What is trained.")
    add = adder(group)
    # What is not given here is left to `add_lora` and `save_adapter`.
    add("--lora-rank", type=int, metavar="N", help="rank of a new adapter (default: 16)")
    add("--lora-scale", type=float, metavar="X", help="its scale (default: 2.0)")
    add(
        "--layers",
        metavar="PATTERN",
        help="a regular expression for the names of the layers that it is for (default: "
        f"{LAYERS})",
    )
    add("--adapter", metavar="FOLDER", help="train this adapter further, and no new one")
    add("--full", action="store_true", help="train all of the model, without an adapter")
    add("--format", choices=[PEFT, MISTRAL], help="that of OUT's adapter (default: peft)")


def run(options: argparse.Namespace) -> None:
    try:
        import optax  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Training needs optax: pip install 'mistral_eqx[train]'."
        ) from error
    out = Path(options.out)
    check_new(out)
    of_a_new_one = ("lora_rank", "lora_scale", "layers")
    if options.full:
        why = "with --full, which trains all weights"
        check_unused(options, why, "adapter", "quantize", *of_a_new_one, "format")
    if options.adapter is not None:
        check_unused(options, "for an adapter that is there", *of_a_new_one)
    if not 0 < options.epochs < math.inf:
        raise ValueError(f"--epochs must be above 0, got {options.epochs}.")
    check_counts(options, "batch_size", "seq_len", "parts")
    kind = _kind(options)
    tokenizer = load_checked_tokenizer(folder_of(options))
    data, held_out, labels = _read(options, kind, tokenizer)
    model = _model(options, kind, labels)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
    elif not options.full:
        shape = {"rank": options.lora_rank, "scale": options.lora_scale}
        shape = given(shape | {"layers": options.layers})
        model = add_lora(model, **shape, key=jax.random.key(options.seed))
    steps = options.steps
    if steps is None:
        steps = max(1, round(options.epochs * data.n_rows / options.batch_size))
    _tell(model, data, steps, options)
    if options.dry_run:
        return
    work = out.with_name(out.name + ".training")
    # Of several processes one writes, and all read.
    writes = jax.process_index() == 0
    with locked(work) if writes else contextlib.nullcontext():
        try:
            _train(options, model, tokenizer, data, held_out, steps, out, work)
        except KeyboardInterrupt:
            if writes:
                print(
                    f"What was learnt is in {work}. Start the command again to go on.",
                    file=sys.stderr,
                )
            raise


def _kind(options: argparse.Namespace) -> str:
    """What the data are: "texts", "examples" or "labels"."""
    for file in options.data:
        if ".json" in Path(file).name.lower() and Path(file).suffix != ".jsonl":
            raise ValueError(
                f"{file} is read as text by its name. Examples are read from files whose "
                "names end in .jsonl: unpack it, or rename it."
            )
    kinds = {Path(file).suffix == ".jsonl" for file in options.data}
    if len(kinds) == 2:
        raise ValueError("--data has texts and .jsonl files: give one kind.")
    if kinds == {False}:
        return "texts"
    if not has_labels(options.data[0]):
        if is_classifier(folder_of(options)):
            raise ValueError(
                f"{folder_of(options)} is a classifier: each line of {options.data[0]} "
                'must have a "label".'
            )
        return "examples"
    check_unused(options, "for a classifier, which is saved whole", "adapter", "format")
    return "labels"


def _model(
    options: argparse.Namespace, kind: str, labels: tuple[str, ...]
) -> Transformer | Classifier:
    asked = {"dtype": options.dtype, "quantize": options.quantize}
    asked["mesh"] = mesh_of(options)
    folder = folder_of(options)
    if kind != "labels":
        # An adapter is trained further, and not merged.
        return load_model(folder, **asked)
    if options.quantize is not None:
        raise ValueError("A classifier is saved as a whole: give no --quantize.")
    if not is_classifier(folder):
        model, _ = load_embedder(folder, **asked)
        return settled(Classifier(model, labels, key=jax.random.key(options.seed)))
    return load_classifier(folder, **asked)[0]


def _train(
    options: argparse.Namespace,
    model: Transformer | Classifier,
    tokenizer: Tokenizer,
    data: Any,
    held_out: Any,
    steps: int,
    out: Path,
    work: Path,
) -> None:
    from ..learning.fitting import fit

    log, writes = work / "log.jsonl", jax.process_index() == 0
    rate, warmup = options.learning_rate, options.warmup
    if rate is None:
        rate = LEARNING_RATES["adapter" if has_lora(model) else "model"]
    model = fit(
        model,
        data,
        held_out,
        steps=steps,
        batch_size=options.batch_size,
        parts=options.parts,
        learning_rate=rate,
        warmup=max(1, steps // 20) if warmup is None else warmup,
        weight_decay=options.weight_decay,
        recompute=options.recompute,
        seed=options.seed,
        checkpoint=work / "checkpoint.eqx",
        checkpoint_every=options.checkpoint_every,
        checkpoint_minutes=options.checkpoint_minutes,
        log=log,
    )
    companions = {"log.jsonl": log.read_bytes()} if writes else {}
    _save(options, model, tokenizer, out, companions)
    if writes:
        measured = [line["held_out"] for line in _lines(log) if "held_out" in line]
        if measured:
            before, after = measured[0], measured[-1]
            what = "label" if isinstance(model, Classifier) else "token"
            print(f"held out    {before:.4f} to {after:.4f} nats a {what}")
        shutil.rmtree(work)


def _save(
    options: argparse.Namespace,
    model: Transformer | Classifier,
    tokenizer: Tokenizer,
    out: Path,
    companions: dict[str, bytes],
) -> None:
    """The adapter alone, or all of the model in the dtype and format of its folder."""
    source = folder_of(options)
    if has_lora(model) and not isinstance(model, Classifier):
        names = given({"format": options.format, "base": str(source)})
        save_adapter(model, out, **names, companions=companions)
        return
    checkpoint = open_trunk(source)
    files = {"dtype": checkpoint.dtype, "tokenizer": tokenizer, "companions": companions}
    if isinstance(model, Classifier):
        save_classifier(merge_lora(model), out, **files)
    else:
        format = MISTRAL if checkpoint.format == GGUF else checkpoint.format
        save(model, out, **files, format=format)


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _read(
    options: argparse.Namespace, kind: str, tokenizer: Tokenizer
) -> tuple[Any, Any, tuple[str, ...]]:
    """What to learn from, what to measure with, and the names of the labels."""
    share, seq_len = options.held_out, options.seq_len
    if kind == "texts":
        return (*_read_texts(options, tokenizer), ())
    if seq_len < 1:
        raise ValueError(f"seq_len must be 1 or more, got {seq_len}.")
    read = read_labelled if kind == "labels" else read_examples
    examples = [
        example
        for file in options.data
        for example in read(file, tokenizer, seq_len=seq_len)
    ]
    if kind == "examples":
        parts = split(examples, share)
        data, held_out = (Packed(p, seq_len=seq_len) if p else None for p in parts)
        return data, held_out, ()
    folder = folder_of(options)
    found = {label for _, label in examples}
    labels = labels_of(folder) if is_classifier(folder) else tuple(sorted(found))
    if unknown := sorted(found - set(labels)):
        raise ValueError(
            f"The data have the label {unknown[0]!r}, which {folder} does not: its labels "
            f"are {', '.join(labels)}."
        )
    parts = split([(ids, labels.index(label)) for ids, label in examples], share)
    data, held_out = (LabelledRows(p) if p else None for p in parts)
    return data, held_out, labels


def _read_texts(
    options: argparse.Namespace, tokenizer: Tokenizer
) -> tuple[Slices, Slices | None]:
    share = options.held_out
    check_share(share)
    texts = [read_text(file) for file in options.data]
    cuts = [round((1 - share) * len(text)) for text in texts]

    def slices(name: str, parts: list[str]) -> Slices:
        return slices_of(name, parts, tokenizer, seq_len=options.seq_len)

    data = slices("The text", [text[:cut] for text, cut in zip(texts, cuts)])
    if share == 0:
        return data, None
    return data, slices("The held-out text", [t[cut:] for t, cut in zip(texts, cuts)])


def _tell(model: eqx.Module, data: Any, steps: int, options: argparse.Namespace) -> None:
    """Says what will happen, on standard error."""
    if jax.process_index() > 0:
        return
    trained, _ = eqx.partition(model, trainable(model))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    n, n_all = count(trained), count(model)
    what = "all of the model" if options.full else "an adapter"
    tokens = steps * options.batch_size * data.seq_len
    weights = _bytes_here(model)
    # A gradient and two moments, and float32 copies of what is in another dtype.
    copies = sum(
        (12 + (0 if leaf.dtype == np.float32 else 4)) * _part(leaf)
        for leaf in jax.tree.leaves(trained)
    )
    work = step_bytes(
        model.config,
        rows=rows_here(options.batch_size // options.parts, model),
        seq_len=data.seq_len,
        dtype=model.dtype,
        # XLA for a CPU keeps what need not be kept.
        recompute=options.recompute and jax.default_backend() != "cpu",
    )
    for name, told in {
        "trains": f"{n:,} parameters of {n_all:,} ({100 * n / n_all:.2f}%), {what}",
        "data": data.told,
        "steps": f"{steps:,} of {options.batch_size} x {data.seq_len} tokens: {tokens:,}",
        "memory": f"{in_units(weights)} of weights, {in_units(copies)} of gradients and "
        f"moments, and about {in_units(work)} for a step, on each device",
    }.items():
        print(f"{name:<12}{told}", file=sys.stderr)


def _part(leaf: jax.Array) -> int:
    """How many numbers of an array a device holds."""
    return leaf.addressable_shards[0].data.size


def _bytes_here(tree: PyTree[jax.Array]) -> int:
    return sum(_part(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
