"""Adapters in both formats, held against PEFT."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import models
import numpy as np
import peft
import pytest
import torch
import transformers
from models import adapted, random_model, random_tokens
from safetensors.numpy import load_file, save_file
from test_parity import MIXTRAL, PACKAGE_CASES

import mistral_eqx as mx
from mistral_eqx.learning.lora import has_lora, linear_layers


CASES = {"dense": {}, "mixtral": PACKAGE_CASES[MIXTRAL]}
TOKENS = jnp.array(random_tokens(20))


def trained(model, seed=1, **options):
    """A model with an adapter that adds something."""
    return adapted(model, 0.1, seed=seed, **{"scale": 1.5} | options)


def close(found, expected, tolerance=1e-4):
    models.close(found, expected, tolerance)


def logits(model):
    return np.asarray(jax.jit(lambda m: m(TOKENS)[0])(model))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model in both formats, and its adapter in both."""
    root = tmp_path_factory.mktemp(request.param)
    base = random_model(**CASES[request.param])
    model = trained(base)
    for format in ("mistral", "huggingface"):
        mx.save(base, root / format, format=format)
    for format in ("mistral", "peft"):
        mx.save_adapter(model, root / f"adapter-{format}", format=format)
    return root, base, model


@pytest.fixture
def dense(tmp_path):
    base = random_model()
    mx.save(base, tmp_path / "model")
    mx.save_adapter(trained(base), tmp_path / "peft")
    mx.save_adapter(trained(base), tmp_path / "lora", format="mistral")
    return tmp_path


def of_peft(folder, *adapters):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        tokens = torch.tensor(np.asarray(TOKENS, np.int64))[None]
        return model, model(tokens).logits[0].numpy()


def test_peft_loads_ours(case):
    root, base, model = case
    expected = logits(model)
    assert np.abs(expected - logits(base)).max() > 0.1 * np.abs(expected).max()
    _, found = of_peft(root / "huggingface", root / "adapter-peft")
    close(found, expected)


@pytest.mark.parametrize("format", ["mistral", "huggingface"])
@pytest.mark.parametrize("adapter", ["mistral", "peft"])
def test_loaded(case, format, adapter):
    root, base, model = case
    loaded = mx.load_model(root / format, adapter=root / f"adapter-{adapter}")
    assert not has_lora(loaded)
    close(logits(loaded), logits(model))
    beside = mx.load_adapter(base, root / f"adapter-{adapter}")
    jax.tree.map(np.testing.assert_array_equal, beside, model)


def test_converting_and_merging_commute(case, tmp_path):
    """Bit for bit, by way of either format, in float32."""
    root, _, _ = case
    for adapter, other in (("mistral", "peft"), ("peft", "mistral")):
        source, target = root / f"adapter-{adapter}", tmp_path / other
        mx.convert_adapter(source, target, model=root / "huggingface")
        written = load_file(next(target.glob("*.safetensors")))
        expected = load_file(next((root / f"adapter-{other}").glob("*.safetensors")))
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(written[name], tensor)
    merged = tmp_path / "merged"
    mx.convert(root / "mistral", merged, adapter=root / "adapter-mistral", format="mistral")
    mx.convert(merged, tmp_path / "one", format="huggingface")
    options = {"adapter": tmp_path / "peft", "format": "huggingface"}
    mx.convert(root / "huggingface", tmp_path / "two", **options)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, two[name])


