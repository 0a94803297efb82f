"""Whole modules, and programs made of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from ..made import Tensors, makes
from ..nets import Language, ResNet, Tagger
from .state_dicts import new, old


@makes("whole module", plain=False)
def whole_resnet(folder: Path) -> Path:
    net = ResNet().eval()
    net.layer1.requires_grad_(False)
    return new(net, folder / "whole.pt")


@makes("whole module", plain=False)
def whole_resnet_legacy(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the source text, which this keeps beside classes
        return old(ResNet(), folder / "whole.pth")


@makes("whole module", plain=False)
def whole_language(folder: Path) -> Path:
    return new(Language(), folder / "language.pt")


@makes("whole module", plain=False)
def whole_tagger(folder: Path) -> Path:
    return new(Tagger(), folder / "tagger.pt")


@makes("whole module", plain=False)
def whole_data_parallel(folder: Path) -> Path:
    return new(nn.DataParallel(ResNet()), folder / "dp.pt")


@makes("training checkpoint", plain=False)
def module_in_a_dict(folder: Path) -> Path:
    """As ultralytics saves: the module itself, and its averaged copy."""
    return new({"epoch": -1, "model": ResNet(), "ema": None}, folder / "best.pt")


def script(path: Path) -> Tensors:
    return torch.jit.load(path).state_dict().items()


@makes("whole module", plain=False, reads=script)
def scripted(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and its files are there
        torch.jit.script(ResNet().eval()).save(str(folder / "scripted.pt"))
    return folder / "scripted.pt"


@makes("whole module", plain=False, reads=script)
def traced(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.trace(ResNet().eval(), torch.randn(1, 3, 6, 6))
        torch.jit.save(made, folder / "traced.pt")
    return folder / "traced.pt"


def program(path: Path) -> Tensors:
    return torch.export.load(path).state_dict.items()


@makes("state_dict", plain=False, reads=program)
def exported(folder: Path) -> Path:
    made = torch.export.export(ResNet().eval(), (torch.randn(1, 3, 6, 6),))
    torch.export.save(made, folder / "exported.pt2")
    return folder / "exported.pt2"
