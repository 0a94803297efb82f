"""What every format must pass: a suite for tests of formats, ours and those of other packages.

A subclass of :class:`FormatSuite` gives ``make(folder, width)``: a file (or folder) that the
format's own software wrote, and the tensors that it sees in it, as numpy arrays or torch tensors.
Everything else is here. Needs pytest; torch only where a test of it says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from .core.tree import walk
from .errors import ModelctlError
from .files import open as open_checkpoint
from .files import save
from .formats.base import WritableFolder, WritableFormat
from .formats.registry import for_writing
from .inspection.ls import list_names, list_tensors
from .inspection.summary.summarize import summarize
from .surgery.convert import convert

SMALL, BIG = 5, 1100
CUTS, FLIPS = 40, 150


class Sample(NamedTuple):
    """A file, every tensor in it by its full path, and the model's as ``load_state_dict`` would
    see them (None: those are the same)."""

    path: Path
    tensors: Mapping[str, Any]
    model: Mapping[str, Any] | None = None

    @property
    def state_dict(self) -> Mapping[str, Any]:
        return self.tensors if self.model is None else self.model


class Expected(NamedTuple):
    """What an array or a tensor is: torch's name of its dtype, its shape, its bytes row-major, and
    what is equal for the same view of the same memory."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    identity: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> Expected:
        if hasattr(value, "untyped_storage"):
            return cls._of_tensor(value)
        import numpy as np

        array = np.asarray(value)
        at = array.__array_interface__["data"][0]
        native = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        identity = (at, array.shape, array.strides)
        return cls(array.dtype.name, array.shape, native.tobytes(), identity)

    @classmethod
    def _of_tensor(cls, tensor: Any) -> Expected:
        storage = tensor.untyped_storage().data_ptr()
        shape = tuple(tensor.shape)
        return cls(
            str(tensor.dtype).removeprefix("torch."),
            shape,
            raw(tensor),
            (storage, tensor.storage_offset(), shape, tensor.stride()),
        )


def raw(tensor: Any) -> bytes:
    """A torch tensor's bytes, row-major, gathered by torch."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return data


def described(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Name to dtype, shape and digest."""
    found = {name: Expected.of(value) for name, value in tensors.items()}
    return {
        name: [one.dtype, list(one.shape), hashlib.sha256(one.data).hexdigest()]
        for name, one in found.items()
    }


def look(path: Path) -> dict[str, Any]:
    """All that a user may ask of a file; the tensors as :func:`described` gives them."""
    with open_checkpoint(path) as ckpt:
        for depth in (1, None):
            summarize(ckpt, depth)
        list_tensors(ckpt, section="all")
        list(walk(ckpt.constants))
        return {
            name: [ref.dtype.name, list(ref.shape), hashlib.sha256(ref.tobytes()).hexdigest()]
            for name, ref in ckpt.tensors().items()
        }


# Reads a file in a process where torch and its company can't be imported.
_WITHOUT_TORCH = """
import hashlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "safetensors", "lightning", "gone"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("torch could be imported")
import modelctl

with modelctl.open(sys.argv[1]) as ckpt:
    modelctl.summarize(ckpt)
    print(json.dumps({
        name: [ref.dtype.name, list(ref.shape), hashlib.sha256(ref.tobytes()).hexdigest()]
        for name, ref in ckpt.tensors().items()
    }))
"""


