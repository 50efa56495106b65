"""Text to token ids and back, by the library that each kind of tokenizer needs."""

import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from . import arguments
from .arguments import printable
from .files.folders import gguf_in, read_config
from .files.hub import local_folder
from .files.vocabulary import (
    Vocabulary,
    is_failure,
    is_tekken,
    open_gguf,
    open_sentencepiece,
    open_tekken,
    open_tokenizer_json,
    read_chat_templates,
    read_eos_ids,
)


# The first kind that a folder has is used, and of several versions the newest: a folder of
# v0.3 has its tokenizer under two names.
_FILES = (
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",
    "tekken.json",
    "tokenizer.json",
)
# How many ids a Detokenizer decodes again: more than any character's bytes.
_CONTEXT = 16


class Tokenizer:
    """The tokenizer of a model. `encode` begins with the BOS id, as every Mistral expects.

    **Attributes:** `path`, `vocab_size`, `bos_id`, `eos_id`; `eos_ids`, all ids that end a
    text; `is_padded`, whether the model may have more ids; `token_names`, the control and
    added tokens, from their names to their ids.

    For chat templates: `chat_template`, the one that the folder brings, if it does;
    `tool_template`, its other one for conversations with tools, if it has one;
    `template_path`, where they are from; `special_names`, the "bos_token" and others.
    """

    def __init__(self, path: str | os.PathLike):
        """**Arguments:**

        - `path`: of a sentencepiece model (`tokenizer.model`), of a Tekken (`tekken.json`,
            which needs mistral-common), of a `tokenizer.json` (which needs tokenizers), or
            of a GGUF, whose metadata have one.

        **Raises:**

        `FileNotFoundError` without a file there, `ValueError` if it cannot be read,
        `ImportError` without the library that it needs.
        """
        self.path = Path(arguments.path("path", path))
        if not self.path.is_file():
            raise FileNotFoundError(printable(f"There is no tokenizer at {self.path}."))
        opener = open_sentencepiece
        if self.path.suffix == ".gguf":
            opener = open_gguf
        elif self.path.suffix == ".json":
            opener = open_tekken if is_tekken(self.path) else open_tokenizer_json
        self._vocabulary: Vocabulary = opener(self.path)
        self.vocab_size: int = self._vocabulary.size
        self.bos_id: int = self._vocabulary.bos_id
        self.eos_id: int = self._vocabulary.eos_id
        self.is_padded: bool = self._vocabulary.is_padded
        self.eos_ids: tuple[int, ...] = (self.eos_id,)
        self.token_names: Mapping[str, int] = self._vocabulary.names
        self.special_names: Mapping[str, str] = self._vocabulary.special_names
        self.chat_template: str | None = None
        self.tool_template: str | None = None
        self.template_path = self.path

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of `text`, after the BOS id if `bos`. The name of a control id in it is
        text like any other. Raises `TypeError` or `ValueError` for what is no text."""
        ids = self._encoded(self._vocabulary.encode, text)
        return [self.bos_id, *ids] if bos else ids

    def encode_template(self, text: str) -> list[int]:
        """The ids of what a chat template has written. The name of a control token or of
        an added token in it is this token, and there is no BOS id before it. Raises as
        `encode` does."""
        return self._encoded(self._vocabulary.encode_template, text)

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text`, without the BOS id. No name in it is a token, not even of an
        added token that is no control token, which `encode` finds. Raises as `encode`
        does."""
        return self._encoded(self._vocabulary.encode_plain or self._vocabulary.encode, text)

    def _encoded(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        text = arguments.text("text", text)
        try:
            return encode(text)
        except BaseException as error:  # a damaged file may say so here only
            if not is_failure(error):
                raise
            raise ValueError(printable(f"{self.path} cannot encode: {error}")) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Control ids (BOS, EOS) have none, nor have those that a model
        has beyond the vocabulary if it `is_padded`.

        **Raises:**

        `TypeError` for what are no ids, `ValueError` for one that is not in the vocabulary.
        """
        ids = arguments.items("ids", ids, "token ids")
        try:
            return self._vocabulary.decode([operator.index(token) for token in ids])
        except BaseException as error:  # each library has its own for a wrong id
            if not is_failure(error):
                raise
            for token in ids:
                arguments.integer("a token id", token, most=self.vocab_size - 1)
            raise ValueError(printable(f"{self.path} cannot decode: {error}")) from error

    def control_id(self, name: str) -> int | None:
        """The id of a control token, as of "[THINK]"; `None` if there is none."""
        return self._vocabulary.control_id(name)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Opens the tokenizer in a model's folder: `tokenizer.model`, the newest of
    `tokenizer.model.v1`, `.v2`, ..., `tekken.json`, or `tokenizer.json`. Which ids end a
    text is said by `generation_config.json`, if there is one. A chat template comes from
    `chat_template.jinja` or from `tokenizer_config.json`. If there are no such files beside
    a GGUF, then all is in its metadata.

    **Raises:**

    `FileNotFoundError` if there is none of them, and as [`Tokenizer`][] does.
    """
    folder = local_folder(arguments.path("folder", folder))
    gguf = gguf_in(folder)
    folder = folder if gguf is None else gguf.parent
    found = (sorted(folder.glob(pattern), key=_version) for pattern in _FILES)
    files = next(filter(None, found), None)
    if files is None and gguf is None:
        raise FileNotFoundError(
            f"There is no tokenizer in {printable(str(folder))}: no tokenizer.model, no "
            "tekken.json and no tokenizer.json. They come with the weights: download the "
            "whole folder."
        )
    if files is None:
        folder, files = gguf, [gguf]
    tokenizer = Tokenizer(files[-1])
    tokenizer.eos_ids = read_eos_ids(folder) or tokenizer.eos_ids
    tokenizer.template_path, templates = read_chat_templates(folder)
    tokenizer.chat_template = templates.get("default")
    tokenizer.tool_template = templates.get("tool_use")
    return tokenizer


def load_checked_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """As [`load_tokenizer`][], for the model in the folder. Raises `ValueError` also if it
    is another model's."""
    config = read_config(folder)  # which knows what the folder is, or is not
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size)
    return tokenizer


