"""Each format, by the suite that every format passes (:mod:`modelctl.testing`)."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modelctl
from modelctl.core.modules import class_name, is_training, submodules
from modelctl.inspection.ls import list_names, list_tensors
from modelctl.testing import Expected, FormatSuite, Sample, described, raw


def weights(width: int) -> dict[str, torch.Tensor]:
    """A state_dict of several dtypes."""
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "bn.running_mean": torch.randn(4),
        "bn.num_batches_tracked": torch.tensor(7),
        "half.weight": torch.randn(width, width).to(torch.bfloat16),
        "half.mask": torch.tensor([True, False, True]),
        "fc.weight": torch.randn(width, width),
        "fc.bias": torch.randn(width, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }


def views(width: int) -> dict[str, torch.Tensor]:
    """What only torch's own containers hold: tied, transposed and sliced tensors."""
    found = weights(width)
    base = torch.arange(4.0 * width).reshape(4, width)
    return {
        **found,
        "tied": found["fc.weight"],
        "base": base,
        "transposed": base.t(),
        "column": base[:, 1],
        "rows": base[1:3],
    }


# ------------------------------------------------------------------ torch.save


class TestTorchZip(FormatSuite):
    name, label, kind = "torch", "torch zip", "training checkpoint"
    writable = "torch"

    def make(self, folder: Path, width: int) -> Sample:
        model = views(width)
        momentum = torch.randn(3)
        saved = {
            "model": OrderedDict(model),
            "optimizer": {
                "state": {0: {"momentum_buffer": momentum}},
                "param_groups": [{"lr": 0.1, "params": [0]}],
            },
            "epoch": 3,
        }
        torch.save(saved, folder / "a.pt")
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        tensors["optimizer.state.0.momentum_buffer"] = momentum
        return Sample(folder / "a.pt", tensors, model)

    def official(self, path: Path) -> dict[str, torch.Tensor]:
        loaded = torch.load(path, weights_only=True)
        found = {f"model.{name}": tensor for name, tensor in loaded["model"].items()}
        moment = loaded["optimizer"]["state"][0]["momentum_buffer"]
        return {**found, "optimizer.state.0.momentum_buffer": moment}


class TestTorchLegacy(FormatSuite):
    name, label = "torch-legacy", "torch legacy"

    def make(self, folder: Path, width: int) -> Sample:
        tensors = views(width)
        torch.save(tensors, folder / "a.pth", _use_new_zipfile_serialization=False)
        return Sample(folder / "a.pth", tensors)


class _TarPickler(pickle.Pickler):
    """Tensors by their number, as torch 0.1 named them."""

    def __init__(self, file: Any, ids: dict[int, int]) -> None:
        super().__init__(file, protocol=2)
        self.ids = ids

    def persistent_id(self, obj: Any) -> Any:
        return self.ids[id(obj)] if isinstance(obj, torch.Tensor) else None


def save_tar(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """The tar of torch 0.1, by its layout: storages, tensors, and a pickle that names them."""
    storages, listed, tree = BytesIO(), BytesIO(), BytesIO()
    roots: dict[int, tuple[int, torch.Tensor]] = {}
    for tensor in tensors.values():
        roots.setdefault(tensor.untyped_storage().data_ptr(), (len(roots) + 1000, tensor))
    pickle.dump(len(roots), storages, protocol=2)
    for key, tensor in roots.values():
        cls = getattr(torch, tensor.type().rpartition(".")[2].replace("Tensor", "Storage"))
        pickle.dump((key, "cpu", cls), storages, protocol=2)
        size = tensor.untyped_storage().nbytes()
        storages.write(struct.pack("<q", size // tensor.element_size()))
        storages.write(raw(torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())))
    pickle.dump([], storages, protocol=2)
    ids = {id(tensor): i + 1 for i, tensor in enumerate(tensors.values())}
    unique = {id(tensor): tensor for tensor in tensors.values()}
    pickle.dump(len(unique), listed, protocol=2)
    for tensor in unique.values():
        key = roots[tensor.untyped_storage().data_ptr()][0]
        cls = getattr(torch, tensor.type().rpartition(".")[2])
        pickle.dump((ids[id(tensor)], key, cls), listed, protocol=2)
        dims = tensor.dim()
        listed.write(struct.pack("<i4x", dims))
        listed.write(struct.pack(f"<{2 * dims + 1}q", *tensor.shape, *tensor.stride(),
                                 tensor.storage_offset()))  # fmt: skip
    _TarPickler(tree, ids).dump(OrderedDict(tensors))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("storages", storages), ("tensors", listed), ("pickle", tree)):
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            tar.addfile(member, BytesIO(data.getvalue()))


class TestTorchTar(FormatSuite):
    name, label = "torch-tar", "torch tar"

    def make(self, folder: Path, width: int) -> Sample:
        tensors = {
            name: tensor
            for name, tensor in views(width).items()
            # torch 0.1 had no bfloat16, bool or empty tensors
            if tensor.numel() and tensor.dtype not in (torch.bfloat16, torch.bool)
        }
        save_tar(tensors, folder / "a.pt")
        return Sample(folder / "a.pt", tensors)

    def test_torch_reads_the_sample_so(self, sample: Sample) -> None:
        loaded = torch.load(sample.path, weights_only=False)
        assert described(loaded) == described(sample.tensors)


# ------------------------------------------------------------------ safetensors, shards


class TestSafetensors(FormatSuite):
    name, label = "safetensors", "safetensors"
    writable = "safetensors"

    def make(self, folder: Path, width: int) -> Sample:
        save_file(weights(width), folder / "a.safetensors", {"format": "pt"})
        return Sample(folder / "a.safetensors", load_file(folder / "a.safetensors"))

    def official(self, path: Path) -> dict[str, torch.Tensor]:
        return load_file(path)


def shard(folder: Path, width: int, stem: str, suffix: str, write: Any) -> Sample:
    tensors = weights(width)
    names = list(tensors)
    parts = [names[:3], names[3:5], names[5:]]
    files = [f"{stem}-0000{i + 1}-of-00003{suffix}" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write({name: tensors[name] for name in part}, folder / file)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part},
    }
    path = folder / f"{stem}{suffix}.index.json"
    path.write_text(json.dumps(index, indent=2))
    return Sample(path, tensors)


