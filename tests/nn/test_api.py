from __future__ import annotations

import subprocess
import sys

import modelctl.nn as mnn


def test_every_public_name_resolves():
    for name in mnn.__all__:
        assert getattr(mnn, name).__module__.startswith("modelctl.nn."), name
    assert dir(mnn) == sorted(mnn.__all__)


def test_without_torch_the_extra_is_named():
    code = """
import sys
sys.modules["torch"] = None
from modelctl.errors import MissingExtraError
try:
    import modelctl.nn
except MissingExtraError as e:
    assert isinstance(e, ImportError)
    print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.count("\n") == 1
    assert "pip install -e '.[torch]'" in out.stdout
