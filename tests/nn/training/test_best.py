"""The best of a row of checkpoints: kept beside the last ones, and known as ``best``."""

from __future__ import annotations

import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import UnreadableError, UsageError, WriteError
from tests.storage.faults import killed_before, leftovers

ROW = "epoch-{epoch:03d}.pt"
BEST = ("acc", "max", 2)


def save(folder: Path, epoch: int, acc: float, row: str = ROW, keep_best=BEST, **more) -> Path:
    return mnn.save_checkpoint(
        folder / row,
        model=torch.nn.Linear(2, 2),
        epoch=epoch,
        acc=acc,
        rng=False,
        keep_best=keep_best,
        **more,
    )


def there(folder: Path) -> list[int]:
    return sorted(int(path.stem[6:]) for path in folder.glob("epoch-*.pt"))


def best(folder: Path) -> int:
    return torch.load(folder / "best.pt", weights_only=True)["epoch"]


def test_the_best_few_are_kept_beside_the_last_ones(tmp_path):
    accs = [0.1, 0.9, 0.3, 0.8, 0.9, 0.2, 0.1]
    seen = []
    for epoch, acc in enumerate(accs, 1):
        save(tmp_path, epoch, acc, keep_last=2)
        seen.append((there(tmp_path), best(tmp_path)))
    assert seen == [
        ([1], 1),
        ([1, 2], 2),
        ([2, 3], 2),
        ([2, 3, 4], 2),
        ([2, 4, 5], 2),  # as good, and later
        ([2, 5, 6], 2),
        ([2, 5, 6, 7], 2),
    ]
    assert (tmp_path / "best.pt").samefile(tmp_path / "epoch-002.pt")
    assert not (tmp_path / "best.pt").is_symlink()
    assert mnn.resume(tmp_path, model=torch.nn.Linear(2, 2)).epoch == 7
    (tmp_path / "latest.pt").unlink()
    assert mnn.resume(tmp_path, model=torch.nn.Linear(2, 2)).epoch == 7
    assert mnn.resume(tmp_path / "best.pt", model=torch.nn.Linear(2, 2)).epoch == 2


def test_the_smallest_and_without_keep_last(tmp_path):
    for epoch, acc in enumerate([3, 1.0, 2, 5], 1):
        save(tmp_path, epoch, acc, keep_best=("acc", "min", 1))
    assert (there(tmp_path), best(tmp_path)) == ([2, 4], 2)


def test_nan_is_never_best(tmp_path):
    save(tmp_path, 1, math.nan)
    assert not (tmp_path / "best.pt").exists()
    for epoch, acc in enumerate([math.nan, -1.0, math.nan, -2.0, math.nan], 2):
        save(tmp_path, epoch, acc)
    assert (there(tmp_path), best(tmp_path)) == ([3, 5, 6], 3)


def test_what_was_best_stays_known_without_its_file(tmp_path):
    save(tmp_path, 1, 0.9)
    (tmp_path / "epoch-001.pt").unlink()
    save(tmp_path, 2, 0.5)
    assert best(tmp_path) == 1
    save(tmp_path, 3, 0.95)
    assert best(tmp_path) == 3


def test_an_abandoned_run_takes_no_place_of_the_new_one(tmp_path):
    for epoch in (7, 8):
        save(tmp_path, epoch, 0.9)
    for epoch, acc in ((1, 0.1), (2, 0.5), (3, 0.4), (4, 0.2)):
        save(tmp_path, epoch, acc)
    assert (there(tmp_path), best(tmp_path)) == ([2, 3, 4, 7, 8], 7)


def test_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    def refused(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "symlink", refused)
    for epoch, acc in ((1, 0.1), (2, 0.5), (3, 0.4)):
        save(tmp_path, epoch, acc)
    assert (best(tmp_path), leftovers(tmp_path)) == (2, [])
    assert not (tmp_path / "best.pt").samefile(tmp_path / "epoch-002.pt")


def test_a_damaged_best_is_replaced_and_another_file_is_not(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=r"best.pt is replaced"):
        save(tmp_path, 1, 0.5)
    assert best(tmp_path) == 1
    torch.save({"mine": 1}, tmp_path / "best.pt")
    with pytest.raises(WriteError, match="has no number 'acc'"):
        save(tmp_path, 2, 0.6)
    assert there(tmp_path) == [1]


@pytest.mark.parametrize(("value", "kind"), [(torch.tensor(0.5), "Tensor"), (True, "bool")])
def test_what_is_given_and_no_number_is_called_that(tmp_path, value, kind):
    with pytest.raises(UsageError, match=f"'acc' is a {kind}, not a number") as e:
        save(tmp_path, 1, value)
    assert "acc=float(" in e.value.hint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keep_best", "row", "match"),
    [
        ("acc", ROW, "not 'acc'"),
        (("acc", "max"), ROW, "how many"),
        (("acc", "up", 3), ROW, "'min' or 'max'.*not 'up'"),
        (("acc", "max", 0), ROW, "0 is not 1 or more"),
        (("acc", "max", True), ROW, "True is not 1 or more"),
        (("loss", "min", 1), ROW, "no number 'loss'; given are acc, epoch"),
        (("name", "min", 1), ROW, "no number 'name'"),
        (([], "max", 1), ROW, r"\[\] is no name"),
        (BEST, "last.pt", "must say"),
        (BEST, "b{name}t.pt", "must say"),
    ],
)
def test_what_it_can_not_go_by(tmp_path, keep_best, row, match):
    with pytest.raises(UsageError, match=match):
        save(tmp_path, 1, 0.5, row, keep_best, name="es")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_before_each_call_the_best_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    for epoch, acc in ((1, 0.8), (2, 0.5)):
        save(before, epoch, acc, keep_best=("acc", "max", 1))
    seen = []
    for nth in range(1, 200):
        shutil.copytree(before, folder, symlinks=True)
        act = partial(save, folder, 3, 0.9, keep_best=("acc", "max", 1))
        killed = killed_before(nth, act, ("os.replace", "os.unlink", "os.link"))
        found = [torch.load(path, weights_only=True) for path in folder.glob("[be]*.pt")]
        assert max(one["extra"]["acc"] for one in found) == (0.9 if 3 in there(folder) else 0.8)
        seen.append(best(folder))
        save(folder, 4, 0.1, keep_best=("acc", "max", 1))
        assert best(folder) == (3 if 3 in there(folder) else 1)
        assert leftovers(folder) == []
        shutil.rmtree(folder)
        if not killed:
            break
    assert (seen[0], seen[-1]) == (1, 3)
    assert seen == sorted(seen)


def test_a_folder_of_them_means_the_newest(tmp_path):
    for epoch, acc in ((1, 0.8), (2, 0.5), (3, 0.1)):
        save(tmp_path, epoch, acc)
    with pytest.raises(UnreadableError) as e:
        mc.open(tmp_path)
    assert "best.pt" in e.value.message
    assert "epoch-003.pt" in str(e.value.hint)
