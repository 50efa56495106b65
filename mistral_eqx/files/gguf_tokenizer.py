"""The tokenizer in a GGUF's metadata, there and back.

In a GGUF a tokenizer is a list of tokens with their scores and types, or with merges. Here
it becomes the file that a library opens: a sentencepiece model, or a `tokenizer.json`.
"""

import functools
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import sentencepiece

from .. import arguments
from ..arguments import printable
from .gguf import read_metadata


# The types of tokens, the same numbers as sentencepiece has.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_KEY = "tokenizer.ggml."
# How texts are cut into words, by llama.cpp's names, and whether a word that is a token is
# this token whatever the merges say.
_LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS[0]}]*[{_LETTERS[1]}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_LETTERS[0]}]+[{_LETTERS[1]}]*|\p{{N}}" + _REST,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
_WHOLE_WORDS = ("tekken", "llama-bpe")


def tokenizer_file(metadata: Mapping[str, Any], path: Path) -> tuple[str, bytes]:
    """The name and the content of the tokenizer's file.

    **Arguments:**

    - `metadata`: of the GGUF.
    - `path`: of the GGUF, for messages.

    **Raises:**

    `FileNotFoundError` if there is no tokenizer in the metadata, `ValueError` for one that
    is not known or is damaged, `ImportError` without the library that it needs.
    """
    kind = metadata.get(f"{_KEY}model", "none")
    if kind in ("none", "no_vocab"):
        raise FileNotFoundError(
            printable(f"There is no tokenizer in {path}. ")
            + "Put the model's tokenizer.model, tekken.json or tokenizer.json beside it."
        )
    makers = {
        "llama": ("tokenizer.model", _sentencepiece),
        "gpt2": ("tokenizer.json", lambda metadata: _bpe(metadata, path)),
    }
    if kind not in makers:
        raise ValueError(
            printable(f"{path} has a tokenizer of the kind {kind!r}, which is not known. ")
            + "Put the model's tokenizer.model, tekken.json or tokenizer.json beside it."
        )
    name, make = makers[kind]
    try:
        return name, make(metadata)
    except (ValueError, TypeError, KeyError, struct.error) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            printable(f"The tokenizer in {path} cannot be used: {told}")
        ) from error


