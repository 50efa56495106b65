"""The command line: `python -m mistral_eqx COMMAND --help`."""

import argparse
import contextlib
import dataclasses
import io
import json
import lzma
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from .devices.mesh import AXES, make_mesh, parse_mesh
from .devices.processes import connect, wait_for_all
from .devices.sharding import shard
from .sampling import Sampling
from .text import TINY_MISTRAL, load
from .tokenizer import Tokenizer
from .transformer import Transformer


CORPUS = (
    TINY_MISTRAL / "corpus" / "shakespeare.txt.xz",
    TINY_MISTRAL / "corpus" / "king_james_bible.txt.xz",
)
RULE = "====================="
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 2 for an error of the user's, which
    is told in one line, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    if not options.no_compilation_cache:
        _keep_programs()
    try:
        with contextlib.redirect_stdout(_output(options)):
            options.run(options)
            sys.stdout.flush()
        return 0
    except jax.errors.JaxRuntimeError as error:
        if options.debug or jax.process_count() == 1:
            raise
        _complain(f"Process {jax.process_index()} cannot go on without the others: {error}")
        # The others will not come to say goodbye, which JAX would wait for.
        os._exit(1)
    except (ValueError, OSError, ImportError) as error:
        if options.debug:
            raise
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has seen enough. Python would complain once more
            # when it closes standard output at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _keep_programs() -> None:
    """Compiled programs are kept in the user's cache folder for the next time, unless JAX
    was told of another folder (`JAX_COMPILATION_CACHE_DIR`)."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder /= "mistral_eqx"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a home that cannot be written to is no reason to stop
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Many of them take less than JAX thinks worth keeping, and seconds together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _output(options: argparse.Namespace) -> io.TextIOBase:
    """Joins the other processes, if there are to be any. One of them prints."""
    names = ("coordinator", "num_processes", "process_id")
    given = {name: getattr(options, name, None) for name in names}
    n_given = sum(value is not None for value in given.values())
    if n_given == 0 and not getattr(options, "distributed", False):
        return sys.stdout
    if 0 < n_given < 3:
        raise ValueError("Give --coordinator, --num-processes and --process-id together.")
    if options.mesh is None:
        raise ValueError("Several processes share one mesh: give --mesh.")
    if options.run in (_interactive, _chat):
        raise ValueError("A conversation is held with one process, not with several.")
    connect(*given.values())
    return sys.stdout if jax.process_index() == 0 else open(os.devnull, "w")


def _complain(error: Exception | str) -> None:
    # Libraries tell theirs in several lines.
    print("mistral_eqx:", " ".join(str(error).split()), file=sys.stderr)


def _load(options: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    return load(options.model, mesh=_mesh(options))


def _mesh(options: argparse.Namespace) -> Mesh | None:
    """The mesh that was asked for, in the order of the devices."""
    if options.mesh is None:
        return None
    return make_mesh(parse_mesh(options.mesh))


def _demo(options: argparse.Namespace) -> None:
    from .text import generate

    model, tokenizer = _load(options)
    prompts = [
        "This is a test",
        "This is another test",
        "This is a third test, mistral AI is very good at testing. ",
    ]
    completions = generate(
        model,
        tokenizer,
        prompts,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
    )
    for completion in completions:
        print(completion)
        print(RULE)


def _interactive(options: argparse.Namespace) -> None:
    from .text import stream

    model, tokenizer = _load(options)
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    for prompt in _ask("Prompt: "):
        with _interruptible():
            _show(stream(model, tokenizer, prompt, **sampling), before=prompt)
        print(RULE)


def _generate(options: argparse.Namespace) -> None:
    from .text import beam_search, generate, stream

    if options.n < 1:
        raise ValueError(f"--n must be 1 or more, got {options.n}.")
    if options.prompt is not None and options.file is not None:
        raise ValueError("Give a prompt or --file, not both.")
    if options.file is not None:
        prompt = read_text(options.file)
    elif options.prompt not in (None, "-"):
        prompt = _text(options.prompt)
    elif sys.stdin.isatty():
        raise ValueError("There is no prompt: give one, or --file, or pipe it in.")
    else:
        prompt = read_text("-")
    if options.file is not None or options.prompt in (None, "-"):
        prompt = prompt.removesuffix("\n")  # the end of a file is not of the prompt
    sampling = _sampling(options)
    model, tokenizer = _load(options)
    if options.beams is not None:
        (completions,) = beam_search(
            model,
            tokenizer,
            [prompt],
            n_beams=options.beams,
            n_best=options.n,
            max_tokens=options.max_tokens,
        )
    elif sys.stdout.isatty() and options.n == 1 and not options.json:
        _show(stream(model, tokenizer, prompt, **sampling), before=prompt)
        return
    else:
        completions = generate(model, tokenizer, [prompt] * options.n, **_sampling(options))
    for i, completion in enumerate(completions):
        if options.json:
            fields = dataclasses.asdict(completion)
            del fields["alternatives"]
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(*([RULE] if i > 0 else []), completion, sep="\n")


def _chat(options: argparse.Namespace) -> None:
    from .chat import Chat

    sampling = _sampling(options)
    system = None if options.system is None else _text(options.system)
    model, tokenizer = _load(options)
    talk = Chat(model, tokenizer, system=system, **sampling)
    if sys.stdin.isatty():
        print("/reset forgets the conversation, Ctrl-C ends an answer, Ctrl-D the chat.")
    if options.model is None:
        print("The embedded model read plays, not conversations.", file=sys.stderr)
    for message in _ask("> "):
        if message == "/reset":
            talk.reset()
        elif message.strip():
            try:
                with _interruptible():
                    _show(talk.stream(message))
            except ValueError as error:
                # A message that cannot be sent is no reason to lose those before it.
                if options.debug or not sys.stdin.isatty():
                    raise
                _complain(error)


def _score(options: argparse.Namespace) -> None:
    from .text import score

    texts = [(file, read_text(file)) for file in options.files]
    for file, text in texts:
        if not text:
            raise ValueError(f"{file} is empty: there is nothing to score.")
    model, tokenizer = _load(options)
    if not options.json:
        print(f"{'tokens':>10} {'logprob':>14} {'perplexity':>12}  text")
    for file, text in texts:
        scored = score(model, tokenizer, text)
        n, logprob, perplexity = len(scored.tokens), sum(scored.logprobs), scored.perplexity
        if options.json:
            fields = {"text": file, "tokens": n, "logprob": logprob}
            print(json.dumps({**fields, "perplexity": perplexity}))
        else:
            print(f"{n:10} {logprob:14.3f} {perplexity:12.4f}  {file}")


def _evaluate(options: argparse.Namespace) -> None:
    from .text import score

    text = read_text(options.file)
    if options.held_out:
        _, text = split_held_out(text)
    if not text:
        raise ValueError(f"{options.file} is empty.")
    model, tokenizer = _load(options)
    scored = score(model, tokenizer, text)
    nats, size = -math.fsum(scored.logprobs), len(text.encode())
    print(f"tokens          {len(scored.tokens)}")
    print(f"bytes           {size}")
    print(f"nats per token  {nats / len(scored.tokens):.4f}")
    print(f"bits per byte   {nats / math.log(2) / size:.4f}")


def _convert(options: argparse.Namespace) -> None:
    from .files.export import convert

    convert(
        options.source,
        options.target,
        format=options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        force=options.force,
    )


def _inspect(options: argparse.Namespace) -> None:
    from .files.inspection import inspect_folder

    for name, value in inspect_folder(options.folder).items():
        print(f"{name:<12}{value}")


def _bench(options: argparse.Namespace) -> None:
    from .bench import SHAPES, bench, check_options, random_model, table
    from .files.checkpoint import load_model

    if options.model is not None and options.shape is not None:
        raise ValueError("Give a model or --shape, not both.")
    numbers = {name: getattr(options, name) for name in ("batch", "prompt", "tokens")}
    numbers |= {"repeats": options.repeats, "contexts": _lengths(options.contexts)}
    check_options(**numbers)
    mesh = _mesh(options)
    jax.devices()  # starts the platform, which is not a part of loading
    start = time.perf_counter()
    if options.shape is not None:
        model = random_model(SHAPES[options.shape], dtype=options.dtype)
        model = model if mesh is None else shard(model, mesh)
    else:
        model = load_model(options.model or TINY_MISTRAL, dtype=options.dtype, mesh=mesh)
    jax.block_until_ready(model)
    source = "load" if options.shape is None else "random weights"
    report = {
        "model": options.shape or str(options.model or TINY_MISTRAL.name),
        "source": source,
        "load": time.perf_counter() - start,
    }
    report |= bench(model, **numbers)
    if options.json or not sys.stdout.isatty():
        print(json.dumps(report))
    else:
        print(table(report))


def _lengths(text: str | None) -> tuple[int, ...] | None:
    """The lengths in "1024,4096"; none in "none"."""
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f'--contexts must be like "1024,4096", or "none", got {text!r}.'
        ) from error


def _plan(options: argparse.Namespace) -> None:
    from .files.inspection import plan

    told = plan(
        options.folder,
        parse_mesh(options.mesh),
        batch=options.batch,
        context=options.context,
        dtype=options.dtype,
    )
    for name, value in told.items():
        print(f"{name:<12}{value}")


def _train(options: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from .files.checkpoint import read_config
    from .files.export import save
    from .learning.training import fit
    from .tokenizer import Tokenizer, check_vocabulary, train_tokenizer

    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already. Move it, or train elsewhere.")
    config = read_config(options.params)
    mesh = _mesh(options)
    texts = [split_held_out(read_text(file)) for file in options.corpus]
    if options.tokenizer is not None:
        check_vocabulary(Tokenizer(options.tokenizer), config.vocab_size)
    # Beside the target until the model is done: its checkpoint lets a run go on.
    work = out.with_name(out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_path, checkpoint = work / "tokenizer.model", work / "checkpoint.eqx"
    # Of several processes one writes, and all read.
    writes = jax.process_index() == 0
    if writes and options.tokenizer is not None:
        shutil.copyfile(options.tokenizer, tokenizer_path)
    elif writes and not checkpoint.exists():
        # What an attempt without one has left may be of other texts.
        learnt = "\n".join(text for text, _ in texts)
        train_tokenizer(learnt, tokenizer_path, vocab_size=config.vocab_size)
    wait_for_all("tokenizer")
    tokenizer = Tokenizer(tokenizer_path)
    check_vocabulary(tokenizer, config.vocab_size)

    def encode(texts):
        ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        return np.concatenate([np.asarray(row, np.int32) for row in ids])

    model = Transformer(config, key=jax.random.key(options.seed))
    model = fit(
        model if mesh is None else shard(model, mesh),
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
    if writes:
        shutil.rmtree(work)


def _train_tokenizer(options: argparse.Namespace) -> None:
    from .tokenizer import train_tokenizer

    out = Path(options.out)
    if out.exists():
        raise FileExistsError(f"{out} is there already. Move it, or train elsewhere.")
    texts = [split_held_out(read_text(file))[0] for file in options.corpus]
    train_tokenizer("\n".join(texts), out, vocab_size=options.vocab_size)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, which may be compressed with xz, or of standard input if `path`
    is "-". Raises `ValueError` if it is not text, or damaged."""
    if path == "-":
        if jax.process_count() > 1:
            raise ValueError("Several processes cannot share a pipe: give a file.")
        return _decode(sys.stdin.buffer.read())
    path = Path(path)
    open_text = lzma.open if path.suffix == ".xz" else open
    try:
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"Standard input is not UTF-8 text: {error}") from error


