"""Requests over http(s), and objects that are read by them: ranges, tried again where the network
or the server fails for a moment, each answer compared with the first.

Written on ``http.client``: connections stay open, and what is sent to whom is decided here. See
docs/safety.md#far.
"""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache
from threading import Lock
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from ...errors import ModelctlError, UnreadableError
from .blocks import HEAD, FarObject
from .urls import shown

# Seconds without a byte; and the slowest that an answer may come, in bytes a second.
TIMEOUT, SLOWEST = 30.0, 4096
TRIES = 5
# Seconds before the second try; twice as much before each one after it, a server's wish at most so.
PAUSE, _LONGEST = 0.5, 30.0
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_MOVED = frozenset((301, 302, 303, 307, 308))
_MOST_HOPS = 8
# What comes whole, from a server without ranges, is kept in memory up to so many bytes.
_MOST_WHOLE = 8 << 20
_PIECE = 256 << 10
_SAFE = "/:@!$&'()*+,;=~-._%"


class Answer(NamedTuple):
    """What a server said: of a redirect, the one that it led to."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    url: str
    whole: bool  # whether the body is all of it


class Client:
    """Sends requests, and keeps connections for the next ones. Several threads may use it.

    Args:
        authorization: what is sent to the host of ``home``, and to no other.
    """

    def __init__(self, home: str, authorization: str | None = None) -> None:
        parts = urlsplit(home)
        if parts.username is not None and authorization is None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = "Basic " + b64encode(pair.encode()).decode()
        self._authorization, self._home = authorization, _origin(parts)
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._busy: set[http.client.HTTPConnection] = set()
        self._lock, self._closed = Lock(), False

    def get(self, url: str, headers: Mapping[str, str], *, most: int) -> Answer:
        """Up to ``most`` bytes of what is at a URL; tried again where that may help.

        Raises:
            ModelctlError: no answer.
        """
        pause = PAUSE
        for left in reversed(range(TRIES)):
            wish = 0.0
            try:
                answer = self._once(url, headers, most)
                if answer.status not in _AGAIN or not left:
                    return answer
                wish = _wish(answer.headers.get("retry-after"))
            except (OSError, http.client.HTTPException, ValueError) as e:
                if not left or self._closed or isinstance(e, _FINAL):
                    raise _unreachable(url, e) from None
            time.sleep(max(min(wish, _LONGEST), pause * random.uniform(0.8, 1.2)))
            pause *= 2
        raise AssertionError

    def close(self) -> None:
        """Close all connections: who waits for an answer gets an error at once."""
        with self._lock:
            self._closed = True
            connections = [*self._busy, *(one for idle in self._idle.values() for one in idle)]
            self._idle.clear()
        for one in connections:
            sock = one.sock
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            one.close()

    # ------------------------------------------------------------------ one request

    def _once(self, url: str, headers: Mapping[str, str], most: int) -> Answer:
        for _ in range(_MOST_HOPS):
            answer = self._ask(url, headers, most)
            to = answer.headers.get("location")
            if answer.status not in _MOVED or to is None:
                return answer
            after = urlsplit(urljoin(url, to))
            if after.scheme not in ("http", "https"):
                raise _unsafe(url, f"it leads to a {after.scheme or 'strange'} URL")
            if after.scheme == "http" and urlsplit(url).scheme == "https":
                raise _unsafe(url, "it leads from https to http")
            url = urlunsplit(after)
        raise _unsafe(url, f"it leads on and on, {_MOST_HOPS} times")

    def _ask(self, url: str, headers: Mapping[str, str], most: int) -> Answer:
        parts = urlsplit(url)
        sent = {"User-Agent": "modelctl", "Accept-Encoding": "identity", **headers}
        if self._authorization is not None and _origin(parts) == self._home:
            sent["Authorization"] = self._authorization
        path = quote(parts.path or "/", safe=_SAFE)
        if parts.query:
            path += "?" + quote(parts.query, safe=_SAFE + "?")
        connection, prefix, extra = self._connection(parts)
        was_idle = connection.sock is not None
        sent.update(extra)
        with self._lock:
            self._busy.add(connection)
        keep = False
        try:
            connection.request("GET", prefix + path, headers=sent)
            response = connection.getresponse()
            found = {name.lower(): text for name, text in response.getheaders()}
            body, whole = _body(response, most)
            keep = whole and not response.will_close
            return Answer(response.status, found, body, url, whole)
        except (http.client.RemoteDisconnected, ConnectionError):
            if not was_idle or self._closed:
                raise
        finally:
            with self._lock:
                self._busy.discard(connection)
                if keep and not self._closed:
                    self._idle.setdefault(_origin(parts), []).append(connection)
                    connection = None  # type: ignore[assignment]
            if connection is not None:
                connection.close()
        return self._ask(url, headers, most)  # it had waited too long for another request

    def _connection(
        self, parts: SplitResult
    ) -> tuple[http.client.HTTPConnection, str, Mapping[str, str]]:
        """A connection to a host, or to the proxy for it; what a path begins with there, and what
        headers the proxy wants."""
        proxy = _proxy(parts)
        host, extra = parts.hostname or "", _proxy_login(proxy)
        prefix = f"http://{_origin(parts)[1]}" if proxy and parts.scheme == "http" else ""
        with self._lock:
            if self._closed:
                raise OSError("closed")
            idle = self._idle.get(_origin(parts))
            if idle:
                return idle.pop(), prefix, extra if prefix else {}
        made: http.client.HTTPConnection
        to, port = (proxy.hostname or "", proxy.port) if proxy else (host, parts.port)
        if parts.scheme == "https":
            made = http.client.HTTPSConnection(to, port, timeout=TIMEOUT, context=_context())
            if proxy:
                made.set_tunnel(host, parts.port, dict(extra))
        else:
            made = http.client.HTTPConnection(to, port, timeout=TIMEOUT)
        return made, prefix, extra if prefix else {}


def _body(response: http.client.HTTPResponse, most: int) -> tuple[bytes, bool]:
    """Up to ``most`` bytes of an answer, and whether that was all; not slower than may be."""
    until = time.monotonic() + TIMEOUT + most / SLOWEST
    pieces: list[bytes] = []
    size = 0
    while size < most:
        piece = response.read1(min(_PIECE, most - size))
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > until:
            raise TimeoutError("too slow")
    length = response.length  # what of the declared length is left
    if length and size < most:
        raise http.client.IncompleteRead(b"", length)
    whole = response.isclosed() or length == 0 or not response.read1(1)
    response.close()  # by itself it does not see its end, and its connection takes no other
    return b"".join(pieces), whole


class HttpObject(FarObject):
    """What is at an http(s) URL, read in ranges.

    Raises:
        UnreadableError: there is no such thing; the server gives no ranges.
        ModelctlError: it can't be reached, or may not be read.
    """

    def __init__(
        self, url: str, client: Client, *, name: str | None = None, way_out: str = ""
    ) -> None:
        self.name, self._client = shown(url) if name is None else name, client
        self._url = self._at = _bare(url)
        self._way_out = way_out
        answer = self._answer(0, HEAD)
        self._whole: bytes | None = None
        size = _size(answer)
        if answer.status == 206 and size is not None:
            self.size = size
        elif answer.status == 416 and size == 0:
            self.size = 0
        elif answer.status == 200 and (answer.whole or not size or size <= _MOST_WHOLE):
            self._whole = answer.body if answer.whole else self._all()
            self.size = len(self._whole)
        else:
            raise self._without_ranges(size)
        self.head = (answer.body if self._whole is None else self._whole) if self.size else b""
        if len(self.head) != min(HEAD, self.size) and self._whole is None:
            raise self._odd(f"{len(self.head):,} bytes for the first {HEAD:,}")
        self._state = _state(answer)
        self._at = answer.url

    def fetch(self, start: int, stop: int) -> bytes:
        if self._whole is not None:
            return self._whole[start:stop]
        answer = self._answer(start, stop)
        if answer.status == 416 or _size(answer) not in (self.size, None):
            raise self._changed(f"it has {_size(answer) or 0:,} bytes, it had {self.size:,}")
        for what, before in self._state.items():
            now = _state(answer).get(what)
            if now is not None and now != before:
                raise self._changed(f"its {what} is {now:.80}, it was {before:.80}")
        if answer.status == 200:
            raise self._without_ranges(self.size)
        if _start(answer) not in (start, None) or len(answer.body) != stop - start:
            raise self._odd(
                f"{len(answer.body):,} bytes where {stop - start:,} at {start:,} are asked"
            )
        return answer.body

    def close(self) -> None:
        self._client.close()

    def _answer(self, start: int, stop: int) -> Answer:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        answer = self._client.get(self._at, headers, most=stop - start)
        if answer.status in (401, 403, 404, 410) and self._at != self._url:
            # where a redirect led to for a while: ask the way again
            answer = self._client.get(self._url, headers, most=stop - start)
            self._at = answer.url
        check_status(answer, self.name, self._way_out)
        encoding = answer.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise self._odd(f"it comes compressed ({encoding:.40}), which was not asked for")
        return answer

    def _all(self) -> bytes:
        answer = self._client.get(self._at, {}, most=_MOST_WHOLE)
        if answer.status != 200 or not answer.whole:
            raise self._without_ranges(None)
        return answer.body

    def _changed(self, how: str) -> UnreadableError:
        return UnreadableError(
            f"it changed while it was read: {how}", path=self.name, hint="do it again"
        )

    def _odd(self, how: str) -> UnreadableError:
        return UnreadableError(f"the server's answer makes no sense: {how}", path=self.name)

    def _without_ranges(self, size: int | None) -> UnreadableError:
        much = "" if size is None else f", {size:,} bytes"
        return UnreadableError(
            f"the server gives this file only whole{much}, not in ranges",
            path=self.name,
            hint=f"download it first, or let it come in once: curl -L {self.name} | "
            "modelctl COMMAND -",
        )


def http_object(url: str) -> HttpObject:
    """What is at an http(s) URL. Raises what :class:`HttpObject` raises."""
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        has_host = False
    if not has_host:
        raise ModelctlError(f"{shown(url)}: no URL with a host in it")
    return HttpObject(url, Client(url))


def check_status(answer: Answer, name: str, way_out: str = "") -> None:
    """Raises where an answer is none: there is nothing, or it may not be read."""
    status = answer.status
    if status in (200, 206, 416):
        return
    why = f"{status} {http.client.responses.get(status, '')}".strip()
    if status in (404, 410):
        raise ModelctlError(f"{name}: no such file there ({why})", hint=way_out or None)
    if status in (401, 403, 407):
        raise ModelctlError(
            f"{name}: it may not be read ({why})",
            hint=way_out or "who may read it: https://USER:PASSWORD@HOST/…",
        )
    tries = f", {TRIES} times" if status in _AGAIN else ""
    raise ModelctlError(f"{name}: the server says {why}{tries}")


# ---------------------------------------------------------------------- what answers say


def _size(answer: Answer) -> int | None:
    """How long the whole of it is, where the answer says it."""
    total = answer.headers.get("content-range", "").rpartition("/")[2]
    if answer.status != 200 and total.isdecimal() and len(total) < 20:
        return int(total)
    length = answer.headers.get("content-length", "")
    return int(length) if answer.status == 200 and length.isdecimal() and len(length) < 20 else None


def _start(answer: Answer) -> int | None:
    start = answer.headers.get("content-range", "").rpartition(" ")[2].partition("-")[0]
    return int(start) if start.isdecimal() and len(start) < 20 else None


def _state(answer: Answer) -> dict[str, str]:
    """What tells one version of an object from another."""
    return {
        name: answer.headers[key]
        for name, key in (("ETag", "etag"), ("date", "last-modified"))
        if key in answer.headers
    }


def _wish(text: str | None) -> float:
    """The seconds that a server wants to be left alone."""
    if text is None:
        return 0.0
    with suppress(ValueError):
        return max(float(text[:20]), 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


# ---------------------------------------------------------------------- hosts and proxies


def _origin(parts: SplitResult) -> tuple[str, str]:
    """The scheme and the host with its port: whom a secret is for."""
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return parts.scheme, host if parts.port is None else f"{host}:{parts.port}"


@cache
def _context() -> ssl.SSLContext:
    """What certificates are trusted, read once."""
    return ssl.create_default_context()


def _bare(url: str) -> str:
    """Without what logs in, and without a fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, _origin(parts)[1], parts.path, parts.query, ""))


