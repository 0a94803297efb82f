"""Fine-tune a pretrained net on another task; stop whenever you like, and go on.

    python examples/finetune.py                # under a minute on a CPU; on a GPU as it is
    python examples/finetune.py --resume       # from the latest checkpoint, if there is one

The weights are those of sample_models/cnn-ddp.pt: 10 classes, saved under DataParallel. The head
is stripped and a new one trained alone; then the trunk thaws and trains along, more slowly. The
tricks are explained in docs/training-tricks.md, which has one section for each.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import modelctl as mc
import modelctl.nn as mnn

SAMPLES = Path(__file__).resolve().parents[1] / "sample_models"
sys.path.insert(0, str(SAMPLES))
from small_cnn import SmallCNN, batches  # noqa: E402

CLASSES = 24
BATCH, ACCUMULATE = 32, 3  # 20 batches an epoch: six windows of 3, and one of 2


def data(seed: int, size: int) -> TensorDataset:
    """Made-up images, each class with colours and stripes of its own."""
    images, labels = zip(*islice(batches(CLASSES, seed, BATCH), size // BATCH), strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def pretrained(path: Path) -> SmallCNN:
    """The sample's weights without ``module.`` and without its head, under a new head."""
    path.parent.mkdir(exist_ok=True)
    with mc.open(SAMPLES / "cnn-ddp.pt") as ckpt:
        mc.save(mc.strip_head(mc.strip_prefix(ckpt)), path, overwrite=True)
    model = SmallCNN(CLASSES)
    print(mnn.load_into(model, path, on_mismatch="skip"))
    return model


class Training:
    """Everything that a checkpoint must hold, built the same way at the start and to resume."""

    def __init__(self, out: Path, epochs: int, device: torch.device, size: int) -> None:
        self.out, self.epochs, self.device = out, epochs, device
        # shuffled by torch's own generator, whose state is saved
        self.loader = DataLoader(data(1, size), BATCH, shuffle=True)
        self.validation = DataLoader(data(2, 320), 64)
        # in a folder of its own: it is no checkpoint of this training
        self.model = pretrained(out / "pretrained" / "backbone.pt").to(device)
        mnn.freeze(self.model, "*", exclude="fc", bn_eval=True)
        # what is frozen gets no group; the trunk joins when it thaws
        groups = mnn.param_groups(self.model, {"fc": {"lr": 1e-2}}, no_decay=True)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        steps = -(-len(self.loader) // ACCUMULATE)
        self.scheduler = mnn.warmup_cosine(self.optimizer, steps // 2, epochs * steps)
        # AMP helps on GPUs; float16 needs a scaler, bfloat16 none
        self.amp = device.type == "cuda"
        self.half = self.amp and not torch.cuda.is_bf16_supported(including_emulation=False)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.epoch, self.accuracy = 0, [self.validate()]

    def thaw(self) -> None:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        print(mnn.unfreeze(self.model, "*", exclude="fc", **parts, lr=1e-3))
        print(mnn.describe_groups(self.optimizer))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.float16 if self.half else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.amp):
            return F.cross_entropy(self.model(images), labels, label_smoothing=0.1)

    def run_epoch(self) -> float:
        """One epoch; the mean loss."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(self.loader):
            images, labels = mnn.to_device(tuple(batch), self.device)
            loss = self.loss(images, labels)
            window = min(ACCUMULATE, len(self.loader) - i // ACCUMULATE * ACCUMULATE)
            self.scaler.scale(loss / window).backward()
            total += loss.detach()
            if (i + 1) % ACCUMULATE == 0 or i + 1 == len(self.loader):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.scheduler.step()
        return total.item() / len(self.loader)

    def validate(self) -> float:
        right = torch.zeros((), device=self.device)
        with mnn.evaluating(self.model) as model:
            for batch in self.validation:
                images, labels = mnn.to_device(tuple(batch), self.device)
                right += (model(images).argmax(dim=1) == labels).sum()
        return right.item() / len(self.validation.dataset)

    def parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "scaler")
        return {name: getattr(self, name) for name in names}

    def save(self) -> None:
        """A file an epoch, the last three of them, and latest.pt."""
        path = self.out / "epoch-{epoch}.pt"
        extra = {"accuracy": self.accuracy, "epochs": self.epochs}
        mnn.save_checkpoint(path, **self.parts(), epoch=self.epoch, extra=extra, keep_last=3)

    def resume(self, path: Path) -> None:
        state = mnn.resume(path, **self.parts())
        print(state)
        if state.extra["epochs"] != self.epochs:  # its cosine has come down to 0 there
            epochs = state.extra["epochs"]
            sys.exit(f"{path}: a training of {epochs} epochs; go on with --epochs {epochs}")
        self.epoch, self.accuracy = state.epoch, state.extra["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("run/finetune"))
    parser.add_argument("--resume", action="store_true", help="go on from the latest in --out")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    mnn.seed_everything(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args.out, args.epochs, mnn.choose_device(args.device), args.images)
    if args.resume and any(args.out.glob("*.pt")):  # it may have been stopped before the first
        training.resume(args.out)
    print(f"accuracy with a new, untrained head: {training.accuracy[0]:.1%}")
    while training.epoch < args.epochs:
        if training.epoch == args.epochs // 2:
            training.thaw()
        loss = training.run_epoch()
        training.epoch += 1
        training.accuracy.append(training.validate())
        training.save()
        print(f"epoch {training.epoch}: loss {loss:.3f}, accuracy {training.accuracy[-1]:.1%}")


if __name__ == "__main__":
    main()
