"""How quantized weights look: golden files at 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...core.packed.makers import LAYOUTS
from ..files import Cli
from .test_reports import golden
from .test_widths import plain

SCREENS = {
    "gptq": "gptq",
    "mxfp4": "mxfp4",
    "nf4": "bnb 4-bit",
    "torchao": "torchao",
    "fp8-blocks": "fp8 blocks",
}


@pytest.mark.parametrize("name", SCREENS)
def test_screens(cli: Cli, place: Path, name: str) -> None:
    LAYOUTS[SCREENS[name]][0](place / "model")
    text = ""
    for command in (
        "summary model",
        "summary model/model.safetensors --depth 3",
        "ls model --long",
        "drop model --pattern *scale* --pattern *absmax* -o out --dry-run",
        "freeze model --pattern model.layers.0 -o out --dry-run",
    ):
        if "absmax" in command and name != "nf4":
            command = command.replace(" --pattern *absmax*", "")
        elif "absmax" in command:
            command = command.replace(" --pattern *scale*", "")
        shown = cli(*command.split(), "--color", "always")
        lines = [line.rstrip() for line in plain(shown.out + shown.err).splitlines()]
        more = ["…"] if len(lines) > 30 else []
        text += "\n".join([f"$ modelctl {command}", *lines[:30], *more, "", ""])
    golden(f"quantized/{name}", text)
