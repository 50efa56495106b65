"""The instruments: what they count, and that they run. No clock is judged."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import PARAMS, random_model, random_tokens

import mistral_eqx as mx
from mistral_eqx.apps import measure as bench, random_weights
from mistral_eqx.apps.main import main
from mistral_eqx.attention import visible
from mistral_eqx.config import MoEConfig
from mistral_eqx.files.names import weight_shapes
from mistral_eqx.files.params import config_from_params


PEERS = Path(__file__).parents[1] / "benchmarks" / "peers.py"
QUICK = ["--prompt", "16", "--tokens", "4", "--repeats", "2", "--contexts", "9,70"]


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", PEERS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(bench, "PROBE", 2**22)


def config(**changes):
    return config_from_params(PARAMS | changes)


def skeleton(config, dtype):
    options = {"dtype": jnp.dtype(dtype), "key": jax.random.key(0)}
    return eqx.filter_eval_shape(mx.Transformer, config, **options)


def report(capsys, *arguments):
    assert main(["bench", *QUICK, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out)


def test_the_embedded_model(capsys):
    told = report(capsys)
    assert told["model"] == "tiny_mistral" and told["dtype"] == "float32"
    assert (told["batch"], told["prompt"], told["tokens"]) == (1, 16, 4)
    assert told["parameters"] == 5278976
    assert told["memory"]["weights"] == 4 * told["parameters"]
    assert told["memory"]["cache"] == 2 * 6 * 2 * 32 * 4 * 128  # a chunk of 128 tokens
    assert told["memory"]["peak"] > told["memory"]["weights"] + told["memory"]["cache"]
    assert told["load"] > 0 and min(told["compile"].values()) >= 0
    assert [row["length"] for row in told["contexts"]] == [9, 70]
    spreads = [row["seconds_per_step"] for row in told["contexts"]]
    for name, value in told.items():
        if isinstance(value, dict) and "median" in value:
            spreads.append(value)
    assert len(spreads) == 2 + 5
    for spread in spreads:
        assert 0 < spread["low"] <= spread["median"] <= spread["high"] < math.inf
    # What is derived follows from what is measured.
    speed = told["decode_tokens_per_second"]["median"] * told["bytes_per_token"]
    share = told["bandwidth_share"]["median"]
    assert share == pytest.approx(speed / told["read_bandwidth"])
    rate = told["prefill_tokens_per_second"]["median"] / 16 * told["prefill_flops"]
    assert told["prefill_flops_per_second"]["median"] == pytest.approx(rate)


def test_a_model_on_many_devices(capsys):
    told = report(capsys, "--mesh", "data=2,model=2", "--batch", "2")
    assert (told["devices"], told["batch"]) == (4, 2)
    assert told["decode_tokens_per_second"]["median"] > 0


def test_a_folder_in_another_dtype_and_a_table_on_a_terminal(saved, capsys, monkeypatch):
    arguments = ["--model", str(saved), "--dtype", "bfloat16", "--contexts"]
    told = report(capsys, *arguments, "none", "--batch", "3", "--json")
    assert told["model"] == str(saved) and told["dtype"] == "bfloat16"
    assert told["contexts"] == [] and told["batch"] == 3
    c = config(vocab_size=2048)
    assert told["prefill_flops"] == 3 * bench.prefill_flops(c, tokens=16)
    size = bench.decode_bytes(skeleton(c, "bfloat16"), batch=3, context=16 + 2)
    assert told["bytes_per_token"] == pytest.approx(size / 3)
    # A ring of one chunk of 128 tokens, in float32 on a CPU.
    assert told["memory"]["cache"] == 3 * 2 * 2 * (2 * 6) * 128 * 4
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["bench", *QUICK, *arguments, "9,8", "--tokens", "1"]) == 0
    out, _ = capsys.readouterr()
    rows = [line[:16].strip() for line in out.splitlines()]
    assert rows[:4] == ["device", "weights", "run", "load"] and "decode" not in rows
    assert rows[-2:] == ["context", ""] and "prefill" in rows


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "0"], "batch must be 1 or more, got 0."),
        (["--prompt", "-3"], "prompt must be 1 or more, got -3."),
        (["--repeats", "0"], "repeats must be 1 or more"),
        (["--contexts", "1k"], "--contexts must be like"),
        (["--contexts", "64,0"], "A context must be 1 token or more, got 0."),
        (["--model", "nowhere"], "There is no folder nowhere."),
        (["--model", "here", "--shape", "1b"], "Give a model or --shape, not both."),
        (["--shape", "2b"], "argument --shape: invalid choice"),
        (["--tokens", "many"], "argument --tokens: invalid int value"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, told, capsys):
    try:
        status = main(["bench", *arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and told in err


def test_random_weights_are_made_in_their_dtype_if_there_is_room(monkeypatch):
    model = random_weights.random_model(config(), dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {"bfloat16"}
    assert random_weights.random_model(config()).dtype == jnp.float32
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    monkeypatch.setattr(random_weights, "memory_here", lambda: 8 * size - 1)
    assert random_weights.random_model(config()).dtype == jnp.bfloat16
    monkeypatch.setattr(random_weights, "memory_here", lambda: 4 * size - 1)
    with pytest.raises(ValueError, match="Choose a smaller shape or dtype"):
        random_weights.random_model(config(), dtype="float32")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2)])
def test_random_weights_are_made_quantized(scheme, moe, monkeypatch):
    small = config(dim=64, hidden_dim=96, head_dim=16)
    small = dataclasses.replace(small, moe=moe)
    like = mx.quantize(random_weights.random_model(small, dtype="bfloat16"), scheme)
    # There is room for these, and none for what they could be made from.
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(like))
    monkeypatch.setattr(random_weights, "memory_here", lambda: int(size / 0.9) + 1)
    model = random_weights.random_model(small, dtype="bfloat16", quantize=scheme)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, kinds(model), kinds(like)))
    assert jnp.isfinite(model(jnp.arange(9))[0]).all()
    monkeypatch.setattr(random_weights, "memory_here", lambda: int(size / 0.9) - 9)
    with pytest.raises(ValueError, match=f"in {scheme}, and nine tenths"):
        random_weights.random_model(small, dtype="bfloat16", quantize=scheme)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 8, (None, 8)])
def test_bytes_of_a_step(tied, window):
    """Against the arrays: all weights, and the cache's as they are at that length."""
    model = random_model(tied_embeddings=tied, sliding_window=window)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    if not tied:
        arrays -= model.tok_embeddings.weight.nbytes * (1 - 3 / 64)  # three rows of it
    for context in (5, 21):
        keys = sum(context if w is None else min(w, context) for w in model.config.windows)
        cache = 3 * keys * 2 * (2 * 6) * 4
        counted = bench.decode_bytes(model, batch=3, context=context)
        assert counted == pytest.approx(arrays + cache)


