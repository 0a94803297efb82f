from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import NoMatchError, RefusedError, UsageError
from tests.nn.nets import Net, batch, train_step


def frozen(model) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_freeze_by_glob_module_name_and_exclude(net):
    report = mnn.freeze(net, "*", exclude="fc")
    assert frozen(net) == {n for n, _ in net.named_parameters() if not n.startswith("fc.")}
    assert report.after == 6 * 5 + 5
    assert report.before == report.total == sum(p.numel() for p in net.parameters())
    assert set(report.changed) == set(report.names) == frozen(net)
    assert mnn.freeze(net, "layer1").changed == ()
    assert "-> 35 of" in str(report)


def test_freeze_by_regex_and_several_patterns(net):
    mnn.freeze(net, [r"^layer\d\.0\.", "bias$"], regex=True)
    assert "layer1.0.weight" in frozen(net)
    assert "fc.bias" in frozen(net)
    assert "fc.weight" not in frozen(net)
    with pytest.raises(UsageError):
        mnn.freeze(net, "(", regex=True)


def test_nothing_matched_is_an_error_with_the_nearest_names(net):
    with pytest.raises(NoMatchError) as e:
        mnn.freeze(net, ["fc", "layr1.*"])
    assert "layer1" in e.value.hint
    assert frozen(net) == set()
    with pytest.raises(NoMatchError):
        mnn.freeze(net, "fc", exclude="fc")
    with pytest.raises(NoMatchError):
        mnn.unfreeze(net, "nothing")
    for patterns in (None, 3, ["fc", None]):
        with pytest.raises(UsageError, match="is no pattern"):
            mnn.freeze(net, patterns)
    for call in (mnn.unwrap, mnn.trainable, lambda model: mnn.freeze(model, "*")):
        with pytest.raises(UsageError, match=r"dict is no nn\.Module"):
            call({})


def test_everything_frozen_warns(net):
    with pytest.warns(UserWarning, match="the loss will not move"):
        mnn.freeze(net, "*")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mnn.unfreeze(net, "fc")


def test_a_frozen_parameter_does_not_move_although_the_optimizer_holds_it(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    train_step(net, optimizer)
    net(batch()).sum().backward()
    before = net.conv1.weight.clone()
    mnn.freeze(net, "conv1")
    optimizer.step()
    assert torch.equal(net.conv1.weight, before)


@pytest.mark.parametrize("wrap", ["dp", "compile", "both"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_wrappers_do_not_matter(net, wrap, prefix):
    wrapped = net
    if wrap in ("compile", "both"):
        wrapped = torch.compile(wrapped)
    if wrap in ("dp", "both"):
        wrapped = nn.DataParallel(wrapped)
    report = mnn.freeze(wrapped, [prefix + "layer1", prefix + "conv1.*"])
    assert report.names == (
        "conv1.weight",
        *(f"layer1.{n}" for n, _ in net.layer1.named_parameters()),
    )
    mnn.freeze(wrapped, rf"^{prefix}fc".replace(".", r"\."), regex=True)
    assert "fc.weight" in frozen(net)
    assert mnn.freeze_record(wrapped)["frozen"][0] == "conv1.weight"
    assert mnn.unwrap(wrapped) is net
    assert mnn.trainable(wrapped).rows == mnn.trainable(net).rows


def test_a_child_really_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    model.head = nn.Linear(2, 2)
    assert mnn.freeze(model, "module").names == ("module.weight", "module.bias")
    assert mnn.freeze(nn.DataParallel(model), "module.weight").names == ("module.weight",)


def test_a_compiled_part_inside_has_its_plain_name(net):
    net.layer1 = torch.compile(net.layer1)
    assert mnn.freeze(net, "layer1.0").names == ("layer1.0.weight", "layer1.0.bias")


def test_tied_parameters_count_once_and_go_by_any_name():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    report = mnn.trainable(model)
    assert report.rows == (("embed.weight", (7, 3), True),)
    assert report.total == 21
    with pytest.warns(UserWarning, match="will not move"):
        assert mnn.freeze(model, "head").names == ("embed.weight",)
    with pytest.raises(NoMatchError):
        mnn.unfreeze(model, "*", exclude="head")


def test_a_parametrized_module_goes_by_its_plain_name():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    report = mnn.freeze(model, "0.weight")
    assert report.names == (
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    )
    assert mnn.unfreeze(model, "*", exclude="0.weight").names == ("0.bias", "1.weight", "1.bias")


def test_a_lazy_module_can_be_frozen_before_it_knows_its_size():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))
    mnn.freeze(model, ["0", "1"], bn_eval=True)
    assert mnn.trainable(model).rows[0] == ("0.weight", None, False)
    assert "?" in str(mnn.trainable(model))
    model.train()
    model(torch.randn(5, 3))
    model.train()
    assert frozen(model) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert type(model[1]) is nn.BatchNorm1d
    assert not model[1].training
    mnn.unfreeze(model, "1")
    assert model.train()[1].training


def test_trainable_table(net):
    mnn.freeze(net, "layer1", bn_eval=True)
    report = mnn.trainable(net)
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "shape", "grad"]
    assert lines[1].split() == ["conv1.weight", "4x3x3x3", "yes"]
    assert "layer1.1" in lines[-1]
    columns = {line.index(line.split()[1]) for line in lines[: len(report.rows)]}
    assert len(columns) == 1
    assert report.frozen == tuple(n for n, _ in net.named_parameters() if n.startswith("layer1."))
    assert report.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)


