"""What save_checkpoint writes: plain, whole, named as the bare model is."""

from __future__ import annotations

import argparse
import collections
import enum
import warnings

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import modelctl as mc
import modelctl.nn as mnn
from modelctl.core.records import frozen_names
from modelctl.errors import RefusedError, UnreadableError, UsageError, WriteError
from tests.nn.nets import Net, train_step


class Colour(enum.Enum):
    RED = 1


def test_numpy_scalars_are_converted_and_objects_refused_by_their_key(net, tmp_path):
    path = tmp_path / "a.pt"
    good = {
        "a": np.float64(0.5),
        "b": [np.int64(3), (np.bool_(True), np.str_("x"))],
        np.int64(4): collections.defaultdict(list, {"k": [1]}),
        "counter": collections.Counter("aab"),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "bytes": b"\x00\xff",
        "complex": None,
    }
    mnn.save_checkpoint(path, model=net, extra=good)
    expected = {**good, "a": 0.5, "b": [3, (True, "x")], 4: {"k": [1]}}
    plain = torch.load(path, weights_only=True)["extra"]
    assert plain == expected
    assert type(plain["a"]) is float
    back = mnn.resume(path, model=net).extra
    assert back == expected
    assert type(back["counter"]) is collections.Counter
    before = path.read_bytes()
    for bad, advice in (
        (argparse.Namespace(lr=1), "vars"),
        (tmp_path, "str"),
        (np.zeros(3), "from_numpy"),
        ({1, 2}, "sorted"),
        (net, "state_dict"),
        (np.longdouble(1), "float"),
        (Colour.RED, ".value"),
    ):
        with pytest.raises(RefusedError, match=r"'extra\.deep\.1' is a") as e:
            mnn.save_checkpoint(path, model=net, extra={"deep": [0, bad]})
        assert advice in e.value.hint
    with pytest.raises(RefusedError, match="epoch"):
        mnn.save_checkpoint(path, model=net, epoch=1.5)
    assert path.read_bytes() == before


def test_names_and_versions_are_the_bare_models(net, tmp_path):
    net.layer1 = torch.compile(net.layer1, backend="eager")
    mnn.freeze(net, "layer1.0")
    mnn.save_checkpoint(
        tmp_path / "a.pt", model=nn.DataParallel(torch.compile(net, backend="eager"))
    )
    saved = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    plain = Net()
    assert list(saved) == list(plain.state_dict())
    assert saved._metadata["layer1.1"] == {"version": 2}
    assert saved._metadata.keys() == plain.state_dict()._metadata.keys()
    assert saved._metadata[""]["modelctl.freeze"]["frozen"] == ["layer1.0.weight", "layer1.0.bias"]
    plain.load_state_dict(saved)


def test_checkpoint_wrapper_leaves_no_trace_in_names(net, tmp_path):
    """Its state_dict hides its segment; named_parameters, and so optimizers, don't."""
    net.layer1 = checkpoint_wrapper(net.layer1)
    net.layer2.module = checkpoint_wrapper(nn.Linear(6, 6))  # really called so
    mnn.freeze(net, "layer1.0")
    optimizer = optim.Adam(net.named_parameters())
    optimizer.zero_grad()
    net.layer1(torch.randn(2, 4, 8, 8)).sum().backward()
    optimizer.step()
    whole = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(whole, tmp_path / "torchs.pt")
    wrapped = nn.DataParallel(net)
    mnn.save_checkpoint(tmp_path / "ours.pt", model=wrapped, optimizer=optimizer, ema=wrapped)
    plain = Net()
    plain.layer2.module = nn.Linear(6, 6)
    saved = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert list(saved["model"]) == list(saved["ema"]) == list(plain.state_dict())
    assert saved["model"]._metadata["layer1.1"] == {"version": 2}  # the BatchNorm's own
    assert saved["model"]._metadata.keys() == plain.state_dict()._metadata.keys()
    assert saved["model"]._metadata[""]["modelctl.freeze"]["frozen"][0] == "layer1.0.weight"
    own = [name for name, _ in plain.named_parameters()]
    for name in ("ours", "torchs"):
        made = optim.Adam(list(plain.parameters())[::-1])
        mnn.resume(tmp_path / f"{name}.pt", model=plain, optimizer=made)
        mine, theirs = plain.layer1[1].weight, net.layer1[1].weight
        assert torch.equal(made.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"])
    assert saved["optimizer"]["param_groups"][0]["param_names"] == own
    mnn.resume(tmp_path / "ours.pt", model=net, optimizer=optimizer)


def test_what_trains_is_always_recorded(net, tmp_path):
    path = tmp_path / "a.pt"

    def record(model=net):
        mnn.save_checkpoint(path, model=model)
        saved = torch.load(path, weights_only=True)["model"]
        return saved._metadata[""].get("modelctl.freeze")

    empty = {"version": 1, "frozen": [], "bn_eval": False, "patterns": []}
    assert record() == empty
    with mc.open(path) as ckpt, warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mc.summarize(ckpt)
        assert (found.totals.frozen, found.warnings) == (0, [])
        assert {row.requires_grad for row in mc.list_tensors(ckpt) if row.role != "buffer"} == {
            True
        }
        assert mnn.load_into(Net(), path).frozen is None  # nothing to say
        assert mnn.apply_freeze(Net(), path).changed == ()
        thawed = mc.freeze(ckpt, "fc")
        assert frozen_names(thawed) == {"fc.weight", "fc.bias"}
    mnn.freeze(net, "fc")
    assert record()["frozen"] == ["fc.weight", "fc.bias"]
    net.fc.requires_grad_(True)
    assert record()["frozen"] == []
    assert record(nn.BatchNorm1d(2, affine=False)) is None


def test_what_was_thawed_by_hand_stays_so(net, tmp_path):
    """Frozen at the start by hand, thawed by hand, saved; resumed after the same start."""
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optim.SGD(net.parameters()))
    other = Net()
    other.layer1.requires_grad_(False)
    optimizer = optim.SGD(other.parameters())
    state = mnn.resume(tmp_path / "a.pt", model=other, optimizer=optimizer)
    assert all(p.requires_grad for p in other.parameters())
    assert "was frozen, trains as when this was saved: layer1.0.weight" in str(state)


