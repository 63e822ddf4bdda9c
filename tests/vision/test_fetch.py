"""Pictures from URLs: what must never be reached is not, and what may be is bounded in bytes, hops and time. Real sockets on loopback."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from lmdeploy.errors import RequestError
from lmdeploy.vision.fetch import MAX_LOOK_UPS, MAX_URL, check_url, fetch, is_public
from lmdeploy.vision.policy import MediaPolicy

HOME = MediaPolicy(private_hosts=("localhost",), max_bytes=1000, total_seconds=1.0)
Answer = Callable[[socket.socket], None]


@contextmanager
def listening(answer: Answer) -> Iterator[tuple[int, list[bytes]]]:
    """A server that reads a request's head, notes it, and lets `answer` write what it likes."""
    seen: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                seen.append(connection.recv(65536))
                try:
                    answer(connection)
                except OSError:
                    continue

    threading.Thread(target=run, daemon=True).start()
    try:
        yield server.getsockname()[1], seen
    finally:
        server.close()


def saying(text: bytes) -> Answer:
    """Sends these bytes."""
    return lambda connection: connection.sendall(text)


def body(content: bytes, *headers: str) -> bytes:
    """A whole answer."""
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(content)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def test_a_picture_of_a_named_host_arrives_and_the_host_header_has_the_name() -> None:
    with listening(saying(body(b"picture"))) as (port, seen):
        assert fetch(f"http://localhost:{port}/a.png?x=1#part", HOME) == b"picture"
    assert seen[0].startswith(b"GET /a.png?x=1 HTTP/1.1\r\n")
    assert f"host: localhost:{port}\r\n".encode() in seen[0].lower()
    assert b"cookie" not in seen[0].lower() and b"authorization" not in seen[0].lower()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "LOCALHOST.", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
        "[fe80::1]", "[fc00::1]", "[2002:7f00:1::]", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]",
    ],
)  # fmt: skip
def test_no_spelling_of_a_private_address_is_connected_to(host: str) -> None:
    with pytest.raises(RequestError, match="private address|cannot be found"):
        check_url(f"http://{host}/latest/meta-data", MediaPolicy())


def test_public_addresses_are_told_from_private_ones_inside_others() -> None:
    assert is_public(ip_address("93.184.216.34")) and is_public(ip_address("2606:4700::1111")) and is_public(ip_address("64:ff9b::5db8:d822"))
    assert not is_public(ip_address("ff02::1"))


@pytest.mark.parametrize(
    "url, words",
    [
        ("file:///etc/passwd", "only http"),
        ("ftp://example.com/a", "only http"),
        ("gopher://127.0.0.1:6379/_x", "only http"),
        ("//example.com/a", "only http"),
        ("http://user:secret@example.com/a", "user name"),
        ("http:///a", "no host"),
        ("http://example.com:22/", "port 22"),
        ("http://example.com:99999/", "no URL"),
        ("http://[::1/", "no URL"),
        ("http://" + "a" * MAX_URL, str(MAX_URL)),
        ("http://name.invalid/", "cannot be found"),
    ],
)
def test_urls_that_are_no_web_address_are_refused(url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        check_url(url, MediaPolicy())
    assert "secret" not in str(caught.value)


def test_the_list_of_domains_means_hosts_and_their_subdomains() -> None:
    policy = MediaPolicy(allowed_domains=("Good.example",))
    policy.check_host("good.example")
    policy.check_host("img.good.example")
    for host in ("evilgood.example", "good.example.evil.test", "evil.test"):
        with pytest.raises(RequestError, match="allowed-media-domains"):
            policy.check_host(host)


def test_a_redirect_is_checked_like_the_first_address() -> None:
    with listening(saying(body(b"secret"))) as (inside, seen):
        redirect = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{inside}/admin\r\nContent-Length: 0\r\n\r\n".encode()
        with listening(saying(redirect)) as (port, _), pytest.raises(RequestError, match="port|private address"):
            fetch(f"http://localhost:{port}/", HOME)
    assert seen == [], "the inner server was asked"


def test_a_relative_redirect_is_followed_and_a_circle_is_not() -> None:
    hops = iter([b"HTTP/1.1 301 Moved\r\nLocation: /there\r\nContent-Length: 0\r\nSet-Cookie: a=b\r\n\r\n", body(b"ok")])
    with listening(lambda c: c.sendall(next(hops))) as (port, seen):
        assert fetch(f"http://localhost:{port}/here", HOME) == b"ok"
    assert b"GET /there" in seen[1] and b"cookie" not in seen[1].lower()
    with listening(saying(b"HTTP/1.1 307 Again\r\nLocation: /\r\nContent-Length: 0\r\n\r\n")) as (port, seen):
        with pytest.raises(RequestError, match="more than 3 times"):
            fetch(f"http://localhost:{port}/", HOME)
        assert len(seen) == 4


def test_the_address_that_was_checked_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to something else the second time (rebinding) is not asked a second time."""
    asked: list[str] = []

    def resolve(host: str, port: int, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with listening(saying(body(b"once"))) as (port, _):
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        policy = MediaPolicy(private_hosts=("rebind.test",))
        assert fetch(f"http://rebind.test:{port}/", policy) == b"once"
    assert asked.count("rebind.test") == 1


@pytest.mark.parametrize(
    "answer, words",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000000000\r\n\r\n", "5000000000 bytes"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 5000, "at most 1000"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nxx", "could not be fetched"),
        (body(gzip.compress(b"0" * 100_000), "Content-Encoding: gzip"), "compressed"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (b"SSH-2.0-OpenSSH\r\n", "could not be fetched"),
    ],
)
def test_answers_that_are_too_much_or_no_answers_are_refused(answer: bytes, words: str) -> None:
    with listening(saying(answer)) as (port, _), pytest.raises(RequestError, match=words):
        fetch(f"http://localhost:{port}/", HOME)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"], ids=["slow headers", "slow body"])
def test_one_byte_at_a_time_ends_with_the_time_limit(head: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(b"H")
            time.sleep(0.05)

    begin = time.monotonic()
    with listening(drip) as (port, _), pytest.raises(RequestError, match="longer than 1 s"):
        fetch(f"http://localhost:{port}/", HOME)
    assert time.monotonic() - begin < 8


def test_a_name_that_is_not_found_in_time_ends_with_the_time_limit_and_its_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name's own server decides how long the system's resolver waits; nothing can end that."""
    answer, running = threading.Event(), []

    def resolve(*args: object, **kwargs: object) -> list[object]:
        running.append(threading.current_thread())
        answer.wait(30)
        raise OSError("too late")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    quick = MediaPolicy(total_seconds=0.1)
    try:
        begin = time.monotonic()
        with pytest.raises(RequestError, match="longer than 1 s"):
            fetch("http://slow.test/", HOME)
        assert time.monotonic() - begin < 8
        told = set()
        for _ in range(MAX_LOOK_UPS + 3):
            with pytest.raises(RequestError) as caught:
                fetch("http://slow.test/", quick)
            told.add(str(caught.value).split(";")[0])
        assert len(running) == MAX_LOOK_UPS and all(thread.daemon for thread in running)
        assert told == {"the picture took longer than 0.1 s to arrive", f"{MAX_LOOK_UPS} hosts of pictures are being looked up"}
    finally:
        answer.set()
    for thread in running:
        thread.join(10)
    monkeypatch.undo()
    with listening(saying(body(b"again"))) as (port, _):
        assert fetch(f"http://localhost:{port}/", HOME) == b"again"
