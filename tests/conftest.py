"""What the tests share: the folder of real and hostile files beside the project, where it is; what
is not installed; no deadlines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
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
        """torch torchvision safetensors timm transformers lightning accelerate torchinfo
        torchsummary ruff mypy""".split()
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

# how fast a machine is, and what else it does, is nobody's failure
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
