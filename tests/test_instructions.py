"""instructions.md tells the errors that really come, and what it links is there."""

import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx


ROOT = Path(mx.__file__).parents[1]
TEXT = (ROOT / "instructions.md").read_text()


def told_errors():
    """The messages in the table of errors, as patterns."""
    table = TEXT.split("| message | what to do |\n|---|---|\n")[1].split("\n\n")[0]
    messages = [re.search(r"`(.+?)`", row)[1] for row in table.splitlines()]
    return [".*".join(map(re.escape, message.split("..."))) for message in messages]


def without_weights(folder):
    (folder / "consolidated.safetensors").unlink()


def cut(folder):
    path = folder / "consolidated.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(folder):
    mx.convert(folder, folder / "hf", max_shard_size="20KB")
    hf = folder / "hf"
    next(hf.glob("model-00002-of-*")).unlink()
    for file in folder.glob("*.*"):
        file.unlink()
    for file in hf.iterdir():
        shutil.move(file, folder / file.name)


def another_config(folder):
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layers": 3}))


def quantized(folder):
    weights = load_file(folder / "consolidated.safetensors")
    name = "layers.0.attention.wq.weight"
    weights[name] = weights[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(weights, folder / "consolidated.safetensors")


def not_implemented(folder):
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"multimodal": {}}))


def other_tokenizer(folder):
    config = mx.ModelConfig(
        dim=8, n_layers=1, head_dim=4, hidden_dim=8, n_heads=2, n_kv_heads=1,
        norm_eps=1e-5, vocab_size=32,
    )  # fmt: skip
    model = mx.Transformer(config, key=jax.random.key(0))
    mx.save(model, folder, tokenizer=mx.text.TINY_MISTRAL / "tokenizer.model", force=True)


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def adapter_for(config, folder):
    model = mx.Transformer(config, key=jax.random.key(0))
    target = folder.parent / "adapters" / folder.name
    mx.save_adapter(mx.add_lora(model, key=jax.random.key(0)), target)
    return target


def other_adapter(folder):
    return adapter_for(mx.RELEASED["tiny-mistral"], folder)


def dora(folder):
    adapter = adapter_for(mx.load_model(folder).config, folder)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    return adapter


def no_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


def no_template(folder):
    (folder / "tokenizer.model").unlink()
    model = tokenizers.models.BPE({"<s>": 0, "</s>": 1}, [])
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


def wrong_template(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")


def as_gguf(folder, name="model.gguf"):
    mx.convert(folder, folder.parent / "out" / name, force=True)
    for file in folder.iterdir():
        file.unlink()
    return shutil.move(folder.parent / "out" / name, folder / name)


def damaged_gguf(folder):
    path = as_gguf(folder)
    path.write_bytes(path.read_bytes()[:1000])


def other_architecture(folder):
    path = as_gguf(folder)
    path.write_bytes(path.read_bytes().replace(b"llama", b"qwen2"))


def several(folder):
    shutil.copy(as_gguf(folder), folder / "other.gguf")


FAULTS = [
    damaged_gguf,
    other_architecture,
    several,
    adapter,
    other_adapter,
    dora,
    no_tokenizer,
    without_weights,
    cut,
    missing_shard,
    another_config,
    quantized,
    not_implemented,
    other_tokenizer,
    no_template,
    wrong_template,
]


def test_every_fault_is_in_the_table(folder, tmp_path):
    found = []
    for i, fault in enumerate(FAULTS):
        copy = shutil.copytree(folder, tmp_path / f"copy{i}")
        adapter_of = fault(copy)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            _, tokenizer = mx.load(copy, adapter=adapter_of)
            mx.encode_chat(tokenizer, [{"role": "user", "content": "Hello"}])
        matching = [p for p in told_errors() if re.search(p, str(error.value))]
        assert len(matching) == 1, (fault.__name__, str(error.value), matching)
        found += matching
    assert sorted(found) == sorted(told_errors())


@pytest.mark.parametrize("page", ["README.md", "instructions.md", "notebooks/README.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"(?:\]\(|src=\")([^)\"#]+)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
