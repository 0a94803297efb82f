"""What is fuzzed: for each reader files to begin with, how they are changed, and what is done with
them. Whatever is in a file, nothing but our own errors may come out."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import modelctl
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.storages import MemoryStorage, Source
from modelctl.errors import ModelctlError
from modelctl.files import read_place
from modelctl.formats.base import WritableFormat
from modelctl.formats.pytorch.storage_ids import storage_table
from modelctl.formats.registry import for_writing
from modelctl.inspection.ls import list_tensors
from modelctl.inspection.show import show
from modelctl.inspection.summary.summarize import summarize
from modelctl.integrity.sections import disagreements
from modelctl.pickles.interpreter import unpickle
from modelctl.scanning.walk import Walk
from modelctl.storage.containers.zipdir import ZipDirectory
from modelctl.storage.places import Place

from ..hostile.build import containers as build
from ..hostile.build.pickles import (
    call,
    group,
    make,
    mapping,
    name,
    number,
    ordered,
    program,
    real,
    sequence,
    tensor,
    text,
    with_state,
)
from . import mutate
from .mutate import Mutator

# Values are read of files up to this much: more is what storages are for.
_MOST_VALUES = 1 << 20


class Bytes(Source):
    """A file that is in memory."""

    def __init__(self, name: str, data: bytes) -> None:
        super().__init__(name, len(data))
        self.data = data

    def _fetch(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


class Memory(Place):
    """A folder whose files are in memory, or with ``name`` one of them."""

    def __init__(self, files: Mapping[str, bytes], name: str = "", of: Place | None = None) -> None:
        super().__init__(name or "folder", source=Bytes(name, files.get(name, b"")), of=of)
        self.files, self.is_folder = files, not name
        if not name:
            self.__dict__["names"] = sorted(files)

    def beside(self, name: str) -> Place:
        if name not in self.files:
            raise ModelctlError(f"{name!r:.80}: no such file")
        return Memory(self.files, name, of=self)

    member = inside = beside


class Target(NamedTuple):
    """A reader: files to begin with, by name; how they become others; what is done with one."""

    seeds: Callable[[], list[bytes]]
    mutate: Mutator
    run: Callable[[bytes, int], object]


def use(ckpt: Checkpoint, level: int) -> None:
    """What commands do with a checkpoint: each time what is cheap, of many the rest."""
    refs = ckpt.tensors()
    for ref in islice(refs.values(), 20):
        if ref.nbytes <= _MOST_VALUES:
            ref.tobytes()
    _ = ckpt.sections.owners, ckpt.sections.kind
    if level % 4 == 0:
        list_tensors(ckpt, section="all").as_dict()
        str(show(ckpt))
    if level % 4 == 1:
        str(summarize(ckpt))
        _ = ckpt.packed
    if level % 4 == 2:
        with suppress(ModelctlError):
            written(modelctl.convert(ckpt, weights_only=True), "safetensors")
        with suppress(ModelctlError):
            written(ckpt, "torch")
    if level % 4 == 3:
        with suppress(ModelctlError):
            written(modelctl.strip_prefix(ckpt, "w"), "torch")
        with suppress(ModelctlError):
            written(modelctl.drop(ckpt, "*weight"), "torch")
        (*_,) = disagreements(ckpt)


def written(ckpt: Checkpoint, to: str) -> None:
    """The file that a checkpoint would be."""
    format = for_writing(to, "")
    assert isinstance(format, WritableFormat)
    if not format.losses(ckpt):
        format.layout(ckpt, "x")


def of_file(filename: str, data: bytes, level: int) -> None:
    """A file, as every command opens it, and as scan looks at it."""
    if level % 5 == 0:
        place = Place(filename, source=Bytes(filename, data))
        Walk().file(place)
    with read_place(Place(filename, source=Bytes(filename, data))) as ckpt:
        use(ckpt, level // 5)


def of_pickle(data: bytes, level: int) -> None:
    load = storage_table(lambda key, location, nbytes, dtype: MemoryStorage(bytes(min(nbytes, 99))))
    unpickle(data, persistent_load=load)


def of_zip(data: bytes, level: int) -> None:
    directory = ZipDirectory(Bytes("x.zip", data))
    for member in directory.members:
        directory.read(member, 1 << 20)


def of_folder(pack: bytes, level: int) -> None:
    """Files of a folder, which travel as a tar without a checksum of its own."""
    with tarfile.open(fileobj=io.BytesIO(pack)) as opened:
        files = {one.name: opened.extractfile(one).read() for one in opened}  # type: ignore[union-attr]
    with read_place(Memory(files)) as ckpt:
        use(ckpt, level)


def _packed(files: Mapping[str, bytes]) -> bytes:
    return build.tar(files)


def part_of_folder(change: Mutator) -> Mutator:
    """One file of a folder is changed, or goes."""

    def mutated(pack: bytes, rng: Random) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(pack)) as opened:
            files = {one.name: opened.extractfile(one).read() for one in opened}  # type: ignore[union-attr]
        at = rng.choice(sorted(files))
        if rng.random() < 0.05:
            del files[at]
        else:
            files[at] = change(files[at], rng)
        return _packed(files) if files else pack

    return mutated


# ---------------------------------------------------------------------- seeds


def _pickles() -> list[bytes]:
    state = ordered({"weight": tensor("0", (4, 4)), "bias": tensor("1", (4,))})
    module = with_state(
        make(name("torch.nn.modules.linear", "Linear")),
        mapping(
            training=b"\x88",
            _parameters=ordered({"weight": _parameter(tensor("0", (4, 4)))}),
            _buffers=ordered({}),
            _modules=ordered({}),
            in_features=number(4),
        ),
    )
    optimizer = mapping(
        state=b"}" + b"(" + number(0) + mapping(exp_avg=tensor("0", (4, 4)), step=number(3)) + b"u",
        param_groups=sequence(mapping(lr=real(0.1), params=sequence(number(0), number(1)))),
    )
    array = with_state(
        call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            group(number(0)),
            b"C\x01b",
        ),
        group(number(1), group(number(2)), _dtype("f4"), b"\x89", b"B\x08\0\0\0" + bytes(8)),
    )
    sparse = call(
        name("torch._utils", "_rebuild_sparse_tensor"),
        call(name("torch.serialization", "_get_layout"), text("torch.sparse_coo")),
        group(tensor("0", (2, 8)), tensor("1", (4,)), group(number(4), number(4)), b"\x89"),
    )
    size = call(name("torch", "Size"), group(number(2), number(3)))
    extras = mapping(
        a=size,
        d=call(name("torch", "device"), text("cpu")),
        t=name("torch", "float32"),
        n=with_state(make(name("argparse", "Namespace")), mapping(lr=real(0.1))),
        s=call(name("builtins", "set"), sequence(number(1), text("x"))),
        big=b"\x8a\x0a" + bytes(9) + b"\x01",
    )
    bodies = [state, module, optimizer, array, sparse, extras]
    bodies += [
        mapping(model=state, optimizer=optimizer, epoch=number(3)),
        mapping(m=module, x=array),
    ]
    return [program(body, protocol=protocol) for body in bodies for protocol in (2, 4)]


def _parameter(of: bytes) -> bytes:
    return call(name("torch._utils", "_rebuild_parameter"), of, b"\x88", ordered({}))


def _dtype(code: str) -> bytes:
    made = call(name("numpy", "dtype"), text(code), b"\x89", b"\x88")
    rest = (b"N", b"N", b"N", number(-1), number(-1), number(0))
    return with_state(made, group(number(3), text("<"), *rest))


def _zips() -> list[bytes]:
    found = [build.torch_zip(data) for data in _pickles()]
    found.append(build.zipped(build.Entry("a/x", b"x" * 40, deflated=True), build.Entry("b")))
    return found


def _legacy() -> list[bytes]:
    return [build.legacy()]


def _tars() -> list[bytes]:
    inner = {"a/config.yaml": b"x: 1", "a/weights.ckpt": build.torch_zip()}
    return [build.tar(build.tar_members()), build.tar(inner)]


def _tar_gz() -> list[bytes]:
    inner = {"m/config.json": b"{}", "m/model.pt": build.torch_zip()}
    return [build.tar(inner, "w:gz"), build.tar({"model.pt": build.legacy()}, "w:gz")]


def _safetensors() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt", "modelctl.history": '["x"]', "tied": "w"},
        "w": build.described(shape=[2, 2]),
        "b": build.described("F16", [2], 16, 20),
        "e": build.described("I64", [0], 20, 20),
    }
    return [build.safetensors(header, bytes(20)), build.safetensors({"w": build.described()})]


def _indices() -> list[bytes]:
    shard = build.safetensors({"w": build.described(shape=[2, 2])})
    other = build.safetensors({"b": build.described()})
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {"w": "a-1.safetensors", "b": "a-2.safetensors"},
    }
    files = {"a-1.safetensors": shard, "a-2.safetensors": other}
    return [_packed({"model.safetensors.index.json": json.dumps(index).encode(), **files})]


@cache
def _written(to: str) -> list[bytes]:
    """What modelctl writes of a training, as one file or as a folder."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "a.pt", Path(temporary) / "out"
        state = ordered({"weight": tensor("0", (4, 4)), "bias": tensor("1", (4,))})
        source.write_bytes(build.torch_zip(program(mapping(model=state, epoch=number(3)))))
        with modelctl.open(source) as ckpt:
            modelctl.save(ckpt, out, to=to)
        return [_packed({one.name: one.read_bytes() for one in sorted(out.iterdir())})]


