"""One small file of each format, what reading a damaged one gives, and every damage there is."""

from __future__ import annotations

import io
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import modelctl
from modelctl.core.nodes import Global, Obj
from modelctl.core.tensors import StorageRef, TensorRef
from modelctl.errors import ModelctlError

from .build.containers import tar, tar_members


class Saved(NamedTuple):
    """Files, and which of them (``.``: the folder) is opened; ``checked``: whether the container
    has checksums of all its structure."""

    files: dict[str, bytes]
    opened: str
    checked: bool = False

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder if self.opened == "." else folder / self.opened


def one(data: bytes, checked: bool, name: str = "model.pt") -> Saved:
    return Saved({name: data}, name, checked)


# ------------------------------------------------------------------ formats


def _state() -> dict[str, Any]:
    import torch

    return {"a.weight": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([True])}


def _torch(new: bool) -> bytes:
    import torch

    buffer = io.BytesIO()
    tree = {"model": _state(), "epoch": 3}
    torch.save(tree, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def _safetensors() -> bytes:
    from safetensors.torch import save

    flat = {name: tensor.contiguous() for name, tensor in _state().items()}
    return save(flat, {"format": "pt"})


def _tar() -> bytes:
    return tar(tar_members())


def _shards() -> Saved:
    import json

    from safetensors.torch import save

    files, weights = {}, {}
    for number, (name, tensor) in enumerate(_state().items(), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        files[file], weights[name] = save({name: tensor.contiguous()}), file
    index = {"metadata": {"total_size": 25}, "weight_map": weights}
    name = "model.safetensors.index.json"
    return Saved({name: json.dumps(index).encode(), **files}, name)


def _dcp(folder: Path) -> Saved:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {name: tensor.contiguous() for name, tensor in _state().items()}
        dcp.save({"model": state, "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return Saved({path.name: path.read_bytes() for path in folder.iterdir()}, ".")


def _net() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def _script() -> bytes:
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(_net(), torch.zeros(1, 3)), buffer)
    return buffer.getvalue()


def _export() -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(_net(), (torch.zeros(1, 3),)), buffer)
    return buffer.getvalue()


MAKE: dict[str, Callable[[Path], Saved]] = {
    "zip": lambda folder: one(_torch(True), True),
    "legacy": lambda folder: one(_torch(False), False),
    "tar": lambda folder: one(_tar(), False, "model.tar"),
    "tar.gz": lambda folder: one(
        tar({"config.json": b'{"a": 1}', "weights.th": _torch(True)}, "w:gz"), True, "m.tar.gz"
    ),
    "safetensors": lambda folder: one(_safetensors(), False, "model.safetensors"),
    "shards": lambda folder: _shards(),
    "dcp": _dcp,
    "torchscript": lambda folder: one(_script(), True),
    "pt2": lambda folder: one(_export(), True, "model.pt2"),
}

# ------------------------------------------------------------------ what reading gives


def image(ckpt: modelctl.Checkpoint) -> Any:
    """All that a checkpoint holds, to be compared."""

    inside: set[int] = set()

    def of(node: Any) -> Any:
        if id(node) in inside:
            return "itself"
        inside.add(id(node))
        seen = shallow(node)
        inside.discard(id(node))
        return seen

    def shallow(node: Any) -> Any:
        if isinstance(node, TensorRef):
            data = b"".join(bytes(piece) for piece in node.storage.checked())
            view = (node.shape, node.stride, node.start)
            return ("tensor", node.dtype.name, view, node.role, node.requires_grad, data)
        if isinstance(node, StorageRef):
            return ("storage", node.storage.nbytes)
        if isinstance(node, Global):
            return ("name", node.module, node.name)
        if isinstance(node, Obj):
            return ("object", *map(of, (node.func, node.args, node.entries, node.state)))
        if isinstance(node, dict):
            return [(of(key), of(value)) for key, value in node.items()]
        if isinstance(node, list | tuple):
            return [type(node).__name__, *map(of, node)]
        return (type(node).__name__, repr(node)[:10_000])

    return of([ckpt.root, ckpt.constants, dict(ckpt.metadata)])


def read(path: Path) -> Any:
    """What a file holds.

    Raises:
        ModelctlError: it is refused, or told of, by whoever reads it or by ``scan``.
    """
    with modelctl.open(path) as ckpt:
        seen = image(ckpt)
        said = [*ckpt.warnings, *ckpt.findings]
    if said or modelctl.scan(path).verdict != "clean":
        raise ModelctlError(f"something is said of it: {said}")
    return seen


def payloads(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Where the bytes of tensors lie, by file."""
    found: dict[str, list[tuple[int, int]]] = {}
    with modelctl.open(path) as ckpt:
        for ref in ckpt.tensors().values():
            for run in ref.storage.runs() or ():
                spans = found.setdefault(Path(run.source.name).name, [])
                spans.append((run.offset, run.offset + run.nbytes))
    return found


# ------------------------------------------------------------------ damage


class Damage(NamedTuple):
    """A byte (``bit`` is None: the file ends there) of a file that is damaged."""

    file: str
    at: int
    bit: int | None

    def of(self, data: bytes) -> bytes:
        if self.bit is None:
            return data[: self.at]
        wrong = bytearray(data)
        wrong[self.at] ^= 1 << self.bit
        return bytes(wrong)


def cuts(saved: Saved) -> list[Damage]:
    """Every prefix of every file."""
    return [Damage(name, at, None) for name, data in saved.files.items() for at in range(len(data))]


def flips(saved: Saved, path: Path) -> list[Damage]:
    """Every bit of what is not the bytes of tensors."""
    inside = payloads(path)
    return [
        Damage(name, at, bit)
        for name, data in saved.files.items()
        for at in range(len(data))
        if not any(begin <= at < end for begin, end in inside.get(name, ()))
        for bit in range(8)
    ]


def some(damages: list[Damage], most: int | None) -> list[Damage]:
    return damages if most is None else random.Random(7).sample(damages, min(most, len(damages)))


class Told(NamedTuple):
    """What became of damages: those refused (or told of), those that changed nothing, those that
    were silent, and errors that are not ours; and how long the slowest took."""

    refused: int
    equal: int
    silent: list[Damage]
    foreign: list[tuple[Damage, str]]
    slowest: float


def tell(saved: Saved, folder: Path, damages: list[Damage]) -> Told:
    path = saved.write(folder)
    whole = read(path)
    refused = equal = 0
    silent, foreign, slowest = [], [], 0.0
    for damage, wrong in _each(saved, damages):
        (folder / damage.file).write_bytes(wrong)
        began = time.process_time()
        try:
            seen = read(path)
        except ModelctlError:
            refused += 1
        except Exception as e:
            foreign.append((damage, f"{type(e).__name__}: {e}"[:200]))
        else:
            equal += seen == whole
            silent += [] if seen == whole else [damage]
        slowest = max(slowest, time.process_time() - began)
        (folder / damage.file).write_bytes(saved.files[damage.file])
    return Told(refused, equal, silent, foreign, slowest)


def _each(saved: Saved, damages: list[Damage]) -> Iterator[tuple[Damage, bytes]]:
    for damage in damages:
        yield damage, damage.of(saved.files[damage.file])
