"""Write docs/heads.md from torchvision's own models: python docs/make_heads.py"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import nn
from torchvision.models import get_model_builder, list_models

from modelctl.core.checkpoint import Checkpoint
from modelctl.core.dtypes import BY_NAME
from modelctl.core.nodes import ordered_dict
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.errors import ModelctlError
from modelctl.surgery.find_head import find_head

INTRO = """\
# The head of a model

Made by `python docs/make_heads.py` with torchvision {version}; a test keeps it so.

`strip-head` removes the head: the layer that turns features into classes. A state_dict says
nowhere which layer that is. It is found in this order, and the report always says what was found,
why, and how sure that is:

1. **Pattern.** `--head PATTERN` names it. Nothing is guessed then, and nothing below refuses.
2. **Record.** A file whose head `strip-head` has removed says so: there is nothing left to strip.
3. **Name.** A linear layer or a convolution whose whole path is made of the words that frameworks
   use for a head: `fc`, `classifier.6`, `heads.head`, `head_dist`, `lm_head`, `aux1.fc2`. Shapes
   sort out what goes by such a name and is none: a layer that feeds another one (`classifier.0` of
   a Sequential), or that a norm follows. Several heads with as many outputs belong together.
4. **Place.** Else the last layer of the file, if nothing else makes as many outputs, if it makes no
   more than it reads, and if no other branch ends like it. Where the tensors are sorted by name
   (safetensors does that), places say nothing: only names count.

Confidence is **high** where a name and a second sign agree (the last layer, or outputs that no
other layer has), and **medium** where there is one sign alone.

## What is refused

- Detection models and optical flow (`roi_heads`, `bbox`, `rpn`, `anchors`, `flow_head` in the
  names): their last layer is a regression. The error lists the layers that may make classes.
- A head whose tensor is tied to another one (`lm_head` and the embedding), also where the file
  holds only the embedding and a bias is left over.
- Several layers with a head's name and different numbers of outputs (a policy and a value).
- A model without a head: its last parameters are a norm's, its last layer is one of many alike or
  is called `conv_head` or `projection`.

The way out is always the same: `--head PATTERN`.

What no rule can see: a Sequential that was cut off by another tool. `classifier.0` of a
mobilenet_v3 without its last layer looks like a head of 1280 classes; so does the `head.linear2`
that another layer followed.

## How it was measured

The truth is the framework's own: build a model twice with different numbers of classes, and see
which parameters change their shape (for a language model: what it calls its output embedding).
Nothing is listed by hand.

| models | right | refused | wrong |
| --- | --- | --- | --- |
| torchvision {version}, all {total}: the tables below | {found} | {refused} | 0 |
| timm 1.0.31, all 1,364 that take a number of classes | 1,364 | 0 | 0 |
| with 1, 2, 10, 64, 128, 192, 256, 384, 512, 768 and 1,024 classes | 15,004 | 0 | 0 |
| with their tensors sorted by name | 1,364 | 0 | 0 |
| sorted, with as many classes as the model is wide inside | 1,346 | 18 | 0 |
| by place alone, no names, 7 classes | 1,292 | 72 | 0 |
| without their heads, where nothing is to be found | 1,359 | | 5, medium |
| transformers 5.23, 321 with a number of labels (multiple choice apart) | 320 | 1 | 0 |
| 124 language models whose head has weights of its own | 122 | 2 | 0 |
| 152 language models whose head is tied, which must refuse | 152 | | 0 |
| 15 for detection, which must refuse | 15 | | 0 |
| 614 without their heads, where nothing is to be found | 610 | | 4, three of them high |

The tests do all of torchvision: as built, with 1 class, with as many as the model is wide inside
(with 2 and 10, too: shapes derived from those), under the prefixes of DDP, `torch.compile` and
Lightning, sorted, and without the head. timm and transformers were measured once, by their shapes;
what the tests keep of them is the kinds of names that they use. Real files are tested besides.
"""

KINDS = ("classification", "quantization", "video", "segmentation", "detection", "optical flow")


@contextmanager
def _weightless(empty_alone: bool) -> Iterator[None]:
    """Models built in here have shapes and no memory, and nobody computes their weights."""
    empty = torch.empty
    fills = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for owner, names in ((nn.init, fills), (torch.Tensor, ("normal_", "uniform_"))):
            for name in names:
                keep = lambda *args, **options: args[0] if args else options["tensor"]  # noqa: E731
                stack.enter_context(patch.object(owner, name, keep))
        if empty_alone:  # some compute their widths with small tensors, which must have values
            on_meta = lambda *size, **options: empty(*size, **{**options, "device": "meta"})  # noqa: E731
            stack.enter_context(patch.object(torch, "empty", on_meta))
        else:
            stack.enter_context(torch.device("meta"))
        yield


def state_dict(name: str, classes: int | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """The state_dict of a torchvision model, without memory; TypeError where it has no classes."""
    builder = get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if classes is not None:
        options["num_classes"] = classes
    for empty_alone in (False, True):
        try:
            with _weightless(empty_alone):
                return builder(weights=None, **options).state_dict()
        except (NotImplementedError, RuntimeError):
            if empty_alone:
                raise
    raise AssertionError


def kind(name: str) -> str:
    """What a model is for, as torchvision sorts its modules."""
    _, _, *below = get_model_builder(name).__module__.split(".")
    return below[0].replace("_", " ") if len(below) > 1 else KINDS[0]


def checkpoint(tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    """What opening a file of this state_dict gives: names, dtypes and shapes; who shares memory."""
    storages: dict[int, MemoryStorage] = {}
    entries = {}
    for name, tensor in tensors.items():
        storage = storages.setdefault(tensor.untyped_storage()._cdata, MemoryStorage(b""))
        dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = TensorRef(dtype, tuple(tensor.shape), storage)
    return Checkpoint(ordered_dict(entries))


def answer(name: str) -> tuple[str, str]:
    """What find_head says of the model, as two cells of the table: the head, and why."""
    try:
        head = find_head(checkpoint(state_dict(name)))
    except ModelctlError as error:
        return "refused", f"{error.message}; {error.hint}"
    modules = ", ".join(f"`{module}`" for module in head.modules)
    return modules, f"{head.confidence}: {head.evidence}"


def page(names: Iterable[str] | None = None, version: str = torchvision.__version__) -> str:
    """The page, as Markdown: of all models, or of ``names``."""
    tables: dict[str, dict[tuple[str, str, str], list[str]]] = {kind: {} for kind in KINDS}
    for name in list_models() if names is None else names:
        family = get_model_builder(name).__module__
        tables[kind(name)].setdefault((family, *answer(name)), []).append(name)
    rows = [row for table in tables.values() for row in table.items()]
    refused = sum(len(models) for (_, head, _), models in rows if head == "refused")
    total = sum(len(models) for _, models in rows)
    counts = {"total": total, "found": total - refused, "refused": refused}
    parts = [INTRO.format(version=version.partition("+")[0], **counts)]
    for title, table in tables.items():
        parts += [f"## {title.capitalize()}", "", "| models | head | why |", "| --- | --- | --- |"]
        for (_, head, why), models in table.items():
            parts.append(f"| {', '.join(models)} | {head} | {why} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("heads.md").write_text(page(), "utf-8")
