"""`lmdeploy serve api_client`: the terminal conversation with a model that a server has.

A server that is not there, not ready or busy is waited for as long as a person sits at the terminal (Ctrl-C stops the waiting, the history stays); in a
script the first such error is one line and the end. The history is kept on this side, so a server that was started again is no break.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from lmdeploy import log
from lmdeploy.cli.chat import add_generation_flags, generation_config
from lmdeploy.cli.terminal import Anew, Aside, Conversation, Message, Screen, open_reader, open_screen
from lmdeploy.errors import EngineError, RequestError
from lmdeploy.messages import Response

if TYPE_CHECKING:
    from lmdeploy.serving.client import APIClient

#: seconds between two tries; the last goes on
BACK_OFF = (1.0, 2.0, 3.0, 5.0)
KEY_HINT = "give it with --api-key or in LMDEPLOY_API_KEY"


def add_api_client_flags(parser: argparse.ArgumentParser) -> None:
    """Where the server is, and how it shall answer."""
    parser.add_argument("api_server_url", metavar="URL", help="address of the server; http:// may be left out")
    parser.add_argument("--api-key", metavar="KEY", help="sent as `Authorization: Bearer KEY` (default: LMDEPLOY_API_KEY of the environment)")
    parser.add_argument("--model", metavar="NAME", help="which of the server's models (default: its first)")
    parser.add_argument("--session-id", type=int, metavar="INT", help="no effect: the history is kept on this side and sent with each message")
    add_generation_flags(parser)
    parser.add_argument("--meta-instruction", metavar="TEXT", help="the system prompt (default: that of the server's template)")


def run_api_client(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    log.setup(getattr(args, "log_level", "WARNING"))
    generation = generation_config(args)
    screen = open_screen()
    reader = open_reader(screen)
    from lmdeploy.serving.client import APIClient

    if "://" not in args.api_server_url:
        screen.note(f"using http://{args.api_server_url}")
    key = getattr(args, "api_key", None) or os.environ.get("LMDEPLOY_API_KEY") or None
    with APIClient(args.api_server_url, key) as client:
        model = RemoteModel(
            client,
            screen,
            request_fields(generation),
            model=getattr(args, "model", None),
            system=getattr(args, "meta_instruction", None),
            patient=reader.interactive,
        )
        model.connect()
        Conversation(model, reader, screen).run()
    return 0


def request_fields(generation: Any) -> dict[str, Any]:
    """The request's sampling fields for a GenerationConfig."""
    return {
        "max_tokens": generation.max_new_tokens,
        "temperature": generation.temperature if generation.samples else 0.0,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": generation.min_p,
        "repetition_penalty": generation.repetition_penalty,
        "ignore_eos": generation.ignore_eos,
        "stop": generation.stop_words,
        "seed": generation.random_seed,
    }


