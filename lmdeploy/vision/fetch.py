"""Bytes of a picture from an http(s) URL, without reaching what only this machine can reach (server-side request forgery).

Each hop is checked anew: scheme, port, host, and every address that the name resolves to. The connection goes to the address that was
checked (the name cannot resolve to another one in between), certificates are checked against the name. Redirects are followed by hand, proxies
from the environment are ignored, nothing compressed is accepted, bytes are counted while they arrive, and one deadline covers everything,
looking up the name included.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import httpx

from lmdeploy.vision.policy import MediaPolicy, refused

MAX_URL = 8192
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
#: threads that may wait for the system's resolver, those that were left behind included
MAX_LOOK_UPS = 32
_LOOKING_UP = threading.BoundedSemaphore(MAX_LOOK_UPS)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Hop:
    """One checked step: the URL, its host as text, and the address to connect to."""

    url: str
    host: str
    address: str


def fetch(url: str, policy: MediaPolicy) -> bytes:
    """The body of `url`. Raises RequestError when the policy refuses it, the host does not answer in time, or it is no success."""
    with ThreadPoolExecutor(1) as pool:  # a loop of our own, whether or not the caller's thread runs one; only a loop can end slow headers, too
        return pool.submit(asyncio.run, _fetch_in_time(url, policy)).result()


async def _fetch_in_time(url: str, policy: MediaPolicy) -> bytes:
    try:
        return await asyncio.wait_for(_fetch(url, policy), policy.total_seconds)
    except asyncio.TimeoutError as e:  # noqa: UP041  # before Python 3.11 it is not TimeoutError
        raise refused(f"the picture took longer than {policy.total_seconds:g} s to arrive") from e


async def _fetch(url: str, policy: MediaPolicy) -> bytes:
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
        for _ in range(policy.max_redirects + 1):
            answer = await _get(client, await _checked(url, policy), policy)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
    raise refused(f"the picture's URL redirects more than {policy.max_redirects} times")


async def _checked(url: str, policy: MediaPolicy) -> Hop:
    """`check_url` in a thread that is left behind when time is up: nothing ends a look-up in the system's resolver, and a name's own
    server decides how long it takes."""
    if not _LOOKING_UP.acquire(blocking=False):
        raise refused(f"{MAX_LOOK_UPS} hosts of pictures are being looked up; try again later")
    loop = asyncio.get_running_loop()
    checked: asyncio.Future[Hop] = loop.create_future()

    def tell(hop: Hop | None, error: BaseException | None) -> None:
        if checked.done():  # nobody waits any more
            return
        if hop is None:
            checked.set_exception(error or RuntimeError("no result"))
        else:
            checked.set_result(hop)

    def look_up() -> None:
        hop, error = None, None
        try:
            hop = check_url(url, policy)
        except BaseException as e:
            error = e
        finally:
            _LOOKING_UP.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, hop, error)

    threading.Thread(target=look_up, name="picture-host", daemon=True).start()
    return await checked


def check_url(url: str, policy: MediaPolicy) -> Hop:
    """What to connect to for this URL. Raises RequestError for what must not be reached."""
    if len(url) > MAX_URL:
        raise refused(f"the picture's URL has {len(url)} characters; at most {MAX_URL} are accepted")
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), (parts.hostname or "").rstrip(".").lower(), parts.port
    except ValueError as e:
        raise refused(f"{url[:100]!r} is no URL: {e}") from e
    if scheme not in _PORTS:
        raise refused(f"the picture's URL begins with {url[:20]!r}; only http, https and data: are fetched")
    if not host or parts.username is not None or parts.password is not None:
        raise refused("the picture's URL has no host, or a user name in it")
    private = host in {h.rstrip(".").lower() for h in policy.private_hosts}
    if port not in (None, *_PORTS.values()) and not private:
        raise refused(f"the picture's URL names port {port}; only 80 and 443 are fetched from")
    policy.check_host(host)
    return Hop(url, host, _address(host, port or _PORTS[scheme], private))


def _address(host: str, port: int, private: bool) -> str:
    """The first address of a host; all of them must be public, or a name with two faces would pass."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise refused(f"the host {host[:100]!r} of the picture's URL cannot be found") from e
    addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
    if not private and not all(is_public(a) for a in addresses):
        raise refused(f"the host {host[:100]!r} of the picture's URL has a private address, which is never fetched from")
    return str(addresses[0])


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet; addresses that carry another one inside (mapped, 6to4, Teredo, NAT64) count as that one."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(a is not None and not is_public(a) for a in inner):
            return False
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


async def _get(client: httpx.AsyncClient, hop: Hop, policy: MediaPolicy) -> bytes | str:
    """The body, or where a redirect points to."""
    target = httpx.URL(hop.url).copy_with(host=hop.address, fragment=None)
    headers = {"Host": httpx.URL(hop.url).netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
    timeout = httpx.Timeout(policy.total_seconds, connect=policy.connect_seconds)
    try:
        async with client.stream("GET", target, headers=headers, timeout=timeout, extensions={"sni_hostname": hop.host}) as response:
            client.cookies.clear()
            if response.status_code in _REDIRECTS and "location" in response.headers:
                return response.headers["location"]
            if response.status_code != 200:
                raise refused(f"{hop.host} answered the request for the picture with status {response.status_code}")
            return await _body(response, hop, policy)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as e:
        raise refused(f"the picture could not be fetched from {hop.host}: {type(e).__name__}") from e


async def _body(response: httpx.Response, hop: Hop, policy: MediaPolicy) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise refused(f"{hop.host} sent the picture compressed, although it was asked not to")
    announced = response.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced) > policy.max_bytes:
        raise too_large(int(announced), policy)
    parts, size = [], 0
    async for part in response.aiter_raw(1 << 16):
        size += len(part)
        if size > policy.max_bytes:
            raise too_large(size, policy)
        parts.append(part)
    return b"".join(parts)


def too_large(size: int, policy: MediaPolicy) -> Exception:
    """The error of a picture with too many bytes."""
    return refused(f"the picture has {size} bytes or more; at most {policy.max_bytes} are accepted")