# ------------------------------------------------------------------ BatchNorm


def modes(model) -> dict[str, bool]:
    return {n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


class OwnNorm(nn.BatchNorm2d):
    def __init__(self, n: int, extra: str) -> None:
        super().__init__(n)
        self.extra = extra


def test_bn_eval_holds_through_train_and_lets_go(net):
    report = mnn.freeze(net, ["bn1", "layer1"], bn_eval=True)
    assert report.batchnorms == ("bn1", "layer1.1")
    net.train()
    assert modes(net) == {"bn1": False, "layer1.1": False, "layer2.1": True}
    before = net.bn1.running_mean.clone()
    net(batch())
    assert torch.equal(net.bn1.running_mean, before)
    assert type(net.bn1) is nn.BatchNorm2d
    back = mnn.unfreeze(net, "bn1")
    assert back.batchnorms == ("bn1",)
    assert modes(net) == {"bn1": True, "layer1.1": False, "layer2.1": True}
    net.eval()
    mnn.unfreeze(net, "layer1")
    assert not net.layer1[1].training
    assert net.train().layer1[1].training


def test_without_bn_eval_the_mode_is_left_alone(net):
    mnn.freeze(net, "layer1")
    assert modes(net.train())["layer1.1"]


def test_only_batchnorms_with_all_parameters_frozen_are_meant(net):
    assert mnn.freeze(net, "layer1.1.weight", bn_eval=True).batchnorms == ()
    assert mnn.freeze(net, "layer1.1.bias", bn_eval=True).batchnorms == ("layer1.1",)


def test_batchnorm_without_parameters_goes_by_its_own_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    assert mnn.freeze(model, "0", bn_eval=True).batchnorms == ()
    assert mnn.freeze(model, "1", bn_eval=True).batchnorms == ("1",)
    assert not model.train()[1].training
    assert mnn.unfreeze(model, "1").batchnorms == ("1",)
    assert model[1].training


def test_bn_eval_survives_copies_pickles_and_wrapping(net):
    net.layer1[1] = OwnNorm(4, "kept")
    mnn.freeze(net, "layer1", bn_eval=True)
    copies = [copy.deepcopy(net), copy.copy(net), nn.DataParallel(net)]
    copies += [pickle.loads(pickle.dumps(net, protocol)) for protocol in range(6)]
    for model in copies:
        model.train()
        bare = mnn.unwrap(model)
        assert modes(bare) == {"bn1": True, "layer1.1": False, "layer2.1": True}
        assert bare.layer1[1].extra == "kept"
        assert type(bare.layer1[1]) is OwnNorm
    thawed = copies[0]
    mnn.unfreeze(thawed, "layer1")
    assert thawed.train().layer1[1].training
    assert not net.train().layer1[1].training


def test_a_pickled_module_needs_no_modelctl_and_our_tools_take_it(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.Linear(8, 2))
    mnn.freeze(model, "0", bn_eval=True)
    torch.save(model, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as ckpt:
        mc.save(mc.strip_head(ckpt), tmp_path / "b.pt")
    held = (
        "import sys, torch; sys.modules['modelctl'] = None;"
        "model = torch.load(sys.argv[1], weights_only=False).train();"
        "assert model[1].training and not model[0].training"
    )
    for name in ("a.pt", "b.pt"):
        subprocess.run([sys.executable, "-c", held, tmp_path / name], check=True)


def test_a_hold_that_convert_sync_batchnorm_lost_is_shown(net, tmp_path):
    mnn.freeze(net, ["bn1", "layer1"], bn_eval=True)
    assert mnn.trainable(net).lost_batchnorms == ()
    net = copy.deepcopy(nn.SyncBatchNorm.convert_sync_batchnorm(net)).train()
    report = mnn.trainable(net)
    assert report.lost_batchnorms == ("bn1", "layer1.1")
    assert report.eval_batchnorms == ()
    assert "no longer kept in eval" in str(report).splitlines()[-1]
    with pytest.warns(UserWarning, match=r"rebuilt since .*: bn1, layer1\.1; freeze it again"):
        mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    mnn.freeze(net, "bn1", bn_eval=True)
    mnn.unfreeze(net, "layer1")
    mnn.freeze(net, "layer1")  # another wish
    assert mnn.trainable(net).lost_batchnorms == ()
    assert mnn.trainable(net).eval_batchnorms == ("bn1",)
    assert not net.train().bn1.training


def test_bn_eval_survives_ddp(net, tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mnn.freeze(net, "layer1", bn_eval=True)
        ddp = nn.parallel.DistributedDataParallel(net)
        ddp.train()
        assert modes(net) == {"bn1": True, "layer1.1": False, "layer2.1": True}
        assert mnn.freeze_record(ddp)["frozen"][0] == "layer1.0.weight"
    finally:
        torch.distributed.destroy_process_group()


def test_freezing_behind_ddp_is_refused(net, tmp_path):
    """It would wait for the gradients; not where it looks for unused ones itself."""
    frozen_too = Net()
    mnn.freeze(frozen_too, "layer1")
    mnn.save_checkpoint(tmp_path / "a.pt", model=frozen_too)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mnn.freeze(net, "conv1")
        ddp = nn.parallel.DistributedDataParallel(net)
        before = {name: p.clone() for name, p in net.named_parameters()}
        for call in (
            lambda: mnn.freeze(nn.Sequential(ddp), "0.layer1", exclude="*.bias"),
            lambda: mnn.freeze(ddp, "layer1"),
            lambda: mnn.apply_freeze(ddp, tmp_path / "a.pt"),
            lambda: mnn.load_into(ddp, tmp_path / "a.pt"),
        ):
            with pytest.raises(RefusedError, match=r"gradients of .*layer1\.0\.weight") as e:
                call()
            assert "then wrap it anew" in e.value.hint
        assert frozen(net) == {"conv1.weight"}
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
        mnn.freeze(ddp, "conv1")  # is frozen already
        ddp = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        mnn.freeze(ddp, "layer1")
        for _ in range(2):
            ddp(torch.randn(2, 3, 8, 8)).sum().backward()
        assert net.layer1[0].weight.grad is None
        assert net.layer2[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ the record


def test_record_round_trips_onto_a_fresh_and_wrapped_model(net):
    mnn.freeze(net, ["layer1", "bn*"], bn_eval=True)
    record = mnn.freeze_record(net)
    assert record["version"] == 1
    assert set(record["frozen"]) == frozen(net)
    assert record["bn_eval"] is True
    assert record["patterns"] == ["layer1", "bn*"]
    other = Net()
    other.conv1.weight.requires_grad_(False)
    report = mnn.apply_freeze(nn.DataParallel(other), record)
    assert report.batchnorms == ("bn1", "layer1.1")
    assert frozen(other) == {*frozen(net), "conv1.weight"}  # it thaws nothing
    assert not other.train().bn1.training
    mnn.unfreeze(net, "layer1")
    assert mnn.freeze_record(net)["patterns"] == ["bn*"]


def test_record_of_wrapped_names_and_names_that_are_gone(net):
    record = {"version": 1, "frozen": ["module.fc.weight", "module.old.weight"], "bn_eval": False}
    with pytest.warns(UserWarning, match=r"lacks: module\.old\.weight"):
        mnn.apply_freeze(net, record)
    assert frozen(net) == {"fc.weight"}
    with pytest.raises(NoMatchError, match="none of the 1 names"):
        mnn.apply_freeze(net, {"version": 1, "frozen": ["x.y"], "bn_eval": False})
    with pytest.raises(UsageError, match="version 2"):
        mnn.apply_freeze(net, {"version": 2, "frozen": [], "bn_eval": False})
    with pytest.raises(UsageError):
        mnn.apply_freeze(net, {"frozen": "fc"})


def test_record_of_a_file(net, tmp_path):
    mnn.freeze(net, "layer1", bn_eval=True)
    mnn.save_checkpoint(tmp_path / "a.pt", model=net)
    other = Net()
    mnn.apply_freeze(other, tmp_path / "a.pt")
    assert mnn.freeze_record(other) == mnn.freeze_record(net)
    torch.save(Net().state_dict(), tmp_path / "b.pt")
    with pytest.raises(NoMatchError, match="no freeze record"):
        mnn.apply_freeze(other, tmp_path / "b.pt")


def test_a_record_that_must_generalise_warns(net):
    mnn.freeze(net, "bn1", bn_eval=True)
    mnn.freeze(net, "layer1")
    with pytest.warns(UserWarning, match=r"others \(layer1\.1\)"):
        assert mnn.freeze_record(net)["bn_eval"] is True


# ------------------------------------------------------------------ evaluating


def test_evaluating_restores_every_mode_also_after_an_error(net):
    mnn.freeze(net, "bn1", bn_eval=True)
    net.train()
    net.layer2.eval()
    before = {n: m.training for n, m in net.named_modules()}
    with mnn.evaluating(net) as model:
        assert model is net
        assert not any(m.training for m in net.modules())
        assert net(batch()).is_inference()
    assert {n: m.training for n, m in net.named_modules()} == before
    with pytest.raises(ZeroDivisionError), mnn.evaluating(net):
        raise ZeroDivisionError
    assert {n: m.training for n, m in net.named_modules()} == before
    assert not torch.is_inference_mode_enabled()


class Merging(nn.Linear):
    """A LoRA layer as loralib has it: in eval mode ``b @ a`` is part of the weight."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.weight.requires_grad = False
        self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(3, 2))
        self.merged = False

    def train(self, mode: bool = True):
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


def test_a_modules_own_train_takes_it_back_also_where_it_is_shared():
    shared = nn.Sequential(Merging(), nn.Dropout())
    model = nn.ModuleList([shared, nn.Sequential(shared, nn.Dropout()), nn.Dropout()])
    model[0][1].eval()
    model[2].eval()
    before = [module.training for module in model.modules()]
    with mnn.evaluating(model):
        assert shared[0].merged
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert not shared[0].merged
    shared[0](torch.ones(1, 3)).sum().backward()
    assert shared[0].b.grad is not None


def test_batchnorms_frozen_inside_evaluating_stay_in_eval(net):
    with mnn.evaluating(net):
        mnn.freeze(net, "layer1", bn_eval=True)
    assert modes(net) == {"bn1": True, "layer1.1": False, "layer2.1": True}


def test_a_lazy_module_that_first_runs_inside_evaluating_still_trains():
    for model in (
        nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)),
        nn.Sequential(nn.LazyBatchNorm1d(affine=False), nn.Linear(4, 1)),
    ):
        with mnn.evaluating(model):
            assert not model(torch.ones(2, 4)).requires_grad
        assert not any(buffer.is_inference() for buffer in model.buffers())
        model(torch.ones(2, 4)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        with mnn.evaluating(model):
            assert torch.is_inference_mode_enabled()
