"""A model on many devices is the same model, and every device holds its part of it."""

import collections
import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import commands_with, record_models, typed
from jax.sharding import AbstractMesh, AxisType, Mesh
from models import random_model, random_tokens

import mistral_eqx as mx
from mistral_eqx import attention, beams, generation, scoring
from mistral_eqx.apps.main import main
from mistral_eqx.devices import sharding, stages
from mistral_eqx.devices.mesh import make_mesh, parse_mesh
from mistral_eqx.files.folders import read_config
from mistral_eqx.files.inspection import plan
from mistral_eqx.files.params import config_to_params
from mistral_eqx.kernels import rings
from mistral_eqx.learning.batches import Batch, Slices
from mistral_eqx.learning.fitting import fit
from mistral_eqx.learning.lora import trainable
from mistral_eqx.learning.training import loss, start, train_step


DENSE = ["data=8", "model=8", "data=2,model=4", "data=2,fsdp=2,model=2", "model=1"]
MOE = ["moe expert=4", "moe data=2,expert=2,model=2", "moe pipe=2,expert=2,model=2"]
DENSE += ["pipe=2", "pipe=4,data=2", "data=2,pipe=2,model=2"]
PROMPTS = [random_tokens(n, seed=n) for n in (5, 11, 3)]


@pytest.fixture(autouse=True)
def exact():
    """An accelerator multiplies float32 in fewer bits by default; and optax promotes."""
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        yield


def mesh_of(text):
    sizes = parse_mesh(text.removeprefix("moe "))
    needed = int(np.prod(list(sizes.values())))
    if needed > jax.device_count() and jax.default_backend() != "cpu":
        pytest.skip(f"needs {needed} devices")
    return make_mesh(sizes)


def model_for(mesh):
    # 8 heads share 2 kv heads: fewer than the devices along `model`.
    # Heads of 64 are what a single CPU multiplies in its own way.
    changes = {"n_heads": 8, "head_dim": 64, "n_layers": 4 if "pipe" in mesh else 2}
    if "moe " in mesh:
        changes |= {"sliding_window": None, "moe": mx.config.MoEConfig(4, 2)}
    return random_model(**changes)


def sharded(mesh):
    return mx.shard(model_for(mesh), mesh_of(mesh))


def close(a, b):
    b = np.asarray(b)
    scale = max(1, np.abs(b).max(initial=0))
    np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5 * scale)


def generated(model, **options):
    options = {"max_tokens": [7, 4, 9], "chunk": 4, "key": jax.random.key(1)} | options
    return generation.generate(model, PROMPTS, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("mesh", DENSE + MOE)
def test_generation(mesh):
    plain, model = model_for(mesh), sharded(mesh)
    _, expected = mx.prefill(plain, PROMPTS, max_tokens=9, chunk=4)
    filled = sharding.fill_rows(PROMPTS, model)
    _, logits = mx.prefill(model, filled, max_tokens=9, chunk=4)
    close(logits[:3], expected)
    # 3 rows cannot be divided by any of the meshes.
    expected, found = generated(plain), generated(model)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    for row, other in zip(found, expected):
        close(row.logprobs, other.logprobs)
        assert row.reason == other.reason == "length"
    streamed = [[], [], []]
    for pieces in generation.stream(
        model, PROMPTS, max_tokens=[7, 4, 9], chunk=4, block=2, key=jax.random.key(1)
    ):
        assert len(pieces) == 3
        for row, piece in zip(streamed, pieces):
            row += piece.tokens
    assert streamed == [row.tokens for row in expected]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mesh", ["data=8", "data=2,fsdp=2,model=2", "pipe=4,data=2", "model=1", *MOE]
)
def test_training_step(mesh):
    plain, model = model_for(mesh), sharded(mesh)
    check_step(plain, model, mesh)


