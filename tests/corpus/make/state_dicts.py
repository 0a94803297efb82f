"""State_dicts and bare values, in each way that ``torch.save`` and safetensors have."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..made import Tensors, makes
from ..nets import Language, ResNet, Tagger

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)
NEWER = (torch.float8_e4m3fn, torch.float8_e5m2)  # not in the legacy format
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch 2.4 can't save them itself


def every_dtype(dtypes: tuple[torch.dtype, ...]) -> dict[str, torch.Tensor]:
    raw = torch.arange(2 * 3 * 16, dtype=torch.uint8) % 2
    return {
        str(d).removeprefix("torch."): raw[: 6 * d.itemsize].clone().view(d).reshape(2, 3)
        for d in dtypes
    }


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "base": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "rows": base[1:3],
        "every second": base[::2, ::3],
        "expanded": base[0].expand(3, 6),
        "scalar": base[2, 5],
        "empty": base[:0],
        "again": base,
    }


def old(obj: object, path: Path) -> Path:
    torch.save(obj, path, _use_new_zipfile_serialization=False)
    return path


def new(obj: object, path: Path) -> Path:
    torch.save(obj, path)
    return path


@makes("state_dict")
def resnet(folder: Path) -> Path:
    return new(ResNet().state_dict(), folder / "resnet.pt")


@makes("state_dict")
def resnet_legacy(folder: Path) -> Path:
    return old(ResNet().state_dict(), folder / "resnet.pth")


@makes("state_dict")
def language(folder: Path) -> Path:
    return new(Language().state_dict(), folder / "my language model é.pt")


@makes("state_dict")
def tagger(folder: Path) -> Path:
    return new(Tagger().state_dict(), folder / "tagger")


@makes("checkpoint")
def data_parallel(folder: Path) -> Path:
    model = nn.DataParallel(ResNet())
    return new({"state_dict": model.state_dict(), "best_prec1": 91.7}, folder / "dp.th")


@makes("checkpoint")
def data_parallel_legacy(folder: Path) -> Path:
    model = nn.DataParallel(ResNet())
    return old({"state_dict": model.state_dict(), "best_prec1": 91.7}, folder / "dp.th")


@makes("state_dict")
def averaged(folder: Path) -> Path:
    return new(AveragedModel(ResNet()).state_dict(), folder / "averaged.pt")


@makes("state_dict")
def parameters(folder: Path) -> Path:
    """Not detached: they say that they are parameters, and whether they train."""
    net = ResNet()
    net.conv1.requires_grad_(False)
    return new(dict(net.named_parameters()), folder / "parameters.pt")


@makes("state_dict")
def dtypes(folder: Path) -> Path:
    return new(every_dtype((*DTYPES, *NEWER)), folder / "dtypes.pt")


@makes("state_dict")
def dtypes_legacy(folder: Path) -> Path:
    return old(every_dtype(DTYPES), folder / "dtypes.pth")


@makes("state_dict")
def strided(folder: Path) -> Path:
    return new(views(), folder / "views.pt")


@makes("state_dict")
def strided_legacy(folder: Path) -> Path:
    return old(views(), folder / "views.pth")


@makes("tensor")
def one_tensor(folder: Path) -> Path:
    return new(torch.randn(3, 4).t(), folder / "tensor.pt")


@makes("checkpoint")
def a_tuple(folder: Path) -> Path:
    return old((torch.randn(2), [torch.tensor(1), {"x": torch.tensor(2.5)}]), folder / "t.pt")


@makes("checkpoint")
def odd_keys(folder: Path) -> Path:
    nested = {0: torch.tensor([1, 2]), 1: {(2, "b"): torch.tensor(True)}, 2.5: torch.ones(1)}
    return new({"weights": {"a": torch.ones(2)}, "table": nested}, folder / "keys.pt")


@makes("state_dict")
def to_a_file_object(folder: Path) -> Path:
    path = folder / "object.pt"
    with path.open("wb") as file:
        torch.save(OrderedDict(w=torch.randn(3)), file)
    return path


@makes("state_dict", plain=False)
def protocol_4(folder: Path) -> Path:
    torch.save(ResNet().state_dict(), folder / "protocol4.pt", pickle_protocol=4)
    return folder / "protocol4.pt"


@makes("state_dict", plain=False)
def safe(folder: Path) -> Path:
    tensors = {name: t.contiguous() for name, t in ResNet().state_dict().items()}
    save_file(tensors, folder / "resnet.safetensors", {"format": "pt", "by": "corpus"})
    return folder / "resnet.safetensors"


@makes("state_dict", plain=False)
def safe_dtypes(folder: Path) -> Path:
    known = tuple(d for d in (*DTYPES, *NEWER, *UNSIGNED) if d is not torch.complex128)
    save_file(every_dtype(known), folder / "dtypes.safetensors")
    return folder / "dtypes.safetensors"


@makes("state_dict", plain=False)
def safe_empty(folder: Path) -> Path:
    save_file({"none": torch.zeros(0, 3), "one": torch.tensor(1.5)}, folder / "e.safetensors")
    return folder / "e.safetensors"


def untied(path: Path) -> Tensors:
    model = Language()
    load_model(model, path)
    return model.state_dict().items()


@makes("state_dict", plain=False, reads=untied)
def safe_tied(folder: Path) -> Path:
    """``save_model`` keeps one of the tied names, and says which in the metadata."""
    save_model(Language(), str(folder / "tied.safetensors"))
    return folder / "tied.safetensors"
