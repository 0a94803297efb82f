"""A writable format of another package, which can do less than ours: nobody stumbles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint, Origin
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import mapping, ordered_dict
from modelctl.core.notes import Loss
from modelctl.core.storages import MemoryStorage, RunStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import LossError, UsageError
from modelctl.formats import registry, single
from modelctl.formats.base import WritableFormat
from modelctl.storage.layout import FileLayout, LayoutBuilder
from modelctl.storage.places import Place
from modelctl.storage.values import ValuesStorage

MAGIC = b"LINES\n"


class Lines(WritableFormat):
    """A line of JSON, then the tensors' bytes; no shards, no metadata, no ties."""

    name, label, suffixes = "lines", "lines", (".lines",)

    def sniff(self, place: Place) -> bool:
        return place.head.startswith(MAGIC)

    def read(self, place: Place) -> Checkpoint:
        head = place.source.read(0, place.size).split(b"\n")[1]
        at = len(MAGIC) + len(head) + 1
        entries = {}
        for name, dtype, shape in json.loads(head):
            ref = TensorRef(BY_NAME[dtype], tuple(shape), RunStorage(place.source, at, 0))
            storage = RunStorage(place.source, at, ref.nbytes)
            entries[name] = ref.replace(storage=storage)
            at += ref.nbytes
        return Checkpoint(
            ordered_dict(entries), Origin(place.name, self.name, self.label, place.size)
        )

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        entries = mapping(ckpt.root) or {}
        odd = [name for name, one in entries.items() if not isinstance(one, TensorRef)]
        return [Loss(f"'{name}' is no line", "drop it") for name in odd]

    def layout(self, ckpt: Checkpoint, name: str) -> FileLayout:
        entries: dict[str, TensorRef] = mapping(ckpt.root) or {}
        head = [[name, ref.dtype.name, ref.shape] for name, ref in entries.items()]
        out = LayoutBuilder()
        out.add(MAGIC + json.dumps(head).encode() + b"\n")
        for ref in entries.values():
            out.copy(ValuesStorage(ref))
        return out.file(name)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    for module in (registry, single):
        monkeypatch.setattr(module, "third_party", lambda: (lines,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    entries = {
        f"module.{name}": TensorRef(BY_NAME["float16"], (1, 3), MemoryStorage(bytes(range(6))))
        for name in ("a", "b")
    }
    mc.save(Checkpoint(ordered_dict(entries), metadata={"by": "me"}), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def names(path: Path) -> dict[str, bytes]:
    with mc.open(path) as ckpt:
        assert ckpt.origin is not None
        return {name: ref.tobytes() for name, ref in ckpt.state_dict().items()}


def test_it_is_written_by_its_suffix_and_by_its_name(path: Path, tmp_path: Path) -> None:
    by_suffix = mc.edit(path, "strip-prefix", output=tmp_path / "out.lines")
    by_name = mc.edit(path, "strip-prefix", output=tmp_path / "out.x", to="lines")
    assert names(tmp_path / "out.lines") == names(tmp_path / "out.x")
    assert list(names(tmp_path / "out.lines")) == ["a", "b"]
    for report in (by_suffix, by_name):
        assert report.bytes_written == (tmp_path / "out.lines").stat().st_size
    with mc.open(tmp_path / "out.lines") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.format == "lines"


def test_it_is_edited_in_place_and_keeps_its_format(path: Path, tmp_path: Path) -> None:
    mc.edit(path, "convert", output=tmp_path / "f.lines")
    mc.edit(tmp_path / "f.lines", "strip-prefix", in_place=True)
    assert list(names(tmp_path / "f.lines")) == ["a", "b"]
    assert (tmp_path / "f.lines").read_bytes().startswith(MAGIC)
    with pytest.raises(UsageError, match="would lie about safetensors"):
        mc.edit(tmp_path / "f.lines", "convert", in_place=True, to="safetensors")


def test_several_go_to_a_folder_under_its_suffix(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes())
    (tmp_path / "out").mkdir()
    mc.edit([path, other], "convert", output=tmp_path / "out", to="lines")
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["in.lines", "other.lines"]


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("out/", {"to": "lines", "max_shard_size": 10}, "lines is not written in shards"),
        ("out", {"to": "lines", "max_shard_size": 10}, "lines is not written in shards"),
        ("out.lines", {"max_shard_size": 10}, "one file has no shards"),
        ("model.lines.index.json", {}, "lines is not written in shards"),
    ],
)
def test_shards_of_it_are_refused(
    output: str, options: dict[str, Any], said: str, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        mc.edit(path, "convert", output=f"{tmp_path}/{output}", **options)
    assert [one.name for one in tmp_path.iterdir()] == ["in.safetensors"]


def test_what_it_has_no_place_for_is_not_lost_without_a_word(path: Path, tmp_path: Path) -> None:
    report = mc.edit(path, {"do": "freeze", "pattern": "*"}, output=tmp_path / "f.lines")
    said = [note.text for note in report.notes if note.level == "warning"]
    assert "lines has no place for modelctl.freeze, by: left out" in said
    assert report.by_hand == ()  # no line of Python is made up for it
    kept = mc.edit(path, {"do": "freeze", "pattern": "*"}, output=tmp_path / "f.pt")
    assert not any("has no place" in note.text for note in kept.notes)
    assert len(kept.by_hand) == 3


def test_what_it_cannot_hold_is_said_in_its_words(tmp_path: Path) -> None:
    ckpt = Checkpoint(ordered_dict({"a": 3}))
    with pytest.raises(LossError, match="'a' is no line") as e:
        mc.save(ckpt, tmp_path / "out.lines")
    assert e.value.hint == "drop it"
