"""A file or a folder far away, as formats see it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property, partial
from threading import Thread
from typing import TypeVar

from ...core.storages import Source
from ...errors import ModelctlError, UnreadableError, UsageError
from ..places import Place
from .blocks import FarSource
from .stores import Store, Web
from .urls import Url, shown

T = TypeVar("T")
# Files that are opened at a time, each of which waits for some round trips.
_AT_ONCE = 8
_USUAL = ("http", "https", "s3", "gs", "az", "hf")


class FarPlace(Place):
    """A file or a folder that a URL names."""

    def __init__(self, store: Store, path: str, *, of: Place | None = None) -> None:
        self._store, self._far = store, path
        self.sources = [] if of is None else of.sources
        self._near: dict[str, FarPlace] = of._near if isinstance(of, FarPlace) else {}
        self._source = None
        self.name = store.shown(path)
        self.is_folder = store.is_folder(path)

    @property
    def source(self) -> Source:
        if self._source is None:
            if self.is_folder:
                raise ModelctlError(f"{self.name}: a folder, so it is no file")
            store, path = self._store, self._far
            self._source = FarSource(self.name, lambda: store.open(path), store.size(path))
            self.sources.append(self._source)
        return self._source

    def holding(self, source: Source) -> Place:
        return _Inside(self, source)

    @property
    def filename(self) -> str:
        return self._store.filename(self._far)

    @cached_property
    def names(self) -> list[str]:
        return self._store.names(self._far) if self.is_folder else []

    def member(self, name: str) -> Place:
        return self._one(self._store.join(self._far, name))

    def leads_to(self, name: str) -> str:
        return ""

    def inside(self, name: str) -> Place:
        return self.member(name)

    def beside(self, name: str) -> Place:
        plain = name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")
        if not plain or name == self.filename:
            raise UnreadableError(
                f"names {name!r:.200}: not a plain file name beside it", path=self.name
            )
        return self._one(self._store.beside(self._far, name))

    def together(self, read: Callable[[Place], T], places: Sequence[Place]) -> list[T]:
        found = _at_once([partial(read, one) for one in places])
        order = {id(one.source): n for n, one in enumerate(places)}  # not as they came
        self.sources.sort(key=lambda one: order.get(id(one), -1))
        return found

    def _one(self, path: str) -> FarPlace:
        if path not in self._near:
            self._near[path] = FarPlace(self._store, path, of=self)
        return self._near[path]

    def close(self) -> None:
        super().close()
        self._store.close()


class _Inside(FarPlace):
    """Bytes that were made of those of a far place."""

    def __init__(self, of: FarPlace, source: Source) -> None:
        self._store, self._far = of._store, of._far
        self.sources, self._near = of.sources, of._near
        self._source, self.name = source, source.name
        self.is_folder = False


def _at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls give, a few of them at a time; raises the first error in their order.

    Their threads are daemons: an interrupted program does not wait for a server.
    """
    results: list[Future[T]] = [Future() for _ in calls]
    waiting = deque(zip(calls, results, strict=True))

    def work() -> None:
        with suppress(IndexError):
            while True:
                call, result = waiting.popleft()
                try:
                    result.set_result(call())
                except BaseException as e:
                    result.set_exception(e)

    for _ in range(min(_AT_ONCE, len(calls))):
        Thread(target=work, daemon=True).start()
    try:
        return [one.result() for one in results]
    finally:
        waiting.clear()


def store_of(url: Url) -> tuple[Store, str]:
    """What knows the files of a URL, and the path that it is there.

    Raises:
        UsageError: a URL of a kind that nobody knows.
        MissingExtraError: what reads this kind is not installed.
        ModelctlError: it can't be reached.
    """
    if url.scheme in ("http", "https"):
        return Web(), url.text
    if url.scheme in ("file", "local"):
        raise UsageError(
            f"{shown(url.text)}: a file of this machine is named by its path",
            hint=f"without {url.scheme}://",
        )
    if url.scheme == "hf":
        from .hub import hub

        return hub(url.rest)
    import difflib

    near = difflib.get_close_matches(url.scheme, _USUAL, n=1, cutoff=0.6)
    from .filesystems import filesystem

    return filesystem(url, near[0] if near else None)


def far_place(url: Url) -> FarPlace:
    """The place that a URL names. Raises what :func:`store_of` raises."""
    store, path = store_of(url)
    try:
        return FarPlace(store, path)
    except BaseException:
        store.close()
        raise
