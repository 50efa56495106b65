"""A file of examples to learn from: a text or a conversation in each line."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import arguments
from ..arguments import printable
from ..chat import encode_answered, encode_chat
from ..tokenizer import Tokenizer
from .batches import Example, Slices


_TEXTS, _CONVERSATIONS = ("text", "content"), ("messages", "interactions")
_CALLS = ("tools", "available_tools", "functions", "tool_calls", "function_call")


def read_examples(
    path: str | os.PathLike, tokenizer: Tokenizer, *, seq_len: int
) -> list[Example]:
    """Reads and checks all of a file.

    A line is `{"text": ...}`, of which every token is learnt, or `{"messages": [...]}`, of
    which the assistant's answers are. The names of mistral-finetune, `content` and
    `interactions`, mean the same. An answer with `"weight": 0` is not learnt, and of a
    conversation with `"only_last": true` only the last is. A long text becomes several
    examples.

    **Arguments:**

    - `path`: of the file.
    - `tokenizer`: of the model. Conversations are written in its template.
    - `seq_len`: the most tokens that an example has before its last.

    **Raises:**

    `ValueError` that names the file and the line, for what is no such object, a
    conversation without an answer or with function calls, or one that is too long.
    """
    return _of_lines(path, lambda line: _examples(line, tokenizer, seq_len))


def read_labelled(
    path: str | os.PathLike, tokenizer: Tokenizer, *, seq_len: int
) -> list[tuple[list[int], str]]:
    """Reads and checks all of a file whose lines are `{"text": ..., "label": ...}`.

    **Returns:**

    The ids of each text, and its label as a text.

    **Raises:**

    As [`read_examples`][] does.
    """
    return _of_lines(path, lambda line: [_labelled(line, tokenizer, seq_len)])


def _of_lines(
    path: str | os.PathLike, read: Callable[[dict[str, Any]], list[Any]]
) -> list[Any]:
    """What a function makes of every line. Its errors get the line's number."""
    examples = []
    for number, line in json_lines(path):
        try:
            examples += read(line)
        except (ValueError, TypeError) as error:
            raise ValueError(printable(f"{path}, line {number}: {error}")) from error
    return examples


def slices_of(
    name: str, texts: Sequence[str], tokenizer: Tokenizer, *, seq_len: int
) -> Slices:
    """Slices of texts one behind the other, each between a BOS and an EOS. Arguments and
    errors are those of [`Slices`][]."""
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    ids = np.concatenate([np.asarray(row, np.int32) for row in ids])
    return Slices(name, ids, seq_len=seq_len, bos_id=tokenizer.bos_id)


def has_labels(path: str | os.PathLike) -> bool:
    """Whether the first line of a file has a label."""
    return "label" in next(json_lines(path))[1]


def json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file and the numbers of their lines, from 1. Raises `ValueError`
    for a file without any, or a line that is none."""
    path, found = Path(arguments.path("path", path)), False
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                content = json.loads(line)
                if not isinstance(content, dict):
                    raise ValueError(
                        f"it must be an object, got {arguments.shown(content)}."
                    )
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    printable(f"{path}, line {number} is no JSON object: {error}")
                ) from error
            found = True
            yield number, content
    if not found:
        raise ValueError(f"{path} is empty: there is nothing to learn.")


def split(examples: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Examples to learn from, and a share of them, chosen at random but always the same, to
    measure the loss on. Raises `ValueError` if that leaves one of them empty."""
    check_share(share)
    n = round(share * len(examples))
    n = max(n, 1) if share > 0 else n
    if n == len(examples):
        raise ValueError(
            f"There is nothing to learn from when {n} of {len(examples)} examples are held "
            "out: give more examples, or hold out none."
        )
    held_out = set(np.random.default_rng(0).permutation(len(examples))[:n].tolist())
    parts = ([], [])
    for i, example in enumerate(examples):
        parts[i in held_out].append(example)
    return parts


def check_share(share: float) -> None:
    """Raises `ValueError` for what cannot be the share that is held out."""
    if not 0 <= share < 1:
        raise ValueError(f"The held-out share must be from 0 to below 1, got {share}.")


