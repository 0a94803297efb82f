"""Files of ranks that don't go together, or say what can't be: refused, and the tensor named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.nodes import Composite
from modelctl.core.tree import walk
from modelctl.errors import ModelctlError, UnreadableError, UnsupportedError
from modelctl.formats.distributed.sharding import is_sharded, sharded

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
parallel = pytest.importorskip("torch.distributed.tensor")


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[Any]:
    """A mesh of ranks of which only this one is there."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=fake.FakeStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def save(
    folder: Path, rank: int, world: int, *, shape: tuple[int, ...] = (6, 4), name: str = "w",
    placement: Any = None, rows: int | None = None, file: int | None = None,
) -> Path:  # fmt: skip
    """One rank's file: of a tensor that is split over its rows."""
    folder.mkdir(exist_ok=True)
    with rank_of(rank, world) as mesh:
        whole = torch.arange(24.0)[: shape[0] * shape[1]].reshape(shape)
        local = whole.chunk(world)[rank] if placement is None else whole
        made = parallel.DTensor.from_local(
            local[:rows].clone(),
            mesh,
            [placement or parallel.Shard(0)],
            run_check=False,
            shape=shape,
            stride=(shape[1], 1),
        )
        path = folder / f"model_world_size_{world}_rank_{rank if file is None else file}.pt"
        torch.save({name: made, "plain": torch.zeros(2)}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of three ranks."""
    for rank in range(3):
        save(tmp_path / "run", rank, 3)
    return tmp_path / "run"


def file(folder: Path, rank: int) -> Path:
    return folder / f"model_world_size_3_rank_{rank}.pt"


def refused(folder: Path, match: str) -> ModelctlError:
    with pytest.raises(ModelctlError, match=match) as e:
        mc.open(folder)
    assert folder.name in str(e.value)
    return e.value


def test_they_are_joined(folder):
    with mc.open(folder) as ckpt:
        assert torch.equal(ckpt["w"].torch(), torch.arange(24.0).reshape(6, 4))
        assert not ckpt.warnings


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_missing(folder, rank):
    file(folder, rank).unlink()
    refused(folder, "'w': 8 of its 24 elements are in no part of it")


@pytest.mark.parametrize("left", [1, 2])
def test_a_kind_of_files_of_which_some_are_missing(folder, left):
    """Alone of its kind, too: it is no less a part of the checkpoint."""
    for rank in range(left):
        shutil.copy(file(folder, rank), folder / f"optim_world_size_3_rank_{rank}.pt")
    error = refused(folder, rf"3 ranks .* only {left} files? of a kind: optim_world_size_3_rank_0")
    assert "all ranks" in (error.hint or "")


def test_a_checkpoint_beside_them_is_named(folder):
    torch.save({"a": torch.ones(2)}, folder / "ema.pt")
    with mc.open(folder) as ckpt:
        assert [note.text for note in ckpt.warnings] == ["ema.pt beside it is not read here"]


def test_a_rank_of_another_save(folder):
    save(folder, 1, 3, shape=(6, 2))
    refused(folder, r"'w': \[6, 2\] in model_world_size_3_rank_1.pt, \[6, 4\] in the first file")


def test_a_rank_with_other_names(folder):
    save(folder, 1, 3, name="v")
    refused(folder, "'w' is not in the files of all ranks")


def test_a_rank_that_holds_more(folder):
    path = save(folder.parent / "other", 2, 3, name="v")
    both = torch.load(file(folder, 2), weights_only=False) | torch.load(path, weights_only=False)
    torch.save(both, file(folder, 2))
    refused(folder, "'v' is in the file of rank 2 alone")


def test_a_wrong_local_shape(folder):
    save(folder, 1, 3, rows=1)
    refused(folder, r"'w': rank 1 would hold \[2, 4\] .*, and holds \[1, 4\]")


def test_a_file_of_another_rank(tmp_path):
    """Uneven: what it holds is not what the rank in its name would."""
    for rank in range(2):
        save(tmp_path / "run", rank, 2, shape=(5, 4), file=1 - rank)
    refused(tmp_path / "run", "is the file another rank's")


def test_sums_that_are_still_to_be_made(tmp_path):
    for rank in range(2):
        save(tmp_path / "run", rank, 2, placement=parallel.Partial())
    error = refused(tmp_path / "run", "'w': a tensor that is .*Partial over its ranks")
    assert isinstance(error, UnsupportedError)
    assert "redistribute" in (error.hint or "")


def test_a_file_that_is_cut_off(folder):
    file(folder, 1).write_bytes(file(folder, 1).read_bytes()[:-50])
    refused(folder, "rank_1")


def test_flat_parameters_of_fsdp(tmp_path):
    for rank in range(2):
        save(tmp_path / "run", rank, 2, name="layer._flat_param")
    error = refused(tmp_path / "run", "'layer._flat_param': FSDP's flat parameters")
    assert "SHARDED_STATE_DICT" in (error.hint or "")


def test_one_file_by_itself_says_that_it_is_one_of_several(folder, tmp_path):
    with mc.open(file(folder, 1)) as ckpt:
        (note,) = ckpt.warnings
        assert note.text == "one of 3 ranks: it has a part of each tensor"
        assert str(folder) in (note.way_out or "")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file(folder, 0), alone)
    with mc.open(alone) as ckpt:
        (note,) = ckpt.warnings
        assert note.way_out == "copy the files of the other ranks beside it"


ODD: list[Any] = [
    None, 0, -7, 2**80, 1.5, "x", (), (1, 2), [2**70], {}, {"mesh": 1}, {"_layout": {"axes": [1]}},
    {"shape": (2**40,), "stride": (2**70,)}, [None],
]  # fmt: skip


def test_whatever_stands_in_its_place_there_is_no_other_error(folder):
    """Each node below a DTensor, replaced by what it can't be."""
    with mc.open(file(folder, 0)) as ckpt:
        nodes = [n for _, n in walk(ckpt.root) if isinstance(n, Composite) and is_sharded(n)]
        tried = 0
        for node in nodes:
            for put in _places(node.args):
                for value in ODD:
                    undo = put(value)
                    try:
                        sharded(node, 0)
                    except (UnreadableError, UnsupportedError):
                        tried += 1
                    undo()
        assert tried > 100
        assert sharded(nodes[0], 0).shape == (6, 4)


def _places(node: Any, depth: int = 12) -> Iterator[Callable[[Any], Callable[[], None]]]:
    """Every entry of a dict and every state below a node, as what puts something there."""
    inner: list[Any] = []
    if isinstance(node, dict):
        for key in [*node]:
            yield lambda value, key=key: _put(node.__setitem__, key, node[key], value)
        inner = [*node.values()]
    elif isinstance(node, list | tuple):
        inner = [*node]
    elif hasattr(node, "state") and hasattr(node, "args"):
        for key in ("state", "args"):
            yield lambda value, key=key: _put(
                lambda k, v: setattr(node, k, v), key, getattr(node, key), value
            )
        inner = [node.state, node.args]
    for one in inner if depth else ():
        yield from _places(one, depth - 1)


def _put(setter: Any, key: Any, old: Any, value: Any) -> Callable[[], None]:
    setter(key, value)
    return lambda: setter(key, old)


def test_names_that_are_made_to_take_for_ever(tmp_path: Path) -> None:
    for end in (1, 2):
        (tmp_path / ("1_" * 60 + f"x{end}.pt")).write_bytes(b"PK\3\4")
    with pytest.raises(ModelctlError):
        mc.open(tmp_path)


def test_two_files_of_one_number_are_no_ranks(tmp_path: Path) -> None:
    for name in ("m_1.pt", "m_01.pt"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ModelctlError, match="several checkpoints"):
        mc.open(tmp_path)
