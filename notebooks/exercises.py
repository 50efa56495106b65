"""The checkers of the exercises. Each says "not done yet", what is wrong, or "right", and
returns `None`, `False` or `True`. The solutions are in `solutions/`."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx


def _verdict(name: str, wrong: str | None, praise: str = "") -> bool:
    print(
        f"{name}: not right yet. {wrong}" if wrong else f"{name}: right. {praise}".strip()
    )
    return wrong is None


def _todo(name: str) -> None:
    print(f"{name}: not done yet.")


def _call(function: Callable, *arguments):
    """The answer, and what is wrong if the function fails."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"It raised {type(error).__name__}: {error}"


# 01


def check_swiglu(swiglu: Callable) -> bool | None:
    model, _ = mx.load(dtype=jnp.float32)
    block = model.layers[0].feed_forward
    x = jr.normal(jr.key(1), (16, model.config.dim))
    answer, wrong = _call(swiglu, x, block.w1.weight, block.w2.weight, block.w3.weight)
    if answer is NotImplemented:
        return _todo("swiglu")
    expected = block(x)
    if wrong is None and getattr(answer, "shape", None) != expected.shape:
        wrong = f"The shape is {getattr(answer, 'shape', None)}, not {expected.shape}."
    if wrong is None:
        correct = float(np.mean(np.isclose(answer, expected, rtol=1e-3, atol=1e-4)))
        if correct < 1:
            wrong = f"{correct:.0%} of the values are. {_of_swiglu(answer, x, block)}"
    return _verdict("swiglu", wrong, "100% of the values are.")


def _of_swiglu(answer, x, block) -> str:
    """What a wrong answer looks like."""
    w1, w2, w3 = (layer.weight.T for layer in (block.w1, block.w2, block.w3))
    silu = jax.nn.silu
    others = {
        "It is gelu that you use: SwiGLU has silu.": (jax.nn.gelu(x @ w1) * (x @ w3)) @ w2,
        "w3 goes through silu: it is w1 that does.": ((x @ w1) * silu(x @ w3)) @ w2,
        "Both go through silu: only w1 does.": (silu(x @ w1) * silu(x @ w3)) @ w2,
        "The product with w3 x is missing.": silu(x @ w1) @ w2,
    }
    for hint, other in others.items():
        if np.allclose(answer, other, rtol=1e-2, atol=1e-2):
            return hint
    return "Is it w2(silu(w1(x)) * w3(x)), each weight transposed?"


SUSPECTS = {"A": "theta 1e6", "B": "window + 1"}


def check_name_the_bug(answer: dict[str, str]) -> bool | None:
    if NotImplemented in answer.values():
        return _todo("name_the_bug")
    wrong = [letter for letter, bug in SUSPECTS.items() if answer.get(letter) != bug]
    hint = f"Look again at {' and '.join(wrong)}: where does it leave zero, and how?"
    return _verdict("name_the_bug", hint if wrong else None)


def check_load_by_path(load_by_path: Callable) -> bool | None:
    config = mx.ModelConfig(
        dim=8, n_layers=2, head_dim=4, hidden_dim=8, n_heads=2, n_kv_heads=1,
        norm_eps=1e-5, vocab_size=16,
    )  # fmt: skip
    skeleton = eqx.filter_eval_shape(mx.Transformer, config, key=jr.key(0))
    random = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), skeleton)
    leaves = jax.tree_util.tree_leaves_with_path(model)
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    arrays = {spell(path): leaf for path, leaf in leaves}
    answer, wrong = _call(load_by_path, skeleton, arrays)
    if answer is NotImplemented:
        return _todo("load_by_path")
    if wrong is None and jax.tree.structure(answer) != jax.tree.structure(model):
        wrong = "What comes back is not a model of the skeleton's structure."
    if wrong is None:
        same = jax.tree.map(lambda a, b: bool(np.all(a == b)), answer, model)
        differing = [
            spell(p) for p, ok in jax.tree_util.tree_leaves_with_path(same) if not ok
        ]
        if differing:
            wrong = (
                f"{len(differing)} weights are not those of the file: {differing[0]}, say."
            )
    if wrong is None:
        missing = {name: array for name, array in arrays.items() if name != "norm.weight"}
        try:
            load_by_path(skeleton, missing)
            wrong = "Without norm.weight in the dictionary it did not raise KeyError."
        except KeyError:
            pass
    return _verdict("load_by_path", wrong)


