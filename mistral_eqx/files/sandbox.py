"""Jinja templates from strangers, rendered as transformers renders a chat template.

A template is a program. It runs in Jinja's sandbox, where it can neither change nor reach
anything, and what it may do is bounded: its own length, the sizes of numbers, and the work
of one rendering. Needs jinja2 (extra `chat`), so nothing imports this module at once.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import ext, nodes, pass_context, sandbox, utils, visitor
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from .. import arguments


# In characters. The longest templates of released models have some 20,000.
_LONGEST = 200_000
# The characters that a template may handle in one rendering. A round of a loop and a call
# count as several.
_MOST_WORK = 200_000_000
_STEP = 400
_LARGEST_NUMBER = 1_000_000
# Such a field of a format would be filled up with blanks.
_WIDE_FIELD = re.compile(r"\d{7}|\*")
# Filters whose numbers say how much they write.
_FILLING = ("batch", "center", "indent", "round", "slice", "tojson")


def render(source: str, values: Mapping[str, Any], *, prompt: bool) -> str:
    """The text that a chat template makes of `values`.

    **Arguments:**

    - `source`: the template.
    - `values`: the variables: `messages`, `tools` and others.
    - `prompt`: whether the text shall end where the answer begins.

    **Raises:**

    `ValueError` that says what is wrong with the template, or its own refusal.
    """
    if len(source) > _LONGEST:
        raise ValueError(f"It has {len(source)} characters; at most {_LONGEST} are tried.")
    values = {**values, "documents": None, "add_generation_prompt": prompt}
    try:
        # Its own for each rendering, because it counts the work.
        environment = _Environment()
        tree = _Bounded().visit(environment.parse(source))
        template = environment.from_string(tree.set_environment(environment))
        return arguments.text("Its text", template.render(values))
    except Exception as error:  # a template can raise whatever Python can
        raise ValueError(_told(error)) from error


def _told(error: Exception) -> str:
    message = str(error)[:500]
    if isinstance(error, TemplateSyntaxError):
        return f"Its line {error.lineno} is not Jinja's language: {message}"
    if isinstance(error, SecurityError):
        return f"It is not let out of its sandbox: {message}"
    if type(error) is TemplateError:  # by `raise_exception`
        return message
    return f"{type(error).__name__}: {message}"


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what transformers adds to it, and a count of the work."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
            # Nothing is computed before it can be counted.
            optimized=False,
            finalize=pass_context(lambda context, value: self._measured(value)),
        )
        self._left = _MOST_WORK
        self.filters["tojson"] = _to_json
        self.filters = {n: self._guarded(n, f) for n, f in self.filters.items()}
        # A template cannot name these two, because of the blanks.
        self.filters["counted rounds"] = self._rounds
        self.filters["joined texts"] = self._joined
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise SecurityError("it does not end, or writes far too much")

    def _measured(self, value: Any) -> Any:
        """`value`, once its size is counted, that of what it holds with it."""
        self._spend(_STEP // 4)
        if isinstance(value, str):
            self._spend(len(value))
        elif isinstance(value, list | tuple):
            for item in value:
                self._measured(item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._measured(key)
                self._measured(item)
        return value

    def _rounds(self, items: Any) -> Iterator[Any]:
        for item in items:
            self._spend(_STEP)
            yield item

    def _joined(self, values: list[Any]) -> str:
        return "".join(str(self._measured(value)) for value in values)

    def _guarded(self, name: str, function: Callable) -> Callable:
        """A filter whose numbers are bounded and whose result is counted."""

        @functools.wraps(function)
        def guarded(*values, **named):
            if name in _FILLING:
                _check_numbers([*values, *named.values()])
            if name == "format":
                _check_format(values[0])
            if name == "tojson":
                self._measured(values[0])
            return self._counted(function(*values, **named))

        return guarded

    def _counted(self, result: Any) -> Any:
        self._spend(_STEP + (len(result) if isinstance(result, str | list) else 0))
        return result

    def call(__self, __context, __obj, *values, **named):
        # Methods of texts and numbers: "".center, 5 .to_bytes.
        if isinstance(getattr(__obj, "__self__", None), str | int | bytes):
            _check_numbers([*values, *named.values()])
        return __self._counted(super().call(__context, __obj, *values, **named))

    def wrap_str_format(self, value):
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context, operator, left, right):
        sizes = [len(v) for v in (left, right) if isinstance(v, str | list | tuple)]
        whole = [v for v in (left, right) if isinstance(v, int)]
        if operator == "*" and sizes and whole:
            self._spend(sizes[0] * max(whole[0], 0))
        elif operator in ("*", "**") and len(whole) == 2:
            times = abs(right) if operator == "**" else 1
            if left.bit_length() * times + right.bit_length() > 10_000:
                raise SecurityError("a number with thousands of digits")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            self._measured(right)
        self._spend(sum(sizes))
        return super().call_binop(context, operator, left, right)


class _Bounded(visitor.NodeTransformer):
    """Has the rounds of a template's loops counted, and the texts that `~` joins."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "counted rounds")
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        texts = nodes.List(node.nodes, lineno=node.lineno)
        return self._filtered(texts, "joined texts")

    def _filtered(self, node, name):
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(ext.Extension):
    """`{% generation %}`, which marks for a trainer what the model is to learn."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_inside")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _inside(self, caller):
        return caller()


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *values, **named):
        return dict(*values, **named)

    def fromkeys(self, *values):
        return dict.fromkeys(*values)


class _Namespace(utils.Namespace):
    """Jinja's own, without the names that Python keeps for itself."""

    def __init__(*values, **named):  # `self` may be the name of a variable
        self, attributes = values[0], dict(*values[1:], **named)
        for name in attributes:
            _check_name(name)
        utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with {name!r}")


def _check_numbers(values: list[Any]) -> None:
    if any(isinstance(v, int) and abs(v) > _LARGEST_NUMBER for v in values):
        raise SecurityError(f"a call with a number over {_LARGEST_NUMBER}")


def _check_format(text: Any) -> None:
    if _WIDE_FIELD.search(str(text)):
        raise SecurityError("a format with a very wide field")


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
