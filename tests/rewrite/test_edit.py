"""Editing files from Python: one or many, in place, sharded, dry; whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.core.records import HISTORY, read_record
from modelctl.errors import CollisionError, LossError, NoMatchError, UsageError, WriteError
from modelctl.inspection.edits import EditReport
from tests.cli.files import net, tensor, training, write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ddp(place: Path) -> Path:
    return write(place / "ddp.pt", training())


def names(path: str | Path) -> list[str]:
    with mc.open(path) as ckpt:
        return list(ckpt.state_dict())


def history(path: str | Path) -> list[str]:
    with mc.open(path) as ckpt:
        return list(read_record(ckpt, HISTORY) or [])


def tree() -> dict[str, bytes]:
    paths = [path for path in Path().rglob("*") if path.is_file()]
    return {path.as_posix(): path.read_bytes() for path in paths}


def test_one_file(ddp: Path) -> None:
    done = mc.edit("ddp.pt", "strip-prefix", output="clean.pt")
    assert isinstance(done, EditReport)
    assert names("clean.pt") == list(net())
    assert history("clean.pt") == ["strip-prefix"]
    assert (done.source, done.output, done.dry_run) == ("ddp.pt", "clean.pt", False)
    assert (done.plan.kept, len(done.plan.renamed), done.plan.removed) == (0, 12, [])
    assert (done.files_written, done.bytes_written) == (1, Path("clean.pt").stat().st_size)
    assert json.loads(json.dumps(done.as_dict()))["renamed"][0] == [
        "module.conv1.weight",
        "conv1.weight",
    ]


def test_an_operation_with_options_and_several_in_one_pass(ddp: Path) -> None:
    keep = {"do": "keep", "pattern": ["conv1", "fc"], "exclude": "fc.bias"}
    done = mc.edit(ddp, ["strip-prefix", keep], output=Path("some.pt"), history=False)
    assert names("some.pt") == ["conv1.weight", "fc.weight"]
    assert history("some.pt") == []
    assert done.output == "some.pt"
    one = mc.edit("ddp.pt", {"do": "add-prefix", "prefix": "m"}, output="m.pt")
    assert one.plan.renamed[0] == ("module.conv1.weight", "m.module.conv1.weight")


def test_a_recipe(ddp: Path) -> None:
    Path("r.toml").write_text(
        '[[edit]]\ndo = "strip-prefix"\n[[edit]]\ndo = "rename"\nmap-file = "maps.txt"\n'
    )
    Path("maps.txt").write_text("# as the other library has it\nfc=head\n")
    done = mc.edit(ddp, mc.read_recipe("r.toml"), output="out.pt")
    assert names("out.pt")[-2:] == ["head.weight", "head.bias"]
    assert history("out.pt") == ["strip-prefix", "rename --map fc=head"]
    assert len(done.plan.renamed) == 12


def test_in_place(ddp: Path) -> None:
    done = mc.edit(ddp, "strip-prefix", in_place=True)
    assert names(ddp) == list(net())
    assert done.output == str(ddp)
    assert os.listdir() == ["ddp.pt"]
    before = ddp.read_bytes(), ddp.stat().st_ino
    again = mc.edit(ddp, "strip-prefix", in_place=True)  # nothing is left to do
    assert (ddp.read_bytes(), ddp.stat().st_ino) == before
    assert (again.files_written, again.bytes_written) == (0, 0)


def test_several_sources(place: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write(place / name, net("module."))
    os.mkdir("out")
    seen: list[EditReport] = []
    done = mc.edit(["a.pt", Path("b.pt")], "strip-prefix", output="out", report=seen.append)
    assert [one.output for one in done] == ["out/a.pt", "out/b.pt"]
    assert seen == done
    assert names("out/a.pt") == names("out/b.pt") == list(net())
    assert [one["source"] for one in done.as_dict()["files"]] == ["a.pt", "b.pt"]
    (one,) = mc.edit(["a.pt"], "strip-prefix", in_place=True)
    assert one.output == "a.pt"


@pytest.mark.parametrize("in_place", [True, False])
def test_where_the_second_source_fails_the_first_is_not_written(
    place: Path, in_place: bool
) -> None:
    write(place / "a.pt", net("module."))
    write(place / "b.pt", {"fc.weight": tensor(2, 2), "module.fc.weight": tensor(2, 2)})
    os.mkdir("out")
    before = tree()
    where = {"in_place": True} if in_place else {"output": "out"}
    with pytest.raises(CollisionError):
        mc.edit(["a.pt", "b.pt"], {"do": "strip-prefix", "prefix": "module"}, **where)
    with pytest.raises(mc.ModelctlError, match=r"missing\.pt"):
        mc.edit(["a.pt", "missing.pt"], "strip-prefix", **where)
    write(place / "c.pt", training())  # safetensors can't hold that
    before["c.pt"] = Path("c.pt").read_bytes()
    if not in_place:
        with pytest.raises(LossError):
            mc.edit(["a.pt", "c.pt"], "strip-prefix", output="out", to="safetensors")
    assert tree() == before


def test_a_dry_run_writes_nothing_and_reports_the_same(ddp: Path) -> None:
    before = tree()
    dry = mc.edit(ddp, "strip-head", output="out.pt", dry_run=True)
    assert tree() == before
    assert (dry.files_written, dry.bytes_written, dry.output) == (None, None, "out.pt")
    wet = mc.edit(ddp, "strip-head", output="out.pt")
    assert wet.plan == dry.plan
    assert wet.notes == dry.notes
    assert mc.edit(ddp, "strip-head", dry_run=True).output is None
    for dry_run in (True, False):
        with pytest.raises(WriteError, match="exists"):
            mc.edit(ddp, "strip-head", output="out.pt", dry_run=dry_run)
    with pytest.raises(LossError):
        mc.edit(ddp, "strip-head", output="out.safetensors", dry_run=True)


def test_shards(place: Path) -> None:
    write(place / "a.pt", net("module."))
    done = mc.edit("a.pt", "strip-prefix", output="folder", max_shard_size=700)
    assert done.output == "folder/model.safetensors.index.json"
    assert done.files_written == len(os.listdir("folder")) == 3
    again = mc.edit("folder", {"do": "add-prefix", "prefix": "m"}, in_place=True)
    assert again.files_written == 3  # they stay about as big as they are
    assert names("folder") == [f"m.{name}" for name in net()]
    mc.edit("folder", "convert", output="one.safetensors")
    assert names("one.safetensors") == names("folder")


def test_the_format_is_kept_in_place_and_can_be_told(place: Path) -> None:
    write(place / "a.safetensors", net())
    os.rename("a.safetensors", "odd.pt")
    mc.edit("odd.pt", {"do": "freeze", "pattern": "fc"}, in_place=True)
    with mc.open("odd.pt") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.format == "safetensors"
    mc.edit("odd.pt", "convert", in_place=True, to="torch")
    with mc.open("odd.pt") as ckpt:
        assert ckpt.origin is not None
        assert ckpt.origin.format == "torch"
    with pytest.raises(UsageError, match="would lie about safetensors") as e:
        mc.edit("odd.pt", "convert", in_place=True, to="safetensors")
    assert e.value.hint == "-o odd.safetensors"


def test_what_is_to_be_told_is_told(place: Path) -> None:
    shared = tensor(3)
    write(place / "a.pt", {"embed": shared, "head": shared, "b": tensor(2)})
    done = mc.edit("a.pt", "convert", output="out.safetensors")
    assert [note.level for note in done.notes] == ["info"]
    assert "tied names: 1" in done.notes[0].text
    frozen = mc.edit("a.pt", {"do": "freeze", "pattern": "b"}, output="frozen.pt")
    assert frozen.by_hand[0].startswith("frozen = torch.load('frozen.pt'")
    safe = mc.edit("a.pt", {"do": "freeze", "pattern": "b"}, output="frozen.safetensors")
    assert safe.by_hand[0].startswith("frozen = json.loads(safe_open('frozen.safetensors'")
    assert mc.edit("a.pt", {"do": "freeze", "pattern": "b"}, dry_run=True).by_hand == ()


def test_progress(ddp: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    mc.edit(ddp, "strip-prefix", output="out.pt", progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == {"out.pt"}
    assert sum(more for _, more, _ in calls) == Path("out.pt").stat().st_size


def test_wrong_usage(ddp: Path) -> None:
    before = tree()
    for edits in ("strip-hed", {"do": "keep"}, {"pattern": "*"}, {"do": "keep", "pattern": 3}):
        with pytest.raises(UsageError):
            mc.edit(ddp, edits, output="out.pt")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="where does the result go"):
        mc.edit(ddp, "strip-prefix")
    with pytest.raises(UsageError, match="one of them"):
        mc.edit(ddp, "strip-prefix", output="out.pt", in_place=True)
    with pytest.raises(UsageError, match="need a folder"):
        mc.edit([ddp, ddp], "strip-prefix", output="out.pt")
    with pytest.raises(NoMatchError):
        mc.edit(ddp, {"do": "keep", "pattern": "nothing"}, output="out.pt")
    assert tree() == before


@pytest.mark.parametrize(("to", "said"), [("torch", True), ("safetensors", False)])
def test_what_a_small_view_keeps_alive_is_told(to: str, said: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": {"w": torch.zeros(1_000_000)[:10]}}, tmp_path / "a.pt")
    report = mc.edit(
        tmp_path / "a.pt",
        {"do": "convert", "weights-only": True},
        output=tmp_path / "out",
        to=to,
    )
    (report,) = report if isinstance(report, list) else (report,)
    texts = [note.text for note in report.notes]
    warning = "'w' uses 40 of the 4,000,000 bytes that it keeps alive"
    assert any(text.startswith(warning) for text in texts) is said
