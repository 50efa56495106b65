"""What compilers for TPUs and GPUs make of the model's programs, on a machine without any.

    JAX_PLATFORMS=cpu python tests/benchmarks/compilers.py --layers 2
    JAX_PLATFORMS=cpu python tests/benchmarks/compilers.py --layers 2 --chip h100
    JAX_PLATFORMS=cpu python tests/benchmarks/compilers.py --experts v5e:2x2

Needs `pip install 'mistral_eqx[tpu-compiler]'`, and `[cuda-compiler]` for GPUs. Prints a
table in Markdown, of what each device has: bytes that come in, and how they compare with
what `plan` reckons, bytes made on the way and changed in place, the collectives, how many
weights and rings are made anew, and how long the compiler took. A model of two layers has
the programs of one of 32: what comes in and the collectives grow with the layers.

With `--experts` it is one layer of Mixtral 8x7B's experts, alone: the operations, over
those of the two experts that each token has chosen. They are counted in the program as JAX
has it, at most. Those of `ragged_dot` are counted as the compiler has rewritten it; a TPU
then leaves out the tiles that no expert needs.
"""

import argparse
import dataclasses
import math
import re
import time

import equinox as eqx
import jax
import jax.numpy as jnp
from experts import count_flops
from jax.sharding import SingleDeviceSharding

import mistral_eqx as mx
from mistral_eqx.apps.compiling import compile_programs
from mistral_eqx.apps.plan import collectives_of
from mistral_eqx.devices.chips import chip_named, described_devices
from mistral_eqx.devices.programs import read_program
from mistral_eqx.files.inspection import in_units, reckon
from mistral_eqx.kernels.replaced import made_for
from mistral_eqx.layers import FeedForward
from mistral_eqx.moe import mix


# A released model, a chip, a mesh, and rows x tokens.
INFERENCE = [
    ("mistral-7b-v0.3", "v6e:2x4", {"model": 1}, 1, 4096),
    ("mistral-7b-v0.3", "v5e:2x4", {"model": 8}, 1, 32768),
    ("mistral-7b-v0.3", "v6e:2x4", {"data": 2, "model": 4}, 8, 32768),
    ("mistral-7b-v0.3", "v5e:2x4", {"pipe": 2, "model": 4}, 2, 4096),
    ("mixtral-8x7b", "v5e:2x4", {"model": 8}, 1, 4096),
    ("mixtral-8x7b", "v5e:2x4", {"expert": 8}, 1, 4096),
    ("mistral-7b-v0.3", "h100", {"model": 1}, 1, 32768),
    ("mixtral-8x7b", "h100", {"model": 1}, 1, 4096),
]
TRAINING = [
    ("mistral-7b-v0.3", "v5e:2x4", {"fsdp": 8}, 8, 4096),
    ("mistral-7b-v0.3", "v5e:2x4", {"data": 2, "model": 4}, 8, 4096),
    ("mistral-7b-v0.3", "h100", {"model": 1}, 1, 4096),
]
COLUMNS = (
    "model, mesh and chip",
    "program",
    "comes in",
    "of what `plan` reckons",
    "made on the way",
    "changed in place",
    "collectives",
    "made anew",
    "compiled in",
)


def rows(options, shape, chip, mesh, batch, context):
    config = mx.RELEASED[shape]
    if options.layers is not None:
        config = dataclasses.replace(config, n_layers=options.layers)
    sizes = {"batch": batch, "context": context, "dtype": jnp.bfloat16}
    info = chip_named(chip)
    needs = reckon(config, mesh, **sizes, quantize=None, chip=info)
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    reckoned = needs.weights + needs.cache
    how = {**sizes, "train": options.train}
    for name, program in compile_programs(config, mesh, chip, **how):
        trains = name.startswith("training")
        yield (
            f"{shape}, {axes}, {batch} x {context:,} on {chip}",
            name.partition(",")[0],
            in_units(program.arguments),
            "" if trains else f"{100 * program.arguments / reckoned:.1f} %",
            in_units(program.temporaries),
            in_units(program.aliased),
            collectives_of(program),
            "" if program.copies is None else len(program.copies),
            f"{program.seconds:.0f} s",
        )


