"""What a request's tools come to: which are shown to the model, which may be called, and the grammar that makes calls valid.

A schema that no grammar can say is an error where a valid call was promised (`required`, a named tool, `strict`); otherwise that tool's
arguments are any JSON object, and the log says so once.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lmdeploy.errors import RequestError
from lmdeploy.grammar import Grammar
from lmdeploy.log import get_logger
from lmdeploy.serving.parsers.constraint import ANY_OBJECT, schema_of, tool_grammar
from lmdeploy.serving.parsers.tools import INTERPRETER, ToolFormat

logger = get_logger(__name__)

MAX_NAME = 256
#: seconds that a check may take if its culprit is to be looked for
PATIENCE = 1.0
#: a name stands between quotes, or between `<function=` and `>`
_NAME = re.compile(r'[^\s<>"\\\x00-\x1f]+')

#: the type of a tool that asks for a code interpreter, as OpenAI names it
CODE_INTERPRETER = "code_interpreter"
CODE_FUNCTION: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": INTERPRETER,
        "description": "Run Python code in a notebook that keeps its state, and get what it prints.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string", "description": "Python code"}}, "required": ["code"]},
    },
}
#: what InternLM2 is told instead: it writes code in its own kind of call
CODE_PROMPT = (
    "You can run Python code in a notebook that keeps its state. To do so, write the code like this:\n"
    f"<|action_start|><|{INTERPRETER}|>\n```python\nCODE\n```<|action_end|>\n"
    "What it prints comes back to you."
)


@dataclass(frozen=True, slots=True)
class ToolOffer:
    """The tools of one request. `shown` goes to the template; `functions` and `code` may be called; `required`: a call must come."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    functions: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: bool = False  # a code interpreter in the model's own notation
    required: bool = False

    @property
    def names(self) -> frozenset[str]:
        """What may be called."""
        return frozenset(self.functions) | ({INTERPRETER} if self.code else frozenset())


def offer_of(tools: list[dict[str, Any]] | None, choice: str, notation: ToolFormat | None) -> ToolOffer:
    """Checks the tools and applies `tool_choice`. Raises RequestError."""
    named = choice.removeprefix("function:") if choice.startswith("function:") else None
    if not tools:
        if choice not in ("none", "auto"):
            raise RequestError(f"tool_choice={choice[:80]!r} needs tools; send some", param="tool_choice")
        return ToolOffer()
    offer = _all(tools, notation)
    if choice == "none":
        return ToolOffer()
    if notation is None and choice != "auto":
        problem = "calls of this model are not read: it has no place for tools in its template, or the server runs with --tool-call-parser none"
        raise RequestError(f"tool_choice={choice[:80]!r} cannot be obeyed; {problem}", param="tool_choice", code="unsupported")
    if named is None:
        return replace(offer, required=choice == "required")
    if named not in offer.names:
        raise RequestError(f"tool_choice names {named[:80]!r}, which is not among tools", param="tool_choice")
    if named not in offer.functions:
        return ToolOffer(code=True, required=True)
    shown = [tool for tool in offer.shown if tool["function"]["name"] == named]
    return ToolOffer(shown, {named: offer.functions[named]}, required=True)


def _all(tools: list[dict[str, Any]], notation: ToolFormat | None) -> ToolOffer:
    writes_code = notation is not None and any(form.kind == "code" for form in notation.forms)
    shown: list[dict[str, Any]] = []
    code = False
    for place, tool in enumerate(tools):
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind == CODE_INTERPRETER:
            code = code or writes_code
            tool = CODE_FUNCTION
        elif kind != "function":
            raise RequestError(f"tools.{place}.type={kind!r:.80} is not 'function' or '{CODE_INTERPRETER}'", param=f"tools.{place}.type")
        function = _function(tool, f"tools.{place}.function")
        if any(other["function"]["name"] == function["name"] for other in shown) or (code and tool is not CODE_FUNCTION and function["name"] == INTERPRETER):
            raise RequestError(f"tools.{place}: the name {function['name'][:80]!r} is given twice", param=f"tools.{place}.function.name")
        if tool is not CODE_FUNCTION or not writes_code:
            shown.append(tool if "function" in tool else {"type": "function", "function": function})
    return ToolOffer(shown, {tool["function"]["name"]: tool["function"] for tool in shown}, code)


def _function(tool: dict[str, Any], where: str) -> dict[str, Any]:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise RequestError(f"{where}.name={name!r:.80} must be a text of 1 to {MAX_NAME} characters without spaces, quotes and <>", param=f"{where}.name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(f"{where}.parameters must be a JSON schema (an object)", param=f"{where}.parameters")
    assert isinstance(function, dict)
    return function


def with_code_prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a system message that tells of the interpreter."""
    first = int(messages[0].get("role") in ("system", "developer"))
    return [*messages[:first], {"role": "system", "name": INTERPRETER, "content": CODE_PROMPT}, *messages[first:]]


class Guarantee:
    """Makes the grammar of an offer. `check` raises RequestError(code='invalid_grammar') for a grammar that cannot be compiled."""

    def __init__(self, check: Callable[[Grammar], Awaitable[None]], notation: ToolFormat) -> None:
        self._check, self._notation = check, notation
        self._told: set[str] = set()  # schemas that the log has told of

    async def grammar(self, offer: ToolOffer, *, parallel: bool) -> Grammar | None:
        """Raises RequestError naming the tool whose schema cannot be promised."""
        schemas = {name: schema_of(function) for name, function in offer.functions.items()}
        grammar = tool_grammar(self._notation, schemas, code=offer.code, required=offer.required, parallel=parallel)
        begun = time.monotonic()
        problem = await self._problem(grammar)
        if problem is None:
            return grammar
        culprits: list[str] = []
        if time.monotonic() - begun < PATIENCE:  # else asking for each of them would keep other requests' grammars waiting
            culprits = [name for name in schemas if await self._problem(tool_grammar(self._notation, {name: schemas[name]}, required=True)) is not None]
        for name in culprits or list(schemas):
            self._give_up(name, offer, problem)
            schemas[name] = ANY_OBJECT
        grammar = tool_grammar(self._notation, schemas, code=offer.code, required=offer.required, parallel=parallel)
        problem = await self._problem(grammar)
        if problem is not None and offer.required:
            raise RequestError(f"tools: a call cannot be guaranteed, as tool_choice asks: {problem}", param="tools", code="invalid_grammar")
        return grammar if problem is None else None

    async def _problem(self, grammar: Grammar) -> str | None:
        try:
            await self._check(grammar)
        except RequestError as e:
            if e.code != "invalid_grammar":
                raise
            return str(e)
        return None

    def _give_up(self, name: str, offer: ToolOffer, problem: str) -> None:
        function = offer.functions[name]
        if offer.required or function.get("strict"):
            why = "strict" if function.get("strict") else "a tool_choice that promises a call"
            raise RequestError(f"tools: the parameters of {name[:80]!r} cannot be guaranteed, as {why} asks: {problem}", param="tools", code="invalid_grammar")
        key = json.dumps(function.get("parameters"), sort_keys=True)
        if key not in self._told and len(self._told) < 1000:
            self._told.add(key)
            logger.warning("the schema of a tool cannot be guaranteed, so its arguments may be any JSON object: %s", problem)
