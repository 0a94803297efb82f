"""Lightning's own checkpoints: into the bare module, and back into a Trainer after an edit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import AmbiguousError, NoMatchError, RefusedError
from tests.nn.nets import same

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, about small runs like these


class Net(nn.Module):
    def __init__(self, head: str = "fc") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.add_module(head, nn.Linear(6, 3))
        self.head = head

    def forward(self, x):
        return self.get_submodule(self.head)(self.body(x))


class Lit(lightning.LightningModule):
    """A model under some attribute, AdamW and a schedule by step; keeps the lr of each step."""

    def __init__(self, name: str = "model", head: str = "fc") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = name
        self.add_module(name, Net(head))
        self.lrs, self.epochs = [], []

    def training_step(self, batch, _):
        group = self.optimizers().param_groups[0]
        self.lrs.append(group["lr"])
        self.epochs.append(self.current_epoch)
        return nn.functional.cross_entropy(self.get_submodule(self.name)(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(module: Lit, steps: int, path: Path | None = None):
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(
        torch.randn(12, 4, generator=generator), torch.randint(3, (12,), generator=generator)
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=path)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Lit, Path]:
    torch.manual_seed(0)
    module = Lit()
    trainer = fit(module, 2)
    path = tmp_path_factory.mktemp("lightning") / "run.ckpt"
    trainer.save_checkpoint(path)
    return module, path


@pytest.fixture(scope="module")
def resumed(trained) -> Lit:
    """Two more steps from the checkpoint as it is."""
    module = Lit()
    fit(module, 4, trained[1])
    return module


# ------------------------------------------------------------------ into the bare module


def test_into_the_bare_module(trained):
    module, path = trained
    net = Net()
    report = mnn.load_into(net, path)
    assert same(net.state_dict(), module.model.state_dict())
    assert report.prefix == "model."
    assert report.missing == report.unexpected == ()
    assert "by the file's names without 'model.'" in str(report)
    whole = Lit()
    assert mnn.load_into(whole, path).prefix == ""
    assert same(whole.state_dict(), module.state_dict())


@pytest.mark.parametrize("prefix", ["net.", "module.model.", "model._orig_mod.", "a.b.module."])
def test_whatever_the_prefix(prefix, tmp_path):
    state = Net().state_dict()
    whole = {"state_dict": {prefix + n: t for n, t in state.items()}, "epoch": 1}
    torch.save(whole, tmp_path / "a.ckpt")
    with torch.device("meta"):
        net = Net()
    report = mnn.load_into(net, tmp_path / "a.ckpt")
    assert same(net.state_dict(), state)
    assert report.prefix in prefix
    assert report.prefix


def two(tmp_path: Path, *prefixes: str, classes: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = {}
    for prefix in prefixes:
        net = Net()
        if len(state) and classes != 3:
            net.fc = nn.Linear(6, classes)
        state.update((prefix + name, tensor) for name, tensor in net.state_dict().items())
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    return state


def test_two_that_fit_are_an_error_that_names_both(tmp_path):
    state = two(tmp_path, "student.", "teacher.")
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(AmbiguousError, match=r"'student\.', 'teacher\.'") as e:
        mnn.load_into(net, tmp_path / "a.ckpt", on_mismatch="skip")
    assert "prefix='student.'" in e.value.hint
    assert same(net.state_dict(), before)
    for given in ("teacher.", "teacher", "module.teacher."):
        report = mnn.load_into(net, tmp_path / "a.ckpt", prefix=given)
        assert report.prefix == "teacher."
        assert report.unexpected == ()  # the others are not asked for
        assert torch.equal(net.fc.weight, state["teacher.fc.weight"])
    with pytest.raises(NoMatchError, match=r"begins with 'pupil\.'") as e:
        mnn.load_into(net, tmp_path / "a.ckpt", prefix="pupil")
    assert "student., teacher." in e.value.hint


def test_the_one_that_fits_better_is_taken(tmp_path):
    state = two(tmp_path, "student.", "teacher.", classes=5)
    net = Net()
    with pytest.raises(RefusedError, match=r"not in the model: teacher\.body") as e:
        mnn.load_into(net, tmp_path / "a.ckpt")
    assert "prefix='student.'" in e.value.hint
    report = mnn.load_into(net, tmp_path / "a.ckpt", on_mismatch="skip")
    assert report.prefix == "student."
    assert torch.equal(net.fc.weight, state["student.fc.weight"])


def test_names_as_they_are_come_first(tmp_path):
    """A copy inside that fits a little better is no reason to leave the model itself."""
    state = two(tmp_path, "", "teacher.", classes=5)
    net = Net()
    net.fc = nn.Linear(6, 5)
    report = mnn.load_into(net, tmp_path / "a.ckpt", on_mismatch="skip")
    assert report.prefix == ""
    assert torch.equal(net.body[0].weight, state["body.0.weight"])
    assert [name for name, _, _ in report.mismatched] == ["fc.weight", "fc.bias"]


def test_what_has_the_prefix_loses_it_and_the_rest_stays(tmp_path):
    """A backbone under a name, the head beside it."""
    state = Net().state_dict()
    saved = {("trunk." if n.startswith("body") else "") + n: t for n, t in state.items()}
    saved["trunk.fc.weight"] = torch.zeros(3, 6)  # wins over the one without
    saved["fc.bias"] = state["fc.bias"]
    torch.save({"state_dict": saved}, tmp_path / "a.ckpt")
    net = Net()
    report = mnn.load_into(net, tmp_path / "a.ckpt", on_mismatch="skip")
    assert report.prefix == "trunk."
    assert report.unexpected == ("fc.weight",)
    assert same(net.state_dict(), {**state, "fc.weight": torch.zeros(3, 6)})
    report = mnn.load_into(net, tmp_path / "a.ckpt", on_mismatch="skip", prefix="trunk.")
    assert report.unexpected == ()
    assert report.missing == ("fc.bias",)
    del saved["trunk.fc.weight"]
    torch.save({"state_dict": saved}, tmp_path / "a.ckpt")
    mnn.load_into(net, tmp_path / "a.ckpt")  # nothing is left over
    assert same(net.state_dict(), state)


def test_a_part_of_a_model(tmp_path):
    state = two(tmp_path, "")
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    report = mnn.load_into(body, tmp_path / "a.ckpt", prefix="body")
    assert torch.equal(body[0].weight, state["body.0.weight"])
    assert report.unexpected == ()


def test_records_are_read_without_the_prefix(trained, tmp_path):
    ckpt = mc.freeze(mc.open(trained[1]), "model.body", bn_eval=True)
    mc.save(mc.strip_head(ckpt), tmp_path / "a.ckpt")
    net = Net()
    report = mnn.load_into(net, tmp_path / "a.ckpt", on_mismatch="skip")
    assert report.removed == ("fc.weight", "fc.bias")
    assert report.frozen.names == tuple(f"body.{n}" for n, _ in net.body.named_parameters())
    assert report.frozen.batchnorms == ("body.1",)
    assert net.fc.weight.requires_grad
    # what is recorded of another part says nothing here
    two(tmp_path, "student.", "teacher.")
    mc.save(mc.freeze(mc.open(tmp_path / "a.ckpt"), "teacher"), tmp_path / "b.ckpt")
    report = mnn.load_into(Net(), tmp_path / "b.ckpt", prefix="student.")
    assert report.frozen is None


# ------------------------------------------------------------------ back into a Trainer


def test_it_resumes_as_it_is(resumed):
    assert resumed.lrs == [0.025, 0.0125]


@pytest.mark.parametrize("bn_eval", [False, True])
def test_a_freeze_record_does_not_disturb_lightning(trained, resumed, tmp_path, bn_eval):
    frozen = tmp_path / "a.ckpt"
    mc.save(mc.freeze(mc.open(trained[1]), "model.body", bn_eval=bn_eval), frozen)
    module = Lit()
    fit(module, 4, frozen)
    assert same(module.state_dict(), resumed.state_dict())
    # and modelctl.nn applies it to the LightningModule, too
    module = Lit()
    mnn.apply_freeze(module, frozen)
    before = module.model.body[0].weight.clone()
    fit(module, 4, frozen)
    assert not torch.equal(module.model.fc.weight, resumed.model.fc.weight)
    assert torch.equal(module.model.body[0].weight, trained[0].model.body[0].weight)
    assert not torch.equal(module.model.body[0].weight, before)


def test_renamed_inside(trained, resumed, tmp_path):
    path = tmp_path / "a.ckpt"
    mc.save(
        mc.rename(mc.open(trained[1]), ["model.fc=net.classifier", "model.body=net.body"]), path
    )
    module = Lit("net", "classifier")
    fit(module, 4, path)
    assert module.lrs == resumed.lrs
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(module.net.state_dict()[name.replace("fc.", "classifier.")], tensor)


def test_merged_with_another_lr_and_epoch(trained, tmp_path):
    path = tmp_path / "a.ckpt"
    command = [sys.executable, "-m", "modelctl", "merge", "--model", str(trained[1])]
    subprocess.run([*command, "--lr", "0.8", "--epoch", "7", "-o", str(path)], check=True)
    module = Lit()
    trainer = fit(module, 4, path)
    assert module.lrs == [0.8, 0.4]
    assert trainer.global_step == 4
    assert torch.load(path, weights_only=True)["epoch"] == 7


def test_the_epoch_that_lightning_counts_from(trained, tmp_path):
    """Lightning goes by its loops' counters, not by ``epoch``."""
    path = tmp_path / "a.ckpt"
    at = "loops.fit_loop.epoch_progress.current"
    counters = {f"{at}.{name}": 7 for name in ("ready", "started", "processed", "completed")}
    mc.save(mc.merge(model=mc.open(trained[1]), epoch=7, set=counters), path)
    module = Lit()
    fit(module, 4, path)
    assert module.epochs == [7, 8]


@pytest.mark.parametrize(
    ("version", "epochs"), [("1.2.10", 2), ("1.5.10", 2), ("1.6.0", 3), ("x", 3)]
)
def test_before_1_6_the_next_epoch_was_noted(version, epochs, tmp_path):
    net = nn.Linear(2, 2)
    saved = {
        "epoch": 2,
        "global_step": 6,
        "pytorch-lightning_version": version,
        "state_dict": {f"model.{name}": value for name, value in net.state_dict().items()},
    }
    torch.save(saved, tmp_path / "a.ckpt")
    assert mnn.resume(tmp_path / "a.ckpt", model=nn.Linear(2, 2)).epoch == epochs