def ragged(experts, x, chosen, weights):
    """[`mistral_eqx.moe.mix`][] by XLA's own product of groups."""
    n_experts = experts.w1.weight.shape[0]
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=n_experts).astype(jnp.int32)
    numbers = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])

    def product(x, linear):
        out = jax.lax.ragged_dot_general(
            x, linear.weight, sizes, numbers, preferred_element_type=jnp.float32
        )
        return out.astype(x.dtype)

    rows = x[order // chosen.shape[1]]
    inner = jax.nn.silu(product(rows, experts.w1)) * product(rows, experts.w3)
    out = product(inner, experts.w2)[jnp.argsort(order)]
    return jnp.sum(out.reshape(*chosen.shape, -1) * weights[:, :, None], axis=1)


def dots(text: str) -> int:
    """The operations of the products in a program for a GPU."""
    numbers = lambda found: [int(n) for n in found.split(",") if n]
    named = re.findall(r"%([\w.\-]+) = \w+\[([\d,]*)\]", text)
    shapes = {name: numbers(shape) for name, shape in named}
    pattern = r"= \w+\[([\d,]*)\]\S* dot\(%([\w.\-]+),.*?lhs_contracting_dims=\{(\d+)\}"
    found = re.findall(pattern, text)
    return sum(2 * math.prod(numbers(o)) * shapes[x][int(axis)] for o, x, axis in found)


def expert_rows(chip):
    info, devices = described_devices(chip)
    config, place = mx.RELEASED["mixtral-8x7b"], SingleDeviceSharding(devices[0])
    here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    dtype, (dim, hidden) = jnp.bfloat16, (config.dim, config.hidden_dim)
    n_experts, top_k = config.moe.num_experts, config.moe.num_experts_per_tok
    make = jax.vmap(lambda key: FeedForward(dim, hidden, dtype=dtype, key=key))
    keys = lambda: jax.random.split(jax.random.key(0), n_experts)
    experts = jax.tree.map(here, eqx.filter_eval_shape(lambda: make(keys())))
    large = [(*n, hidden, dim) for n in ((), (n_experts,))]
    ways = {"here": mix, "`ragged_dot`": ragged, "every expert": mix.plain}
    for tokens in (1, 8, 512):
        shapes = ((dim,), dtype), ((top_k,), jnp.int32), ((top_k,), dtype)
        arrays = [here(jax.ShapeDtypeStruct((tokens, *s), d)) for s, d in shapes]
        for name, way in ways.items():
            began = time.monotonic()
            with made_for(info.platform):
                # A function of its own: JAX knows what it has compiled by the function.
                traced = jax.jit(lambda *a, way=way: way(*a)).trace(experts, *arrays)
                compiled = traced.lower(lowering_platforms=(info.platform,)).compile()
            program = read_program(compiled, time.monotonic() - began, large)
            flops = count_flops(traced.jaxpr, info.platform)
            if way is ragged:
                known = compiled.cost_analysis() or {}
                flops = known.get("flops") or dots(compiled.as_text())
            needed = 2 * 3 * tokens * top_k * dim * hidden
            yield (
                chip,
                tokens,
                name,
                f"{flops / needed:.2f}",
                in_units(program.temporaries),
                "not known" if program.copies is None else len(program.copies),
                f"{program.seconds:.0f} s",
            )


def tell(columns, rows):
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|", flush=True)
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, metavar="N", help="only so many layers of each model")
    add("--chip", metavar="NAME", help="only chips whose name begins so, such as v5e")
    add("--train", action="store_true", help="cases of training, with their steps")
    add("--experts", metavar="CHIP", help="Mixtral's experts alone, for v5e:2x2 or h100")
    options = parser.parse_args()
    if options.experts is not None:
        names = ("chip", "tokens", "way", "operations", "made on the way")
        tell([*names, "made anew", "compiled in"], expert_rows(options.experts))
        return
    chosen = [
        case
        for case in (TRAINING if options.train else INFERENCE)
        if case[1].startswith(options.chip or ("v", "tpu"))
    ]
    if not chosen:
        parser.error(f"no case has a chip whose name begins with {options.chip!r}")
    tell(COLUMNS, (row for case in chosen for row in rows(options, *case)))


if __name__ == "__main__":
    main()
