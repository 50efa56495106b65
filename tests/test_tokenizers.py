"""Every version of the tokenizer against mistral-common, which is the authority."""

import shutil
from pathlib import Path

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_eqx import Tokenizer, load_tokenizer
from mistral_eqx.tokenizer import check_vocabulary


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
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tekken.json"):
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
