"""A lean reader of many event streams, so that a benchmark measures the server: one epoll loop that counts events and parses nothing.

`python -m benchmark.sse_load URL PATH --streams 64 --rounds 2 --body '{...}'` sends the body on `--streams` connections and prints one
JSON line: events, seconds from the first request to the last byte, and seconds to the first event. `--whole` reads plain answers
instead, one request after the other on each connection.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import time
from dataclasses import dataclass, field

#: ends a chunked body
_END = b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class Reader:
    """One connection and what it has seen of the answer under way."""

    sock: socket.socket
    left: int  # requests still to send after this one
    began: float = 0.0
    tail: bytes = b""
    seen: int = 0  # events, or bytes of the answer
    length: int = -1  # of a plain answer, once its head was read
    head: bytes = b""


@dataclass(slots=True)
class Tally:
    """What came back."""

    events: int = 0
    answers: int = 0
    size: int = 0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def connect(host: str, port: int, streams: int, rounds: int) -> list[Reader]:
    """Open connections."""
    readers = []
    for _ in range(streams):
        sock = socket.create_connection((host, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        readers.append(Reader(sock, rounds - 1))
    return readers


def run(readers: list[Reader], request: bytes, *, whole: bool) -> tuple[Tally, float]:
    """Send, read until all answers are complete; the tally and the seconds it took."""
    tally, poll = Tally(), select.epoll()
    by_fd = {reader.sock.fileno(): reader for reader in readers}
    start = time.perf_counter()
    for fd, reader in by_fd.items():
        poll.register(fd, select.EPOLLIN)
        _send(reader, request)
    take = _take_plain if whole else _take_events
    while by_fd:
        for fd, _ in poll.poll():
            reader = by_fd[fd]
            data = reader.sock.recv(1 << 18)
            if not data:
                raise SystemExit(f"the server closed a connection: {(reader.head + reader.tail)[:300]!r}")
            tally.size += len(data)
            if not take(reader, data, tally):
                continue
            tally.answers += 1
            tally.whole.append(time.perf_counter() - reader.began)
            if reader.left:
                reader.left -= 1
                _send(reader, request)
            else:
                poll.unregister(fd)
                del by_fd[fd]
                reader.sock.close()
    return tally, time.perf_counter() - start


def _send(reader: Reader, request: bytes) -> None:
    reader.tail, reader.seen, reader.length, reader.head = b"", 0, -1, b""
    reader.began = time.perf_counter()
    reader.sock.sendall(request)


def _take_events(reader: Reader, data: bytes, tally: Tally) -> bool:
    """Count events; True at the end of the answer. A marker across two reads is found through the tail."""
    if not reader.seen and data[:5] == b"HTTP/" and data[9:12] != b"200":
        raise SystemExit(f"the server refused: {data[:600]!r}")
    joined = reader.tail + data
    found = joined.count(b"\ndata: ")
    if found and not reader.seen:
        tally.first.append(time.perf_counter() - reader.began)
    reader.seen += found
    tally.events += found
    reader.tail = joined[-6:]
    return joined.endswith(_END)


def _take_plain(reader: Reader, data: bytes, tally: Tally) -> bool:
    """Read one answer with a Content-Length; True at its end."""
    if reader.length < 0:
        reader.head += data
        head, gap, body = reader.head.partition(b"\r\n\r\n")
        if not gap:
            return False
        if head[9:12] != b"200":
            raise SystemExit(f"the server refused: {reader.head[:600]!r}")
        reader.length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        data = body
    reader.seen += len(data)
    return reader.seen >= reader.length


def http_request(host: str, port: int, path: str, body: bytes) -> bytes:
    """The bytes of a POST."""
    return b"POST %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        path.encode(), host.encode(), port, len(body), body,
    )  # fmt: skip


def main() -> None:
    """Load one server, print one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.sse_load", description=__doc__.splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--streams", type=int, default=64, help="connections at a time")
    parser.add_argument("--rounds", type=int, default=1, help="requests on each connection, one after the other")
    parser.add_argument("--body", default="{}", help="JSON of the request")
    parser.add_argument("--whole", action="store_true", help="plain answers instead of event streams")
    args = parser.parse_args()
    readers = connect(args.host, args.port, args.streams, args.rounds)
    tally, seconds = run(readers, http_request(args.host, args.port, args.path, args.body.encode()), whole=args.whole)
    times = sorted(tally.whole)
    print(
        json.dumps(
            {
                "answers": tally.answers,
                "events": tally.events,
                "bytes": tally.size,
                "seconds": seconds,
                "first": sorted(tally.first)[len(tally.first) // 2] if tally.first else None,
                "median": times[len(times) // 2],
                "p99": times[len(times) * 99 // 100],
            }  # fmt: skip
        )
    )


if __name__ == "__main__":
    main()