def import_tokenizers(path: Path) -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f'{path} can only be read with tokenizers: pip install "mistral_eqx[chat]".'
        ) from error
    return tokenizers


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids that the metadata gives a meaning: "bos", "eos", "unknown", "eot" and others.
    Raises `ValueError` for what is no id."""
    n_tokens = len(metadata.get(f"{_KEY}tokens", ()))
    ids = {}
    for key, value in metadata.items():
        if key.startswith(_KEY) and key.endswith("_token_id"):
            name = key.removeprefix(_KEY).removesuffix("_token_id")
            if type(value) is not int or not 0 <= value < n_tokens:
                raise ValueError(f"{key} is {arguments.shown(value)}, which is no id.")
            ids[name] = value
    return ids


def chat_template(metadata: Mapping[str, Any]) -> str | None:
    """The chat template, if there is one."""
    found = metadata.get("tokenizer.chat_template")
    return found if isinstance(found, str) else None


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata[f"{_KEY}tokens"]
    types = metadata.get(f"{_KEY}token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens and {len(types)} types.")
    for values, kind in (tokens, str), (types, int):
        if not isinstance(values, list) or not all(type(v) is kind for v in values):
            raise ValueError("its tokens are no texts, or their types no whole numbers.")
    # Added tokens are control tokens in all but name: a text must not forge them.
    brackets = {"<": ">", "[": "]"}
    is_control = [
        kind == USER_DEFINED and len(t) > 2 and brackets.get(t[0]) == t[-1]
        for t, kind in zip(tokens, types)
    ]
    return tokens, [CONTROL if c else kind for c, kind in zip(is_control, types)]


# --- sentencepiece ------------------------------------------------------------------------


def _sentencepiece(metadata: Mapping[str, Any]) -> bytes:
    """A sentencepiece model of the metadata, as `sentencepiece_model.proto` has it."""
    tokens, types = _tokens(metadata)
    scores = metadata[f"{_KEY}scores"]
    if len(scores) != len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens and {len(scores)} scores.")
    ids = {"unknown": types.index(UNKNOWN) if UNKNOWN in types else 0, "bos": 1, "eos": 2}
    ids |= special_ids(metadata)
    pieces = b"".join(
        _field(1, _field(1, token) + _field(2, float(score)) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types)
    )
    fields = {3: 2, 4: len(tokens), 35: int(BYTE in types)}  # BPE, byte_fallback
    names = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47)}
    for name, (id_field, piece_field) in names.items():
        fields |= {id_field: ids[name], piece_field: tokens[ids[name]]}
    trainer = b"".join(_field(number, value) for number, value in fields.items())
    blanks = {
        3: int(metadata.get(f"{_KEY}add_space_prefix", True)),
        4: int(metadata.get(f"{_KEY}remove_extra_whitespaces", False)),
        5: 1,
    }
    blanks = b"".join(_field(number, value) for number, value in blanks.items())
    return pieces + _field(2, trainer) + _field(3, _field(1, "identity") + blanks)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# --- bytes --------------------------------------------------------------------------------


def _bpe(metadata: Mapping[str, Any], path: Path) -> bytes:
    """The `tokenizer.json` of the metadata."""
    tokenizers = import_tokenizers(path)
    decoders, pre_tokenizers = tokenizers.decoders, tokenizers.pre_tokenizers
    words = metadata.get(f"{_KEY}pre", "gpt-2")
    words = "gpt-2" if words == "default" else words
    if words not in _WORDS:
        raise ValueError(
            f"it cuts texts into words as {words!r} does, which is not known. Put the "
            "model's tekken.json or tokenizer.json beside it."
        )
    tokens, types = _tokens(metadata)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata[f"{_KEY}merges"]]
    if any(len(merge) != 2 for merge in merges) or len(vocabulary) != len(tokens):
        raise ValueError("a merge is no pair, or a token is there twice.")
    try:
        model = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, merges, ignore_merges=words in _WHOLE_WORDS)
        )
    except Exception as error:  # tokenizers raises `Exception` itself
        raise ValueError(str(error)) from error
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS[words]), "isolated")
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, into_bytes])
    model.decoder = decoders.ByteLevel()
    added = [tokenizers.AddedToken(t, normalized=False) for t in tokens]
    model.add_special_tokens([a for a, k in zip(added, types) if k in (UNKNOWN, CONTROL)])
    model.add_tokens([a for a, k in zip(added, types) if k == USER_DEFINED])
    return model.to_str().encode()


# --- there --------------------------------------------------------------------------------


def tokenizer_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
    """The metadata of a tokenizer in a file, without `tokenizer.ggml.` before each key.

    **Arguments:**

    - `path`: of a sentencepiece model, of a Tekken, or of a GGUF.
    - `vocab_size`: of the model. Ids that the tokenizer lacks get names.
    """
    if path.suffix == ".gguf":
        values = read_metadata(path).items()
        return {k.removeprefix(_KEY): v for k, v in values if k.startswith(_KEY)}
    make = _of_tekken if path.suffix == ".json" else _of_sentencepiece
    values = make(path)
    missing = range(len(values["tokens"]), vocab_size)
    values["tokens"] += [f"[PAD{i}]" for i in missing]
    values["token_type"] += [UNUSED] * len(missing)
    values["scores"] += [-1000.0] * len(missing)
    return values


def _of_sentencepiece(path: Path) -> dict[str, Any]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = list(range(model.vocab_size()))
    kinds = {
        UNKNOWN: model.is_unknown,
        CONTROL: model.is_control,
        UNUSED: model.is_unused,
        BYTE: model.is_byte,
    }
    types = [next((k for k, holds in kinds.items() if holds(i)), NORMAL) for i in ids]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": model.id_to_piece(ids),
        "scores": [model.get_score(i) for i in ids],
        "token_type": types,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
        "add_bos_token": True,
        "add_eos_token": False,
    }
    beside = path.with_name("added_tokens.json")
    added = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    for name, token in sorted(added.items(), key=lambda item: item[1]):
        if token >= len(ids):
            missing = range(len(values["tokens"]), token)
            values["tokens"] += [*(f"[PAD{i}]" for i in missing), name]
            values["token_type"] += [*(UNUSED for _ in missing), CONTROL]
            values["scores"] += [-1000.0] * (len(missing) + 1)
    return values


def _of_tekken(path: Path) -> dict[str, Any]:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    model = Tekkenizer.from_file(path)
    names = [model.id_to_piece(i) for i in range(model.num_special_tokens)]
    words = [model.id_to_byte_piece(i) for i in range(len(names), model.n_words)]
    tokens = names + [_printed(word) for word in words]
    return {
        "model": "gpt2",
        "pre": "tekken",
        "tokens": tokens,
        "scores": [0.0] * len(tokens),
        "token_type": [CONTROL] * len(names) + [NORMAL] * len(words),
        "merges": list(_merges(words)),
        "bos_token_id": model.bos_id,
        "eos_token_id": model.eos_id,
        "unknown_token_id": model.unk_id,
        "add_bos_token": True,
        "add_eos_token": False,
    }


def _merges(words: list[bytes]) -> Iterable[str]:
    """All pairs of words that make a word, in the order of what they make, and then of
    themselves."""
    ranks = {word: rank for rank, word in enumerate(words)}
    for word in words:
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        for left, right in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            yield f"{_printed(left)} {_printed(right)}"


def _printed(word: bytes) -> str:
    return "".join(map(_printed_bytes().__getitem__, word))


@functools.cache
def _printed_bytes() -> list[str]:
    """The character that stands for each byte, as in GPT-2: itself if it can be printed,
    and otherwise one beyond."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(i if i in printed else next(others)) for i in range(256)]
