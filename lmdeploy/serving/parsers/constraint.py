"""Grammars that guarantee tool calls: whatever begins like a call in the family's notation is one, and fits the tool's schema.

`required` binds the answer from its first token, `auto` only from an opening tag on.
"""

from __future__ import annotations

import json
from typing import Any

from lmdeploy.grammar import MAX_GRAMMAR_BYTES, Grammar
from lmdeploy.serving.parsers.tool_schema import arguments_schema
from lmdeploy.serving.parsers.tools import CallForm, ToolFormat

#: any object: what is left of a schema that no grammar can say
ANY_OBJECT: dict[str, Any] = {"type": "object"}
#: that a grammar may have
MAX_TAGS = 256


def tool_grammar(tools: ToolFormat, schemas: dict[str, dict[str, Any]], *, code: bool = False, required: bool = False, parallel: bool = True) -> Grammar:
    """`schemas`: the tools that may be called, by name, and the schema of their arguments; `code`: a code interpreter too.

    InternLM2 and its like make one call an answer, whatever `parallel` says.
    """
    several = parallel and not tools.one_call
    forms = _required_forms(tools, schemas, code) if required else list(tools.forms)
    text = _text(tools, forms, schemas, code=code, several=several, required=required)
    if not required and (len(text["tags"]) > MAX_TAGS or len(_json(text).encode()) > MAX_GRAMMAR_BYTES):  # each form repeats every schema
        text = _text(tools, _required_forms(tools, schemas, code), schemas, code=code, several=several, required=False)
    return Grammar("structural_tag", _json(text))


def _text(tools: ToolFormat, forms: list[CallForm], schemas: dict[str, dict[str, Any]], *, code: bool, several: bool, required: bool) -> dict[str, Any]:
    return {
        "mode": "required" if required else "auto",
        "parallel": several and not (required and tools.in_list),
        "triggers": [] if required else _triggers(forms, schemas, code=code),
        "tags": [tag for form in forms for tag in _tags(tools, form, schemas, code=code, several=several)],
    }


def schema_of(function: dict[str, Any]) -> dict[str, Any]:
    """The schema that a tool's arguments must fit."""
    return arguments_schema(function.get("parameters"))


def _required_forms(tools: ToolFormat, schemas: dict[str, dict[str, Any]], code: bool) -> list[CallForm]:
    """The family's first form, and code where there is an interpreter."""
    forms = list(tools.forms[:1]) if schemas else []
    return forms + [form for form in tools.forms if form.kind == "code" and code]


def _triggers(forms: list[CallForm], schemas: dict[str, dict[str, Any]], *, code: bool) -> list[str]:
    """What tells that a call has begun. Bare JSON does with a tool's own name only: other objects are nobody's business."""
    out = [form.open for form in forms if form.open and (code if form.kind == "code" else bool(schemas))]
    if any(not form.open for form in forms):
        out += [f'{{"name":{space}{_json(name)}' for name in schemas for space in (" ", "")]
    return out


def _tags(tools: ToolFormat, form: CallForm, schemas: dict[str, dict[str, Any]], *, code: bool, several: bool) -> list[dict[str, Any]]:
    opening = form.open + form.gap
    close = "" if tools.one_call else form.gap + form.close
    if form.kind == "code":
        return [{"begin": opening, "schema": None, "end": close}] if code else []
    if form.kind == "named":
        return [{"begin": f"{form.open}{name}>", "schema": schema, "end": form.close} for name, schema in schemas.items()]
    if tools.in_list:
        schema = _list_schema(tools, schemas, several=several)
        return [{"begin": begin, "schema": schema, "end": ""} for begin in (opening, form.open)]
    tags = []
    for name, schema in schemas.items():
        quoted = _json(name)
        tags.append({"begin": f'{opening}{{"name": {quoted}, "{tools.key}": ', "schema": schema, "end": "}" + close})
        if not form.open:
            tags.append({"begin": f'{{"name":{quoted},"{tools.key}":', "schema": schema, "end": "}" + close})
    return tags


def _list_schema(tools: ToolFormat, schemas: dict[str, dict[str, Any]], *, several: bool) -> dict[str, Any]:
    """A list of calls."""
    calls = []
    for place, (name, schema) in enumerate(schemas.items()):
        where = f"#/items/properties/{tools.key}" if len(schemas) == 1 else f"#/items/anyOf/{place}/properties/{tools.key}"
        properties = {"name": {"const": name}, tools.key: _moved(schema, where)}
        calls.append({"type": "object", "properties": properties, "required": ["name", tools.key], "additionalProperties": False})
    out: dict[str, Any] = {"type": "array", "items": calls[0] if len(calls) == 1 else {"anyOf": calls}, "minItems": 1}
    return out if several else {**out, "maxItems": 1}


def _moved(schema: Any, where: str) -> Any:
    """The schema with its references into itself, now that its root is at `where`."""
    if isinstance(schema, list):
        return [_moved(part, where) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: where + v[1:] if k == "$ref" and isinstance(v, str) and v.startswith("#") else _moved(v, where) for k, v in schema.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