@pytest.mark.parametrize(
    ("mesh", "scheme"),
    [
        ("data=2,fsdp=2,model=2", None),
        ("data=2,fsdp=2,model=2", "int8"),
        ("pipe=2,data=2", None),
        (MOE[0], "int8"),
    ],
)
def test_training_step_of_an_adapter(mesh, scheme):
    plain = model_for(mesh)
    plain = plain if scheme is None else mx.quantize(plain, scheme)
    plain = mx.add_lora(plain, rank=3, key=jax.random.key(4))
    # One that adds something already, so that both of its matrices have gradients.
    plain = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1].name == "b" else leaf, plain
    )
    check_step(plain, mx.shard(plain, mesh_of(mesh)), mesh)


def check_step(plain, model, mesh):
    """A step on a mesh is the step on one device, and leaves everything where it was."""
    tokens = jnp.asarray(np.reshape(random_tokens(8 * 12), (8, 12)))
    optimizer = optax.adam(0.1, eps=1.0)  # smooth: else rounding decides its signs

    def step(model, **options):
        model = jax.tree.map(jnp.copy, model)  # it will be donated
        frozen, state = start(model, optimizer)
        batch = Batch(sharding.shard_rows(tokens, model))
        state, outcome = train_step(frozen, state, batch, optimizer, **options)
        return state, outcome

    (expected, one), (found, other) = step(plain), step(model, recompute=True)
    close(one.loss, other.loss)
    close(one.grad_norm, other.grad_norm)
    trained, _ = eqx.partition(plain, trainable(plain))
    for before, leaf in zip(jax.tree.leaves(trained), jax.tree.leaves(expected.weights)):
        assert np.abs(np.asarray(before) - np.asarray(leaf)).max() > 1e-4
    expected = stages.in_stages(expected.weights, mesh_of(mesh))
    jax.tree.map(close, expected, found.weights)
    # What a device holds stays its part, in the optimizer too.
    trained, _ = eqx.partition(model, trainable(model))
    moments = found.optimizer_state[0]
    for tree in (found.weights, moments.mu, moments.nu):
        leaves, places = jax.tree.leaves(tree), jax.tree.leaves(trained)
        for leaf, place in zip(leaves, places, strict=True):
            assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_other_ways_in():
    plain, model = model_for("data=2,model=4"), sharded("data=2,model=4")
    options = {"n_beams": 3, "n_best": 2, "max_tokens": 5, "chunk": 4}
    expected = beams.beam_search(plain, PROMPTS, **options)
    for row, other in zip(beams.beam_search(model, PROMPTS, **options), expected):
        assert [beam.tokens for beam in row] == [beam.tokens for beam in other]
        close([beam.score for beam in row], [beam.score for beam in other])
    text = random_tokens(50)
    close(scoring.score(model, text).logprobs, scoring.score(plain, text).logprobs)
    # Drawn with a key, behind a prefix that all rows share.
    prefix, _ = mx.prefill(model, [text], max_tokens=30, chunk=4)
    drawn = {
        "sampling": mx.Sampling(0.8, top_p=0.9),
        "max_tokens": 6,
        "eos_ids": range(0, 64, 13),
        "key": jax.random.key(2),
    }
    prompts = [text + random_tokens(4, seed=i) for i in range(3)]
    found = generation.generate(model, prompts, prefix=prefix, chunk=4, **drawn)
    expected = generation.generate(plain, prompts, **drawn)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert {row.reason for row in found} == {"eos", "length"}


def test_a_ring_in_blocks(monkeypatch):
    """Long rings are read in blocks on a mesh: made short here, to be read so."""
    monkeypatch.setattr(rings, "BLOCKS", (4,))
    slots = []

    def spy(queries, keys, *more):
        slots.append(keys.shape[2])
        return rings.attend_blocks(queries, keys, *more)

    # A CPU has a program of its own, which has no blocks.
    monkeypatch.setitem(attention.attend_ring.others, "cpu", spy)
    jax.clear_caches()
    plain, model = model_for("data=2,model=2"), sharded("data=2,model=2")
    options = {"max_tokens": 20, "chunk": 4, "key": jax.random.key(1)}
    expected = generation.generate(plain, PROMPTS, **options)
    found = generation.generate(model, PROMPTS, **options)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert min(slots) > 4
    jax.clear_caches()