# 03


def check_band(band: Callable) -> bool | None:
    wrong = None
    for n, window in ((6, 3), (5, 1), (4, 9)):
        answer, wrong = _call(band, n, window)
        if answer is NotImplemented:
            return _todo("band")
        positions = jnp.arange(n, dtype=jnp.int32)
        expected = np.asarray(mx.attention.visible(positions, positions, window))
        if wrong is None and np.shape(answer) != expected.shape:
            wrong = f"The shape for n={n} is {np.shape(answer)}, not {expected.shape}."
        if wrong is None and not np.array_equal(np.asarray(answer, bool), expected):
            query, key = np.argwhere(np.asarray(answer, bool) != expected)[0].tolist()
            sees = "sees" if expected[query, key] else "does not see"
            wrong = f"For n={n}, window={window}, query {query} {sees} key {key}."
        if wrong:
            break
    return _verdict("band", wrong)


def check_layers_for(layers_for: Callable) -> bool | None:
    wrong = None
    for reach, window, expected in (
        (63, 64, 1),
        (64, 64, 2),
        (4032, 64, 64),
        (4096, 64, 66),
    ):
        answer, wrong = _call(layers_for, reach, window)
        if answer is NotImplemented:
            return _todo("layers_for")
        if wrong is None and answer != expected:
            wrong = f"A reach of {reach} with a window of {window}: not {answer} layers."
        if wrong:
            break
    return _verdict("layers_for", wrong)


def check_scores(scores: Callable) -> bool | None:
    wrong = None
    for n, window in ((3, 64), (64, 64), (512, 64), (10, 1)):
        answer, wrong = _call(scores, n, window)
        if answer is NotImplemented:
            return _todo("scores")
        positions = jnp.arange(n, dtype=jnp.int32)
        expected = int(mx.attention.visible(positions, positions, window).sum())
        if wrong is None and answer != expected:
            wrong = f"For n={n}, window={window} it is {expected}, not {answer}."
        if wrong:
            break
    return _verdict("scores", wrong)


# 04


def check_slot(slot: Callable) -> bool | None:
    wrong = None
    for position, window in ((0, 64), (63, 64), (64, 64), (150, 64), (7, 3)):
        answer, wrong = _call(slot, position, window)
        if answer is NotImplemented:
            return _todo("slot")
        expected = _slot_that_changes(position, window)
        if wrong is None and answer != expected:
            wrong = (
                f"Position {position} in {window} slots goes to {expected}, not {answer}."
            )
        if wrong:
            break
    return _verdict("slot", wrong)


def _slot_that_changes(position: int, slots: int) -> int:
    """By writing there: the cache itself is asked."""
    ring = mx.cache.LayerCache(jnp.zeros((1, slots, 2)), jnp.zeros((1, slots, 2)))
    one = jnp.ones((1, 1, 2))
    written = ring.write(one, one, jnp.int32(position))
    return int(jnp.argmax(written.keys[0, :, 0]))


def check_held_by(held_by: Callable) -> bool | None:
    wrong = None
    for slot, written, slots in (
        (20, 150, 64),
        (22, 150, 64),
        (5, 5, 64),
        (0, 1, 8),
        (7, 64, 8),
    ):
        answer, wrong = _call(held_by, slot, written, slots)
        if answer is NotImplemented:
            return _todo("held_by")
        ring = mx.cache.LayerCache(jnp.zeros((1, slots, 2)), jnp.zeros((1, slots, 2)))
        index = int(ring.indices(jnp.int32(written))[slot])
        expected = index if index >= 0 else None
        if wrong is None and answer != expected:
            wrong = f"Slot {slot} holds {expected} after {written} tokens, not {answer}."
        if wrong:
            break
    return _verdict("held_by", wrong)


