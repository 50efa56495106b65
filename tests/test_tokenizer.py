"""Text comes back from ids; every version gives the ids of mistral-common, which is the
authority."""

import base64
import json
import shutil
from pathlib import Path

import mistral_common
import pytest
import tokenizers
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


def tekken(folder, **changes):
    """A small `tekken.json`, of the 256 bytes."""
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
        for i in range(256)
    ]
    special = [
        {"rank": i, "token_str": name, "is_control": True}
        for i, name in enumerate(changes.pop("names", ["<unk>", "<s>", "</s>"]))
    ]
    config = {
        "pattern": ".",
        "num_vocab_tokens": 256,
        "default_vocab_size": 266,
        "default_num_special_tokens": 10,
        "version": "v13",
    }
    content = {"vocab": vocab, "special_tokens": special, "config": config | changes}
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder / "tekken.json"


def test_a_tekken_without_its_first_tokens(tmp_path):
    assert Tokenizer(tekken(tmp_path)).vocab_size == 266
    with pytest.raises(ValueError, match="tekken.json is not a Tekken, .* <s>"):
        Tokenizer(tekken(tmp_path, names=["<unk>", "</s>"]))


def test_a_tekken_with_absurd_sizes(tmp_path):
    path = tekken(tmp_path, default_num_special_tokens=10**9, default_vocab_size=2 * 10**9)
    with pytest.raises(
        ValueError, match="default_num_special_tokens must be at most 65536"
    ):
        Tokenizer(path)


def test_pieces_that_are_no_text(tmp_path):
    content = (TINY_MISTRAL / "tokenizer.model").read_bytes()
    piece = "king".encode()
    assert piece in content
    (tmp_path / "tokenizer.model").write_bytes(content.replace(piece, b"k\xff\xfeg"))
    with pytest.raises(
        ValueError, match="tokenizer.model is not a sentencepiece model, or"
    ):
        Tokenizer(tmp_path / "tokenizer.model")


def test_added_tokens(tmp_path):
    """As in OpenOrca's and other models' folders: ids beyond the sentencepiece model's."""
    shutil.copy(TINY_MISTRAL / "tokenizer.model", tmp_path)
    added = {"<|im_end|>": 2048, "<|im_start|>": 2049}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 2050
    assert tokenizer.control_id("<|im_start|>") == 2049
    text = "<|im_start|>user"
    assert tokenizer.encode(text) == EMBEDDED.encode(text)
    assert tokenizer.decode([*EMBEDDED.encode("To be"), 2048]) == "To be"
    check_vocabulary(tokenizer, 2050)
    check_vocabulary(tokenizer, 2056)  # rounded up
    with pytest.raises(ValueError, match="has 2050 ids, but the model has 2049"):
        check_vocabulary(tokenizer, 2049)
    for wrong in ('{"a": -1}', "[]", '{"a": "b"}', "{", '{"a": 1e9}'):
        (tmp_path / "added_tokens.json").write_text(wrong)
        with pytest.raises(ValueError, match="added_tokens.json cannot be used"):
            load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a `tokenizer.json` and nothing else, as transformers 5 writes it."""
    folder = tmp_path_factory.mktemp("bpe")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "[INST]"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    model.save(str(folder / "tokenizer.json"))
    return folder


@given(text=some_text)
def test_a_tokenizer_json(bpe, text):
    tokenizer = load_tokenizer(bpe)
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id == 1 and tokenizer.eos_id == 2
    assert tokenizer.decode(ids) == text
    # The name of a control token in a text is text.
    assert all(token > 3 for token in ids[1:])


def test_the_special_names_of_a_tokenizer_json(bpe, tmp_path):
    shutil.copy(bpe / "tokenizer.json", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    names = {"bos_token": "[INST]", "eos_token": {"content": "<unk>"}}
    path.write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (3, 0)
    path.write_text(json.dumps({"bos_token": "<bos>"}))
    with pytest.raises(ValueError, match="tokenizer.json has no token '<bos>'"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is not a tokenizer.json, or not all of it"):
        (tmp_path / "tokenizer.json").write_text("{}")
        load_tokenizer(tmp_path)
