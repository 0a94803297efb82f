"""Every case comes to the end that it says, and nothing is run on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from .case import Case, Fine, Found, Odd, Refused
from .cases import CASES
from .reading import READER, Reading, read_all

ERRORS = {"UnreadableError", "SeveralError", "UnsupportedError", "ModelctlError"}


def of(kind: type) -> pytest.MarkDecorator:
    cases = [case for case in CASES if isinstance(case.expect, kind)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def test_there_is_a_case_of_each_kind() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 300
    kinds = {kind: sum(isinstance(case.expect, kind) for case in CASES) for kind in
             (Refused, Found, Odd, Fine)}  # fmt: skip
    assert min(kinds.values()) > 5


@of(Refused)
def test_refused(case: Case, readings: dict[str, Reading]) -> None:
    """With an error that says where: the file, the member in it, the byte."""
    seen, expect = readings[case.name], case.expect
    assert isinstance(expect, Refused)
    assert (seen.error, expect.text in seen.text) == (expect.error, True), seen.text
    assert expect.late or str(_folder(seen)) in seen.text
    assert seen.member == expect.member
    if expect.offset == -1:
        assert seen.offset is not None
        assert f"at byte {seen.offset:,}: " in seen.text
    else:
        assert seen.offset == expect.offset
    if expect.member is not None:
        assert expect.member in seen.text
    assert not seen.copies.exists()


def _folder(seen: Reading) -> Path:
    return seen.opened if seen.opened.is_dir() else seen.opened.parent


@of(Found)
def test_found(case: Case, readings: dict[str, Reading]) -> None:
    seen, expect = readings[case.name], case.expect
    assert isinstance(expect, Found)
    assert seen.error is None, seen.text
    assert [expect.level, expect.id, expect.name] in seen.findings


@of(Odd)
def test_odd(case: Case, readings: dict[str, Reading]) -> None:
    seen, expect = readings[case.name], case.expect
    assert isinstance(expect, Odd)
    assert seen.error is None, seen.text
    assert any(expect.text in warning for warning in seen.warnings), seen.warnings
    assert seen.findings == []


@of(Fine)
def test_fine(case: Case, readings: dict[str, Reading]) -> None:
    seen = readings[case.name]
    assert (seen.error, seen.findings, seen.warnings) == (None, [], []), seen.text


def test_no_error_but_ours(readings: dict[str, Reading]) -> None:
    """Nor a MemoryError: the reader has little address space, whatever a header declares."""
    odd = {name: seen.text for name, seen in readings.items() if seen.error not in {None, *ERRORS}}
    assert odd == {}


def test_nothing_is_imported_or_run(readings: dict[str, Reading]) -> None:
    assert {name: seen.heard for name, seen in readings.items() if seen.heard} == {}


def test_few_bytes_are_read_as_tensors(readings: dict[str, Reading]) -> None:
    assert max(seen.bytes for seen in readings.values()) < 1 << 20


@pytest.mark.parametrize(
    ("instead", "heard"),
    [
        ("__import__('this_is_no_module')", "import this_is_no_module"),
        ("eval('1')", "compile <string>"),
        ("__import__('pickle').loads(b'cbuiltins\\nlen\\n.')", "pickle.find_class"),
        ("os.system('true')", "os.system"),
        ("os.mkdir(path + 'x')", "os.mkdir"),
        ("open(path + 'x', 'w')", "open"),
        ("os.open(path + 'x', os.O_CREAT)", "open"),
        ("os.symlink('/', path + 'x')", "os.symlink"),
    ],
)
def test_the_hook_hears(instead: str, heard: str, tmp_path: Path) -> None:
    """The same reader, with a library that does what it must not, is caught."""
    text = READER.read_text()
    spy = text.replace("    with mc.open(path)", f"    {instead}\n    with mc.open(path)")
    assert spy != text
    (tmp_path / "x").write_bytes(b"x")
    (seen,) = read_all([tmp_path / "x"], tmp_path / "out", script=spy)
    assert any(one.startswith(heard) for one in seen.heard), seen.heard


@pytest.mark.parametrize(
    ("instead", "error"),
    [("bytes(1 << 30)", "MemoryError"), ("[].x", "AttributeError")],
)
def test_other_errors_are_told(instead: str, error: str, tmp_path: Path) -> None:
    text = READER.read_text()
    spy = text.replace("    with mc.open(path)", f"    {instead}\n    with mc.open(path)")
    (tmp_path / "x").write_bytes(b"x")
    (seen,) = read_all([tmp_path / "x"], tmp_path / "out", script=spy)
    assert seen.error == f"{error}, which is not ours"


def test_what_never_ends_is_ended(tmp_path: Path) -> None:
    text = READER.read_text().replace("CPU_SECONDS = 60", "CPU_SECONDS = 1")
    spy = text.replace("    with mc.open(path)", "    while True: pass\n    with mc.open(path)")
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(AssertionError, match="exit code -"):
        read_all([tmp_path / "x"], tmp_path / "out", script=spy)
