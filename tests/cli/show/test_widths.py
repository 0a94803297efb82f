"""What a terminal shows: no line is wider than it, and no number is broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.tensors import TensorRef

from ..files import Cli, tensor, training, write
from .test_reports import golden

WIDTHS = (60, 80, 100)


def resnet(prefix: str = "module.") -> dict[str, TensorRef]:
    found = {"conv1.weight": tensor(64, 3, 7, 7), **_norm("bn1", 64)}
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            at = f"layer{layer}.{block}"
            for i in (1, 2):
                found[f"{at}.conv{i}.weight"] = tensor(width, width // 2, 3, 3)
                found.update(_norm(f"{at}.bn{i}", width))
    found |= {"fc.weight": tensor(1000, 512), "fc.bias": tensor(1000)}
    return {prefix + name: ref for name, ref in found.items()}


def _norm(at: str, width: int) -> dict[str, TensorRef]:
    found = {
        f"{at}.{name}": tensor(width) for name in ("weight", "bias", "running_mean", "running_var")
    }
    return {**found, f"{at}.num_batches_tracked": tensor(dtype="int64")}


def bert() -> dict[str, TensorRef]:
    found = {"bert.embeddings.word_embeddings.weight": tensor(3000, 32)}
    for i in range(12):
        at = f"bert.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            found[f"{at}.attention.{part}.weight"] = tensor(32, 32)
        found[f"{at}.intermediate.dense.weight"] = tensor(128, 32)
        found[f"{at}.output.dense.weight"] = tensor(32, 128)
    found["bert.pooler.dense.weight"] = tensor(32, 32)
    return {**found, "cls.predictions.transform.dense.weight": tensor(32, 32)}


def lstm() -> dict[str, TensorRef]:
    found = {}
    for layer in range(2):
        for way in ("", "_reverse"):
            for part in ("ih", "hh"):
                found[f"encoder.rnn.weight_{part}_l{layer}{way}"] = tensor(1024, 256)
    return found


def long_name() -> dict[str, TensorRef]:
    at = ".".join(f"wrapped_block_{i}" for i in range(10, 22))[:193]
    return {f"{at}.weight": tensor(123, 456), f"{at}.bias": tensor(123)}


FILES: dict[str, Callable[[], Any]] = {
    "resnet": resnet,
    "bert": bert,
    "gan": lambda: {"G": resnet("net."), "D": resnet("module.main."), "epoch": 1234567},
    "one": lambda: {"weight": tensor(1234, 567)},
    "lstm": lstm,
    "long": long_name,
    "wide": lambda: {
        f"模型.层{i}.权重🙂e\u0301{'長' * 30}.weight": tensor(1000, 31) for i in range(5)
    },
    "flat": lambda: {f"w{i:03}": tensor(i + 1, 1000) for i in range(50)},
    "training": lambda: {**training(), "note": "a text of many words, " * 20, "steps": 123_456_789},
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "summary": (),
    "summary --stats": (),
    "summary --depth all --no-fold": (),
    "ls --long": (),
    "ls --section all": (),
    "show": (),
    "diff": ("other.pt",),
    "identify": (),
    "match --like other.pt": (),
    "match --arch torchvision:resnet18": (),
    "strip-prefix --dry-run -o x.pt": (),
    "freeze --dry-run --pattern * --exclude *c* -o x.pt": (),
    "add-prefix --prefix a.very.long.prefix --dry-run -o x.pt": (),
    "split --dry-run -o parts": (),
    "convert --dry-run --weights-only -o a-folder-of-a-long-name/with-a-long-name.safetensors": (),
}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def check(cli: Cli, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    wide = cli(*argv, "--color", "always")
    numbers = _numbers(plain(wide.out))
    totals = re.findall(r"params ([\d,]+)", plain(wide.out))
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        shown = cli(*argv, "--color", "always")
        for line in [*plain(shown.out).splitlines(), *plain(shown.err).splitlines()]:
            assert cell_len(line.rstrip()) <= width, (argv, width, line)
            assert cell_len(line) <= width, (argv, width, line)
        found = _numbers(plain(shown.out))
        # columns may go, but what is shown is one of the numbers, not a piece of one
        modules = {*re.findall(r"\.(\d+)\s", plain(wide.out))}  # '0' is 'model.0' there
        assert found <= numbers | modules, (argv, width, found - numbers)
        assert {*totals} <= found
        if not argv[0].startswith("summary"):
            assert found == numbers, (argv, width, numbers - found)


def _numbers(text: str) -> set[str]:
    """Counts, sizes and shapes that stand by themselves."""
    text = re.sub(r"read .*? s,", "", " ".join(text.split()))
    return {*re.findall(r"(?<![\w.,…×-])\d[\d,x]*(?:\.\d+)?(?![\w.,…-])", text)}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", FILES)
def test_no_line_is_wider_than_the_terminal(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    write(place / f"{name}.pt", FILES[name]())
    write(place / "other.pt", {**resnet(), "module.fc.bias": tensor(1000, fill=0.5)})
    verb, *options = command.split()
    check(cli, monkeypatch, [verb, f"{name}.pt", *COMMANDS[command], *options])


def test_a_whole_module(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn
    inner = nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 64) for _ in range(3)))
    torch.save(nn.Sequential(nn.Conv2d(3, 64, 7), nn.BatchNorm2d(64), inner), "whole.pt")
    for command in ("summary", "summary --depth all", "ls --long", "show", "split --dry-run"):
        verb, *options = command.split()
        check(cli, monkeypatch, [verb, "whole.pt", *options])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["resnet", "bert", "long"])
def test_golden(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    write(place / f"{name}.pt", FILES[name]())
    monkeypatch.setenv("COLUMNS", str(width))
    text = ""
    for verb in ("summary", "ls"):
        shown = cli(verb, f"{name}.pt", "--color", "always")
        lines = [line.rstrip() for line in plain(shown.out + shown.err).splitlines()]
        more = ["…"] if len(lines) > 25 else []
        text += "\n".join([f"$ modelctl {verb} {name}.pt", *lines[:25], *more, ""])
    golden(f"{name}-{width}", text)


def test_errors_and_hints_fit_too(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mc.save(Checkpoint(long_name()), place / "long.pt")
    monkeypatch.setenv("COLUMNS", "60")
    done = cli("ls", "long.pt", "no.such.tensor.in.it", "--color", "always")
    assert done.code == 2
    assert "\x1b[1;31merror:" in done.err
    lines = plain(done.err).splitlines()
    assert len(lines) > 1
    assert all(cell_len(line) <= 60 for line in lines)
    assert "\x1b" not in cli("ls", "long.pt", "no.such.tensor.in.it").err
