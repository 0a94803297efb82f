"""scan: a verdict on every file of the hostile set, in whatever it is packed; nothing is run."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.core.checkpoint import Finding
from modelctl.errors import RefusedError
from modelctl.scanning.rules import RULES
from modelctl.scanning.scan import scan

from ..hostile.build.containers import (
    STATE_DICT,
    Entry,
    legacy,
    tar,
    tar_members,
    torch_zip,
    zipped,
)
from ..hostile.build.pickles import (
    EMPTY_DICT,
    FALSE,
    NONE,
    POP,
    TRUE,
    call,
    entries,
    group,
    make,
    mapping,
    name,
    number,
    program,
    text,
    with_state,
)
from ..hostile.case import Case, Fine, Found, Odd, Refused
from ..hostile.cases import CASES

ATTACK = call(name("os", "system"), text("echo > fired"))
EVIL = program(ATTACK)
EVIL_FILE = torch_zip(program(ATTACK, POP, STATE_DICT))


def of(kind: type) -> pytest.MarkDecorator:
    cases = [case for case in CASES if isinstance(case.expect, kind)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def one(path: Path) -> list[tuple[str, Finding]]:
    """(member, finding) of the one file that is dangerous."""
    found = [seen for seen in scan(path) if seen.verdict == "dangerous"]
    assert len(found) == 1
    return [(seen.member, seen.finding) for seen in found[0].sightings]


# ---------------------------------------------------------------------- the hostile set


@of(Found)
def test_found(case: Case, tmp_path: Path) -> None:
    expect = case.expect
    assert isinstance(expect, Found)
    found = scan(case.write(tmp_path))
    kinds = [(seen.finding.level, seen.finding.id, seen.finding.name) for seen in found.findings]
    assert (expect.level, expect.id, expect.name) in kinds
    assert found.verdict == expect.level
    assert found.exit_code() == (expect.level == "dangerous")
    assert found.exit_code(strict=True) == 1


@of(Refused)
def test_refused_is_never_clean(case: Case, tmp_path: Path) -> None:
    """What is found only when a tensor's bytes are read is for verify."""
    expect = case.expect
    assert isinstance(expect, Refused)
    opened = case.write(tmp_path)
    if expect.late or opened.is_dir() or any(not isinstance(one, bytes) for one in case.files):
        return
    assert scan(opened).verdict in ("dangerous", "malformed", "unscanned", "suspicious")


@of(Fine)
def test_fine_is_clean(case: Case, tmp_path: Path) -> None:
    found = scan(case.write(tmp_path))
    assert found.verdict == "clean", [*found[0].rows()]
    assert str(found).endswith("no finding")


@of(Odd)
def test_odd_is_not_dangerous(case: Case, tmp_path: Path) -> None:
    usual = ("clean", "suspicious")
    # the reader of a zip reads one pickle, others read on
    allowed = ("dangerous",) if case.name.endswith("a second pickle after STOP") else usual
    assert scan(case.write(tmp_path)).verdict in allowed


# ---------------------------------------------------------------------- wherever it lies


def zip_of(*members: tuple[str, bytes], deflated: bool = False) -> bytes:
    out = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", how) as archive:
        for named, data in members:
            archive.writestr(named, data)
    return out.getvalue()