@pytest.mark.parametrize("tokens", [1, 7, 8, 21])
@pytest.mark.parametrize("window", [None, 8, (None, 8)])
def test_operations_of_a_prompt(tokens, window):
    """Against the shapes, and the pairs that the mask lets through."""
    c = config(sliding_window=window)
    matrices = 32 * 24 + 2 * 32 * 12 + 24 * 32 + 3 * 32 * 48
    positions = jnp.arange(tokens, dtype=jnp.int32)
    pairs = sum(int(visible(positions, positions, w).sum()) for w in c.windows)
    expected = 2 * 2 * matrices * tokens + 4 * 4 * 6 * pairs + 2 * 64 * 32
    assert bench.prefill_flops(c, tokens=tokens) == expected


def test_a_mixture_counts_the_chosen_experts():
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    dense, sparse = config(), config(moe=moe, sliding_window=None)
    expert, gate = 3 * 32 * 48, 4 * 32
    flops = bench.prefill_flops(sparse, tokens=8) - bench.prefill_flops(dense, tokens=8)
    assert flops == 2 * 2 * 8 * (expert + gate)  # one expert more, in two layers
    for batch, read in ((1, 2), (2, 3), (100, 4)):
        more, less = (
            bench.decode_bytes(skeleton(c, "bfloat16"), batch=batch, context=8)
            for c in (sparse, dense)
        )
        more -= less
        assert more == pytest.approx(2 * 2 * ((read - 1) * expert + gate))