def test_peft_merges_the_same(tmp_path):
    base = random_model()
    mx.save(base, tmp_path / "model", format="huggingface")
    mx.save_adapter(trained(base), tmp_path / "adapter")
    model, _ = of_peft(tmp_path / "model", tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    options = {"adapter": tmp_path / "adapter", "format": "huggingface"}
    mx.convert(tmp_path / "model", tmp_path / "merged", **options)
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        close(tensor, expected[name].numpy(), 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
            "alpha_pattern": {r"1.*v_proj": 12, "o_proj": 3},
        },
        {"r": 2, "target_modules": ["q_proj", "v_proj", "lm_head"], "lora_dropout": 0.1},
        {"r": 2, "target_modules": r".*layers\.1.*(up|k)_proj", "init_lora_weights": False},
    ],
    ids=range(4),
)
def test_pefts_own(options, tmp_path):
    """What PEFT has made and written."""
    base = random_model()
    mx.save(base, tmp_path / "model", format="huggingface")
    torch_model, _ = of_peft(tmp_path / "model")
    options = {"target_modules": "all-linear"} | options
    model = peft.get_peft_model(torch_model, peft.LoraConfig(**options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        tokens = torch.tensor(np.asarray(TOKENS, np.int64))[None]
        expected = model(tokens).logits[0].numpy()
    loaded = mx.load_model(tmp_path / "model", adapter=tmp_path / "adapter")
    close(logits(loaded), expected)
    close(logits(mx.load_adapter(base, tmp_path / "adapter")), expected)
    # And written once more, it is the same to PEFT, whatever its ranks and scales are.
    mx.save_adapter(mx.load_adapter(base, tmp_path / "adapter"), tmp_path / "again")
    _, found = of_peft(tmp_path / "model", tmp_path / "again")
    close(found, expected)
    lora = tmp_path / "lora"
    mx.save_adapter(mx.load_adapter(base, tmp_path / "adapter"), lora, format="mistral")
    close(logits(mx.load_model(tmp_path / "model", adapter=lora)), expected)


def test_several_with_weights(dense):
    base = mx.load_model(dense / "model")
    mx.save_adapter(trained(base, seed=2, layers="w[123]"), dense / "other")
    one, two = dense / "peft", dense / "other"

    def merged(*pairs):
        weights = {name: np.asarray(v.weight) for name, v in linear_layers(base)}
        for folder, times in pairs:
            model = mx.merge_lora(mx.load_adapter(base, folder))
            for name, layer in linear_layers(model):
                change = np.asarray(layer.weight) - np.asarray(base_weights[name])
                weights[name] = weights[name] + times * change
        return weights

    base_weights = {name: v.weight for name, v in linear_layers(base)}
    for adapter, pairs in [
        ([one, two], [(one, 1), (two, 1)]),
        ({one: 0.25, str(two): -2.0}, [(one, 0.25), (two, -2)]),
        ({one: 0.0}, []),
    ]:
        loaded = mx.load_model(dense / "model", adapter=adapter)
        for name, weight in merged(*pairs).items():
            close(dict(linear_layers(loaded))[name].weight, weight, 1e-6)


def test_merged_before_it_is_quantized(dense):
    loaded = mx.load_model(dense / "model", adapter=dense / "peft", quantize="int8")
    merged = mx.load_model(dense / "model", adapter=dense / "peft")
    expected = mx.quantize(merged, "int8")
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_into_a_gguf_and_onto_one(dense):
    """Mistral's order of rows is llama.cpp's. What a GGUF has in eight bits is read as
    numbers once something is added to it."""
    mx.convert(dense / "model", dense / "base.gguf", dtype="f32")
    onto = mx.load_model(dense / "base.gguf", adapter=dense / "peft")
    expected = mx.load_model(dense / "model", adapter=dense / "peft")
    mx.convert(dense / "model", dense / "merged.gguf", adapter=dense / "lora", dtype="f32")
    for model in (onto, mx.load_model(dense / "merged.gguf")):
        for leaf, other in zip(*map(jax.tree.leaves, (model, expected)), strict=True):
            np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("mesh", ["data=2,model=2", "pipe=2,model=2"])
def test_on_a_mesh(dense, mesh):
    from mistral_eqx.devices.mesh import make_mesh, parse_mesh

    mesh = make_mesh(parse_mesh(mesh))
    expected = mx.load_model(dense / "model", adapter=dense / "peft")
    loaded = mx.load_model(dense / "model", adapter=dense / "peft", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, mx.shard(expected, mesh))
    beside = mx.load_adapter(mx.load_model(dense / "model", mesh=mesh), dense / "peft")
    close(logits(beside), logits(expected))
    mx.save_adapter(beside, dense / "again")
    again, before = (
        load_file(dense / f / "adapter_model.safetensors") for f in ("again", "peft")
    )
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_norms_of_mistrals_format(dense):
    path = dense / "lora" / "lora.safetensors"
    tensors = load_file(path)
    norm = np.linspace(0.5, 2, 32, dtype=np.float32)
    save_file(tensors | {"layers.1.ffn_norm.weight": norm}, path)
    for adapter in (path, path.parent):
        loaded = mx.load_model(dense / "model", adapter=adapter)
        np.testing.assert_array_equal(loaded.layers[1].ffn_norm.weight, norm)
    with pytest.raises(ValueError, match="replaces norms too"):
        mx.load_adapter(random_model(), path)
    with pytest.raises(ValueError, match="both replace layers.1.ffn_norm.weight"):
        shutil.copytree(path.parent, dense / "copy")
        mx.load_model(dense / "model", adapter=[path, dense / "copy"])


def test_without_a_scale(dense, caplog):
    (dense / "lora" / "params.json").unlink()
    loaded = mx.load_model(dense / "model", adapter=dense / "lora")
    assert "says its scaling, which is taken to be 2" in caplog.text
    close(logits(loaded), logits(trained(random_model(), scale=2.0)))


def test_an_adapter_beside_the_model(dense):
    for file in (dense / "lora").glob("*.safetensors"):
        shutil.copy(file, dense / "model")
    with pytest.raises(ValueError, match="holds a LoRA adapter beside the model"):
        mx.load_model(dense / "model")
    with pytest.raises(ValueError, match="holds a LoRA adapter.* and no model"):
        mx.load_model(dense / "peft")
    config = json.loads((dense / "model" / "params.json").read_text())
    lora = {"lora": {"rank": 3, "scaling": 1.5}}
    (dense / "model" / "params.json").write_text(json.dumps(config | lora))
    loaded = mx.load_model(dense / "model", adapter=dense / "model")
    close(logits(loaded), logits(trained(random_model())))


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path, change):
    save_file(change(load_file(path)), path)


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["embed_tokens"],
    "bias": "all",
    "layer_replication": [[0, 2], [1, 2]],
    "target_parameters": ["down_proj"],
    "lora_bias": True,
    "alora_invocation_tokens": [3],
    "trainable_token_indices": [1],
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "what_comes_next": 3,
    "peft_type": "IA3",
    "r": 0,
    "lora_alpha": "x",
    "rank_pattern": {"(": 3},
    "alpha_pattern": [1],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, dense):
    change_json(dense / "peft" / "adapter_config.json", **{name: REFUSED[name]})
    with pytest.raises(
        ValueError, match=f"adapter_config.json cannot be used: .*{name}"
    ) as e:
        mx.load_model(dense / "model", adapter=dense / "peft")
    assert "\n" not in str(e.value)


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDINGS = "base_model.model.model.embed_tokens.lora_embedding_A"
DAMAGED = {
    "lacks lora_B of": lambda t: {
        k: v for k, v in t.items() if k != f"{STEM}.lora_B.weight"
    },
    "lora_embedding_A, which is not impl": lambda t: (
        t
        | {
            "base_model.model.model.embed_tokens.lora_embedding_A": np.ones(
                (3, 64), np.float32
            )
        }
    ),
    "which the model does not: Is it an": lambda t: {
        k.replace("layers.1", "layers.7"): v for k, v in t.items()
    },
    "whose shape is": lambda t: t | {f"{STEM}.lora_A.weight": np.ones((3, 31), np.float32)},
    "says rank 3 of": lambda t: (
        t
        | {
            f"{STEM}.lora_A.weight": np.ones((4, 32), np.float32),
            f"{STEM}.lora_B.weight": np.ones((24, 4), np.float32),
        }
    ),
    "it is no adapter": lambda t: {},
    "numbers of type I32": lambda t: (
        t | {f"{STEM}.lora_A.weight": t[f"{STEM}.lora_A.weight"].astype(np.int32)}
    ),
}


