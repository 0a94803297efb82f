"""A row of checkpoints: the last few, the latest, and the newest of a folder."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import modelctl.nn as mnn
from modelctl.errors import ModelctlError, UnreadableError, UsageError, WriteError
from tests.nn.nets import Net
from tests.storage.faults import CALLS, killed_before, leftovers

# The calls after which a name stands for something else.
FEW = ("os.replace", "os.unlink")
ROW = "epoch-{epoch:03d}.pt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, epoch: int, row: str = ROW, model: torch.nn.Module | None = None, **more):
    model = torch.nn.Linear(2, 2) if model is None else model
    return mnn.save_checkpoint(folder / row, model=model, epoch=epoch, rng=False, **more)


def test_its_folder_is_made(tmp_path):
    path = save(tmp_path / "run" / "one", 3)
    assert names(path.parent) == ["epoch-003.pt", "latest.pt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="is no directory"):
        save(tmp_path / "file" / "x", 3)


def test_the_last_few_are_kept_and_the_latest_leads_to_the_newest(tmp_path):
    others = ("epoch-1.pt", "epoch-0001.pt", "epoch-001.pth", "xepoch-001.pt", "epoch-abc.pt")
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "epoch-000.pt").mkdir()
    kept = [*others, "epoch-000.pt", "latest.pt"]
    for epoch in range(1, 6):
        path = save(tmp_path, epoch, keep_last=2, step=7)
        assert path == tmp_path / f"epoch-{epoch:03d}.pt"
        there = [f"epoch-{i:03d}.pt" for i in range(max(1, epoch - 1), epoch + 1)]
        assert names(tmp_path) == sorted([*kept, *there])
        assert os.readlink(tmp_path / "latest.pt") == path.name
        assert torch.load(tmp_path / "latest.pt", weights_only=True)["epoch"] == epoch
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    assert torch.load(tmp_path.with_name("moved") / "latest.pt", weights_only=True)["epoch"] == 5


def test_what_comes_later_is_not_older(tmp_path):
    """A training that starts again in the folder of an abandoned one."""
    for epoch in (1, 2, 8, 9):
        save(tmp_path, epoch)
    save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == [f"epoch-{i:03d}.pt" for i in (2, 3, 8, 9)] + ["latest.pt"]
    assert mnn.resume(tmp_path, model=torch.nn.Linear(2, 2)).epoch == 3


def test_all_fields_and_those_of_other_rows(tmp_path):
    row = "{name}-{epoch}-{step:06d}-{acc:.2f}-{lr:g}.pt"
    for other in ("vit-0-000001-0.50-0.1.pt", "net-0-000001-best-0.1.pt", "net-0-1-0.50-0.1.pt"):
        (tmp_path / other).write_text("mine")
    before = names(tmp_path)
    for step, acc in ((1, 0.5), (2, 1), (2, 0.123), (3, float("nan"))):
        path = save(tmp_path, 0, row, step=step, acc=acc, name="net", lr=1e-7, keep_last=2)
        if acc == 1:  # the second try at a step is the newer one
            os.utime(path, (1, 1))
    there = ["net-0-000002-0.12-1e-07.pt", "net-0-000003-nan-1e-07.pt", "latest.pt"]
    assert names(tmp_path) == sorted([*before, *there])
    state = mnn.resume(tmp_path / "latest.pt", model=torch.nn.Linear(2, 2))
    assert (state.step, state.lr, state.extra["name"]) == (3, 1e-7, "net")


def test_steps_beyond_the_width_are_in_order(tmp_path):
    for step in (998, 999, 1000, 1001):
        save(tmp_path, 1, "{step:03d}.pt", step=step, keep_last=3)
    assert names(tmp_path) == ["1000.pt", "1001.pt", "999.pt", "latest.pt"]


@pytest.mark.parametrize(
    ("row", "more", "match"),
    [
        ("a-{epoch}.pt", {"keep_last": 0}, "keep_last=0"),
        ("a.pt", {"keep_last": 2}, "must say"),
        ("a-{acc}.pt", {"keep_last": 2, "acc": 1.0}, "must say"),
        ("a-{epoch:x}.pt", {"keep_last": 2}, "no plain numbers"),
        ("a-{step}.pt", {}, r"'\{step\}'.*given are acc, epoch"),
        ("a-{}.pt", {}, r"'\{\}'"),
        ("a-{epoch:{acc}}.pt", {}, "a field in a field"),
        ("a-{acc", {}, "expected '}'"),
        ("a-{acc:d}", {}, "format code 'd'"),
        ("a-{name}", {"name": "x/y"}, "not the name of a file"),
        ("lat{name}.pt", {"name": "est"}, "known by"),
    ],
)
def test_rows_that_can_not_be(tmp_path, row, more, match):
    with pytest.raises(UsageError, match=match):
        save(tmp_path, 17, row, **{"acc": 0.5, **more})
    assert names(tmp_path) == []


def test_braces_and_a_plain_path_stand_for_themselves(tmp_path):
    save(tmp_path, 1, "{{a}}.pt")
    assert names(tmp_path) == ["{a}.pt"]


@pytest.mark.parametrize(
    ("row", "latest"),
    [
        ("a-{epoch}.ckpt.pt", "latest.pt"),
        ("a-{acc:.2f}", "latest"),
        ("{acc:.1f}.pth", "latest.pth"),
    ],
)
def test_the_latest_has_the_suffix_of_its_row(tmp_path, monkeypatch, row, latest):
    monkeypatch.chdir(tmp_path)
    path = mnn.save_checkpoint(row, model=torch.nn.Linear(2, 2), epoch=1, acc=0.5)
    assert names(tmp_path) == sorted([path.name, latest])
    assert mnn.resume(".", model=torch.nn.Linear(2, 2)).path == Path(latest)


def test_a_latest_that_is_a_folder_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "latest.pt").mkdir()
    with pytest.raises(WriteError, match="no link"):
        save(tmp_path, 1)
    assert names(tmp_path) == ["latest.pt"]


@pytest.mark.parametrize("lacking", [("symlink",), ("symlink", "link")])
def test_without_links_the_latest_is_a_file(tmp_path, monkeypatch, lacking):
    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in lacking:
        monkeypatch.setattr(os, name, refused)
    for epoch in (1, 2, 2, 3):
        save(tmp_path, epoch, keep_last=1)
        assert torch.load(tmp_path / "latest.pt", weights_only=True)["epoch"] == epoch
        assert not (tmp_path / "latest.pt").is_symlink()
    assert names(tmp_path) == ["epoch-003.pt", "latest.pt"]
    same = os.path.samefile(tmp_path / "latest.pt", tmp_path / "epoch-003.pt")
    assert same is (len(lacking) == 1)


def test_an_old_one_that_can_not_be_removed_is_said(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = os.unlink

    def guarded(path, *args, **options):
        if Path(path).name == "epoch-001.pt":
            raise PermissionError(13, "Permission denied")
        real(path, *args, **options)

    monkeypatch.setattr(os, "unlink", guarded)
    with pytest.warns(UserWarning, match=r"epoch-001\.pt is old and stays: Permission denied"):
        save(tmp_path, 2, keep_last=1)


# ------------------------------------------------------------------ killed


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("way", ["links", "hard links", "copies", "one file"])
def test_killed_before_each_call(tmp_path, monkeypatch, way):
    """What is there can be loaded at any moment: the previous one, or the new one."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in {"hard links": ["symlink"], "copies": ["symlink", "link"]}.get(way, []):
        monkeypatch.setattr(os, name, refused)
    model = torch.nn.Linear(2, 2)
    row = "last.pt" if way == "one file" else ROW
    more = {} if way == "one file" else {"keep_last": 2}
    calls = (*(CALLS if way == "links" else FEW), "os.symlink", "os.link")
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    for epoch in (1, 2):
        save(before, epoch, row, model, **more)
    seen = []
    for nth in range(1, 1000):
        shutil.copytree(before, folder, symlinks=True)
        killed = killed_before(nth, partial(save, folder, 3, row, model, **more), calls)
        epochs = {}
        for path in folder.iterdir():
            if not path.name.startswith("."):
                epochs[path.name] = torch.load(path, weights_only=True)["epoch"]
        latest = epochs.get("latest.pt", epochs.get("last.pt"))
        assert latest in (2, 3)
        assert way == "one file" or latest in (e for n, e in epochs.items() if n != "latest.pt")
        # what was not finished is no newer than what is said to be the latest
        assert mnn.resume(folder, model=model, rng=False).epoch == latest
        seen.append((latest, len(epochs)))
        save(folder, 4, row, model, **more)
        assert leftovers(folder) == []
        there = ["last.pt"] if way == "one file" else ["epoch-003.pt", "epoch-004.pt", "latest.pt"]
        assert set(names(folder)) - {"epoch-002.pt"} <= {*there}
        shutil.rmtree(folder)
        if not killed:
            break
    print(way, len(seen))
    assert len(seen) > (30 if way == "links" else 2)
    assert [latest for latest, _ in seen] == sorted(latest for latest, _ in seen)
    assert {latest for latest, _ in seen} == {2, 3}


