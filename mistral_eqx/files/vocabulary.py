"""Tokenizers in files, each opened by the library that it needs."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from .. import arguments
from ..arguments import printable
from .folders import read_json_file, read_json_object
from .gguf import read_metadata
from .gguf_tokenizer import chat_template, import_tokenizers, special_ids, tokenizer_file


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the libraries have in common.

    **Attributes:**

    - `size`: the number of ids.
    - `bos_id`, `eos_id`: which begin and end a text.
    - `encode`: from a text to ids, without the BOS id.
    - `decode`: from ids to a text. Control ids have none.
    - `control_id`: from the name of a control token to its id; `None` if there is none.
    - `is_padded`: whether the model may have more ids than this, as derived models do,
        which round their number up.
    - `names`: the control tokens and the added tokens, from their names to their ids.
    - `encode_template`: from the text of a chat template to ids. The names in it are these
        tokens.
    - `encode_plain`: as `encode`, where that takes some of the names for tokens.
    - `special_names`: which of the tokens is the "bos_token", the "eos_token" and so on.
    """

    size: int
    bos_id: int
    eos_id: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    control_id: Callable[[str], int | None]
    names: Mapping[str, int]
    encode_template: Callable[[str], list[int]]
    special_names: Mapping[str, str]
    encode_plain: Callable[[str], list[int]] | None = None
    is_padded: bool = False


def open_sentencepiece(path: Path) -> Vocabulary:
    added = path.with_name("added_tokens.json")
    config = _read_tokenizer_config(path)
    return _sentencepiece(path, {"model_file": str(path)}, added, config)


def _sentencepiece(
    path: Path, source: Mapping[str, Any], added: Path | None, config: Mapping[str, Any]
) -> Vocabulary:
    try:
        model = sentencepiece.SentencePieceProcessor(**source)
        n_pieces = model.vocab_size()
        # Looked at once: a piece that is no text would fail in the middle of a text.
        model.id_to_piece(list(range(n_pieces)))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, "a sentencepiece model", error) from error
    added = {} if added is None else _read_added_tokens(added, n_pieces)
    special = [i for i in range(n_pieces) if model.is_control(i) or model.is_unknown(i)]
    names = {model.id_to_piece(i): i for i in special} | added
    own = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    own |= {"unk_token": model.unk_id()}

    def decode(ids: list[int]) -> str:
        # Added tokens are control tokens in all but name, and have no text.
        return model.decode([i for i in ids if i < n_pieces])

    def control_id(name: str) -> int | None:
        token = model.piece_to_id(name)
        return token if model.is_control(token) else added.get(name)

    return Vocabulary(
        size=max([n_pieces - 1, *added.values()]) + 1,
        bos_id=model.bos_id(),
        eos_id=model.eos_id(),
        encode=model.encode,
        decode=decode if added else model.decode,
        control_id=control_id,
        is_padded=bool(added),
        names=names,
        encode_template=encoder_with_names(
            names, model.encode, blank_behind=config.get("legacy") is not False
        ),
        special_names={key: model.id_to_piece(i) for key, i in own.items() if i >= 0}
        | _special_names(config),
    )


def encoder_with_names(
    names: Mapping[str, int],
    encode: Callable[[str], list[int]],
    *,
    blank_behind: bool = True,
) -> Callable[[str], list[int]]:
    """`encode`, but the names in a text are their ids, the longest first. Sentencepiece
    puts a blank before a text. `blank_behind` says whether the text behind a name gets one
    too, as in the tokenizers that transformers calls legacy: all before mid-2023."""
    # Compiled when it is needed: it takes a while, and most texts are no templates.
    found = functools.cache(lambda: re.compile(f"({any_of(names)})"))

    def encode_template(text: str) -> list[int]:
        ids = []
        # Text and names in turns.
        for i, piece in enumerate(found().split(text)):
            if i % 2:
                ids.append(names[piece])
            elif piece:
                is_first = i == 0 or blank_behind
                ids += encode(piece) if is_first else encode_behind(encode, piece)
        return ids

    return encode_template


def any_of(names: Iterable[str]) -> str:
    """The regular expression that finds the names in a text, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def encode_behind(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """The ids of a text in the middle of another, without the blank that `encode` may put
    before the first word."""
    line = encode("\n")
    ids = encode("\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else encode(text)


def is_tekken(path: Path) -> bool:
    """Whether a tokenizer's file is a Tekken, by its name."""
    return path.suffix == ".json" and "tekken" in path.name


