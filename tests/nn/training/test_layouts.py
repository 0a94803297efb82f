"""Checkpoints that others wrote resume, too: modelctl merge, torch.save, Lightning, timm."""

from __future__ import annotations

import argparse
import logging
import warnings

import pytest
import torch
from torch import nn, optim

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import RefusedError
from tests.nn.nets import Net, same, train_step

from .loops import equal


@pytest.fixture
def trained(net):
    optimizer = optim.AdamW(net.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        train_step(net, optimizer, scheduler)
    return net, optimizer, scheduler


def fresh(**more):
    model = Net()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, **more}


def goes_on(trained, parts):
    """Whether two more steps are the same on both sides."""
    net, optimizer, scheduler = trained
    assert same(parts["model"].state_dict(), net.state_dict())
    assert equal(parts["optimizer"].state_dict()["state"], optimizer.state_dict()["state"])
    for _ in range(2):
        before = torch.get_rng_state()
        train_step(net, optimizer, scheduler)
        torch.set_rng_state(before)
        train_step(parts["model"], parts["optimizer"], parts["scheduler"])
    return same(parts["model"].state_dict(), net.state_dict())


def resumed(path, parts, expected=()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = mnn.resume(path, **parts)
    assert [str(w.message) for w in caught] == [*expected]
    return state


# ------------------------------------------------------------------ ours


def test_split_and_merged_again(trained, tmp_path):
    net, optimizer, scheduler = trained
    path = tmp_path / "a.pt"
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    ema = optim.swa_utils.AveragedModel(net)
    mnn.freeze(net, "conv1")
    mnn.save_checkpoint(
        path, **parts, ema=ema, scaler=torch.amp.GradScaler("cpu"), epoch=2, best=0.5
    )
    with mc.open(path) as ckpt:
        for name, part in mc.split(ckpt).items():
            mc.save(part, tmp_path / f"{name}.pt")
    names = ("model", "optimizer", "scheduler", "ema", "rest")
    opened = {name: mc.open(tmp_path / f"{name}.pt") for name in names}
    whole, bare = tmp_path / "whole.pt", tmp_path / "bare.pt"
    mc.save(mc.merge(**opened), whole)
    rest = opened.pop("rest")
    opened.pop("ema")
    mc.save(mc.merge(**opened, epoch=2, set={"best": 0.5}), bare)
    for one in (*opened.values(), rest):
        one.close()

    parts = fresh(ema=optim.swa_utils.AveragedModel(Net()), scaler=torch.amp.GradScaler("cpu"))
    state = resumed(whole, parts)
    assert state.missing == state.unused == ()
    assert (state.epoch, state.extra) == (2, {"best": 0.5})
    assert same(parts["ema"].state_dict(), ema.state_dict())
    parts = fresh()
    state = resumed(bare, parts)
    assert state.missing == ("rng",)
    assert (state.epoch, state.extra) == (2, {"best": 0.5})
    assert not parts["model"].conv1.weight.requires_grad
    assert goes_on(trained, parts)


# ------------------------------------------------------------------ torch.save


def test_the_tutorials_layout(trained, tmp_path):
    net, optimizer, scheduler = trained
    whole = {
        "epoch": 4,
        "model_state_dict": nn.DataParallel(net).state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss": torch.tensor(0.25),
    }
    torch.save(whole, tmp_path / "a.pt")
    parts = fresh()
    state = resumed(tmp_path / "a.pt", parts)
    assert (state.epoch, state.extra) == (4, {"loss": torch.tensor(0.25)})
    assert state.restored == ("model", "optimizer", "scheduler")
    assert goes_on(trained, parts)


def test_the_imagenet_examples_layout(trained, tmp_path):
    net, optimizer, scheduler = trained
    whole = {
        "epoch": 4,
        "arch": "resnet50",
        "state_dict": net.state_dict(),
        "best_acc1": torch.tensor(71.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(whole, tmp_path / "a.pth.tar")
    parts = fresh()
    state = resumed(tmp_path / "a.pth.tar", parts)
    assert state.epoch == 4
    assert state.extra == {"arch": "resnet50", "best_acc1": torch.tensor(71.5)}
    assert state.unused == ("args",)  # an object, which is not made
    assert goes_on(trained, parts)


def test_timms_layout(trained, tmp_path):
    net, optimizer, scheduler = trained
    ema = optim.swa_utils.AveragedModel(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    whole = {
        "epoch": 4,  # the number of the one that was done
        "arch": "resnet50",
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=0.1),
        "amp_scaler": scaler.state_dict(),
        "state_dict_ema": ema.module.state_dict(),
        "metric": 71.5,
    }
    torch.save(whole, tmp_path / "a.pt")
    copy, live = Net(), torch.amp.GradScaler("cpu")
    parts = fresh(ema=copy, scaler=live)
    left = "not in the checkpoint: scheduler; left as built"
    lr = (
        "optimizer: the checkpoint's lr 0.01 holds until the scheduler's next step(): its state "
        "was not restored, and it was built over lr 0.1"
    )
    state = resumed(tmp_path / "a.pt", parts, [lr, left])
    assert state.epoch == 5
    assert state.restored == ("model", "optimizer", "scaler", "ema")
    assert state.extra == {"arch": "resnet50", "version": 2, "metric": 71.5}
    assert live.get_scale() == 32.0
    assert same(copy.state_dict(), ema.module.state_dict())
    parts["scheduler"].load_state_dict(scheduler.state_dict())
    assert goes_on(trained, parts)
    whole["version"] = 1
    torch.save(whole, tmp_path / "a.pt")
    assert mnn.resume(tmp_path / "a.pt", model=net).epoch == 4


def test_two_optimizers_under_keys_of_their_own(net, tmp_path):
    def two(net):
        trunk = [p for n, p in net.named_parameters() if "fc" not in n]
        made = optim.Adam(trunk, lr=0.1), optim.SGD(net.fc.parameters(), lr=0.1, momentum=0.9)
        return dict(zip(("optimizer_trunk", "optimizer_head"), made, strict=True))

    one = two(net)
    for optimizer in one.values():
        train_step(net, optimizer)
    whole = {"model": net.state_dict(), **{key: o.state_dict() for key, o in one.items()}}
    torch.save(whole, tmp_path / "a.pt")
    other = Net()
    made = two(other)
    mnn.resume(tmp_path / "a.pt", model=other, optimizer=made)
    for key, optimizer in made.items():
        assert equal(optimizer.state_dict(), one[key].state_dict())


def test_weights_alone(trained, tmp_path):
    net, _, _ = trained
    torch.save(net.state_dict(), tmp_path / "a.pt")
    parts = fresh()
    left = "not in the checkpoint: optimizer, scheduler; left as built"
    state = resumed(tmp_path / "a.pt", parts, [left])
    assert (state.epoch, state.step, state.lr, state.extra) == (None, None, 0.1, {})
    assert same(parts["model"].state_dict(), net.state_dict())


def test_generators_of_another_layout_are_refused_with_the_way_out(net, tmp_path):
    torch.save({"model": net.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "a.pt")
    with pytest.raises(RefusedError, match="rng is not one") as e:
        mnn.resume(tmp_path / "a.pt", model=net)
    assert "rng=False" in e.value.hint
    assert mnn.resume(tmp_path / "a.pt", model=net, rng=False).unused == ("rng",)


# ------------------------------------------------------------------ Lightning


def test_lightnings_checkpoints(tmp_path):
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 4})
            self.model = Net()

        def training_step(self, batch, _):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            optimizer = optim.AdamW(self.named_parameters(), lr=0.1)
            scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8))
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}", save_top_k=-1
    )
    options = ("logger", "enable_progress_bar", "enable_model_summary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[saving], **dict.fromkeys(options, False)
        )
        module = Lit()
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")

    def parts(model):
        # grouped in another way: mapped by name
        named = dict(model.named_parameters())
        halves = [
            [p for n, p in named.items() if ("conv" in n) is which] for which in (True, False)
        ]
        optimizer = optim.AdamW([{"params": half} for half in halves], lr=0.1)
        scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    old = trainer.optimizers[0].state
    for model in (Lit(), Net()):
        for name, epoch in (("end", 2), ("epoch=1", 2)):
            made = parts(model)
            state = resumed(tmp_path / f"{name}.ckpt", made)
            assert (state.epoch, state.step, state.missing) == (epoch, 4, ("rng",))
            assert state.extra["hyper_parameters"] == {"width": 4}
            assert made["scheduler"].last_epoch == 2
            bare = getattr(model, "model", model)
            assert same(bare.state_dict(), module.model.state_dict())
            for mine, theirs in zip(bare.parameters(), module.model.parameters(), strict=True):
                assert equal(made["optimizer"].state[mine], old[theirs])
    assert mnn.resume(tmp_path / "epoch=0.ckpt", model=Net()).epoch == 1
    whole = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    del whole["loops"]
    torch.save(whole, tmp_path / "old.ckpt")
    assert mnn.resume(tmp_path / "old.ckpt", model=Net()).epoch == 1
