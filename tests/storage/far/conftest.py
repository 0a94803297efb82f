"""Servers on loopback, and no proxy, token or pause of this machine between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modelctl.storage.far import http

from .server import Server, serving


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr(http, "PAUSE", 0.001)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


@pytest.fixture
def other() -> Iterator[Server]:
    with serving() as one:
        yield one
