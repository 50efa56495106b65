"""What a training step needs in memory beside the weights, as XLA has compiled it.

    python tests/benchmarks/memory.py --shape 135m --rows 4 --length 512
    python tests/benchmarks/memory.py --tpu  # for a v5e, with pip install libtpu

For an adapter of rank 16 and for all weights, in float32: with what `recompute` and `parts`
change. No weights are made, no step is made, and no TPU is needed. Prints a table in
Markdown. One for a TPU takes some minutes.
"""

import argparse
import os


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import mistral_eqx as mx
from mistral_eqx.learning.batches import Batch
from mistral_eqx.learning.training import make_optimizer, start, train_step


def temporary(options, device, *, adapter: bool, **how) -> float:
    """In GB."""
    optimizer = make_optimizer(learning_rate=1e-4, steps=10, warmup=1)

    def begin(key):
        model = mx.Transformer(mx.RELEASED[options.shape], key=key)
        model = mx.add_lora(model, rank=16, key=key) if adapter else model
        return start(model, optimizer)

    def placed(leaf):
        sharding = SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    frozen, state = eqx.filter_eval_shape(begin, jax.random.key(0))
    shape = (options.rows, options.length + 1)
    batch = Batch(jax.ShapeDtypeStruct(shape, jnp.int32))
    step = train_step.__wrapped__
    run = jax.jit(lambda f, s, b: step(f, s, b, optimizer, **how), donate_argnums=1)
    traced = run.trace(*jax.tree.map(placed, (frozen, state, batch)))
    compiled = traced.lower(lowering_platforms=(device.platform,)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=list(mx.RELEASED))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tpu", action="store_true", help="as compiled for a TPU v5e")
    options = parser.parse_args()
    device = jax.devices()[0]
    if options.tpu:
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        device = topology.devices[0]
    size = f"{options.shape}, {options.rows} x {options.length} tokens"
    print(f"| {size}, {device.platform} | adapter | all weights |\n|---|---|---|")
    for how in ({}, {"recompute": True}, {"parts": options.rows}):
        found = [temporary(options, device, adapter=a, **how) for a in (True, False)]
        name = ", ".join(f"{key}={value}" for key, value in how.items()) or "as it is"
        print(f"| {name} | {found[0]:.2f} GB | {found[1]:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
