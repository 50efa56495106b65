"""Tokenizers in files, each opened by the library that it needs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from .. import arguments
from ..arguments import printable
from .folders import read_json_object


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
    """

    size: int
    bos_id: int
    eos_id: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    control_id: Callable[[str], int | None]
    is_padded: bool = False


def open_sentencepiece(path: Path) -> Vocabulary:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        n_pieces = model.vocab_size()
        # Looked at once: a piece that is no text would fail in the middle of a text.
        model.id_to_piece(list(range(n_pieces)))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, "a sentencepiece model", error) from error
    added = _read_added_tokens(path.parent / "added_tokens.json", n_pieces)

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
    )


def is_failure(error: BaseException) -> bool:
    """Whether a library has failed. The panics of those in Rust are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _unreadable(path: Path, what: str, error: Exception | str) -> ValueError:
    return ValueError(printable(f"{path} is not {what}, or not all of it: {error}"))


def _read_added_tokens(path: Path, n_pieces: int) -> dict[str, int]:
    """The tokens that a derived model has beyond its sentencepiece model."""
    if not path.is_file():
        return {}
    tokens = _read_object(path)
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
    except BaseException as error:  # mistral-common documents none, and asserts some
        if not is_failure(error):
            raise
        told = error if isinstance(error, ValueError) and str(error) else repr(error)
        raise ValueError(
            f"{path} is not a Tekken, or not all of it: {printable(str(told))}"
        ) from error

    def control_id(name: str) -> int | None:
        return model.get_special_token(name) if model.is_special(name) else None

    return Vocabulary(
        size=model.n_words,
        bos_id=bos_id,
        eos_id=eos_id,
        encode=lambda text: model.encode(text, bos=False, eos=False),
        decode=model.decode,
        control_id=control_id,
    )


def open_tokenizer_json(path: Path) -> Vocabulary:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f'{path} can only be read with tokenizers: pip install "mistral_eqx[chat]".'
        ) from error
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
        added = model.get_added_tokens_decoder()
        size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    except BaseException as error:  # tokenizers raises `Exception` itself
        if not is_failure(error):
            raise
        raise _unreadable(path, "a tokenizer.json", error) from error
    # The name of a special token in a text is text.
    model.encode_special_tokens = True
    special = {str(token.content): i for i, token in added.items() if token.special}
    names = _read_special_names(path.with_name("tokenizer_config.json"))
    bos, eos = names.get("bos_token", "<s>"), names.get("eos_token", "</s>")
    for name in (bos, eos):
        if model.token_to_id(name) is None:
            raise ValueError(
                f"{path} has no token {name!r}. Its folder should have a "
                "tokenizer_config.json that names its bos_token and its eos_token."
            )
    return Vocabulary(
        size=size,
        bos_id=model.token_to_id(bos),
        eos_id=model.token_to_id(eos),
        encode=lambda text: model.encode(text, add_special_tokens=False).ids,
        decode=model.decode,
        control_id=special.get,
        is_padded=True,
    )


def _read_special_names(path: Path) -> dict[str, str]:
    """The names of the special tokens in a `tokenizer_config.json`, if there is one."""
    values = _read_object(path) if path.is_file() else {}
    names = {}
    for key in ("bos_token", "eos_token"):
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as a folder's `generation_config.json` has them, or its
    `config.json`; none if neither says. Raises `ValueError` for others than ids."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = _read_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(
                    f"{path} cannot be used: eos_token_id must be an id or a list of ids, "
                    f"got {arguments.shown(ids)}."
                )
            return tuple(ids)
    return ()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
