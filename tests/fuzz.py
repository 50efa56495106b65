"""Wrong files and wrong calls, at random: a result, or an error with a name.

    python tests/fuzz.py --cases 10000 --seed 0

counts, for each kind of input, the results, the named errors, and anything else, which is
shown with its seed. A named error is one line that can be printed, raised by this package,
that says the file or the argument. Anything else is a fault. `--commands` tries command
lines instead, which take longer: their errors are one line on standard error.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # for commands with a mesh

import jax
import jax.numpy as jnp
import numpy as np
from commands import actions, run as run_command
from models import random_model
from tqdm import tqdm

import mistral_eqx as mx
from mistral_eqx.files.checkpoint import open_checkpoint
from mistral_eqx.files.inspection import inspect_folder, plan
from mistral_eqx.learning.batches import Slices
from mistral_eqx.learning.examples import read_examples, read_labelled
from mistral_eqx.learning.fitting import fit
from mistral_eqx.text import TINY_MISTRAL


PACKAGE = str(Path(mx.__file__).parent)
SLOW = 20.0  # seconds of this process, whatever else the machine does
# What a command returns that has told an error in one line.
REFUSED = object()
EVIL = "\x1b[2J\r\u202e"


@dataclasses.dataclass
class Case:
    """One call, and the words of which its error must have one."""

    call: Callable[[], object]
    words: tuple[str, ...]
    what: str


def outcome(case: Case) -> str:
    """ "result", "named error", or what else happened."""
    start = time.process_time()
    try:
        found = "named error" if case.call() is REFUSED else "result"
    except Exception as error:
        found = "named error"
        told, frames = str(error), traceback.extract_tb(error.__traceback__)
        if not isinstance(error, ValueError | TypeError | OSError | ImportError):
            found = f"{type(error).__name__}: {told[:200]}"
        elif not frames[-1].filename.startswith(PACKAGE):
            found = f"from {frames[-1].filename}: {error!r}"[:300]
        elif not told.isprintable() or not any(word in told for word in case.words):
            found = f"without a name: {told[:300]!r}"
    if time.process_time() - start > SLOW:
        found = f"took {time.process_time() - start:.0f} s"
    return found


# --- files --------------------------------------------------------------------------------


ODD = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.5, 64.0, 1e-5, math.nan, math.inf, 1e400),
    *(2**20, 2**30, 2**31, 2**63, 10**30, "", "64", "1e-05", "yarn", "default", EVIL),
    *([], [8], [None, 8], {}, {"factor": 2.0}, {EVIL: 1}, "x" * 300, "mixtral"),
)


def mutated_json(rng: random.Random, value: object) -> object:
    """The value with a part of it replaced, dropped, or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        value = dict(value)
        if (way := rng.random()) < 0.15:
            del value[key]
        elif way < 0.25:
            value[rng.choice([EVIL, "moe", "yarn", "sliding_window", "lora"])] = value[key]
        elif way < 0.35:
            value[key] = rng.choice(ODD)
        else:
            value[key] = mutated_json(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return [*value[:i], mutated_json(rng, value[i]), *value[i + 1 :]]
    return rng.choice(ODD)


def mutated_bytes(rng: random.Random, content: bytes, first: int | None = None) -> bytes:
    """The content with some of its first bytes changed, or cut short."""
    content = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        at = rng.randrange(min(first or len(content), len(content)))
        is_digit = content[at : at + 1].isdigit()
        content[at] = rng.choice(b"0123456789") if is_digit else rng.randrange(256)
    cut = rng.random()
    return bytes(content[: rng.randrange(len(content))] if cut < 0.2 else content)


SIZES = {"vocab_size": 2048, "sliding_window": None, "head_dim": 8, "hidden_dim": 64}


class Files:
    """Small models in all formats, of which one file at a time is spoilt."""

    def __init__(self, root: Path):
        self.root = root
        model = random_model(**SIZES)
        tokenizer = TINY_MISTRAL / "tokenizer.model"
        mx.save(model, root / "raw", tokenizer=tokenizer)
        options = {"format": "huggingface", "max_shard_size": "100KB"}
        mx.save(model, root / "hf", tokenizer=tokenizer, **options)
        stream = np.arange(100, dtype=np.int32) % 60
        text = Slices("text", stream, seq_len=8, bos_id=1)
        self.fit = functools.partial(fit, data=text, held_out=text, batch_size=1)
        with jax.numpy_dtype_promotion("standard"):
            self.fit(small(), steps=1, checkpoint=root / "checkpoint")
        mx.convert(root / "raw", root / "gguf" / "model.gguf", dtype="q8_0")
        adapted = mx.add_lora(model, rank=2, key=jax.random.key(0))
        for format in ("peft", "mistral"):
            mx.save_adapter(adapted, root / "adapters" / format, format=format)
        (root / "json").mkdir()
        make_tokenizer_json(root / "json" / "tokenizer.json")

    @contextlib.contextmanager
    def spoilt(self, path: Path, content: bytes):
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            yield
        finally:
            path.write_bytes(whole)

    def case(self, path: Path, content: bytes, read: Callable[[], object]) -> Case:
        def call():
            with self.spoilt(path, content):
                return read()

        # A file, or its folder.
        words = (str(path), str(path.parent))
        return Case(call, words, f"{path.name}: {content[:80]!r}")

    def folder(self, folder: Path, path: Path, content: bytes) -> Case:
        return self.case(path, content, functools.partial(self.look, folder))

    def look(self, folder: Path) -> None:
        open_checkpoint(folder).check()
        inspect_folder(folder)
        mx.load_tokenizer(folder)
        plan(mx.files.folders.read_config(folder), {"model": 2})

    def json_case(self, rng: random.Random, folder: Path, name: str) -> Case:
        path = folder / name
        value = json.loads(path.read_bytes())
        for _ in range(rng.choice([1, 1, 2, 3])):
            value = mutated_json(rng, value)
        content = json.dumps(value).encode()
        if rng.random() < 0.1:
            content = mutated_bytes(rng, content)
        case = self.folder(folder, path, content)
        # What a plan cannot divide has the name of the axis or of the size.
        case.words += ("mesh", "divide")
        return case

    def params(self, rng: random.Random) -> Case:
        return self.json_case(rng, self.root / "raw", "params.json")

    def config(self, rng: random.Random) -> Case:
        return self.json_case(rng, self.root / "hf", "config.json")

    def index(self, rng: random.Random) -> Case:
        return self.json_case(rng, self.root / "hf", "model.safetensors.index.json")

    def header(self, rng: random.Random) -> Case:
        folder = self.root / rng.choice(["raw", "hf"])
        path = rng.choice(sorted(folder.glob("*.safetensors")))
        content = path.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        if rng.random() < 0.5:
            header = json.loads(content[8:size])
            encoded = json.dumps(mutated_json(rng, header)).encode()
            content = len(encoded).to_bytes(8, "little") + encoded + content[size:]
        else:
            content = mutated_bytes(rng, content, size)
        return self.folder(folder, path, content)

    def adapter(self, rng: random.Random) -> Case:
        """Spoilt in its config, or in its header."""
        folder = self.root / "adapters" / rng.choice(["peft", "mistral"])
        path = rng.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        size = len(content)
        if path.suffix == ".safetensors":
            size = 8 + int.from_bytes(content[:8], "little")
        if rng.random() < 0.7:
            start = content.index(b"{")
            value = mutated_json(rng, json.loads(content[start:size]))
            encoded = json.dumps(value).encode()
            length = len(encoded).to_bytes(8, "little") if start else b""
            content = length + encoded + content[size:]
        else:
            content = mutated_bytes(rng, content, size)
        read = lambda: mx.load_model(self.root / "raw", adapter=folder, dtype=jnp.float32)
        return self.case(path, content, read)

    def examples(self, rng: random.Random) -> Case:
        """Lines of texts, conversations and labels, of which one is spoilt."""
        lines = [
            {"text": "To be"},
            {"messages": [ASKED, {"role": "assistant", "content": "A", "weight": 1}]},
            {
                "interactions": [ASKED, {"role": "assistant", "text": "A"}],
                "only_last": True,
            },
            {"text": "not to be", "label": "question"},
        ]
        i, path = rng.randrange(len(lines)), self.root / "examples.jsonl"
        lines[i] = mutated_json(rng, lines[i])
        content = "\n".join(map(json.dumps, lines)).encode()
        if rng.random() < 0.2:
            content = mutated_bytes(rng, content)
        path.touch()
        tokenizer = mx.load_tokenizer(self.root / "raw")
        read = rng.choice([read_examples, read_examples, read_labelled])
        return self.case(path, content, lambda: read(path, tokenizer, seq_len=32))

    def gguf(self, rng: random.Random) -> Case:
        """Spoilt in its first keys, in its tokens, or in its list of tensors."""
        path = self.root / "gguf" / "model.gguf"
        content = path.read_bytes()
        start = content.index(b"token_embd.weight")
        first, last = rng.choice([(0, 1200), (0, start), (start, start + 1400)])
        spoilt = mutated_bytes(rng, content[first:], last - first)

        def read():
            tokenizer = mx.load_tokenizer(path)
            tokenizer.decode(tokenizer.encode("To be, or not\n\n é🦙"))
            self.look(path)
            mx.load_model(path, dtype=jnp.float32)

        case = self.case(path, content[:first] + spoilt, read)
        case.words += ("mesh", "divide")
        return case

    def tokenizer(self, rng: random.Random) -> Case:
        def read(path=None):
            tokenizer = mx.load_tokenizer(path.parent) if path else None
            tokenizer.decode(tokenizer.encode("To be, or not\n\n é🦙"))
            tokenizer.decode(list(range(min(tokenizer.vocab_size, 3000))))

        way = rng.random()
        if way < 0.5:
            path = self.root / "raw" / "tokenizer.model"
            content = mutated_bytes(rng, path.read_bytes())
        elif way < 0.8:
            path = self.root / "json" / "tokenizer.json"
            value = mutated_json(rng, json.loads(path.read_bytes()))
            content = json.dumps(value).encode()
        else:
            path = (
                self.root
                / "raw"
                / rng.choice(["added_tokens.json", "generation_config.json"])
            )
            keys = ["eos_token_id", "<a>", "<b>"]
            value = {key: rng.choice(ODD) for key in rng.sample(keys, 2)}
            content = json.dumps(rng.choice([value, rng.choice(ODD)])).encode()

            def read_beside():
                path.write_bytes(content)
                try:
                    return read(path)
                finally:
                    path.unlink()

            return Case(read_beside, (str(path),), f"{path.name}: {content[:200]!r}")
        return self.case(path, content, functools.partial(read, path))

    def tekken(self, rng: random.Random) -> Case:
        folder = self.root / "tekken"
        folder.mkdir(exist_ok=True)
        path = folder / "tekken.json"
        value = mutated_json(rng, small_tekken())
        if rng.random() < 0.3:
            value = mutated_json(rng, value)
        path.write_text(json.dumps(value))

        def read():
            tokenizer = mx.load_tokenizer(folder)
            tokenizer.decode(tokenizer.encode("To be, or not\n\n é🦙"))

        return Case(read, (str(path),), f"tekken.json: {json.dumps(value)[:200]}")

    def template(self, rng: random.Random) -> Case:
        """A spoilt template, or a whole one, under messages of any kind."""
        source = "".join(mutated_list(rng, TEMPLATE, PARTS))
        messages = TALK[: rng.choice([2, 4, 5, 5])]
        if rng.random() < 0.7:
            i = rng.randrange(len(messages))
            messages = [*messages[:i], mutated_json(rng, messages[i]), *messages[i + 1 :]]
        tools = mutated_json(rng, [TOOL]) if rng.random() < 0.3 else []
        folder = self.root / "json"
        path = folder / "tokenizer_config.json"
        found = mutated_json(rng, source) if rng.random() < 0.1 else source

        def call():
            path.write_text(json.dumps({"chat_template": found, "pad_token": EVIL}))
            try:
                tokenizer = mx.load_tokenizer(folder)
                return mx.encode_chat(tokenizer, messages, tools=tools)
            finally:
                path.unlink()

        words = ("tokenizer_config.json", "tokenizer.json", "essage", "conversation")
        what = f"{found!r:.300} under {messages!r:.200} and {tools!r:.100}"
        return Case(call, (*words, "tools", "answer"), what)

    def checkpoint(self, rng: random.Random) -> Case:
        path = self.root / "checkpoint"
        content = path.read_bytes()
        if rng.random() < 0.7:
            header, _, rest = content.partition(b"\n")
            value = mutated_json(rng, json.loads(header))
            content = json.dumps(value).encode() + b"\n" + rest[:-4]
            # As if it had been written so.
            import zlib

            content += zlib.crc32(content).to_bytes(4, "little")
        else:
            content = mutated_bytes(rng, content)

        def read():
            with jax.numpy_dtype_promotion("standard"):
                self.fit(small(), steps=1, checkpoint=path)

        return self.case(path, content, read)


def small():
    changes = {"n_layers": 1, "dim": 16, "hidden_dim": 16}
    return jax.tree.map(jnp.copy, random_model(**changes))


@functools.cache
def small_tekken() -> dict:
    """A Tekken of the 256 bytes."""
    import base64

    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
        for i in range(256)
    ]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"]
    special = [
        {"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)
    ]
    config = {
        "pattern": r"\w+|\W",
        "num_vocab_tokens": 256,
        "default_vocab_size": 266,
        "default_num_special_tokens": 10,
        "version": "v11",
    }
    return {"vocab": vocab, "special_tokens": special, "config": config, "version": 1}


# A template in parts, and others to put in.
TEMPLATE = (
    *("{{ bos_token }}", "{% for message in messages %}", "<s>{{ message.role }}\n"),
    *("{{ message['content'] }}", "</s>\n", "{% endfor %}", "{{ tools | tojson }}"),
    *("{% if add_generation_prompt %}", "<s>assistant\n", "{% endif %}"),
)
PARTS = (
    *("{% if messages %}", "{% else %}", "{% break %}", "{% macro f(n) %}", "{{ f(9) }}"),
    *("{% endmacro %}", "{{ f(f) }}", "{% set x = namespace(a='x') %}", "{{ x }}", "{{"),
    *("{% set x.a = x.a ~ x.a %}", "{% for i in range(10**9) %}", "{% for i in x %}"),
    *("{{ raise_exception(messages) }}", "{{ ''.__class__.__mro__ }}", "%}", EVIL),
    *("{{ messages.append(1) }}", "{{ messages | tojson(ensure_ascii=True) }}", "{#"),
    *("{{ messages[0].content[::-1] }}", "{{ 1 / 0 }}", "{{ 'x' * 10**12 }}", "\ud83e"),
    *("{{ message.content | center(10**9) }}", "{% generation %}", "{% endgeneration %}"),
    *("{{ message.content.split('</s>')[-1] }}", "{{ message.content | upper }}"),
    *("{{ pad_token }}", "{{ strftime_now('%Y') }}", "{% include 'x' %}", "{{ loop }}"),
)
ASKED = {"role": "user", "content": "Q"}
TALK = [
    {"role": "system", "content": "Be</s> brief."},
    {"role": "user", "content": [{"type": "text", "text": "<s>"}, {"type": "image"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "\ue000 <unk>", "name": "f"},
    {"role": "assistant", "content": "I am ", "prefix": True, "reasoning": "So."},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a</s>": 1}}}


def mutated_list(rng: random.Random, values: tuple, others: tuple) -> list:
    """The values with some dropped, and some of the others put in."""
    values = list(values)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        if rng.random() < 0.3:
            del values[rng.randrange(len(values))]
        else:
            values.insert(rng.randrange(len(values) + 1), rng.choice(others))
    return values


def make_tokenizer_json(path: Path) -> None:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    model.train_from_iterator(["to be or not to be"] * 9, trainer)
    model.save(str(path))


# --- calls --------------------------------------------------------------------------------


WRONG = (
    *(None, True, 5, -1, 0, 1.5, -0.0, 2**31, 2**70, math.nan, math.inf, -math.inf),
    *("0.5", "", b"bytes", "\ud83e", [], [5], ["a", 5], (1,), {}, {"a": 1}, object()),
    *(np.float32(0.5), np.int64(3), np.array([1, 2]), jnp.float32(2), jnp.int32(3)),
    *([[]], [[1, 2]], [["a"]], [[1.5]], [[-1]], [[10**9]], [None], len, EVIL, "x" * 300),
)


class Calls:
    """Public functions, each with one argument of some wrong type or size."""

    def __init__(self, root: Path):
        self.root = root / "calls"
        self.root.mkdir()
        model = random_model(vocab_size=2048)
        tokenizer = mx.Tokenizer(TINY_MISTRAL / "tokenizer.model")
        both = {"model": model, "tokenizer": tokenizer}
        few = {"max_tokens": 2}
        user = [{"role": "user", "content": "Hello"}]
        ids = {"model": model, "prompts": [[1, 2]]}
        texts = both | few | {"prompts": "To be"}
        sampling = dict.fromkeys(
            ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), None
        )
        drawn = {"seed": 0, "chunk": None, "stop": (), "eos_ids": None} | sampling
        self.functions = {
            "generate": (mx.generate, texts | drawn | {"alternatives": 0}),
            "stream": (streamed(mx.stream), both | few | {"prompt": "To be"} | drawn),
            "beam_search": (
                mx.beam_search,
                texts | {"n_beams": 2, "n_best": 1, "length_penalty": 1.0}
                | {"early_stopping": False, "eos_ids": None, "chunk": None},
            ),
            "score": (mx.score, both | {"text": "To be", "alternatives": 0, "chunk": None}),
            "chat": (mx.chat, both | few | {"messages": user, "stop": (), "seed": 0}),
            "encode_chat": (mx.encode_chat, {"tokenizer": tokenizer, "messages": user}),
            "prefill": (mx.prefill, ids | few | {"chunk": None}),
            "Sampling": (mx.Sampling, sampling),
            "encode": (tokenizer.encode, {"text": "To be"}),
            "decode": (tokenizer.decode, {"ids": [5, 6]}),
            "load": (mx.load, {"folder": None}),
            "Tokenizer": (mx.Tokenizer, {"path": tokenizer.path}),
            "load_tokenizer": (mx.load_tokenizer, {"folder": TINY_MISTRAL}),
        }  # fmt: skip
        # These can be nothing but what they are.
        self.fixed = {"model", "tokenizer"}
        self.words = {"decode": ("token id", "ids"), "load": ("folder", "path")}

    def call(self, rng: random.Random) -> Case:
        name = rng.choice(list(self.functions))
        function, arguments = self.functions[name]
        argument = rng.choice([a for a in arguments if a not in self.fixed])
        value = rng.choice(WRONG)
        given = {k: v for k, v in arguments.items() if v is not None} | {argument: value}
        what = f"{name}({argument}={value!r:.80})"
        words = (argument, argument.rstrip("s"), argument.rstrip("s").capitalize(), "path")
        words += (
            "folder",
            "no tokenizer at",
            "vocabulary",
            "Message",
            "message",
            "conversation",
            "stop",
        )
        return Case(functools.partial(function, **given), words, what)

    def prompt(self, rng: random.Random) -> Case:
        alphabet = ["a", " ", "\n", "\0", "\ufeff", "é", "🦙", "\ud83e", "</s>", "[INST]"]
        alphabet += ["<s>", "\u2581", "\u202e", "\x1b[2J", "<0x41>", "漢"]
        text = "".join(rng.choices(alphabet, k=rng.choice([0, 1, 3, 9])))
        function, arguments = self.functions[rng.choice(["generate", "stream", "score"])]
        given = {k: v for k, v in arguments.items() if v is not None}
        name = next(n for n in ("prompts", "prompt", "text") if n in given)
        words = ("prompt", "text", "surrogate")
        return Case(functools.partial(function, **given | {name: text}), words, repr(text))


def streamed(function):
    return lambda **arguments: list(function(**arguments))


# --- command lines ------------------------------------------------------------------------


VALUES = (
    *("0", "1", "2", "-1", "3", "0.5", "1.5", "1e3", "nan", "inf", "-inf", "9" * 21),
    *(str(2**31), str(2**31 - 1), "", " ", "true", "none", "To be", EVIL, "\0", "\udce9"),
    *("model=2", "data=2", "data=2,model=2", "model=3", "pipe=2", "fsdp=2", "model=0"),
    *("model=-1", "crowd=2", "model", "=", "model=2,model=2", "expert=2", "h100", "["),
    *("(", ".*", "5GB", "0GB", "float32", "int8", "64", "16,32", "16,,", "adapter=nan"),
)
PATHS = (
    *("text.txt", "empty.txt", "bytes.txt", "texts.jsonl", "labels.jsonl", "adapter", "hf"),
    *("small.gguf", "model", "model", "none", "out", "out.gguf", "a/b", "text.txt/out", ""),
    *("/", ".", "..", "/dev/null", "~", "-", "org/name", "x" * 300, "\udce9"),
)
# What keeps a command short, and options that wait for others or compile for minutes.
SHORT = {
    "train": "--steps 1 --batch-size 1 --seq-len 8 --params model --corpus text.txt",
    "finetune": "--steps 1 --batch-size 1 --seq-len 8 --model model",
    "bench": "--prompt 8 --tokens 2 --repeats 1 --contexts none --model model",
    "plan": "--model model",
} | dict.fromkeys(("demo", "interactive", "chat", "generate"), "--max-tokens 2")
UNTRIED = {"distributed", "coordinator", "num_processes", "process_id", "compile"}


class Commands:
    """Commands of which up to three options have some value, in a folder of their own."""

    def __init__(self, root: Path):
        self.root = root / "commands"
        self.root.mkdir()
        here = self.root
        model = random_model(vocab_size=2048)
        tokenizer = mx.Tokenizer(TINY_MISTRAL / "tokenizer.model")
        for name, format in (("model", "mistral"), ("hf", "huggingface")):
            mx.save(model, here / name, format=format, tokenizer=tokenizer)
        mx.save(model, here / "small.gguf", format="gguf", tokenizer=tokenizer)
        adapted = mx.add_lora(model, rank=2, key=jax.random.key(0))
        mx.save_adapter(adapted, here / "adapter")
        (here / "text.txt").write_text("the cat sat on the mat\n" * 40)
        (here / "empty.txt").touch()
        (here / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        lines = [{"text": f"line {i}", "label": str(i % 2)} for i in range(12)]
        (here / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
        texts = [{"text": line["text"]} for line in lines]
        (here / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
        self.own = {path.name for path in here.iterdir()}

    def command(self, rng: random.Random) -> Case:
        name = rng.choice(sorted(actions()))
        known = [a for a in actions()[name] if a.dest not in UNTRIED]
        arguments = [name, *SHORT.get(name, "").split()]
        options = [a for a in known if a.option_strings]
        chosen = rng.sample(options, min(len(options), rng.choice([0, 1, 1, 2, 3])))
        chosen += [a for a in options if a.required and a not in chosen]
        for action in [a for a in known if not a.option_strings] + chosen:
            arguments += action.option_strings[:1]
            if action.nargs != 0:
                values = rng.choice([VALUES, PATHS, action.choices or PATHS])
                arguments.append(str(rng.choice(list(values))))
        return Case(functools.partial(self.run, arguments), (), repr(arguments))

    def run(self, arguments: list[str]) -> object:
        out, err = io.StringIO(), io.StringIO()
        stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"To be\nor not\n"))
        try:
            with (
                contextlib.chdir(self.root),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                status = run_command("--no-compilation-cache", *arguments)
        except SystemExit as error:  # argparse's
            status = error.code
        finally:
            sys.stdin = stdin
            for path in self.root.iterdir():
                if path.name not in self.own:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        if status in (0, 1):
            return None
        told = [
            line for line in err.getvalue().split("\n") if line.startswith("mistral_eqx: ")
        ]
        if status == 2 and len(told) == 1 and told[0].isprintable() and len(told[0]) < 700:
            return REFUSED
        raise AssertionError(f"status {status}: {err.getvalue()[-500:]!r}")


# --- the run ------------------------------------------------------------------------------


def kinds_of(files: Files, calls: Calls) -> dict[str, Callable[[random.Random], Case]]:
    return {
        "header": files.header,
        "params.json": files.params,
        "config.json": files.config,
        "index": files.index,
        "gguf": files.gguf,
        "adapter": files.adapter,
        "examples": files.examples,
        "tokenizer": files.tokenizer,
        "tekken": files.tekken,
        "templates": files.template,
        "checkpoint": files.checkpoint,
        "call": calls.call,
        "prompt": calls.prompt,
    }


def run(
    cases: int, seed: int, *, commands: bool = False
) -> tuple[dict[str, collections.Counter], list[str]]:
    """The outcomes for each kind of input, and the faults."""
    logging.getLogger("mistral_eqx").setLevel(logging.ERROR)
    root, counts, faults = Path(tempfile.mkdtemp()), {}, []
    try:
        if commands:
            kinds = {"command": Commands(root).command}
        else:
            kinds = kinds_of(Files(root), Calls(root))
        for i in tqdm(range(cases), "fuzz", unit="case", disable=None):
            name = list(kinds)[i % len(kinds)]
            case = kinds[name](random.Random(f"{seed} {i}"))
            found = outcome(case)
            is_fault = found not in ("result", "named error")
            if is_fault:
                faults.append(f"{name} {i}: {case.what} -> {found}")
            counts.setdefault(name, collections.Counter())[
                "anything else" if is_fault else found
            ] += 1
    finally:
        shutil.rmtree(root)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", action="store_true", help="try command lines")
    options = parser.parse_args()
    counts, faults = run(options.cases, options.seed, commands=options.commands)
    columns = ("result", "named error", "anything else")
    print(f"{'':12}" + "".join(f"{column:>15}" for column in columns))
    for name, count in counts.items():
        print(f"{name:12}" + "".join(f"{count[column]:15}" for column in columns))
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