def tar_of(mode: str, *members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for named, data in members:
            info = tarfile.TarInfo(named)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def array_of(body: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + body


def saved_by_sb3(body: bytes) -> bytes:
    entry = {":type:": "x", ":serialized:": base64.b64encode(body).decode()}
    return zip_of(("data", json.dumps({"policy": [entry]}).encode()), ("policy.pth", torch_zip()))


PLACES: dict[str, tuple[bytes, str]] = {
    "a pickle": (EVIL, ""),
    "a pickle of protocol 0": (b"cos\nsystem\n(S'echo > fired'\ntR.", ""),
    "behind another pickle": (program(b"N") + EVIL, ""),
    "a legacy file": (legacy(program(ATTACK, POP, STATE_DICT)), ""),
    "a side pickle of a zip": (zip_of(("a/data.pkl", program(b"N")), ("x.pkl", EVIL)), "x.pkl"),
    "a member with no suffix": (zip_of(("a/data.pkl", program(b"N")), ("x", EVIL)), "x"),
    "a member called .json": (zip_of(("x.json", EVIL)), "x.json"),
    "a member that is deflated": (zip_of(("x.pkl", EVIL), deflated=True), "x.pkl"),
    "a checkpoint in a zip": (zip_of(("in.pt", EVIL_FILE)), "in.pt!a/data.pkl"),
    "a zip in a zip in a zip": (
        zip_of(("1.zip", zip_of(("2.zip", zip_of(("x.pkl", EVIL)))))),
        "1.zip!2.zip!x.pkl",
    ),
    "an export with data.pkl": (
        zip_of(("a/archive_format", b"pt2"), ("a/data.pkl", EVIL)),
        "a/data.pkl",
    ),
    "an export's sample inputs": (
        zip_of(("a/archive_format", b"pt2"), ("a/data/sample_inputs/model.pt", EVIL_FILE)),
        "a/data/sample_inputs/model.pt!a/data.pkl",
    ),
    "an array of objects": (array_of(EVIL), ""),
    "an array in a npz": (zip_of(("x.npy", array_of(EVIL))), "x.npy"),
    "stable-baselines3": (saved_by_sb3(EVIL), "data"),
    "a tar": (tar_of("w:", ("x.pkl", EVIL)), "x.pkl"),
    "a tar of torch 0.1": (
        tar({**tar_members(), "pickle": program(ATTACK, POP, STATE_DICT)}),
        "pickle",
    ),
    "a checkpoint in a tar.gz": (tar_of("w:gz", ("x.pt", EVIL_FILE)), "unpacked!x.pt!a/data.pkl"),
    "gzip": (gzip.compress(EVIL), "unpacked"),
    "bzip2": (bz2.compress(EVIL), "unpacked"),
    "xz": (lzma.compress(EVIL), "unpacked"),
    "lzma": (lzma.compress(EVIL, lzma.FORMAT_ALONE), "unpacked"),
    "zlib": (zlib.compress(EVIL), "unpacked"),
    "a zip behind something": (b"#!/bin/sh\n" + zip_of(("x.pkl", EVIL)), "x.pkl"),
    "a pickle before a zip": (EVIL + zip_of(("x", b"")), ""),
    "a zip that is broken": (
        zip_of(("x.pkl", EVIL), ("X.PKL", b"")),
        "x.pkl",
    ),
}


@pytest.mark.parametrize("where", PLACES)
def test_wherever_it_lies(where: str, tmp_path: Path) -> None:
    data, member = PLACES[where]
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    found = one(path)
    assert (member, "call", "os.system") in [(at, seen.id, seen.name) for at, seen in found]
    assert scan(path).exit_code() == 1


def test_where_in_the_pickle(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(program(STATE_DICT, POP, ATTACK, POP, STATE_DICT)))
    ((member, found),) = one(path)
    assert member == "a/data.pkl"
    assert found.opcode == "REDUCE"
    with zipfile.ZipFile(path) as archive:
        data = archive.read(member)
    assert data[found.offset : found.offset + 1] == b"R"
    assert data.index(b"cos\nsystem") < found.offset


def test_an_archive_that_is_too_deep_is_not_clean(tmp_path: Path) -> None:
    data = EVIL
    for i in range(12):
        data = zip_of((f"{i}.zip", data))
    (tmp_path / "x.zip").write_bytes(data)
    assert scan(tmp_path / "x.zip").verdict == "unscanned"


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    import modelctl.scanning.walk as walk

    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(walk._LEAST + 1), 9))
    assert "unscanned" in {row[0] for row in scan(tmp_path / "x.gz")[0].rows()}


# ---------------------------------------------------------------------- folders


def test_a_folder_is_all_in_it(tmp_path: Path) -> None:
    inner = tmp_path / "run" / "last"
    inner.mkdir(parents=True)
    (inner / "a.pt").write_bytes(torch_zip())
    (inner / "b.pt").write_bytes(EVIL_FILE)
    (tmp_path / "run" / "README.md").write_text("import os\nos.system\n")
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "link.pt").symlink_to(inner / "b.pt")
    found = scan(tmp_path)
    assert [(Path(seen.path).name, seen.verdict) for seen in found] == [
        ("a.pt", "clean"),
        ("b.pt", "dangerous"),
    ]


