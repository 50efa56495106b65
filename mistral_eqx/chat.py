"""Conversations, in the templates that instruct models were trained with.

For Mistral's own tokenizers the ids of a conversation are mistral-common's, which is
Mistral's own word on them (extra `chat`). Which template a tokenizer belongs to shows in
its control ids. A tokenizer without any is of version 1, whose `[INST]` is plain text.
Other tokenizers go by the template that the model's folder brings.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from . import arguments
from .decoding import prefill
from .files.vocabulary import is_tekken
from .prompts import next_power_of_two
from .sampling import Sampling, SamplingOptions
from .templates import encode_by_template
from .tokenizer import Tokenizer
from .transformer import Transformer
from .writer import Completion, Writer, checked_seed, checked_stop, write


# As mistral-common and OpenAI have them.
Message = Mapping[str, Any]

# The control id that a version of sentencepiece tokenizers has and those before it lack.
_MARKS = {"v7": "[SYSTEM_PROMPT]", "v3": "[PREFIX]", "v2": "[INST]"}


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str | None = None,
) -> list[int]:
    """The ids of a conversation, ready for the answer.

    What stands in a message is text: `</s>` or `[INST]` in it never become the control ids
    of these names.

    **Arguments:**

    - `tokenizer`: any of Mistral's, or of version 1's kind: then the template is Mistral's.
        If its folder brings a chat template that is not Mistral's, as those of Zephyr and
        OpenOrca do, or if it is another kind of tokenizer (a `tokenizer.json`), then the
        folder's template is used, in the way of transformers.
    - `messages`: `{"role": ..., "content": ...}` each; the roles are "system", "user",
        "assistant" and "tool". The content is a text, or a list of chunks such as
        `{"type": "text", "text": ...}`. The last message is of the user, of a tool, or of
        the assistant with `"prefix": True`, which begins the answer.
    - `tools`: the functions that the model may call.
    - `reasoning_effort`: for the templates that have it: "none" or "high", say.

    **Raises:**

    `ImportError` without mistral-common, or jinja2 for a folder's template. `TypeError` for
    what are no messages. `ValueError` for no messages, an unknown role, or anything else
    that the template does not have; for a template that is missing or wrong; with a
    version 1 tokenizer also for a message that contains `[INST]` or `[/INST]`, which it
    could not tell from its own.
    """
    messages = _checked_messages(messages)
    last = messages[-1]
    if last["role"] == "system" or (last["role"] == "assistant" and not last.get("prefix")):
        raise ValueError(
            f"The last message must be of the user, got {last['role']!r}. An answer that "
            'is to be continued has "prefix": True.'
        )
    return _encode(tokenizer, messages, tools, reasoning_effort, answered=False)


def encode_answered(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation that ends with an answer, up to the id that ends it: what
    a model learns from. Arguments and errors are those of [`encode_chat`][]."""
    messages = _checked_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("The last message must be an answer of the assistant's.")
    return _encode(tokenizer, messages, (), None, answered=True)


def _encode(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    reasoning_effort: str | None,
    *,
    answered: bool,
) -> list[int]:
    tools = _checked_tools(tools)
    if _goes_by_template(tokenizer):
        options = {"tools": tools, "reasoning_effort": reasoning_effort}
        return encode_by_template(tokenizer, messages, **options, answered=answered)
    templates = _templates(tokenizer.path, answered)
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from pydantic import ValidationError

    if templates.version.value == "v1":
        for i, message in enumerate(messages):
            content = " ".join(_texts_in(message.get("content")))
            if "[INST]" in content or "[/INST]" in content:
                raise ValueError(
                    f"Message {i} contains [INST] or [/INST]. To this tokenizer, of "
                    "version 1, these are the template's own marks: leave them out."
                )
    try:
        request = ChatCompletionRequest(
            messages=messages,
            tools=[dict(tool) for tool in tools] or None,
            reasoning_effort=reasoning_effort,
        )
        return templates.encode_chat_completion(request).tokens
    except (MistralCommonException, ValueError, TypeError, AssertionError) as error:
        told = error
        if isinstance(error, ValidationError):  # of each message's type, in many lines
            first = error.errors()[0]
            told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(f"These messages cannot be encoded: {told}") from error


def _goes_by_template(tokenizer: Tokenizer) -> bool:
    """Whether the template of the folder is used, and not Mistral's."""
    path, template = tokenizer.path, tokenizer.chat_template
    if path.suffix in (".json", ".gguf") and not is_tekken(path):
        return True
    # Derived models have Mistral's tokenizer.model and a template of their own.
    return template is not None and "[INST]" not in template


def _checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    checked = arguments.items("tools", tools, "functions")
    for i, tool in enumerate(checked):
        if not isinstance(tool, Mapping):
            raise TypeError(f"tools[{i}] must be a dict, got {arguments.shown(tool)}.")
    return checked


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    checked = []
    for i, message in enumerate(arguments.items("messages", messages, "messages")):
        if not isinstance(message, Mapping) or "role" not in message:
            raise TypeError(
                f'Message {i} must be {{"role": ..., "content": ...}}, got '
                f"{arguments.shown(message)}."
            )
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(
                f"Message {i} has the unknown role {message['role']!r}: it must be "
                '"system", "user", "assistant" or "tool".'
            )
        for text in _texts_in(message.get("content")):
            arguments.text(f"Message {i}", text)
        checked.append(dict(message))
    if not checked:
        raise ValueError("The conversation is empty: give a message of the user's.")
    return checked