class RemoteModel:
    """Answers with a model of a server. `patient`: wait for a server that may come back; else its absence raises."""

    def __init__(
        self, client: APIClient, screen: Screen, fields: dict[str, Any], *, model: str | None = None, system: str | None = None, patient: bool = False
    ) -> None:
        self._client, self._screen, self._fields, self._patient = client, screen, fields, patient
        self._wanted = self._model = model
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def connect(self) -> None:
        """Find the server and the model, and say who talks."""
        delays = _delays()
        while True:
            try:
                self._choose(self._client.available_models)
                break
            except (RequestError, EngineError) as error:
                self._wait(error, next(delays))
        self._screen.note(f"talking with {self._model} at {self._client.url}")

    def _choose(self, served: list[str]) -> None:
        """The model that the user named, the one so far, or the first."""
        if not served:
            raise RequestError(f"{self._client.url} serves no model", code="model_not_found")
        if self._wanted is not None and self._wanted not in served:
            raise RequestError(f"{self._client.url} does not serve {self._wanted!r}; --model may be {', '.join(served[:20])}", code="model_not_found")
        if self._model not in served:
            self._model = served[0]

    def __call__(self, messages: list[Message]) -> Generator[Response | Aside | Anew, None, None]:
        """Increments of the answer to the last message; the last one carries the server's own count of tokens."""
        delays, begun, waited = _delays(), False, False
        while True:
            try:
                for item in self._answer(messages):
                    if waited:
                        self._screen.note("the answer begins anew" if begun else "connected again", dim=True)
                    begun, waited = True, False
                    yield item
                return
            except (RequestError, EngineError) as error:
                if begun:
                    yield Anew()
                    self._screen.note()
                if getattr(error, "code", None) == "model_not_found" and self._has_another():
                    continue
                self._wait(error, next(delays))
                waited = True

    def _has_another(self) -> bool:
        """Whether the server was started again with another model; the conversation then goes on with that."""
        before = self._model
        if self._wanted is None:
            self._choose(self._client.available_models)
        if self._model == before:
            return False
        self._screen.note(f"the server has {self._model} now")
        return True

    def _wait(self, error: RequestError | EngineError, delay: float) -> None:
        """Say what is wrong and wait where that may help; else raise what the conversation shows in one line."""
        from lmdeploy.serving.client import ServerBusy, ServerNotReady, Unreachable

        if not self._patient or not isinstance(error, (ServerBusy, ServerNotReady, Unreachable)):
            raise self._told(error)
        self._count_down(str(error), error.retry_after or delay)

    def _told(self, error: RequestError | EngineError) -> Exception:
        """An error of the server is not one of this program: a person reads it and goes on."""
        code = error.code
        if code in ("invalid_api_key", "http_401") and KEY_HINT not in str(error):
            return RequestError(f"{error}; {KEY_HINT}", code=code)
        return RequestError(str(error), code=code) if self._patient and isinstance(error, EngineError) else error

    def _count_down(self, problem: str, seconds: float) -> None:
        """A line that counts, where lines can be written over; else one line a try."""
        self._screen.note(problem)
        end, text = time.monotonic() + seconds, "trying again in {} s (Ctrl-C stops waiting)"
        if not self._screen.styled:
            self._screen.note(text.format(round(seconds)))
            time.sleep(seconds)
            return
        try:
            while (left := end - time.monotonic()) > 0:
                self._screen.aside("\r" + text.format(math.ceil(left)))
                time.sleep(min(left, 1.0))
        finally:
            self._screen.aside("\r\x1b[K", dim=False)

    def _answer(self, messages: list[Message]) -> Iterator[Response | Aside]:
        """One request. A stream that ends before its end is a broken connection."""
        from lmdeploy.serving.client import Unreachable

        assert self._model is not None, "connect() comes first"
        options = {"stream": True, "stream_options": {"include_usage": True}, **self._fields}
        count, prompt, finish = 0, 0, None
        for event in self._client.chat_completions_v1(self._model, [*self._system, *messages], **options):
            choice = (event.get("choices") or [{}])[0]
            delta, usage = choice.get("delta") or {}, event.get("usage") or {}
            if aside := _aside(delta):
                yield Aside(aside)
            text = delta.get("content") or ""
            count = usage.get("completion_tokens", count + bool(text))
            prompt, finish = usage.get("prompt_tokens", prompt), choice.get("finish_reason") or finish
            if text or finish or usage:
                yield Response(text=text, generate_token_len=count, input_token_len=prompt, finish_reason=finish)
        if finish is None:
            raise Unreachable(f"the connection to {self._client.url} ended in the middle of the answer")


def _aside(delta: dict[str, Any]) -> str:
    """Reasoning, and calls of tools as they are written."""
    calls = [call.get("function") or {} for call in delta.get("tool_calls") or ()]
    return (delta.get("reasoning_content") or "") + "".join((f"\ncall of {c['name']}: " if c.get("name") else "") + (c.get("arguments") or "") for c in calls)


def _delays() -> Iterator[float]:
    yield from BACK_OFF
    while True:
        yield BACK_OFF[-1]
