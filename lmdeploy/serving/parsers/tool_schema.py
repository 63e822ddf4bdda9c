"""JSON schemas of tools as users write them, made exact for a grammar. The prompt keeps the user's own text."""

from __future__ import annotations

from typing import Any

#: types that are none of JSON schema's, as they occur in the wild
_TYPES = {
    "int": "integer", "long": "integer", "float": "number", "double": "number", "decimal": "number", "str": "string", "text": "string",
    "list": "array", "tuple": "array", "dict": "object", "map": "object", "bool": "boolean", "none": "null", "None": "null",
}  # fmt: skip
#: keywords whose values are schemas: one, a list, or a dict of them
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_DICTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
#: keywords that only tell people something
_TOLD = frozenset(("title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly", "$schema", "$id"))
#: an object with one of these may have properties that its own `properties` do not name
_OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "allOf", "$ref", "if", "dependentSchemas")


def arguments_schema(parameters: Any) -> dict[str, Any]:
    """The schema that a call's arguments must fit: always an object; without `parameters` an empty one."""
    if not isinstance(parameters, dict) or not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema: dict[str, Any] = exact_schema(parameters)
    schema.setdefault("type", "object")
    return schema


def exact_schema(schema: Any, *, closed: bool = True) -> Any:
    """A copy with JSON schema's own type names, and with nothing that is for people only; objects get no properties but their own, unless they say otherwise.

    `closed` is false below anyOf and its like, where an object must not refuse what its siblings ask for.
    """
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _TOLD:
            continue
        if key == "type":
            out[key] = [_TYPES.get(v, v) if isinstance(v, str) else v for v in value] if isinstance(value, list) else _type(value)
        elif key in _ONE:
            out[key] = exact_schema(value, closed=closed and key == "items")
        elif key in _LISTS and isinstance(value, list):
            out[key] = [exact_schema(v, closed=closed and key in ("anyOf", "oneOf") and "properties" not in schema) for v in value]
        elif key in _DICTS and isinstance(value, dict):
            out[key] = {name: exact_schema(v, closed=closed and key in ("properties", "$defs", "definitions")) for name, v in value.items()}
        elif key == "required" and isinstance(value, bool):
            continue  # an old habit: it belongs to the object around, which has its own list
        else:
            out[key] = value
    if "properties" in out:
        out.setdefault("type", "object")
        if closed and not any(key in out for key in _OPEN):
            out["additionalProperties"] = False
    return out


def _type(value: Any) -> Any:
    return _TYPES.get(value, value) if isinstance(value, str) else value
