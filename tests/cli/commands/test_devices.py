"""The devices that a file's storages say they were on, and what ``convert --device`` makes of
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.errors import UsageError
from modelctl.surgery.convert import convert

from ..files import Cli, net, write

torch = pytest.importorskip("torch")
Save = Callable[..., None]


@pytest.fixture
def saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """``torch.save`` of what lies on devices that are not here: ``where`` gives the tag of each
    storage, by its first value."""

    def save(value: Any, path: str, where: Callable[[float], str], **options: Any) -> None:
        def tag(storage: Any) -> str:
            return where(torch.tensor([], dtype=torch.float32).set_(storage)[0].item())

        with monkeypatch.context() as patch:
            patch.setattr(torch.serialization, "location_tag", tag)
            torch.save(value, path, **options)

    return save


def state(first: float = 0.0) -> dict[str, Any]:
    return {"fc.weight": torch.full((3, 2), first), "fc.bias": torch.full((3,), first + 1)}


def checkpoint() -> dict[str, Any]:
    moments = {i: {"exp_avg": torch.full(shape, 2.0)} for i, shape in enumerate([(3, 2), (3,)])}
    groups = [{"lr": 0.1, "params": [0, 1]}]
    return {
        "model": state(),
        "ema": state(),
        "optimizer": {"state": moments, "param_groups": groups},
        "rng": torch.full((4,), 9.0),
    }


def by_value(value: float) -> str:
    return {0.0: "cuda:0", 1.0: "cuda:1", 2.0: "cuda:0", 9.0: "cpu"}[value]


@pytest.mark.parametrize("legacy", [False, True])
def test_summary_names_them(cli: Cli, saved: Save, legacy: bool) -> None:
    saved(state(), "a.pt", lambda _: "cuda:0", _use_new_zipfile_serialization=not legacy)
    found = cli("summary", "a.pt")
    assert "2 tensors · device cuda:0 · " in found.out
    totals = json.loads(cli("summary", "a.pt", "--json").out)["totals"]
    assert totals["devices"] == {"cuda:0": 2}


def test_several_are_counted(cli: Cli, saved: Save) -> None:
    saved(checkpoint(), "a.pt", by_value)
    line = cli("summary", "a.pt").out.splitlines()[0]
    assert " · devices cuda:0 (4 tensors), cuda:1 (2), cpu (1) · " in line
    totals = json.loads(cli("summary", "a.pt", "--json").out)["totals"]
    assert totals["devices"] == {"cuda:0": 4, "cuda:1": 2, "cpu": 1}


def test_where_all_are_on_the_cpu_nothing_is_said(cli: Cli, place: Path) -> None:
    torch.save(state(), "a.pt")
    assert "device" not in cli("summary", "a.pt").out
    assert "device" not in cli("ls", "a.pt", "--long").out
    totals = json.loads(cli("summary", "a.pt", "--json").out)["totals"]
    assert totals["devices"] == {"cpu": 2}
    rows = json.loads(cli("ls", "a.pt", "--json").out)["tensors"]
    assert [row["device"] for row in rows] == ["cpu", "cpu"]


def test_what_no_file_says_is_unknown(cli: Cli, place: Path) -> None:
    write(place / "a.safetensors", net())
    assert json.loads(cli("summary", "a.safetensors", "--json").out)["totals"]["devices"] is None
    rows = json.loads(cli("ls", "a.safetensors", "--json").out)["tensors"]
    assert {row["device"] for row in rows} == {None}
    write(place / "b.pt", net())
    assert torch.load("b.pt", weights_only=True)["fc.bias"].device.type == "cpu"


def test_ls_has_a_column(cli: Cli, saved: Save) -> None:
    saved(checkpoint(), "a.pt", by_value)
    lines = cli("ls", "a.pt", "--long").out.splitlines()
    assert lines[0].split() == ["name", "dtype", "shape", "bytes", "role", "grad", "device"]
    assert [line.split()[-1] for line in lines[1:]] == ["cuda:0", "cuda:1"]
    rows = json.loads(cli("ls", "a.pt", "--section", "all", "--json").out)["tensors"]
    assert {row["name"]: row["device"] for row in rows}["rng"] == "cpu"
    assert "device" not in cli("ls", "a.pt", "--section", "all", "rng", "--long").out


@pytest.mark.parametrize("legacy", [False, True])
def test_convert_makes_it_load_anywhere(cli: Cli, saved: Save, legacy: bool) -> None:
    saved(checkpoint(), "a.pt", by_value, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RuntimeError, match=r"deserialize object on .*CUDA"):
        torch.load("a.pt", weights_only=True)
    done = cli("convert", "a.pt", "-o", "b.pt", "--device", "cpu")
    assert done.code == 0, done.err
    assert "7 tensors say cpu, where they said cuda:0 (4 tensors), cuda:1 (2), cpu (1)" in done.out
    found = torch.load("b.pt", weights_only=True)
    assert found.keys() == checkpoint().keys()
    with mc.open("a.pt") as a, mc.open("b.pt") as b:
        old, new = a.tensors(), b.tensors()
        assert {ref.storage.location for ref in new.values()} == {"cpu"}
        assert {name: ref.tobytes() for name, ref in old.items()} == {
            name: ref.tobytes() for name, ref in new.items()
        }
    assert cli("diff", "a.pt", "b.pt", "--pattern", "*").code == 0


def test_another_device_and_back(cli: Cli, place: Path) -> None:
    torch.save(checkpoint(), "a.pt")
    assert cli("convert", "a.pt", "-o", "b.pt", "--device", "cuda:0", "--no-history").code == 0
    with mc.open("b.pt") as b:
        assert {ref.storage.location for ref in b.tensors().values()} == {"cuda:0"}
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load("b.pt", weights_only=True)
    assert cli("convert", "b.pt", "--in-place", "--device", "cpu", "--no-history").code == 0
    torch.load("b.pt", weights_only=True)
    # "cuda" is what torch calls cuda:0 when it saves
    assert cli("convert", "a.pt", "-o", "c.pt", "--device", "cuda").code == 0
    with mc.open("c.pt") as c:
        assert {ref.storage.location for ref in c.tensors().values()} == {"cuda:0"}


def test_ties_and_shards_keep_together(cli: Cli, saved: Save) -> None:
    tied = torch.zeros(6, 2)
    saved({"a": tied, "b": tied, "c": tied[1:3], "d": torch.ones(5)}, "a.pt", by_value)
    assert cli("convert", "a.pt", "-o", "b.pt", "--device", "cpu").code == 0
    found = torch.load("b.pt", weights_only=True)
    assert found["a"].data_ptr() == found["b"].data_ptr() == found["c"].data_ptr() - 8
    done = cli("convert", "a.pt", "-o", "out/", "--to", "torch", "--device", "cpu",
               "--max-shard-size", "60")  # fmt: skip
    assert done.code == 0, done.err
    with mc.open("out/pytorch_model.bin.index.json") as shards:
        assert {ref.storage.location for ref in shards.tensors().values()} == {"cpu"}


def test_a_format_that_records_none_says_so(cli: Cli, saved: Save) -> None:
    saved(state(), "a.pt", lambda _: "cuda:0")
    for more in ((), ("--dry-run",)):
        done = cli("convert", "a.pt", "-o", f"b{len(more)}.safetensors", "--device", "cpu", *more)
        assert done.code == 0
        assert "safetensors records no device: cpu is not written" in done.out


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "'meta' is no place for bytes"),
        ("cpu:0", "there is no device 'cpu:0'"),
        ("gpu", "there is no device 'gpu'"),
        ("cuda:x", "there is no device 'cuda:x'"),
        ("cuda:-1", "there is no device 'cuda:-1'"),
        ("", "there is no device ''"),
    ],
)
def test_what_is_no_device(cli: Cli, place: Path, device: str, message: str) -> None:
    torch.save(state(), "a.pt")
    done = cli("convert", "a.pt", "-o", "b.pt", f"--device={device}")
    assert done.code == 2
    assert message in done.err
    assert "cpu, cuda:0" in done.err
    with mc.open("a.pt") as ckpt, pytest.raises(UsageError, match=r"device|bytes"):
        convert(ckpt, device=device)


def test_a_recipe_and_another_edit(cli: Cli, saved: Save, place: Path) -> None:
    """The device alone is a change, too."""
    saved(state(), "a.pt", lambda _: "cuda:0")
    (place / "r.toml").write_text(
        '[[edit]]\ndo = "convert"\ndevice = "cpu"\n[[edit]]\ndo = "strip-prefix"\nprefix = "fc"\n'
    )
    assert cli("apply", "r.toml", "a.pt", "--in-place").code == 0
    assert list(torch.load("a.pt", weights_only=True)) == ["weight", "bias"]
    with mc.open("a.pt") as ckpt:
        assert mc.summary(convert(ckpt, device="mps")).totals.devices == {"mps": 2}
