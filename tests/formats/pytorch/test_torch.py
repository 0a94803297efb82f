# ruff: noqa: E501 - tables
"""torch's files both ways, against torch itself."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modelctl
from modelctl.files import save
from modelctl.inspection.ls import list_tensors

QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Those of sub-byte integers have no storage of their own; quantized ones need a scale.
_SKIPPED = ("torch.q", *(f"torch.{sign}int{n}" for sign in ("", "u") for n in range(1, 8)))
_WHOLE = ("int16", "int32", "int64", "uint16", "uint32", "uint64")
DTYPES = sorted(
    {
        found
        for name in dir(torch)
        if isinstance(found := getattr(torch, name), torch.dtype)
        and (name in _WHOLE or not str(found).startswith(_SKIPPED))
    },
    key=str,
)


def make(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    """A tensor of any dtype, of bytes that are no two alike."""
    size = dtype.itemsize * math.prod(shape)
    raw = bytes((i * 37 + seed) % 251 for i in range(max(size, 1)))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[:size]
    untyped = flat.clone().untyped_storage()
    return torch.empty(0, dtype=dtype).set_(untyped, 0, shape, _strides(shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    out, step = [], 1
    for size in reversed(shape):
        out.append(step)
        step *= max(size, 1)
    return tuple(reversed(out))


def values(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, row-major, gathered by torch through an integer dtype."""
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    item = tensor.dtype.itemsize
    data = tensor.detach()
    if data.is_complex() and item == 16:
        data = torch.view_as_real(data.resolve_conj())
        item = 8
    if item != 16 and data.numel():
        untyped = data.untyped_storage()
        data = torch.empty(0, dtype=plain[item]).set_(
            untyped, data.storage_offset(), data.shape, data.stride()
        ) if data.dtype.itemsize == item else data  # fmt: skip
    if data.dtype is torch.float64:
        data = data.contiguous().flatten().view(torch.int64)
    return bytes(data.contiguous().flatten().view(torch.uint8).tolist()) if data.numel() else b""


