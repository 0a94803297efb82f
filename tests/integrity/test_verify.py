"""verify finds what is wrong with a checkpoint, and nothing with one that is sound."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelctl as mc
from modelctl.core.nodes import ordered_dict
from modelctl.errors import RefusedError, UnreadableError

from .files import flipped, model, numbers, tensor, training, write


def faults(path: Path, **options: Any) -> list[tuple[str, str]]:
    """(kind, where) of what is wrong with a file that can be read."""
    (found,) = mc.verify(path, **options)
    assert found.error is None
    return [(one.id, one.where) for one in found.faults]


def manifest_of(path: Path) -> Path:
    out = path.with_name(path.name + ".manifest")
    out.write_text(mc.hash(path).manifest)
    return out


def payload(path: Path) -> list[tuple[Path, int, int]]:
    """Where the bytes of tensors lie: file, from, to."""
    with mc.open(path) as ckpt:
        runs = [run for ref in ckpt.tensors().values() for run in ref.storage.runs() or ()]
        return sorted(
            {(Path(run.source.name), run.offset, run.offset + run.nbytes) for run in runs}
        )


WRITERS: dict[str, Callable[[Path], Path]] = {
    "torch": lambda at: write(at / "a.pt", training()),
    "safetensors": lambda at: write(at / "a.safetensors", model()),
    "shards": lambda at: write(at / "st", model(), to="safetensors", max_shard_size=300),
    "torch shards": lambda at: write(at / "bin", model(), to="torch", max_shard_size=300),
    "dcp": lambda at: write(at / "dcp", training(), to="dcp"),
}
# whose bytes have checksums beside them
SUMMED = ("torch", "torch shards", "dcp")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_sound_one(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    (found,) = mc.verify(path)
    assert (found.sound, found.faults, found.error) == (True, [], None)
    assert found.tensors in (5, 13)
    assert bool(found.checksums) is (kind in SUMMED)
    assert any("no checksums" in note.text for note in found.notes) is (kind not in SUMMED)
    assert mc.verify(path, manifest_of(path)).sound


@pytest.mark.parametrize("kind", WRITERS)
def test_every_bit_of_a_tensor_counts(kind: str, tmp_path: Path) -> None:
    """A bit that is turned is found: by the checksum, or against the manifest."""
    path = WRITERS[kind](tmp_path)
    places, manifest = payload(path), manifest_of(path)
    rng = random.Random(kind)
    for _ in range(60):
        file, start, stop = rng.choice(places)
        if start == stop:
            continue
        at, bit = rng.randrange(start, stop), rng.randrange(8)
        flipped(file, at, bit)
        found = faults(path, manifest=manifest)
        kinds = {one for one, _ in found}
        assert "damaged" in kinds if kind in SUMMED else "manifest" in kinds
        if kind in SUMMED:
            assert "damaged" in {one for one, _ in faults(path)}
        flipped(file, at, bit)
    assert mc.verify(path, manifest).sound


def test_every_bit_of_a_zip_that_no_tensor_shows(tmp_path: Path) -> None:
    """Records, the structure, bytes of a storage beside a view: wherever the CRC is over."""
    state = numbers(40)
    view = state.replace(shape=(10,))
    path = write(tmp_path / "a.pt", {"part": view, "whole": numbers(3)})
    with mc.open(path) as ckpt:
        (run,) = ckpt.tensors()["part"].storage.runs() or ()
    assert ("damaged", "part") in faults(flipped(path, run.offset + 100))
    flipped(path, run.offset + 100)
    with zipfile.ZipFile(path) as opened:
        content = opened.read("a/.data/serialization_id")
    flipped(path, path.read_bytes().index(content))
    assert [kind for kind, _ in faults(path)] == ["damaged"]


def test_names_and_places_of_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"a": numbers(9), "b": numbers(9, seed=1)})
    for file, start, _ in payload(path):
        flipped(file, start)
    (found,) = mc.verify(path)
    assert [(one.id, one.where) for one in found.faults] == [("damaged", "a"), ("damaged", "b")]
    assert [one.offset for one in found.faults] == [start for _, start, _ in payload(path)]


def test_tensors_in_one_damaged_storage(tmp_path: Path) -> None:
    whole = numbers(64)
    parts = {f"p{i}": whole.replace(shape=(8,), offset=8 * i) for i in range(8)}
    path = write(tmp_path / "a.pt", parts)
    ((file, start, _),) = payload(path)
    (found,) = mc.verify(flipped(file, start))
    (fault,) = found.faults
    assert fault.id == "damaged"
    assert "so are" in fault.text
    assert "4 more" in fault.text


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("kind", "value"), [("nan", np.nan), ("inf", np.inf), ("inf", -np.inf), ("zero", 0.0)]
)
def test_values(kind: str, value: float, tmp_path: Path) -> None:
    bad = np.full((3, 4), value, "f4")
    state = model() | {"fc.weight": tensor(bad)}
    assert faults(write(tmp_path / "a.pt", state)) == [(kind, "fc.weight")]
    one = model()["fc.weight"].numpy().copy()
    one[1, 2] = value
    found = faults(write(tmp_path / "b.pt", model() | {"fc.weight": tensor(one)}))
    assert found == ([] if kind == "zero" else [(kind, "fc.weight")])


def test_zeros_that_are_meant(tmp_path: Path) -> None:
    """Biases, buffers, moments and the half of an adapter begin at zero."""
    zero = tensor(np.zeros((4, 4)))
    state = {
        **model(),
        "fc.bias": tensor(np.zeros(5)),
        "q.lora_B.weight": zero,
        "scalar": tensor(np.zeros(())),
    }
    path = write(tmp_path / "a.pt", {"model": ordered_dict(state), "moments": [zero]})
    assert faults(path) == []


def test_tied_ones_are_told_once(tmp_path: Path) -> None:
    bad = tensor(np.full((3, 4), np.nan))
    path = write(tmp_path / "a.pt", model() | {"x.weight": bad, "y.weight": bad})
    assert faults(path) == [("nan", "x.weight")]


# ---------------------------------------------------------------------- parts that disagree


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    state = training()
    state["model"] = ordered_dict(dict(list(model().items())[:2]))
    assert faults(write(tmp_path / "a.pt", state)) == [("optimizer", "optimizer")]
    other = training()
    other["optimizer"]["state"][2]["exp_avg"] = numbers(7, 7)
    other["optimizer"]["state"][2]["exp_avg_sq"] = numbers(7, 7)
    assert faults(write(tmp_path / "b.pt", other)) == [("optimizer", "optimizer")]
    stray = training()
    stray["optimizer"]["state"][99] = {"exp_avg": numbers(5)}
    assert faults(write(tmp_path / "c.pt", stray)) == [("optimizer", "optimizer")]


def test_an_optimizer_beside_sorted_names(tmp_path: Path) -> None:
    """safetensors has names in no order of the model's: shapes in another order say nothing."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    net = torch.nn.Sequential()
    for name, layer in (("z", torch.nn.Linear(3, 4)), ("a", torch.nn.Linear(4, 7))):
        net.add_module(name, layer)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    save_file(dict(sorted(net.state_dict().items())), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "global_step": 3}))
    (found,) = mc.verify(tmp_path)
    assert not found.faults