def _labelled(
    line: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[int], str]:
    label = line.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"its label must be a text, got {arguments.shown(label)}.")
    ids = tokenizer.encode(arguments.text("text", line.get("text")))
    if len(ids) > seq_len:
        raise ValueError(
            f"the text has {len(ids)} tokens, more than a sequence of {seq_len}. "
            "Make the sequence longer, or leave it out."
        )
    return ids, str(label)


def _examples(line: Mapping[str, Any], tokenizer: Tokenizer, seq_len: int) -> list[Example]:
    for name in _CALLS:
        if line.get(name):
            raise ValueError(f"{name}: function calls cannot be learnt yet. Leave it out.")
    if "label" in line:
        raise ValueError('it has a "label", and the first line has none: give all or none.')
    kinds = [name for name in (*_TEXTS, *_CONVERSATIONS) if line.get(name) is not None]
    if len(kinds) != 1:
        raise ValueError(
            'it must have either a "text" or "messages", and has '
            f"{', '.join(line) or 'nothing'}."
        )
    (kind,) = kinds
    if kind in _TEXTS:
        return _of_text(arguments.text(kind, line[kind]), tokenizer, seq_len)
    examples = list(_of_conversation(line, kind, tokenizer))
    longest = max(len(example.tokens) for example in examples)
    if longest > seq_len + 1:
        raise ValueError(
            f"the conversation has {longest} tokens, more than a sequence of {seq_len}. "
            "Make the sequence longer, or leave it out."
        )
    return examples


def _of_text(text: str, tokenizer: Tokenizer, seq_len: int) -> list[Example]:
    ids = [*tokenizer.encode(text, bos=False), tokenizer.eos_id]
    if len(ids) < 2:
        raise ValueError("the text is empty.")
    pieces = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
    return [Example([tokenizer.bos_id, *ids], [True] * (len(ids) + 1)) for ids in pieces]


def _of_conversation(
    line: Mapping[str, Any], kind: str, tokenizer: Tokenizer
) -> Iterator[Example]:
    """The whole conversation is one example if its template writes earlier turns as it
    wrote them when they were the last. Some templates do not: they move the system prompt,
    or drop what was thought. Then a turn is an example of its own, as the model will see it
    when it writes."""
    messages = [_message(i, m) for i, m in enumerate(_list(kind, line[kind]))]
    if (prompt := line.get("system_prompt")) is not None:
        messages.insert(0, {"role": "system", "content": prompt})
    weights = [message.pop("weight", None) for message in messages]
    answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not answers or answers[-1] != len(messages) - 1:
        raise ValueError("the conversation does not end with an answer of the assistant's.")
    answers = answers[-1:] if line.get("only_last") else answers
    for i in answers:
        if weights[i] not in (None, 0, 1):
            raise ValueError(f"message {i} has weight {weights[i]!r}: it must be 0 or 1.")
    if not (answers := [i for i in answers if weights[i] != 0]):
        raise ValueError("every answer has weight 0: there is nothing to learn.")
    tokens: list[int] = []
    learnt: list[bool] = []
    for i in reversed(answers):
        prompt = encode_chat(tokenizer, messages[:i])
        whole = encode_answered(tokenizer, messages[: i + 1])
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"the template of {tokenizer.template_path} does not write answer {i} "
                "behind its prompt: it cannot be learnt from."
            )
        # Behind the id that ends the answer a template may write a line break.
        ends = [j for j, token in enumerate(whole) if token in tokenizer.eos_ids]
        stop = ends[-1] + 1 if ends and ends[-1] >= len(prompt) else len(whole)
        if whole[:stop] != tokens[:stop]:
            if tokens:
                yield Example(tokens, learnt)
            tokens, learnt = whole[:stop], [False] * stop
        learnt[len(prompt) : stop] = [True] * (stop - len(prompt))
    yield Example(tokens, learnt)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{name} must be a list of messages, got {arguments.shown(value)}."
        )
    return value


def _message(i: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {i} must be an object, got {arguments.shown(message)}.")
    message = dict(message)
    if message.get("role") in ("tool", "function") or any(map(message.get, _CALLS)):
        raise ValueError(
            f"message {i} is of a function call, which cannot be learnt yet. Leave the "
            "conversation out."
        )
    if "text" in message:
        message.setdefault("content", message.pop("text"))
    return message
