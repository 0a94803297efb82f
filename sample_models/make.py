"""Make the samples in this folder: python sample_models/make.py

They are trained for a moment on made-up images, so that their numbers are not all alike, with
fixed seeds on one thread; those of the smallest net show a container each. Needs torch and
safetensors.
"""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from small_cnn import SmallCNN, batches

HERE = Path(__file__).parent


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    model.train()
    stream = batches(classes=10, seed=seed)
    for _ in range(steps):
        images, labels = next(stream)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.DataParallel(SmallCNN())  # without a GPU it only wraps, which is all we need
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    train(model, optimizer, steps=60, seed=1)
    # a training checkpoint as most scripts save it: module. before every name
    torch.save(
        {
            "arch": "SmallCNN",
            "epoch": 3,
            "lr": 0.1,
            "state_dict": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        HERE / "cnn-ddp.pt",
    )
    # an optimizer of the last block alone, saved by itself: it does not record names
    block = model.module.layer3
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    train(model, optimizer, steps=10, seed=2)
    torch.save(optimizer.state_dict(), HERE / "layer3-adamw.pt")
    # the same weights in the other formats
    weights = model.module.state_dict()
    torch.save(weights, HERE / "cnn-legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, HERE / "cnn.safetensors", metadata={"format": "pt"})
    containers()


# ------------------------------------------------------------------ the same in every container


class Net(nn.Module):
    """A net of 136 parameters, whose class is only here: in its pickle it is ``__main__.Net``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 5)
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))


def containers() -> None:
    """A small file in each container that modelctl reads."""
    torch.manual_seed(1)
    net = Net()
    weights = net.state_dict()
    images = torch.ones(2, 1, 4, 4)
    net.conv.requires_grad_(False)
    torch.save(net, HERE / "whole-module.pt")
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit says that it is old
        script(net, HERE / "torchscript.pt")
    program = torch.export.export(net, (images,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    torch.export.save(program, HERE / "exported.pt2")
    shards(HERE / "sharded-safetensors", "model", ".safetensors", weights, save_file)
    shards(HERE / "sharded-bin", "pytorch_model", ".bin", weights, torch.save)
    tar(weights, HERE / "torch-0.1.pt")
    agent(HERE / "sb3-agent.zip")
    allennlp(weights, HERE / "allennlp.tar.gz")
    lightning(net.train(), images, HERE / "lightning.ckpt")
    torch.save(odd_tensors(), HERE / "odd-tensors.pt")


def script(net: Net, path: Path) -> None:
    """A TorchScript archive, without the records that name files of this machine."""
    data = BytesIO()
    torch.jit.save(torch.jit.script(net), data)
    with zipfile.ZipFile(data) as full, zipfile.ZipFile(path, "w") as archive:
        for member in full.infolist():
            if not member.filename.endswith(".debug_pkl"):
                archive.writestr(zipfile.ZipInfo(member.filename), full.read(member))


def shards(
    folder: Path,
    stem: str,
    suffix: str,
    weights: dict[str, torch.Tensor],
    write: Callable[..., Any],
) -> None:
    """Two shards and their index, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    names = list(weights)
    files = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    parts = [names[:2], names[2:]]
    for file, part in zip(files, parts, strict=True):
        write({name: weights[name] for name in part}, folder / file)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in weights.values())},
        "weight_map": {name: f for f, part in zip(files, parts, strict=True) for name in part},
    }
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n")


class TarPickler(pickle.Pickler):
    """Names tensors by number, as torch 0.1 did."""

    def __init__(self, file: BytesIO, numbers: dict[int, int]) -> None:
        super().__init__(file, protocol=2)
        self.numbers = numbers

    def persistent_id(self, obj: Any) -> int | None:
        return self.numbers[id(obj)] if isinstance(obj, torch.Tensor) else None


def tar(weights: dict[str, torch.Tensor], path: Path) -> None:
    """The tar that torch 0.1 wrote: its storages, its tensors, and a pickle that names them."""
    storages, tensors, tree = BytesIO(), BytesIO(), BytesIO()
    pickle.dump(len(weights), storages, protocol=2)
    pickle.dump(len(weights), tensors, protocol=2)
    for number, tensor in enumerate(weights.values(), 1):
        cls = tensor.type().rpartition(".")[2]
        storage = getattr(torch, cls.replace("Tensor", "Storage"))
        pickle.dump((number, "cpu", storage), storages, protocol=2)
        storages.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
        pickle.dump((number, number, getattr(torch, cls)), tensors, protocol=2)
        numbers = (*tensor.shape, *tensor.stride(), 0)
        tensors.write(struct.pack(f"<i4x{len(numbers)}q", tensor.dim(), *numbers))
    pickle.dump([], storages, protocol=2)
    TarPickler(tree, {id(t): i for i, t in enumerate(weights.values(), 1)}).dump(dict(weights))
    with tarfile.open(path, "w") as archive:
        for name, data in (("storages", storages), ("tensors", tensors), ("pickle", tree)):
            add(archive, name, data.getvalue())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, BytesIO(data))


def saved(obj: Any) -> bytes:
    """The bytes of torch.save."""
    data = BytesIO()
    torch.save(obj, data)
    return data.getvalue()


def agent(path: Path) -> None:
    """A zip as stable-baselines3 writes it: JSON, the policy, its optimizer, a few variables."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    policy(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (
            ("data", json.dumps({"n_steps": 2048, "gamma": 0.99}).encode()),
            ("pytorch_variables.pth", saved(None)),
            ("policy.pth", saved(policy.state_dict())),
            ("policy.optimizer.pth", saved(optimizer.state_dict())),
            ("_stable_baselines3_version", b"2.3.2"),
        ):
            archive.writestr(zipfile.ZipInfo(name), data)


def allennlp(weights: dict[str, torch.Tensor], path: Path) -> None:
    """A model archive as AllenNLP writes it: configuration and weights in a gzipped tar."""
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        add(archive, "config.json", json.dumps({"model": {"type": "basic"}}).encode())
        add(archive, "weights.th", saved(weights))
        add(archive, "vocabulary/labels.txt", b"cat\ndog\n")


def lightning(net: Net, images: torch.Tensor, path: Path) -> None:
    """A checkpoint with the keys that Lightning's Trainer writes."""
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    net(images).sum().backward()
    optimizer.step()
    scheduler.step()
    torch.save(
        {
            "epoch": 4,
            "global_step": 1200,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
            "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 4}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": {"best_model_score": 0.25}},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [scheduler.state_dict()],
            "hparams_name": "kwargs",
            "hyper_parameters": {"width": 4, "lr": 0.05},
        },
        path,
    )


def odd_tensors() -> dict[str, torch.Tensor]:
    """What is more than a plain block of float32: dtypes, views, ties, sparse and quantized."""
    table = torch.arange(12.0).reshape(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantized tensors are old, too
        quantized = torch.quantize_per_tensor(table, 0.1, 0, torch.qint8)
    return {
        "embedding.weight": table,
        "lm_head.weight": table,
        "transposed": table.t(),
        "column": table[:, 1],
        "bfloat16": table.to(torch.bfloat16),
        "float8": table.to(torch.float8_e4m3fn),
        "complex": torch.complex(table, -table),
        "bool": table > 5,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "waste": torch.zeros(1000)[:2],
        "sparse": torch.eye(4).to_sparse(),
        "quantized": quantized,
    }


if __name__ == "__main__":
    main()
