"""Text to token ids and back: Mistral's sentencepiece tokenizers, and its Tekken."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece


# The newest first: a folder of v0.3 has its tokenizer under two names.
_FILES = ("tokenizer.model", "tokenizer.model.v[0-9]*", "tekken.json")
# How many ids a Detokenizer decodes again: more than any character's bytes.
_CONTEXT = 16


class Tokenizer:
    """A sentencepiece model or a Tekken. `encode` begins with the BOS id, as every Mistral
    expects.

    **Attributes:** `path`, `vocab_size`, `bos_id`, `eos_id`.
    """

    def __init__(self, path: str | os.PathLike):
        """**Arguments:**

        - `path`: of a `tokenizer.model` or, with mistral-common installed, of a
            `tekken.json`.

        **Raises:**

        `FileNotFoundError` without a file there, `ValueError` if it cannot be read,
        `ImportError` for a Tekken without mistral-common.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no tokenizer at {self.path}.")
        if self.path.suffix == ".json":
            self._model = _open_tekken(self.path)
            self.vocab_size: int = self._model.n_words
            self.bos_id: int = self._model.bos_id
            self.eos_id: int = self._model.eos_id
        else:
            self._model = _open_sentencepiece(self.path)
            self.vocab_size = self._model.vocab_size()
            self.bos_id = self._model.bos_id()
            self.eos_id = self._model.eos_id()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of `text`, after the BOS id if `bos`."""
        if isinstance(self._model, sentencepiece.SentencePieceProcessor):
            ids = self._model.encode(text)
        else:
            ids = self._model.encode(text, bos=False, eos=False)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Control ids (BOS, EOS) have none."""
        return self._model.decode(list(ids))


def _open_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{path} is not a sentencepiece model, or not all of it: {error}"
        ) from error


def _open_tekken(path: Path) -> "mistral_common.tokens.tokenizers.tekken.Tekkenizer":
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError as error:
        raise ImportError(
            f'{path} can only be read with mistral-common: pip install "mistral_eqx[chat]".'
        ) from error
    try:
        return Tekkenizer.from_file(path)
    except Exception as error:  # mistral-common documents none, and asserts some
        raise ValueError(f"{path} is not a Tekken, or not all of it: {error!r}") from error


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Opens the tokenizer in a model's folder: `tokenizer.model`, the newest of
    `tokenizer.model.v1`, `.v2`, ..., or `tekken.json`.

    **Raises:**

    `FileNotFoundError` if there is none of them, and as [`Tokenizer`][] does.
    """
    folder = Path(folder)
    for pattern in _FILES:
        if files := sorted(folder.glob(pattern), key=_version):
            return Tokenizer(files[-1])
    raise FileNotFoundError(
        f"There is no tokenizer in {folder}: no tokenizer.model and no tekken.json. "
        "They come with the weights: download the whole folder."
    )


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
        # Ids without text, as control ids are, would take the next one's space with them.
        if len(text) > untold:
            self._ids, self._text, self._told = ids, text, len(text) - untold


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ValueError` if a tokenizer is not of a model with so many ids: another
    one's ids would be read as other words, without an error."""
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model has "
            f"{vocab_size}: they are not of the same model. (Mistral's v1 tokenizer has "
            "32000, v2, v3 and v7 have 32768, Tekken 131072.)"
        )