@pytest.mark.parametrize("words", DAMAGED)
def test_damaged(words, dense):
    path = dense / "peft" / "adapter_model.safetensors"
    change_tensors(path, DAMAGED[words])
    with pytest.raises(ValueError, match=re.escape(words)):
        mx.load_model(dense / "model", adapter=dense / "peft")


def test_an_adapter_for_another_model(dense):
    mx.save(random_model(dim=16, n_layers=1), dense / "small")
    for adapter in ("peft", "lora"):
        with pytest.raises(ValueError, match="Is it an adapter for this model?"):
            mx.load_model(dense / "small", adapter=dense / adapter)


def test_errors(dense, tmp_path):
    base = random_model()
    with pytest.raises(FileNotFoundError, match="There is no adapter .*none"):
        mx.load_model(dense / "model", adapter=dense / "none")
    with pytest.raises(FileNotFoundError, match="no adapter in .*model: no lora.safet"):
        mx.load_model(dense / "model", adapter=dense / "model")
    with pytest.raises(ValueError, match="The weight of x must be finite, got nan"):
        mx.load_model(dense / "model", adapter={"x": float("nan")})
    with pytest.raises(ValueError, match="has no adapter: save it with save"):
        mx.save_adapter(base, tmp_path / "a")
    with pytest.raises(ValueError, match='format must be "mistral" or "peft", got \'hf\''):
        mx.save_adapter(trained(base), tmp_path / "a", format="hf")
    with pytest.raises(FileExistsError, match="is there already"):
        mx.save_adapter(trained(base), dense / "peft")
    with pytest.raises(ValueError, match="has an adapter. Merge it first"):
        mx.save(trained(base), tmp_path / "a")
    with pytest.raises(ValueError, match="has an adapter already"):
        mx.load_adapter(trained(base), dense / "peft")
    (dense / "lora" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="holds two adapters"):
        mx.load_model(dense / "model", adapter=dense / "lora")
    cut = dense / "peft" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged or not whole"):
        mx.load_model(dense / "model", adapter=dense / "peft")
    (dense / "peft" / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged or not whole|must hold an object"):
        mx.load_model(dense / "model", adapter=dense / "peft")
    assert not (tmp_path / "a").exists()


def test_one_process_writes(dense, monkeypatch):
    """The others take part, because their devices hold some of the numbers."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    mx.save_adapter(trained(random_model()), dense / "peft")
    mx.save_adapter(trained(random_model()), dense / "new")
    assert not (dense / "new").exists()


def test_dtypes(dense):
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_model())
    mx.save_adapter(trained(model), dense / "a", format="mistral")
    mx.save_adapter(trained(model), dense / "b")
    mx.save_adapter(trained(model), dense / "c", dtype="float16")
    kinds = {
        f: {
            str(t.dtype)
            for t in load_file(next((dense / f).glob("*.safetensors"))).values()
        }
        for f in "abc"
    }
    assert kinds == {"a": {"bfloat16"}, "b": {"float32"}, "c": {"float16"}}
    for f in "abc":
        close(
            logits(mx.load_model(dense / "model", adapter=dense / f)),
            logits(trained(random_model())),
            3e-2,
        )