def tensors_of(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(node, torch.Tensor):
        yield path or "<root>", node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from tensors_of(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for key, value in enumerate(node):
            yield from tensors_of(value, f"{path}.{key}" if path else str(key))


def check_refs(path: Path, obj: Any) -> None:
    """What modelctl lists is what torch holds."""
    with modelctl.open(path) as ckpt:
        refs = ckpt.tensors()
        expected = dict(tensors_of(obj))
        assert list(refs) == list(expected)
        for name, tensor in expected.items():
            ref = refs[name]
            assert ref.dtype.name == str(tensor.dtype).removeprefix("torch.")
            assert ref.shape == tuple(tensor.shape)
            assert ref.stride == tensor.stride()
            assert ref.offset == tensor.storage_offset()
            assert ref.is_contiguous == tensor.is_contiguous()
            assert ref.storage.nbytes == tensor.untyped_storage().nbytes()
            if not tensor.is_conj() and not tensor.is_neg():
                assert ref.tobytes() == values(tensor), name
            if isinstance(tensor, torch.nn.Parameter):
                assert (ref.role, ref.requires_grad) == ("parameter", tensor.requires_grad)
            elif tensor.requires_grad:
                assert ref.requires_grad is True
            else:
                assert ref.requires_grad in (None, False)
        found = list(refs.values())
        first = list(expected.values())
        for i, a in enumerate(found):
            for j, b in enumerate(found):
                tied = (
                    first[i].untyped_storage().data_ptr() == first[j].untyped_storage().data_ptr()
                )
                if first[i].untyped_storage().nbytes() and first[j].untyped_storage().nbytes():
                    assert (a.storage is b.storage) == tied


def same(a: Any, b: Any, memo: dict[int, int]) -> None:
    """Equal in type, values, strides and which storages are shared."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert a.storage_offset() == b.storage_offset()
        assert a.requires_grad == b.requires_grad
        assert (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
        assert values(a) == values(b)
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
        if a.untyped_storage().nbytes():
            there = b.untyped_storage().data_ptr()
            assert memo.setdefault(a.untyped_storage().data_ptr(), there) == there
            assert len(set(memo.values())) == len(memo)
        if "_metadata" in getattr(a, "__dict__", {}):
            assert a._metadata == b._metadata
    elif isinstance(a, dict):
        assert [(type(k), k) for k in a] == [(type(k), k) for k in b]
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            same(a[key], b[key], memo)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other, memo)
    elif isinstance(a, float):
        assert a == b or (a != a and b != b)
    else:
        assert a == b


def check_written(path: Path, original: Any) -> None:
    """torch loads it, in each of its ways, as it loads the original."""
    same(original, torch.load(path, weights_only=True), {})
    same(original, torch.load(path, weights_only=True, mmap=True), {})
    if find_spec("torch.utils.serialization") is None:  # since torch 2.7
        return
    config = import_module("torch.utils.serialization").config
    before = config.load.calculate_storage_offsets
    config.load.calculate_storage_offsets = True
    try:
        same(original, torch.load(path, weights_only=True, mmap=True), {})
    finally:
        config.load.calculate_storage_offsets = before


def round_trip(obj: Any, tmp_path: Path, *, legacy: bool = True) -> None:
    source, copy = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(obj, source)
    loaded = torch.load(source, weights_only=True)
    check_refs(source, loaded)
    with modelctl.open(source) as ckpt:
        assert ckpt.findings == ()
        assert ckpt.warnings == ()
        save(ckpt, copy, overwrite=True)
    check_written(copy, loaded)
    if legacy:
        torch.save(obj, source, _use_new_zipfile_serialization=False)
        loaded = torch.load(source, weights_only=True)
        check_refs(source, loaded)
        with modelctl.open(source) as ckpt:
            save(ckpt, copy, overwrite=True)
        check_written(copy, loaded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 0, 3)], ids=str)
def test_every_dtype(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = make(dtype, shape)
    typed = dtype in torch.storage._dtype_to_storage_type_map()
    # torch can't load back what it writes of the others in the legacy format
    round_trip({"w": tensor, "again": tensor}, tmp_path, legacy=typed)


def test_the_dtypes_are_torchs() -> None:
    assert len(DTYPES) >= 24
    assert {torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint64} <= set(DTYPES)


VIEWS = [
    lambda t: t,
    lambda t: t.t(),
    lambda t: t[1:],
    lambda t: t[:, :2],
    lambda t: t[::2],
    lambda t: t[1],
    lambda t: t[0, 0],
    lambda t: t[:0],
    lambda t: t[0].expand(3, 5),
    lambda t: t.unsqueeze(0),
    lambda t: t.reshape(-1)[7:],
    lambda t: t.as_strided((3, 2), (1, 5), 2),
    lambda t: t.as_strided((4, 3), (1, 1), 0),
]


@st.composite
def tensors(draw: st.DrawFn, pool: list[torch.Tensor]) -> torch.Tensor:
    if pool and draw(st.booleans()):
        return draw(st.sampled_from(pool))
    dtype = draw(
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
    )
    if draw(st.booleans()) and pool:
        base = pool[0].detach()
        if base.dim() != 2 or base.shape != (4, 5):
            base = make(dtype, (4, 5))
    else:
        base = make(dtype, (4, 5), draw(st.integers(0, 200)))
        pool.insert(0, base)
    view = draw(st.sampled_from(VIEWS))(base)
    if view.is_complex() and draw(st.booleans()):
        view = view.conj()
    if view.is_floating_point() and draw(st.integers(0, 3)) == 0:
        view = (
            torch.nn.Parameter(view, requires_grad=draw(st.booleans()))
            if draw(st.booleans())
            else view.detach().requires_grad_()
        )
    pool.append(view)
    return view


@st.composite
def trees(draw: st.DrawFn) -> Any:
    pool: list[torch.Tensor] = []
    keys = st.one_of(st.text(max_size=6), st.integers(-(2**63), 2**63 - 1), st.booleans())
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.binary(min_size=1, max_size=20),  # weights_only refuses an empty one
        st.sets(st.integers(0, 9)),
        st.sampled_from([torch.Size([2, 3]), torch.device("cuda", 1), torch.device("cpu")]),
        st.sampled_from([torch.float32, torch.bfloat16]),
    )

    def node(depth: int) -> Any:
        kind = draw(st.integers(0, 7 if depth < 3 else 3))
        if kind <= 1:
            return draw(tensors(pool))
        if kind <= 3:
            return draw(scalars)
        children = range(draw(st.integers(0, 4)))
        if kind == 4:
            return [node(depth + 1) for _ in children]
        if kind == 5:
            return tuple(node(depth + 1) for _ in children)
        found = {draw(keys): node(depth + 1) for _ in children}
        return found if kind == 6 else OrderedDict(found)

    # a dot in a key, or 1 beside "1", makes two names one: that is another test's matter
    return {"root": node(0), "more": [node(1), node(1)]}


def _clear(names: list[str]) -> bool:
    return len(set(names)) == len(names)


@QUICK
@given(tree=trees())
def test_trees(tree: Any, tmp_path: Path) -> None:
    if _clear([name for name, _ in tensors_of(tree)]):
        round_trip(tree, tmp_path)


# ------------------------------------------------------------------ byte for byte


def training_checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 8),
    )
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-4}, {"params": model[3].parameters()}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "lr": [1e-4, 1e-3],
        "big": 2**70,
        "negative": -(2**33),
        "name": "résumé",
        "rng": torch.get_rng_state(),
        "raw": b"\x00\xff",
        "none": None,
    }


def large() -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(1203)}


SAVED = {
    "state_dict": lambda: training_checkpoint()["model"],
    "training": training_checkpoint,
    "large": large,
    "tied": lambda: (lambda t: {"a": t, "b": t, "c": t[1:]})(torch.arange(6.0)),
    "module": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
    "float8": lambda: {"w": torch.zeros(4, dtype=torch.float8_e4m3fn), "s": torch.ones(1)},
    "parameter": lambda: {"w": torch.nn.Parameter(torch.ones(3)), "f": torch.nn.Parameter(torch.ones(2), False)},
    "sparse": lambda: {"s": torch.eye(3).to_sparse()},
    "quantized": lambda: {"q": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
    "empty": dict,
    "conj": lambda: {"c": torch.ones(2, dtype=torch.complex64).conj()},
}  # fmt: skip


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.parametrize("name", ["model.pt", "a.b.pth", ".hidden.pt", "wéird.pt", "noext"])
def test_the_bytes_are_torchs(what: str, name: str, tmp_path: Path) -> None:
    """Every record, every header and the directory; only the id of the serialization differs."""
    source, copy = tmp_path / "in" / name, tmp_path / "out" / name
    for path in (source, copy):
        path.parent.mkdir()
    # torch takes a file object for names that are not ASCII, and then says "archive"
    torch.save(SAVED[what](), source)
    with zipfile.ZipFile(source) as a:
        if not any(one.endswith(".format_version") for one in a.namelist()):
            pytest.skip("this torch writes fewer records than newer ones")
    with modelctl.open(source) as ckpt:
        save(ckpt, copy, to="torch")
    ours, theirs = copy.read_bytes(), source.read_bytes()
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(copy) as b:
        assert a.namelist() == b.namelist()
        for one, other in zip(a.infolist(), b.infolist(), strict=True):
            assert one.header_offset == other.header_offset
            if not one.filename.endswith("serialization_id"):
                assert a.read(one) == b.read(other), one.filename
        end = a.infolist()[-1].header_offset
        assert a.infolist()[-1].filename.endswith(".data/serialization_id")
    assert ours[:end] == theirs[:end]
    assert len(ours) == len(theirs)
    assert zipfile.ZipFile(copy).testzip() is None


# ------------------------------------------------------------------ odd files


def rezip(
    source: Path, target: Path, method: int = zipfile.ZIP_STORED, **changes: bytes | None
) -> None:
    """The same records by the standard library's writer, with some replaced or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for one in old.infolist():
            root, _, name = one.filename.partition("/")
            data = changes.get(name, old.read(one))
            if data is not None:
                new.writestr(f"{root}/{name}", data)


def test_a_deflated_zip(tmp_path: Path) -> None:
    obj = {"w": torch.arange(1000.0), "t": torch.arange(6).reshape(2, 3).t()}
    torch.save(obj, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_DEFLATED)
    check_refs(tmp_path / "b.pt", obj)
    with modelctl.open(tmp_path / "b.pt") as ckpt:
        save(ckpt, tmp_path / "c.pt")
    check_written(tmp_path / "c.pt", obj)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int16, torch.complex64, torch.uint8, torch.float64]
)
def test_a_big_endian_file(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = make(dtype, (5, 3))
    obj = {"w": tensor, "t": tensor.t()}
    torch.save(obj, tmp_path / "a.pt")
    part = dtype.itemsize // (2 if dtype.is_complex else 1)
    raw = values(tensor)
    swapped = b"".join(raw[i : i + part][::-1] for i in range(0, len(raw), part))
    rezip(tmp_path / "a.pt", tmp_path / "b.pt", **{"byteorder": b"big", "data/0": swapped})
    same(obj, torch.load(tmp_path / "b.pt", weights_only=True), {})
    check_refs(tmp_path / "b.pt", obj)
    with modelctl.open(tmp_path / "b.pt") as ckpt:
        assert ckpt.tensors()["w"].storage.read(3, 7) == raw[3:10]
        save(ckpt, tmp_path / "c.pt")
    check_written(tmp_path / "c.pt", obj)


def test_a_file_without_the_records_of_today(tmp_path: Path) -> None:
    obj = {"w": torch.ones(3)}
    torch.save(obj, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", tmp_path / "b.pt", **{"byteorder": None, ".format_version": None, ".storage_alignment": None, ".data/serialization_id": None})  # fmt: skip
    check_refs(tmp_path / "b.pt", obj)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol(protocol: int, new: bool, tmp_path: Path) -> None:
    """Protocol 1 begins without the opcode that names its protocol."""
    obj = {"w": torch.ones(3), "raw": b"\xff", "big": 2**80, "n": [1, -(10**12), 2.5, None, True]}
    torch.save(obj, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    check_refs(tmp_path / "a.pt", obj)
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        save(ckpt, tmp_path / "b.pt")
    check_written(tmp_path / "b.pt", obj)


@pytest.mark.parametrize("length", [60_000, 65_400, 70_000, 600_000])
@pytest.mark.parametrize("shift", range(12))
def test_a_legacy_pickle_that_is_read_in_parts(length: int, shift: int, tmp_path: Path) -> None:
    """Wherever the end of a part falls, in whatever opcode."""
    entries = {f"{'n' * (shift + 1)}{i}": i * 7 for i in range(length // (shift + 14))}
    obj = {**entries, "w": torch.ones(2)}
    torch.save(obj, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        assert list(ckpt.root) == list(obj)
        assert ckpt.tensors()["w"].tobytes() == values(torch.ones(2))


def test_a_large_strided_view_is_mapped(tmp_path: Path) -> None:
    big = torch.arange(9 << 20, dtype=torch.int32).reshape(3 << 10, 3 << 10)
    torch.save({"t": big.t(), "c": big[:, 5]}, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        refs = ckpt.tensors()
        pieces = list(refs["t"].chunks())
        assert max(map(len, pieces)) <= 1 << 20
        assert b"".join(pieces) == big.t().contiguous().numpy().tobytes()
        assert refs["c"].tobytes() == big[:, 5].contiguous().numpy().tobytes()


def test_many_dimensions(tmp_path: Path) -> None:
    wide = torch.arange(6.0).reshape(2, 3).t().reshape(3, *[1] * 58, 2)
    torch.save({"w": wide}, tmp_path / "a.pt")
    check_refs(tmp_path / "a.pt", {"w": wide})


def test_output_over_input(tmp_path: Path) -> None:
    obj = training_checkpoint()
    path = tmp_path / "a.pt"
    torch.save(obj, path)
    before = path.read_bytes()
    with modelctl.open(path) as ckpt:
        save(ckpt, path, overwrite=True)
    after = path.read_bytes()
    if b"/.format_version" in before:  # older torch writes fewer records
        assert len(after) == len(before)
    same(torch.load(io.BytesIO(before), weights_only=True), torch.load(path, weights_only=True), {})


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4 << 20)}, tmp_path / "a.pt")
    with modelctl.open(tmp_path / "a.pt") as ckpt:
        assert ckpt.tensors()["w"].nbytes == 16 << 20
        assert ckpt.bytes_read < 1 << 17
        assert os.path.getsize(tmp_path / "a.pt") > 16 << 20


def test_a_list_of_quantized_tensors_that_is_shared(tmp_path: Path) -> None:
    quantized = [torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.quint8)]
    torch.save({"a": quantized, "b": quantized}, tmp_path / "q.pt")
    with modelctl.open(tmp_path / "q.pt") as ckpt:
        assert [row.name for row in list_tensors(ckpt, section="all")] == ["a.0", "b.0"]
