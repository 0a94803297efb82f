"""The Hugging Face hub: repositories by their names, at one commit (docs/safety.md#far)."""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import quote, urlsplit

from ...errors import ModelctlError, UsageError
from .blocks import FarObject
from .http import Client, HttpObject, check_status
from .stores import Store, no_such_place
from .urls import shown

# Where it is; the environment's HF_ENDPOINT names another.
ENDPOINT = "https://huggingface.co"
_KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
_PART = re.compile(r"[A-Za-z0-9][\w.\-]*")
# Revisions with slashes in them that are known as such.
_REVISION = re.compile(r"(refs/(?:pr|convert)/[^/]+|[^/]+)(?:/|$)")
_MOST_JSON, _MOST_PAGES = 32 << 20, 100
_NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="?next"?')
_WAY_OUT = "of a private or gated repository HF_TOKEN, or 'hf auth login', says who asks"


def hub(rest: str) -> tuple[Store, str]:
    """The repository that ``org/repo[@revision][/path]`` names, and the path in it.

    Raises:
        UsageError: no such name can be.
        ModelctlError: there is no such repository, or it may not be read.
    """
    kind, text = "models", rest.strip("/")
    first = text.partition("/")[0]
    if first in _KINDS:
        kind, text = first, text.partition("/")[2]
    found = re.match(r"([^/@]+/[^/@]+|[^/@]+)(@|/|$)", text)
    name = found[1] if found else ""
    if found is None or not all(map(_PART.fullmatch, name.split("/"))):
        raise UsageError(
            f"hf://{rest}: names no repository", hint="hf://ORG/REPO[@REVISION][/FILE]"
        )
    text, revision = text[found.end() :], None
    if found[2] == "@":
        said = _REVISION.match(text)
        if said is None:
            raise UsageError(f"hf://{rest}: an empty revision", hint=f"hf://{name}")
        revision, text = said[1].replace("%2F", "/"), text[said.end() :]
    return Hub(kind, name, revision), text.strip("/")


class Hub(Store):
    """A repository: its files, as they are at one commit for as long as it is open."""

    def __init__(self, kind: str, repo: str, revision: str | None) -> None:
        self._endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        if urlsplit(self._endpoint).scheme not in ("http", "https"):
            raise UsageError(f"HF_ENDPOINT is {shown(self._endpoint)}, not an http(s) URL")
        token = _token() if _may_hear(self._endpoint) else None
        self._client = Client(self._endpoint, None if token is None else f"Bearer {token}")
        self._kind, self._repo, self._said = kind, repo, revision
        self._folders: dict[str, dict[str, int | None] | None] = {}
        self._commit: str | None = None

    def open(self, path: str) -> FarObject:
        folder, _, name = path.rpartition("/")
        if name not in (self._listed(folder) or {}):
            raise no_such_place(self, path)
        where = f"{_KINDS[self._kind]}{self._repo}/resolve/{quote(self._at, safe='')}"
        url = f"{self._endpoint}/{where}/{quote(path)}"
        return HttpObject(url, self._client, name=self.shown(path), way_out=_WAY_OUT)

    def is_folder(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return not path or (self._listed(folder) or {}).get(name, 0) is None

    def names(self, path: str) -> list[str]:
        return sorted(self._listed(path) or {})

    def size(self, path: str) -> int | None:
        folder, _, name = path.rpartition("/")
        return (self._listed(folder) or {}).get(name)

    def shown(self, path: str) -> str:
        repo = _KINDS[self._kind] + self._repo
        at = "" if self._said is None else f"@{self._said}"
        return f"hf://{repo}{at}/{path}".rstrip("/")

    def close(self) -> None:
        self._client.close()

    # ------------------------------------------------------------------ what the hub tells

    @property
    def _at(self) -> str:
        """The commit that the revision was when it was first asked."""
        if self._commit is None:
            said = self._said or "main"
            found, _ = self._ask(f"/revision/{quote(said, safe='')}", said)
            sha = found.get("sha") if isinstance(found, dict) else None
            self._commit = sha if isinstance(sha, str) else said
        return self._commit

    def _listed(self, folder: str) -> dict[str, int | None] | None:
        """What is in a folder: of files their size, of folders None; None where there is no such
        folder."""
        if folder not in self._folders:
            self._folders[folder] = self._tree(folder) if self.is_folder(folder) else None
        return self._folders[folder]

    def _tree(self, folder: str) -> dict[str, int | None]:
        names: dict[str, int | None] = {}
        below = f"/tree/{quote(self._at, safe='')}" + (f"/{quote(folder)}" if folder else "")
        for _ in range(_MOST_PAGES):
            found, below = self._ask(below, folder)
            for one in found if isinstance(found, list) else ():
                path, size = one.get("path"), one.get("size")
                is_file = one.get("type") == "file"
                if isinstance(path, str) and (type(size) is int or not is_file):
                    names[path.rpartition("/")[2]] = size if is_file else None
            if not below:
                return names
        raise ModelctlError(f"{self.shown(folder)}: a folder of too many files")

    def _ask(self, below: str, what: str) -> tuple[Any, str]:
        """An answer in JSON, and where it goes on."""
        start = f"{self._endpoint}/api/{self._kind}/{self._repo}"
        url = below if below.startswith(self._endpoint) else start + below
        answer = self._client.get(url, {"Accept": "application/json"}, most=_MOST_JSON)
        name = self.shown("")
        check_status(answer, name, _WAY_OUT)
        try:
            found = json.loads(answer.body)
        except (ValueError, RecursionError):
            raise ModelctlError(f"{name}: the hub's answer is no JSON") from None
        link = _NEXT.search(answer.headers.get("link", ""))
        further = link[1] if link and link[1].startswith(self._endpoint + "/") else ""
        return found, further


def _may_hear(endpoint: str) -> bool:
    """Whether a token may go there: encrypted, or not out of this machine."""
    parts = urlsplit(endpoint)
    return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")


def _token() -> str | None:
    """The token that the hub's own tools would send."""
    env = os.environ
    if env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    found = env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN")
    if not found:
        cache = env.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        home = os.path.expanduser(env.get("HF_HOME") or os.path.join(cache, "huggingface"))
        path = os.path.expanduser(env.get("HF_TOKEN_PATH") or os.path.join(home, "token"))
        try:
            with open(path, encoding="utf-8") as file:
                found = file.read(4096)
        except (OSError, ValueError):
            return None
    found = "".join(found.split())
    return found if found.isascii() and found.isprintable() and found else None
