"""Conversations in the chat template that a model's folder brings, as ChatML's or Zephyr's:
rendered and encoded as transformers does."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import arguments
from .arguments import printable
from .files.vocabulary import any_of, encode_behind
from .tokenizer import Tokenizer


# What a message's reasoning is called; the first is the name that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def encode_by_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning_effort: str | None = None,
    answered: bool = False,
) -> list[int]:
    """The ids of a conversation in the tokenizer's own chat template, ready for the answer,
    or if it is `answered` with the answer and its end.

    A name of a control token in a message gets a mark behind its first character before
    the template sees it. So it stays text, whatever the template does with the message.

    **Raises:**

    `ImportError` without jinja2. `TypeError` for messages that hold other things than
    JSON has, `ValueError` if the template is missing, wrong, or refuses the messages.
    """
    try:
        from .files.sandbox import render
    except ImportError as error:
        raise ImportError(
            f"The chat template of {tokenizer.path} needs jinja2: "
            "pip install 'mistral_eqx[chat]'."
        ) from error
    source = tokenizer.chat_template
    if tools and tokenizer.tool_template is not None:
        source = tokenizer.tool_template
    if source is None:
        why = (
            "its metadata have none. Put the tokenizer.model or tekken.json beside it."
            if tokenizer.path.suffix == ".gguf"
            else "its folder has no chat_template.jinja, nor a chat_template in a "
            "tokenizer_config.json."
        )
        raise ValueError(printable(f"{tokenizer.path} has no chat template: {why}"))
    given = {"messages": list(messages), "tools": list(tools) or None}
    if reasoning_effort is not None:
        given["reasoning_effort"] = reasoning_effort
    try:
        given = _plain(given)
        mark, end = _unused_characters(repr((given, source)))
    except RecursionError as error:
        raise ValueError("The messages are nested too deeply.") from error
    # Tokens that are blanks are ordinary text to a template.
    names = [name for name in tokenizer.token_names if not name.isspace()]
    found = re.compile(any_of(names))
    roles = [message["role"] for message in given["messages"]]
    given = _marked(given, lambda text: found.sub(lambda m: _with_mark(m[0], mark), text))
    given["messages"] = [
        _with_aliases(message | {"role": role})
        for message, role in zip(given["messages"], roles)
    ]
    last = given["messages"][-1]
    is_begun = last["role"] == "assistant" and not answered
    if is_begun:
        last.pop("prefix", None)
        begun = _add_to_content(last, f"{end} ")
    try:
        prompt = not (is_begun or answered)
        text = render(source, {**tokenizer.special_names, **given}, prompt=prompt)
        # As a filter of JSON may write it.
        text = text.replace(json.dumps(mark)[1:-1], mark)
        if is_begun:
            text = _cut_at(text, begun, end)
        if not text:
            raise ValueError("It writes nothing for these messages.")
    except ValueError as error:
        raise ValueError(
            printable(f"The chat template in {tokenizer.template_path} fails: {error}")
        ) from error
    return _encoded(tokenizer, text, names, mark)


# --- messages -----------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A copy that has nothing but what JSON has: methods of other objects would be open to
    the template."""
    if isinstance(value, str):
        return str.__str__(arguments.text("A text of the messages", value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(
        "Messages and tools may hold texts, numbers, lists and dicts, got "
        f"{arguments.shown(value)}."
    )


def _unused_characters(text: str) -> list[str]:
    """Two characters of those for private use, of which the `repr` of all that is rendered
    has none."""
    unused = (chr(i) for i in range(0xE000, 0xF8FF) if rf"\u{i:04x}" not in text)
    try:
        return [next(unused), next(unused)]
    except StopIteration:
        raise ValueError(
            "The messages have every character for private use: leave some out."
        ) from None


def _with_mark(name: str, mark: str) -> str:
    return name[:1] + mark + name[1:]


def _marked(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with all its texts changed, but not the keys that a template may name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_marked(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key if str(key).isidentifier() else _marked(key, change): _marked(item, change)
        for key, item in value.items()
    }


def _with_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is `None`, and with its reasoning under the names that
    templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _add_to_content(message: dict[str, Any], end: str) -> str:
    """Adds to the content of a message, or to its last chunk with a text. Returns what
    stood there."""
    content = message.get("content")
    place, key = message, "content"
    if isinstance(content, list):
        chunks = [chunk for chunk in content if isinstance(chunk, dict)]
        place, key = next((c for c in reversed(chunks) if "text" in c), {}), "text"
    begun = place.get(key)
    if not isinstance(begun, str):
        raise ValueError("The answer that is to be continued has no text.")
    place[key] = begun + end
    return begun


def _cut_at(text: str, begun: str, end: str) -> str:
    """The text up to `end`, without the blanks there if the template has cut them off."""
    before, found, behind = text.rpartition(end)
    if not found or begun.strip() not in text:
        raise ValueError("It leaves out the answer that is to be continued.")
    return before if behind.startswith(" ") else before.rstrip()


# --- ids ----------------------------------------------------------------------------------


def _encoded(tokenizer: Tokenizer, text: str, names: Sequence[str], mark: str) -> list[int]:
    """The ids of a rendered text. The marked names in it become text again."""
    if mark not in text:
        return tokenizer.encode_template(text)
    marked = any_of(_with_mark(name, mark) for name in names)
    # Text and marked names in turns. A mark whose name the template has changed still
    # parts the text, so that its sides do not make a name together.
    pieces = re.split(f"({marked}|{mark})", text)
    ids = tokenizer.encode_template(pieces[0])
    for i, piece in enumerate(pieces[1:], start=1):
        encode = tokenizer.encode_plain if i % 2 else tokenizer.encode_template
        if name := piece.replace(mark, ""):
            more = encode_behind(encode, name)
            if i % 2 and tokenizer.token_names[name] in more:
                raise ValueError(
                    printable(
                        f"The messages have {name!r}, which {tokenizer.path} cannot encode "
                        "as text: leave it out."
                    )
                )
            ids += more
    return ids
