"""Answers of a given form over HTTP: every spelling, every route, and grammars that are refused without harm to others."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.serving.running import RunningServer

ASK = [{"role": "user", "content": "Tell me about a person."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
#: takes some twenty seconds, where five are allowed
ENDLESS = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer", "multipleOf": 3999971}}}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(server: RunningServer, **fields: Any) -> Any:
    return server.http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 200, **fields})


def text(server: RunningServer, **fields: Any) -> str:
    reply = chat(server, **fields)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


class Person(BaseModel):
    """What `parse` of the openai client makes a strict schema of."""

    name: str
    likes_tea: bool


def test_the_openai_client_parses_a_pydantic_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="tiny", messages=ASK, response_format=Person, max_tokens=300, temperature=0, frequency_penalty=1.0)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_stream_fits_the_schema_and_ends_with_stop(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    chunks = list(client.chat.completions.create(model="tiny", messages=ASK, response_format=form, stream=True, max_tokens=200, temperature=1.0, seed=1))
    jsonschema.validate(json.loads("".join(c.choices[0].delta.content or "" for c in chunks)), SCHEMA)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "regex_schema", "regex_schema": "call me [A-Za-z]{1,10}"}}, "call me [A-Za-z]{1,10}"),
        ({"response_format": {"type": "regex", "regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"response_format": {"type": "choice", "choice": ["red", "blue"]}}, "red|blue"),
        ({"response_format": {"type": "ebnf", "ebnf": 'root ::= "a" [0-9] [0-9]'}}, r"a\d\d"),
        ({"guided_regex": r"\d{4}"}, r"\d{4}"),
        ({"guided_choice": ["one", "two"]}, "one|two"),
        ({"guided_grammar": "start: /[xyz]{3}/"}, "[xyz]{3}"),
        ({"guided_json": {"enum": [1, 2]}}, "[12]"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ],
    ids=str,
)
def test_every_spelling_of_a_form_is_obeyed(server: RunningServer, fields: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, text(server, **fields))


def test_completions_and_generate_take_the_same_forms(server: RunningServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    whole = server.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": ["A: ", "B: "], "max_tokens": 200, "temperature": 0, "response_format": form}
    ).json()
    for choice in whole["choices"]:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
    own = server.http.post("/generate", json={"prompt": "A: ", "max_tokens": 200, "temperature": 0, "response_format": form}).json()
    jsonschema.validate(json.loads(own["text"]), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"type": "string"}}}}}, ["not supported: not"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "https://example.com/a"}}}}, ["example.com"]),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, ["uniqueItems"]),
        ({"guided_regex": "(?=a)"}, ["look-ahead"]),
        ({"guided_grammar": "start: nothing"}, ["nothing"]),
        ({"guided_regex": "(" * 1000}, ["nested"]),
        ({"guided_regex": "a" * 70_000}, ["65536"]),
    ],
    ids=lambda v: str(v)[:70],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_cannot_be_served_is_a_400_with_the_reason(server: RunningServer, fields: dict[str, Any], words: list[str], stream: bool) -> None:
    reply = chat(server, stream=stream, **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_grammar", "response_format")
    assert all(word in error["message"] for word in words) and "\n" not in error["message"], error


def test_the_client_sees_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="uniqueItems"):
        client.chat.completions.create(
            model="tiny", messages=ASK, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}}
        )


def test_a_grammar_that_takes_too_long_is_a_400_and_others_do_not_wait_for_it(server: RunningServer) -> None:
    replies: list[Any] = []
    asking = threading.Thread(target=lambda: replies.append(chat(server, response_format=ENDLESS)))
    asking.start()
    answered = 0
    while not replies:
        start = time.monotonic()
        assert chat(server, max_tokens=3).status_code == 200
        answered += not replies and time.monotonic() - start < 4
        time.sleep(0.05)
    asking.join()
    assert answered >= 2, "plain requests waited for the grammar"
    error = replies[0].json()["error"]
    assert (replies[0].status_code, error["code"]) == (400, "invalid_grammar") and "takes longer than 5 s" in error["message"]
    assert text(server, guided_regex="[a-c]{4}")
    server.until_idle()


def test_grammars_are_checked_and_compiled_in_the_name_of_who_asks(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[str] = []
    checks, client = server.frontend.grammars._pool, server.frontend.client
    submit_check, submit = checks.submit, client.submit
    monkeypatch.setattr(checks, "submit", lambda owner, *more: (owners.append(owner), submit_check(owner, *more))[1])
    monkeypatch.setattr(client, "submit", lambda request: (owners.append(request.owner), submit(request))[1])
    assert text(server, guided_regex="[b-d]{4}") and owners == ["127.0.0.1"] * 2
    assert chat(server, max_tokens=2).status_code == 200 and owners[2:] == [""], "nobody takes turns for an answer without a grammar"
    owners.clear()
    assert json.loads(text(server, response_format={"type": "json_object"}, frequency_penalty=1.0)) is not None and owners == ["127.0.0.1"], "no check"


def test_what_no_token_can_satisfy_is_a_clear_error(server: RunningServer) -> None:
    reply = chat(server, guided_choice=["yes"], bad_words=["yes", "y", "ye", "Y"])
    if reply.status_code == 200:  # the word came in other pieces
        assert reply.json()["choices"][0]["message"]["content"] == "yes"
    every = {str(i): -100.0 for i in range(4000)}
    assert chat(server, guided_choice=["yes"], logit_bias=every).json()["choices"][0]["message"]["content"] == "yes"
