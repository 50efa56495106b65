"""Batches of token ids to learn from: slices of a long text, or short examples packed."""

import bisect
import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from .. import arguments


# How many rows the loss on held-out text is measured on, if there are so many.
MEASURED = 64
Ids = Int[np.ndarray | Array, "batch length"]


class Batch(eqx.Module):
    """Rows of tokens, each of which is to be predicted from those before it.

    **Attributes:**

    - `tokens`: the ids; the last of a row is only predicted.
    - `segments`: the number of the example that each token belongs to. Examples of a row do
        not see one another. `None` if every row is one.
    - `learnt`: which tokens are to be predicted. `None` for all but the first of a row.
    """

    tokens: Ids
    segments: Ids | None = None
    learnt: Bool[np.ndarray | Array, "batch length"] | None = None


class Labelled(eqx.Module):
    """Texts, of each of which the label is to be predicted.

    **Attributes:**

    - `tokens`, `lengths`: rows of ids, and how many each has.
    - `labels`: the number of each row's label.
    - `learnt`: which rows count.
    """

    tokens: Ids
    lengths: Int[np.ndarray | Array, "batch"]
    labels: Int[np.ndarray | Array, "batch"]
    learnt: Bool[np.ndarray | Array, "batch"]


class Slices:
    """Random slices of a long text, each behind a BOS."""

    def __init__(
        self, name: str, tokens: Integer[np.ndarray, "n"], *, seq_len: int, bos_id: int
    ):
        """**Arguments:**

        - `name`: of the text, for an error.
        - `tokens`: its ids.
        - `seq_len`: the length of a slice.
        - `bos_id`: what a model expects before a text.

        **Raises:**

        `ValueError` if the text is shorter than a slice.
        """
        self.tokens, self.bos_id = tokens, bos_id
        self.seq_len = arguments.integer("seq_len", seq_len, least=1)
        if len(tokens) < seq_len:
            raise ValueError(
                f"{name} has {len(tokens)} tokens, fewer than one sequence of {seq_len}: "
                "give more of it, or make the sequence shorter."
            )

    @property
    def checksum(self) -> int:
        return zlib.crc32(np.asarray(self.tokens, np.int32).tobytes())

    @property
    def n_rows(self) -> float:
        """How many rows have as many tokens as the text."""
        return len(self.tokens) / self.seq_len

    @property
    def told(self) -> str:
        return f"a text of {len(self.tokens):,} tokens, in random slices"

    def batch(self, size: int, *, seed: int, step: int) -> Batch:
        """The batch of a step. It depends on the seed and the step alone, so that a resumed
        run sees what an unbroken one does."""
        n_starts = len(self.tokens) - self.seq_len + 1
        starts = np.random.default_rng((seed, step)).integers(0, n_starts, size)
        slices = self.tokens[starts[:, None] + np.arange(self.seq_len)[None, :]]
        bos = np.full((size, 1), self.bos_id, np.int32)
        return Batch(np.concatenate([bos, slices.astype(np.int32)], axis=1))

    def measured(self, size: int) -> Iterator[Batch]:
        """The same rows each time, to measure the loss on."""
        for i in range(-(-MEASURED // size)):
            yield self.batch(size, seed=0, step=i)


@dataclasses.dataclass(frozen=True)
class Example:
    """A short text, and which of its tokens are to be learnt."""

    tokens: Sequence[int]
    learnt: Sequence[bool]


class _Rows:
    """What there is a fixed number of rows of."""

    n_rows: int

    def batch(self, size: int, *, seed: int, step: int) -> Batch | Labelled:
        """The batch of a step: every row once before any comes again, each time in another
        order. It depends on the seed and the step alone."""
        n = self.n_rows
        places = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng((seed, epoch)).permutation(n)
            for epoch in np.unique(places // n).tolist()
        }
        rows = (orders[place // n][place % n] for place in places.tolist())
        return self._take(np.fromiter(rows, int, size))

    def measured(self, size: int) -> Iterator[Batch | Labelled]:
        """The same rows each time, to measure the loss on. What fills up the last batch
        counts for nothing."""
        n = min(self.n_rows, -(-MEASURED // size) * size)
        for start in range(0, n, size):
            rows = np.arange(start, start + size)
            batch, counts = self._take(np.minimum(rows, n - 1)), rows < n
            counts = counts.reshape(-1, *[1] * (batch.learnt.ndim - 1))
            learnt = batch.learnt & counts
            yield eqx.tree_at(lambda b: b.learnt, batch, learnt)

    def _take(self, rows: Integer[np.ndarray, "batch"]) -> Batch | Labelled:
        raise NotImplementedError


class Packed(_Rows):
    """Short examples, several to a row."""

    def __init__(self, examples: Sequence[Example], *, seq_len: int):
        """**Arguments:**

        - `examples`: one at least.
        - `seq_len`: of a row. No example may have more than `seq_len + 1` tokens, of which
            the last is only predicted.
        """
        self.seq_len, self.n_examples = seq_len, len(examples)
        rows = packed([len(example.tokens) for example in examples], seq_len + 1)
        self.n_rows = len(rows)
        shape = (len(rows), seq_len + 1)
        # Pads are an example of their own, of which nothing is learnt.
        self.tokens = np.zeros(shape, np.int32)
        self.segments = np.full(shape, -1, np.int32)
        self.learnt = np.zeros(shape, bool)
        for row, numbers in enumerate(rows):
            start = 0
            for segment, number in enumerate(numbers):
                example = examples[number]
                place = slice(start, start + len(example.tokens))
                self.tokens[row, place] = example.tokens
                self.segments[row, place] = segment
                self.learnt[row, place] = example.learnt
                # Nothing of the example comes before its first token.
                self.learnt[row, start] = False
                start = place.stop

    @property
    def told(self) -> str:
        n, learnt = int((self.segments >= 0).sum()), int(self.learnt.sum())
        return (
            f"{self.n_examples:,} examples of {n:,} tokens, {learnt:,} of them to be "
            f"learnt, in {self.n_rows:,} rows ({100 * n / self.tokens.size:.0f}% full)"
        )

    @property
    def checksum(self) -> int:
        arrays = (self.tokens, self.segments, self.learnt)
        return zlib.crc32(b"".join(array.tobytes() for array in arrays))

    def _take(self, rows: Integer[np.ndarray, "batch"]) -> Batch:
        return Batch(self.tokens[rows], self.segments[rows], self.learnt[rows])


class LabelledRows(_Rows):
    """Texts with their labels, one to a row."""

    def __init__(self, examples: Sequence[tuple[Sequence[int], int]]):
        """**Arguments:**

        - `examples`: the ids of each text, and the number of its label.
        """
        self.n_rows = len(examples)
        self.lengths = np.array([len(tokens) for tokens, _ in examples], np.int32)
        self.labels = np.array([label for _, label in examples], np.int32)
        self.seq_len = int(self.lengths.max())
        self.tokens = np.zeros((self.n_rows, self.seq_len), np.int32)
        for row, (tokens, _) in zip(self.tokens, examples):
            row[: len(tokens)] = tokens

    @property
    def told(self) -> str:
        n, n_labels = int(self.lengths.sum()), len(set(self.labels.tolist()))
        return f"{self.n_rows:,} texts of {n:,} tokens, with {n_labels} labels"

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.tokens.tobytes() + self.labels.tobytes())

    def _take(self, rows: Integer[np.ndarray, "batch"]) -> Labelled:
        counts = np.ones(len(rows), bool)
        return Labelled(self.tokens[rows], self.lengths[rows], self.labels[rows], counts)


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which of so long examples go into each row: the longest first, each where it leaves
    the least room."""
    rows, rooms = [], []  # rooms: how much each row has left, and its number, in order
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, (lengths[number], 0))
        left, row = rooms.pop(place) if place < len(rooms) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(rooms, (left - lengths[number], row))
    return rows
