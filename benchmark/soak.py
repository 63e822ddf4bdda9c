"""A real server under a crowd that leaves, errs and asks nonsense: `python -m benchmark.soak --minutes 5 --clients 200`.

`lmdeploy serve api_server` of the embedded model in processes of its own, with a KV pool that is too small for the crowd. Most requests have
right answers that were computed alone before; in between clients leave in every phase and send what must be refused. Demanded: no answer
lost, doubled, or another's; memory, threads and files flat; all blocks free at the end and the engine's own books in order (it checks
them whenever it is idle, with --log-level DEBUG); a clean end on SIGTERM. `tests/serving/test_soak.py` is the same, shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmark import common
from benchmark.soak_clients import Clients, known_tasks

ROOT = Path(__file__).resolve().parents[1]
#: what a process may grow, in MiB, from the middle fifth of the run to the last one; runs below three minutes still warm up (every thread
#: of the pool that tokenises long prompts takes an arena of some 8 MiB when it first works)
FLAT_MIB, FLAT_MIB_SHORT, SHORT_SECONDS = 10, 60, 180
#: seconds until what clients left behind must be gone
SETTLE = 15.0


@dataclass
class Watched:
    """A process and its resident memory over time."""

    name: str
    process: psutil.Process
    rss: list[float] = field(default_factory=list)  # MiB
    fds: int = 0  # before the crowd came
    threads: int = 0

    def growth(self) -> float:
        """MiB from the median of the middle fifth of the samples to that of the last fifth."""
        fifth = max(len(self.rss) // 5, 1)
        return statistics.median(self.rss[-fifth:]) - statistics.median(self.rss[2 * fifth : 3 * fifth] or self.rss)


class Soak:
    """One run; `problems` is empty when all is well."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.problems: list[str] = []
        self.report: list[str] = []
        self._watched: list[Watched] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Start, load, look, stop."""
        with tempfile.NamedTemporaryFile("w+", prefix="soak-", suffix=".log") as log:
            server = self._start(log.name)
            try:
                port = self._port(server, Path(log.name))
                self._watched = [Watched("server", psutil.Process(server.pid)), *(Watched("engine", p) for p in psutil.Process(server.pid).children())]
                asyncio.run(self._load(port))
                server.send_signal(signal.SIGTERM)
                if (code := server.wait(30)) != 0:
                    self.problems.append(f"SIGTERM: exit status {code}")
            finally:
                self._over.set()
                if server.poll() is None:
                    self.problems.append("the server did not end by itself")
                    server.kill()
                    server.wait()
            left = [w.name for w in self._watched if w.process.is_running() and w.process.status() != psutil.STATUS_ZOMBIE]
            self.problems += [f"process left: {name}" for name in left]
            self._read_log(Path(log.name).read_text(encoding="utf-8", errors="replace"))

    def _start(self, log: str) -> subprocess.Popen[bytes]:
        options = "--server-port 0 --model-name tiny --log-level DEBUG --dtype float32 --session-len 1024 --max-batch-size 32"
        options += " --cache-block-seq-len 16 --cache-max-entry-count 90"  # 1,440 tokens: prefixes are shared, sequences are pre-empted
        command = [sys.executable, "-m", "lmdeploy", "serve", "api_server", *options.split()]
        with open(log, "w") as f:
            return subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})

    def _port(self, server: subprocess.Popen[bytes], log: Path) -> int:
        end = time.monotonic() + 120
        while time.monotonic() < end and server.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()):
                return int(found[1])
            time.sleep(0.05)
        raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")

    async def _load(self, port: int) -> None:
        clients = Clients("127.0.0.1", port, self._args.seed)
        refused = await clients.learn(known_tasks())
        self.report.append(f"{len(clients.tasks)} requests with known answers; not available here: {', '.join(refused) or 'none'}")
        await clients.run(min(self._args.clients, 40), 2.0)  # the thread pools and caches are there now
        await self._settled(clients)
        for watched in self._watched:
            watched.fds, watched.threads = watched.process.num_fds(), watched.process.num_threads()
        sampler = threading.Thread(target=self._sample)
        sampler.start()
        clients.done.clear()
        start = time.monotonic()
        await clients.run(self._args.clients, 60 * self._args.minutes)
        seconds = time.monotonic() - start
        self._over.set()
        sampler.join()
        self._judge(clients, seconds, await self._settled(clients))
        if wrong := await clients.learn([task for task in known_tasks() if task.name.startswith("count")]):
            self.problems.append(f"afterwards: {wrong}")

    def _sample(self) -> None:
        while not self._over.wait(0.5):
            for watched in self._watched:
                watched.rss.append(watched.process.memory_info().rss / 2**20)

    async def _settled(self, clients: Clients) -> dict[str, float]:
        """The server's figures once nothing runs and its connections are closed; after SETTLE seconds whatever they are."""
        end = time.monotonic() + SETTLE
        while True:
            async with clients.connect() as c:
                figures = {name: float(value) for name, value in re.findall(r"^lmdeploy:(\w+)\{.*?\} (\S+)$", await c.get("/metrics"), re.MULTILINE)}
            busy = figures["num_requests_running"] + figures["num_requests_waiting"] + figures["kv_blocks_used"] + figures["num_api_requests_routed"]
            if (not busy and all(not w.fds or w.process.num_fds() <= w.fds for w in self._watched)) or time.monotonic() > end:
                return figures
            await asyncio.sleep(0.1)

    def _judge(self, clients: Clients, seconds: float, figures: dict[str, float]) -> None:
        self.problems += [*clients.wrong]
        for name in ("num_requests_running", "num_requests_waiting", "kv_blocks_used", "num_api_requests_routed"):
            if figures[name]:
                self.problems.append(f"{name} is {figures[name]:.0f} after the crowd left")
        self.report.append(f"{sum(clients.done.values())} requests in {seconds:.0f} s: " + ", ".join(f"{v} {k}" for k, v in sorted(clients.done.items())))
        for name in ("generation_tokens_total", "preemptions_total", "requests_aborted_total", "prefix_cache_hit_rate"):
            self.report.append(f"{name} {figures.get(name, float('nan')):g}")
        bound = FLAT_MIB if seconds >= SHORT_SECONDS else FLAT_MIB_SHORT
        for w in self._watched:
            fds, threads = w.process.num_fds(), w.process.num_threads()
            self.report.append(
                f"{w.name}: MiB by tenths of the time {' '.join(f'{v:.0f}' for v in w.rss[:: max(len(w.rss) // 10, 1)])}, "
                f"growth after warm-up {w.growth():+.1f} (bound {bound}); files {w.fds} -> {fds}, threads {w.threads} -> {threads}"
            )
            if w.growth() > bound:
                self.problems.append(f"{w.name} grew by {w.growth():.1f} MiB")
            if fds > w.fds or threads > w.threads + 8:  # asyncio's thread pool fills up to its limit
                self.problems.append(f"{w.name}: files {w.fds} -> {fds}, threads {w.threads} -> {threads}")

    def _read_log(self, log: str) -> None:
        checks = re.findall(r"idle: blocks, slots and counts are in order, (\d+) of", log)
        if not checks or checks[-1] != "0":
            self.problems.append(f"the engine's books: {len(checks)} checks, blocks in use at the last: {checks[-1:]}")
        self.report.append(f"the engine checked its books {len(checks)} times")
        levels = collections.Counter(re.findall(r" - lmdeploy - (ERROR|CRITICAL) - ", log))
        if levels or "Traceback" in log:
            at = min(i for i in (log.find(" - ERROR - "), log.find("Traceback"), log.find(" - CRITICAL - ")) if i >= 0)
            self.problems.append(f"the log has {dict(levels)}: {log[max(at - 100, 0) : at + 1500]}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    """Run, print, exit 1 when something is wrong."""
    soak = Soak(parse())
    print(common.machine())
    soak.run()
    print("\n".join(soak.report))
    print("\n".join(f"WRONG: {problem}" for problem in soak.problems) or "all well")
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main()
