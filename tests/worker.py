"""A program for one process or several; run by devices/test_distributed.py."""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax


def program(folder):
    """What a model on a mesh over all devices makes."""
    import mistral_eqx as mx
    from mistral_eqx import beams, generation, scoring
    from mistral_eqx.devices import sharding
    from mistral_eqx.files import weights
    from mistral_eqx.learning.batches import Batch
    from mistral_eqx.learning.training import start, train_step

    count, read = [0], weights._read_safetensors

    def counting(path, name, index):
        part = read(path, name, index)
        count[0] += part.size
        return part

    weights._read_safetensors = counting
    mx.load_model(folder, mesh=jax.make_mesh((8,), ("model",)), dtype=jnp.float32)
    weights._read_safetensors = read
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    model = mx.load_model(folder, mesh=mesh, dtype=jnp.float32)
    prompts = [[5, 6, 7], [9] * 11, [3, 4]]
    options = {"max_tokens": [6, 9, 4], "chunk": 4, "key": jax.random.key(0)}
    made = generation.generate(model, prompts, **options)
    drawn = generation.stream(
        model,
        prompts,
        sampling=mx.Sampling(0.9),
        block=3,
        stopped=lambda: [False] * 3,
        **options,
    )
    drawn = [[piece.tokens for piece in pieces] for pieces in drawn]
    cache, _ = mx.prefill(model, [[5, 6]], max_tokens=9)
    behind = generation.generate(
        model, prompts[:1] * 2, prefix=cache, **options | {"max_tokens": 3}
    )
    best = beams.beam_search(model, prompts, n_beams=2, max_tokens=4)
    optimizer = optax.sgd(0.1)
    frozen, state = start(model, optimizer)
    tokens = jnp.asarray(np.arange(64).reshape(8, 8), jnp.int32)
    losses = []
    for _ in range(2):
        batch = Batch(sharding.shard_rows(tokens, model))
        state, outcome = train_step(frozen, state, batch, optimizer)
        losses.append(round(float(outcome.loss), 4))
    model = state.model(frozen)
    return {
        "tokens": [row.tokens for row in made],
        "drawn": drawn,
        "behind": [row.tokens for row in behind],
        "beams": [beam.tokens for row in best for beam in row],
        "score": round(sum(scoring.score(model, [1, 2, 3, 4]).logprobs), 4),
        "losses": losses,
        "read": count[0],
    }


def dying(folder, how):
    """Two texts, of which the second process makes only the first."""
    import mistral_eqx as mx
    from mistral_eqx import generation

    mesh = jax.make_mesh((2, 4), ("data", "model"))
    model = mx.load_model(folder, mesh=mesh, dtype=jnp.float32)
    for last in (False, True):
        if last and jax.process_index() == 1:
            os.kill(os.getpid(), how)
        generation.generate(model, [[5, 6, 7]], max_tokens=2, key=jax.random.key(0))


def killed(folder, *distributed):
    """The command line, whose second process is killed behind its first text."""
    from mistral_eqx.apps import generate as command
    from mistral_eqx.apps.main import main

    generate = command.generate

    def twice(*arguments, **options):
        generate(*arguments, **options)
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*arguments, **options)

    command.generate = twice
    arguments = ["generate", "To be", "--model", folder, "--max-tokens", "2"]
    names = ("--coordinator", "--num-processes", "--process-id")
    arguments += ["--mesh", "data=2,model=4", *sum(zip(names, distributed), ())]
    return main(arguments)


def main(folder, coordinator, n, process, end):
    from mistral_eqx.devices.processes import connect

    if end == "killed":
        return killed(folder, coordinator, n, process)
    # A machine with much to do is slow, and not dead.
    timeout = {"stopped": 20}.get(end, 200)
    connect(coordinator, int(n), int(process), heartbeat_timeout=timeout)
    if end == "whole":
        print(json.dumps(program(folder)), flush=True)
    else:
        dying(folder, signal.SIGSTOP)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