class _Sharded(FormatSuite):
    name = "sharded"

    def test_the_folder_is_the_index(self, sample: Sample) -> None:
        with modelctl.open(sample.path.parent) as ckpt:
            assert list(ckpt.tensors()) == list(sample.tensors)

    def test_a_shard_that_is_missing(self, tmp_path: Path) -> None:
        sample = self.make(tmp_path, 5)
        next(one for one in tmp_path.iterdir() if "00002-of" in one.name).unlink()
        with pytest.raises(modelctl.ModelctlError, match="00002-of-00003"):
            modelctl.open(sample.path)


class TestShardedSafetensors(_Sharded):
    label = "3 shards of safetensors"

    def make(self, folder: Path, width: int) -> Sample:
        return shard(
            folder, width, "model", ".safetensors", lambda part, path: save_file(part, path)
        )


class TestShardedBin(_Sharded):
    label = "3 shards of torch zip"

    def make(self, folder: Path, width: int) -> Sample:
        return shard(folder, width, "pytorch_model", ".bin", torch.save)


# ------------------------------------------------------------------ whole modules


class Inner(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("scratch", torch.rand(3), persistent=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc1(x)) * self.scale.sum() + self.scratch.sum()


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = Inner(width)
        self.second = nn.Sequential(nn.Linear(width, 2), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def save_gone(module: nn.Module, path: Path) -> None:
    """Save a whole module as one of classes in ``gone.nets``, which is nowhere to be found."""
    gone = types.ModuleType("gone.nets")
    kept = {cls: cls.__module__ for cls in (Inner, Net)}
    sys.modules.update({"gone": types.ModuleType("gone"), "gone.nets": gone})
    try:
        for cls in kept:
            cls.__module__ = "gone.nets"
            setattr(gone, cls.__name__, cls)
        torch.save(module, path)
    finally:
        for cls, name in kept.items():
            cls.__module__ = name
        del sys.modules["gone"], sys.modules["gone.nets"]


class TestWholeModule(FormatSuite):
    name, label, kind = "torch", "torch zip", "whole module"

    def make(self, folder: Path, width: int) -> Sample:
        module = Net(width)
        save_gone(module, folder / "a.pt")
        return Sample(folder / "a.pt", dict(module.state_dict()))


class TestDataParallel(FormatSuite):
    name, label, kind = "torch", "torch zip", "whole module"

    def make(self, folder: Path, width: int) -> Sample:
        module = nn.DataParallel(Net(width))
        save_gone(module, folder / "a.pt")
        return Sample(folder / "a.pt", dict(module.state_dict()))


# ------------------------------------------------------------------ TorchScript, torch.export


class TestScripted(FormatSuite):
    name, label, kind = "torchscript", "TorchScript", "whole module"

    def compiled(self, module: nn.Module, width: int) -> Any:
        return torch.jit.script(module)

    def make(self, folder: Path, width: int) -> Sample:
        module = Net(width).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.compiled(module, width).save(folder / "a.pt")
            loaded = torch.jit.load(folder / "a.pt").state_dict()
        # a script module does not know that a buffer isn't persistent
        assert {*loaded} - {*module.state_dict()} <= {"first.scratch"}
        return Sample(folder / "a.pt", dict(loaded))

    def test_roles_are_known(self, sample: Sample) -> None:
        expected = {name: ("parameter", True) for name, _ in Net(5).named_parameters()}
        with modelctl.open(sample.path) as ckpt:
            for row in list_tensors(ckpt):
                found = (row.role, row.requires_grad)
                assert found == expected.get(row.name, ("buffer", False))

    def test_its_modules_have_their_classes(self, sample: Sample) -> None:
        with modelctl.open(sample.path) as ckpt:
            found = {path: class_name(node) for path, node in submodules(ckpt.root)}
            names = {path: type(node).__name__ for path, node in Net(5).named_modules()}
            assert found == names
            assert {is_training(node) for _, node in submodules(ckpt.root)} == {False}


class TestTraced(TestScripted):
    def compiled(self, module: nn.Module, width: int) -> Any:
        return torch.jit.trace(module, torch.ones(2, width))


class _Exported(FormatSuite):
    name, label = "torch-export", "torch.export"

    def constants(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def test_constants_have_a_section_of_their_own(self, sample: Sample) -> None:
        with modelctl.open(sample.path) as ckpt:
            rows = list_tensors(ckpt, section="constants")
            found = [(row.name, row.dtype, row.shape) for row in rows]
            assert found == [
                (name, Expected.of(tensor).dtype, tuple(tensor.shape))
                for name, tensor in self.constants().items()
            ]


EXPORTED = (
    *(torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32),
    *(torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
)


def exported() -> list[torch.dtype]:
    """Those of the dtypes that this torch's exporter can write: 2.9 has no uint32 there yet."""
    from torch._export.serde import serialize

    known = getattr(serialize, "_TORCH_TO_SERIALIZE_DTYPE", EXPORTED)
    return [dtype for dtype in EXPORTED if dtype in known]


class TestExport(_Exported):
    def make(self, folder: Path, width: int) -> Sample:
        net = Net(width)
        for dtype in exported():
            name = "of_" + str(dtype).partition(".")[2]
            net.register_buffer(name, torch.arange(6.0).reshape(2, 3).to(dtype))
        program = torch.export.export(net.eval(), (torch.ones(2, width),))
        torch.export.save(program, folder / "a.pt2")
        loaded = torch.export.load(folder / "a.pt2")
        return Sample(folder / "a.pt2", dict(loaded.state_dict))

    def constants(self) -> dict[str, torch.Tensor]:
        return {"first.scratch": torch.empty(3)}  # the buffer that isn't persistent

    def test_roles_are_known(self, sample: Sample) -> None:
        module = Net(5)
        expected = {name: ("parameter", True) for name, _ in module.named_parameters()}
        with modelctl.open(sample.path) as ckpt:
            for row in list_tensors(ckpt):
                found = (row.role, row.requires_grad)
                assert found == expected.get(row.name, ("buffer", False))


class TestOldExport(_Exported):
    """The layout of 2024, by hand: whole torch.save files in a zip without a folder."""

    def make(self, folder: Path, width: int) -> Sample:
        return self.write(folder, weights(width))

    def write(self, folder: Path, model: dict[str, torch.Tensor]) -> Sample:
        with zipfile.ZipFile(folder / "a.pt2", "w") as archive:
            archive.writestr("serialized_exported_program.json", "{}")
            for name, part in (("state_dict", model), ("constants", self.constants())):
                data = BytesIO()
                torch.save(part, data)
                archive.writestr(f"serialized_{name}.json", data.getvalue())
            archive.writestr("serialized_example_inputs.pt", b"")
            archive.writestr("version", "8.1")
        return Sample(folder / "a.pt2", model)

    def constants(self) -> dict[str, torch.Tensor]:
        return {"lifted": torch.ones(2, 3)}

    def test_what_is_no_parameter_is_a_buffer(self, tmp_path: Path) -> None:
        module = Net(5)
        sample = self.write(tmp_path, module.state_dict(keep_vars=True))
        parameters = dict(module.named_parameters())
        with modelctl.open(sample.path) as ckpt:
            rows = list_tensors(ckpt)
        assert {row.name: (row.role, row.inferred) for row in rows} == {
            name: ("parameter" if name in parameters else "buffer", False)
            for name in sample.tensors
        }


# ------------------------------------------------------------------ a zip of checkpoints


class TestZipOfCheckpoints(FormatSuite):
    """As stable-baselines3 saves: a policy, its optimizer, a few variables, JSON beside them."""

    name, label, kind = "archive", "zip of 3 checkpoints", "training checkpoint"

    def make(self, folder: Path, width: int) -> Sample:
        policy = weights(width)
        moment = torch.randn(3)
        optimizer = {"state": {0: {"exp_avg": moment}}, "param_groups": [{"params": [0]}]}
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr("data", json.dumps({"policy_class": "ActorCriticPolicy"}))
            for name, part in (
                ("pytorch_variables.pth", {}),
                ("policy.pth", policy),
                ("policy.optimizer.pth", optimizer),
            ):
                data = BytesIO()
                torch.save(part, data)
                archive.writestr(name, data.getvalue())
            archive.writestr("_stable_baselines3_version", "2.3.0")
        tensors = {f"policy.pth.{name}": tensor for name, tensor in policy.items()}
        tensors["policy.optimizer.pth.state.0.exp_avg"] = moment
        return Sample(folder / "a.zip", tensors, policy)

    def test_its_parts_are_told(self, sample: Sample) -> None:
        with modelctl.open(sample.path) as ckpt:
            assert list(ckpt.root) == [
                "pytorch_variables.pth",
                "policy.pth",
                "policy.optimizer.pth",
            ]
            assert list_names(ckpt, section="all") == list(sample.tensors)
