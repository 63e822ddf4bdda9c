"""The clients of the soak test: requests whose right answers are known, cancellations in every phase, and requests that must be refused."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
#: an answer that takes longer is lost
PATIENCE = 180.0


class Wrong(Exception):
    """An answer is not what it must be."""


@dataclass
class Task:
    """A request and what its answers are: index -> (text, finish reason), computed alone before the soak begins."""

    name: str
    path: str
    body: dict[str, Any]
    answers: dict[int, tuple[str, str]] = field(default_factory=dict)
    tokens: int = 0  # completion tokens of all answers
    streams: bool = True  # OpenAI's events; other forms are asked for as whole answers


def known_tasks() -> list[Task]:
    """Answers of all kinds: greedy and seeded, one and several, cut by words, by tokens and by length."""

    def chat(name: str, content: str, **more: Any) -> Task:
        messages = [{"role": "user", "content": content}]
        return Task(name, CHAT, {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 60, **more})

    tasks = [chat(f"count to {n}", f"Count from 1 to {n}.") for n in range(3, 19)]
    tasks += [chat(f"repeat {w}", f"Repeat after me: {w}") for w in ("red green blue", "one cat", "sun moon star", "apple", "big small big")]
    tasks += [chat(f"seed {s}", "Tell me a story about a dog.", temperature=1.0, seed=s) for s in range(6)]
    tasks += [chat(f"n=3 seed {s}", "Tell me a story about a bird.", temperature=1.0, seed=s, n=3, max_tokens=40) for s in (11, 12)]
    tasks += [chat(f"stop at {w!r}", "Count from 1 to 15.", stop=[w, "never"]) for w in ("7, 8", "3", " 11,", "12.")]
    tasks += [chat("stop two words", "Tell me a story about a cat.", stop=["park", "lived a"])]
    tasks += [chat("logprobs", "Count from 1 to 6.", logprobs=True, top_logprobs=3), chat("length", "Tell me a story about a cat.", max_tokens=17)]
    tasks += [chat("long", f"Tell me a story about a {w}.", ignore_eos=True, max_tokens=300) for w in ("cat", "dog", "bird")]
    raw: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 30}
    tasks += [Task(f"completion {i}", COMPLETIONS, {**raw, "prompt": [300 + 7 * i + j for j in range(40 + i)]}) for i in range(4)]
    tasks += [Task("prompts", COMPLETIONS, {**raw, "prompt": ["Once upon a time", "The sun is", "1, 2, 3,"], "n": 2, "seed": 5, "temperature": 0.8})]
    shape = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}}, "required": ["name", "age"]}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": shape}}
    tasks += [chat("guided", "Who are you?", response_format=schema), chat("guided regex", "A number?", response_format=_regex("[0-9]{3}-[0-9]{2}"))]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}}}}
    hello = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "Count from 2 to 9."}]}
    tasks += [
        Task("responses", "/v1/responses", {"model": "tiny", "input": "Count from 1 to 9.", "temperature": 0, "max_output_tokens": 40}, streams=False),
        Task("messages", "/v1/messages", {**hello, "max_tokens": 40}, streams=False),
        Task("generate", GENERATE, {"input_ids": list(range(400, 440)), "max_tokens": 20, "temperature": 0}, streams=False),
    ]
    return [*tasks, chat("tool", "How is the weather in Rome?", tools=[tool], tool_choice="required")]


def _regex(pattern: str) -> dict[str, Any]:
    return {"type": "regex_schema", "regex_schema": pattern}


def bad_requests() -> list[tuple[str, str, bytes, set[int]]]:
    """(name, path, body, statuses that are right)."""

    def chat(name: str, **fields: Any) -> tuple[str, str, bytes, set[int]]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        return name, CHAT, json.dumps(body).encode(), {400}

    messages = b'{"model": "tiny", "messages": '
    return [
        chat("unknown field", no_such_field=1),
        chat("wrong type", temperature="hot"),
        chat("out of range", temperature=-1),
        chat("too many answers", n=100000),
        chat("empty stop word", stop=[""]),
        chat("no messages", messages=[]),
        chat("too long a prompt", messages=[{"role": "user", "content": "word " * 20000}]),
        chat("role", messages=[{"role": "king", "content": "hi"}]),
        chat("lone surrogate", messages=[{"role": "user", "content": "\ud800"}]),
        chat("bias of no token", logit_bias={"999999": 1}),
        chat("bad schema", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}),
        chat("bad regex", response_format=_regex("(((")),
        chat("bad tool", tools=[{"type": "function"}], tool_choice="required"),
        ("unknown model", CHAT, b'{"model": "other", "messages": "hi"}', {404}),
        ("unknown path", "/v1/nothing", b"{}", {404}),
        ("not JSON", CHAT, b"{", {400}),
        ("not an object", COMPLETIONS, b"[1, 2]", {400}),
        ("nothing", COMPLETIONS, b"", {400}),
        ("deep", CHAT, messages + b"[" * 100000 + b"]" * 100000 + b"}", {400}),
        ("token out of range", COMPLETIONS, b'{"model": "tiny", "prompt": [99999999]}', {400}),
        ("NaN", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "top_p": NaN}', {400}),
        ("bytes", GENERATE, b"\xff\xfe\x00", {400}),
    ]


# ---------------------------------------------------------------------- HTTP, by hand: a client must be able to leave anywhere


class Connection:
    """One request on one connection."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.transport.abort()

    async def send(self, path: str, body: bytes, *, share: float = 1.0, length: int | None = None) -> None:
        """The request, or only the first `share` of it."""
        head = f"POST {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
        data = head.encode() + body
        self._writer.write(data[: max(1, round(share * len(data)))])
        await self._writer.drain()

    async def garbage(self, data: bytes) -> bytes:
        """The first line of the answer to something that is no HTTP."""
        self._writer.write(data + b"\r\n\r\n")
        return await self._reader.readline()

    async def get(self, path: str) -> str:
        """The body of a GET."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: soak\r\n\r\n".encode())
        await self.head()
        return (await self.body()).decode()

    async def head(self) -> int:
        """The status; the headers are kept."""
        line = await self._reader.readline()
        if not line.startswith(b"HTTP/1.1 "):
            raise Wrong(f"no status line but {line[:80]!r}")
        self._headers = {}
        while (header := await self._reader.readline()).strip():
            name, _, value = header.decode("latin-1").partition(":")
            self._headers[name.lower()] = value.strip()
        return int(line[9:12])

    async def body(self) -> bytes:
        """All of the body."""
        if "content-length" in self._headers:
            return await self._reader.readexactly(int(self._headers["content-length"]))
        return b"".join([part async for part in self._parts()])

    async def _parts(self) -> AsyncGenerator[bytes, None]:
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()

    async def events(self) -> AsyncGenerator[str, None]:
        """The data of each event."""
        rest = b""
        async for part in self._parts():
            *whole, rest = (rest + part).split(b"\n\n")
            for event in whole:
                yield event.decode().removeprefix("data: ")
        if rest:
            raise Wrong(f"the stream ends within an event: {rest[:80]!r}")


# ---------------------------------------------------------------------- what a client does


class Clients:
    """`run(n, until)` lets n clients work; `done` counts what they did, `wrong` lists what was not right."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self._host, self._port = host, port
        self._random = random.Random(seed)
        self.tasks: list[Task] = []
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._bad = bad_requests()

    def connect(self) -> Connection:
        """A fresh connection."""
        return Connection(self._host, self._port)

    async def learn(self, tasks: list[Task]) -> list[str]:
        """Ask each task alone and keep the answers; the names of tasks that this server refuses."""
        refused = []
        for task in tasks:
            async with self.connect() as c:
                await c.send(task.path, json.dumps(task.body).encode())
                status, reply = await c.head(), json.loads(await c.body())
                if status != 200:
                    refused.append(f"{task.name} ({reply['error']['message']})")
                    continue
                task.answers, task.tokens = answers_of(reply), reply.get("usage", {}).get("completion_tokens", 0)
                self.tasks.append(task)
        return refused

    async def run(self, clients: int, seconds: float) -> None:
        """All clients work for `seconds`, then finish what they began."""
        end = asyncio.get_running_loop().time() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(clients)))

    async def _client(self, end: float) -> None:
        acts = (self._stream, self._whole, self._leave_midway, self._leave_early, self._leave_in_request, self._refused, self._read_late, self._too_large,
                self._garbage)  # fmt: skip
        await asyncio.sleep(self._random.random())
        while asyncio.get_running_loop().time() < end and len(self.wrong) < 20:
            act = self._random.choices(acts, (40, 20, 15, 12, 4, 14, 4, 1, 1))[0]
            name = act.__name__.strip("_")
            try:
                async with asyncio.timeout(PATIENCE):
                    await act()
                self.done[name] += 1
            except TimeoutError:
                self.wrong.append(f"{name}: nothing came for {PATIENCE:.0f} s")
            except (Wrong, OSError, asyncio.IncompleteReadError, ValueError, KeyError) as e:
                self.wrong.append(f"{name}: {type(e).__name__}: {e}"[:600])

    async def _read_late(self) -> None:
        await self._stream(self._random.random() * 3)

    async def _stream(self, idle: float = 0.0) -> None:
        task = self._random.choice([task for task in self.tasks if task.streams])
        usage = self._random.random() < 0.5
        body = {**task.body, "stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
        async with self.connect() as c:
            await c.send(task.path, json.dumps(body).encode())
            await asyncio.sleep(idle)
            if (status := await c.head()) != 200:
                raise Wrong(f"{task.name}: status {status}: {(await c.body())[:300]!r}")
            events = [event async for event in c.events()]
        check_stream(task, events, usage=usage)

    async def _whole(self) -> None:
        task = self._random.choice(self.tasks)
        async with self.connect() as c:
            await c.send(task.path, json.dumps(task.body).encode())
            status, body = await c.head(), await c.body()
        if status != 200:
            raise Wrong(f"{task.name}: status {status}: {body[:300]!r}")
        if (got := answers_of(json.loads(body))) != task.answers:
            raise Wrong(f"{task.name}: {got} instead of {task.answers}")

    async def _leave_midway(self) -> None:
        task = self._random.choice([task for task in self.tasks if task.streams])
        texts: dict[int, str] = collections.defaultdict(str)
        async with self.connect() as c:
            await c.send(task.path, json.dumps({**task.body, "stream": True}).encode())
            if (status := await c.head()) != 200:
                raise Wrong(f"{task.name}: status {status}: {(await c.body())[:300]!r}")
            left = self._random.randint(1, 25)
            async with contextlib.aclosing(c.events()) as events:
                async for event in events:
                    left -= 1
                    if event == "[DONE]" or not left:
                        break
                    for choice in json.loads(event)["choices"]:
                        texts[choice["index"]] += text_of(choice)
        for index, text in texts.items():
            if not task.answers[index][0].startswith(text):
                raise Wrong(f"{task.name}: {text!r} is not how {task.answers[index][0]!r} begins")

    async def _leave_early(self) -> None:
        """Before the first byte, often while the request waits in the queue."""
        task = self._random.choice(self.tasks)
        async with self.connect() as c:
            await c.send(task.path, json.dumps({**task.body, "stream": self._random.random() < 0.5}).encode())
            await asyncio.sleep(self._random.random() * 0.3)

    async def _leave_in_request(self) -> None:
        async with self.connect() as c:
            await c.send(CHAT, json.dumps(self._random.choice(self.tasks).body).encode(), share=self._random.random())
            await asyncio.sleep(self._random.random() * 0.1)

    async def _refused(self) -> None:
        name, path, body, right = self._random.choice(self._bad)
        async with self.connect() as c:
            await c.send(path, body)
            status, reply = await c.head(), await c.body()
        if status not in right or not json.loads(reply)["error"]["message"]:
            raise Wrong(f"{name}: status {status}: {reply[:300]!r}")

    async def _too_large(self) -> None:
        """A body that is announced as huge, and one that only turns out to be."""
        async with self.connect() as c:
            await c.send(CHAT, b"{", length=1 << 40)
            if (status := await c.head()) != 413:
                raise Wrong(f"a body of 1 TiB was announced: status {status}")

    async def _garbage(self) -> None:
        async with self.connect() as c:
            line = await c.garbage(self._random.randbytes(200))
        if line and b" 400 " not in line:
            raise Wrong(f"random bytes: {line[:80]!r}")


def text_of(choice: dict[str, Any]) -> str:
    """Everything that one choice, or one choice of a chunk, tells: text, and tool calls as their names and arguments."""
    message = choice.get("message") or choice.get("delta") or {}
    calls = "".join((c["function"].get("name") or "") + (c["function"].get("arguments") or "") for c in message.get("tool_calls") or ())
    return (choice.get("text") or "") + (message.get("content") or "") + calls


def answers_of(reply: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """index -> (text, finish reason) of a whole answer, of any protocol."""
    if "output" in reply:  # Responses
        return {0: ("".join(part["text"] for item in reply["output"] for part in item["content"]), reply["status"])}
    if "content" in reply:  # Anthropic
        return {0: ("".join(part["text"] for part in reply["content"]), reply["stop_reason"])}
    if "meta_info" in reply:
        return {0: (reply["text"], reply["meta_info"]["finish_reason"]["type"])}
    return {c["index"]: (text_of(c), c["finish_reason"]) for c in reply["choices"]}


def check_stream(task: Task, events: list[str], *, usage: bool) -> None:
    """Every answer once, complete and right; [DONE] once, at the end; nothing behind an answer's end."""
    if events.count("[DONE]") != 1 or events[-1] != "[DONE]":
        raise Wrong(f"{task.name}: [DONE] is not the end: {events[-2:]}")
    texts: dict[int, str] = collections.defaultdict(str)
    ends: dict[int, str] = {}
    chunks = [json.loads(event) for event in events[:-1]]
    if any("error" in chunk for chunk in chunks) or len({chunk["id"] for chunk in chunks}) != 1:
        raise Wrong(f"{task.name}: an error, or chunks of two answers: {events[-3:]}")
    counts = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        if choice["index"] in ends:
            raise Wrong(f"{task.name}: answer {choice['index']} goes on behind its end")
        texts[choice["index"]] += text_of(choice)
        if choice["finish_reason"] is not None:
            ends[choice["index"]] = choice["finish_reason"]
    got = {index: (texts[index], end) for index, end in sorted(ends.items())}
    if got != task.answers:
        raise Wrong(f"{task.name}: {got} instead of {task.answers}")
    if len(counts) != int(usage) or (usage and counts[0]["completion_tokens"] != task.tokens):
        raise Wrong(f"{task.name}: usage {counts} instead of {task.tokens} tokens, once")
