"""What the server costs a token: `python -m benchmark.http_overhead`.

A real server process (uvicorn, routes, detokeniser, stop words, events over real sockets) over an engine that computes nothing
(`benchmark.fake_engine`), read by lean client processes (`benchmark.sse_load`). Prints tokens/s and the server's CPU time per token, which
hardly depends on what else the two cores do, beside the floor: the same server program sending chunks that were made beforehand.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from benchmark import common

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "docs" / "architecture.md"
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}

#: file (or folder) of the innermost frame -> what it is called in the summary; the first that fits
_LAYERS = (
    ("text/detokenizer", "detokenise"), ("codecs", "detokenise"), ("text/stops", "stop match"), ("lmdeploy/answer", "answer"), ("lmdeploy/frontend", "frontend"),
    ("openai/stream", "events and JSON"), ("serving/turns", "turns"), ("serving/parsers", "turns"), ("serving/metrics", "metrics"), ("serving/middleware", "gate"),
    ("serving/", "routes"), ("lmdeploy/", "other lmdeploy"), ("uvicorn", "uvicorn"), ("starlette", "starlette"), ("fastapi", "starlette"),
    ("asyncio", "event loop, sockets"), ("selectors", "event loop, sockets"), ("pydantic", "pydantic"),
)  # fmt: skip


# ---------------------------------------------------------------------- the server's process


def serve(args: argparse.Namespace) -> None:
    """Child: print the port, serve until SIGTERM, then print the samples of the profile."""
    samples: collections.Counter[str] = collections.Counter()
    server, engine, sock = _floor_server(args) if args.floor else _real_server(args)
    print(sock.getsockname()[1], flush=True)

    async def run() -> None:
        if engine is not None and not args.rate:
            engine.loop = asyncio.get_running_loop()
        if args.profile:
            signal.signal(signal.SIGPROF, lambda _, frame: samples.update([_layer(frame)]))
            signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)
        await server.serve(sockets=[sock])
        signal.setitimer(signal.ITIMER_PROF, 0)

    loop = (server.config.get_loop_factory() or asyncio.new_event_loop)()
    loop.run_until_complete(run())
    loop.close()
    if engine is not None:
        engine.close()
    print(json.dumps(samples), flush=True)


def _real_server(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from benchmark.fake_engine import FakeEngine
    from lmdeploy.checkpoint.hub import resolve_model
    from lmdeploy.frontend import Frontend
    from lmdeploy.serving.options import ServerConfig
    from lmdeploy.serving.server import build_server, reserve_port
    from lmdeploy.spec import load_spec
    from lmdeploy.text.chat_template import load_chat_template
    from lmdeploy.text.tokenizer import Tokenizer

    folder = resolve_model(None, None, None)
    spec, tokenizer = load_spec(folder), Tokenizer(folder)
    text_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")[:20000], add_bos=False)
    engine = FakeEngine(text_ids, spec.vocab_size, rate=args.rate)
    frontend = Frontend(engine, tokenizer, load_chat_template(folder, spec, tokenizer, None), spec, model_name="tiny", model_path=str(folder))
    config = ServerConfig(server_port=0, model_name="tiny")
    server = build_server(frontend, config)
    server.config.http, server.config.loop = args.http, args.loop  # before they are looked up
    return server, engine, reserve_port(config)


def _floor_server(args: argparse.Namespace) -> tuple[Any, None, Any]:
    """A bare ASGI application on the same HTTP server: every stream sends the same chunk, one per turn of the event loop."""
    import uvicorn

    from lmdeploy.serving.options import ServerConfig
    from lmdeploy.serving.server import reserve_port

    head = json.dumps({"id": "chatcmpl-" + 22 * "0", "object": "chat.completion.chunk", "created": 1700000000, "model": "tiny"})[:-1]
    chunk = f'data: {head}, "choices":[{{"index":0,"delta":{{"role":"assistant","content":" word"}},"finish_reason":null}}]}}\n\n'.encode()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(args.tokens):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", http=args.http, loop=args.loop)
    return uvicorn.Server(config), None, reserve_port(ServerConfig(server_port=0))


def _layer(frame: FrameType | None) -> str:
    while frame is not None:
        name = frame.f_code.co_filename
        for part, layer in _LAYERS:
            if part in name:
                return layer
        frame = frame.f_back
    return "other"


# ---------------------------------------------------------------------- the measurement


def measure(args: argparse.Namespace, *, floor: bool, streams: int, clients: int, whole: bool = False) -> dict[str, Any]:
    """One server, `clients` processes that share `streams` connections; figures as a dict."""
    command = [sys.executable, "-m", "benchmark.http_overhead", "--serve", "--rate", str(args.rate), "--tokens", str(args.tokens)]
    command += ["--http", args.http, "--loop", args.loop, *(["--floor"] if floor else []), *(["--profile"] if args.profile else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        load = [sys.executable, "-m", "benchmark.sse_load", "127.0.0.1", str(port), PATHS[args.route], *(["--whole"] if whole else [])]
        tokens, rounds = (args.answer, args.requests // streams) if whole else (args.tokens, args.rounds)
        load += ["--body", json.dumps(_body(args.route, tokens, stream=not whole))]
        _run(load, [1], 1)  # warm
        before = psutil.Process(server.pid).cpu_times()
        shares = [streams // clients + (i < streams % clients) for i in range(clients)]
        results = _run(load, shares, rounds)
        after = psutil.Process(server.pid).cpu_times()
        server.send_signal(signal.SIGTERM)
        samples = json.loads(server.communicate(timeout=20)[0] or "{}")
    finally:
        if server.poll() is None:
            server.kill()
    seconds, answers = max(r["seconds"] for r in results), sum(r["answers"] for r in results)
    cpu = after.user + after.system - before.user - before.system
    return {
        "answers": answers, "seconds": seconds, "rate": answers * tokens / seconds, "cpu": cpu / answers / tokens, "cpu_answer": cpu / answers, "busy": cpu / seconds,
        "events": sum(r["events"] for r in results) / answers, "bytes": sum(r["bytes"] for r in results) / answers / tokens,
        "per_second": answers / seconds, "median": max(r["median"] for r in results), "p99": max(r["p99"] for r in results), "samples": samples,
    }  # fmt: skip


def _run(load: list[str], shares: list[int], rounds: int) -> list[dict[str, Any]]:
    running = [subprocess.Popen([*load, "--streams", str(share), "--rounds", str(rounds)], stdout=subprocess.PIPE, text=True, cwd=ROOT) for share in shares]
    results = []
    for process in running:
        out, _ = process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit("a client failed; its line is above")
        results.append(json.loads(out))
    return results


def _body(route: str, tokens: int, *, stream: bool) -> dict[str, Any]:
    content = "Write a long story about a cat."
    if route == "generate":
        return {"prompt": content, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    prompt = {"messages": [{"role": "user", "content": content}]} if route == "chat" else {"prompt": content}
    return {"model": "tiny", **prompt, "max_tokens": tokens, "stream": stream}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.http_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 200], help="concurrent streams, one row for each (default 64 200)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1], help="client processes, one row for each (default 1)")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of a streamed answer (default 500)")
    parser.add_argument("--rounds", type=int, default=2, help="answers on each connection (default 2)")
    parser.add_argument("--requests", type=int, default=4000, help="number of answers that are not streamed (default 4000; 0 = none)")
    parser.add_argument("--answer", type=int, default=4, help="tokens of an answer that is not streamed (default 4)")
    parser.add_argument("--route", choices=sorted(PATHS), default="chat")
    parser.add_argument("--rate", type=float, default=0.0, help="steps per second of the engine; default 0: as fast as the server takes them")
    parser.add_argument("--http", default="httptools", choices=("httptools", "h11"), help="parser of both servers (default httptools, as in production)")
    parser.add_argument(
        "--loop", default="auto", choices=("auto", "asyncio", "uvloop"), help="event loop of both servers (default auto: uvloop where it is installed)"
    )
    parser.add_argument("--profile", action="store_true", help="where the server's event loop spends its time, by layer (slows it by some percent)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print, or be the server."""
    args = parse()
    if args.serve:
        serve(args)
        return
    print(f"{common.machine()}; {', '.join(f'{name} {version(name)}' for name in ('uvicorn', 'httptools', 'starlette', 'fastapi', 'msgspec'))}")
    print(f"other processes keep {common.busy_cores():.2f} cores busy\n")
    rows = [
        ["streams", "clients", "tokens/s", "server CPU us/token", "server cores", "events/token", "bytes/token", "floor tokens/s", "floor us/token", "fraction"]
    ]
    profile: dict[str, int] = {}
    for streams in args.streams:
        for clients in args.clients:
            ours, floor = (measure(args, floor=f, streams=streams, clients=clients) for f in (False, True))
            rows.append(
                [str(streams), str(clients), f"{ours['rate']:,.0f}", f"{1e6 * ours['cpu']:.1f}", f"{ours['busy']:.2f}", f"{ours['events'] / args.tokens:.3f}"]
            )
            rows[-1] += [f"{ours['bytes']:.0f}", f"{floor['rate']:,.0f}", f"{1e6 * floor['cpu']:.1f}", f"{floor['cpu'] / ours['cpu']:.0%}"]
            profile = ours["samples"] or profile
    common.print_table(rows)
    if args.requests:
        whole = measure(args, floor=False, streams=64, clients=1, whole=True)
        print(f"\nnot streamed, 64 connections, {args.answer} tokens: {whole['per_second']:,.0f} answers/s, server CPU {1e6 * whole['cpu_answer']:.0f} us each, "
              f"latency median {1e3 * whole['median']:.1f} ms, p99 {1e3 * whole['p99']:.1f} ms")  # fmt: skip
    if profile:
        total = sum(profile.values())
        print()
        common.print_table([["layer", "share of the event loop's CPU"], *([k, f"{v / total:.1%}"] for k, v in sorted(profile.items(), key=lambda kv: -kv[1]))])


if __name__ == "__main__":
    main()
