"""Grammars that guarantee tool calls: whatever begins like a call in the family's notation is one, and fits the tool's schema.

`required` binds the answer from its first token, `auto` only from an opening tag on.
"""

from __future__ import annotations

import json
from typing import Any

from lmdeploy.grammar import Grammar
from lmdeploy.serving.parsers.tool_schema import arguments_schema
from lmdeploy.serving.parsers.tools import INTERPRETER, CallForm, ToolFormat

#: any object: what is left of a schema that no grammar can say
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def tool_grammar(
    tools: ToolFormat, schemas: dict[str, dict[str, Any]], *, code: bool = False, required: bool = False, parallel: bool = True, after: str = ""
) -> Grammar:
    """`schemas`: the tools that may be called, by name, and the schema of their arguments; `code`: a code interpreter too.

    `after`: a required call comes behind this text (the end of the reasoning). InternLM2 and its like make one call an answer, whatever `parallel` says.
    """
    several = parallel and not tools.one_call
    forms = _required_forms(tools, schemas, code) if required else list(tools.forms)
    tags = [tag for form in forms for tag in _tags(tools, form, schemas, code=code, several=several)]
    triggers = [] if required else _triggers(forms, schemas, code=code)
    text = {"mode": "required" if required else "auto", "parallel": several and not (required and tools.in_list), "triggers": triggers, "tags": tags}
    return Grammar("structural_tag", json.dumps(text, ensure_ascii=False), after if required else "")


def schema_of(function: dict[str, Any]) -> dict[str, Any]:
    """The schema that a tool's arguments must fit."""
    return arguments_schema(function.get("parameters"))


def _required_forms(tools: ToolFormat, schemas: dict[str, dict[str, Any]], code: bool) -> list[CallForm]:
    """The family's first form, and code where there is an interpreter."""
    forms = list(tools.forms[:1]) if schemas else []
    return forms + [form for form in tools.forms if form.kind == "code" and code]


def _triggers(forms: list[CallForm], schemas: dict[str, dict[str, Any]], *, code: bool) -> list[str]:
    """What tells that a call has begun. Bare JSON does with a tool's own name only: other objects are nobody's business."""
    out = [form.open for form in forms if form.open and (form.kind != "code" or code) and (form.kind == "code" or schemas)]
    if any(not form.open for form in forms):
        out += [f'{{"name":{space}{json.dumps(name, ensure_ascii=False)}' for name in schemas for space in (" ", "")]
    return out


def _tags(tools: ToolFormat, form: CallForm, schemas: dict[str, dict[str, Any]], *, code: bool, several: bool) -> list[dict[str, Any]]:
    opening = form.open + form.gap
    close = "" if tools.one_call else form.gap + form.close
    if form.kind == "code":
        return [{"begin": opening, "schema": None, "end": close}] if code else []
    if form.kind == "named":
        return [{"begin": f"{form.open}{name}>", "schema": schema, "end": form.close} for name, schema in schemas.items()]
    if tools.in_list:
        return [{"begin": form.open, "schema": _list_schema(tools, schemas, several=several), "end": ""}]
    tags = []
    for name, schema in schemas.items():
        quoted = json.dumps(name, ensure_ascii=False)
        tags.append({"begin": f'{opening}{{"name": {quoted}, "{tools.key}": ', "schema": schema, "end": "}" + close})
        if not form.open:
            tags.append({"begin": f'{{"name":{quoted},"{tools.key}":', "schema": schema, "end": "}" + close})
    return tags


def _list_schema(tools: ToolFormat, schemas: dict[str, dict[str, Any]], *, several: bool) -> dict[str, Any]:
    """A list of calls. Names in the schemas' own $defs would collide, so definitions stay with their schema."""
    calls = [
        {"type": "object", "properties": {"name": {"const": name}, tools.key: schema}, "required": ["name", tools.key], "additionalProperties": False}
        for name, schema in schemas.items()
    ]
    out: dict[str, Any] = {"type": "array", "items": calls[0] if len(calls) == 1 else {"anyOf": calls}, "minItems": 1}
    return out if several else {**out, "maxItems": 1}


__all__ = ["ANY_OBJECT", "INTERPRETER", "schema_of", "tool_grammar"]
