"""Renders a checkpoint's Jinja chat template with bounded work: a template is data of a stranger, not code that we trust.

On top of jinja2's immutable sandbox every loop round, call, concatenation and repetition is charged to a budget of steps,
characters and seconds kept per rendering. So a loop or text bomb ends with one clear error instead of a hang. The dialect
(trimmed blocks, `raise_exception`, `strftime_now`, plain `tojson`, `generation` tag) is that of transformers.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 256 << 10
MAX_OUTPUT = 64 << 20
MAX_STEPS = 3_000_000
MAX_SECONDS = 10.0
MAX_INT_BITS = 256
MAX_NODES = 1_000_000
#: linear in their input, which is bounded; anything else that makes text from numbers (center, ljust, zfill, ...) is refused
STRING_METHODS = frozenset(
    [
        *("capitalize", "casefold", "count", "endswith", "find", "format", "index", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix"),
        *("replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper"),
    ]
)
REFUSED_FILTERS = ("batch", "center", "filesizeformat", "format", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")


class TemplateLimitError(Exception):
    """The template needs more work, text or time than a chat template may."""


class TemplateRefusal(Exception):
    """The template itself called raise_exception: its message is for the user."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self, max_output: int) -> None:
        self.steps, self.characters, self.max_output = MAX_STEPS, 4 * max_output, max_output
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise TemplateLimitError(f"more than {MAX_STEPS} loop rounds and calls")
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"more than {MAX_SECONDS:g} seconds")

    def text(self, length: int) -> None:
        """Charge a text of this length before it is made."""
        self.step()
        self.characters -= length
        if length > self.max_output or self.characters < 0:
            raise TemplateLimitError(f"more than {self.max_output} characters")

    def joined(self, length: int) -> None:
        """Charge a list that is made from two; templates that filter messages do this once a message."""
        self.step(1 + length // 64)
        if length > MAX_NODES:
            raise TemplateLimitError(f"a list of more than {MAX_NODES} parts")

    def sized(self, value: Any, times: int = 1) -> None:
        """Charge everything below a value. Shared parts count each time: printing and comparing walk them each time."""
        if isinstance(value, str):
            self.text(len(value) * times)
            return
        stack, count = [value], 0
        while stack:
            item = stack.pop()
            count += 1
            if isinstance(item, dict):
                stack += item.values()
            elif isinstance(item, (list, tuple)):
                stack += item
            elif isinstance(item, str):
                self.characters -= len(item) * times
            if count * times > MAX_NODES or self.characters < 0:
                raise TemplateLimitError(f"a value of more than {MAX_NODES} parts or {self.max_output} characters")
        self.step(count * times)


class _GenerationTag(Extension):
    """`{% generation %}`...`{% endgeneration %}` marks text for training; for us it is its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget. One environment serves one template; renderings in several threads do not meet."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "//"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_printable, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self._local = threading.local()
        for name in REFUSED_FILTERS:
            self.filters.pop(name, None)
        self.filters.update(tojson=_tojson, string=self._string, join=self._join, replace=self._replace, indent=self._indent)
        self.filters.update(lm_rounds=self._rounds, lm_joined=self._joined, lm_text=self._text, lm_sized=_sized)
        self.globals.pop("lipsum", None)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    @property
    def budget(self) -> Budget:
        budget: Budget = self._local.budget
        return budget

    def render_bounded(self, template: jinja2.Template, variables: dict[str, Any], max_output: int = MAX_OUTPUT) -> str:
        """The text, or TemplateLimitError."""
        self._local.budget = Budget(max_output)
        chunks: list[str] = []
        length = 0
        try:
            for chunk in template.generate(variables):
                length += len(chunk)
                if length > max_output:
                    raise TemplateLimitError(f"more than {max_output} characters")
                chunks.append(chunk)
        except RecursionError:
            raise TemplateLimitError("too deep recursion") from None
        except MemoryError:
            raise TemplateLimitError("more memory than there is") from None
        return "".join(chunks)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("recursive loops are not available in chat templates", loop.lineno, name, filename)
            loop.iter = _filtered(loop.iter, "lm_rounds", self)
        _rewrite(tree, self)
        return tree

    # every call and operator of the template passes here
    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Positional-only, so that a macro may have arguments of any name."""
        self.budget.step(10)
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            self._check_string_method(owner, getattr(method, "__name__", ""), args)
        elif isinstance(obj, LoopContext):
            raise TemplateLimitError("recursive loops are not available")
        elif not isinstance(obj, Macro):
            for value in args:
                self.budget.step(len(value) // 64 if hasattr(value, "__len__") else 0)
        return super().call(context, obj, *args, **kwargs)

    def _check_string_method(self, owner: str, name: str, args: tuple[Any, ...]) -> None:
        if name not in STRING_METHODS:
            raise TemplateLimitError(f"str.{name} is not available in chat templates")
        self.budget.text(len(owner))
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self.budget.text(len(owner) + owner.count(args[0]) * len(args[1]))
        elif name == "join" and args:
            self.budget.text(_joined_length(owner, args[0]))
        elif name == "format" and re.search(r"\{[^}]*(\{|\d{4})", owner):
            raise TemplateLimitError("str.format with a computed or huge width")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 0)
            if bits > MAX_INT_BITS:
                raise TemplateLimitError(f"a number of more than {MAX_INT_BITS} bits")
        elif operator == "*":
            sequence, count = (left, right) if hasattr(left, "__len__") else (right, left)
            if hasattr(sequence, "__len__") and isinstance(count, int):
                self.budget.sized(sequence, max(count, 0))
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.text(len(left) + len(right))
        elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            self.budget.joined(len(left) + len(right))
        elif operator == "%" and isinstance(left, str) and re.search(r"%[^%a-zA-Z]*(\*|\d{4})", left):
            raise TemplateLimitError("text formatting with a computed or huge width")
        return super().call_binop(context, operator, left, right)

    # filters that the parser puts in, and bounded versions of jinja2's

    @staticmethod
    @jinja2.pass_environment
    def _rounds(environment: Any, values: Any) -> Any:
        """Charge a loop's rounds: at once where the length is known, else one by one."""
        if hasattr(values, "__len__"):
            environment.budget.step(len(values))
            return values
        return _counted(environment.budget, values)

    @staticmethod
    @jinja2.pass_context
    def _joined(context: Any, values: list[Any]) -> str:
        """The `~` operator."""
        texts = [str(_sized(context, value)) for value in values]
        context.environment.budget.text(sum(map(len, texts)))
        return "".join(texts)

    @staticmethod
    @jinja2.pass_context
    def _string(context: Any, value: Any) -> str:
        """As jinja2's `string`."""
        return str(_sized(context, value))

    @staticmethod
    @jinja2.pass_context
    def _text(context: Any, text: str) -> str:
        """Long constant text: charged each time it is printed (macros print it into memory)."""
        context.environment.budget.text(len(text))
        return text

    @staticmethod
    @jinja2.pass_context
    def _join(context: Any, values: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        """As jinja2's `join`."""
        items = [context.environment.getitem(v, attribute) if attribute is not None else v for v in values]
        texts = [str(_sized(context, item)) for item in items]
        context.environment.budget.text(_joined_length(d, texts))
        return str(d).join(texts)

    @staticmethod
    @jinja2.pass_context
    def _replace(context: Any, s: str, old: str, new: str, count: int = -1) -> str:
        """As jinja2's `replace`."""
        s, old, new = str(_sized(context, s)), str(old), str(new)
        context.environment.budget.text(len(s) + s.count(old) * len(new))
        return s.replace(old, new, -1 if count is None else count)

    @staticmethod
    @jinja2.pass_context
    def _indent(context: Any, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """As jinja2's `indent`."""
        pad = width if isinstance(width, str) else " " * min(width, 1000)
        context.environment.budget.text(len(s) + (s.count("\n") + 1) * len(pad))
        lines = s.split("\n")
        padded = [(pad + line if (line or blank) and (i or first) else line) for i, line in enumerate(lines)]
        return "\n".join(padded)


def _filtered(node: Any, name: str, environment: Any) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    made.set_environment(environment)
    return made


def _rewrite(node: nodes.Node, environment: Any) -> None:
    """Put charging filters around `~` and long constant text, everywhere below `node`."""
    for child in node.iter_child_nodes():
        _rewrite(child, environment)
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, name, [_charged(item, environment) for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _charged(value, environment))


def _charged(item: Any, environment: Any) -> Any:
    if isinstance(item, nodes.Concat):
        return _filtered(nodes.List(item.nodes, lineno=item.lineno), "lm_joined", environment)
    if isinstance(item, (nodes.List, nodes.Dict)) and list(item.iter_child_nodes()):
        return _filtered(item, "lm_sized", environment)
    if isinstance(item, nodes.Tuple) and item.ctx == "load":
        return _filtered(item, "lm_sized", environment)
    if isinstance(item, nodes.Operand):
        item.expr = _filtered(item.expr, "lm_sized", environment)
    if isinstance(item, nodes.TemplateData) and len(item.data) > 256:
        return _filtered(nodes.Const(item.data, lineno=item.lineno), "lm_text", environment)
    return item


def _counted(budget: Budget, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.step()
        yield value


def _joined_length(separator: Any, values: Any) -> int:
    if not isinstance(values, (list, tuple, str, dict)):
        return 0
    return sum(len(v) if isinstance(v, str) else 1 for v in values) + len(str(separator)) * len(values)


@jinja2.pass_context
def _sized(context: Any, value: Any) -> Any:
    """Charge a list or object before it is nested, compared or printed: a value can be exponentially larger than its memory."""
    if isinstance(value, (list, tuple, dict)) and value:
        context.environment.budget.sized(value)
    return value


@jinja2.pass_context
def _printable(context: Any, value: Any) -> Any:
    """What `{{ }}` prints."""
    return _sized(context, value)


@jinja2.pass_context
def _tojson(context: Any, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as transformers' templates expect it: no HTML escapes."""
    _sized(context, value)
    if isinstance(indent, int):
        indent = min(indent, 64)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message)[:1000])


def _strftime_now(format: str) -> str:
    if not isinstance(format, str) or len(format) > 64:
        raise TemplateLimitError("strftime_now with a format of more than 64 characters")
    return datetime.now().strftime(format)
