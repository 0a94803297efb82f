"""Whatever ``torch.load(weights_only=True)`` loads, we list identically or refuse for a reason."""

from __future__ import annotations

import random
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import modelctl
from modelctl.errors import ModelctlError
from modelctl.inspection.ls import list_tensors
from modelctl.testing import raw

# The reasons for which a file that torch loads may be refused.
REASONS = re.compile(r"big-endian storages without a dtype|outside its storage")
BASE = (4, 6)


def plain() -> torch.Tensor:
    return torch.arange(24.0).reshape(BASE)


def quantized(per_channel: bool) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if per_channel:
            scales = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
            zeros = torch.zeros(4, dtype=torch.int64)
            return torch.quantize_per_channel(plain(), scales, zeros, 0, torch.qint8)
        return torch.quantize_per_tensor(plain(), 0.5, 3, torch.quint8)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])


def with_attribute() -> torch.Tensor:
    parameter = nn.Parameter(plain())
    parameter.note = "mine"  # type: ignore[attr-defined]
    return parameter


def sparse(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eye = torch.eye(4, 6)
        if kind == "coo":
            return eye.to_sparse()
        if kind == "uncoalesced":
            index = torch.tensor([[0, 0], [1, 1]])
            return torch.sparse_coo_tensor(index, torch.ones(2), BASE)
        if kind == "hybrid":
            return torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 6), BASE)
        if kind in ("bsr", "bsc"):
            return getattr(eye, f"to_sparse_{kind}")((2, 2))
        return getattr(eye, f"to_sparse_{kind}")()


SPECIAL = {
    **{
        f"sparse {kind}": lambda kind=kind: sparse(kind)
        for kind in ("coo", "uncoalesced", "hybrid", "csr", "csc", "bsr", "bsc")
    },
    "quantized": lambda: quantized(False),
    "quantized per channel": lambda: quantized(True),
    "nested": nested,
    "meta": lambda: torch.empty(3, 4, dtype=torch.bfloat16, device="meta"),
    "meta parameter": lambda: nn.Parameter(torch.empty(3, device="meta")),
    "sparse parameter": lambda: nn.Parameter(sparse("coo")),
    "buffer": lambda: nn.Buffer(plain()),
    "parameter": lambda: nn.Parameter(plain()),
    "frozen": lambda: nn.Parameter(plain(), requires_grad=False),
    "attribute": with_attribute,
    "uninitialized": lambda: nn.UninitializedParameter(),
    "transposed": lambda: plain().t(),
    "sliced": lambda: plain()[1::2, ::3],
    "expanded": lambda: plain()[:, :1].expand(4, 9),
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3, dtype=torch.int16),
    "conj": lambda: torch.complex(plain(), plain()).conj(),
    "neg": lambda: torch.complex(plain(), plain()).conj().imag,
    "float8": lambda: plain().to(torch.float8_e5m2),
    "uint64": lambda: torch.ones(3, dtype=torch.uint64),
    "complex32": lambda: torch.ones(3, dtype=torch.complex32),
    "bool": lambda: plain() > 3,
}


def found_by_torch(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(node, torch.Tensor):
        yield ".".join(path) or "<root>", node
        return
    inner = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list | tuple):
        inner = enumerate(node)
    for key, value in inner:
        yield from found_by_torch(value, (*path, str(key)))


def is_plain(tensor: torch.Tensor) -> bool:
    return not (
        tensor.layout is not torch.strided
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.is_meta
    )


