"""Either format out, bit for bit, and nothing lost or half written."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import mistral_common
import ml_dtypes
import numpy as np
import pytest
import transformers
from layouts import assert_is_mixtral, assert_same_bits, weights_of, write_raw
from models import random_model

import mistral_eqx
from mistral_eqx import convert, load_model, save
from mistral_eqx.files import atomic, export, weights
from mistral_eqx.files.checkpoint import open_checkpoint
from mistral_eqx.text import TINY_MISTRAL
from mistral_eqx.tokenizer import load_tokenizer


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_a_saved_mixtral(format, tmp_path):
    """Experts are stacked in the model and one by one in the files."""
    model = load_model(write_raw(tmp_path / "raw", "Mixtral"), dtype="bfloat16")
    save(model, tmp_path / "saved", format=format, max_shard_size="30KB")
    assert_same_bits(tmp_path / "saved", "Mixtral")
    again = load_model(tmp_path / "saved", dtype="bfloat16")
    assert again.config.moe == model.config.moe
    assert_is_mixtral(again)


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
def test_save_then_load_is_the_identity(format, tmp_path):
    model = load_model(write_raw(tmp_path / "raw"), dtype="bfloat16")
    save(model, tmp_path / "saved", format=format)
    assert_same_bits(tmp_path / "saved", "v0.3")
    again = load_model(tmp_path / "saved", dtype="bfloat16")
    assert again.config.windows == model.config.windows
    for leaf, other in zip(jax.tree.leaves(model), jax.tree.leaves(again)):
        np.testing.assert_array_equal(leaf, other)


def test_the_one_file_port_reads_what_is_written(tmp_path):
    import one_file_ref

    convert(write_raw(tmp_path / "first"), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "raw")
    theirs = one_file_ref.Transformer.from_folder(tmp_path / "raw", jnp.float32)
    ours = load_model(tmp_path / "raw", dtype="float32")
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(leaf, other)


def test_save_in_another_dtype(tmp_path):
    raw = write_raw(tmp_path / "raw")
    convert(raw, tmp_path / "wide", dtype="float32")
    assert open_checkpoint(tmp_path / "wide").dtype == np.float32
    assert (
        json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"
    )
    assert_same_bits(tmp_path / "wide", "v0.3")
    tensors = dict(weights_of("v0.3"))
    tensors["norm.weight"] = np.full(32, 1e5, ml_dtypes.bfloat16)
    write_raw(tmp_path / "large", tensors=tensors)
    with pytest.raises(ValueError, match="norm.weight holds numbers beyond float16"):
        convert(tmp_path / "large", tmp_path / "f16", dtype="float16")
    assert not list(tmp_path.glob("f16*"))


def test_tokenizers_are_carried_along(tmp_path):
    raw = write_raw(tmp_path / "raw")
    for name in ("tokenizer.model.v3", "tekken.json", "notes.txt"):
        (raw / name).write_text(name)
    convert(raw, tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.model.v3").read_text() == "tokenizer.model.v3"
    assert (tmp_path / "hf/tekken.json").is_file()
    assert not (tmp_path / "hf/notes.txt").exists()
    model = load_model(raw)
    save(model, tmp_path / "saved", tokenizer=raw / "tokenizer.model.v3")
    assert (tmp_path / "saved/tokenizer.model.v3").is_file()
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        save(model, tmp_path / "none", tokenizer=raw / "tokenizer.model")


def test_nothing_is_overwritten(tmp_path):
    raw = write_raw(tmp_path / "raw")
    for name in ("hf", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        convert(raw, tmp_path / "hf")
    with pytest.raises(FileExistsError, match="holds no model, and is not replaced"):
        convert(raw, tmp_path / "full", force=True)
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="holds what is converted"):
        convert(raw, raw, force=True)
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds no model, and is not replaced"):
        convert(raw, tmp_path / "hf", force=True)
    (tmp_path / "hf/model.safetensors").write_text("")
    convert(raw, tmp_path / "hf", force=True)
    assert_same_bits(tmp_path / "hf", "v0.3")
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "hf", "full"}


def test_links_stay(tmp_path):
    """What a link points to is replaced, and what is behind the link of another is not
    touched."""
    raw = write_raw(tmp_path / "raw")
    convert(raw, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(raw, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert_same_bits(tmp_path / "real", "v0.3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "new.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="new.partial is in the way"):
        convert(raw, tmp_path / "new")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    for wrong in ("/", "."):
        with pytest.raises(FileExistsError):
            convert(raw, wrong)
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(FileExistsError, match="is a folder, and a GGUF is a file"):
        convert(raw, tmp_path / "a.gguf", format="gguf", force=True)


def test_a_tokenizer_is_saved_whole(tmp_path):
    """With its added tokens and templates, from a folder, and from a GGUF's metadata."""
    source = tmp_path / "chatml"
    convert(TINY_MISTRAL, source, format="huggingface")
    added = {"<|im_end|>": 2048, "<|im_start|>": 2049}
    (source / "added_tokens.json").write_text(json.dumps(added))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    model = random_model(vocab_size=2050)
    save(model, tmp_path / "saved", tokenizer=load_tokenizer(source))
    for folder in ("saved", "converted"):
        if folder == "converted":
            convert(tmp_path / "saved", tmp_path / folder)
        _, found = mistral_eqx.load(tmp_path / folder)
        assert found.vocab_size == 2050
        assert (found.chat_template, found.tool_template) == ("{{ messages }}", "tools")
    convert(TINY_MISTRAL, tmp_path / "x.gguf")
    model, tokenizer = mistral_eqx.load(tmp_path / "x.gguf")
    save(model, tmp_path / "of_gguf", tokenizer=tokenizer)
    _, tokenizer = mistral_eqx.load(tmp_path / "of_gguf")
    assert tokenizer.encode("To be") == load_tokenizer(TINY_MISTRAL).encode("To be")
    assert not list((tmp_path / "of_gguf").glob("*.gguf"))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(error, tmp_path, monkeypatch):
    raw = write_raw(tmp_path / "raw")
    convert(raw, tmp_path / "hf")
    read = weights._read_safetensors

    def fail(path, name, index):
        if name == "layers.1.attention.wo.weight":
            raise error
        return read(path, name, index)

    monkeypatch.setattr(weights, "_read_safetensors", fail)
    for target in ("new", "hf"):
        with pytest.raises(type(error)):
            convert(raw, tmp_path / target, format="huggingface", force=True)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "hf"}
    assert_same_bits(tmp_path / "hf", "v0.3")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "onnx"}, "format must be mistral, huggingface or gguf, got 'onnx'"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, got int8"),
        ({"max_shard_size": "5 apples"}, 'max_shard_size must be like "5GB"'),
        ({"max_shard_size": 0}, "max_shard_size must be like"),
    ],
)
def test_options_are_checked_first(options, message, tmp_path):
    raw = write_raw(tmp_path / "raw")
    with pytest.raises(ValueError, match=message):
        convert(raw, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_convert_and_inspect_as_commands(tmp_path):
    """As a user runs them: results on standard output, and nothing else."""
    raw = write_raw(tmp_path / "raw", "v0.1")
    command = [sys.executable, "-m", "mistral_eqx"]
    root = Path(mistral_eqx.__file__).parents[1]
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=root)
    done = run([*command, "convert", raw, tmp_path / "hf", "--max-shard-size", "20KB"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_same_bits(tmp_path / "hf", "v0.1")
    done = run([*command, "inspect", "--model", tmp_path / "hf"])
    assert done.returncode == 0 and done.stderr == ""
    parameters = sum(array.size for array in weights_of("v0.1").values())
    for told in ("8 tokens", f"{parameters:,}", "huggingface: model-00001-of-0", "none"):
        assert told in done.stdout


VERSIONS = [
    TINY_MISTRAL / "tokenizer.model",
    *sorted((Path(mistral_common.__file__).parent / "data").glob("*tok*")),
    *sorted((Path(mistral_common.__file__).parent / "data").glob("tekken*.json")),
]


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.name)
def test_transformers_tokenizes_a_converted_folder_alike(path, tmp_path):
    """The BOS id above all, which a folder without a tokenizer_config.json loses."""
    raw = write_raw(tmp_path / "raw")
    name = "tekken.json" if path.suffix == ".json" else "tokenizer.model"
    if ".model.v" in path.name:
        name = "tokenizer.model." + path.name.rpartition(".")[2]
    shutil.copy(path, raw / name)
    convert(raw, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = mistral_eqx.load_tokenizer(tmp_path / "hf")
    for text in ("Hello world", "  two\n\n x é🦙 2024", "", " a", "naïve  "):
        assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("kind", ["convert", "save"])
def test_two_writers_of_one_folder(kind, tmp_path):
    """The second is refused at the start, and the first is not disturbed."""
    raw = write_raw(tmp_path / "raw")
    model = load_model(raw)
    write = {
        "convert": lambda: convert(raw, tmp_path / "out", format="mistral"),
        "save": lambda: save(model, tmp_path / "out"),
    }[kind]
    with atomic.whole_folder(tmp_path / "out") as partial:
        (partial / "theirs").write_text("")
        with pytest.raises(FileExistsError, match="Another process is writing to .*out"):
            write()
    assert os.listdir(tmp_path / "out") == ["theirs"]


def test_an_empty_folder_is_not_left_behind(tmp_path):
    with atomic.locked(tmp_path / "work"):
        assert os.listdir(tmp_path) == ["work"]
        # Not by those who are kept out, either.
        with pytest.raises(FileExistsError, match="Another process"):
            with atomic.locked(tmp_path / "work"):
                pass
        assert os.listdir(tmp_path) == ["work"]
    assert os.listdir(tmp_path) == []
    with atomic.locked(tmp_path / "work"):
        (tmp_path / "work" / "file").touch()
    assert os.listdir(tmp_path / "work") == ["file"]


def test_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    """A writer may be killed when the old folder has another name."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target, old = tmp_path / "target", tmp_path / "target.replaced.partial"

    def write(text):
        with atomic.whole_folder(target) as partial:
            (partial / "config.json").write_text(text)

    for text in "01":
        write(text)
    assert os.listdir(tmp_path) == ["target"]
    # Killed while it deleted the old one,
    shutil.copytree(target, old)
    write("2")
    assert os.listdir(tmp_path) == ["target"]
    # or before the new one had its name.
    target.rename(old)
    with pytest.raises(FileExistsError, match="is what .*target was before a writer was"):
        write("3")
    assert os.listdir(tmp_path) == [old.name]
    assert (old / "config.json").read_text() == "2"


def test_old_or_new_is_there_at_every_moment(tmp_path):
    """Also while a folder is replaced. And what a killed writer has left is cleaned up."""
    target = tmp_path / "target"
    with atomic.whole_folder(target) as partial:
        (partial / "config.json").write_text("0")
    missing, done = [], threading.Event()

    def watch():
        while not done.is_set():
            if not (target / "config.json").exists():
                missing.append(True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(200):
        left = tmp_path / "target.partial"
        left.mkdir()
        (left / "left").mkdir()
        with atomic.whole_folder(target) as partial:
            assert os.listdir(partial) == []
            (partial / "config.json").write_text(str(i))
    done.set()
    watcher.join()
    assert not missing and (target / "config.json").read_text() == "199"
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_told_in_a_line(number, tmp_path, monkeypatch):
    raw = write_raw(tmp_path / "raw")

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(export, "write_safetensors", full)
    with pytest.raises(OSError, match="out cannot be written: .*Make room"):
        convert(raw, tmp_path / "out")
    assert os.listdir(tmp_path) == ["raw"]