def held(tree):
    """The bytes on each device."""
    bytes = collections.Counter()
    for leaf in jax.tree.leaves(tree):
        for part in leaf.addressable_shards:
            bytes[part.device] += part.data.nbytes
    return bytes


def by_name(model, *ends):
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    named = (
        (jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves
    )
    return sum(leaf.nbytes for name, leaf in named if name.endswith(ends))


@pytest.mark.parametrize("mesh", DENSE)
def test_a_device_holds_its_part(mesh):
    plain, model = model_for(mesh), sharded(mesh)
    sizes = parse_mesh(mesh)
    n = sizes.get("model", 1)
    stages, of_layers = sizes.get("pipe", 1), by_name(plain.layers, "norm.weight")
    norms = by_name(plain, "norm.weight") - of_layers + of_layers / stages
    shared = by_name(plain, "wk.weight", "wv.weight")
    rest = by_name(plain, "weight") - by_name(plain, "norm.weight") - shared
    # A kv head is held once by each of the devices whose queries need it.
    parts = stages * sizes.get("fsdp", 1)
    expected = norms + (rest / n + shared / min(n, 2)) / parts
    assert held(model) == {d: expected for d in mesh_of(mesh).devices.flat}
    filled = sharding.fill_rows(PROMPTS, model)
    cache, logits = mx.prefill(model, filled, max_tokens=9, chunk=4)
    rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
    plain_cache, _ = mx.prefill(plain, filled, max_tokens=9, chunk=4)
    expected = sum(leaf.nbytes for leaf in jax.tree.leaves(plain_cache.layers))
    expected /= rows * min(n, 2) * stages
    assert set(held(cache.layers).values()) == {expected}
    assert set(held(logits).values()) == {logits.nbytes / rows}


MISTRAL_7B = mx.ModelConfig(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32768,
)


def skeleton(config):
    return eqx.filter_eval_shape(mx.Transformer, config, key=jax.random.key(0))


def abstract(mesh):
    sizes = parse_mesh(mesh)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    "mesh",
    ["model=8", "data=4,model=8", "fsdp=8", "fsdp=4,model=4", "pipe=4", "pipe=8,model=4"],
)
def test_a_device_holds_its_share_of_the_7b(mesh):
    model = stages.in_stages(skeleton(MISTRAL_7B), abstract(mesh))
    n = int(np.prod(list(parse_mesh(mesh).values()))) // parse_mesh(mesh).get("data", 1)
    places = sharding.shardings(model, abstract(mesh))
    share = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))), model, places)
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert sum(jax.tree.leaves(share)) == pytest.approx(total / n, rel=0.02)