def check_unrotate(unrotate: Callable) -> bool | None:
    positions = jnp.array([0, 1, 20, 63], jnp.int32)
    cos, sin = mx.rope.rotation(positions, 32, 1e4)
    x = jr.normal(jr.key(3), (4, 2, 32))
    answer, wrong = _call(unrotate, mx.rope.rotate(x, cos, sin), cos, sin)
    if answer is NotImplemented:
        return _todo("unrotate")
    if wrong is None and np.shape(answer) != x.shape:
        wrong = f"The shape is {np.shape(answer)}, not {x.shape}."
    if wrong is None and not np.allclose(answer, x, atol=1e-4):
        bad = np.abs(answer - x).max(axis=(1, 2)) > 1e-4
        wrong = f"It is not undone at position {int(positions[np.argmax(bad)])}."
    return _verdict("unrotate", wrong)


# 05


def check_culprit(answer: str) -> bool | None:
    if answer is NotImplemented:
        return _todo("culprit")
    traces = {name: count_culprit(name) for name in "ABC"}
    most = max(traces, key=traces.get)
    wrong = None
    if answer != most:
        wrong = f"{answer!r} is traced {traces.get(answer, 'no such function: 0')} times."
    return _verdict("culprit", wrong, f"Traced for A, B, C: {tuple(traces.values())}.")


def count_culprit(name: str) -> int:
    """How often each function of the exercise is traced, by running it."""
    traces = []

    @eqx.filter_jit
    def scaled(x, step):
        traces.append(0)
        return x * step

    x = jnp.arange(4)
    for step in range(10):
        scaled(x, {"A": jnp.asarray(step), "B": np.int32(step), "C": step}[name])
    return len(traces)


LENGTHS = np.random.default_rng(0).zipf(1.3, 4000)
LENGTHS = LENGTHS[LENGTHS <= 512][:1000]


def padded(lengths: np.ndarray, buckets: list[int]) -> int:
    """How many pads it takes to bring every prompt to the next bucket."""
    edges = np.sort(np.asarray(buckets))
    return int((edges[np.searchsorted(edges, lengths)] - lengths).sum())


def check_buckets(buckets: list[int]) -> bool | None:
    if buckets is NotImplemented:
        return _todo("buckets")
    wrong = None
    if len(buckets) == 0:
        wrong = "There is no bucket, so no prompt fits."
    elif len(buckets) > 4:
        wrong = f"There are {len(buckets)} buckets: four programs at most."
    elif max(buckets) < LENGTHS.max():
        wrong = f"The longest prompt has {LENGTHS.max()} tokens and fits in none."
    else:
        pads, powers = padded(LENGTHS, buckets), padded(LENGTHS, [64, 128, 256, 512])
        if pads >= powers / 2:
            wrong = f"{pads:,} pads; 64, 128, 256, 512 need {powers:,}. Halve that."
    return _verdict("buckets", wrong)


def check_compile_once(compile_once: Callable) -> bool | None:
    traces = []

    def scaled(x, step):
        traces.append(0)
        return x * step

    run, wrong = _call(compile_once, scaled)
    if run is NotImplemented:
        return _todo("compile_once")
    for step in range(10):
        answer, wrong = (None, wrong) if wrong else _call(run, jnp.ones(4, jnp.int32), step)
        if wrong is None and not np.all(answer == step):
            wrong = f"For step {step} it gives {answer}."
    if wrong is None and len(traces) != 1:
        wrong = f"It is traced {len(traces)} times."
    return _verdict("compile_once", wrong)
