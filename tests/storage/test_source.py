"""Open files as sources: short reads go on, nothing is read past the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelctl.errors import UnreadableError
from modelctl.storage.source import FileSource, Window

DATA = bytes(range(256)) * 64


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    return FileSource(path)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_a_read_that_comes_in_pieces_goes_on(
    source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives at most 2 GiB at once."""
    whole = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:1000]], at), raising=False
    )
    out = bytearray(5500)
    source.read_into(300, memoryview(out))
    assert bytes(out) == DATA[300:5800]
    inner = bytearray(2500)
    Window(source, 100, 8000, "member").read_into(50, memoryview(inner))
    assert bytes(inner) == DATA[150:2650]


def test_nothing_is_mapped_past_the_end(source: FileSource) -> None:
    assert bytes(source.map(5000, 3000)) == DATA[5000:8000]
    for offset, size in ((len(DATA) - 1, 2), (0, len(DATA) + 1), (len(DATA) + 5000, 1)):
        with pytest.raises(UnreadableError, match="cut off"):
            source.map(offset, size)
    window = Window(source, 100, 200, "member")
    with pytest.raises(UnreadableError, match="cut off"):
        window.map(150, 51)
    assert bytes(window.map(150, 50)) == DATA[250:300]
