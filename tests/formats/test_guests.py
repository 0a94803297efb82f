"""Formats of other packages that go wrong: the culprit is named, and nobody else suffers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.cli import run
from modelctl.core.checkpoint import Origin
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import ModelctlError, UnreadableError, UsageError
from modelctl.formats import guests
from modelctl.storage.layout import LayoutBuilder
from tests.cli.files import net, write
from tests.formats.test_third_party import MAGIC, Lines, names


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


def gives(value: Any) -> Callable[..., Any]:
    return lambda *_: value


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts formats where an installer would: modules with an entry point each."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    others = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), others))))

    def do(name: str, code: str) -> None:
        (site / f"guest_{name}.py").write_text(code)
        info = site / f"guest_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: guest-{name}\nVersion: 1.0\n")
        points = f"[modelctl.formats]\n{name} = guest_{name}:made\n"
        (info / "entry_points.txt").write_text(points)
        guests.third_party.cache_clear()

    yield do
    for module in [name for name in sys.modules if name.startswith("guest_")]:
        del sys.modules[module]
    guests.third_party.cache_clear()


LINES = "from tests.formats.test_third_party import Lines as made\n"
BROKEN = {
    "raise ImportError('gone')": "can't be loaded: ImportError: gone",
    "raise SystemExit(2)": r"can't be loaded: SystemExit\(2\)",
    "made = 3": "is no modelctl.formats.base.Format",
    LINES + "made = type('M', (made,), {'name': 3})": "its name is no text",
    LINES + "made = type('M', (made,), {'suffixes': '.x'})": "its suffixes are no tuple of texts",
    LINES + "made = type('M', (made,), {'shard_names': 'a'})": "its shard_names are no pair",
}


@pytest.mark.parametrize(("code", "said"), BROKEN.items(), ids=range(len(BROKEN)))
def test_one_that_can_not_be_loaded(
    install: Callable[..., None], tmp_path: Path, code: str, said: str
) -> None:
    install("broken", code)
    install("lines", LINES)  # is asked, though the other one comes first
    path = write(tmp_path / "in.pt", net())
    mc.edit(path, "convert", output=tmp_path / "out.safetensors")
    mc.edit(path, "convert", output=tmp_path / "sh", max_shard_size=700)
    mc.edit(path, "convert", output=tmp_path / "out.lines")
    assert names(tmp_path / "out.lines").keys() == net().keys()
    (tmp_path / "unknown").write_bytes(b"whatever")
    for call in (
        lambda: mc.open(tmp_path / "unknown"),
        lambda: mc.edit(path, "convert", output=tmp_path / "x", to="broken"),
    ):
        with pytest.raises(ModelctlError, match=said) as e:
            call()
        assert "the format 'broken' of guest-broken" in e.value.message
        assert e.value.hint == "upgrade or uninstall guest-broken"
    with pytest.raises(UsageError, match=r"does not say which format.*guest-broken"):
        mc.edit(path, "convert", output=tmp_path / "out.what")


def test_it_is_not_even_loaded_for_ours(install: Callable[..., None], tmp_path: Path) -> None:
    install("loud", "open('loaded', 'w')")
    write(tmp_path / "a.pt", net())
    done = subprocess.run(
        [sys.executable, "-m", "modelctl", "convert", "a.pt", "-o", "b.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "loaded").exists()


def test_one_that_ends_the_program(
    install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = "def ends(*_): raise SystemExit(0)\n"
    install("ends", LINES + ends + "made = type('E', (made,), {'sniff': ends})")
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((os.environ["PYTHONPATH"], root)))
    (tmp_path / "x").write_bytes(b"whatever")
    done = subprocess.run(
        [sys.executable, "-m", "modelctl", "ls", "x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "the format 'lines' of guest-ends: its sniff() raises SystemExit(0)" in done.stderr


# ------------------------------------------------------------------ calls


def use(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> None:
    """A guest whose methods are these."""
    bad = type("Bad", (Lines,), methods)()
    guest = guests.WritableGuest(bad, "bad-package")
    good = guests.WritableGuest(type("Good", (Lines,), {"name": "good"})(), "good-package")
    from modelctl.formats import registry, single

    for module in (registry, single):
        monkeypatch.setattr(module, "third_party", lambda: (guest, good))


@pytest.mark.parametrize(
    ("method", "call", "said"),
    [
        ("read", raises(KeyError("x")), r"its read\(\) raises KeyError: 'x'"),
        ("read", gives(None), r"its read\(\) gives a NoneType, not a Checkpoint"),
        ("read", raises(SystemExit(3)), r"its read\(\) raises SystemExit\(3\)"),
        ("losses", raises(AssertionError()), r"its losses\(\) raises AssertionError"),
        ("losses", gives(None), r"its losses\(\) gives a NoneType, not a list of Loss"),
        ("losses", gives(["a"]), r"its losses\(\) gives a list, not a list of Loss"),
        ("layout", raises(OSError(5, "io")), r"its layout\(\) raises OSError"),
        ("layout", gives(b""), r"its layout\(\) gives a bytes, not a FileLayout"),
        ("layout", gives(LayoutBuilder().file("other")), r"is of a file 'other', not of 'out"),
        ("remarks", raises(ValueError("no")), r"its remarks\(\) raises ValueError: no"),
        ("remarks", gives([1]), r"its remarks\(\) gives a list, not a list of Note"),
    ],
)
def test_a_call_that_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, call: Any, said: str
) -> None:
    path = write(tmp_path / "in.pt", net())
    use(monkeypatch)
    mc.edit(path, "convert", output=tmp_path / "in.lines")
    use(monkeypatch, **{method: call})
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ModelctlError, match=said) as e:
        mc.edit(tmp_path / "in.lines", "convert", output=tmp_path / "out.lines")
    assert "the format 'lines' of bad-package" in e.value.message
    assert e.value.hint == "tell its authors, or uninstall bad-package"
    if method != "remarks":
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("call", [raises(RuntimeError("x")), gives("yes"), gives(None)])
def test_a_sniff_that_goes_wrong_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Any
) -> None:
    use(monkeypatch)
    mc.edit(write(tmp_path / "in.pt", net()), "convert", output=tmp_path / "in.lines")
    use(monkeypatch, sniff=call)
    with mc.open(tmp_path / "in.lines") as ckpt:
        assert ckpt.origin is not None
        assert list(ckpt.state_dict()) == list(net())
    (tmp_path / "x").write_bytes(b"whatever")
    with pytest.raises(ModelctlError, match=r"its sniff\(\)"):
        mc.open(tmp_path / "x")


def test_what_it_says_on_purpose_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(MAGIC)
    use(monkeypatch, read=raises(UnreadableError("no", path="x")))
    with pytest.raises(UnreadableError, match=r"^x: no"):
        mc.open(tmp_path / "x")
    use(monkeypatch, sniff=gives(False), explain=raises(ValueError("z")))
    (tmp_path / "x").write_bytes(b"?")
    with pytest.raises(ModelctlError, match=r"its explain\(\) raises ValueError: z"):
        mc.open(tmp_path / "x")


def test_what_its_storages_raise_is_not_called_a_bug_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bad(MemoryStorage):
        def chunks(self, start: int = 0, stop: int | None = None) -> Any:
            raise RuntimeError("the other side")

    bad = TensorRef(BY_NAME["float32"], (2,), Bad(bytes(8)))
    origin = Origin("x", "lines", "lines", 6)
    use(monkeypatch, read=gives(mc.Checkpoint(ordered_dict({"a": bad}), origin)))
    (tmp_path / "x").write_bytes(MAGIC)
    monkeypatch.delenv("MODELCTL_DEBUG", raising=False)
    assert run(["convert", str(tmp_path / "x"), "-o", str(tmp_path / "x.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "RuntimeError: the other side" in said
    assert f"or in {__file__}, line " in said
    assert os.listdir(tmp_path) == ["x"]