def test_a_failing_disk_leaves_the_old_checkpoint(net, tmp_path, monkeypatch):
    from modelctl.storage.staging import Sink

    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, model=net, epoch=1)
    before, write = path.read_bytes(), Sink.write

    def failing(self, data):
        if self.position > 2000:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(Sink, "write", failing)
    with pytest.raises(WriteError, match="No space left"):
        mnn.save_checkpoint(path, model=net, epoch=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_overwrite(net, tmp_path):
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, model=net, rng=False)
    with pytest.raises(WriteError, match="exists"):
        mnn.save_checkpoint(path, model=net, overwrite=False)
    assert torch.load(path, weights_only=True).keys() == {"model"}


def test_extras_by_name_and_as_a_dict(net, tmp_path):
    path = tmp_path / "a.pt"
    mnn.save_checkpoint(path, model=net, best=0.5, extra={"args": {"lr": 1}, "best": 0.1})
    assert torch.load(path, weights_only=True)["extra"] == {"args": {"lr": 1}, "best": 0.5}
    assert mnn.resume(path, model=net).extra == {"args": {"lr": 1}, "best": 0.5}
    with pytest.raises(RefusedError, match=r"'extra\.optimzer' is a torch\.optim"):
        mnn.save_checkpoint(path, model=net, optimzer=optim.SGD(net.parameters()))
    mnn.save_checkpoint(path, model=net)
    assert mnn.resume(path, model=net).extra == {}


