"""How fast a model runs here, and how close that is to what the hardware allows.

Whatever is timed has been compiled before, is waited for until the device is done, and is
repeated: every figure is a median with its quartiles. The weights may be random, since no
time depends on what they are.
"""

import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tqdm import tqdm

from ..cache import Cache
from ..config import ModelConfig
from ..decoding import BLOCK, DecodeState, decode, make_cache, prefill
from ..devices.sharding import replicate, shard_rows
from ..files.names import weight_name, weight_shapes
from ..prompts import checked_chunk, next_power_of_two
from ..transformer import Transformer
from .random_weights import memory_here


# The decode steps timed at each length of context, and the bytes that the probe reads.
CONTEXT_STEPS = 32
PROBE = 2**29


def decode_bytes(model: Transformer, *, batch: int, context: int) -> float:
    """The bytes that a decode step of a batch cannot do without: every weight once, and the
    keys and values that the rows see.

    The embedding's table is read where it is the head as well; otherwise a row of it for
    each row of the batch. Of a mixture's experts it is those that are expected to be chosen
    when each is as probable as any other.

    **Arguments:**

    - `model`: or its skeleton. A key's number has the dtype of its embeddings.
    - `batch`: rows.
    - `context`: the tokens behind each, the one that is fed included.
    """
    config, size = model.config, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name, share = weight_name(path), 1.0
        if name == "tok_embeddings.weight" and model.output is not None:
            share = min(1, batch / config.vocab_size)
        elif ".experts." in name:
            experts, chosen = config.moe.num_experts, config.moe.num_experts_per_tok
            share = 1 - (1 - chosen / experts) ** batch
        size += share * leaf.size * leaf.dtype.itemsize
    seen = sum(context if w is None else min(w, context) for w in config.windows)
    numbers = batch * 2 * config.n_kv_heads * config.head_dim * seen
    return size + numbers * np.dtype(model.dtype).itemsize


def prefill_flops(config: ModelConfig, *, tokens: int) -> int:
    """The floating-point operations that reading a prompt needs, a multiplication and an
    addition being two.

    That is `2 * weights * tokens` over the matrices of the blocks (of a mixture, the chosen
    experts'), `4 * n_heads * head_dim` for each pair of a query and a key that it sees
    (scores, and the sum of values), and `2 * vocab_size * dim` once: the logits behind the
    prompt. Norms, rotations, softmax and what a mask throws away do not count.
    """
    weights = 0
    for name, shape in weight_shapes(config).items():
        if name.startswith("layers.") and len(shape) == 2:
            moe = config.moe if ".experts." in name else None
            share = 1 if moe is None else moe.num_experts_per_tok / moe.num_experts
            weights += share * math.prod(shape)
    pairs = 0
    for window in config.windows:
        first = tokens if window is None else min(window, tokens)
        # The first tokens see all before them, each of the others a window.
        pairs += first * (first + 1) // 2 + (tokens - first) * first
    attention = 4 * config.n_heads * config.head_dim * pairs
    return int(2 * weights * tokens + attention + 2 * config.vocab_size * config.dim)


