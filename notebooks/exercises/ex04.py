"""The checkers of notebook 04."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import mistral_eqx as mx

from . import call, check_cases, todo, verdict


def check_seen(seen: Callable) -> bool | None:
    def fault(answer, position, written, window, slots):
        held, expected = _visible(position, written, window, slots)
        case = f"Query {position}, {written} written, window {window}, {slots} slots"
        answer = {int(slot) for slot in answer}
        if extra := sorted(answer - expected):
            slot = extra[0]
            if not 0 <= slot < slots:
                return f"{case}: there is no slot {slot}."
            told = f"{case}: not slot {slot}. It"
            if held[slot] < 0:
                return f"{told} was never written: the text begins at token 0."
            if held[slot] <= position:
                return f"{told} holds token {held[slot]}, which has left the window."
            gone = held[slot] - slots
            if position - window < gone <= position:
                return f"{told} held token {gone}, but token {held[slot]} came there since."
            return f"{told} holds token {held[slot]}, which comes after the query."
        if missing := sorted(expected - answer):
            slot = missing[0]
            why = "the query sees itself" if held[slot] == position else "it is seen"
            told = f"{case}: slot {slot} is missing."
            return f"{told} It holds token {held[slot]}, and {why}."

    cases = [(9, 10, 4, 8), (2, 3, 4, 8), (8, 11, 4, 9), (4, 8, 4, 6), (149, 150, 64, 64)]
    return check_cases("seen", seen, cases, fault, "The same slots as the package's mask.")


def _visible(position: int, written: int, window: int, slots: int):
    """The token in every slot, and the slots that are seen: the package is asked."""
    zeros = jnp.zeros((1, slots, 2))
    held = mx.cache.LayerCache(zeros, zeros).indices(jnp.int32(written))
    mask = mx.attention.visible(jnp.int32([position]), held, window)[0]
    return held.tolist(), set(np.flatnonzero(mask).tolist())


def check_write_chunk(write_chunk: Callable) -> bool | None:
    """The number in a slot is that of its token, and -1 where none has been written."""

    def fault(answer, ring, rows, length):
        answer, slots = np.asarray(answer, np.float32), len(ring)
        if answer.shape != ring.shape:
            return f"The shape is {answer.shape}, not that of the ring, {ring.shape}."
        expected = np.array(ring)
        for token, row in enumerate(np.asarray(rows), length):
            expected[token % slots] = row
        if np.array_equal(answer, expected):
            return None
        chunk = range(length, length + len(rows))
        case = f"Tokens {chunk[0]} to {chunk[-1]} in {slots} slots"
        for token in chunk:
            places = np.flatnonzero((answer == token).all(axis=1)).tolist()
            if token % slots in places:
                continue
            if not places:
                why = "" if token < slots else " What runs over the end goes to slot 0."
                return f"{case}: token {token} is in no slot.{why}"
            told = f"{case}: token {token} is in slot {places[0]}, not {token % slots}."
            if places[0] == slots - len(rows):
                return f"{told} XLA has moved the whole block back, so that it fits."
            if places[0] == 0:
                return f"{told} Only what runs over the end goes to slot 0."
            return told
        slot = int(np.flatnonzero((answer != expected).any(axis=1))[0])
        return f"{case}: slot {slot} is none of theirs, and must stay as it was."

    cases = [_chunk(*case) for case in [(0, 4, 67), (64, 4, 67), (131, 4, 67), (5, 3, 8)]]
    praise = "A chunk may run over the ring's end."
    return check_cases("write_chunk", write_chunk, cases, fault, praise)


def _chunk(length: int, n_tokens: int, slots: int):
    """A ring after `length` tokens, the rows that follow, and `length`."""
    held = np.full((slots, 2), -1.0, np.float32)
    for token in range(length):
        held[token % slots] = token
    rows = np.repeat(np.arange(length, length + n_tokens, dtype=np.float32)[:, None], 2, 1)
    return jnp.asarray(held), jnp.asarray(rows), length


def check_cache_mib(cache_mib) -> bool | None:
    """Of Mistral 7B as released, in chunks of 1,000: the package's own ring is asked."""
    if cache_mib is NotImplemented:
        return todo("cache_mib")
    config, window = mx.RELEASED["mistral-7b-v0.1"], 4096
    per_slot = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2 / 2**20
    ring = mx.cache.ring_size(window, chunk=1000, max_length=32768)
    right = per_slot * ring
    slips = {
        window: "That is a ring as long as the window: where does the chunk go?",
        window + 1000: "Beside the chunk 4,095 tokens are needed, and then it rounds up.",
        window - 1 + 1000: "A chunk is one block: the ring is a multiple of the chunk.",
        5000: "Round up, not down: 4,095 tokens stay beside the chunk.",
        32768: "That is a ring without a window.",
        33000: "That is a ring without a window.",
        4 * ring: "That is for 32 key heads, but they are shared: there are 8.",
        2 * ring: "That is twice too much: a number of bfloat16 has two bytes.",
        ring / 2: "That is half of it: values are kept beside keys.",
        ring * 2**20: "That is bytes. How many MiB are they?",
    }
    number, wrong = call(float, cache_mib)
    if wrong is not None or isinstance(cache_mib, bool | str):
        wrong = f"Give a number, not {cache_mib!r:.60}."
    elif abs(number - right) > 0.01:
        wrong = f"It is not {number:,g} MiB. How many slots, and how much in each?"
        for slots, told in slips.items():
            if abs(number - per_slot * slots) < 0.01:
                wrong = told
    return verdict("cache_mib", wrong, "6,000 slots, of which the window needs 4,096.")