class FormatSuite:
    """Subclass it as ``class TestMine(FormatSuite)`` and give what stands below.

    ``name`` and ``label`` are the format's, ``kind`` what the sample is (``state_dict``, …);
    ``writable`` the format name that writes it back, with ``official`` its official reader;
    ``structure_only`` is False where a file can't be read without reading all of it.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    kind: ClassVar[str] = "state_dict"
    writable: ClassVar[str | None] = None
    structure_only: ClassVar[bool] = True

    def make(self, folder: Path, width: int) -> Sample:
        """A sample whose tensors have about ``width`` x ``width`` elements."""
        raise NotImplementedError

    def official(self, path: Path) -> Mapping[str, Any]:
        """The tensors of a written file by its official reader, by their full path."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what is checked

    @pytest.fixture(scope="class")
    @classmethod
    def sample(cls, tmp_path_factory: pytest.TempPathFactory) -> Sample:
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(0)
        return cls().make(tmp_path_factory.mktemp("sample"), SMALL)

    def test_names_shapes_dtypes_and_bytes(self, sample: Sample) -> None:
        found = look(sample.path)
        assert found == described(sample.tensors)
        assert list(found) == list(sample.tensors)
        assert found

    def test_it_says_what_it_is(self, sample: Sample) -> None:
        with open_checkpoint(sample.path) as ckpt:
            assert ckpt.origin is not None
            assert (ckpt.origin.format, ckpt.origin.label) == (self.name, self.label)
            assert ckpt.sections.kind == self.kind
            assert ckpt.origin.bytes_on_disk == _bytes_on_disk(sample.path)
            assert ckpt.warnings == ()
            assert ckpt.findings == () or {f.level for f in ckpt.findings} == {"suspicious"}

    def test_the_suffix_says_nothing(self, sample: Sample, tmp_path: Path) -> None:
        copy = _copy(sample.path, tmp_path)
        renamed = copy.rename(copy.with_name("model.foo"))
        assert look(renamed) == described(sample.tensors)

    def test_the_model_is_found(self, sample: Sample) -> None:
        with open_checkpoint(sample.path) as ckpt:
            found = ckpt.state_dict()
            assert list(found) == list(sample.state_dict)
            rows = list_tensors(ckpt)
            assert [row.name for row in rows] == list(sample.state_dict)
            assert list_names(ckpt) == list(sample.state_dict)
            expected = [Expected.of(value) for value in sample.state_dict.values()]
            for row, one in zip(rows, expected, strict=True):
                assert (row.shape, row.dtype, row.nbytes) == (one.shape, one.dtype, len(one.data))
            assert [found[name].tobytes() for name in found] == [one.data for one in expected]

    def test_the_whole_file_is_listed(self, sample: Sample) -> None:
        with open_checkpoint(sample.path) as ckpt:
            assert list_names(ckpt, section="all") == list(sample.tensors)
            rows = list_tensors(ckpt, section="all")
            assert [row.name for row in rows] == list(sample.tensors)

    @pytest.mark.parametrize("depth", [1, 2, None])
    def test_rows_sum_to_the_totals(self, sample: Sample, depth: int | None) -> None:
        expected = [Expected.of(value) for value in sample.state_dict.values()]
        unique = {one.identity: one for one in expected}.values()
        elements = sum(math.prod(one.shape) for one in unique)
        with open_checkpoint(sample.path) as ckpt:
            for fold in (None, True):
                found = summarize(ckpt, depth, fold)
                totals = found.totals
                assert totals.params_unique + totals.buffers == elements
                assert totals.tensors == len(sample.state_dict)
                assert totals.nbytes == sum(len(one.data) for one in unique)
                assert sum(row.params for row in found.rows) == totals.params_unique
                assert sum(row.buffers for row in found.rows) == totals.buffers
                assert sum(row.nbytes for row in found.rows) == totals.nbytes
                assert sum(row.tensors for row in found.rows) == totals.tensors

    def test_only_structure_is_read(self, tmp_path: Path) -> None:
        if not self.structure_only:
            pytest.skip("this container can't be read in parts")
        sample = self.make(tmp_path, BIG)
        size = _bytes_on_disk(sample.path)
        assert size > 4 << 20
        with open_checkpoint(sample.path) as ckpt:
            summarize(ckpt, None)
            list_tensors(ckpt, section="all")
            assert 0 < ckpt.bytes_read < size / 10
            largest = max(ckpt.tensors().values(), key=lambda ref: ref.nbytes)
            before = ckpt.bytes_read
            next(largest.chunks())
            # one piece, and where in its file it lies
            assert 0 < ckpt.bytes_read - before <= (1 << 20) + (64 << 10)

    def test_cut_off(self, sample: Sample, tmp_path: Path) -> None:
        """An error of ours, or what was cut off was no data; never other data."""
        expected = described(sample.tensors)
        refused = 0
        for victim in _files(sample.path, tmp_path):
            whole = victim.read_bytes()
            places = {*range(len(whole) - 8, len(whole)), *range(8)}
            places |= {len(whole) * i // CUTS for i in range(CUTS)}
            for at in sorted(place for place in places if 0 <= place < len(whole)):
                victim.write_bytes(whole[:at])
                try:
                    assert look(tmp_path / sample.path.name) == expected, at
                except ModelctlError:
                    refused += 1
            victim.write_bytes(whole)
        assert refused >= CUTS // 2

    def test_flipped_bits(self, sample: Sample, tmp_path: Path) -> None:
        """Whatever becomes of the file: read, or an error of ours."""
        rng = random.Random(1)
        for victim in _files(sample.path, tmp_path):
            whole = victim.read_bytes()
            for _ in range(FLIPS):
                data = bytearray(whole)
                for _ in range(rng.choice((1, 1, 1, 4))):
                    at = rng.randrange(len(data))
                    data[at] ^= 1 << rng.randrange(8)
                victim.write_bytes(data)
                try:
                    look(tmp_path / sample.path.name)
                except ModelctlError:
                    pass
                except Exception as e:
                    raise AssertionError(f"{victim.name} with byte {at} changed: {e!r}") from e
            victim.write_bytes(whole)

    def test_without_torch(self, sample: Sample) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_TORCH, str(sample.path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == described(sample.tensors)

    def test_closed_it_reads_no_more(self, sample: Sample) -> None:
        with open_checkpoint(sample.path) as ckpt:
            refs = [ref for ref in ckpt.tensors().values() if ref.nbytes]
        assert refs
        for ref in refs:
            with pytest.raises(ModelctlError):
                ref.tobytes()
        ckpt.close()

    def test_its_weights_as_a_torch_file(self, sample: Sample, tmp_path: Path) -> None:
        """Whatever the container: torch loads its state_dict from what we write of it."""
        torch = pytest.importorskip("torch")
        with open_checkpoint(sample.path) as ckpt:
            save(convert(ckpt, weights_only=True), tmp_path / "out.pt")
        loaded = torch.load(tmp_path / "out.pt", weights_only=True)
        assert described(loaded) == described(sample.state_dict)
        assert list(loaded) == list(sample.state_dict)

    def test_round_trip(self, sample: Sample, tmp_path: Path) -> None:
        if self.writable is None:
            pytest.skip("read only")
        out = tmp_path / "out"
        with open_checkpoint(sample.path) as ckpt:
            save(ckpt, out, to=self.writable)
        assert described(self.official(out)) == described(sample.tensors)
        assert look(out) == described(sample.tensors)

    def test_its_layout_is_what_is_written(self, sample: Sample, tmp_path: Path) -> None:
        """Segments one after the other, from the start to the size that was said before."""
        if self.writable is None:
            pytest.skip("read only")
        with open_checkpoint(sample.path) as ckpt:
            fmt = for_writing(self.writable, "out")
            if isinstance(fmt, WritableFormat):
                files = [fmt.layout(ckpt, "out")]
            else:
                assert isinstance(fmt, WritableFolder)
                files = [*fmt.layout(ckpt, (), in_place=False).files]
            for file in files:
                at = 0
                for segment in file.segments:
                    assert segment.offset == at
                    at += segment.nbytes
                assert at == file.nbytes
            total = sum(file.nbytes for file in files)
            assert save(ckpt, tmp_path / "out", to=self.writable).bytes_written == total
        for file in files:
            whole = isinstance(fmt, WritableFormat)
            out = tmp_path / "out" if whole else tmp_path / "out" / file.name
            assert os.path.getsize(out) == file.nbytes

    def test_runs_are_where_the_bytes_lie(self, sample: Sample) -> None:
        with open_checkpoint(sample.path) as ckpt:
            for ref in ckpt.tensors().values():
                runs = ref.storage.runs()
                if runs is not None:
                    parts = [run.source.read(run.offset, run.nbytes) for run in runs]
                    assert b"".join(parts) == ref.storage.read(0, ref.storage.nbytes)

    def test_several_threads_read_at_once(self, sample: Sample) -> None:
        with open_checkpoint(sample.path) as ckpt, ThreadPoolExecutor(8) as pool:
            refs = ckpt.tensors()
            expected = [Expected.of(sample.tensors[name]).data for name in refs]
            before = ckpt.bytes_read
            once = [ref.tobytes() for ref in refs.values()]
            each = ckpt.bytes_read - before
            times = 20
            found = list(pool.map(lambda ref: ref.tobytes(), list(refs.values()) * times))
            assert once == expected
            assert found == expected * times
            assert ckpt.bytes_read - before == each * (times + 1)


def _bytes_on_disk(path: Path) -> int:
    if path.name.endswith(".index.json") or path.is_dir():
        folder = path if path.is_dir() else path.parent
        return sum(one.stat().st_size for one in folder.iterdir())
    return os.path.getsize(path)


def _copy(path: Path, folder: Path) -> Path:
    """A copy of the sample, with what lies beside it."""
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    return folder / path.name


def _files(path: Path, folder: Path) -> Iterator[Path]:
    """Each file of a copy of the sample."""
    copied = _copy(path, folder)
    inside = copied if path.is_dir() else folder
    yield from sorted(one for one in inside.iterdir() if one.is_file())
