"""What names something far away, and how it is shown: cheap, every command asks it."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
# pathlib makes one slash of two
_AS_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/([^/].*)", re.DOTALL)
_CREDENTIALS = re.compile(r"(://)[^/?#]*@")

# What is read, and written by nobody here.
READ_ONLY = frozenset(("http", "https", "hf"))


class Url(NamedTuple):
    """A URL as it was said: its scheme in lower case, and what follows ``://``."""

    scheme: str
    rest: str

    @property
    def text(self) -> str:
        """The whole URL. It may hold credentials: for requests alone, never to be shown."""
        return f"{self.scheme}://{self.rest}"


def url_of(path: object) -> Url | None:
    """The URL that a path is, or None where it is a path of this machine."""
    found = None
    if isinstance(path, str):
        found = _URL.fullmatch(path)
    elif isinstance(path, os.PathLike):
        text = os.fspath(path)
        if isinstance(text, str):
            found = _URL.fullmatch(text) or _AS_PATH.fullmatch(text)
    return None if found is None else Url(found[1].lower(), found[2])


def is_far(path: object) -> bool:
    """Whether a path is a URL."""
    return url_of(path) is not None


def shown(path: str | os.PathLike[str]) -> str:
    """What errors and reports call a path: of a URL nothing that may be a secret, neither
    ``user:password@`` nor a query, which signs it."""
    url = url_of(path)
    if url is None:
        return os.fspath(path)
    plain = url.text.partition("#")[0]
    if url.scheme in ("http", "https"):
        plain = plain.partition("?")[0]
    return _CREDENTIALS.sub(r"\1***@", plain)


def said(path: str | os.PathLike[str]) -> str:
    """A path as text; of a URL, whose two slashes pathlib makes one, all of it."""
    url = url_of(path)
    return os.fspath(path) if url is None else url.text
