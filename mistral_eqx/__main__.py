"""The command line: `python -m mistral_eqx COMMAND --help`."""

import argparse
import lzma
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .text import TINY_MISTRAL, load


CORPUS = (
    TINY_MISTRAL / "corpus" / "shakespeare.txt.xz",
    TINY_MISTRAL / "corpus" / "king_james_bible.txt.xz",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 2 for an error of the user's, which
    is told in one line, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has seen enough. Python would complain once more
            # when it closes standard output at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"mistral_eqx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> None:
    from .text import generate

    model, tokenizer = load(options.model)
    prompts = [
        "This is a test",
        "This is another test",
        "This is a third test, mistral AI is very good at testing. ",
    ]
    for completion in generate(model, tokenizer, prompts, max_tokens=options.max_tokens):
        print(completion)
        print("=====================")


def _evaluate(options: argparse.Namespace) -> None:
    from .generation import score

    text = read_text(options.file)
    if options.held_out:
        _, text = split_held_out(text)
    if not text:
        raise ValueError(f"{options.file} is empty.")
    model, tokenizer = load(options.model)
    scores = score(model, tokenizer.encode(text))
    nats, size = -float(np.sum(scores, dtype=np.float64)), len(text.encode())
    print(f"tokens          {len(scores)}")
    print(f"bytes           {size}")
    print(f"nats per token  {nats / len(scores):.4f}")
    print(f"bits per byte   {nats / math.log(2) / size:.4f}")


def _convert(options: argparse.Namespace) -> None:
    from .export import convert

    convert(
        options.source,
        options.target,
        format=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        force=options.force,
    )


def _inspect(options: argparse.Namespace) -> None:
    from .inspection import inspect_folder

    for name, value in inspect_folder(options.folder).items():
        print(f"{name:<12}{value}")


def _train(options: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from .checkpoint import read_config
    from .export import save
    from .tokenizer import Tokenizer, check_vocabulary, train_tokenizer
    from .training import fit
    from .transformer import Transformer

    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already. Move it, or train elsewhere.")
    config = read_config(options.params)
    texts = [split_held_out(read_text(file)) for file in options.corpus]
    if options.tokenizer is not None:
        check_vocabulary(Tokenizer(options.tokenizer), config.vocab_size)
    # Beside the target until the model is done: its checkpoint lets a run go on.
    work = out.with_name(out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_path, checkpoint = work / "tokenizer.model", work / "checkpoint.eqx"
    if options.tokenizer is not None:
        shutil.copyfile(options.tokenizer, tokenizer_path)
    elif not checkpoint.exists():
        # What an attempt without one has left may be of other texts.
        learnt = "\n".join(text for text, _ in texts)
        train_tokenizer(learnt, tokenizer_path, vocab_size=config.vocab_size)
    tokenizer = Tokenizer(tokenizer_path)
    check_vocabulary(tokenizer, config.vocab_size)

    def encode(texts):
        ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        return np.concatenate([np.asarray(row, np.int32) for row in ids])

    model = fit(
        Transformer(config, key=jax.random.key(options.seed)),
        encode([text for text, _ in texts]),
        encode([text for _, text in texts]),
        bos_id=tokenizer.bos_id,
        steps=options.steps,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        learning_rate=options.learning_rate,
        seed=options.seed,
        checkpoint=checkpoint,
    )
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    save(model, out, tokenizer=tokenizer_path)
    shutil.rmtree(work)


def _train_tokenizer(options: argparse.Namespace) -> None:
    from .tokenizer import train_tokenizer

    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already. Move it, or train elsewhere.")
    texts = [split_held_out(read_text(file))[0] for file in options.corpus]
    train_tokenizer("\n".join(texts), out, vocab_size=options.vocab_size)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, which may be compressed with xz. Raises `ValueError` if it is
    not text, or damaged."""
    path = Path(path)
    open_text = lzma.open if path.suffix == ".xz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def split_held_out(text: str) -> tuple[str, str]:
    """The first nine tenths of a text to train on, and the last to measure with."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mistral_eqx", description="Mistral in JAX and Equinox."
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help, example):
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example: python -m mistral_eqx {example}",
        )
        sub.set_defaults(run=run)
        return sub

    def add_model(sub):
        sub.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="folder of a model; the embedded one by default",
        )

    def add_corpus(sub):
        sub.add_argument(
            "--corpus",
            nargs="+",
            metavar="FILE",
            default=CORPUS,
            help="texts, plain or .xz, of which the last tenth is held out; "
            "by default the embedded Shakespeare and King James Bible",
        )

    demo = command("demo", _demo, "continue three prompts", "demo --max_tokens 35")
    add_model(demo)
    demo.add_argument("--max_tokens", type=int, default=35, metavar="N")

    evaluate = command(
        "evaluate",
        _evaluate,
        "measure how well a model predicts a text",
        "evaluate --held-out mistral_eqx/tiny_mistral/corpus/shakespeare.txt.xz",
    )
    evaluate.add_argument("file", metavar="FILE", help="a text, plain or .xz")
    add_model(evaluate)
    evaluate.add_argument(
        "--held-out",
        action="store_true",
        help="only the last tenth, which training never sees",
    )

    convert = command(
        "convert",
        _convert,
        "write a model in the other format, or in another dtype",
        "convert mistral-7B-v0.3 mistral-7B-v0.3-hf --to huggingface",
    )
    convert.add_argument("source", metavar="SRC", help="folder of a model")
    convert.add_argument("target", metavar="DST", help="folder to make")
    convert.add_argument(
        "--to",
        choices=["mistral", "huggingface"],
        help="format to write; the one that SRC is not by default",
    )
    convert.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; SRC's by default",
    )
    convert.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="most bytes in a file of Hugging Face's format (5GB); Mistral's is one file",
    )
    convert.add_argument(
        "--force", action="store_true", help="replace a model that is in DST"
    )

    inspect = command(
        "inspect",
        _inspect,
        "say what is in a folder, without reading its weights",
        "inspect mistral-7B-v0.3",
    )
    inspect.add_argument("folder", metavar="FOLDER", help="folder of a model")

    train = command(
        "train",
        _train,
        "train a model, and its tokenizer, from texts; a killed run goes on if started "
        "again with the same options",
        "train my_mistral --steps 6000",
    )
    train.add_argument("out", metavar="OUT", help="folder to make")
    add_corpus(train)
    train.add_argument(
        "--params",
        metavar="FOLDER",
        default=TINY_MISTRAL,
        help="folder of the params.json to follow; the embedded model's by default",
    )
    train.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="a tokenizer.model to use, instead of training one",
    )
    train.add_argument("--steps", type=int, default=6000, metavar="N")
    train.add_argument("--batch_size", type=int, default=8, metavar="N")
    train.add_argument("--seq_len", type=int, default=256, metavar="N")
    train.add_argument("--learning_rate", type=float, default=3e-3, metavar="RATE")
    train.add_argument("--seed", type=int, default=0, metavar="N")

    train_tokenizer = command(
        "train-tokenizer",
        _train_tokenizer,
        "train a tokenizer with Mistral's settings",
        "train-tokenizer my_tokenizer.model --vocab_size 2048",
    )
    train_tokenizer.add_argument("out", metavar="OUT", help="file to make")
    add_corpus(train_tokenizer)
    train_tokenizer.add_argument("--vocab_size", type=int, default=2048, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
