"""What is asked of the engine, checked, and laid out in the few shapes that it compiles."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arguments
from .cache import Cache
from .config import ModelConfig
from .devices.chips import Chip, chip_here
from .devices.processes import to_host
from .devices.sharding import rows_here
from .transformer import Transformer


def default_chunk(config: ModelConfig, chip: Chip | None = None, *, rows: int = 1) -> int:
    """The most tokens of each prompt that go through the model at once.

    With few tokens a chip waits for weights. It multiplies for as long as it reads if there
    are as many tokens as it has operations for each byte: a token needs two operations for
    every weight of two bytes. (Each expert of a Mixtral gets only some of the tokens.) So
    this is the power of two from there on, 256 at least, and the rows of a batch have a
    share of it each. More would take memory, and where there is a window, make the ring
    longer than it need be.

    **Arguments:**

    - `chip`: what it is for; by default what this process has.
    - `rows`: how many prompts a device reads at once.
    """
    chip, window = chip or chip_here(), config.smallest_window
    chunk = 256
    if chip is not None and not math.isnan(chip.operations):
        tokens = chip.operations / chip.bandwidth
        if config.moe is not None:
            tokens *= config.moe.num_experts / config.moe.num_experts_per_tok
        chunk = min(2048, max(256, next_power_of_two(math.ceil(tokens / rows))))
    if window is not None:
        chunk = min(chunk, max(128, 1 << (window.bit_length() - 1)))
    return chunk


def checked_chunk(chunk: int | None, model: Transformer, n_prompts: int) -> int:
    """The chunk that was asked for, or the default. Raises `TypeError` for what is no
    number, `ValueError` below 1."""
    if chunk is None:
        return default_chunk(model.config, rows=rows_here(n_prompts, model))
    return arguments.integer("chunk", chunk, least=1, most=2**20)


def padded_length(longest: int, chunk: int) -> int:
    """Whole chunks and a power of two behind them: the least such length."""
    whole, rest = divmod(longest, chunk)
    return whole * chunk + (min(chunk, next_power_of_two(rest)) if rest else 0)


def chunk_sizes(
    length: int, n_tokens: int, *, chunk: int, slots: tuple[int, ...]
) -> list[int]:
    """How to cut `n_tokens` that follow `length` others, so that no chunk straddles the
    end of any ring. Only `chunk` and powers of two below it are used: a handful of shapes
    to compile for prompts of any length."""
    sizes = []
    while n_tokens > 0:
        room = min(n_tokens, *(ring - length % ring for ring in slots))
        size = chunk if room >= chunk else 1 << (room.bit_length() - 1)
        sizes.append(size)
        length, n_tokens = length + size, n_tokens - size
    return sizes


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def budgets_of(max_tokens: int | Sequence[int], n_prompts: int) -> list[int]:
    """`max_tokens` for each row. Raises `TypeError` for what is no number, `ValueError` for
    a negative one, or for more or fewer numbers than prompts."""
    is_list = isinstance(max_tokens, Sequence) or np.ndim(max_tokens) > 0
    if isinstance(max_tokens, str) or not is_list:
        return [arguments.integer("max_tokens", max_tokens)] * n_prompts
    if len(max_tokens) != n_prompts:
        raise ValueError(
            f"max_tokens has {len(max_tokens)} numbers for {n_prompts} prompts: give one "
            "for each, or a single one for all."
        )
    return [arguments.integer("max_tokens", budget) for budget in max_tokens]


def checked_prompts(
    prompts: Any, vocab_size: int, *, n_rows: int | None = None
) -> list[list[int]]:
    """The prompts as lists: of `n_rows` rows that may be empty, if that is given, and
    otherwise at least one, with a token in each. Raises `TypeError` for what holds no
    token ids, `ValueError` for another number of prompts, an empty one, or an id outside.
    """
    prompts = arguments.items("prompts", prompts, "lists of token ids, one for each row")
    if not prompts and n_rows is None:
        raise ValueError("There is no prompt: give at least one.")
    if n_rows not in (None, len(prompts)):
        raise ValueError(
            f"There are {len(prompts)} prompts for {n_rows} rows: give one for each."
        )
    may_be_empty = n_rows is not None
    return [_checked_prompt(i, p, vocab_size, may_be_empty) for i, p in enumerate(prompts)]


def _checked_prompt(i: int, prompt: Any, vocab_size: int, may_be_empty: bool) -> list[int]:
    try:
        ids = np.asarray(prompt)
    except Exception:  # what NumPy makes nothing of
        ids = np.asarray(None)
    if ids.shape == (0,):
        if may_be_empty:
            return []
        raise ValueError(
            f"Prompt {i} is empty. A model needs a token to follow: the BOS id, say."
        )
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(
            f"Prompt {i} must be a list of token ids, got {arguments.shown(prompt)}."
        )
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size > 0:
        raise ValueError(
            f"Prompt {i} has the token id {wrong[0]}, but the model's vocabulary has "
            f"{vocab_size} ids, from 0. Is the tokenizer of this model?"
        )
    return ids.tolist()


def checked_alternatives(alternatives: int, vocab_size: int) -> int:
    """Raises `ValueError` for fewer than none, or more than there are."""
    return arguments.integer("alternatives", alternatives, most=vocab_size)


def checked_eos_ids(eos_ids: Any, vocab_size: int) -> list[int]:
    """The ids that end a row, as a list; -1 is none. Raises `TypeError` or `ValueError` for
    others than the vocabulary's."""
    eos_ids = arguments.items("eos_ids", eos_ids, "token ids")
    return [arguments.integer("eos_ids", i, least=-1, most=vocab_size - 1) for i in eos_ids]


def check_continuation(
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    chunk: int,
    windows: tuple[int | None, ...],
) -> None:
    """Raises `ValueError` if the prompts, and `max_tokens` behind them, cannot follow what
    the cache holds."""
    rows = cache.padding.size
    if rows not in (1, len(prompts)):
        raise ValueError(
            f"The cache has {rows} rows, but there are {len(prompts)} prompts to follow "
            "them."
        )
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) > 1:
        raise ValueError(
            f"The prompts that follow a cache must be of one length, got {lengths[0]} to "
            f"{lengths[-1]} tokens. Continue it once for each length."
        )
    if to_host(cache.closed).any():
        raise ValueError(
            "A row of the cache ended before the others, and pads were written behind it. "
            "It cannot be continued: prefill its tokens again."
        )
    check_room(cache, lengths[0], max_tokens, chunk=chunk, windows=windows)


def check_room(
    cache: Cache,
    n_tokens: int,
    max_tokens: int,
    *,
    chunk: int,
    windows: tuple[int | None, ...],
) -> None:
    """Raises `ValueError` if a cache has no room for `n_tokens` more, written in chunks,
    and for `max_tokens` behind them. They would overwrite tokens that are still seen."""
    length = int(cache.length)
    needed = length + n_tokens + max_tokens
    for slots, window in zip(cache.slots, windows, strict=True):
        # A ring that holds a window and a chunk lets the oldest tokens go.
        if needed <= slots or (window is not None and slots >= window - 1 + chunk):
            continue
        advice = "Make it with a larger max_tokens."
        if window is not None and slots >= window:
            advice = f"Give a chunk of at most {slots - window + 1}."
        raise ValueError(
            f"The cache was made for {slots} tokens, pads included, and {needed} are asked "
            f"of it: {length} are in it, {n_tokens} follow, and {max_tokens} are to be "
            f"made behind them. {advice}"
        )
