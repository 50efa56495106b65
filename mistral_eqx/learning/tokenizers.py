"""Tokenizers learnt from a text, with the settings of Mistral's."""

import io
import os
from pathlib import Path

import sentencepiece


def train_tokenizer(text: str, path: str | os.PathLike, *, vocab_size: int = 2048) -> None:
    """Trains a tokenizer with the settings of Mistral's (BPE, bytes for what has no piece,
    digits apart, no normalisation, ids 0, 1, 2 for unknown, BOS, EOS) and writes it.

    **Arguments:**

    - `text`: to learn the pieces from.
    - `path`: where to write the `tokenizer.model`.
    - `vocab_size`: how many pieces, the 256 bytes and 3 control ids among them.

    **Raises:**

    `ValueError` if the text is too short for so many, or has more characters.
    """
    # Needs protobuf, which only training does.
    from sentencepiece import sentencepiece_model_pb2

    path = Path(path)
    trained = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # Only the first line of a text is tokenized behind a dummy space, so the
            # pieces are learnt without; the flag is set in the finished model below.
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            max_sentencepiece_length=16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_surface=" \u2047 ",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"A tokenizer with {vocab_size} ids cannot be learnt from a text of "
            f"{len(text)} characters: {error}"
        ) from error
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    model.normalizer_spec.add_dummy_prefix = True
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.SerializeToString())
    partial.replace(path)