def test_a_freeze_record_of_what_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    mc.edit(path, {"do": "freeze", "pattern": "fc"}, in_place=True)
    assert faults(path) == []
    with mc.open(path) as ckpt:
        record = ckpt.root.state["_metadata"].entries[""]["modelctl.freeze"]
        record["frozen"].append("head.weight")
        mc.save(ckpt, tmp_path / "b.pt")
    assert faults(tmp_path / "b.pt") == [("freeze", "head.weight")]


def test_tensors_that_share_a_part(tmp_path: Path) -> None:
    whole = numbers(20)
    fused = {"qkv": whole, "q": whole.replace(shape=(5,)), "k": whole.replace(shape=(5,), offset=5)}
    assert faults(write(tmp_path / "a.pt", fused)) == []
    apart = {"a": whole.replace(shape=(10,)), "b": whole.replace(shape=(10,), offset=5)}
    assert faults(write(tmp_path / "b.pt", apart)) == [("overlap", "b")]


def test_names_that_act(tmp_path: Path) -> None:
    state = model() | {"a\x1b[2J": numbers(2), "../../x": numbers(3)}
    found = faults(write(tmp_path / "a.pt", state))
    assert found == [("name", "a\x1b[2J"), ("name", "../../x")]


def test_what_holds_itself(tmp_path: Path) -> None:
    config: dict[str, Any] = {"depth": 3}
    config["self"] = [config]
    path = write(tmp_path / "a.pt", {"model": ordered_dict(model()), "config": config})
    assert faults(path) == [("cycle", "")]


def test_entries_beside_torchs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    with zipfile.ZipFile(path, "a") as opened:
        opened.writestr("a/notes.txt", "hello")
    assert faults(path) == [("odd", "")]


