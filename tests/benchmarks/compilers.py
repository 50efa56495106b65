"""What compilers for TPUs and GPUs make of the model's programs, on a machine without any.

    JAX_PLATFORMS=cpu python tests/benchmarks/compilers.py --layers 2
    JAX_PLATFORMS=cpu python tests/benchmarks/compilers.py --layers 2 --chip h100

Needs `pip install 'mistral_eqx[tpu-compiler]'`, and `[cuda-compiler]` for GPUs. Prints a
table in Markdown, of what each device has: bytes that come in, and how they compare with
what `plan` reckons, bytes made on the way and changed in place, the collectives, how many
weights and rings are made anew, and how long the compiler took. A model of two layers has
the programs of one of 32: what comes in and the collectives grow with the layers.
"""

import argparse
import dataclasses

import jax.numpy as jnp

import mistral_eqx as mx
from mistral_eqx.apps.compiling import compile_programs
from mistral_eqx.apps.plan import collectives_of
from mistral_eqx.devices.chips import chip_named
from mistral_eqx.files.inspection import in_units, reckon


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, metavar="N", help="only so many layers of each model")
    add("--chip", metavar="NAME", help="only chips whose name begins so, such as v5e")
    add("--train", action="store_true", help="cases of training, with their steps")
    options = parser.parse_args()
    chosen = [
        case
        for case in (TRAINING if options.train else INFERENCE)
        if case[1].startswith(options.chip or ("v", "tpu"))
    ]
    if not chosen:
        parser.error(f"no case has a chip whose name begins with {options.chip!r}")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    for case in chosen:
        for row in rows(options, *case):
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