def test_shapes_have_the_sizes_they_are_called_by():
    sizes = {
        name: sum(math.prod(s) for s in weight_shapes(c).values())
        for name, c in mx.RELEASED.items()
    }
    assert sizes["135m"] == 134515008 and sizes["1b"] == 852559872
    assert sizes["tiny-mistral"] == 5278976
    # What Mistral has published, or its files' headers say.
    assert sizes["mistral-7b-v0.1"] == sizes["mistral-7b-v0.2"] == 7_241_732_096
    assert sizes["mistral-7b-v0.3"] == sizes["mathstral-7b"] == 7_248_023_552
    assert sizes["mixtral-8x7b"] == 46_702_792_704
    assert sizes["mistral-nemo-12b"] == 12_247_782_400
    assert sizes["ministral-8b"] == 8_019_808_256


def test_contexts_stop_where_the_memory_does():
    window, none = config(), config(sliding_window=None)
    lengths = lambda c, room: bench._contexts(c, 1, room=room, size=4)
    assert lengths(window, 1e4) == (1024, 2048, 4096, 8192, 16384, 32768)
    token = 2 * 2 * 12 * 4
    assert lengths(none, token * 20000.0) == (1024, 4096, 16384)
    assert lengths(none, token * 16383.0) == (1024, 4096)


def test_peers_help():
    done = subprocess.run([sys.executable, PEERS, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--shape" in done.stdout and done.stderr == ""


class InProcess:
    """A worker of peers.py without a process."""

    def __init__(self, cls, job):
        self.cls, self.engine = cls, cls(job)

    def __call__(self, method, *arguments):
        return getattr(self.engine, method)(*arguments)


def test_engines_agree_and_a_wrong_one_is_found(peers, tmp_path, monkeypatch, unchecked):
    pytest.importorskip("torch")
    engines = [peers.Package, peers.OneFile, peers.Transformers]
    folder, path = str(tmp_path / "model"), str(tmp_path / "model.gguf")
    model = random_model(head_dim=8, sliding_window=64, dim=32, vocab_size=512)
    mx.save(model, folder, format="huggingface")
    if all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp")):
        peers.write_gguf(folder, path, "float32")
        engines.append(peers.LlamaCpp)
    prompts = [random_tokens(128, 512, seed=i) for i in range(2)]
    job = peers.Job("135m", "float32", 2, folder, path, 4, prompts)
    workers = {cls.name: InProcess(cls, job) for cls in engines}
    agreed = peers.check(workers, job)
    assert agreed == {cls.name: 40 for cls in engines[1:]}
    written = {}
    for name, worker in workers.items():
        prepare, run, units = worker.engine.decode(1)
        assert units == (1 if name == peers.OneFile.name else 4)
        first = run(prepare())
        assert run(prepare()) == first
        written[name] = first
    del written[peers.OneFile.name]  # sees one token more in its prompt of 96
    if peers.LlamaCpp.name in written:
        del written[peers.LlamaCpp.name]  # sees all
    assert written[peers.Package.name] == written[peers.Transformers.name]
    losses = []
    for name in (peers.Package.name, peers.Transformers.name):
        monkeypatch.setattr(peers, "TRAIN_ROWS", 2)
        monkeypatch.setattr(peers, "TRAIN_LENGTH", 16)
        prepare, run, _ = workers[name].engine.train(None)
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            losses.append([run(prepare()) for _ in range(3)])
    # The second and third follow steps of the two optimizers.
    np.testing.assert_allclose(*losses, atol=2e-4)
    other = workers[peers.Transformers.name].engine.model
    other.model.layers[0].self_attn.q_proj.weight.data *= 1.05
    with pytest.raises(RuntimeError, match="transformers"):
        peers.check(workers, job)