# ---------------------------------------------------------------------- sparse tensors


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_indices(layout: str, tmp_path: Path) -> None:
    """Compared with torch's own check of them."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    dense = torch.tensor(rng.integers(0, 2, (6, 8)) * rng.standard_normal((6, 8)))
    blocks = {"bsr": (2, 2), "bsc": (2, 2)}.get(layout)
    made = (
        dense.to_sparse()
        if layout == "coo"
        else getattr(dense, f"to_sparse_{layout}")(*([blocks] if blocks else []))
    )
    made = made.coalesce() if layout == "coo" else made
    path = tmp_path / "a.pt"
    torch.save({"w": made, "b": torch.ones(2)}, path)
    assert faults(path) == []
    seen = {True: 0, False: 0}
    for _ in range(40):
        parts = _parts(made, layout)
        i = int(rng.integers(len(parts) - 1))  # not the values
        flat = parts[i].view(-1)
        flat[int(rng.integers(len(flat)))] = int(rng.integers(-2, 12))
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            wrong = _made(torch, parts, made, layout)
        torch.save({"w": wrong, "b": torch.ones(2)}, path)
        is_sound = _is_sound(torch, parts, made, layout)
        ours = faults(path)
        assert ours in ([], [("sparse", "w")])
        seen[is_sound] += 1
        # torch also wants what is no bound of anything: that columns of a row ascend
        assert not ours if is_sound else True
        if not is_sound and _is_outside(parts, made, layout):
            assert ours == [("sparse", "w")]
    assert seen[False]


def _parts(made: Any, layout: str) -> list[Any]:
    if layout == "coo":
        return [made.indices().clone(), made.values().clone()]
    names = (
        ("crow_indices", "col_indices")
        if layout in ("csr", "bsr")
        else ("ccol_indices", "row_indices")
    )
    return [*(getattr(made, name)().clone() for name in names), made.values().clone()]


def _made(torch: Any, parts: list[Any], made: Any, layout: str) -> Any:
    if layout == "coo":
        return torch.sparse_coo_tensor(
            *parts, made.shape, is_coalesced=True, check_invariants=False
        )
    return torch.sparse_compressed_tensor(
        *parts, made.shape, layout=made.layout, check_invariants=False
    )


def _is_sound(torch: Any, parts: list[Any], made: Any, layout: str) -> bool:
    try:
        if layout == "coo":
            torch.sparse_coo_tensor(*parts, made.shape, check_invariants=True)
        else:
            torch.sparse_compressed_tensor(
                *parts, made.shape, layout=made.layout, check_invariants=True
            )
    except RuntimeError:
        return False
    return True


def _is_outside(parts: list[Any], made: Any, layout: str) -> bool:
    if layout == "coo":
        return any(
            not 0 <= int(row.min()) <= int(row.max()) < n
            for row, n in zip(parts[0], made.shape, strict=True)
        )
    across = made.shape[1 if layout in ("csr", "bsr") else 0] // (2 if layout[0] == "b" else 1)
    pointers = parts[0]
    ends = (int(pointers[0]), int(pointers[-1])) != (0, len(parts[1]))
    down = bool((pointers[1:] < pointers[:-1]).any())
    return ends or down or not 0 <= int(parts[1].min()) <= int(parts[1].max()) < across


# ---------------------------------------------------------------------- manifests


def test_a_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", model())
    manifest = manifest_of(path)
    assert mc.verify(path, manifest).sound
    assert mc.verify(write(tmp_path / "b.pt", model()), manifest).sound  # whatever the format
    other = {**model(), "fc.bias": numbers(5, seed=99)}
    assert faults(write(tmp_path / "c.pt", other), manifest=manifest) == [("manifest", "fc.bias")]
    more = {**model(), "x": numbers(2)}
    assert faults(write(tmp_path / "d.pt", more), manifest=manifest) == [("manifest", "x")]
    less = dict(list(model().items())[:-1])
    assert faults(write(tmp_path / "e.pt", less), manifest=manifest) == [("manifest", "fc.bias")]


def test_what_could_not_be_read_was_not_compared(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"a": numbers(9), "b": numbers(9, seed=1)})
    manifest = manifest_of(path)
    file, start, _ = payload(path)[0]
    found = faults(flipped(file, start), manifest=manifest)
    assert sorted(found) == [("damaged", "a"), ("manifest", "a")]


def test_a_manifest_of_the_model_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", training())
    manifest = tmp_path / "m"
    manifest.write_text(mc.hash(path, "model").manifest)
    (found,) = mc.verify(path, manifest)
    assert found.sound
    assert any("nothing of optimizer: 8 tensors" in note.text for note in found.notes)


@pytest.mark.parametrize(
    "text", ["", "no hash\n", "sha256:12  a\n", "\x00\xff", "sha256:" + "0" * 64 + " a\n"]
)
def test_no_manifest(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    (tmp_path / "m").write_bytes(text.encode("latin-1"))
    with pytest.raises(UnreadableError, match="no manifest"):
        mc.verify(path, tmp_path / "m")


def test_two_hashes_of_one_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", model())
    lines = f"sha256:{'0' * 64}  a\nsha256:{'1' * 64}  a\n"
    (tmp_path / "m").write_text(lines)
    with pytest.raises(UnreadableError, match="once more"):
        mc.verify(path, tmp_path / "m")


# ---------------------------------------------------------------------- the report


def test_check_and_exit_codes(tmp_path: Path) -> None:
    good = write(tmp_path / "a.pt", model())
    bad = write(tmp_path / "b.pt", model() | {"fc.bias": tensor(np.full(5, np.nan))})
    none = tmp_path / "c.pt"
    none.write_bytes(bad.read_bytes()[:-100])
    assert [mc.verify(one).exit_code for one in (good, bad, none)] == [0, 1, 2]
    assert mc.verify([good, bad]).exit_code == 1
    assert mc.verify([good, bad, none]).exit_code == 2
    mc.verify(good).check()
    with pytest.raises(RefusedError, match=r"b\.pt, fc\.bias: 5 of 5 are NaN"):
        mc.verify([good, bad]).check()
    found = json.loads(json.dumps(mc.verify([good, bad, none]).as_dict()))
    assert [one["sound"] for one in found["files"]] == [True, False, False]
    assert found["files"][2]["error"]["kind"] == "unreadable"
