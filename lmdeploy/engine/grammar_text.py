"""From `Grammar` to the text that llguidance compiles: one Lark grammar, JSON schemas inside it.

Texts that users write never name the model's special tokens, unless they are the trigger, begin or end of a tag: there a special token must come
as this very token, so it is named by its id. Grammars are compiled without forced tokenisation (`no_forcing`): what is allowed depends
on the bytes of tokens alone, whatever a tokenizer does with the space at the start of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from lmdeploy.errors import RequestError
from lmdeploy.grammar import MAX_CHOICES, MAX_GRAMMAR_DEPTH, Grammar, check_grammar

HEAD = '%llguidance {"no_forcing": true}\n'
FREE = "TEXT: /(.|\\n)*/\n"
#: insignificant space in a row in JSON: a model that has lost its way must not print spaces until its tokens are used up
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
MAX_TAGS = 256

#: keywords of older drafts that constrain, and that the library would pass over in silence
_REFUSED_KEYWORDS = ("additionalItems", "disallow", "divisibleBy", "extends")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties")
_JSON_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\](){}]')
_PLAIN_TOKENS = re.compile(r"\\.|[\[\](){}]", re.DOTALL)

Parts = list[str | int]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a grammar must know of a vocabulary: `split` cuts a text at special tokens; `ids` are all of those but the ones that end an answer."""

    split: Callable[[str], Parts]
    ids: frozenset[int]


def invalid(problem: str, kind: str = "") -> RequestError:
    """The error for a grammar that is refused, one line; it names the field that a grammar of this kind comes from."""
    param = "tools" if kind == "structural_tag" else "response_format"
    return RequestError(f"the grammar is refused: {' '.join(problem.split())}"[:600], param=param, code="invalid_grammar")


def compile_text(grammar: Grammar, special: SpecialTokens) -> str:
    """What `llguidance.LLMatcher` takes. Raises RequestError(code='invalid_grammar') for what is wrong at first sight."""
    check_grammar(grammar)
    is_json = grammar.kind in ("json_schema", "structural_tag", "choice")
    if _depth(grammar.text, _JSON_TOKENS if is_json else _PLAIN_TOKENS) > MAX_GRAMMAR_DEPTH:
        raise invalid(f"it is nested more than {MAX_GRAMMAR_DEPTH} deep")
    body = _BODIES[grammar.kind](grammar.text, special)
    if not grammar.after:
        return body
    reference, rules = _up_to(special.split(grammar.after), "before")
    free = f"({_sequence(special.split(grammar.begin))} {reference})?" if grammar.begin else reference
    top = f"{HEAD}start: {free} @body\n{rules}{FREE}"
    return json.dumps({"grammars": [{"lark_grammar": top}, {"name": "body", "lark_grammar": body}]})


def _depth(text: str, tokens: re.Pattern[str]) -> int:
    depth = deepest = 0
    for token in tokens.findall(text):
        if token in ("(", "[", "{"):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (")", "]", "}"):
            depth -= 1
    return deepest


# ---------------------------------------------------------------------- the simple kinds


def _json_object(text: str, special: SpecialTokens) -> str:
    return f"{HEAD}start: {_json({'type': 'object'})}\n"


def _json_schema(text: str, special: SpecialTokens) -> str:
    return f"{HEAD}start: {_json(_loads(text, 'the schema'))}\n"


def _regex(text: str, special: SpecialTokens) -> str:
    return f"{HEAD}start: /{llguidance.regex_to_lark(text)}/\n"


def _ebnf(text: str, special: SpecialTokens) -> str:
    if "::=" not in text:
        return HEAD + text
    try:
        lark: str = any_to_lark(text)
    except Exception as e:  # the converter raises what it likes
        raise invalid(str(e)) from None
    return HEAD + lark


def _choice(text: str, special: SpecialTokens) -> str:
    texts = _loads(text, "the list of choices")
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_CHOICES or not all(isinstance(t, str) and t for t in texts):
        raise invalid(f"choice needs 1 to {MAX_CHOICES} texts, none of them empty")
    return f"{HEAD}start: CHOICE\nCHOICE: {' | '.join(map(_quoted, texts))}\n"