COLLECTIVE = re.compile(
    r"= .*?\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def collectives(compiled):
    """The collectives of a program, each with the name of what it is for."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            purpose = re.search(r'op_name="[^"]*?(\w+)"', line)
            # What some of them are called differs among versions of JAX.
            name = "logits" if match[1] == "all-gather" else purpose[1]
            found[match[1], "slice" if name == "shard_map" else name] += 1
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mesh", ["model=8", "data=2,model=4", "data=8", "pipe=2,model=4", "moe model=8"]
)
def test_collectives_of_decode(mesh):
    model, sizes = sharded(mesh), parse_mesh(mesh.removeprefix("moe "))
    cache, logits = mx.prefill(model, [random_tokens(3)] * 8, max_tokens=4, chunk=4)
    state = mx.DecodeState.start(model, cache, logits, max_tokens=5, key=jax.random.key(0))
    places = [leaf.sharding for leaf in jax.tree.leaves(state)]
    compiled = mx.decode.lower(model, state, jnp.int32(4)).compile()
    expected = {}
    if sizes.get("model", 1) > 1:
        expected = {
            # Behind attention and behind the feed-forward network of each of 2 layers (of
            # a stage).
            ("all-reduce", "dot_general"): 4,
            # Each device looks up the tokens that are in its part of the vocabulary.
            ("all-reduce", "gather"): 1,
            # The logits.
            ("all-gather", "logits"): 1,
        }
    if mesh.startswith("moe "):
        # Experts add up by themselves.
        expected |= {("all-reduce", "dot_general"): 2, ("all-reduce", "psum"): 2}
    if "pipe" in sizes:
        # From stage to stage, and what the last has made to all, in two steps.
        expected |= {("collective-permute", "ppermute"): 1}
        expected |= {("collective-permute", "slice"): 1, ("all-reduce", "squeeze"): 1}
    if sizes.get("data", 1) > 1:
        # Whether every row has ended: one bit.
        expected[("all-reduce", "reduce_and")] = 1
    assert collectives(compiled) == expected
    # The next block is the same program.
    state, _ = mx.decode(model, state, jnp.int32(4))
    for leaf, place in zip(jax.tree.leaves(state), places):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


def test_meshes_of_any_kind():
    model, devices = model_for("model=4"), np.array(jax.devices()[:4])
    expected = generated(model)
    meshes = [
        jax.make_mesh((4,), ("model",), devices=devices),  # explicit axes by default
        jax.make_mesh((4,), ("model",), (AxisType.Explicit,), devices=devices),
        Mesh(devices[::-1].reshape(2, 2), ("model", "data")),
    ]
    for mesh in meshes:
        again = mx.shard(mx.shard(model, mesh), mesh)
        assert held(again) == held(mx.shard(model, mesh))
        assert set(held(again)) == set(devices)
        found = [row.tokens for row in generated(again)]
        assert found == [row.tokens for row in expected]


@pytest.mark.parametrize(
    "mesh,words",
    [
        ("model=3", "n_heads (8) cannot be divided by the mesh's model=3.* are 1, 2, 4, 8"),
        ("model=16", "n_heads (8) cannot .* model=16"),
        ("fsdp=5", "dim (32) cannot be divided by .* fsdp=5.* are 1, 2, 4, 8, 16, 32"),
        ("expert=2", "an axis expert=2, but no num_experts"),
        ("pipe=3", "n_layers (2) cannot be divided by the mesh's pipe=3.* are 1, 2"),
        ("pipe=2,model=64", "n_heads (8) cannot"),
    ],
)
def test_what_cannot_be_divided(mesh, words):
    words = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=words):
        sharding.shardings(skeleton(random_model(n_heads=8).config), abstract(mesh))


def test_other_dimensions_that_cannot_be_divided():
    for mesh, words, changes in [
        ("model=4", r"hidden_dim \(50\) .* model=4.* are 1, 2\.", {"hidden_dim": 50}),
        ("model=4", r"vocab_size \(62\) .* model=4.* are 1, 2\.", {"vocab_size": 62}),
        (
            "model=4",
            r"n_kv_heads \(6\) .* model=4.* are 1, 2\.",
            {"n_heads": 24, "n_kv_heads": 6},
        ),
        ("pipe=2,model=2", r"vocab_size \(66\) .* pipe x model = 4", {"vocab_size": 66}),
        (
            "pipe=2",
            r"the layers' pattern of windows \(6\) .* pipe=2.* are 1, 3",
            {"n_layers": 6, "sliding_window": (4, 8), "vocab_size": 66},
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            model = skeleton(
                mx.ModelConfig(**config_to_params(random_model(n_heads=8).config) | changes)
            )
            sharding.shardings(model, abstract(mesh))
    with pytest.raises(ValueError, match="axis 'tensor': the axes are data, fsdp"):
        mx.shard(
            random_model(), jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
        )
    with pytest.raises(ValueError, match=r"batch_size \(6\) .* 4 groups"):
        stream = Slices("text", np.zeros(100, np.int32), seq_len=8, bos_id=1)
        model = mx.shard(random_model(), make_mesh({"data": 2, "fsdp": 2}))
        fit(model, stream, stream, steps=1, batch_size=6)


@pytest.mark.parametrize(
    "text", ["", "model", "model=", "model=0", "model=-2", "=2", "2", "model=2;data=2"]
)
def test_mesh_that_cannot_be_understood(text):
    with pytest.raises(ValueError, match="write axis=size, as in data=2,model=4"):
        parse_mesh(text)


def test_meshes_as_text():
    assert parse_mesh(" data = 2 , model=4 ") == {"data": 2, "model": 4}
    for text, words in [
        ("model=2,model=2", "names model twice"),
        ("tensor=2", "cannot have an axis 'tensor'"),
    ]:
        with pytest.raises(ValueError, match=words):
            parse_mesh(text)
    n = 2 * jax.device_count()
    with pytest.raises(ValueError, match=f"data 2 x model {n // 2} needs {n} devices"):
        make_mesh({"data": 2, "model": n // 2})


def turns(jaxpr):
    """The lengths of the loops in which something is handed from device to device."""
    found = []
    for eqn in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)]
        inner = [getattr(p, "jaxpr", p) for p in inner if _is_jaxpr(p)]
        if eqn.primitive.name == "scan" and "ppermute" in str(inner[0]):
            found.append(eqn.params["length"])
        else:
            found += [length for each in inner for length in turns(each)]
    return found


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize(
    "microbatches,made_of_8", [(1, 1), (2, 2), (4, 4), (3, 1), (16, 8)]
)
def test_the_bubble_is_that_of_gpipe(microbatches, made_of_8):
    model = mx.shard(model_for("pipe=4"), mesh_of("pipe=4"), microbatches=microbatches)
    tokens = jnp.zeros((8, 4), jnp.int32)
    (n_turns,) = turns(jax.make_jaxpr(lambda m, t: m.batch(t)[0])(model, tokens).jaxpr)
    # Each stage is busy in as many turns as there are microbatches.
    assert n_turns - made_of_8 == 4 - 1


@pytest.mark.gpu
def test_microbatches_and_windows():
    """More microbatches than stages, layers of two windows, a row alone."""
    windows = random_model(n_heads=8, n_layers=4, sliding_window=(8, 4))
    model = mx.shard(windows, mesh_of("pipe=2"), microbatches=4)
    tokens = jnp.asarray(np.reshape(random_tokens(8 * 16), (8, 16)))
    expected, _ = jax.jit(jax.vmap(windows))(tokens)
    found, _ = model.batch(tokens)
    close(jax.vmap(model.logits)(found), expected)
    close(jax.jit(jax.vmap(model))(tokens)[0], expected)
    close(
        scoring.score(model, random_tokens(20)).logprobs,
        scoring.score(windows, random_tokens(20)).logprobs,
    )
    with pytest.raises(ValueError, match="microbatches must be 1 or more, got 0"):
        mx.shard(windows, mesh_of("pipe=2"), microbatches=0)


def test_fit_goes_on_where_it_was(tmp_path):
    """On a mesh, from its own checkpoint; and it learns what it learns on one device."""
    tokens = np.asarray(random_tokens(400), np.int32)
    text = Slices("the text", tokens, seq_len=8, bos_id=1)
    options = {"steps": 4, "batch_size": 4, "warmup": 1}
    options |= {"learning_rate": 1e-2, "checkpoint_every": 2}

    def trained(mesh, **more):
        model = jax.tree.map(jnp.copy, random_model())
        model = model if mesh is None else mx.shard(model, mesh_of(mesh))
        return fit(model, text, text, **options | more)

    path = tmp_path / "checkpoint"
    whole = trained("data=2,fsdp=2", checkpoint=path)
    path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistral_eqx.learning.fitting.train_step", _fail_at(2))
        with pytest.raises(KeyboardInterrupt):
            trained("data=2,fsdp=2", checkpoint=path)
    resumed = trained("data=2,fsdp=2", checkpoint=path)
    jax.tree.map(close, whole, resumed)
    for leaf, place in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole)):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
    batch = Batch(jnp.asarray(tokens[:96].reshape(8, 12)))
    close(loss(whole, batch), loss(trained(None), batch))


def _fail_at(step):
    def failing(frozen, state, *rest, **options):
        if int(state.step) == step:
            raise KeyboardInterrupt
        return train_step(frozen, state, *rest, **options)

    return failing


@pytest.mark.parametrize("mesh", ["data=2,model=4", "fsdp=2,model=2"])
def test_loading_reads_a_device_its_part(saved, mesh, monkeypatch):
    """Every byte that a device gets was read for it once, and no other."""
    from mistral_eqx.files import weights

    read, count = weights._read_safetensors, [0]

    def counting(path, name, index):
        part = read(path, name, index)
        count[0] += part.size
        return part

    monkeypatch.setattr(weights, "_read_safetensors", counting)
    model = mx.load_model(saved, mesh=mesh_of(mesh), dtype=jnp.float32)
    # Replicas too are read once.
    assert count[0] == sum(leaf.size for leaf in jax.tree.leaves(model))
    jax.tree.map(close, model, mx.load_model(saved, dtype=jnp.float32))
    with pytest.raises(ValueError, match="a mesh or shardings, not both"):
        mx.load_model(saved, mesh=mesh_of(mesh), shardings=model.norm.weight.sharding)


@pytest.mark.parametrize("mesh", ["pipe=2", "moe expert=2", "moe pipe=2,expert=2"])
def test_what_is_stacked_is_saved_and_loaded(mesh, tmp_path):
    plain, model = model_for(mesh), sharded(mesh)
    mx.save(model, tmp_path / "model")
    jax.tree.map(close, mx.load_model(tmp_path / "model"), plain)
    again = mx.load_model(tmp_path / "model", mesh=mesh_of(mesh))
    jax.tree.map(close, again, model)
    for leaf, place in zip(jax.tree.leaves(again), jax.tree.leaves(model)):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_stages_are_made_once():
    model = mx.shard(model_for("pipe=2"), mesh_of("pipe=2"))
    again = mx.shard(model, mesh_of("pipe=2,data=2"), microbatches=3)
    assert again.layers.microbatches == 3 and model.layers.microbatches == 2
    jax.tree.map(close, again.layers.blocks, model.layers.blocks)
    for mesh in ("pipe=4", "model=2"):
        with pytest.raises(ValueError, match="in 2 stages already"):
            mx.shard(model, mesh_of(mesh))


def shell(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_every_command_takes_a_mesh(saved, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 8)
    length, model = ["--max_tokens", 4], ["--model", saved]
    small = ["--tokens", 4, "--prompt", 8, "--repeats", 1, "--contexts", "none"]
    learn = ["--batch-size", 4, "--seq-len", 4]
    params = ["--params", saved, "--tokenizer", saved / "tokenizer.model"]
    commands = [
        ["demo", saved, *length],
        ["generate", "To be", *model, *length, "--seed", 1],
        ["generate", "To be", *model, *length, "--beams", 2],
        ["interactive", saved, *length],
        ["chat", *model, *length],
        ["score", text, *model],
        ["evaluate", text, *model],
        ["bench", *model, *small],
        ["finetune", tmp_path / "one", *model, "--data", text, *learn],
        ["train", tmp_path / "two", *params, "--corpus", text, *learn],
    ]
    assert {words[0] for words in commands} == commands_with("--mesh") - {"plan"}
    models = record_models(monkeypatch)
    for arguments in commands:
        learns = arguments[0] in ("finetune", "train")
        meshes, found, n_devices = [["--mesh", "data=2,model=2"]], [], []
        # What learns ends before it has learnt, `bench` tells how long it took, and `chat`
        # continues a prompt as `interactive` does.
        told_alike = not learns and arguments[0] not in ("bench", "chat")
        for mesh in [[], *meshes] if told_alike else meshes:
            typed(monkeypatch)
            found.append(shell(capsys, *arguments, *mesh))
            assert found[-1][0] == (2 if learns else 0)
            n_devices.append([len(m.norm.weight.devices()) for m in models])
            models.clear()
        assert n_devices == ([[1], [4]] if told_alike else [[4]]), arguments
        if not told_alike:
            continue
        assert len(found[0][1]) > 0
        for word, other in zip(*(out.split() for _, out, _ in found), strict=True):
            if re.fullmatch(r"-?[\d.]+", word):
                assert float(word) == pytest.approx(float(other), rel=1e-5)
            else:
                assert word == other
    wrong = ["demo", saved, "--mesh"]
    for mesh, words in [
        ("model=3", "n_heads (4) cannot be divided by the mesh's model=3"),
        ("model:2", "cannot be understood at 'model:2'"),
        ("model=64", f"needs 64 devices, and there are {jax.device_count()}"),
        ("tensor=2", "cannot have an axis 'tensor'"),
    ]:
        status, out, err = shell(capsys, *wrong, mesh)
        assert (status, out, err.count("\n")) == (2, "", 1) and words in err


def test_plan(tmp_path, capsys):
    (tmp_path / "params.json").write_text(json.dumps(config_to_params(MISTRAL_7B)))
    of_six = ["plan", "--model", tmp_path, "--batch", 6, "--context", 32768, "--mesh"]
    status, out, _ = shell(capsys, *of_six, "data=4,model=16")
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert status == 0 and "7,248,023,552 parameters" in told["model"]
    assert told["mesh"] == "data 4 x model 16 = 64 devices"
    # A sixteenth; an eighth of wk and wv, of whose heads two devices share each; the norms.
    shared, norms = 2 * 32 * 1024 * 4096, 65 * 4096
    expected = (7_248_023_552 - shared - norms) / 16 + shared / 8 + norms
    in_mb = f"{2 * expected / 1e6:.1f} MB"
    assert told["weights"] == f"{in_mb} a device, of 14.5 GB in bfloat16"
    # 6 rows are filled up to 8 of 4.3 GB, in 4 x 8 parts.
    assert told["cache"] == "1.1 GB a device, of 34.4 GB for 8 x 32768 tokens"
    assert told["fits"].startswith(
        "8 GB: yes, 16 GB: yes, 24 GB: yes, 40 GB: yes, 80 GB: yes"
    )
    released = ["plan", "--shape", "mistral-7b-v0.3", *of_six[3:], "data=4,model=16"]
    assert shell(capsys, *released)[1] == out
    _, out, _ = shell(capsys, "plan", "--model", tmp_path, "--dtype", "float32")
    assert "16 GB: no, 24 GB: no, 40 GB: yes, 80 GB: yes" in out
    for scheme, fits in ("int8", "8 GB: no, 16 GB: yes"), ("int4", "8 GB: yes, 16 GB: yes"):
        _, out, _ = shell(capsys, "plan", "--model", tmp_path, "--quantize", scheme)
        assert fits in out
    _, staged, _ = shell(capsys, *of_six, "pipe=4")
    assert "weights     3.6 GB a device" in staged and "cache       6.4 GB" in staged
    for arguments, words in [
        (["--batch", 0], "batch must be 1 or more, got 0"),
        (["--context", 0], "context must be 1 or more, got 0"),
        (["--mesh", "model=5"], "n_heads (32) cannot be divided by the mesh's model=5"),
    ]:
        status, out, err = shell(capsys, "plan", "--model", tmp_path, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and words in err


def test_plan_is_what_comes_true(saved, capsys):
    model = mx.load_model(saved, mesh=mesh_of("model=2"), dtype=jnp.float32)
    cache, _ = mx.prefill(model, [[1] * 100] * 2, max_tokens=156)
    told = plan(read_config(saved), {"model": 2}, batch=2, context=256, dtype=jnp.float32)
    number = lambda name: float(re.search(r"([\d.]+) [kM]B a device", told[name])[1])
    assert number("weights") * 1e3 == pytest.approx(max(held(model).values()), rel=0.1)
    assert number("cache") * 1e3 == pytest.approx(max(held(cache).values()), rel=0.1)


def test_what_is_no_mesh(unchecked, tmp_path):
    model = random_model()
    mx.save(model, tmp_path / "saved")
    told = "mesh must be a jax.sharding.Mesh, got 'data=2'"
    with pytest.raises(TypeError, match=told):
        mx.shard(model, "data=2")
    with pytest.raises(TypeError, match=told):
        mx.load_model(tmp_path / "saved", mesh="data=2")
