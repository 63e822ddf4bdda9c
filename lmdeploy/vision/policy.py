"""`MediaPolicy`: where pictures may come from and how large they may be. One object, made from options, checked where it is used.

Sources (paths and addresses) are refused before anything is opened; sizes are enforced while bytes arrive, pixels before they are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmdeploy.errors import RequestError

#: error code of everything that a policy refuses
MEDIA_REFUSED = "media_refused"


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """The limits of one server or program; the defaults are for requests from outside.

    `allowed_domains`: None = every public host; else these hosts and their subdomains only.
    `private_hosts`: hosts whose addresses may be private (an image store of one's own network); each is named, none by default.
    `allowed_path`: local files are read below this folder only; None = no local files. `own_files`: the caller is the user's own
    program, which may read any file.
    """

    allowed_domains: tuple[str, ...] | None = None
    private_hosts: tuple[str, ...] = ()
    allowed_path: Path | None = None
    own_files: bool = False
    max_bytes: int = 20 << 20
    max_pixels: int = 64 << 20
    max_redirects: int = 3
    connect_seconds: float = 5.0
    total_seconds: float = 10.0

    def check_host(self, host: str) -> None:
        """Raise RequestError for a host outside the list of allowed domains."""
        if self.allowed_domains is not None and not any(host == d or host.endswith("." + d) for d in map(_domain, self.allowed_domains)):
            raise refused(f"the host {host[:100]!r} is not among the allowed media domains; the server's --allowed-media-domains names them")

    def resolve_path(self, path: str) -> Path:
        """The real file of a path, links followed. Raises RequestError unless it lies below `allowed_path`."""
        if self.allowed_path is None:
            raise refused("local files are not read; send the picture as a data: or http(s) URL, or start the server with --allowed-media-path")
        root = self.allowed_path.resolve()
        try:
            real = (root / path).resolve(strict=True)
        except (OSError, RuntimeError, ValueError) as e:  # missing, a loop of links, a NUL byte
            raise refused(f"the file {path[:100]!r} cannot be read below the allowed media path") from e
        if not real.is_relative_to(root) or not real.is_file():
            raise refused(f"the file {path[:100]!r} cannot be read below the allowed media path")
        return real


def refused(message: str) -> RequestError:
    """The error of a picture that a policy does not allow."""
    return RequestError(message, param="image_url", code=MEDIA_REFUSED)


def _domain(text: str) -> str:
    return text.strip().rstrip(".").lower()


#: of a program that runs on its user's behalf
OWN = MediaPolicy(own_files=True)
