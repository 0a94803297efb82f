"""The frame: parameters named as in the library, help, exit codes, errors, nothing imported."""

from __future__ import annotations

import inspect
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.cli.commands import COMMANDS
from modelctl.inspection.ls import list_tensors

from .files import Cli, Result

LIBRARY: dict[str, Callable[..., Any]] = {
    "summary": mc.summarize,
    "ls": list_tensors,
    "diff": mc.diff,
    "identify": mc.identify,
    "match": mc.match,
    "scan": mc.scan,
    "verify": mc.verify,
    "hash": mc.hash,
    "strip-prefix": mc.strip_prefix,
    "add-prefix": mc.add_prefix,
    "rename": mc.rename,
    "keep": mc.keep,
    "drop": mc.drop,
    "strip-head": mc.strip_head,
    "freeze": mc.freeze,
    "unfreeze": mc.unfreeze,
    "convert": mc.convert,
    "merge": mc.merge,
    "split": mc.split,
}
SOURCES = {"src", "a", "b", "ckpt", "recipe", "map_file"}
OUTPUT = {
    *("output", "in_place", "to", "max_shard_size", "overwrite", "dry_run", "history", "key"),
    "follow_symlinks",
}
DISPLAY = {"format", "json", "color", "quiet"}
# --params and --buffers are the library's role; --long is how it is shown
_LIVE = {"arch", "arch_arg", "input_size", "input_dtype", "device", "trust"}
SPELLED = {
    "summary": (_LIVE, {"progress"}),  # what the bar is told
    "ls": ({"params", "buffers", "long"}, {"role"}),
    "match": ({"like_key", "write_map"}, set()),
    "scan": ({"strict"}, {"paths"}),
    "verify": ({"salvage"}, {"paths", "progress", *OUTPUT}),
    "hash": ({"tensors"}, {"source", *OUTPUT}),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_options_are_the_functions_parameters(name: str) -> None:
    command = inspect.signature(COMMANDS[name]).parameters
    function = inspect.signature(LIBRARY[name]).parameters
    ours, theirs = SPELLED.get(name, (set(), set()))
    options = set(command) - SOURCES - OUTPUT - DISPLAY - ours
    assert options == set(function) - SOURCES - theirs
    for option in options - {"depth"}:  # on the command line text: a number or "all"
        default = function[option].default
        empty = (None, (), [], inspect.Parameter.empty)
        assert command[option].default == default or (
            command[option].default in empty and default in empty
        )


def test_every_command_is_covered() -> None:
    assert set(COMMANDS) - set(LIBRARY) == {"show", "apply"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(cli: Cli, name: str) -> None:
    result = cli(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert re.search(rf"(Example: |\$\()modelctl {name} ", " ".join(result.out.split()))
    assert max(map(len, result.out.splitlines())) <= 80
    for option in inspect.signature(COMMANDS[name]).parameters:
        if option not in {*SOURCES, "path", "model", "pattern", "optimizer"}:
            assert "--" + option.replace("_", "-")[:12] in result.out


def test_no_command_and_version(cli: Cli) -> None:
    assert cli("--version").out == f"modelctl {mc.__version__}\n"
    result = cli()
    assert result.code == 2
    assert result.err.startswith("error: which command?")
    assert cli("--help").code == 0


def error(result: Result, *says: str) -> None:
    """Exit code 2, nothing on stdout, one line of error and at most one of hint on stderr."""
    assert result.code == 2, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[0].startswith("error: "), result.err
    assert len(lines[0]) > len("error: ")
    assert len(lines) <= 2
    if len(lines) == 2:
        assert lines[1].startswith("hint: ")
    assert "Traceback" not in result.err
    assert "bug in modelctl" not in result.err
    for text in says:
        assert text in result.err


READERS = [
    *(("summary",), ("ls",), ("show",), ("strip-prefix", "--dry-run"), ("convert", "--dry-run")),
    *(("freeze", "--dry-run", "--pattern", "*"), ("merge", "--dry-run", "--model")),
]


def test_wrong_usage(cli: Cli, flat: Path) -> None:
    error(cli("summray", flat), "summray")
    error(cli("summary"), "SRC")
    error(cli("summary", flat, "--nonsense"), "--nonsense", "modelctl summary --help")
    error(cli("summary", flat, "--depth", "0"), "--depth")
    error(cli("summary", flat, "--depth", "x"))
    error(cli("summary", flat, "--format", "xml"), "xml")
    error(cli("ls", flat, "--params", "--buffers"), "--params")
    error(cli("ls", flat, "--section", "nowhere"))
    error(cli("ls", flat, "zzz"), "no tensor matches 'zzz'")
    error(cli("show", flat, "zzz"), "nothing at 'zzz'")
    error(cli("diff", flat))
    error(cli("diff", flat, flat, "--rtol", "-1"))
    error(cli("diff", flat, flat, "--regex", "--pattern", "("), "regular expression")
    error(cli("freeze", flat, "--in-place"), "--pattern")
    error(cli("strip-prefix", flat), "--in-place")
    error(cli("strip-prefix", flat, "--in-place", "-o", "x.pt"), "one of them")
    error(cli("strip-prefix", flat, "-o", "x.what"), "suffix", ".safetensors")
    error(cli("strip-prefix", flat, "-o", "x.pt", "--to", "onnx"), "onnx", "torch")
    error(cli("strip-prefix", flat, "-o", "no/such/x.pt"))
    error(cli("strip-prefix", flat, "-o", flat), "--overwrite")
    error(cli("strip-prefix", flat, flat, "-o", "x.pt"), "folder", "-o FOLDER")
    error(cli("strip-prefix", flat, flat, "-o", "a b"), "would go to a b/flat.pt")
    error(cli("summary", flat, "--key", "a.b"), "no state_dict at 'a.b'")
    error(cli("merge", "-o", "x.pt"), "--model")
    error(cli("merge", "--model", flat, "--epoch", "-1", "-o", "x.pt"))
    error(cli("merge", "--model", flat, "--lr", "nan", "-o", "x.pt"), "--lr")
    error(cli("merge", "--model", flat, "--set", "x", "-o", "x.pt"), "KEY=VALUE")
    error(cli("merge", "--model", flat, "--set", "a.b=1", "-o", "x.pt"), "--set a.b")
    error(cli("merge", "--model", flat, "--set", "a=" + "[" * 5000, "-o", "x.pt"))
    error(cli("apply", "none.toml", flat, "-o", "x.pt"), "none.toml")
    assert os.listdir() == ["flat.pt"]


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_what_is_no_checkpoint(cli: Cli, place: Path, command: tuple[str, ...]) -> None:
    (place / "empty.pt").write_bytes(b"")
    (place / "garbage.pt").write_bytes(bytes(range(256)) * 9)
    (place / "text.pt").write_text("hello\n")
    (place / "page.pt").write_text("<!DOCTYPE html><html>")
    (place / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (place / "folder").mkdir()
    os.mkfifo(place / "fifo.pt")
    (place / "loop.pt").symlink_to("loop.pt")
    for name in ("missing.pt", *sorted(path.name for path in place.iterdir())):
        error(cli(*command, name), name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(cli: Cli, flat: Path) -> None:
    flat.chmod(0)
    error(cli("summary", flat), "flat.pt")


def test_cut_off_files(cli: Cli, flat: Path) -> None:
    data = flat.read_bytes()
    for end in range(1, len(data), 97):
        Path("cut.pt").write_bytes(data[:end])
        error(cli("ls", "cut.pt"), "cut.pt")
    assert cli("convert", flat, "-o", "x.safetensors").code == 0
    data = Path("x.safetensors").read_bytes()
    for end in range(1, len(data), 97):
        Path("cut.safetensors").write_bytes(data[:end])
        error(cli("ls", "cut.safetensors"), "cut.safetensors")


def test_control_characters_are_escaped(cli: Cli, place: Path) -> None:
    from .files import tensor, write

    name = "evil\x1b[31m\r\nname\u202e.weight"
    write(Path("evil.pt"), {name: tensor(2), "b": tensor(1)})
    for argv in (
        ("ls", "evil.pt"),
        ("ls", "evil.pt", "--long"),
        ("ls", "evil.pt", "--format", "csv"),
        ("summary", "evil.pt"),
        ("summary", "evil.pt", "--format", "json"),
        ("show", "evil.pt"),
        ("freeze", "evil.pt", "--pattern", "*", "--dry-run"),
        ("strip-head", "evil.pt", "--head", "*weight", "--dry-run"),
        ("ls", "evil.pt", "nothing"),
    ):
        result = cli(*argv)
        text = result.out + result.err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text), argv
        assert text.count("\n") < 100
    assert json.loads(cli("ls", "evil.pt", "--format", "json").out)["tensors"][0]["name"] == name


def test_a_traceback_only_on_request(cli: Cli, place: Path, monkeypatch) -> None:
    monkeypatch.setenv("MODELCTL_DEBUG", "1")
    with pytest.raises(mc.ModelctlError):
        cli("summary", "missing.pt")


def test_a_bug_is_one_line_too(cli: Cli, flat: Path, monkeypatch) -> None:
    monkeypatch.setattr("modelctl.files.detect", 0)
    result = cli("summary", flat)
    assert result.code == 2
    assert result.err.splitlines() == [
        "error: TypeError: 'int' object is not callable",
        "hint: this is a bug in modelctl; MODELCTL_DEBUG=1 shows where",
    ]


def test_interrupted(cli: Cli, flat: Path, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modelctl.files.open", interrupt)
    result = cli("convert", flat, "-o", "x.pt")
    assert (result.code, result.out) == (130, "")
    assert "error" not in result.err
    assert os.listdir() == ["flat.pt"]


# ---------------------------------------------------------------------- in a process of its own

CHECK = """
import sys
from modelctl.cli import run
code = run(sys.argv[2:])
sys.stdout.flush()
bad = sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(",")))
print("imported:", *bad, file=sys.stderr)
sys.exit(code)
"""


def process(*argv: str, never: str = "torch,safetensors,torchvision") -> Result:
    environ = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "MODELCTL_DEBUG")}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, never, *argv],
        capture_output=True,
        text=True,
        env={**environ, "COLUMNS": "80"},
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "argv",
    [
        ("summary", "ddp.pt"),
        ("ls", "ddp.pt", "--long"),
        ("show", "ddp.pt"),
        ("diff", "ddp.pt", "flat.pt"),
        ("identify", "ddp.pt"),
        ("scan", "ddp.pt"),
        ("verify", "ddp.pt"),
        ("hash", "ddp.pt"),
        ("match", "ddp.pt", "--arch", "torchvision:resnet18"),
        ("strip-prefix", "ddp.pt", "-o", "1.pt"),
        ("add-prefix", "flat.pt", "--prefix", "m", "-o", "1a.pt"),
        ("rename", "flat.pt", "--map", "conv1=stem", "-o", "1b.pt"),
        ("keep", "flat.pt", "--pattern", "conv1", "-o", "1c.pt"),
        ("drop", "ddp.pt", "--pattern", "module.fc", "-o", "1d.pt"),
        ("strip-head", "ddp.pt", "-o", "2.pt"),
        ("freeze", "flat.pt", "--pattern", "conv1", "-o", "3.safetensors"),
        ("unfreeze", "frozen.pt", "--pattern", "conv1", "-o", "4.pt"),
        ("convert", "ddp.pt", "-o", "5.safetensors", "--weights-only"),
        ("merge", "--model", "flat.pt", "--optimizer", "ddp.pt", "-o", "6.pt"),
        ("split", "ddp.pt", "-o", "parts"),
        ("apply", "r.toml", "ddp.pt", "-o", "7.pt"),
    ],
    ids=lambda argv: argv[0],
)
def test_torch_is_never_imported(cli: Cli, ddp: Path, flat: Path, argv: tuple[str, ...]) -> None:
    assert cli("freeze", flat, "--pattern", "conv1", "-o", "frozen.pt").code == 0
    Path("r.toml").write_text('[[edit]]\ndo = "strip-prefix"\n[[edit]]\ndo = "strip-head"\n')
    result = process(*argv)
    assert result.code == (1 if argv[0] in ("diff", "match", "verify") else 0), result.err
    assert result.err.splitlines()[-1] == "imported:"


def test_every_command_is_run_without_torch() -> None:
    mark = next(m for m in test_torch_is_never_imported.pytestmark if m.name == "parametrize")
    assert {argv[0] for argv in mark.args[1]} == set(COMMANDS)


def test_a_piped_ls_imports_nothing_big(flat: Path) -> None:
    result = process("ls", "flat.pt", never="torch,safetensors,numpy,rich,tabulate")
    assert result.code == 0
    assert result.out.splitlines()[0] == "conv1.weight"
    assert result.err == "imported:\n"


def shell(command: str) -> Result:
    program = f"{sys.executable} -m modelctl"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("modelctl", program, 1)],
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_reader_that_leaves_early(place: Path) -> None:
    from .files import tensor, write

    shared = tensor(1)
    write(Path("many.pt"), {f"layer{i}.weight": shared for i in range(20_000)})
    for command in ("modelctl ls many.pt | head -1", "modelctl ls many.pt --long | head -2"):
        result = shell(command)
        assert result.code == 0
        assert result.err in ("", "~ inferred from name and dtype; ? the file does not say\n")
        assert len(result.out.splitlines()) in (1, 2)
    assert shell("modelctl ls many.pt | true").err == ""


def test_the_installed_program(flat: Path) -> None:
    result = shell("modelctl show flat.pt zzz")
    assert result.code == 2
    assert result.err.startswith("error: there is nothing at 'zzz'\n")
    assert shell("modelctl diff flat.pt flat.pt > /dev/null").code == 0


def test_stdout_is_data(ddp: Path) -> None:
    result = shell("modelctl summary ddp.pt --format json")
    assert len(json.loads(result.out)["warnings"]) == 1
    assert result.err == ""
    result = shell("modelctl summary ddp.pt")
    assert "warning" not in result.out
    assert "warning: all 12 names start with 'module.'" in result.err
    assert shell("modelctl summary ddp.pt -q").err == ""
    full = shell("modelctl summary ddp.pt > /dev/full")
    assert full.code == 2
    assert full.err.splitlines()[-1].startswith("error: ")


def test_modes(flat: Path, cli: Cli) -> None:
    old = os.umask(0o027)
    try:
        assert cli("convert", flat, "-o", "new.pt").code == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE(Path("new.pt").stat().st_mode) == 0o640
