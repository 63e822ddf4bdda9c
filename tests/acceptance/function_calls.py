"""What a user's program of function calling does, call by call: `python function_calls.py URL`. Row A14 runs it as a process.

Quirks that users' programs have are kept: 'type': 'int' in the schemas, the assistant's turn handed back without its tool_calls, the
result in the role `environment`, named `plugin`, and the arguments evaluated as Python.
"""

from __future__ import annotations

import sys
from typing import Any

NUMBERS = {name: {"type": "int", "description": "A number"} for name in ("a", "b")}


def tool(name: str, description: str) -> dict[str, Any]:
    """A function of two numbers."""
    parameters = {"type": "object", "properties": NUMBERS, "required": ["a", "b"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [tool("add", "Compute the sum of two numbers"), tool("mul", "Calculate the product of two numbers")]


def add(a: int, b: int) -> int:
    return a + b


def mul(a: int, b: int) -> int:
    return a * b


def main(url: str) -> None:
    """Two answers that call, each shown and carried out."""
    from openai import OpenAI

    client = OpenAI(api_key="YOUR_API_KEY", base_url=f"{url}/v1")
    model = client.models.list().data[0].id
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Compute (3+5)*2"}]
    for template in ("3+5={}", "{}"):
        response: Any = client.chat.completions.create(model=model, messages=messages, temperature=0.8, top_p=0.8, stream=False, tools=TOOLS)  # type: ignore[call-overload]
        print(response)
        call = response.choices[0].message.tool_calls[0].function
        value = eval(f"{call.name}(**{call.arguments})")
        print(value)
        messages.append({"role": "assistant", "content": response.choices[0].message.content})
        messages.append({"role": "environment", "content": template.format(value), "name": "plugin"})


if __name__ == "__main__":
    main(sys.argv[1])