def test_parts_of_a_dcp_folder(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return eval, ("1",)

    saved = {"w": torch.ones(3), "extra": {"clean": 1}, "evil": Evil()}
    dcp.save(saved, checkpoint_id=str(tmp_path / "dcp"))
    ((member, found),) = one(tmp_path)
    assert member == "__0_0.distcp!evil!archive/data.pkl"
    assert found.name == "builtins.eval"
    (tmp_path / "dcp" / ".metadata").write_bytes(EVIL)
    assert scan(tmp_path).verdict == "dangerous"


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    assert scan(tmp_path).exit_code() == 2
    assert scan(tmp_path / "README.md").verdict == "unscanned"


# ---------------------------------------------------------------------- as a guard, and in a CI


def test_the_guard(tmp_path: Path) -> None:
    clean, evil = tmp_path / "clean.pt", tmp_path / "evil.pt"
    clean.write_bytes(torch_zip())
    evil.write_bytes(EVIL_FILE)
    mc.scan(clean).check()
    with pytest.raises(RefusedError, match=r"evil\.pt: dangerous: calls os\.system"):
        mc.scan([clean, evil]).check()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(torch_zip()[:-9])
    with pytest.raises(RefusedError, match="malformed"):
        mc.scan(cut).check()


def test_every_kind_of_finding_has_its_rule() -> None:
    """Those that the policy and the walk make are all in the list, and no others."""
    import re

    import modelctl.pickles as pickles
    import modelctl.scanning as scanning

    made = set()
    for room in (pickles, scanning):
        assert room.__file__ is not None
        for path in Path(room.__file__).parent.glob("*.py"):
            source = path.read_text("utf-8")
            pattern = (
                r'Finding\(\s*"\w+",\s*"([\w-]+)"|\.danger\(\s*"([\w-]+)"|\.odd\(\w+, "([\w-]+)"'
            )
            made |= {id for found in re.findall(pattern, source) for id in found if id}
    assert made | {"malformed", "unscanned"} == {rule.id for rule in RULES}


def test_nothing_is_imported_or_opened_for_writing(tmp_path: Path) -> None:
    """An audit hook hears what files would do; what the scanner itself needs is loaded before."""
    import subprocess

    folder = tmp_path / "set"
    for i, case in enumerate(CASES):
        if all(isinstance(data, bytes) for data in case.files.values()):
            (folder / str(i)).mkdir(parents=True)
            case.write(folder / str(i))
    script = """
import sys, modelctl as mc
mc.scan(sys.argv[2])  # what it needs is loaded
heard = []
def hook(event, args):
    if event in ("exec", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        heard.append((event, str(args)[:200]))
    if event == "import" and not args[0].startswith("encodings."):
        heard.append((event, args[0]))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        if "/tmp" not in str(args[0]) or "unpacked" in str(args[0]):
            heard.append((event, str(args[:2])))
sys.addaudithook(hook)
mc.scan(sys.argv[1])
print(heard)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.stdout.strip() == "[]", (ran.stdout[:2000], ran.stderr[-2000:])
    assert not [*tmp_path.rglob("fired")]


# ---------------------------------------------------------------------- one file after the other


def items(*files: bytes) -> bytes:
    """As torch.distributed.checkpoint has them in the file of a rank."""
    return b"".join(files)


def saved(root: object, path: Path) -> bytes:
    """A zip as torch writes it, with zip64 records at its end."""
    mc.save(mc.Checkpoint(root), path, overwrite=True)
    return path.read_bytes()


@pytest.mark.parametrize("at", range(3))
def test_each_of_several_zips_is_looked_at(at: int, tmp_path: Path) -> None:
    """The last one's end record leads into the first where all are alike."""
    clean = saved({"a": 1}, tmp_path / "x.pt")
    parts = [clean, clean, clean]
    parts[at] = EVIL_FILE
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(items(*parts))
    found = scan(path)
    assert found.verdict == "dangerous"
    start = sum(map(len, parts[:at]))
    assert any(seen.member.startswith(f"at {start:,}!") for seen in found.findings)
    path.write_bytes(items(clean, clean, clean))
    assert scan(path).verdict == "suspicious"


def test_zips_one_after_the_other_elsewhere_are_malformed(tmp_path: Path) -> None:
    """Which of them is read depends on who reads."""
    clean = saved({"a": 1}, tmp_path / "x.pt")
    path = tmp_path / "y.pt"
    path.write_bytes(clean + clean)
    assert scan(path).verdict == "malformed"


def test_a_broken_zip_with_a_zip_in_it_is_read_as_one(tmp_path: Path) -> None:
    """What looks like several is looked at as the one that Python's reader sees, too."""
    inner = saved({"a": 1}, tmp_path / "x.pt")
    members = [Entry("a/data.pkl", EVIL), Entry("a/x.pt", inner), Entry("a/data/0", b"x")]
    path = tmp_path / "y.pt"
    path.write_bytes(zipped(*members, Entry("a/data/0", b"x")))  # twice: refused
    assert scan(path).verdict == "dangerous"


def test_a_zip_whose_end_lies_in_another_is_refused(tmp_path: Path) -> None:
    clean = saved({"a": 1}, tmp_path / "x.pt")
    path = tmp_path / "y.pt"
    path.write_bytes(clean + EVIL_FILE + clean)
    with pytest.raises(mc.ModelctlError, match="bytes between its two end records"):
        mc.open(path)


def test_bytes_behind_a_legacy_file_are_odd(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(legacy())
    assert scan(path).verdict == "clean"
    path.write_bytes(legacy() + EVIL)
    assert [(one.finding.id, one.finding.level) for one in scan(path).findings] == [
        ("odd-file", "suspicious")
    ]


# ---------------------------------------------------------------------- joblib


def joblib_array(dims: int, code: str, behind: bytes, aligned: bool = True) -> bytes:
    """An array as joblib writes it into a stream (numpy_pickle.NumpyArrayWrapper), and its data."""
    dtype = call(name("numpy", "dtype"), text(code), FALSE, TRUE)
    state = {
        "subclass": name("numpy", "ndarray"),
        "shape": group(number(dims)),
        "order": text("C"),
        "dtype": dtype,
        "allow_mmap": TRUE,
        "numpy_array_alignment_bytes": number(16) if aligned else NONE,
    }
    padding = b"\x03" + b"\xff" * 3 if aligned and code != "O8" else b""
    made = make(name("joblib.numpy_pickle", "NumpyArrayWrapper"))
    return with_state(made, EMPTY_DICT + entries(state)) + padding + behind


FLOATS = joblib_array(4, "f8", b"\x0b" * 32)


def test_what_follows_an_array_of_joblib(tmp_path: Path) -> None:
    path = tmp_path / "x.joblib"
    words = joblib_array(2, "U5", b"\0" * 40, aligned=False)
    path.write_bytes(program(mapping(a=FLOATS, b=words)))
    assert (scan(path).verdict, scan(path)[0].problems) == ("suspicious", [])
    assert [one.finding.id for one in scan(path).findings] == ["custom-class"]
    path.write_bytes(program(mapping(a=FLOATS, b=ATTACK)))
    assert scan(path).verdict == "dangerous"
    path.write_bytes(zlib.compress(program(mapping(a=FLOATS, b=ATTACK))))
    assert scan(path).verdict == "dangerous"


def test_objects_in_an_array_of_joblib(tmp_path: Path) -> None:
    path = tmp_path / "x.joblib"
    path.write_bytes(program(mapping(a=joblib_array(1, "O8", EVIL))))
    assert scan(path).verdict == "dangerous"
    nested = joblib_array(1, "O8", program(joblib_array(1, "O8", EVIL)))
    path.write_bytes(program(mapping(a=nested)))
    assert scan(path).verdict == "dangerous"


def test_opcodes_where_joblib_has_data(tmp_path: Path) -> None:
    """joblib skips them, pickle.load runs them."""
    path = tmp_path / "x.joblib"
    hidden = ATTACK + POP
    array = joblib_array(len(hidden), "u1", hidden, aligned=False)
    path.write_bytes(program(array))
    assert scan(path).verdict == "dangerous"


@pytest.mark.parametrize("dims", [-1, 1 << 59, 1 << 61])
def test_an_array_of_joblib_that_lies(dims: int, tmp_path: Path) -> None:
    path = tmp_path / "x.joblib"
    path.write_bytes(program(joblib_array(dims, "f8", b"")))
    assert scan(path).verdict == "malformed"
