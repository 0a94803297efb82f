"""What the tests share: the folder of real and hostile files beside the project, where it is; what
is not installed or older, and so skipped; no deadlines."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

import modelctl

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(modelctl.__file__).parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the project: real checkpoints, a generator of hostile ones."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED}")
    return SHARED


class _NotInstalled:
    """Asked for what nobody else found: a test that imports one of these by itself is skipped, and
    says so; modelctl that imports it where it should not is an error, as ever."""

    names = frozenset(
        (
            *("torch", "torchvision", "safetensors", "timm", "transformers", "lightning"),
            *("accelerate", "torchinfo", "torchsummary"),
        )
    )

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name not in cls.names:
            return
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename and frame.f_back is not None:
            frame = frame.f_back
        if Path(frame.f_code.co_filename).is_relative_to(ROOT / "tests"):
            pytest.skip(f"{name} is not installed", allow_module_level=True)


sys.meta_path.append(_NotInstalled)

# what older torch lacks, since when it is there, and what a test hits that asks for it
LACKED = (
    ("2.5", "the optimizer Adafactor", "module 'torch.optim' has no attribute 'Adafactor'"),
    ("2.5", "nn.Buffer", "module 'torch.nn' has no attribute 'Buffer'"),
    ("2.5", "set_submodule", "object has no attribute 'set_submodule'"),
    ("2.5", "hooks before load_state_dict", "has no attribute 'register_load_state_dict_pre_hook'"),
    ("2.5", "bytes under weights_only", "GLOBAL _codecs.encode was not an allowed global"),
    ("2.5", "files of uint64 and programs with numpy 2", "torch.uint"),
    ("2.9", "torch.export's archives of today", "no item named 'version' in the archive"),
    ("2.9", "checkpointing without a warning", "`torch.cpu.amp.autocast(args...)` is deprecated"),
    ("2.6", "an optimizer of named parameters", "one of the params is tuple"),
    ("2.5", "FSDP2 without a GPU", "CUDA driver version is insufficient"),
    ("2.5", "FSDP2 without a GPU", "Found no NVIDIA driver"),
    ("2.5", "a public DTensor", "module 'torch.distributed.tensor' has no attribute"),
    ("2.5", "FSDP2 over tensor parallel", "2D state_dict is under development"),
    ("2.14", "pickles of GraphModules from any place", "'str' object has no attribute '__name__'"),
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that asks an older torch for what that lacks is skipped, and says so; not where
    modelctl asks for it, or where this torch should have it."""
    report = yield
    torch = sys.modules.get("torch")
    if report.failed and call.excinfo is not None and torch is not None:
        paths = [Path(entry.path) for entry in call.excinfo.traceback]  # a text where it is no file
        inside = any(one.is_relative_to(PACKAGE) and one.name != "testing.py" for one in paths)
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        lacked = [
            (f"torch {since} has {what}", words)
            for since, what, words in LACKED
            if version < tuple(map(int, since.split(".")))
        ]
        reasons = [
            next((reason for reason, words in lacked if words in text), None)
            for text in _texts(call.excinfo.value)
        ]
        if not inside and None not in reasons:
            where, line, _ = item.location
            report.outcome = "skipped"
            report.longrepr = (where, line or 0, f"Skipped: {'; '.join(map(str, reasons))}")
    return report


def _texts(error: BaseException) -> list[str]:
    """What an error says, or each of those in a group of them."""
    found = getattr(error, "exceptions", None)
    return [text for one in found for text in _texts(one)] if found else [str(error)]


# how fast a machine is, and what else it does, is nobody's failure
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
