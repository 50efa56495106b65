"""Programs compiled for chips that need not be here, and what is told of them. Mistakes are
planted, and each shows."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from models import PARAMS, trains

import mistral_eqx as mx
from mistral_eqx import cache, decoding, layers
from mistral_eqx.apps import compiling
from mistral_eqx.apps.compiling import bound, compile_programs
from mistral_eqx.config import MoEConfig
from mistral_eqx.devices import programs, sharding
from mistral_eqx.devices.chips import CHIPS, described_devices
from mistral_eqx.files.inspection import plan, reckon


# Large enough for its arrays to be told from others.
CONFIG = mx.ModelConfig(
    **PARAMS
    | {"dim": 64, "head_dim": 16, "hidden_dim": 160, "vocab_size": 2048, "n_kv_heads": 4}
    | {"sliding_window": None}
)
MESH = {"model": 2}


@pytest.fixture(autouse=True)
def small_arrays_count(monkeypatch):
    monkeypatch.setattr(compiling, "_LARGE", 2000)


def compiled(config=CONFIG, mesh=MESH, **options):
    jax.clear_caches()  # a planted mistake must not meet a program from before
    options = {"context": 1024, "dtype": jnp.float32} | options
    programs = dict(compile_programs(config, mesh, "cpu", **options))
    prefill, decode = list(programs.values())[:2]
    return prefill, decode, *list(programs.values())[2:]


@pytest.fixture(scope="module")
def sound():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "_LARGE", 2000)
        return compiled()


def test_what_is_told_is_what_plan_reckons(sound):
    _, decode = sound
    told = plan(CONFIG, MESH, context=1024, dtype=jnp.float32)
    kilobytes = lambda text: float(re.match(r"([\d.]+) kB", text)[1]) * 1e3
    weights, cached = kilobytes(told["weights"]), kilobytes(told["cache"])
    # The state of a row has some numbers too: its logits, and which ids it has.
    rest = 2048 * 5 + 300
    assert weights + cached <= 1.02 * decode.arguments
    assert decode.arguments <= 1.02 * (weights + cached + rest)
    assert cached <= 1.02 * decode.aliased


def test_two_sums_a_block_and_the_cache_in_place(sound):
    for program in sound:
        # Two in each of two blocks, one for the embeddings; and the logits are gathered.
        assert program.collectives["all-reduce"] == 5
        assert program.collectives.get("all-gather", 0) <= 1
    assert not any("all-gather" in copy for program in sound for copy in program.copies)


def test_a_spec_swapped(sound, monkeypatch):
    monkeypatch.setitem(sharding._WEIGHTS, "wo.weight", (sharding.MODEL, "fsdp"))
    for program, before in zip(compiled(), sound):
        assert program.collectives != before.collectives


def test_a_cache_that_is_not_donated(sound, monkeypatch):
    monkeypatch.setattr(compiling, "decode", jax.jit(decoding.decode.__wrapped__))
    _, decode = compiled()
    assert decode.aliased == 0 < sound[1].aliased


def test_a_weight_made_anew_ahead_of_the_loop(sound, monkeypatch):
    """As where it is converted: on a CPU, unlike on other chips, bfloat16 always is."""
    scaled = lambda self, x: layers.product(x, 1.5 * self.weight)
    monkeypatch.setattr(layers.Linear, "__call__", scaled)
    _, decode = compiled()
    # Seven in each of two layers, and the output.
    assert len(decode.copies) >= len(sound[1].copies) + 15
    assert decode.temporaries > sound[1].temporaries


def test_a_cache_that_is_gathered(sound, monkeypatch):
    monkeypatch.setattr(decoding, "shard_cache", sharding.replicate)
    prefill, _ = compiled()
    assert prefill.collectives.get("all-gather", 0) >= 4  # keys and values of two layers
    assert any("all-gather" in copy for copy in prefill.copies)


def test_a_ring_that_is_shifted(sound, monkeypatch):
    def shifted(self, keys, values, length):
        def shift(ring, chunk):
            chunk = jnp.swapaxes(chunk, 0, 1).astype(ring.dtype)
            return jnp.concatenate([ring[:, chunk.shape[1] :], chunk], axis=1)

        return cache.LayerCache(shift(self.keys, keys), shift(self.values, values))

    monkeypatch.setattr(cache.LayerCache, "write", shifted)
    for program, before in zip(compiled(), sound):
        joined = [copy for copy in program.copies if "concatenate" in copy]
        assert len(joined) >= 4  # keys and values of two layers
        assert not any("concatenate" in copy for copy in before.copies)


@trains
@pytest.mark.parametrize("mesh", [{"model": 1}, {"data": 2, "fsdp": 2}, {"pipe": 2}])
def test_other_meshes(mesh):
    programs = compiled(mesh=mesh, batch=4, train=True)
    assert len(programs) == 3
    assert all(program.arguments > 0 for program in programs)
    if mesh == {"model": 1}:
        assert all(program.collectives == {} for program in programs)
    if "fsdp" in mesh:  # the weights are gathered, and gradients summed
        assert programs[2].collectives["all-gather"] > 0
    # A training step changes the weights and both moments in place.
    weights = sum(leaf.size for leaf in jax.tree.leaves(mx.Transformer(CONFIG, key=KEY)))
    n = int(np.prod([size for axis, size in mesh.items() if axis != "data"]))
    assert programs[2].aliased >= 0.9 * 3 * 4 * weights / n


@trains
def test_a_device_learns_from_its_own_rows(monkeypatch):
    """Along `fsdp` weights are gathered: no device multiplies the rows of others. Left to
    itself, XLA has every device make its part of all rows."""
    texts, read = [], compiling.read_program
    keep = lambda program, *rest: (texts.append(program.as_text()), read(program, *rest))[1]
    monkeypatch.setattr(compiling, "read_program", keep)
    compiled(mesh={"fsdp": 4}, batch=4, context=24, train=True)
    rows = lambda n: rf"\[(?:{n},24|{n * 24}),{CONFIG.hidden_dim}\]"
    assert re.search(rows(1), texts[-1]) and not re.search(rows(4), texts[-1])


def test_long_tuples_are_read():
    """XLA numbers every fifth part of a tuple in a comment."""
    parts = "f32[8]{0}, f32[9]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[4]{0}"
    line = f"  %all-reduce.1 = ({parts}) all-reduce(%a, %b), to_apply=%add"
    (found,) = programs._instructions(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}")
    assert found[3] == "all-reduce"


KEY = jax.random.key(0)


def test_a_mixtral_in_eight_bits():
    config = mx.ModelConfig(**vars(CONFIG) | {"moe": MoEConfig(4, 2)})
    prefill, _ = compiled(config, {"expert": 2}, quantize="int8")
    wide, _ = compiled(config, {"expert": 2})
    assert prefill.arguments < 0.75 * wide.arguments


def test_from_the_command_line(capsys):
    options = ["--shape", "tiny-mistral", "--context", "64", "--mesh", "model=2"]
    assert run("plan", *options, "--compile", "cpu") == 0
    told = capsys.readouterr().out
    assert re.search(r"decode, a step, compiled for cpu in \d+ s\n  memory ", told)
    assert "13 all-reduce" in told and "are changed in place" in told


@pytest.mark.parametrize(
    "words, told",
    [
        (["--compile", "v4:2x2"], "no chip 'v4': it is one of v5e, v5p"),
        (["--compile", "v5e"], "Give the shape of a slice, as in v5e:2x4, got 'v5e'"),
        (["--compile", "h100:2"], "only a TPU comes in slices. Say h100"),
        (["--compile", "cpu", "--mesh", "model=16"], "The mesh has 16 devices, and cpu"),
    ],
)
def test_errors(words, told, capsys):
    assert run("plan", "--shape", "mistral-7b-v0.1", *words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_without_a_compiler(monkeypatch):
    def missing(**_):
        raise RuntimeError("no plugin\nof that name")

    monkeypatch.setattr(jax.experimental.topologies, "get_topology_desc", missing)
    for name, extra in (("v5e:2x4", "tpu-compiler"), ("h100", "cuda-compiler")):
        with pytest.raises(ImportError, match=rf"\(no plugin\).*\[{extra}\]"):
            described_devices(name)


def test_what_a_tpu_puts_back_is_no_copy():
    """Of three arrays with the shape of a weight, one comes from the memory on the chip,
    one is fetched there, and one is a copy."""
    text = """ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %start.1 = (bf16[8,4]{1,0}, bf16[8,4]{1,0:S(1)}, u32[]) copy-start(%made)
  %done.1 = bf16[8,4]{1,0} copy-done(%start.1)
  %start.2 = (bf16[8,4]{1,0:S(1)}, bf16[8,4]{1,0}, u32[]) copy-start(%x)
  %done.2 = bf16[8,4]{1,0:S(1)} copy-done(%start.2)
  %start.3 = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]) copy-start(%x)
  %done.3 = bf16[8,4]{1,0} copy-done(%start.3)
}"""
    found = programs._copies(list(programs._instructions(text)), [(8, 4)])
    assert list(found) == ["copy-done done.3 bf16[8,4]"]


def test_bound():
    program = compiling.Program(1.0, 819_000_000, 1, 1, {}, (), 1e9)
    assert bound(program, "v5e:2x4", 3) == pytest.approx(3000)
    assert bound(program, "cpu", 3) is None
    assert all(chip.bandwidth > 8e11 for name, chip in CHIPS.items() if name != "cpu")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2)], ids=["dense", "mixtral"])
def test_for_a_tpu(moe, monkeypatch):
    # Sizes of which none is the number of tokens in a chunk.
    sizes = {"dim": 768, "head_dim": 128, "hidden_dim": 1536, "vocab_size": 4096}
    heads = {"n_heads": 12, "n_kv_heads": 4, "sliding_window": None, "moe": moe}
    config, mesh = mx.ModelConfig(**PARAMS | sizes | heads), {"data": 2, "model": 4}
    options = {"batch": 10, "context": 2048, "dtype": jnp.bfloat16}
    monkeypatch.setattr(compiling, "_LARGE", 2**16)
    needs = reckon(config, mesh, **options, quantize=None, chip=CHIPS["v5e"])
    programs = dict(compile_programs(config, mesh, "v5e:2x4", **options))
    for program in programs.values():
        # Two in each of two blocks, one for the embeddings; the logits may be summed, too.
        assert 5 <= program.collectives["all-reduce"] <= 6
        assert program.arguments == pytest.approx(needs.weights + needs.cache, rel=0.02)
        assert program.aliased >= needs.cache and program.accessed > 0
        # Rings as small as these lie on the chip while it decodes, and are put back.
        rings = [copy for copy in program.copies if "bf16[5,1,2048,128]" in copy]
        assert len(rings) == len(program.copies) and program.temporaries < needs.cache / 2
    assert next(iter(programs.values())).copies == ()


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs CUDA's compiler"
)
@pytest.mark.parametrize("rows", [1, 3])
def test_for_a_gpu(rows, monkeypatch):
    """The rings are not turned around for cuDNN, and there is no score for each slot."""
    monkeypatch.setattr(compiling, "_LARGE", 2**20)
    sizes = {"dim": 768, "head_dim": 128, "n_heads": 12, "n_kv_heads": 4}
    config = mx.ModelConfig(**PARAMS | sizes | {"sliding_window": None})
    options = {"batch": rows, "context": 16384, "dtype": jnp.bfloat16}
    prefill, decode = dict(compile_programs(config, {}, "h100", **options)).values()
    needs = reckon(config, {}, **options, quantize=None, chip=CHIPS["h100"])
    for program in (prefill, decode):
        assert program.collectives == {} and program.copies == ()
        assert program.arguments == pytest.approx(needs.weights + needs.cache, rel=0.02)
        assert program.aliased >= needs.cache
    # A mask of each token and slot there is, and rings of a row are cut out of several.
    tokens = max(512 // rows, 256)
    mask, ring = 3 * tokens * 16384, 2 * 4 * 16384 * 128 * 2
    assert prefill.temporaries < 1.5 * mask + (0 if rows == 1 else 1.2 * ring)
