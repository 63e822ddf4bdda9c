"""`Origins`: which web pages may call the server from a reader's browser.

A server without keys is open to every program of this machine, and a browser is one that runs anybody's pages. So, unless the operator
says otherwise, such a server serves pages of this machine only: others get no CORS headers, and what they send all the same (a
browser sends some requests without asking first, and a page may point its own name at this machine) is refused by its Origin header.
With keys every page may call: it cannot do anything without one.
"""

from __future__ import annotations

import ipaddress
import re

from lmdeploy.serving.options import ServerConfig

#: pages of this machine, on any port
LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?"
_LOCAL = re.compile(LOCAL)


class Origins:
    """What `allow_origins` means for a server with keys or without."""

    def __init__(self, config: ServerConfig, *, keyed: bool) -> None:
        self.listed: list[str] = config.allow_origins if config.allow_origins is not None else ["*"] if keyed else []
        #: for CORSMiddleware's allow_origin_regex
        self.pattern = LOCAL if config.allow_origins is None and not keyed else None
        self._everybody = keyed or "*" in self.listed
        self._hidden = _is_loopback(config.server_name)

    def may_call(self, origin: bytes, host: bytes) -> bool:
        """Whether a request with these headers may pass; programs that are no browsers send no Origin."""
        if self._everybody or not origin:
            return True
        page = origin.decode("latin-1")
        if page in self.listed or self.pattern is not None and _LOCAL.fullmatch(page):
            return True
        # our own page; a server that listens on this machine only has no other name than this machine's, whatever a name server says
        return page.partition("://")[2] == host.decode("latin-1") and (not self._hidden or _LOCAL.fullmatch(page) is not None)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