def _proxy(parts: SplitResult) -> SplitResult | None:
    """The proxy that the environment, or the system, names for a host."""
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _proxy_login(proxy: SplitResult | None) -> dict[str, str]:
    if proxy is None or proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + b64encode(pair.encode()).decode()}


class _Unsafe(OSError):
    """A redirect that is not followed."""


# What another try does not mend.
_FINAL: tuple[type[Exception], ...] = (
    _Unsafe,
    ssl.SSLCertVerificationError,
    socket.gaierror,
    http.client.InvalidURL,
    ValueError,  # what a redirect leads to is no URL, a name no host's
)


def _unsafe(url: str, why: str) -> _Unsafe:
    return _Unsafe(0, f"not followed: {why}")


def _unreachable(url: str, e: Exception) -> ModelctlError:
    why = str(e) if isinstance(e, ModelctlError) else (getattr(e, "strerror", None) or str(e))
    if isinstance(e, ssl.SSLCertVerificationError):
        why = f"its certificate is not trusted: {e.verify_message}"
    elif isinstance(e, TimeoutError):
        why = "no answer in time"
    elif isinstance(e, http.client.IncompleteRead | http.client.RemoteDisconnected):
        why = "the connection broke off"
    elif isinstance(e, http.client.HTTPException):
        why = f"no answer that makes sense ({type(e).__name__})"
    tries = "" if isinstance(e, _FINAL) else f" ({TRIES} tries)"
    host = _origin(urlsplit(url))[1]
    return ModelctlError(f"{shown(url)}: {host} can't be read from: {why}{tries}")