def layout_of(tensor: torch.Tensor) -> str | None:
    if is_plain(tensor):
        return None
    if tensor.is_quantized:
        return str(tensor.qscheme()).removeprefix("torch.")
    if tensor.is_meta:
        return "meta"
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def check(obj: Any, path: Path, **how: Any) -> str:
    """Compare; say what came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(obj, path, **how)
        try:
            loaded = torch.load(path, weights_only=True)
        except Exception:
            loaded = None
    try:
        ckpt = modelctl.open(path)
    except ModelctlError as e:
        if loaded is not None and not REASONS.search(str(e)):
            raise
        return "refused"
    with ckpt:
        if loaded is None:
            list_tensors(ckpt, section="all")
            return "not loaded"
        expected = dict(found_by_torch(loaded))
        # the parts of sparse and quantized tensors are listed below them: w, w.indices, w.values
        whole = tuple(f"{name}." for name, tensor in expected.items() if not is_plain(tensor))
        rows = {
            row.name: row
            for row in list_tensors(ckpt, section="all")
            if not row.name.startswith(whole)
        }
        assert list(rows) == list(expected)
        refs = {name: ref for name, ref in ckpt.tensors().items() if name in rows}
        assert list(refs) == [name for name, tensor in expected.items() if is_plain(tensor)]
        for name, tensor in expected.items():
            row = rows[name]
            assert row.dtype == str(tensor.dtype).removeprefix("torch."), name
            assert row.layout == layout_of(tensor), name
            if not tensor.is_nested:
                assert row.shape == tuple(tensor.shape), name
            if not is_plain(tensor):
                continue
            assert row.nbytes == tensor.numel() * tensor.element_size()
            if isinstance(tensor, nn.Parameter):
                assert refs[name].role == "parameter"
                assert refs[name].requires_grad is tensor.requires_grad
            if isinstance(tensor, getattr(nn, "Buffer", ())):
                assert refs[name].role in ("buffer", None)
            if tensor.is_conj() or tensor.is_neg():  # a zero may have either sign
                found = bytearray(refs[name].tobytes())
                values = tensor.resolve_conj().resolve_neg().flatten()
                if len(found):
                    got = torch.frombuffer(found, dtype=tensor.dtype)
                    torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)
            else:
                assert refs[name].tobytes() == raw(tensor), name
        for one, tensor in expected.items():
            for other, again in expected.items():
                if is_plain(tensor) and is_plain(again) and tensor.numel() and again.numel():
                    there = tensor.untyped_storage().data_ptr()
                    tied = there == again.untyped_storage().data_ptr()
                    assert (refs[one].storage is refs[other].storage) == tied
    return "same"


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_each_kind(what: str, legacy: bool, tmp_path: Path) -> None:
    tensor = SPECIAL[what]()
    came = check(
        {"a": tensor, "b": [tensor]},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    # torch can't load these itself
    hard = {"uninitialized", "nested", *(("float8", "uint64", "complex32") if legacy else ())}
    if what not in hard:
        assert came == "same"


@st.composite
def checkpoints(draw: st.DrawFn) -> Any:
    made: list[Any] = []
    names = st.text("abcdé_", min_size=1, max_size=5)

    def node(depth: int) -> Any:
        kind = draw(st.integers(0, 8 if depth < 4 else 3))
        if kind == 0 and made:
            return draw(st.sampled_from(made))
        if kind <= 3:
            new: Any = SPECIAL[draw(st.sampled_from(sorted(SPECIAL)))]()
        elif kind == 4:
            return draw(st.none() | st.integers() | st.floats() | names | st.booleans())
        else:
            inner = [node(depth + 1) for _ in range(draw(st.integers(0, 3)))]
            if kind == 5:
                new = inner
            elif kind == 6:
                new = tuple(inner)
            else:
                keys = draw(st.lists(names, min_size=len(inner), max_size=len(inner), unique=True))
                new = dict(zip(keys, inner, strict=True))
                new = OrderedDict(new) if kind == 8 else new
        made.append(new)
        return new

    # past 256 slots of the pickle's memo tensors are read in one step each
    before = [f"before {i}" for i in range(draw(st.sampled_from([0, 260])))]
    return {"before": before, "root": node(0), "more": node(0)}


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(obj=checkpoints(), legacy=st.booleans(), protocol=st.sampled_from([2, 3, 4, 5]))
def test_checkpoints(obj: Any, legacy: bool, protocol: int, tmp_path: Path) -> None:
    check(
        obj,
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=not legacy,
        pickle_protocol=2 if legacy else protocol,
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_that_torch_still_loads(seed: int, tmp_path: Path) -> None:
    """A changed byte of the pickle: torch checks no checksum, we do, or see what it sees."""
    path = tmp_path / "a.pt"
    torch.save({"w": plain(), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    rng = random.Random(seed)
    compared = 0
    for _ in range(60):
        data = bytearray(whole)
        data[rng.randrange(130, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded = dict(found_by_torch(torch.load(path, weights_only=True)))
        except Exception:
            continue
        try:
            with modelctl.open(path) as ckpt:
                refs = ckpt.tensors()
                assert {name: (ref.shape, ref.tobytes()) for name, ref in refs.items()} == {
                    name: (tuple(tensor.shape), raw(tensor)) for name, tensor in loaded.items()
                }
                compared += 1
        except ModelctlError:
            pass
    assert compared
