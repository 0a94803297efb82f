"""Folders that are not whole, contradict themselves or want to run something: refused by name."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.nodes import Global, attributes, mapping
from modelctl.errors import DamagedError, ModelctlError, UnreadableError
from modelctl.formats.distributed.metadata import METADATA
from modelctl.pickles.interpreter import unpickle
from modelctl.pickles.writer import pickle as write_pickle

torch = pytest.importorskip("torch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One of two files, each with half of a tensor."""
    ranks = []
    for rank in (0, 1):
        torch.save({"w": torch.full((4, 8), float(rank)), "n": rank}, tmp_path / f"{rank}.pt")
        with mc.open(tmp_path / f"{rank}.pt") as ckpt:
            mc.save(ckpt, tmp_path / f"dcp-{rank}", to="dcp")
        ranks.append(tmp_path / f"dcp-{rank}")
    whole = tmp_path / "dcp"
    shutil.copytree(ranks[0], whole)
    shutil.copy(ranks[1] / "__0_0.distcp", whole / "__1_0.distcp")

    def join(root: dict[str, Any]) -> None:
        tensor = attributes(root["state_dict_metadata"]["w"])
        tensor["size"].args = ((8, 8),)
        first = tensor["chunks"][0]
        second = first.replace(state={**first.state, "offsets": first.state["offsets"].replace()})
        second.state["offsets"].args = ((4, 0),)
        tensor["chunks"].append(second)
        for index, info in [*root["storage_data"].items()]:
            if index.state["fqn"] == "w":
                at = index.replace(state={**index.state, "offset": second.state["offsets"]})
                there = {**info.state, "relative_path": "__1_0.distcp"}
                root["storage_data"][at] = info.replace(state=there)

    change(whole, join)
    return whole


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change what the metadata say."""
    path = folder / ".metadata"
    root = unpickle(path.read_bytes()).value
    edit(root.state)
    path.write_bytes(b"".join(write_pickle(root, lambda _: "")))


def items(root: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [
        info.state for index, info in root["storage_data"].items() if index.state["fqn"] == name
    ]


def test_it_is_read_as_it_was_put_together(folder):
    with mc.open(folder) as ckpt:
        expected = torch.cat([torch.zeros(4, 8), torch.ones(4, 8)])
        assert torch.equal(ckpt["w"].torch(), expected)
        assert ckpt["n"] == 0


def test_a_missing_file_is_named_and_what_lies_in_it(folder):
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(UnreadableError, match=r"1 of 2 files missing \(__1_0.distcp\).* of w") as e:
        mc.open(folder)
    assert "all ranks" in (e.value.hint or "")


def test_a_file_that_is_cut_off_is_named(folder):
    data = (folder / "__1_0.distcp").read_bytes()
    (folder / "__1_0.distcp").write_bytes(data[:1000])
    with pytest.raises(UnreadableError, match=r"__1_0.distcp.*cut off"):
        mc.open(folder)


@pytest.mark.parametrize("at", [0, 2])
def test_parts_that_overlap_or_leave_a_hole(folder, at):
    def move(root: dict[str, Any]) -> None:
        chunk = attributes(root["state_dict_metadata"]["w"])["chunks"][1]
        chunk.state["offsets"].args = ((4 + (1 if at else -1), 0),)
        if at:
            attributes(root["state_dict_metadata"]["w"])["size"].args = ((9, 8),)

    change(folder, move)
    with pytest.raises(UnreadableError, match=r"'w': .*(in no part of it|overlap)"):
        mc.open(folder)


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", "..", "", "a\0b", "a\\b"])
def test_a_file_elsewhere_is_not_opened(folder, name):
    change(folder, lambda root: [one.update(relative_path=name) for one in items(root, "w")][:0])
    with pytest.raises(UnreadableError, match="not a plain file name in its folder"):
        mc.open(folder)


@pytest.mark.parametrize("lie", ["dtype", "shape"])
def test_a_part_that_is_another_than_the_metadata_say(folder, lie):
    def edit(root: dict[str, Any]) -> None:
        tensor = attributes(root["state_dict_metadata"]["w"])
        if lie == "dtype":
            state = tensor["properties"].state
            tensor["properties"].state = (Global("torch", "int32"), *state[1:])
        else:
            tensor["size"].args = ((8, 4),)
            for chunk in tensor["chunks"]:
                chunk.state["sizes"].args = ((4, 4),)

    change(folder, edit)
    with (
        mc.open(folder) as ckpt,
        pytest.raises(UnreadableError, match=r"__0_0.distcp at byte .*lies there"),
    ):
        ckpt["w"].tobytes()


def test_metadata_of_another_save(folder):
    """Files that hold other things at these places."""
    (folder / "__1_0.distcp").write_bytes(os.urandom(100_000))
    with mc.open(folder) as ckpt, pytest.raises(UnreadableError, match=r"__1_0\.distcp"):
        ckpt["w"].tobytes()


def test_a_flipped_bit_is_seen_and_its_tensor_named(folder, tmp_path):
    data = bytearray((folder / "__1_0.distcp").read_bytes())
    with mc.open(folder) as ckpt:
        runs = ckpt["w"].storage.runs()
    assert runs is not None
    data[runs[1].offset + 3] ^= 1
    (folder / "__1_0.distcp").write_bytes(data)
    with pytest.raises(DamagedError, match="the tensor 'w' is damaged"), mc.open(folder) as ckpt:
        mc.save(mc.keep(ckpt, "w"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    # the checksums of the parts, which are whole records, go along
    with mc.open(folder) as ckpt:
        mc.save(mc.keep(ckpt, "w"), tmp_path / "out.pt")
    with zipfile.ZipFile(tmp_path / "out.pt") as zipped:
        assert zipped.testzip() is not None
    with pytest.raises(DamagedError, match="'w' is damaged"), mc.open(tmp_path / "out.pt") as ckpt:
        mc.save(ckpt, tmp_path / "out.safetensors")


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_metadata_that_would_run_something_run_nothing_and_are_a_finding(folder, tmp_path):
    path = folder / ".metadata"
    whole = pickle.loads(path.read_bytes())
    mark = tmp_path / "it-ran"
    whole.storage_meta = Evil(str(mark))
    path.write_bytes(pickle.dumps(whole))
    with mc.open(folder) as ckpt:
        assert [finding.name for finding in ckpt.findings] == ["posix.mkdir"]
        assert ckpt["w"].shape == (8, 8)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # as torch would
    assert mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02}.",
        b"\x80\x04N.",
        b"PK\3\4",
        pickle.dumps({"a": 1}),
        b"\x80\x02cos\nsystem\n.",
    ],
)
def test_metadata_that_are_none(folder, data):
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(ModelctlError, match=r"\.metadata"):
        mc.open(folder)


@pytest.mark.parametrize("what", ["state_dict_metadata", "storage_data"])
def test_metadata_without_a_field(folder, what):
    change(folder, lambda root: root.pop(what) and None)
    with pytest.raises(UnreadableError, match="not the metadata"):
        mc.open(folder)


def test_paths_that_meet_are_refused(folder):
    change(folder, lambda root: root["planner_data"].update(w=("n", "deeper")))
    with pytest.raises(UnreadableError, match="two entries at 'n"):
        mc.open(folder)


def test_without_paths_the_names_are_the_keys(folder):
    change(folder, lambda root: root.update(planner_data=None))
    with mc.open(folder) as ckpt:
        assert set(mapping(ckpt.root) or {}) == {"w", "n"}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_of_its_files_is_told_to_be_one(folder, name):
    with pytest.raises(
        ModelctlError, match=r"one file of a torch.distributed.checkpoint folder"
    ) as e:
        mc.open(folder / name)
    assert str(folder) in (e.value.hint or "")


def test_ranks_that_wrote_alone_are_read_together(folder):
    """``__{rank}.metadata``, since torch 2.9: each of what its rank wrote."""
    body = (folder / ".metadata").read_bytes()
    for rank in (0, 1):
        root = unpickle(body).value
        assert root.func == METADATA
        state = root.state
        tensor = attributes(state["state_dict_metadata"]["w"])
        tensor["chunks"] = [tensor["chunks"][rank]]
        if rank:
            del state["state_dict_metadata"]["n"]
        (folder / f"__{rank}.metadata").write_bytes(b"".join(write_pickle(root, lambda _: "")))
    (folder / ".metadata").unlink()
    with mc.open(folder) as ckpt:
        assert ckpt["w"].shape == (8, 8)
        assert ckpt["w"].numpy().sum() == 32


def test_what_a_framework_keeps_beside_is_named(folder):
    torch.save({"epoch": 3}, folder / "meta.pt")  # as Lightning does
    with mc.open(folder) as ckpt:
        assert [note.text for note in ckpt.warnings] == ["meta.pt beside it is not read here"]


def test_without_its_metadata_it_says_so_whatever_stands_beside(folder):
    """They are written last, and a copy of ``*`` leaves them behind."""
    torch.save({"meta": 1}, folder / "meta.pt")
    (folder / ".metadata").unlink()
    with pytest.raises(UnreadableError, match=r"without its \.metadata") as e:
        mc.open(folder)
    assert "begins with a dot" in (e.value.hint or "")