def _version(path: Path) -> tuple[int, str]:
    """7 for `tokenizer.model.v7m1`."""
    digits = re.match(r"\d*", path.name.rpartition(".v")[2])[0]
    return int(digits or 0), path.name


class Detokenizer:
    """Text from ids as they come: the pieces together are the text of all ids.

    By themselves ids have no text: a word's first id has its space only behind another,
    and a character may be bytes of several ids. So a few ids before the new ones are
    decoded again with them, and what may be an unfinished character is held back.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = ()):
        """**Arguments:**

        - `tokenizer`: of the ids.
        - `context`: what stands before them, whose text is not told.
        """
        self._decode = tokenizer.decode
        self._ids = list(context)
        self._text = self._decode(self._ids)
        self._told = len(self._text)

    def add(self, ids: Iterable[int]) -> str:
        """The text that `ids` make certain."""
        self._ids += ids
        self._text = self._decode(self._ids)
        # An unfinished character is up to three bytes, and each may be decoded as one
        # replacement character.
        trailing = len(self._text) - len(self._text.rstrip("\ufffd"))
        piece = self._tell(len(self._text) - min(trailing, 3))
        if len(self._ids) > 2 * _CONTEXT:
            self._forget()
        return piece

    def end(self) -> str:
        """What was held back, as no more ids come."""
        return self._tell(len(self._text))

    def _tell(self, end: int) -> str:
        piece = self._text[self._told : end]
        self._told = max(self._told, end)
        return piece

    def _forget(self) -> None:
        """Keeps the last ids only, so that a long text takes no longer for each id."""
        ids = self._ids[-_CONTEXT:]
        text = self._decode(ids)
        untold = len(self._text) - self._told
        # If the kept ids had no text, as control ids have none, the next one would count as
        # the first of a text and lose its space.
        if len(text) > untold:
            self._ids, self._text, self._told = ids, text, len(text) - untold


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ValueError` if a tokenizer is not of a model with so many ids: another
    one's ids would be read as other words, without an error."""
    fits = tokenizer.vocab_size == vocab_size
    if not fits and not (tokenizer.is_padded and tokenizer.vocab_size < vocab_size):
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model has "
            f"{vocab_size}: they are not of the same model. (Mistral's v1 tokenizer has "
            "32000, v2, v3 and v7 have 32768, Tekken 131072.)"
        )