# ------------------------------------------------------------------ the newest of a folder


def test_the_newest_whole_one_of_a_folder(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "pretrained.pt")
    (tmp_path / "log.txt").write_text("epoch 17")
    for epoch in (2, 10):
        save(tmp_path, epoch, "epoch-{epoch}.pt", model)
    save(tmp_path, 10, "step-{step}.pt", model, step=5)
    (tmp_path / "latest.pt").unlink()
    state = mnn.resume(tmp_path, model=model, rng=False)
    assert state.path == tmp_path / "step-5.pt"
    cut = (tmp_path / "epoch-10.pt").read_bytes()[:-40]
    (tmp_path / "epoch-11.pt").write_bytes(cut)
    with pytest.warns(UserWarning, match=r"passed over: .*epoch-11\.pt"):
        assert mnn.resume(str(tmp_path), model=model, rng=False).epoch == 10
    os.symlink("epoch-2.pt", tmp_path / "latest.pt")
    assert mnn.resume(tmp_path, model=model, rng=False).epoch == 2
    os.unlink(tmp_path / "epoch-2.pt")
    for path in (tmp_path, tmp_path / "latest.pt"):
        with pytest.warns(UserWarning, match="leads nowhere|passed over"):
            assert mnn.resume(path, model=model, rng=False).step == 5


def test_a_folder_without_one(tmp_path):
    with pytest.raises(UnreadableError, match="without a checkpoint"):
        mnn.resume(tmp_path, model=Net())
    with pytest.raises(ModelctlError, match="nowhere"):
        mnn.resume(tmp_path / "nowhere", model=Net())
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    assert mnn.resume(tmp_path, model=Net(), rng=False).epoch is None
    torch.save(Net().state_dict(), tmp_path / "b.pt")
    with pytest.raises(UnreadableError, match="several"):
        mnn.resume(tmp_path, model=Net())
