"""The hub's way to name files, on a server that answers as it does."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path
from urllib.parse import unquote

import pytest

import modelctl
from modelctl.cli import run
from modelctl.errors import ModelctlError, UsageError
from modelctl.storage.far.hub import hub

from . import made
from .server import Handler, Server

SHA = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/org/repo/(revision|tree)/([^/?]+)(?:/([^?]*))?(?:\?cursor=(\d+))?")
RESOLVE = re.compile(r"/org/repo/resolve/([^/]+)/(.+)")


class FakeHub:
    """Answers for one repository; its large files lie on another host."""

    def __init__(self, server: Server, cdn: Server, files: dict[str, bytes]) -> None:
        self.server, self.cdn = server, cdn
        self.sha, self.private, self.page = SHA, False, 1000
        cdn.files = {f"cdn/{name}": data for name, data in files.items()}
        server.turns = _Always(self.answer)

    def answer(self, handler: Handler) -> bool:
        if self.private and handler.headers.get("Authorization") != "Bearer hf_secret":
            return handler.say(401)
        api, resolve = API.fullmatch(handler.path), RESOLVE.fullmatch(handler.path)
        if api and api[1] == "revision":
            if unquote(api[2]) not in ("main", "v1", "refs/pr/3", SHA):
                return handler.say(404)
            return handler.say(200, json.dumps({"id": "org/repo", "sha": self.sha}).encode())
        if api and api[2] == self.sha:
            return self.tree(handler, unquote(api[3] or ""), int(api[4] or 0))
        if resolve and resolve[1] == self.sha:
            return handler.say(302, b"", {"Location": f"{self.cdn.url}/cdn/{resolve[2]}?sig=1"})
        return handler.say(404)

    def size(self, path: str) -> int:
        return len(self.cdn.files.get(f"cdn/{path}", b""))

    def tree(self, handler: Handler, folder: str, start: int) -> bool:
        names = [name[4:] for name in self.cdn.files]
        below = sorted(n[len(folder) :].lstrip("/") for n in names if n.startswith(folder))
        listed = {n.partition("/")[0]: "directory" if "/" in n else "file" for n in below}
        rows = [
            {"type": kind, "path": path, "size": self.size(path), "oid": "x"}
            for name, kind in listed.items()
            for path in [f"{folder}/{name}".lstrip("/")]
        ]
        more = {}
        if start + self.page < len(rows):
            url = f"{self.server.url}{handler.path.partition('?')[0]}?cursor={start + self.page}"
            more["Link"] = f'<{url}>; rel="next"'
        return handler.say(200, json.dumps(rows[start : start + self.page]).encode(), more)


class _Always:
    def __init__(self, turn) -> None:
        self._turn = turn

    def popleft(self):
        return self._turn


@pytest.fixture
def repo(server: Server, other: Server, tmp_path, monkeypatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    small = made.torch.nn.Linear(3, 3).state_dict()
    modelctl_made = tmp_path / "made"
    modelctl_made.mkdir()
    made.torch.save(small, modelctl_made / "x.pt")
    with modelctl.open(modelctl_made / "x.pt") as ckpt:
        modelctl.save(ckpt, "made/model.safetensors")
        modelctl.save(ckpt, "made/shards/", to="safetensors", max_shard_size=40)
    files = {
        "config.json": b"{}",
        "model.safetensors": Path("made/model.safetensors").read_bytes(),
        "old/pytorch_model.bin": Path("made/x.pt").read_bytes(),
        "a b/x.pt": Path("made/x.pt").read_bytes(),
        **{f"sharded/{one.name}": one.read_bytes() for one in Path("made/shards").iterdir()},
    }
    return FakeHub(server, other, files)


@pytest.mark.parametrize(
    "url",
    [
        "hf://org/repo",
        "hf://org/repo/",
        "hf://org/repo@main",
        "hf://org/repo@v1/model.safetensors",
        "hf://org/repo@refs/pr/3/model.safetensors",
        "hf://org/repo@refs%2Fpr%2F3/old",
        f"hf://org/repo@{SHA}/old/pytorch_model.bin",
        "hf://org/repo/sharded",
        "hf://org/repo/sharded/model.safetensors.index.json",
        "hf://org/repo/a b/x.pt",
    ],
)
def test_reading(repo: FakeHub, url: str) -> None:
    with modelctl.open(url) as ckpt:
        found = {name: ref.tobytes() for name, ref in ckpt.state_dict().items()}
    with modelctl.open("made/x.pt") as ckpt:
        assert found == {name: ref.tobytes() for name, ref in ckpt.state_dict().items()}


def test_pages(repo: FakeHub) -> None:
    repo.page = 1
    with modelctl.open("hf://org/repo/sharded") as ckpt:
        assert len(ckpt.state_dict()) == 2


def test_all_files_are_of_one_commit(repo: FakeHub) -> None:
    with modelctl.open("hf://org/repo/sharded") as ckpt:
        assert len(ckpt.state_dict()) == 2
    paths = [one.path for one in repo.server.asked]
    assert sum("/revision/" in path for path in paths) == 1
    assert all(SHA in path for path in paths if "/revision/" not in path)


def test_the_token_goes_to_the_hub_alone(repo: FakeHub, monkeypatch) -> None:
    repo.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    with modelctl.open("hf://org/repo") as ckpt:
        assert ckpt.state_dict()["bias"].tobytes()
    assert all(o.headers["authorization"] == "Bearer hf_secret" for o in repo.server.asked)
    assert repo.cdn.asked
    assert all("authorization" not in one.headers for one in repo.cdn.asked)


def test_the_token_that_a_login_left(repo: FakeHub, tmp_path) -> None:
    repo.private = True
    (tmp_path / "hf-home").mkdir()
    (tmp_path / "hf-home" / "token").write_text("hf_secret\n")
    with modelctl.open("hf://org/repo") as ckpt:
        assert len(ckpt.state_dict()) == 2


def test_a_token_that_is_not_to_be_sent(repo: FakeHub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with modelctl.open("hf://org/repo"):
        assert all("authorization" not in one.headers for one in repo.server.asked)


def test_a_token_is_not_sent_in_the_clear(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for endpoint, sent in (("http://hub.test", False), ("https://hub.test", True)):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        store, _ = hub("org/repo")
        assert (store._client._authorization is not None) == sent


def test_no_token_in_an_error(repo: FakeHub, monkeypatch) -> None:
    repo.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelctlError) as caught:
        modelctl.open("hf://org/repo")
    said = "".join(traceback.format_exception(caught.value))
    assert "hf://org/repo: it may not be read (401 Unauthorized)" in said
    assert "HF_TOKEN" in str(caught.value.hint)
    assert "hf_wrong" not in said


def test_a_file_of_a_like_name(repo: FakeHub) -> None:
    with pytest.raises(ModelctlError, match="no such file or folder") as caught:
        modelctl.open("hf://org/repo/modle.safetensors")
    assert caught.value.hint == "hf://org/repo/model.safetensors?"


def test_no_such_revision(repo: FakeHub) -> None:
    with pytest.raises(ModelctlError, match=r"hf://org/repo@v9: no such file there \(404"):
        modelctl.open("hf://org/repo@v9/model.safetensors")


@pytest.mark.parametrize("url", ["hf://", "hf://org/re po", "hf://../x", "hf://org/repo@"])
def test_no_name_of_a_repository(url: str) -> None:
    with pytest.raises(UsageError):
        modelctl.open(url)


def test_no_endpoint(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "ftp://me:hunter2@hub.test")
    with pytest.raises(UsageError, match="not an http") as caught:
        modelctl.open("hf://org/repo")
    assert "hunter2" not in str(caught.value)


def test_what_stands_beside_goes_along(repo: FakeHub, capsys) -> None:
    argv = ["drop", "hf://org/repo", "--pattern", "bias", "-o", "new/"]
    assert run(argv) == 0, capsys.readouterr()
    assert Path("new/config.json").read_bytes() == b"{}"
    with modelctl.open("new") as ckpt:
        assert list(ckpt.state_dict()) == ["weight"]


def test_what_stands_beside_is_opened_when_it_is_read(repo: FakeHub) -> None:
    with modelctl.open("hf://org/repo") as ckpt:
        assert ckpt.folder is not None
        assert "config.json" in ckpt.folder.beside
    assert [one.path.partition("?")[0] for one in repo.cdn.asked] == ["/cdn/model.safetensors"]
    assert len(repo.server.asked) == 3


def test_it_is_not_what_was_listed(repo: FakeHub, monkeypatch) -> None:
    monkeypatch.setattr(FakeHub, "size", lambda self, path: 77)
    with pytest.raises(ModelctlError, match=r"it changed: it has .* the listing of its folder"):
        modelctl.open("hf://org/repo")