@cache
def _programs() -> list[bytes]:
    """Compiled programs, where torch is there to compile some."""
    try:
        import torch
    except ImportError:
        return []
    import warnings

    found = []
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3)
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in (torch.jit.script(net), torch.jit.trace(net, torch.randn(4, 2))):
            buffer = io.BytesIO()
            torch.jit.save(made, buffer)
            found.append(buffer.getvalue())
    return found


@cache
def _exports() -> list[bytes]:
    try:
        import torch
    except ImportError:
        return []
    buffer = io.BytesIO()
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    torch.export.save(torch.export.export(net, (torch.randn(4, 2),)), buffer)
    return [buffer.getvalue()]


_PICKLED = mutate.inside(mutate.pickle, ".pkl", ".metadata")
TARGETS: Mapping[str, Target] = {
    "pickle": Target(_pickles, mutate.either(mutate.raw, mutate.pickle, mutate.pickle), of_pickle),
    "zip": Target(_zips, mutate.raw, of_zip),
    "torch": Target(_zips, _PICKLED, partial(of_file, "x.pt")),
    "legacy": Target(_legacy, mutate.either(mutate.raw, mutate.pickle), partial(of_file, "x.pt")),
    "tar": Target(_tars, mutate.tar(mutate.pickle), partial(of_file, "x.tar")),
    "tar.gz": Target(_tar_gz, mutate.gzipped(mutate.tar(_PICKLED)), partial(of_file, "x.tar.gz")),
    "safetensors": Target(
        _safetensors, mutate.either(mutate.raw, mutate.header), partial(of_file, "x.safetensors")
    ),
    "index": Target(
        _indices, part_of_folder(mutate.either(mutate.json_value, mutate.header)), of_folder
    ),
    "dcp": Target(
        partial(_written, "dcp"),
        part_of_folder(mutate.either(mutate.pickle, mutate.raw)),
        of_folder,
    ),
    "torchscript": Target(
        _programs,
        mutate.either(_PICKLED, mutate.inside(mutate.lines, ".py")),
        partial(of_file, "x.pt"),
    ),
    "export": Target(
        _exports,
        mutate.either(_PICKLED, mutate.inside(mutate.json_value, ".json")),
        partial(of_file, "x.pt2"),
    ),
}


def inputs(target: str, rng: Random) -> Iterator[bytes]:
    """Files without end: seeds, each changed a few times over."""
    found = TARGETS[target]
    seeds = found.seeds()
    while seeds:
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            with suppress(Exception):  # a change that does not fit what others left
                data = found.mutate(data, rng)
            if len(data) > 1 << 20:
                break
        yield data
