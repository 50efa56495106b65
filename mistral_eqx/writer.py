"""A row's text as its tokens come: decoded, ended at a stop string, kept apart from what a
model thinks and from the tools that it calls."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.random as jr

from . import arguments, beams, generation, scoring
from .generation import Continuation
from .tokenizer import Detokenizer, Tokenizer
from .transformer import Transformer


# Where a Completion keeps what follows a control token, and the control tokens that are
# part of a tool call.
_FIELDS = {"[THINK]": "reasoning", "[/THINK]": "text", "[TOOL_CALLS]": "tool_calls"}
_INSIDE_CALLS = ("[ARGS]", "[CALL_ID]")


@dataclasses.dataclass
class Completion:
    """How a prompt was continued. `str()` of it is the prompt and the text behind it.

    **Attributes:**

    - `prompt`: the text that was continued.
    - `text`: what was written behind it, without a stop string.
    - `reasoning`, `tool_calls`: what a model that thinks wrote between `[THINK]` and
        `[/THINK]`, and what it wrote behind `[TOOL_CALLS]`. Neither is part of `text`.
    - `tokens`: the ids that were made, those of a stop string included.
    - `logprobs`: the log-probability of each, in nats, as the model has it: temperature,
        penalty and filters do not change it.
    - `alternatives`: the most probable ids at each place and their log-probabilities.
    - `reason`: why it ended: "eos" if the model ended it, "length" at `max_tokens`,
        "stop" at a stop string.
    - `score`: of a beam: the sum of `logprobs`, that of the end-of-sequence id included,
        over the length to the power of the length penalty.
    """

    prompt: str = ""
    text: str = ""
    reasoning: str = ""
    tool_calls: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)
    reason: str | None = None
    score: float | None = None

    def __str__(self) -> str:
        return self.prompt + self.text

    @property
    def perplexity(self) -> float:
        """How many equally probable tokens would have been as hard to guess."""
        return scoring.perplexity(self.logprobs)


class Writer:
    """One row's text, as its tokens come: decoded, ended at a stop string, and kept apart
    from reasoning and tool calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str | Sequence[int],
        *,
        stop: str | Sequence[str] = (),
        with_reasoning: bool = False,
    ):
        """**Arguments:**

        - `tokenizer`: of the tokens.
        - `prompt`: the text that is continued; or ids, as those of a conversation, behind
            which a text of its own begins.
        - `stop`: strings that end the text.
        - `with_reasoning`: whether `add` returns reasoning and tool calls too.

        **Raises:**

        `TypeError` for what is no string, `ValueError` for an empty stop string.
        """
        self._stop = checked_stop(stop)
        of_text = isinstance(prompt, str)
        self.ids = tokenizer.encode(prompt) if of_text else list(prompt)
        self.completion = Completion(prompt=prompt if of_text else tokenizer.decode(prompt))
        self._detokenizer = Detokenizer(tokenizer, self.ids if of_text else ())
        # What may be the beginning of a stop string.
        self._held = ""
        self._tokenizer, self._with_reasoning = tokenizer, with_reasoning
        self._field = "text"
        marks = {tokenizer.control_id(name): name for name in (*_FIELDS, *_INSIDE_CALLS)}
        marks.pop(None, None)
        self._marks = marks

    def add(self, made: Continuation | beams.Beam) -> str:
        """The text that new tokens make certain. Nothing is added behind the end."""
        completion, pieces = self.completion, []
        for i, token in enumerate(made.tokens):
            if completion.reason is not None:
                break
            completion.tokens.append(token)
            completion.logprobs.append(made.logprobs[i])
            completion.alternatives += made.alternatives[i : i + 1]
            if token in self._marks:
                pieces.append(self._turn(self._marks[token]))
            else:
                pieces.append(self._write(self._detokenizer.add([token])))
        if completion.reason is None and made.reason is not None:
            pieces.append(self._write(self._detokenizer.end()))
            if completion.reason is None:
                completion.reason = made.reason
                completion.text += self._held
                pieces.append(self._held)
        return "".join(pieces)

    def _turn(self, mark: str) -> str:
        """What follows goes where `mark` says."""
        piece = self._write(self._detokenizer.end())
        self._detokenizer = Detokenizer(self._tokenizer)
        if mark in _INSIDE_CALLS or (mark == "[TOOL_CALLS]" and self.completion.tool_calls):
            return piece + self._write(mark)
        self._field = _FIELDS[mark]
        return piece + (mark if self._with_reasoning else "")

    def _write(self, text: str) -> str:
        """Adds new text to the completion. Returns what a stream shows of it."""
        field = self._field
        piece = self._certain(text) if field == "text" else text
        setattr(self.completion, field, getattr(self.completion, field) + piece)
        return piece if field == "text" or self._with_reasoning else ""

    def _certain(self, text: str) -> str:
        held = self._held + text
        ends = [(held.find(s) + len(s), held.find(s)) for s in self._stop if s in held]
        if ends:
            # The one that is whole first, so that it does not matter how the text comes.
            self.completion.reason = "stop"
            return held[: min(ends)[1]]
        longest = max(map(len, self._stop), default=1) - 1
        beginnings = (
            n
            for n in range(min(longest, len(held)), 0, -1)
            if any(stop.startswith(held[-n:]) for stop in self._stop)
        )
        certain = len(held) - next(beginnings, 0)
        self._held = held[certain:]
        return held[:certain]


def checked_stop(stop: str | Sequence[str]) -> list[str]:
    """The stop strings as a list. Raises `TypeError` for what is no string, `ValueError`
    for an empty one."""
    stop = arguments.texts("stop", stop)
    if "" in stop:
        raise ValueError("A stop string is empty: every text would end at once.")
    return stop


def checked_seed(seed: int) -> int:
    """Raises `TypeError` for what is no whole number, `ValueError` above 64 bits."""
    return arguments.integer("seed", seed, least=-(2**63), most=2**63 - 1)


def write(
    model: Transformer,
    tokenizer: Tokenizer,
    writers: Sequence[Writer],
    *,
    seed: int,
    eos_ids: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[list[str]]:
    """Lets a model write for every writer, and yields the new text of each. The options are
    those of [`mistral_eqx.generation.stream`][]."""
    blocks = generation.stream(
        model,
        [writer.ids for writer in writers],
        eos_ids=tokenizer.eos_ids if eos_ids is None else eos_ids,
        stopped=lambda: [writer.completion.reason == "stop" for writer in writers],
        key=jr.key(checked_seed(seed)),
        **options,
    )
    return ([writer.add(row) for writer, row in zip(writers, made)] for made in blocks)