def _texts_in(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        chunks = (chunk for chunk in content if isinstance(chunk, Mapping))
        texts = (value for chunk in chunks for value in chunk.values())
        yield from (text for text in texts if isinstance(text, str))


@functools.cache
def _templates(path: Path, answered: bool):
    try:
        from mistral_common.protocol.instruct import normalize, validator
        from mistral_common.tokens.tokenizers import instruct
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    except ImportError as error:
        raise ImportError(
            "Chat needs mistral-common: pip install 'mistral_eqx[chat]'."
        ) from error
    # mistral-common takes a conversation that ends with an answer for one to learn from.
    mode = (
        validator.ValidationMode.finetuning if answered else validator.ValidationMode.test
    )
    if path.suffix == ".json":
        return MistralTokenizer.from_file(path, mode=mode)
    # mistral-common goes by the file's name, but most are just called tokenizer.model.
    pieces = SentencePieceTokenizer(path, TokenizerVersion.v1)
    version = next((v for v, mark in _MARKS.items() if pieces.is_special(mark)), "v1")
    version = TokenizerVersion(version)
    template = getattr(instruct, f"InstructTokenizer{version.value.upper()}")
    return MistralTokenizer(
        template(SentencePieceTokenizer(path, version)),
        validator=validator.get_validator(version, mode),
        request_normalizer=normalize.get_normalizer(version, None),
    )


def chat(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    max_tokens: int = 256,
    stop: str | Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str | None = None,
    seed: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> Completion:
    """Answers a conversation.

    **Arguments:**

    - `messages`, `tools`, `reasoning_effort`: see [`encode_chat`][mistral_eqx.encode_chat].
    - The others are those of [`generate`][mistral_eqx.generate].

    **Returns:**

    The answer as a [`Completion`][]: `text` is what the assistant says, and what it thinks
    or the tools that it calls stand apart, in `reasoning` and `tool_calls`.

    **Raises:**

    As `encode_chat` and `generate` do.
    """
    template = {"tools": tools, "reasoning_effort": reasoning_effort}
    ids = encode_chat(tokenizer, messages, **template)
    writer = Writer(tokenizer, ids, stop=stop)
    options = {"max_tokens": max_tokens, "eos_ids": eos_ids, "seed": seed}
    options["sampling"] = Sampling(**sampling)
    answer = write(model, tokenizer, [writer], **options)
    for _ in answer:
        pass
    return writer.completion


class Chat:
    """A conversation that goes on. What was said is kept in a cache, and a new message
    costs itself and the last answer, not the history.

    **Attributes:** `messages`, all of them so far.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        with_reasoning: bool = False,
        seed: int = 0,
        **sampling: Unpack[SamplingOptions],
    ):
        """**Arguments:**

        - `system`: what the model is told before the conversation.
        - `with_reasoning`: see [`stream`][mistral_eqx.stream].
        - The others are those of [`chat`][mistral_eqx.chat].

        **Raises:**

        `ValueError` for an option outside its range.
        """
        self._model, self._tokenizer = model, tokenizer
        self._system = None if system is None else arguments.text("system", system)
        self._max_tokens = arguments.integer("max_tokens", max_tokens)
        self._stop, self._seed = checked_stop(stop), checked_seed(seed)
        self._with_reasoning = with_reasoning
        self._sampling = Sampling(**sampling)
        self._answer = (piece for piece in ())
        self.reset()

    def reset(self) -> None:
        """Forgets all that was said; the system prompt stays."""
        self._answer.close()
        self.messages: list[Message] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})
        self._ids, self._cache, self._capacity = [], None, 0

    def stream(self, message: str) -> Iterator[str]:
        """Yields the answer to a message as it is written. A message whose answer was
        broken off stays in the conversation with what there is of the answer; one without
        any answer does not. Raises as [`encode_chat`][mistral_eqx.encode_chat] does, at the
        call."""
        message = arguments.text("message", message)
        # An answer that is still going on ends here, and not behind this one.
        self._answer.close()
        messages = [*self.messages, {"role": "user", "content": message}]
        ids = encode_chat(self._tokenizer, messages)
        self._remember(ids, messages)
        writer = Writer(
            self._tokenizer, ids, stop=self._stop, with_reasoning=self._with_reasoning
        )
        pieces = write(
            self._model,
            self._tokenizer,
            [writer],
            max_tokens=self._max_tokens,
            prefix=self._cache,
            sampling=self._sampling,
            seed=self._seed,
        )
        self._answer = self._answered(messages, writer, pieces)
        return self._answer

    def _answered(
        self, messages: list[Message], writer: Writer, pieces: Iterator[list[str]]
    ) -> Iterator[str]:
        try:
            yield from (piece for (piece,) in pieces if piece)
        finally:
            answer = writer.completion.text
            if answer.strip():
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _remember(self, ids: list[int], messages: list[Message]) -> None:
        """Reads into the cache what will stand there in the next turn too: some templates
        move the system prompt to the last message."""
        later = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]
        later = encode_chat(self._tokenizer, [*messages, *later])
        differ = (i for i, pair in enumerate(zip(ids, later)) if pair[0] != pair[1])
        # A token must be left to continue from.
        same = min(next(differ, len(ids)), len(ids) - 1)
        needed = len(ids) + self._max_tokens
        held = self._ids == ids[: len(self._ids)] and needed <= self._capacity
        if not held:
            self._ids, self._cache = [], None
            self._capacity = 2 * next_power_of_two(needed)
        if same > len(self._ids):
            self._cache, _ = prefill(
                self._model,
                [ids[len(self._ids) : same]],
                cache=self._cache,
                max_tokens=self._capacity - same,
            )
            self._ids = ids[:same]
