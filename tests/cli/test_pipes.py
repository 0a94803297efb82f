"""``-``: a checkpoint that comes in on stdin, and one that goes out on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.cli.quick import said as quickly_said

from .files import net, training, write

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and limits of POSIX")
Done = subprocess.CompletedProcess[bytes]


def run(*argv: str, given: bytes | None = b"", **options: Any) -> Done:
    """A command whose stdin is a pipe with these bytes."""
    command = [sys.executable, "-m", "modelctl", *argv]
    if "stdin" not in options:
        options["input"] = given
    return subprocess.run(command, stdout=options.pop("stdout", subprocess.PIPE), **options,
                          stderr=subprocess.PIPE)  # fmt: skip


def shell(line: str) -> Done:
    """A line of the shell, in which ``modelctl`` is ours."""
    ours = f'modelctl() {{ "{sys.executable}" -m modelctl "$@"; }}; set -o pipefail; {line}'
    return subprocess.run(["bash", "-c", ours], capture_output=True)


def loaded(data: bytes, path: Path) -> mc.Checkpoint:
    path.write_bytes(data)
    return mc.open(path)


# ---------------------------------------------------------------------- stdin


@pytest.mark.parametrize(
    "words",
    [
        ("summary", "SRC", "--json"),
        ("ls", "SRC", "--long", "--json"),
        ("ls", "SRC", "conv1", "--format", "csv"),
        ("show", "SRC", "epoch"),
        ("diff", "SRC", "other.pt", "--json"),
        ("diff", "other.pt", "SRC"),
        ("match", "SRC", "--like", "other.pt"),
        ("match", "other.pt", "--like", "SRC"),
        ("identify", "SRC"),
        ("SRC",),
        ("strip-prefix", "SRC", "--dry-run", "--json"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_comes_in_is_read_as_the_file(
    place: Path, words: tuple[str, ...], suffix: str
) -> None:
    write(place / "other.pt", training())
    write(place / f"in{suffix}", training() if suffix == ".pt" else net())
    data = (place / f"in{suffix}").read_bytes()
    named, piped = (
        run(*(one if word == "SRC" else word for word in words), given=data)
        for one in (f"in{suffix}", "-")
    )

    def told(done: Done) -> str:
        text = done.stdout.decode().replace(f"in{suffix}", "-")
        return "\n".join(line for line in text.splitlines() if "read" not in line)

    assert piped.returncode == named.returncode
    assert told(piped) == told(named)
    with (place / f"in{suffix}").open("rb") as file:  # a redirection
        read = [one if one != "SRC" else "-" for one in words]
        assert told(run(*read, stdin=file)) == told(named)


@posix
def test_a_file_on_stdin_is_read_where_it_lies(place: Path) -> None:
    write(place / "in.pt", net())
    with (place / "in.pt").open("rb") as file:
        done = run("ls", "-", stdin=file, env={**os.environ, "TMPDIR": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert b"conv1.weight" in done.stdout
    # behind its start it is what is left of it
    data = b"a line\n" + (place / "in.pt").read_bytes()
    (place / "later.bin").write_bytes(data)
    found = shell("{ read line; modelctl ls -; } < later.bin")
    assert (found.returncode, found.stdout) == (0, done.stdout)


@posix
@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("modelctl ls - < /dev/null", "-: nothing came in on stdin", "can be read once"),
        ("modelctl diff - - < in.pt", None, None),
        ("cat in.pt | modelctl diff - -", "-: nothing came in on stdin", "can be read once"),
        ("modelctl ls - <&-", "-: stdin is closed", None),
        ("modelctl diff in.pt - <&-", "-: stdin is closed", None),
        ("head -c 300 in.pt | modelctl ls -", "the file is cut off", None),
        ("cat in.pt | modelctl drop - --pattern fc --in-place", "stdin", "-o -"),
        ("cat in.pt | modelctl convert - -o out/", "stdin has no name", "-o FOLDER/NAME.pt"),
        ("cat in.pt | modelctl convert - in.pt -o out/", "stdin has no name", None),
        ("cat index.json | modelctl ls -", "nothing lies beside stdin", "by its name"),
    ],
)
def test_what_stdin_is_not(place: Path, line: str, message: str | None, hint: str | None) -> None:
    write(place / "in.pt", net())
    index = {"metadata": {}, "weight_map": {"fc.weight": "in.pt"}}
    (place / "index.json").write_text(json.dumps(index))
    done = shell(line)
    said = done.stderr.decode()
    if message is None:
        assert done.returncode == 0, said
        return
    assert done.returncode == 2
    assert said.startswith("error: ")
    assert message in said
    assert hint is None or hint in said.partition("hint: ")[2]
    assert sorted(os.listdir()) == ["in.pt", "index.json"]


@posix
def test_nothing_is_awaited_from_a_terminal(place: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    try:
        done = run("ls", "-", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"stdin is a terminal" in done.stderr
    assert b"hint: modelctl COMMAND - < FILE" in done.stderr


@posix
def test_no_room_for_what_comes_in(place: Path) -> None:
    write(place / "in.pt", net(fill=1.0))
    spool = place / "spool"
    spool.mkdir()
    done = shell(f"export TMPDIR={spool}; cat in.pt | (ulimit -f 1; modelctl ls -)")
    said = done.stderr.decode()
    assert done.returncode == 2
    assert f"-: no room for what comes in on stdin, in {spool}: File too large after" in said
    assert "hint: TMPDIR=" in said
    assert os.listdir(spool) == []


def test_a_file_that_is_called_so(place: Path) -> None:
    write(place / "x.pt", net())
    os.rename("x.pt", "-")
    for name in ("./-", str(place / "-")):
        done = run("ls", name)
        assert b"conv1.weight" in done.stdout, done.stderr
        assert b"conv1.weight" in run("ls", name, "--color=never", "-q").stdout  # by typer
    assert run("drop", "./-", "--pattern", "fc", "-o", "out.pt").returncode == 0
    os.remove("-")
    os.mkdir("-")  # a folder neither
    done = run("drop", "-", "--pattern", "fc", "-o", "-", given=Path("out.pt").read_bytes())
    assert b"no tensor matches" in done.stderr


def test_both_ways_to_read_a_line_know_it() -> None:
    from modelctl.cli.commands import COMMANDS

    found = quickly_said(COMMANDS["keep"], ["-", "--pattern", "fc", "-o", "-"])
    assert found is not None
    assert (found["src"], found["output"]) == ([Path("-")], "-")


# ---------------------------------------------------------------------- stdout


@pytest.mark.parametrize("to", [None, "torch", "safetensors"])
@pytest.mark.parametrize("source", ["in.pt", "in.safetensors", "-"])
def test_one_file_goes_out(place: Path, to: str | None, source: str) -> None:
    write(place / "in.pt", net("module.", 0.5))
    write(place / "in.safetensors", net("module.", 0.5))
    own = "safetensors" if source.endswith("safetensors") else "torch"
    suffix = {"torch": ".pt", "safetensors": ".safetensors"}[to or own]
    given = Path("in.pt").read_bytes()
    options = () if to is None else ("--to", to)
    done = run("strip-prefix", source, "-o", "-", *options, given=given)
    assert done.returncode == 0, done.stderr
    assert run("strip-prefix", source, "-o", f"archive{suffix}", given=given).returncode == 0
    assert done.stdout == Path(f"archive{suffix}").read_bytes()
    text = done.stderr.decode()
    assert f"{source} -> -   0 kept, 12 renamed" in text
    quiet = run("strip-prefix", source, "-o", "-", *options, "-q", given=given)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, b"")
    assert not Path("-").exists()


def test_it_is_as_torch_saves_to_a_file_object(place: Path) -> None:
    torch = pytest.importorskip("torch")
    saved = BytesIO()
    torch.save({"fc.weight": torch.arange(6.0)}, saved)
    done = run("convert", "-", "-o", "-", given=saved.getvalue())
    assert done.returncode == 0, done.stderr
    theirs, ours = (zipfile.ZipFile(BytesIO(one)) for one in (saved.getvalue(), done.stdout))
    assert [one.filename for one in ours.infolist()] == [one.filename for one in theirs.infolist()]
    found = torch.load(BytesIO(done.stdout), weights_only=True)
    assert torch.equal(found["fc.weight"], torch.arange(6.0))


def test_large_storages_with_and_without_checksums(place: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.randn(500_000), "b": torch.randn(3), "c": torch.randn(300, 1000)}
    torch.save(tensors, "in.pt")
    torch.save(tensors, "old.pt", _use_new_zipfile_serialization=False)
    line = "modelctl convert SRC -o - --to safetensors -q | modelctl convert - -o - --to torch -q"
    for source in ("in.pt", "old.pt"):
        data = shell(line.replace("SRC", source)).stdout
        found = torch.load(BytesIO(data), weights_only=True)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@posix
def test_a_pipeline_of_edits(place: Path) -> None:
    write(place / "in.pt", training())
    (place / "r.toml").write_text('[[edit]]\ndo = "strip-prefix"\n')
    done = shell(
        "cat in.pt | modelctl apply r.toml - -o - -q | modelctl drop - --pattern fc -o - -q"
        " | modelctl merge --model - --epoch 9 -o - 2>/dev/null | modelctl show - epoch"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"9\n", b"")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("split", "in.pt", "-o", "-"), "stdout takes one file", "-o FOLDER/"),
        (("split", "in.pt", "-o", "-", "--dry-run"), "stdout takes one file", "-o FOLDER/"),
        (
            ("convert", "in.pt", "-o", "-", "--max-shard-size", "1kB"),
            "stdout takes one file, no shards",
            "-o FOLDER/",
        ),
        (("convert", "in.pt", "in.pt", "-o", "-"), "stdout takes one file, not 2", None),
        (("convert", "old.pt", "-o", "-"), "-: which format? torch legacy is not written", "--to"),
        (("convert", "in.pt", "-o", "-", "--in-place"), "-o and --in-place: one of them", None),
        (("convert", "in.pt", "-o", "-", "--to", "onnx"), "no format 'onnx'", None),
        (("convert", "in.pt", "-o", "-", "--to", "safetensors"), "-: ", "--weights-only"),
    ],
)
def test_what_does_not_go_out(
    place: Path, words: tuple[str, ...], message: str, hint: str | None
) -> None:
    torch = pytest.importorskip("torch")
    write(place / "in.pt", training())
    torch.save({"w": torch.ones(2)}, "old.pt", _use_new_zipfile_serialization=False)
    done = run(*words)
    text = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in text
    assert hint is None or hint in text.partition("hint: ")[2]
    assert sorted(os.listdir()) == ["in.pt", "old.pt"]
    done = run(*words, "--json")  # what is data goes nowhere near it
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in json.loads(done.stderr)["error"]["message"]


@posix
def test_no_binary_for_a_terminal(place: Path) -> None:
    import pty

    write(place / "in.pt", net())
    ours, theirs = pty.openpty()
    try:
        done = run("convert", "in.pt", "-o", "-", stdout=theirs)
        dry = run("convert", "in.pt", "-o", "-", "--dry-run", stdout=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"stdout is a terminal" in done.stderr
    assert b"hint: > FILE, | COMMAND or -o FILE" in done.stderr
    assert dry.returncode == 0


def test_a_dry_run_leaves_stdout_empty(place: Path) -> None:
    write(place / "in.pt", net("module."))
    done = run("strip-prefix", "in.pt", "-o", "-", "--dry-run")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"in.pt -> -   0 kept, 12 renamed, 0 removed; dry run, nothing written" in done.stderr
    done = run("strip-prefix", "in.pt", "-o", "-", "--dry-run", "--json")
    assert (done.returncode, done.stdout) == (0, b"")
    assert json.loads(done.stderr)["output"] == "-"


@posix
def test_a_reader_that_has_seen_enough(place: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(1_000_000)}, "in.pt")
    done = shell("modelctl convert in.pt -o - | head -c 10; exit ${PIPESTATUS[0]}")
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 10, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout(place: Path) -> None:
    write(place / "in.pt", net())
    done = shell("modelctl convert in.pt -o - > /dev/full")
    assert done.returncode == 2
    assert b"error: stdout: not written whole: No space left on device" in done.stderr


@posix
def test_stdout_that_is_closed(place: Path) -> None:
    write(place / "in.pt", net())
    done = shell("modelctl convert in.pt -o - >&-")
    assert done.returncode == 2
    assert b"stdout is closed" in done.stderr


def test_damage_is_seen_before_all_is_out(place: Path) -> None:
    """What is cut off can't be taken for whole by who reads it."""
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(100_000), "b": torch.ones(2)}, "in.pt")
    data = bytearray(Path("in.pt").read_bytes())
    data[len(data) // 2] ^= 1
    done = run("convert", "-", "-o", "-", "--to", "safetensors", given=bytes(data))
    assert done.returncode == 2
    assert b"the tensor 'a' is damaged" in done.stderr
    with pytest.raises(mc.errors.UnreadableError):
        loaded(done.stdout, place / "cut")


@posix
def test_what_is_redirected_may_be_what_is_replaced(place: Path) -> None:
    write(place / "in.pt", net("module."))
    done = shell("modelctl strip-prefix - -o in.pt --overwrite < in.pt")
    assert done.returncode == 0, done.stderr
    with mc.open("in.pt") as ckpt:
        assert "conv1.weight" in ckpt.tensors()


def test_in_python(place: Path) -> None:
    """``save`` and ``edit`` take it, too."""
    write(place / "in.pt", net())
    code = "import modelctl as mc; mc.save(mc.open('-'), '-', to='safetensors')"
    done = subprocess.run(
        [sys.executable, "-c", code], input=Path("in.pt").read_bytes(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    with loaded(done.stdout, place / "out") as found:
        assert found.origin is not None
        assert found.origin.format == "safetensors"