def is_failure(error: BaseException) -> bool:
    """Whether a library has failed. The panics of those in Rust are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _unreadable(path: Path, what: str, error: Exception | str) -> ValueError:
    return ValueError(printable(f"{path} is not {what}, or not all of it: {error}"))


def _read_added_tokens(path: Path, n_pieces: int) -> dict[str, int]:
    """The tokens that a derived model has beyond its sentencepiece model."""
    if not path.is_file():
        return {}
    tokens = read_json_file(path)
    try:
        return {
            name: arguments.integer("an id", token, most=2 * n_pieces + 2**16)
            for name, token in tokens.items()
        }
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def open_tekken(path: Path) -> Vocabulary:
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError as error:
        raise ImportError(
            f'{path} can only be read with mistral-common: pip install "mistral_eqx[chat]".'
        ) from error
    try:
        config = read_json_object(path)["config"]
        # mistral-common makes a name for each before it looks at anything else.
        arguments.integer(
            "default_num_special_tokens", config["default_num_special_tokens"], most=2**16
        )
        model = Tekkenizer.from_file(path)
        bos_id, eos_id = (
            arguments.integer("an id", i, most=model.n_words - 1)
            for i in (model.bos_id, model.eos_id)
        )
        names = {model.id_to_piece(i): i for i in model.special_ids}
    except BaseException as error:  # mistral-common documents none, and asserts some
        if not is_failure(error):
            raise
        told = error if isinstance(error, ValueError) and str(error) else repr(error)
        raise ValueError(
            f"{path} is not a Tekken, or not all of it: {printable(str(told))}"
        ) from error

    def control_id(name: str) -> int | None:
        return model.get_special_token(name) if model.is_special(name) else None

    def encode(text: str) -> list[int]:
        return model.encode(text, bos=False, eos=False)

    return Vocabulary(
        size=model.n_words,
        bos_id=bos_id,
        eos_id=eos_id,
        encode=encode,
        decode=model.decode,
        control_id=control_id,
        names=names,
        encode_template=encoder_with_names(names, encode),
        special_names={"bos_token": "<s>", "eos_token": "</s>"}
        | _special_names(_read_tokenizer_config(path)),
    )


def open_tokenizer_json(path: Path) -> Vocabulary:
    return _tokenizer_json(path, path.read_bytes(), _read_tokenizer_config(path))


def _tokenizer_json(path: Path, content: bytes, config: Mapping[str, Any]) -> Vocabulary:
    tokenizers = import_tokenizers(path)
    try:
        model = tokenizers.Tokenizer.from_buffer(content)
        added = model.get_added_tokens_decoder()
        size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    except BaseException as error:  # tokenizers raises `Exception` itself
        if not is_failure(error):
            raise
        raise _unreadable(path, "a tokenizer.json", error) from error
    # The name of a special token in a text is text.
    model.encode_special_tokens = True
    special = {str(token.content): i for i, token in added.items() if token.special}
    names = _special_names(config)
    bos, eos = names.get("bos_token", "<s>"), names.get("eos_token", "</s>")
    for name in (bos, eos):
        if model.token_to_id(name) is None:
            raise ValueError(
                f"{path} has no token {name!r}. Its folder should have a "
                "tokenizer_config.json that names its bos_token and its eos_token."
            )

    @functools.cache
    def another(with_added_tokens: bool):
        """The same tokenizer, which finds all added tokens in a text, or none."""
        content = json.loads(model.to_str())
        if not with_added_tokens:
            content["added_tokens"] = []
        other = tokenizers.Tokenizer.from_str(json.dumps(content))
        return lambda text: other.encode(text, add_special_tokens=False).ids

    return Vocabulary(
        size=size,
        bos_id=model.token_to_id(bos),
        eos_id=model.token_to_id(eos),
        encode=lambda text: model.encode(text, add_special_tokens=False).ids,
        decode=model.decode,
        control_id=special.get,
        is_padded=True,
        names={str(token.content): i for i, token in added.items()},
        encode_template=lambda text: another(True)(text),
        encode_plain=lambda text: another(False)(text),
        special_names=names,
    )


def open_gguf(path: Path) -> Vocabulary:
    """The tokenizer in a GGUF's metadata."""
    metadata = read_metadata(path)
    name, content = tokenizer_file(metadata, path)
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {"unk" if k == "unknown" else k: i for k, i in special_ids(metadata).items()}
    config = {f"{key}_token": tokens[i] for key, i in ids.items()}
    if name == "tokenizer.json":
        return _tokenizer_json(path, content, config)
    return _sentencepiece(path, {"model_proto": content}, None, config)


def _read_tokenizer_config(beside: Path) -> dict[str, Any]:
    path = beside.with_name("tokenizer_config.json")
    return read_json_file(path) if path.is_file() else {}


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of the special tokens in a `tokenizer_config.json`."""
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as a folder's `generation_config.json` has them, or its
    `config.json`, or a GGUF; none if none says. Raises `ValueError` for others than ids."""
    if folder.suffix == ".gguf":
        ids = special_ids(read_metadata(folder))
        return tuple(sorted({ids[key] for key in ("eos", "eot", "eom") if key in ids}))
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json_file(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(
                    f"{path} cannot be used: eos_token_id must be an id or a list of ids, "
                    f"got {arguments.shown(ids)}."
                )
            return tuple(ids)
    return ()


def read_chat_templates(folder: Path) -> tuple[Path, dict[str, str]]:
    """The chat templates of a folder, or a GGUF, by their names, "default" and "tool_use",
    and the file that they are in; none if there are none. Files of their own come first,
    as in transformers. Raises `ValueError` for what are no templates."""
    if folder.suffix == ".gguf":
        found = chat_template(read_metadata(folder))
        return folder, {} if found is None else {"default": found}
    path = folder / "chat_template.jinja"
    files = {"default": path}
    files["tool_use"] = folder / "additional_chat_templates" / "tool_use.jinja"
    files = {name: file for name, file in files.items() if file.is_file()}
    if files:
        return path, {name: _read_text(file) for name, file in files.items()}
    path = folder / "tokenizer_config.json"
    found = read_json_file(path).get("chat_template") if path.is_file() else None
    if found is None:
        return path, {}
    found = {"default": found} if isinstance(found, str) else found
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {str(entry.get("name")): entry.get("template") for entry in found}
    if not isinstance(found, dict) or not all(isinstance(t, str) for t in found.values()):
        raise ValueError(
            printable(
                f"{path} cannot be used: chat_template must be a text, or a list of "
                f'{{"name": ..., "template": ...}}, got {arguments.shown(found)}.'
            )
        )
    return path, found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(printable(f"{path} is not a text in UTF-8: {error}")) from error
