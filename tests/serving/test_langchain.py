"""LangChain's clients: answers, streams, tools and embeddings, over chat completions and over responses."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from tests.serving.running import RunningServer


@tool
def add(a: int, b: int) -> int:
    """Compute the sum of two numbers"""
    return a + b


@tool
def mul(a: int, b: int) -> int:
    """Calculate the product of two numbers"""
    return a * b


@pytest.fixture(scope="module", params=[False, True], ids=["chat", "responses"])
def model(server: RunningServer, request: pytest.FixtureRequest) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="tiny", temperature=0, max_retries=0, use_responses_api=request.param)  # type: ignore[arg-type]


def test_an_answer_and_a_stream_say_the_same(model: ChatOpenAI) -> None:
    answer = model.invoke([("system", "Be short."), ("human", "Count from 1 to 5.")])
    assert "1, 2, 3" in answer.text
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 5
    pieces = list(model.stream([("system", "Be short."), ("human", "Count from 1 to 5.")]))
    assert "".join(piece.text for piece in pieces) == answer.text and len(pieces) > 5


def test_bound_tools_are_called_in_turn(model: ChatOpenAI) -> None:
    bound, messages, called = model.bind_tools([add, mul]), [HumanMessage("Compute (3+5)*2")], []
    answer: Any = None
    while len(called) < 3:
        answer = bound.invoke(messages)
        assert isinstance(answer, AIMessage)
        if not answer.tool_calls:
            break
        call = answer.tool_calls[0]
        called.append((call["name"], call["args"]))
        result = {"add": add, "mul": mul}[call["name"]].invoke(call["args"])
        messages += [answer, ToolMessage(str(result), tool_call_id=call["id"])]  # type: ignore[list-item]
    assert called == [("add", {"a": 3, "b": 5}), ("mul", {"a": 8, "b": 2})]
    assert "16" in answer.text


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=200)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_the_class(model: ChatOpenAI, method: Any) -> None:
    person = model.with_structured_output(Person, method=method).invoke("Who is the oldest person that you know?")
    assert isinstance(person, Person) and 0 <= person.age <= 200


def test_embeddings_of_documents_and_of_a_question(server: RunningServer) -> None:
    vectors = OpenAIEmbeddings(base_url=f"{server.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False)  # type: ignore[arg-type]
    documents = vectors.embed_documents(["The sky is blue.", "Count from 1 to 5."])
    assert [len(d) for d in documents] == [384, 384]
    assert documents[0] == pytest.approx(vectors.embed_query("The sky is blue."), abs=1e-5)
