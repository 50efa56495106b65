"""Trains a model."""

import argparse
import contextlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config import ModelConfig
from ..devices.processes import wait_for_all
from ..devices.sharding import shard
from ..files import export
from ..files.atomic import check_new, locked
from ..files.folders import read_config
from ..learning.examples import slices_of
from ..learning.tokenizers import train_tokenizer
from ..text import TINY_MISTRAL
from ..tokenizer import Tokenizer, check_vocabulary
from ..transformer import Transformer
from .options import add_corpus, add_devices, adder, check_counts, mesh_of
from .terminal import read_text, split_held_out


HELP = (
    "train a model, and its tokenizer, from texts; a killed run goes on if it is started "
    "again with the same options"
)
EXAMPLE = "train my_mistral --steps 4000"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    add_corpus(parser)
    add(
        "--params",
        metavar="FOLDER",
        default=TINY_MISTRAL,
        help="a folder whose params.json says the shape of the model",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help="use this tokenizer.model instead of training one",
    )
    add("--steps", type=int, default=4000, metavar="N", help="how many steps to train")
    add("--batch-size", type=int, default=8, metavar="N", help="sequences in a step")
    add("--seq-len", type=int, default=256, metavar="N", help="tokens in a sequence")
    add(
        "--learning-rate",
        type=float,
        default=3e-3,
        metavar="RATE",
        help="the highest learning rate, behind the warm-up",
    )
    add("--seed", type=int, default=0, metavar="N", help="another seed, another model")
    add_devices(parser)


def run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    check_new(out)
    check_counts(options, "batch_size", "seq_len")
    config = read_config(options.params)
    mesh = mesh_of(options)
    texts = [split_held_out(read_text(file)) for file in options.corpus]
    if options.tokenizer is not None:
        check_vocabulary(Tokenizer(options.tokenizer), config.vocab_size)
    # Beside the target until the model is done: its checkpoint lets a run go on.
    work = out.with_name(out.name + ".training")
    # Of several processes one writes, and all read.
    writes = jax.process_index() == 0
    with locked(work) if writes else contextlib.nullcontext():
        _train(options, config, mesh, texts, out, work)


def _train(
    options: argparse.Namespace,
    config: ModelConfig,
    mesh: Mesh | None,
    texts: list[tuple[str, str]],
    out: Path,
    work: Path,
) -> None:
    from ..learning.fitting import fit

    tokenizer_path, checkpoint = work / "tokenizer.model", work / "checkpoint.eqx"
    writes = jax.process_index() == 0
    if writes and options.tokenizer is not None:
        given = Path(options.tokenizer).read_bytes()
        if checkpoint.exists() and tokenizer_path.read_bytes() != given:
            raise ValueError(
                f"{work} holds a run with another tokenizer. Start the command of that run "
                "again, or move the folder."
            )
        tokenizer_path.write_bytes(given)
    elif writes and not checkpoint.exists():
        # What an attempt without one has left may be of other texts.
        learnt = "\n".join(text for text, _ in texts)
        train_tokenizer(learnt, tokenizer_path, vocab_size=config.vocab_size)
    wait_for_all("tokenizer")
    tokenizer = Tokenizer(tokenizer_path)
    check_vocabulary(tokenizer, config.vocab_size)

    def slices(name, texts):
        return slices_of(name, texts, tokenizer, seq_len=options.seq_len)

    model = Transformer(config, key=jax.random.key(options.seed))
    model = fit(
        model if mesh is None else shard(model, mesh),
        slices("the text", [text for text, _ in texts]),
        slices("the held-out text", [text for _, text in texts]),
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        checkpoint=checkpoint,
    )
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    export.save(model, out, tokenizer=tokenizer_path)
    if writes:
        shutil.rmtree(work)
