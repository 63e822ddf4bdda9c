"""Schemas as users write them become JSON schema; what a grammar is made of follows from the family's notation."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from lmdeploy.grammar import MAX_GRAMMAR_BYTES
from lmdeploy.serving.parsers.constraint import schema_of, tool_grammar
from lmdeploy.serving.parsers.registry import TOOL_FORMATS
from lmdeploy.serving.parsers.tool_schema import arguments_schema, exact_schema

EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}


def test_types_of_other_languages_are_understood_and_the_users_schema_stays_as_it_is() -> None:
    mine = {
        "type": "dict",
        "properties": {"a": {"type": "int"}, "b": {"type": "list", "items": {"type": "str"}}, "c": {"type": ["float", "none"]}, "type": {"type": "bool"}},
    }
    before = json.dumps(mine)
    exact = arguments_schema(mine)
    assert json.dumps(mine) == before
    assert exact["type"] == "object"
    kinds = {name: part["type"] for name, part in exact["properties"].items()}
    assert kinds == {"a": "integer", "b": "array", "c": ["number", "null"], "type": "boolean"}
    assert exact["properties"]["b"]["items"] == {"type": "string"}
    jsonschema.Draft202012Validator.check_schema(exact)


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_tool_without_parameters_takes_no_arguments(parameters: Any) -> None:
    assert schema_of({"name": "f", "parameters": parameters}) == EMPTY == schema_of({"name": "f"})


def test_objects_are_closed_unless_they_say_otherwise() -> None:
    inner = {"properties": {"x": {"type": "integer"}}}
    assert exact_schema({"properties": {"o": inner, "l": {"items": inner}}})["properties"]["o"]["additionalProperties"] is False
    assert exact_schema({"properties": {"l": {"type": "array", "items": inner}}})["properties"]["l"]["items"]["additionalProperties"] is False
    for open_one in ({**inner, "additionalProperties": True}, {**inner, "anyOf": [{"required": ["y"]}]}, {"allOf": [inner, {"properties": {"y": {}}}]}):
        exact = exact_schema(open_one)
        jsonschema.validate({"x": 1, "y": 2}, exact)
        assert "additionalProperties" not in json.dumps(exact) or open_one.get("additionalProperties")


def test_a_required_flag_inside_a_property_is_no_list() -> None:
    assert exact_schema({"properties": {"a": {"type": "string", "required": True}}, "required": ["a"]})["properties"]["a"] == {"type": "string"}


def tags(name: str, **options: Any) -> dict[str, Any]:
    grammar = tool_grammar(TOOL_FORMATS[name], {"add": EMPTY, "mul": EMPTY}, **options)
    assert grammar.kind == "structural_tag"
    return json.loads(grammar.text)


@pytest.mark.parametrize(
    ("name", "triggers", "begin", "end"),
    [
        ("internlm", ["<|action_start|><|plugin|>"], '<|action_start|><|plugin|>\n{"name": "add", "parameters": ', "}"),
        ("hermes", ["<tool_call>"], '<tool_call>\n{"name": "add", "arguments": ', "}\n</tool_call>"),
        ("llama3_1", ["<function=", "<|python_tag|>"], "<function=add>", "</function>"),
        ("mistral", ["[TOOL_CALLS]"], "[TOOL_CALLS] ", ""),
        ("json", [], '{"name": "add", "arguments": ', "}"),
    ],
)
def test_tags_of_the_families(name: str, triggers: list[str], begin: str, end: str) -> None:
    auto, required = tags(name), tags(name, required=True)
    assert [t for t in auto["triggers"] if not t.startswith("{")] == triggers
    assert all(any(tag["begin"].startswith(t) for t in auto["triggers"]) for tag in auto["tags"])
    assert (required["mode"], required["triggers"]) == ("required", [])
    assert (required["tags"][0]["begin"], required["tags"][0]["end"]) == (begin, end)


def test_one_call_or_several() -> None:
    assert tags("hermes")["parallel"] and not tags("hermes", parallel=False)["parallel"]
    assert not tags("internlm")["parallel"], "the end of a call is its stop token"
    assert tags("mistral", required=True)["tags"][0]["schema"].get("maxItems") is None
    assert tags("mistral", required=True, parallel=False)["tags"][0]["schema"]["maxItems"] == 1


def test_bare_json_triggers_with_a_tools_own_name_only() -> None:
    assert tags("json")["triggers"] == ['{"name": "add"', '{"name":"add"', '{"name": "mul"', '{"name":"mul"']


def test_references_into_a_schema_stay_right_in_a_list_of_calls() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}, "required": ["a"]}
    grammar = tool_grammar(TOOL_FORMATS["mistral"], {"add": schema, "mul": EMPTY}, required=True)
    whole = json.loads(grammar.text)["tags"][0]["schema"]
    jsonschema.validate([{"name": "add", "arguments": {"a": 1}}, {"name": "mul", "arguments": {}}], whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{"name": "add", "arguments": {"a": "1"}}], whole)


def test_many_tools_are_offered_in_the_familys_first_form_only() -> None:
    large = {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "d" * 9999, "pattern": "x" * 100} for i in range(20)}}
    grammar = tool_grammar(TOOL_FORMATS["llama3_1"], {f"f{i}": schema_of({"parameters": large}) for i in range(20)})
    assert len(grammar.text) <= MAX_GRAMMAR_BYTES
    assert json.loads(grammar.text)["triggers"] == ["<function="]


def test_code_is_a_tag_of_its_own() -> None:
    both = tags("internlm", code=True)
    assert {"begin": "<|action_start|><|interpreter|>\n", "schema": None, "end": ""} in both["tags"]
    assert both["triggers"] == ["<|action_start|><|plugin|>", "<|action_start|><|interpreter|>"]
    only = json.loads(tool_grammar(TOOL_FORMATS["internlm"], {}, code=True, required=True).text)
    assert [tag["schema"] for tag in only["tags"]] == [None]
