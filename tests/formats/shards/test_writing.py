"""Shards and their index: against huggingface_hub's plan, read by accelerate and transformers."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import modelctl as mc
from modelctl.core.records import FREEZE, read_record
from modelctl.errors import LossError, UnreadableError, UsageError, WriteError
from modelctl.formats.shards.writing import parse_size, plan_shards

hub = pytest.importorskip("huggingface_hub")

KINDS = {"safetensors": "model{}.safetensors", "torch": "pytorch_model{}.bin"}


def write(path: Path, tensors: dict[str, Any]) -> Path:
    torch.save(tensors, path)
    return path


def shard(source: Path, folder: Path, size: int | str, to: str = "safetensors", **more: Any) -> Any:
    with mc.open(source) as ckpt:
        return mc.save(ckpt, f"{folder}/", to=to, max_shard_size=size, **more)


def some(count: int = 6, rows: int = 100) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(rows + i, 3) for i in range(count)}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


# ------------------------------------------------------------------ the plan

SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(SHAPES, st.integers(1, 200), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_plan_is_huggingface_hubs(sizes: list[int], limit: int, tie: bool) -> None:
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    if tie:
        tensors["tied"] = tensors["t0"]
    theirs = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    with (
        tempfile.TemporaryDirectory() as folder,
        mc.open(write(Path(folder) / "in.pt", tensors)) as ckpt,
    ):
        ours = plan_shards(ckpt, limit, by_storage=True)
    empty = {name for name, tensor in tensors.items() if not tensor.numel()}  # one storage to them
    plan = [[name for name in names if name not in empty] for names in ours]
    expected = [
        [name for name in names if name not in empty]
        for names in theirs.filename_to_tensors.values()
    ]
    assert [sorted(names) for names in plan if names] == [sorted(n) for n in expected if n]


@pytest.mark.parametrize("text", ["5GB", "200MB", "17KB", "1TB"])
def test_sizes_are_huggingface_hubs(text: str) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    hub.split_torch_state_dict_into_shards(tensors, max_shard_size=text)  # it takes the same text
    unit = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[text[-2]]
    assert parse_size(text) == int(text[:-2]) * unit


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1GiB", 2**30), ("1.5 MB", 1_500_000), (512, 512), ("3kb", 3000)]
)
def test_other_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 apples", "1iB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("to", KINDS)
def test_shards_and_their_index(tmp_path: Path, to: str) -> None:
    tensors = some()
    saved = shard(write(tmp_path / "in.pt", tensors), tmp_path / "out", 3000, to)
    names = sorted(os.listdir(tmp_path / "out"))
    pattern = KINDS[to]
    expected = [pattern.format(f"-{i:05d}-of-00003") for i in (1, 2, 3)]
    assert names == sorted([*expected, pattern.format("") + ".index.json"])
    assert saved.files == 4
    assert saved.bytes_written == sum((tmp_path / "out" / n).stat().st_size for n in names)
    index = json.loads((tmp_path / "out" / (pattern.format("") + ".index.json")).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert list(index["weight_map"]) == list(tensors)
    assert list(dict.fromkeys(index["weight_map"].values())) == expected
    found: dict[str, torch.Tensor] = {}
    for name in expected:
        path = tmp_path / "out" / name
        part = load_file(path) if to == "safetensors" else torch.load(path, weights_only=True)
        assert all(index["weight_map"][key] == name for key in part)
        found |= part
    equal(found, tensors)


@pytest.mark.parametrize("to", KINDS)
def test_one_shard_needs_no_index(tmp_path: Path, to: str) -> None:
    source = write(tmp_path / "in.pt", some())
    with mc.open(source) as ckpt:
        saved = mc.save(ckpt, f"{tmp_path / 'out'}/", to=to)
    assert os.listdir(tmp_path / "out") == [KINDS[to].format("")]
    assert saved.files == 1
    with mc.open(tmp_path / "out") as ckpt, mc.open(source) as before:
        assert not mc.diff(before, ckpt).differs


@pytest.mark.parametrize("index", ["net.safetensors.index.json", "net.bin.index.json"])
def test_an_index_by_name(tmp_path: Path, index: str) -> None:
    source = write(tmp_path / "in.pt", some())
    (tmp_path / "out").mkdir()
    with mc.open(source) as ckpt:
        mc.save(ckpt, tmp_path / "out" / index, max_shard_size="3kB")
        with pytest.raises(UsageError, match="an index of"):
            mc.save(
                ckpt,
                tmp_path / "out" / index,
                to="torch" if "safetensors" in index else "safetensors",
            )
    stem, suffix = index.split(".")[:2]
    assert (tmp_path / "out" / f"{stem}-00001-of-00003.{suffix}").exists()
    with mc.open(tmp_path / "out" / index) as ckpt, mc.open(source) as before:
        assert not mc.diff(before, ckpt).differs


def test_where_shards_can_go(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pt", some())
    with mc.open(source) as ckpt:
        with pytest.raises(UsageError, match="one file has no shards") as e:
            mc.save(ckpt, tmp_path / "out.pt", max_shard_size="3kB")
        assert "/ writes a folder" in (e.value.hint or "")
        assert mc.save(ckpt, tmp_path / "out", max_shard_size="3kB").files == 4
    torch.save({"model": some(), "epoch": 1}, tmp_path / "train.pt")
    with mc.open(tmp_path / "train.pt") as ckpt, pytest.raises(LossError, match="state_dict"):
        mc.save(ckpt, f"{tmp_path}/x/", to="torch")
    assert not (tmp_path / "x").exists()


TENSORS = st.dictionaries(
    st.text("ab.é", min_size=1, max_size=5),
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@given(TENSORS, st.integers(1, 300), st.sampled_from([*KINDS]))
@settings(max_examples=40, deadline=None)
def test_unshard_after_shard_is_the_identity(specs: dict[str, Any], limit: int, to: str) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 9).to(dtype)
        for name, (dtype, shape) in specs.items()
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard(write(folder / "in.pt", tensors), folder / "shards", limit, to)
        with mc.open(folder / "shards") as ckpt:
            assert list(ckpt.state_dict()) == list(tensors)  # in order, too
            mc.save(ckpt, folder / "out.pt")
            mc.save(ckpt, folder / "out.safetensors")
        equal(torch.load(folder / "out.pt", weights_only=True), tensors)
        equal(load_file(folder / "out.safetensors"), tensors)


def test_ties_and_views(tmp_path: Path) -> None:
    base = torch.randn(50, 4)
    tensors = {
        "embed": base,
        "other": torch.randn(60, 4),
        "head": base,
        "half": base[:25],
    }
    source = write(tmp_path / "in.pt", tensors)
    shard(source, tmp_path / "bin", 900, "torch")
    with mc.open(tmp_path / "bin") as ckpt:
        refs = ckpt.state_dict()
        assert refs["embed"].storage is refs["head"].storage is refs["half"].storage
        assert refs["embed"].identity == refs["head"].identity
        mc.save(ckpt, tmp_path / "back.pt")
    equal(torch.load(tmp_path / "back.pt", weights_only=True), tensors)
    with pytest.raises(LossError, match="share memory"):
        shard(source, tmp_path / "st", 900)
    del tensors["half"]
    shard(write(tmp_path / "in.pt", tensors), tmp_path / "st", 900)
    index = json.loads((tmp_path / "st" / "model.safetensors.index.json").read_text())
    # as in save_model's files, what is tied is there once; other readers look for no other name
    assert list(index["weight_map"]) == ["embed", "other"]
    assert index["metadata"]["total_size"] == tensors["embed"].nbytes + tensors["other"].nbytes
    with mc.open(tmp_path / "st") as ckpt:
        assert ckpt.warnings == ()
        refs = ckpt.state_dict()
        assert refs["embed"].identity == refs["head"].identity


def test_records_and_metadata_go_along(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))
    torch.save(net.state_dict(), tmp_path / "in.pt")
    for to in KINDS:
        with mc.open(tmp_path / "in.pt") as ckpt:
            mc.save(mc.freeze(ckpt, "0"), tmp_path / to, to=to, max_shard_size=700)
        with mc.open(tmp_path / to) as ckpt:
            assert len(ckpt.resources) > 2
            assert read_record(ckpt, FREEZE)["frozen"] == ["0.weight", "0.bias"]
            mc.save(mc.rename(ckpt, "0=first"), tmp_path / f"{to}.pt")
        loaded = torch.load(tmp_path / f"{to}.pt", weights_only=True)
        assert loaded._metadata[""]["modelctl.freeze"]["frozen"] == ["first.weight", "first.bias"]
        if to == "torch":  # what decides how BatchNorm loads
            assert loaded._metadata["1"] == {"version": 2}


def test_extra_state_is_kept(tmp_path: Path) -> None:
    tensors = {**some(), "layers.0._extra_state": {"scale": 1.0}, "n": 3}
    shard(write(tmp_path / "in.pt", tensors), tmp_path / "out", 3000, "torch")
    with mc.open(tmp_path / "out") as ckpt:
        mc.save(ckpt, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["layers.0._extra_state"] == {"scale": 1.0}
    assert back["n"] == 3
    assert list(back) == list(tensors)


# ------------------------------------------------------------------ what stands there already


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    source = write(tmp_path / "in.pt", some())
    for first, second in (("3kB", "2kB"), ("3kB", "1MB"), ("1MB", "3kB")):
        folder = tmp_path / f"{first}-{second}"
        shard(source, folder, first)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(WriteError, match="exists already"):
            shard(source, folder, second)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("first", ["2kB", "3kB", "1MB"])
@pytest.mark.parametrize("second", ["2kB", "3kB", "1MB"])
def test_overwriting_leaves_no_old_shard(tmp_path: Path, first: str, second: str) -> None:
    source = write(tmp_path / "in.pt", some())
    shard(source, tmp_path / "out", first)
    (tmp_path / "out" / "config.json").write_text("{}")
    new = {name: tensor + 1 for name, tensor in some().items()}
    saved = shard(write(tmp_path / "new.pt", new), tmp_path / "out", second, overwrite=True)
    names = sorted(os.listdir(tmp_path / "out"))
    assert len(names) == saved.files + 1
    assert "config.json" in names
    with mc.open(tmp_path / "out") as ckpt:
        mc.save(ckpt, tmp_path / "back.safetensors")
    equal(load_file(tmp_path / "back.safetensors"), new)


def test_edited_in_place(tmp_path: Path) -> None:
    shard(write(tmp_path / "in.pt", some()), tmp_path / "out", "3kB")
    index = tmp_path / "out" / "model.safetensors.index.json"
    with mc.open(tmp_path / "out") as ckpt:
        mc.save(mc.rename(ckpt, "layers=blocks"), index, overwrite=True, max_shard_size="3kB")
        with pytest.raises(WriteError, match="changed while it was edited"):  # by ourselves
            mc.save(mc.drop(ckpt, "layers.0"), index, overwrite=True, max_shard_size="3kB")
    with mc.open(tmp_path / "out") as ckpt:
        assert list(ckpt.state_dict()) == [f"blocks.{i}.weight" for i in range(6)]


def test_an_index_can_not_have_other_files_removed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "thesis.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "thesis.safetensors"}})
    )
    shard(write(tmp_path / "in.pt", some()), folder, "3kB", overwrite=True)
    assert (folder / "thesis.safetensors").exists()
    assert (folder / "model-00001-of-00003.safetensors").exists()


def test_shards_without_their_index(tmp_path: Path) -> None:
    shard(write(tmp_path / "in.pt", some()), tmp_path / "out", "3kB")
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    with pytest.raises(UnreadableError, match="without their index"):
        mc.open(tmp_path / "out")
    for path in sorted((tmp_path / "out").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UnreadableError, match="without their index"):
        mc.open(tmp_path / "out")


# ------------------------------------------------------------------ other readers


@pytest.mark.parametrize("to", KINDS)
def test_accelerate_loads_it(tmp_path: Path, to: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    torch.save(net.state_dict(), tmp_path / "in.pt")
    shard(tmp_path / "in.pt", tmp_path / "out", 2000, to)
    other = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "out"), strict=True)
    equal(other.state_dict(), net.state_dict())


@pytest.mark.parametrize("to", KINDS)
def test_transformers_loads_it(tmp_path: Path, to: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=40, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)  # its head is tied to its embedding
    model.save_pretrained(tmp_path / "one")
    torch.save(model.state_dict(), tmp_path / "in.pt")
    config.save_pretrained(tmp_path / "out")
    shard(tmp_path / "in.pt", tmp_path / "out", 3000, to)
    assert len(list((tmp_path / "out").glob("*-of-*"))) > 1
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    equal(loaded.state_dict(), model.state_dict())
    # and what it wrote itself is the same checkpoint
    with mc.open(tmp_path / "one") as theirs, mc.open(tmp_path / "out") as ours:
        changed = mc.diff(theirs, ours)
        assert (changed.changed, changed.removed) == ([], [])
