"""Labels and vectors, held against transformers' on rows of any lengths."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from commands import run
from models import close, random_tokens

import mistral_eqx as mx
from mistral_eqx.devices.mesh import make_mesh, parse_mesh
from mistral_eqx.files.heads import is_classifier
from mistral_eqx.text import TINY_MISTRAL


SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "pad_token_id": 7,
}
LABELS = ("no", "yes", "maybe")
TEXTS = [
    "To be",
    "or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "",
    "the slings and arrows",
    "of outrageous fortune",
]


def saved(folder, kind, **changes):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(LABELS))} | changes
    model = getattr(transformers, kind)(transformers.MistralConfig(**SHAPE | labels))
    for name, parameter in model.named_parameters():  # not as small as new ones
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    shutil.copy(TINY_MISTRAL / "tokenizer.model", folder)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return folder, saved(folder, "MistralForSequenceClassification")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    return folder, saved(folder, "MistralModel")


def padded(rows, *, left=False):
    """What transformers is given: ids and a mask."""
    n = max(map(len, rows))
    pads = [[7] * (n - len(row)) for row in rows]
    ids = [p + r if left else r + p for p, r in zip(pads, rows)]
    ones = [[0] * len(p) + [1] * len(r) for p, r in zip(pads, rows)]
    mask = ones if left else [row[::-1] for row in ones]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("left", [False, True])
def test_logits_are_transformers(classifier, left):
    folder, theirs = classifier
    model, _ = mx.load_classifier(folder)
    assert model.labels == LABELS and model.pad_id == 7
    rows = [random_tokens(n, 2048, seed=n) for n in (5, 1, 19, 12)]
    ids, mask = padded(rows, left=left)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits.numpy()
    tokens = np.zeros((4, 19), np.int32)
    for place, row in zip(tokens, rows):
        place[: len(row)] = row
    lengths = jnp.array([len(row) for row in rows], jnp.int32)
    close(jax.jit(lambda m, *x: m(*x))(model, jnp.asarray(tokens), lengths), expected)


def test_texts_are_classified(classifier):
    folder, theirs = classifier
    model, tokenizer = mx.load_classifier(folder)
    found = mx.classify(model, tokenizer, TEXTS, batch_size=2)
    for text, one in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            expected = torch.softmax(theirs(ids).logits[0], -1).tolist()
        close([one.probabilities[label] for label in LABELS], expected)
        assert str(one) == one.label == LABELS[int(np.argmax(expected))]
        alone = mx.classify(model, tokenizer, text)
        close([*alone.probabilities.values()], [*one.probabilities.values()])


def test_saved_and_loaded_by_transformers(classifier, tmp_path):
    folder, theirs = classifier
    model, tokenizer = mx.load_classifier(folder)
    mx.save_classifier(model, tmp_path / "out", tokenizer=tokenizer)
    auto = transformers.AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path / "out")
    assert again.config.id2label == dict(enumerate(LABELS))
    for name, parameter in again.state_dict().items():
        torch.testing.assert_close(parameter, theirs.state_dict()[name], rtol=0, atol=0)
    reloaded, _ = mx.load_classifier(tmp_path / "out")
    for leaf, other in zip(*map(jax.tree.leaves, (model, reloaded)), strict=True):
        np.testing.assert_array_equal(leaf, other)
    with pytest.raises(FileExistsError, match="is there already"):
        mx.save_classifier(model, tmp_path / "out")


def test_inspected(classifier, capsys):
    folder, _ = classifier
    assert run("inspect", "--model", folder) == 0
    told = capsys.readouterr().out
    assert "a classifier with the labels no, yes, maybe" in told
    assert "the files hold what the config says" in told


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("eos", [False, True])
def test_vectors_are_transformers(embedder, pooling, eos):
    folder, theirs = embedder
    model, tokenizer = mx.load_embedder(folder)
    found = mx.embed(model, tokenizer, TEXTS, pooling=pooling, eos=eos, batch_size=3)
    assert found.shape == (5, 32) and found.dtype == np.float32
    rows = [tokenizer.encode(text) + [tokenizer.eos_id] * eos for text in TEXTS]
    ids, mask = padded(rows)
    with torch.no_grad():
        hidden = theirs(ids, attention_mask=mask).last_hidden_state
    for row, vector, out in zip(rows, found, hidden):
        here = out[: len(row)]
        close(vector, here[-1] if pooling == "last" else here.mean(0))
    alone = mx.embed(model, tokenizer, TEXTS[1], pooling=pooling, eos=eos)
    close(alone, found[1])


def test_any_model_makes_vectors(tmp_path):
    """The embedded one as well: those of its last norm, whatever its output is."""
    model, tokenizer = mx.load()
    trunk, _ = mx.load_embedder(TINY_MISTRAL)
    vectors = mx.embed(model, tokenizer, TEXTS[:2])
    np.testing.assert_array_equal(mx.embed(trunk, tokenizer, TEXTS[:2]), vectors)
    hidden, _ = model.hidden_states(jnp.asarray(tokenizer.encode(TEXTS[0])))
    close(vectors[0], model.norm(hidden[-1])[-1])
    eight, _ = mx.load_embedder(TINY_MISTRAL, quantize="int8")
    close(mx.embed(eight, tokenizer, TEXTS[:2]), vectors, 0.1)
    mx.convert(TINY_MISTRAL, tmp_path / "a.gguf")
    from_gguf, _ = mx.load_embedder(tmp_path / "a.gguf")
    close(mx.embed(from_gguf, tokenizer, TEXTS[:2]), vectors)


def test_on_a_mesh(classifier):
    folder, _ = classifier
    mesh = make_mesh(parse_mesh("data=2,model=2"))
    plain, tokenizer = mx.load_classifier(folder)
    spread, _ = mx.load_classifier(folder, mesh=mesh)
    expected, found = (mx.classify(m, tokenizer, TEXTS) for m in (plain, spread))
    for one, other in zip(expected, found):
        close([*other.probabilities.values()], [*one.probabilities.values()])
    with pytest.raises(ValueError, match="cannot be in stages"):
        mx.load_classifier(folder, mesh=make_mesh({"pipe": 2}))


def test_errors(classifier, embedder, tmp_path):
    folder, _ = classifier
    model, tokenizer = mx.load_embedder(embedder[0])
    with pytest.raises(ValueError, match='pooling must be "last" or "mean", got \'cls\''):
        mx.embed(model, tokenizer, "a", pooling="cls")
    with pytest.raises(ValueError, match="texts is empty"):
        mx.embed(model, tokenizer, [])
    with pytest.raises(ValueError, match="loaded without the output"):
        mx.generate(model, tokenizer, "a")
    for kind in (classifier, embedder):
        with pytest.raises(ValueError, match="makes vectors, with load_embedder"):
            mx.load(kind[0])
    with pytest.raises(ValueError, match="is no MistralForSequenceClassification"):
        mx.load_classifier(embedder[0])
    with pytest.raises(ValueError, match="two or more different labels"):
        mx.Classifier(model, ("a", "a"), key=jax.random.key(0))
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for labels, words in [
        ({"0": "a", "1": "b"}, r"score.weight of shape \(2, 32\) for its 2 labels"),
        ({"0": "a", "2": "b"}, "two or more labels in id2label, numbered from 0"),
        ({"0": "a"}, "two or more labels in id2label"),
        (["a", "b"], "two or more labels in id2label"),
    ]:
        (copy / "config.json").write_text(json.dumps(config | {"id2label": labels}))
        with pytest.raises(ValueError, match=words):
            mx.load_classifier(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="copy/config.json cannot be used"):
        is_classifier(copy)
