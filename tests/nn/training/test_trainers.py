"""Going on from the folders of transformers' Trainer and of accelerate: as they do themselves."""

from __future__ import annotations

import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import modelctl as mc
import modelctl.nn as mnn
from modelctl.errors import ModelctlError

STEPS, CUT = 8, 4


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(i, i + 6) % 32
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tied(seed: int) -> nn.Module:
    """A model with dropout, whose head is its embedding: save_pretrained drops one of the two."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))


def trainer(folder, seed: int):
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    asked = {"per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": CUT}
    rates = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.0}
    still = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    args = transformers.TrainingArguments(str(folder), **asked, **rates, **still)
    return InOrder(tied(seed), args, train_dataset=Texts())


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that the Trainer cut and went on with, and what it ended with."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("trainer")
    trainer(folder, 0).train()
    again = trainer(folder, 5)
    divisors = set()  # what the sum of the losses of a batch is divided by: versions differ
    compute_loss = again.compute_loss

    def seen(model, inputs, *args, num_items_in_batch=None, **kwargs):
        divisors.add(num_items_in_batch if num_items_in_batch is None else int(num_items_in_batch))
        return compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    again.compute_loss = seen
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{CUT}"))
    return folder / f"checkpoint-{CUT}", again, divisors


def grouped(model: nn.Module) -> list[dict[str, object]]:
    """The Trainer's two groups: what decays, and what doesn't."""
    plain = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    bare = [n for n, p in model.named_parameters() if n.endswith("bias") or id(p) in plain]
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if n not in bare], "weight_decay": 0.1},
        {"params": [named[n] for n in bare], "weight_decay": 0.0},
    ]


def test_the_next_steps_are_the_trainers(run):
    folder, theirs, divisors = run
    model = tied(9)
    kind = type(theirs.optimizer.optimizer)
    settings = theirs.optimizer.optimizer.defaults
    optimizer = kind(grouped(model), **{k: settings[k] for k in ("lr", "betas", "eps", "fused")})
    scheduler = lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 2, max(0.0, (STEPS - step) / (STEPS - 2)))
    )
    state = mnn.resume(folder, model=model, optimizer=optimizer, scheduler=scheduler)
    assert state.restored == ("model", "optimizer", "scheduler", "rng")
    assert (state.step, state.missing) == (CUT, ())
    assert model.lm_head.weight is model.transformer.wte.weight
    data, divisor = Texts(), divisors.pop()
    model.train()
    for step in range(CUT, STEPS):
        rows = [data[i] for i in range(4 * step, 4 * step + 4)]
        ids = torch.stack([row["input_ids"] for row in rows])
        model(input_ids=ids, labels=ids, num_items_in_batch=divisor).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    expected = theirs.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert scheduler.get_last_lr() == theirs.lr_scheduler.get_last_lr()


def test_all_generators_come_back(run):
    folder = run[0]
    saved = torch.load(folder / "rng_state.pth", weights_only=False)
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["cpu"])
    expected = drawn()
    mnn.resume(folder, model=tied(2))
    assert drawn() == expected
    mnn.seed_everything(3)
    expected = drawn()
    mnn.seed_everything(3)
    assert mnn.resume(folder, model=tied(2), rng=False).restored == ("model",)


def test_generators_that_are_none_are_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "checkpoint-4")
    bad = tmp_path / "checkpoint-4" / "rng_state.pth"
    torch.save({"python": (3, (1, 2), None), "cpu": torch.zeros(2)}, bad)
    model = tied(2)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(ModelctlError, match="rng"):
        mnn.resume(tmp_path / "checkpoint-4", model=model)
    torch.save({"python": random.getstate(), "numpy": ("PCG64", 3)}, bad)
    with pytest.raises(ModelctlError, match="numpy"):
        mnn.resume(tmp_path / "checkpoint-4", model=model)
    assert torch.equal(model.lm_head.weight, before)


def parts(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, lr_scheduler.StepLR(optimizer, 2)


def steps(model, optimizer, scheduler, count: int) -> list[float]:
    found = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(torch.rand(4, 3) + random.random() + np.random.rand()).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        found.append(loss.item())
    return found


def test_the_next_steps_are_accelerates(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    mine = accelerator.prepare(*parts(0))
    steps(*mine, 3)
    accelerator.save_state(str(tmp_path / "state"))
    expected = steps(*mine, 3)
    accelerator.load_state(str(tmp_path / "state"))
    assert steps(*mine, 3) == expected
    model, optimizer, scheduler = parts(5)
    state = mnn.resume(tmp_path / "state", model=model, optimizer=optimizer, scheduler=scheduler)
    assert state.restored == ("model", "optimizer", "scheduler", "rng")
    assert steps(model, optimizer, scheduler, 3) == expected


def test_a_scaler_is_a_part_of_the_folder(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "checkpoint-4")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    torch.save(scaler.state_dict(), folder / "scaler.pt")
    other = torch.amp.GradScaler("cpu")
    state = mnn.resume(folder, model=tied(1), scaler=other)
    assert "scaler" in state.restored
    assert other.state_dict() == scaler.state_dict()
    mc.edit(folder, [{"do": "drop", "pattern": "*h.1.*"}], output=tmp_path / "out")
    assert torch.load(tmp_path / "out" / "scaler.pt") == scaler.state_dict()


def test_batchnorms_counts_come_first_in_the_file_and_say_nothing_of_its_order(tmp_path):
    """safetensors sorts by dtype, then by name."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)

    def made():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        model(torch.arange(12.0).reshape(3, 4)).pow(3).sum().backward()
        optimizer.step()

    mine, again = accelerator.prepare(*made()), made()
    step(*mine)
    accelerator.save_state(str(tmp_path / "state"))
    mnn.resume(tmp_path / "state", model=again[0], optimizer=again[1], rng=False)
    again[1].zero_grad()
    mine[1].zero_grad()
    step(*mine)
    step(*again)
    assert all(map(torch.equal, mine[0].parameters(), again[0].parameters()))