def _loads(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise invalid(f"{what} is not valid JSON: {e}") from None


def _quoted(text: str) -> str:
    return json.dumps(text)


def _json(schema: Any) -> str:
    """A schema as a symbol of a grammar; raises for keywords that would have no effect."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise invalid("the schema must be an object")
    if "x-guidance" in schema:
        raise invalid("x-guidance is not a keyword of JSON schema")
    for keyword in _keywords(schema):
        raise invalid(f"JSON schema keyword not supported: {keyword}")
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}, **schema})


def _keywords(schema: Any) -> Iterator[str]:
    """Keywords, with their places, that would be passed over in silence."""
    todo: list[tuple[str, Any]] = [("", schema)]
    while todo:
        place, node = todo.pop()
        if not isinstance(node, dict):
            continue
        yield from (place + key for key in _REFUSED_KEYWORDS if key in node)
        if isinstance(node.get("items"), list):
            yield f"{place}items as a list (use prefixItems)"
        yield from (f"{place}{key} as true or false" for key in ("exclusiveMinimum", "exclusiveMaximum") if isinstance(node.get(key), bool))
        for key in _SCHEMA_MAPS:
            if isinstance(value := node.get(key), dict):
                todo += [(f"{place}{key}.{name}.", child) for name, child in value.items()]
        for key in _SCHEMA_LISTS:
            if isinstance(value := node.get(key), list):
                todo += [(f"{place}{key}.{i}.", child) for i, child in enumerate(value)]
        todo += [(f"{place}{key}.", node[key]) for key in _SCHEMAS if key in node]


# ---------------------------------------------------------------------- structural tags


def _structural_tag(text: str, special: SpecialTokens) -> str:
    value = _loads(text, "the structural tag")
    tags = value.get("tags") if isinstance(value, dict) else None
    if not isinstance(tags, list) or not 0 < len(tags) <= MAX_TAGS or not all(_is_tag(t) for t in tags):
        raise invalid(f"a structural tag needs 1 to {MAX_TAGS} tags, each with begin (not empty), schema and end")
    if value.get("mode") == "required":
        return _required(tags, special, parallel=bool(value.get("parallel")))
    triggers = value.get("triggers")
    if value.get("mode") != "auto" or not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise invalid("a structural tag needs mode 'auto' with triggers, or 'required'")
    return _auto(tags, list(dict.fromkeys(triggers)), special, parallel=bool(value.get("parallel")))


def _is_tag(tag: Any) -> bool:
    return (
        isinstance(tag, dict)
        and isinstance(tag.get("begin"), str)
        and tag["begin"] != ""
        and isinstance(tag.get("end"), str)
        and isinstance(tag.get("schema"), (dict, bool, type(None)))
    )


def _required(tags: list[dict[str, Any]], special: SpecialTokens, *, parallel: bool) -> str:
    rules = "".join(_rest(tag, tag["begin"], f"tag_{i}", special) for i, tag in enumerate(tags))
    tag = " | ".join(f"tag_{i}" for i in range(len(tags)))
    start = "start: tag (SPACE? tag)*\nSPACE: /[ \\t\\r\\n]+/\n" if parallel else "start: tag\n"
    return f"{HEAD}{start}tag: {tag}\n{rules}{FREE}"


def _auto(tags: list[dict[str, Any]], triggers: list[str], special: SpecialTokens, *, parallel: bool) -> str:
    """Free text, other special tokens among it; where a trigger begins, one of its tags must follow."""
    rules, calls, first_ids = [], [], set[int]()
    for i, trigger in enumerate(triggers):
        parts = special.split(trigger)
        mine = [j for j, tag in enumerate(tags) if tag["begin"].startswith(trigger)]
        if not mine:
            raise invalid(f"no tag begins with the trigger {trigger!r}")
        reference, more = _up_to(parts, f"trigger_{i}")
        first_ids.update([p for p in parts if isinstance(p, int)][:1])
        rules.append(more)
        for j in mine:
            rules.append(_rest(tags[j], tags[j]["begin"][len(trigger) :], f"tag_{i}_{j}", special))
        calls.append(f"{reference} ({' | '.join(f'tag_{i}_{j}' for j in mine)})")
    if unreachable := [tag["begin"] for tag in tags if not any(tag["begin"].startswith(t) for t in triggers)]:
        raise invalid(f"the tag {unreachable[0]!r} begins with none of the triggers")
    start, others = "start: call* TEXT\n" if parallel else "start: call | TEXT\n", sorted(special.ids - first_ids)
    if others:
        rules.append(f"other: TEXT <[{','.join(map(str, others))}]>\n")
        start = "start: (call | other)* TEXT\n" if parallel else "start: other* (call | TEXT)\n"
    return f"{HEAD}{start}call: {' | '.join(calls)}\n{''.join(rules)}{FREE}"


def _rest(tag: dict[str, Any], begin: str, name: str, special: SpecialTokens) -> str:
    """Rules of a tag from `begin` on: then what is in it, then its end."""
    before, end = _sequence(special.split(begin)) if begin else "", special.split(tag["end"]) if tag["end"] else []
    if tag["schema"] is not None:
        return f"{name}: {before} {_json(tag['schema'])} {_sequence(end)}\n"
    if not end:
        return f"{name}: {before} TEXT\n"
    reference, rules = _up_to(end, f"{name}_in")
    return f"{name}: {before} {reference}\n{rules}"


def _sequence(parts: Parts) -> str:
    return " ".join(f"<[{part}]>" if isinstance(part, int) else _quoted(part) for part in parts)


def _up_to(parts: Parts, name: str) -> tuple[str, str]:
    """(symbols, rules) for any text up to and including the first `parts`."""
    first = next((i for i, part in enumerate(parts) if isinstance(part, int)), None)
    if first is None:  # lazy: the rule ends with the first place where it can
        return name, f"{name}[lazy]: TEXT {_sequence(parts)}\n"
    if first == 0:
        return f"TEXT {_sequence(parts)}", ""
    return f"{name.upper()} {_sequence(parts[first:])}", f"{name.upper()}: TEXT {_sequence(parts[:first])}\n"


_BODIES: dict[str, Callable[[str, SpecialTokens], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf": _ebnf,
    "choice": _choice,
    "structural_tag": _structural_tag,
}
