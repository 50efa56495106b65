"""Text comes back from ids; every version gives the ids of mistral-common, which is the
authority."""

import shutil
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings, strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_eqx import Tokenizer, load_tokenizer, train_tokenizer
from mistral_eqx.text import TINY_MISTRAL
from mistral_eqx.tokenizer import check_vocabulary


EMBEDDED = Tokenizer(TINY_MISTRAL / "tokenizer.model")
TEXT = "the cat sat on the mat, and the dog sat by the door\nat 10 past 12\n" * 50
some_text = st.text() | st.text(alphabet="<>/sunk0x41 \n\t\u2581\u20477é🦙")


@given(text=some_text)
@settings(max_examples=500)
def test_round_trip(text):
    """Every text comes back, whatever its characters. Sentencepiece writes a space as
    U+2581 inside, so that one character comes back as a space: the only loss."""
    assert EMBEDDED.decode(EMBEDDED.encode(text)) == text.replace("\u2581", " ")


@given(text=some_text)
def test_ids(text):
    ids = EMBEDDED.encode(text)
    assert ids[0] == EMBEDDED.bos_id and ids[1:] == EMBEDDED.encode(text, bos=False)
    # Text that looks like a control piece is text, and nothing is unknown.
    assert all(2 < token < EMBEDDED.vocab_size for token in ids[1:])


def test_special_ids_are_mistrals():
    assert (EMBEDDED.bos_id, EMBEDDED.eos_id, EMBEDDED.vocab_size) == (1, 2, 2048)
    assert EMBEDDED.encode("") == [1]
    assert EMBEDDED.decode([]) == EMBEDDED.decode([1, 2]) == ""
    # Bytes are the ids from 3.
    assert EMBEDDED.encode("🦙", bos=False)[-4:] == [3 + byte for byte in "🦙".encode()]


@given(number=st.integers(0, 10**30))
def test_digits_are_apart(number):
    text = str(number)
    # One for the space before them, and one for each.
    assert len(EMBEDDED.encode(text, bos=False)) == 1 + len(text)


@pytest.mark.parametrize("text", [" ", "   ", "a  b", " a", "a ", "\n\n  x", "\t"])
def test_spaces_are_kept(text):
    assert EMBEDDED.decode(EMBEDDED.encode(text)) == text


def test_missing(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(FileNotFoundError, match=f"no tokenizer at {path}"):
        Tokenizer(path)


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_damaged(tmp_path, size):
    path = tmp_path / "tokenizer.model"
    path.write_bytes((TINY_MISTRAL / "tokenizer.model").read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{path} is not a sentencepiece model"):
        Tokenizer(path)


@pytest.mark.parametrize("vocab_size", [2047, 2049, 32000])
def test_of_another_model(vocab_size):
    with pytest.raises(ValueError, match=f"has 2048 ids, but the model has {vocab_size}"):
        check_vocabulary(EMBEDDED, vocab_size)
    check_vocabulary(EMBEDDED, 2048)


def test_training(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    path = tmp_path / "tokenizer.model"
    train_tokenizer(TEXT, path, vocab_size=300)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]
    tokenizer = Tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 1, 2)
    assert len(tokenizer.encode("the cat sat", bos=False)) <= 4
    for text in (TEXT, "", " ", "🦙 <s> 2024\r\n", "  two  spaces"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The settings of Mistral's own tokenizer.model.
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    settings, normalizer = model.trainer_spec, model.normalizer_spec
    assert settings.model_type == settings.BPE
    assert settings.byte_fallback and settings.split_digits
    assert settings.allow_whitespace_only_pieces and not settings.treat_whitespace_as_suffix
    assert settings.max_sentencepiece_length == 16
    assert abs(settings.character_coverage - 0.99995) < 1e-6
    assert (settings.unk_id, settings.pad_id) == (0, -1)
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    pieces = [piece.piece for piece in model.pieces]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_training_again_gives_the_same(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(TEXT, tmp_path / name, vocab_size=300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "text, vocab_size", [(TEXT, 10**5), (TEXT, 200), (TEXT, 0), ("", 300), ("\n", 300)]
)
def test_training_that_cannot_be(tmp_path, text, vocab_size):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match=f"tokenizer with {vocab_size} ids"):
        train_tokenizer(text, path, vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


DATA = Path(mistral_common.__file__).parent / "data"
TEXTS = ["To be, or not to be", "  ça va? 东京 🙂\n\n\tx = 3.14159", ""]
VERSIONS = {
    "tokenizer.model": ("tokenizer.model.v1", 32000),
    "tokenizer.model.v1": ("tokenizer.model.v1", 32000),
    "tokenizer.model.v2": ("mistral_instruct_tokenizer_240216.model.v2", 32768),
    "tokenizer.model.v3": ("mistral_instruct_tokenizer_240323.model.v3", 32768),
    "tokenizer.model.v7": ("mistral_instruct_tokenizer_241114.model.v7", 32768),
    "tekken.json": ("tekken_240911.json", 131072),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_same_ids_and_text(name, tmp_path):
    file, vocab_size = VERSIONS[name]
    shutil.copy(DATA / file, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.path == tmp_path / name
    assert tokenizer.vocab_size == vocab_size
    theirs = MistralTokenizer.from_file(str(DATA / file)).instruct_tokenizer.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_id, theirs.eos_id)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text, bos=False) == ids[1:]
        assert tokenizer.decode(ids) == text == tokenizer.decode([*ids, tokenizer.eos_id])
    check_vocabulary(tokenizer, vocab_size)
    with pytest.raises(ValueError, match=f"has {vocab_size} ids, but the model has 65536"):
        check_vocabulary(tokenizer, 65536)


def test_the_newest_is_taken(tmp_path):
    for name in ("tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v2"):
        shutil.copy(DATA / VERSIONS[name][0], tmp_path / name)
    assert load_tokenizer(tmp_path).path.name == "tokenizer.model.v3"


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model, no tekken.json and"):
        load_tokenizer(tmp_path)


def test_damaged_tekken(tmp_path):
    for content in ("{", "[]", "{}", '{"config": {"version": "v3"}}'):
        (tmp_path / "tekken.json").write_text(content)
        with pytest.raises(ValueError, match="is not a Tekken, or not all of it"):
            Tokenizer(tmp_path / "tekken.json")


def test_tekken_without_mistral_common(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mistral_common.tokens.tokenizers.tekken", None)
    with pytest.raises(ImportError, match=r'pip install "mistral_eqx\[chat\]"'):
        Tokenizer(DATA / "tekken_240911.json")
