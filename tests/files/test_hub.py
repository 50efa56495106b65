"""Models by their name: from a cache as the hub lays it out, or fetched."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest

import mistral_eqx as mx
from mistral_eqx.files import hub


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """An empty cache, and a model that the hub has."""
    root = tmp_path / "cache"
    download = huggingface_hub.snapshot_download

    def in_cache(name, **options):
        return download(name, cache_dir=root, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", in_cache)
    monkeypatch.chdir(tmp_path)
    return root


def lay(folder, cache, name="org/model"):
    """Puts a model into the cache: blobs, and links to them from a snapshot."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = place / "snapshots" / "a1b2", place / "blobs"
    for made in (snapshot, blobs, place / "refs"):
        made.mkdir(parents=True)
    (place / "refs" / "main").write_text("a1b2")
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    return snapshot


def test_from_the_cache(folder, cache):
    snapshot = lay(folder, cache)
    assert hub.local_folder("org/model") == snapshot
    model, tokenizer = mx.load("org/model")
    assert model.config == mx.load(snapshot)[0].config and tokenizer.vocab_size == 2048
    assert mx.load_model("org/model").config == model.config
    assert mx.load_tokenizer("org/model").path.parent == snapshot
    assert mx.files.folders.read_config("org/model") == model.config


def test_a_folder_goes_before_a_name(folder, cache, tmp_path):
    lay(folder, cache)
    shutil.copytree(folder, tmp_path / "org" / "model")
    assert hub.local_folder("org/model") == Path("org/model")


@pytest.mark.parametrize("own", [True, False])
def test_fetched_in_one_format_only(own, folder, cache, monkeypatch):
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model"]
    files += ["params.json", "consolidated.safetensors"] if own else []
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    asked = []
    in_cache = huggingface_hub.snapshot_download

    def fetch(name, **options):
        if options.get("local_files_only"):
            return in_cache(name, **options)
        asked.append(options["allow_patterns"])
        return str(lay(folder, cache))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    mx.load("org/model")
    (patterns,) = asked
    assert ("consolidated*.safetensors" in patterns) is own
    assert ("model*.safetensors" in patterns) is not own


def test_what_cannot_be_fetched_is_told_in_a_line(cache, monkeypatch):
    def offline(name):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    message = "no folder org/model, nor a whole model .* cannot be fetched: no network$"
    with pytest.raises(FileNotFoundError, match=message):
        mx.load("org/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="hub: pip install huggingface_hub"):
        mx.load("org/model")
    with pytest.raises(FileNotFoundError, match="There is no folder a/b/c."):
        mx.load("a/b/c")


def test_what_was_interrupted_on_its_way_is_fetched(folder, cache, monkeypatch):
    """One part of two is in the cache, and nothing else that has weights."""
    snapshot = lay(folder, cache)
    (snapshot / "consolidated.safetensors").rename(
        snapshot / "model-00001-of-00002.safetensors"
    )
    fetched = []
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fetched.append)
    with pytest.raises(FileNotFoundError, match="nor a whole model of that name"):
        hub.local_folder("org/model")
    assert fetched == ["org/model"]
    (snapshot / "model-00002-of-00002.safetensors").touch()
    assert hub.local_folder("org/model") == snapshot


def test_what_has_no_weights_is_not_fetched(cache, monkeypatch):
    files = ["README.md", "model.Q4_0.gguf", "params.json"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    with pytest.raises(FileNotFoundError, match="it has no model.*safetensors"):
        mx.load("org/model")
