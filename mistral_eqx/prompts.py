"""What is asked of the engine, checked, and laid out in the few shapes that it compiles."""

from collections.abc import Sequence

from .cache import Cache
from .devices.processes import to_host


def default_chunk(window: int | None) -> int:
    """The most tokens of a prompt that go through the model at once: the power of two that
    fits in the window, between 128 and 256. Fewer would leave a device idle, and more make
    the ring longer than it need be."""
    return 256 if window is None else min(256, max(128, 1 << (window.bit_length() - 1)))


def checked_chunk(chunk: int | None, window: int | None) -> int:
    """The chunk that was asked for, or the default. Raises `ValueError` below 1."""
    if chunk is None:
        return default_chunk(window)
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}.")
    return chunk


def padded_length(longest: int, chunk: int) -> int:
    """Whole chunks and a power of two behind them: the least such length."""
    whole, rest = divmod(longest, chunk)
    return whole * chunk + (min(chunk, next_power_of_two(rest)) if rest else 0)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def budgets_of(max_tokens: int | Sequence[int], n_prompts: int) -> list[int]:
    """`max_tokens` for each row. Raises `ValueError` for a negative number, or for more or
    fewer numbers than prompts."""
    budgets = [max_tokens] * n_prompts if isinstance(max_tokens, int) else list(max_tokens)
    if len(budgets) != n_prompts:
        raise ValueError(
            f"max_tokens has {len(budgets)} numbers for {n_prompts} prompts: give one for "
            "each, or a single one for all."
        )
    if budgets and min(budgets) < 0:
        raise ValueError(f"max_tokens must be 0 or more, got {min(budgets)}.")
    return budgets


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises `ValueError` for no prompts, an empty one, or an id outside."""
    if len(prompts) == 0:
        raise ValueError("There is no prompt: give at least one.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"Prompt {i} is empty. A model needs a token to follow: the BOS id, say."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(
                f"Prompt {i} has the token id {wrong}, but the model's vocabulary has "
                f"{vocab_size} ids, from 0. Is the tokenizer of this model?"
            )


def check_alternatives(alternatives: int, vocab_size: int) -> None:
    """Raises `ValueError` for fewer than none, or more than there are."""
    if not 0 <= alternatives <= vocab_size:
        raise ValueError(
            f"alternatives must be between 0 and the {vocab_size} ids of the vocabulary, "
            f"got {alternatives}."
        )


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
    needed = int(cache.length) + lengths[0] + max_tokens
    for slots, window in zip(cache.slots, windows, strict=True):
        # A ring that holds a window and a chunk lets the oldest tokens go.
        rolls = window is not None and slots >= window - 1 + chunk
        if needed > slots and not rolls:
            raise ValueError(
                f"The cache was made for {slots} tokens, pads included, and {needed} are "
                f"asked of it: {int(cache.length)} are in it, {lengths[0]} follow, and "
                f"max_tokens is {max_tokens}. Make it with a larger max_tokens."
            )