def read_bandwidth(*, repeats: int = 5) -> float:
    """The bytes a second that the device reads at best: half a gigabyte, summed up. Two
    formulations are tried, since no platform is fast with both."""
    array = jnp.ones((PROBE // 2**16, 2**14), jnp.float32)
    ones = jnp.ones(array.shape[1], jnp.float32)
    ways = (jax.jit(lambda x, _: jnp.sum(x, axis=1)), jax.jit(lambda x, y: x @ y))
    best = math.inf
    for way in ways:
        jax.block_until_ready(way(array, ones))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(way(array, ones))
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def bench(
    model: Transformer,
    *,
    batch: int = 1,
    prompt: int = 512,
    tokens: int = 64,
    repeats: int = 5,
    contexts: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Measures a model on the device, or the devices, where it is. Their read bandwidths
    are added up, which devices that share a memory do not deserve.

    **Arguments:**

    - `model`: any.
    - `batch`: rows.
    - `prompt`: tokens of the prompt of each.
    - `tokens`: to write behind each prompt; the first is not timed with the others.
    - `repeats`: of everything that is timed.
    - `contexts`: the lengths of context at which to time a step. By default 1k to 32k, in
        steps of two with a window and of four without, as far as the memory goes.

    **Returns:**

    Under plain names, ready for JSON: sizes in bytes, times in seconds; what was repeated
    is `{"median": ..., "low": ..., "high": ...}` with the quartiles. `table` prints it.

    **Raises:**

    `ValueError` for a number below 1.
    """
    contexts = check_options(batch, prompt, tokens, repeats, contexts)
    config, itemsize = model.config, np.dtype(model.dtype).itemsize
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (batch, prompt)).tolist()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    if contexts is None:
        contexts = _contexts(config, batch, room=memory_here() / 2 - weights, size=itemsize)
    bar = tqdm(desc="bench", total=1 + repeats + len(contexts), unit="run", disable=None)
    with bar:
        # The first run compiles, and its peak is of the model alone: the probe comes later.
        first, cache = _run(model, prompts, tokens)
        peak = _peak_memory()
        bar.update()
        runs, bandwidths = [], []
        for _ in range(repeats):
            bandwidths.append(read_bandwidth(repeats=3))
            runs.append(_run(model, prompts, tokens)[0])
            bar.update()
        steps = {}
        for length in contexts:
            steps[length] = _time_at(model, batch, length, repeats)
            bar.update()
    reading, choosing, writing = (np.array(column) for column in zip(*runs))
    n_devices = len(model.norm.weight.devices())
    bandwidth = n_devices * max(bandwidths)
    context = prompt + (tokens + 1) // 2
    size = decode_bytes(model, batch=batch, context=context)
    flops = batch * prefill_flops(config, tokens=prompt)
    compiling = [max(0.0, a - statistics.median(b)) for a, b in zip(first, zip(*runs))]
    written = batch * (tokens - 1) / writing if tokens > 1 else None
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": n_devices,
        "cores": _cores(),
        "jax": jax.__version__,
        "dtype": str(np.dtype(model.dtype)),
        "quantize": _scheme(model),
        "parameters": sum(math.prod(shape) for shape in weight_shapes(config).values()),
        "batch": batch,
        "prompt": prompt,
        "tokens": tokens,
        "repeats": repeats,
        "compile": {"prefill": compiling[0], "decode": compiling[1]},
        "first_token": _spread(reading + choosing),
        "prefill_tokens_per_second": _spread(batch * prompt / reading),
        "prefill_flops": flops,
        "prefill_flops_per_second": _spread(flops / reading),
        "decode_tokens_per_second": None if written is None else _spread(written),
        "bytes_per_token": size / batch,
        "read_bandwidth": bandwidth,
        "bandwidth_share": None
        if written is None
        else _spread(written * size / batch / bandwidth),
        "memory": {"weights": weights, "cache": cache, "peak": peak},
        "contexts": [{"length": n, "seconds_per_step": steps[n]} for n in contexts],
    }


def check_options(
    batch: int,
    prompt: int,
    tokens: int,
    repeats: int,
    contexts: tuple[int, ...] | None,
) -> tuple[int, ...] | None:
    """Raises `ValueError` for a number below 1. Returns the lengths of context in order."""
    numbers = {"batch": batch, "prompt": prompt, "tokens": tokens, "repeats": repeats}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}.")
    if contexts is None:
        return None
    for length in contexts:
        if length < 1:
            raise ValueError(f"A context must be 1 token or more, got {length}.")
    return tuple(sorted(set(contexts)))


def table(report: dict[str, Any]) -> str:
    """A report for people."""
    memory, compiling = report["memory"], report["compile"]
    rows = [
        (
            "device",
            f"{report['devices']} x {report['device']} ({report['platform']}), "
            f"{report['cores']} cores",
        ),
        ("weights", f"{report['parameters']:,} in {report['quantize'] or report['dtype']}"),
        ("run", f"{report['batch']} x ({report['prompt']} + {report['tokens']} tokens)"),
    ]
    if "load" in report:
        rows.append((report["source"], f"{report['load']:.2f} s"))
    rows += [
        ("compile", f"{compiling['prefill'] + compiling['decode']:.2f} s"),
        ("first token", _told(report["first_token"], 1e-3, "ms")),
        ("prefill", _told(report["prefill_tokens_per_second"], 1.0, "tokens/s")),
        ("", _told(report["prefill_flops_per_second"], 1e9, "GFLOP/s")),
    ]
    if report["decode_tokens_per_second"] is not None:
        rows += [
            ("decode", _told(report["decode_tokens_per_second"], 1.0, "tokens/s")),
            ("bytes a token", f"{report['bytes_per_token'] / 1e6:,.1f} MB"),
            ("read bandwidth", f"{report['read_bandwidth'] / 1e9:,.1f} GB/s"),
            ("its share used", _told(report["bandwidth_share"], 0.01, "%")),
        ]
    rows += [
        ("memory, peak", f"{memory['peak'] / 1e6:,.0f} MB"),
        ("of it weights", f"{memory['weights'] / 1e6:,.0f} MB"),
        ("of it cache", f"{memory['cache'] / 1e6:,.1f} MB"),
    ]
    for i, row in enumerate(report["contexts"]):
        told = _told(row["seconds_per_step"], 1e-3, "ms a step")
        rows.append(("" if i else "context", f"{row['length']:>6,} tokens: {told}"))
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def _scheme(model: Transformer) -> str | None:
    """In what the weights are quantized."""
    schemes = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.uint8): "int4"}
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(model)]
    return next((scheme for dtype, scheme in schemes.items() if dtype in dtypes), None)


def _run(
    model: Transformer, prompts: list[list[int]], tokens: int
) -> tuple[tuple[float, float, float], int]:
    """Reads the prompts and continues them. Returns the seconds until they were read, from
    there to the first token, and from there to the last; and the cache's bytes."""
    start = time.perf_counter()
    cache, logits = jax.block_until_ready(prefill(model, prompts, max_tokens=tokens))
    read = time.perf_counter()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    state, choice = decode(model, _greedy(model, cache, logits, tokens), jnp.int32(1))
    jax.block_until_ready(choice)
    chosen = time.perf_counter()
    _decode(model, state, tokens - 1)
    return (read - start, chosen - read, time.perf_counter() - chosen), size


def _greedy(
    model: Transformer, cache: Cache, logits: jax.Array, tokens: int
) -> DecodeState:
    """A state that makes so many tokens in each row and has not ended then."""
    return DecodeState.start(model, cache, logits, max_tokens=tokens + 1, key=jr.key(0))


def _decode(model: Transformer, state: DecodeState, steps: int) -> DecodeState:
    """So many steps, in blocks that do not wait for one another."""
    for start in range(0, steps, BLOCK):
        state, _ = decode(model, state, jnp.int32(min(BLOCK, steps - start)))
    return jax.block_until_ready(state)


def _time_at(model: Transformer, batch: int, length: int, repeats: int) -> dict[str, float]:
    """The seconds of a decode step behind `length` tokens. The cache claims to hold them
    without having read any: no time depends on what they are."""
    cache = make_cache(
        model,
        jnp.zeros(batch, jnp.int32),
        chunk=checked_chunk(None, model, batch),
        max_length=next_power_of_two(length),
    )
    # The steps that are timed end at this length.
    steps = min(CONTEXT_STEPS, max(1, length // (repeats + 1)))
    begin = max(0, length - (repeats + 1) * steps)
    cache = eqx.tree_at(lambda c: c.length, cache, replicate(jnp.int32(begin), model))
    logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    logits = shard_rows(logits, model)
    state = _greedy(model, cache, logits, (repeats + 1) * steps)
    state = _decode(model, state, steps)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        state = _decode(model, state, steps)
        seconds.append((time.perf_counter() - start) / steps)
    return _spread(np.array(seconds))


def _contexts(
    config: ModelConfig, batch: int, *, room: float, size: int
) -> tuple[int, ...]:
    step = 4 if config.smallest_window is None else 2
    token = batch * 2 * config.n_kv_heads * config.head_dim * size
    fits = lambda n: token * sum(min(n, w or n) for w in config.windows) <= room
    lengths = [1024 * step**i for i in range(6) if 1024 * step**i <= 32768]
    return tuple(n for n in lengths if fits(n))


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "low": low, "high": high}


def _told(spread: dict[str, float], unit: float, name: str) -> str:
    digits = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.3f}"
    low, median, high = (digits(spread[k] / unit) for k in ("low", "median", "high"))
    return f"{median} {name} ({low} to {high})"


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() if affinity is None else len(affinity(0))


def _peak_memory() -> int:
    """The most that this process has had resident, or the device allocated, so far."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024
    import resource  # macOS, where it counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