def _text(argument: str) -> str:
    """An argument, or a line from a terminal: Python hides bytes that are not UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument!r} is not UTF-8 text.") from error
    return argument


def _ask(question: str) -> Iterator[str]:
    """Lines that are typed, up to Ctrl-D, or piped. Ctrl-C takes back a line."""
    if not sys.stdin.isatty():
        yield from (_decode(line).removesuffix("\n") for line in sys.stdin.buffer)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  makes the line editable
    while True:
        try:
            yield _text(input(question))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _show(pieces: Iterator[str], *, before: str = "") -> None:
    """Prints text as it comes, or as a whole where nobody watches."""
    if sys.stdout.isatty():
        print(before, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print(before + "".join(pieces), flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends what is inside, and nothing more."""
    try:
        yield
    except KeyboardInterrupt:
        print()


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling`, checked before a model is loaded for minutes."""
    if options.max_tokens < 0:
        raise ValueError(f"max_tokens must be 0 or more, got {options.max_tokens}.")
    if "" in options.stop:
        raise ValueError("A stop string is empty: every text would end at once.")
    numbers = {name: getattr(options, name) for name in SAMPLING}
    Sampling(**numbers)
    return {
        **numbers,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        "stop": options.stop,
    }


def split_held_out(text: str) -> tuple[str, str]:
    """The first nine tenths of a text to train on, and the last to measure with."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mistral_eqx: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m mistral_eqx", description="Mistral in JAX and Equinox."
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="keep no compiled programs in the user's cache folder, and use none",
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
        # Here too, since it is thought of last.
        sub.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        return sub

    def add_model(sub):
        sub.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="folder of a model; the embedded one by default",
        )

    def add_mesh(sub):
        sub.add_argument(
            "--mesh",
            metavar="AXIS=N,...",
            help="spread the model over devices: data=2,model=4, say; the axes are "
            + ", ".join(AXES),
        )
        sub.add_argument(
            "--distributed",
            action="store_true",
            help="one of several processes, which find each other (a TPU slice, Slurm)",
        )
        sub.add_argument(
            "--coordinator", metavar="HOST:PORT", help="where process 0 of several is"
        )
        sub.add_argument("--num-processes", type=int, metavar="N", help="how many")
        sub.add_argument("--process-id", type=int, metavar="I", help="which one, from 0")

    def add_corpus(sub):
        sub.add_argument(
            "--corpus",
            nargs="+",
            metavar="FILE",
            default=CORPUS,
            help="texts, plain or .xz, of which the last tenth is held out; "
            "by default the embedded Shakespeare and King James Bible",
        )

    def add_length(sub, *, max_tokens, temperature):
        sub.add_argument(
            "--max_tokens",
            type=int,
            default=max_tokens,
            metavar="N",
            help=f"the most tokens to write ({max_tokens})",
        )
        sub.add_argument(
            "--temperature",
            type=float,
            default=temperature,
            metavar="T",
            help="0 writes the most probable text, 1 draws as the model would "
            f"({temperature})",
        )

    def add_sampling(sub, *, max_tokens):
        add_length(sub, max_tokens=max_tokens, temperature=0.7)
        add = sub.add_argument
        add("--top_k", type=int, metavar="K", help="draw from the K best tokens only")
        add(
            "--top_p",
            type=float,
            default=1.0,
            metavar="P",
            help="draw from the fewest tokens that are together as probable as P",
        )
        add(
            "--min_p",
            type=float,
            default=0.0,
            metavar="P",
            help="draw no token less than P times as probable as the best",
        )
        add(
            "--repetition_penalty",
            type=float,
            default=1.0,
            metavar="R",
            help="above 1: avoid tokens that are in the text already",
        )
        add("--seed", type=int, default=0, metavar="N", help="another writes another (0)")
        add(
            "--stop",
            action="append",
            default=[],
            metavar="TEXT",
            help="end where this would be written; may be given again",
        )

    demo = command("demo", _demo, "continue three prompts", "demo --max_tokens 35")
    add_mesh(demo)
    add_model(demo)
    add_length(demo, max_tokens=35, temperature=0.0)

    interactive = command(
        "interactive",
        _interactive,
        "continue the prompts that you type, until Ctrl-D",
        "interactive --max_tokens 100 --temperature 0.7",
    )
    add_mesh(interactive)
    add_model(interactive)
    add_length(interactive, max_tokens=35, temperature=0.7)

    generate = command(
        "generate",
        _generate,
        "continue a text, given as an argument, in a file, or piped in",
        'generate "To be, or not" --n 3 --seed 1',
    )
    add_mesh(generate)
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text")
    generate.add_argument("--file", metavar="FILE", help="read the text from a file")
    generate.add_argument(
        "--model",
        metavar="MODEL",
        help="folder of a model; the embedded one by default",
    )
    add_sampling(generate, max_tokens=128)
    generate.add_argument(
        "--n", type=int, default=1, metavar="N", help="how many texts to write (1)"
    )
    generate.add_argument(
        "--beams",
        type=int,
        metavar="N",
        help="search with N beams for the most probable texts instead of drawing; "
        "only --n, --max_tokens and --model matter then",
    )
    generate.add_argument(
        "--json",
        action="store_true",
        help="one object a line: prompt, text, tokens, logprobs, reason, score",
    )

    chat = command(
        "chat",
        _chat,
        "talk with a model; its template is that of its tokenizer (needs the extra chat)",
        'chat mistral-7B-Instruct-v0.3 --system "Answer briefly."',
    )
    add_mesh(chat)
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="what to tell the model first")
    add_sampling(chat, max_tokens=256)

    score = command(
        "score",
        _score,
        "tell how probable a model finds texts: the sum of their tokens' "
        "log-probabilities, in nats, and the perplexity",
        "score sonnet.txt psalm.txt",
    )
    add_mesh(score)
    score.add_argument(
        "files", nargs="+", metavar="FILE", help="texts, plain or .xz; - for the piped one"
    )
    score.add_argument(
        "--model",
        metavar="MODEL",
        help="folder of a model; the embedded one by default",
    )
    score.add_argument("--json", action="store_true", help="one object a line")

    evaluate = command(
        "evaluate",
        _evaluate,
        "measure how well a model predicts a text",
        "evaluate --held-out mistral_eqx/tiny_mistral/corpus/shakespeare.txt.xz",
    )
    add_mesh(evaluate)
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

    bench = command(
        "bench",
        _bench,
        "measure how fast a model runs here: a table on a terminal, JSON elsewhere",
        "bench --shape 1b --dtype bfloat16 --batch 8",
    )
    add_model(bench)
    add_mesh(bench)
    add = bench.add_argument
    add(
        "--shape",
        choices=["135m", "1b", "7b"],
        help="random weights of this shape instead of a model",
    )
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; on a CPU float32 by default, where there is room",
    )
    add("--batch", type=int, default=1, metavar="N", help="rows (1)")
    add("--prompt", type=int, default=512, metavar="N", help="tokens to read in each (512)")
    add("--tokens", type=int, default=64, metavar="N", help="tokens to write in each (64)")
    add("--repeats", type=int, default=5, metavar="N", help="of everything timed (5)")
    add(
        "--contexts",
        metavar="N,N,...",
        help="lengths of context at which to time a step, or none; by default 1k to 32k, "
        "as far as the memory goes",
    )
    add("--json", action="store_true", help="one object, on a terminal too")

    plan = command(
        "plan",
        _plan,
        "say what a model needs of every device, without its weights: a folder with "
        "params.json or config.json is enough",
        "plan mistral-7B-v0.3 --mesh model=8 --batch 8 --context 32768",
    )
    plan.add_argument("folder", metavar="FOLDER", help="folder of a model")
    plan.add_argument("--mesh", default="model=1", metavar="AXIS=N,...", help="one device")
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="rows (1)")
    plan.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens of each row (4096)"
    )
    plan.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="of weights and cache (bfloat16)",
    )

    train = command(
        "train",
        _train,
        "train a model, and its tokenizer, from texts; a killed run goes on if started "
        "again with the same options",
        "train my_mistral --steps 4000",
    )
    add_mesh(train)
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
    train.add_argument("--steps", type=int, default=4000, metavar="N")
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