def sparse_ones():
    dense = torch.eye(4)
    dense[0, 3] = 2
    loose = torch.sparse_coo_tensor([[1, 1], [0, 0]], [1.0, 2.0], (3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta, says torch
        packed = [dense.to_sparse_csr(), dense.to_sparse_csc()]
        blocks = [dense.to_sparse_bsr((2, 2)), dense.to_sparse_bsc((2, 2))]
    return [dense.to_sparse(), loose, nn.Parameter(dense.to_sparse()), *packed, *blocks]


def test_sparse_tensors_come_back(net, tmp_path):
    given = sparse_ones()
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, graph=given)
    found = mnn.resume(tmp_path / "a.pt", model=net).extra["graph"]
    for one, old in zip(found, given, strict=True):
        assert (one.layout, one.shape, one.dtype) == (old.layout, old.shape, old.dtype)
        assert torch.equal(one.to_dense(), old.to_dense())
    assert [one.is_coalesced() for one in found[:3]] == [True, False, True]
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    table(torch.tensor([1, 3])).sum().backward()
    optimizer.step()  # its momentum is sparse
    mnn.save_checkpoint(tmp_path / "b.pt", model=table, optimizer=optimizer)
    again = optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    mnn.resume(tmp_path / "b.pt", model=table, optimizer=again)
    mine, theirs = (one.state[table.weight]["momentum_buffer"] for one in (again, optimizer))
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    net.register_buffer("graph", given[0])
    with pytest.raises(RefusedError, match=r"'model\.graph' is sparse_coo") as e:
        mnn.save_checkpoint(tmp_path / "c.pt", model=net)
    assert "persistent=False" in e.value.hint
    assert not (tmp_path / "c.pt").exists()


def test_indices_that_a_sparse_tensor_has_no_place_for(net, tmp_path):
    bad = torch.sparse_coo_tensor([[7], [0]], [1.0], (3, 2), check_invariants=False)
    torch.save({"model": net.state_dict(), "extra": {"graph": bad}}, tmp_path / "a.pt")
    with pytest.raises(UnreadableError, match="sparse_coo tensor that can't be"):
        mnn.resume(tmp_path / "a.pt", model=net)


def test_what_is_given_wrong_is_said_in_a_line(net, tmp_path):
    for bad, match in (
        ({"model": net.state_dict()}, "is a OrderedDict, no nn.Module"),
        ({"extra": [1]}, "is a list, no dict"),
    ):
        with pytest.raises(UsageError, match=match) as e:
            mnn.save_checkpoint(tmp_path / "a.pt", **{"model": net, **bad})
        assert e.value.hint
    with pytest.raises(UsageError, match=r"no such number or text; given are 1"):
        mnn.save_checkpoint(tmp_path / "{foo}.pt", model=net, extra={1: 2})


class Mine(torch.Tensor):
    pass


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, says torch
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


def labelled_tensor():
    made = torch.zeros(2)
    made.origin = "here"
    return made


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.zeros(2).as_subclass(Mine), "Mine"),
        (nn.LazyLinear(2).weight, "no shape yet"),
        (torch.zeros(2, device="meta"), "on meta"),
        (torch.nested.as_nested_tensor([torch.zeros(2)], layout=torch.jagged), "[Nn]ested"),
        (torch.zeros(2, 2).to_mkldnn(), "layout"),
        (quantized(), "quantized"),
        (labelled_tensor(), r"attributes of its own \(origin\)"),
    ],
)
def test_tensors_that_torch_would_not_load(net, tmp_path, bad, match):
    with pytest.raises(RefusedError, match=rf"'extra\.a\.0' .*{match}"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, a=[bad])
    assert [*tmp_path.iterdir()] == []


def test_what_holds_itself(net, tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(RefusedError, match=r"'extra.*' holds itself"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net, loop=loop)


def test_optimizers_carry_the_models_own_names(net, tmp_path):
    path = tmp_path / "a.pt"

    def saved(optimizer, model=net):
        mnn.save_checkpoint(path, model=model, optimizer=optimizer)
        groups = torch.load(path, weights_only=True)["optimizer"]["param_groups"]
        return [group.get("param_names") for group in groups]

    own = [name for name, _ in net.named_parameters()]
    plain = optim.SGD(net.parameters())
    assert saved(plain) == [own]
    assert "param_names" not in plain.param_groups[0]
    assert saved(optim.SGD(net.fc.named_parameters())) == [["fc.weight", "fc.bias"]]
    wrapped = nn.DataParallel(net)
    assert saved(optim.SGD(wrapped.named_parameters()), wrapped) == [own]
    loss = nn.Linear(2, 2)  # not the model's: no name, or the one that it was given
    assert saved(optim.SGD([loss.bias, *net.parameters()])) == [["", *own]]
    optim.SGD([*net.parameters(), nn.Parameter(torch.ones(2))]).load_state_dict(
        torch.load(path, weights_only=True)["optimizer"]
    )
    given = [("loss.bias", loss.bias), *net.fc.named_parameters()]
    assert saved(optim.SGD(given)) == [["loss.bias", "fc.weight", "fc.bias"]]
    given = [("fc.weight", loss.bias), *net.named_parameters()]
    assert saved(optim.SGD(given)) == [["", *own]]
    assert saved(optim.SGD(loss.parameters())) == [None]


def test_the_lr_is_the_first_groups_or_what_is_given(net, tmp_path):
    path = tmp_path / "a.pt"
    optimizer = optim.SGD(net.parameters(), lr=torch.tensor(0.25))
    mnn.save_checkpoint(path, model=net, optimizer=optimizer)
    assert torch.load(path, weights_only=True)["lr"] == 0.25
    mnn.save_checkpoint(path, model=net, lr=np.float64(0.5))
    assert torch.load(path, weights_only=True)["lr"] == 0.5
    for bad in ({"lr": "0.1"}, {"epoch": True}, {"step": 1.0}):
        with pytest.raises(RefusedError, match=next(iter(bad))):
            mnn.save_checkpoint(path, model=net, **bad)
    with pytest.raises(UsageError, match="rng"):
        mnn.save_checkpoint(path, model=net, rng="every")


def test_saving_changes_nothing(net, tmp_path):
    optimizer = optim.AdamW(net.parameters())
    train_step(net, optimizer)
    before = torch.get_rng_state()
    state = optimizer.state_dict()
    mnn.save_checkpoint(tmp_path / "a.pt", model=net, optimizer=optimizer, rng="all")
    assert torch.equal(torch.get_rng_state(), before)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
