"""The table of limits in docs/operate.md, made from the constants that enforce them. `python -m tests.docs.limits` writes it anew."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from annotated_types import Le, MaxLen

from lmdeploy import config, grammar
from lmdeploy.engine import grammar_check, supervisor
from lmdeploy.serving import admin, admission, connections, http_protocol, keys, service, ui, ui_chat, ui_server
from lmdeploy.serving.logprob_limit import MAX_LOGPROBS
from lmdeploy.serving.openai import completions, errors, protocol
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.parsers import constraint
from lmdeploy.text import jinja_sandbox
from lmdeploy.vision import prompt
from lmdeploy.vision.policy import MediaPolicy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operate.md"
BEGIN, END = "<!-- limits: made by tests/docs/limits.py -->\n", "<!-- end of limits -->\n"


def default(name: str, owner: type = ServerConfig) -> Any:
    """The default of an option."""
    return next(f.default for f in dataclasses.fields(owner) if f.name == name)


def bound(model: type[protocol.Body], field: str, kind: type, of: type | None = None) -> int:
    """The upper bound that a field of a request body has, wherever it stands in its type; with `of`, that of its lists (say) and not of its texts."""

    def search(annotation: Any) -> int | None:
        wanted = of is None or typing.get_origin(getattr(annotation, "__origin__", None)) is of
        for part in getattr(annotation, "__metadata__", ()):
            for limit in (part, *getattr(part, "metadata", ())):
                if wanted and isinstance(limit, kind):
                    return int(limit.max_length if isinstance(limit, MaxLen) else limit.le)  # type: ignore[attr-defined]
        return next((found for inner in getattr(annotation, "__args__", ()) if (found := search(inner)) is not None), None)

    found = search(typing.get_type_hints(model, include_extras=True)[field])
    assert found is not None, f"{field} has no bound"
    return found


def size(count: int) -> str:
    """Bytes as people write them."""
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def rows() -> list[tuple[str, str, str, str]]:
    """(what, limit, option or '', what happens beyond)."""
    chat, policy = protocol.ChatRequest, MediaPolicy()
    return [
        ("open connections", f"{default('max_connections')}", "--max-connections", "503, closed"),
        ("requests ahead of their answers on one connection", f"{connections.MAX_PIPELINED}", "", "closed"),
        ("request line and headers", size(http_protocol.MAX_HEAD), "", "400, closed"),
        ("TLS handshake", f"{default('receive_timeout'):g} s", "--receive-timeout", "closed"),
        ("time for the headers", f"{default('receive_timeout'):g} s", "--receive-timeout", "408, closed"),
        ("least pace of a body", f"{connections.MIN_BODY_RATE} bytes a second", "", "408, closed"),
        ("time without reading an answer", f"{default('send_timeout'):g} s", "--send-timeout", "cut off, the answer is stopped"),
        ("idle connection", f"{default('keep_alive_seconds'):g} s", "--keep-alive-seconds", "closed"),
        ("body", f"{default('max_body_mib')} MiB", "--max-body-mib", "413"),
        ("values in a body, counted by commas", f"{errors.MAX_VALUES}", "", "400"),
        ("requests worked on", "max_batch_size and a quarter", "--max-concurrent-requests", "wait"),
        ("requests worked on that need no engine (tokenise, count)", f"{service.MAX_LIGHT}", "", "wait"),
        ("requests that wait", f"{default('max_queue')}", "--max-queue", "503"),
        ("time in the queue", f"{default('max_queue_seconds'):g} s", "--max-queue-seconds", "503"),
        ("requests of one key", "no limit", "--max-concurrent-per-key", "429"),
        ("whole request, waiting included", f"{default('request_timeout'):g} s", "--request-timeout", "504, or an error event in a stream"),
        ("Retry-After", f"{admission.MIN_RETRY} to {admission.MAX_RETRY} s", "", ""),
        ("API keys", f"{keys.MAX_KEYS}", "", "error at the start"),
        ("conversations kept by /v1/chat/interactive", f"{default('max_sessions')}", "--max-sessions", "the oldest of the key that has most is forgotten"),
        ("messages", f"{protocol.MAX_MESSAGES}", "", "400"),
        ("content parts of a message", f"{bound(protocol.ChatMessage, 'content', MaxLen, list)}", "", "400"),
        ("tool_calls of a message", f"{bound(protocol.ChatMessage, 'tool_calls', MaxLen)}", "", "400"),
        ("tools", f"{bound(chat, 'tools', MaxLen)}", "", "400"),
        ("ways to call that are kept by a grammar (tags)", f"{constraint.MAX_TAGS}", "", "one way for each tool is kept"),
        ("prompts of /v1/completions", f"{protocol.MAX_PROMPTS}", "", "400"),
        ("inputs of /v1/embeddings", f"{protocol.MAX_INPUTS}", "", "400"),
        ("inputs of /v1/encode", f"{bound(protocol.EncodeRequest, 'input', MaxLen, list)}", "", "400"),
        ("token ids of a prompt", f"{protocol.MAX_IDS >> 20} Mi; the model's context is stricter", "", "400"),
        ("answers of one request (prompts x n)", f"{completions.MAX_ANSWERS}", "", "400"),
        ("n", f"{bound(chat, 'n', Le)}", "", "400"),
        ("top_logprobs, logprobs", f"{bound(chat, 'top_logprobs', Le)}", "", "400"),
        (
            "log-probabilities of one request (tokens of prompts and answers, times 1 + logprobs)",
            f"{MAX_LOGPROBS}",
            "",
            "400; without max_tokens shorter answers",
        ),
        ("stop strings", f"{protocol.MAX_STOPS}, together {config.MAX_WORD_CHARS} characters", "", "400"),
        ("stop_token_ids", f"{bound(chat, 'stop_token_ids', MaxLen)}", "", "400"),
        ("bad_words", f"{bound(chat, 'bad_words', MaxLen)}, together {config.MAX_WORD_CHARS} characters", "", "400"),
        ("logit_bias", f"{bound(chat, 'logit_bias', MaxLen)} entries", "", "400"),
        ("grammar (schema, regex, EBNF)", f"{size(grammar.MAX_GRAMMAR_BYTES)}, depth {grammar.MAX_GRAMMAR_DEPTH}", "", "400"),
        ("choices of a grammar", f"{grammar.MAX_CHOICES}", "", "400"),
        ("processor time to compile a grammar", f"{grammar_check.CHECK_SECONDS:g} s", "", "400"),
        ("grammars that wait to be compiled", f"{grammar_check.MAX_WAITING}; {grammar_check.MAX_OF_ONE} of one caller", "", "503"),
        ("pictures of a request", f"{prompt.MAX_PICTURES}; 0 for a model that does not see", "", "400"),
        ("one picture", f"{size(policy.max_bytes)}, {policy.max_pixels >> 20} Mi pixels", "", "400"),
        ("fetching a picture", f"{policy.total_seconds:g} s, {policy.max_redirects} redirects", "", "400"),
        ("requests that fetch or decode pictures at a time", f"{service.MAX_FETCHING}", "", "wait"),
        ("rendering a chat template", f"{jinja_sandbox.MAX_SECONDS:g} s, {size(jinja_sandbox.MAX_OUTPUT)}", "", "400"),
        ("admin orders that are waited for at a time", f"{service.MAX_ORDERS}, each up to {admin.MAX_DRAIN_SECONDS:g} s", "", "wait"),
        (f"restarts of a failed engine in {supervisor.WINDOW_SECONDS:g} s", f"{default('max_engine_restarts')}", "--max-engine-restarts", "the server ends"),
        ("web page: connections; tabs", f"{ui_server.MAX_CONNECTIONS}; {ui_server.MAX_TABS}", "", "503; the tab used longest ago is forgotten"),
        ("web page: answers that run, and that wait", f"{ui.QUEUE} each", "", "told in the page"),
        ("web page: an event", size(ui_server.MAX_EVENT), "", "413"),
        ("web page: a question", f"{ui_chat.MAX_QUESTION >> 10} Ki characters", "", "cut"),
        ("web page: pictures of a question", f"{ui_chat.MAX_IMAGES} of {size(ui_server.MAX_IMAGE)}", "", "refused"),
        ("web page: kept of a conversation", f"{ui_chat.MAX_EXCHANGES} exchanges, {ui_chat.MAX_KEPT >> 20} Mi characters", "", "the oldest are forgotten"),
    ]


def table() -> str:
    """The Markdown table."""
    lines = ["| what | limit | option | beyond it |", "|---|---|---|---|"]
    lines += [f"| {what} | {limit} | {f'`{option}`' if option else ''} | {beyond} |" for what, limit, option, beyond in rows()]
    return "\n".join(lines) + "\n"


def write(page: Path = PAGE) -> None:
    """Put the table between its marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write()
