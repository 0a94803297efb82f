"""What knows far files by their paths: one kind for each kind of URL."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from urllib.parse import urlsplit, urlunsplit

from ...errors import ModelctlError
from .blocks import FarObject
from .urls import shown


class Store(ABC):
    """Far files by their paths, whose parts a slash divides."""

    @abstractmethod
    def open(self, path: str) -> FarObject:
        """What lies at a path.

        Raises:
            ModelctlError: nothing does, or it can't be read.
        """

    def is_folder(self, path: str) -> bool:
        """Whether a path is known to be a folder."""
        return False

    def names(self, path: str) -> list[str]:
        """The names in a folder, sorted; none where nothing tells."""
        return []

    def size(self, path: str) -> int | None:
        """How long a file is, where that is known without opening it."""
        return None

    def join(self, folder: str, name: str) -> str:
        """The path of a name in a folder."""
        return f"{folder}/{name}" if folder else name

    def beside(self, path: str, name: str) -> str:
        """The path of another name in the folder of a path."""
        return self.join(path.rpartition("/")[0], name)

    def filename(self, path: str) -> str:
        """The last part of a path."""
        return path.rpartition("/")[2]

    @abstractmethod
    def shown(self, path: str) -> str:
        """What a path is called in errors and reports: a URL that can be said again, without
        secrets."""

    def close(self) -> None:  # noqa: B027
        """Let go of what is open."""


class Web(Store):
    """A server of files over http(s): a path is a URL, and nothing lists them."""

    def open(self, path: str) -> FarObject:
        from .http import http_object

        return http_object(path)

    def beside(self, path: str, name: str) -> str:
        from urllib.parse import quote

        parts = urlsplit(path)  # a query that signs one file signs no other
        folder = parts.path.rpartition("/")[0]
        return urlunsplit((parts.scheme, parts.netloc, f"{folder}/{quote(name)}", parts.query, ""))

    def join(self, folder: str, name: str) -> str:
        return self.beside(folder.rstrip("/") + "/", name)

    def filename(self, path: str) -> str:
        from urllib.parse import unquote

        return unquote(urlsplit(path).path).rpartition("/")[2]

    def shown(self, path: str) -> str:
        return shown(path)


def no_such_place(store: Store, path: str) -> ModelctlError:
    """The error for what isn't there; its hint has the names beside it that are alike."""
    folder, name = path.rpartition("/")[0], store.filename(path)
    near = difflib.get_close_matches(
        name, store.names(folder) if store.is_folder(folder) else [], n=2, cutoff=0.6
    )
    meant = " or ".join(store.shown(store.join(folder, one)) for one in near)
    return ModelctlError(
        f"{store.shown(path)}: no such file or folder", hint=f"{meant}?" if near else None
    )
