"""What this project writes of a hostile file harms nobody."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import pytest

from .case import Case, Fine, Found
from .cases import CASES
from .reading import Reading

DANGEROUS = [
    case for case in CASES if isinstance(case.expect, Found) and case.expect.level == "dangerous"
]
# What a file of tensors and plain values names, and the one class that a case is about.
HARMLESS = {
    *("torch", "torch._utils", "torch._tensor", "torch.storage", "collections", "_codecs"),
    *("argparse", "pathlib", "__builtin__", "numpy", "numpy.core.multiarray", "acme_utils"),
    # what is data
    *("torch.distributed.tensor", "torch.nn.functional", "torch.nn.modules.linear", "exceptions"),
    *("typing", "__torch__.net", "torch.torch_version", "_io"),
    "torch.distributed._shard.sharded_tensor.metadata",
}


def modules(path: Path) -> set[str]:
    """The modules that the pickle in a file names."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        found = pickletools.genops(archive.read(name))
        names = {str(arg) for opcode, arg, _ in found if opcode.name in ("GLOBAL", "INST")}
    return {name.partition(" ")[0] for name in names}


@pytest.mark.parametrize("case", DANGEROUS, ids=lambda case: case.name)
def test_an_attack_is_not_written_again(case: Case, readings: dict[str, Reading]) -> None:
    """Whatever is dropped before the end is not there to be written; all else is refused."""
    copy = readings[case.name].copies / "whole.pt"
    assert not copy.exists() or modules(copy) <= HARMLESS


def test_what_is_kept_and_dangerous_is_refused(readings: dict[str, Reading]) -> None:
    kept = [case for case in DANGEROUS if case.name.startswith("places: tensors: ")]
    kept += [case for case in DANGEROUS if case.name.endswith("whole module's attribute")]
    kept = [case for case in kept if not case.name.endswith("hooks")]  # which are not written
    assert len(kept) > 5
    for case in kept:
        assert not (readings[case.name].copies / "whole.pt").exists(), case.name


# Harmless, and refused by ``weights_only`` all the same (sets by torch 2.4).
HARMLESS_BY_LEAVE = (
    *("argparse.", "pathlib.", "numpy.", "acme_utils.", "builtins.", "__builtin__.", "typing."),
    *("exceptions.", "__torch__.", "_io.", "torch.", "uuid.", "getattr"),
)
# They hold more than a tree, which a file of tensors would lose.
ARCHIVES = ("a gzipped tar", "TorchScript", "a zip of checkpoints", "an export")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_loads_what_was_written(case: Case, readings: dict[str, Reading]) -> None:
    torch = pytest.importorskip("torch")
    copy = readings[case.name].copies / "whole.pt"
    if not copy.exists():
        assert not isinstance(case.expect, Fine) or case.name.endswith(ARCHIVES)
        return
    assert modules(copy) <= HARMLESS
    try:
        torch.load(copy, weights_only=True)
    except pickle.UnpicklingError as e:
        named = re.search(r"GLOBAL (\S+) was not an allowed global", str(e))
        assert named is not None
        assert named[1].startswith(HARMLESS_BY_LEAVE)
