"""What `run.py view` measures: the tables of modelctl, torchinfo and torchsummary for ten models.

Each tool is given what its users give it, in one process, in turn: what it counts, what it says,
the seconds of its call, and those from the class of the model to the table (ours builds on meta,
the others can't do without values). The truth for MACs is a real forward under torch's own
FlopCounterMode, without kernels that do a whole layer at once; for parameters
`sum(p.numel() for p in model.parameters())`.
"""

from __future__ import annotations

import contextlib
import io
import re
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

INTS = torch.long


class Case(NamedTuple):
    """A model, the shape of its input without the batch, and that input's dtype."""

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Twice(nn.Module):
    """One layer called twice, another never, an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.mix = nn.Linear(64, 64)
        self.spare = nn.Linear(64, 64)
        self.out = nn.Linear(64, 1000, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(self.mix(self.embed(ids)).relu()))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5000, 128)
        self.lstm = nn.LSTM(128, 256, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(512, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(ids))[0])


def cases() -> list[Case]:
    from torchvision import models
    from transformers import GPT2Config, GPT2LMHeadModel

    image = (3, 224, 224)
    encoder = nn.TransformerEncoderLayer
    return [
        Case("resnet50", models.resnet50, image),
        Case("mobilenet_v3_small", models.mobilenet_v3_small, image),
        Case("densenet121", models.densenet121, image),
        Case("efficientnet_b0", models.efficientnet_b0, image),
        Case("vit_b_16", models.vit_b_16, image),
        Case("swin_t", models.swin_t, image),
        Case("encoder layers", lambda: nn.TransformerEncoder(encoder(256, 4), 2), (32, 256)),
        Case("LSTM tagger", Tagger, (32,), INTS),
        Case("GPT-2, 2 layers", lambda: GPT2LMHeadModel(GPT2Config(n_layer=2)), (8,), INTS),
        Case("tied, called twice", Twice, (16,), INTS),
    ]


class Answer(NamedTuple):
    params: int | None
    macs: int | None
    error: str = ""


def ours(model: nn.Module, case: Case) -> Answer:
    from modelctl.nn import summary

    found = summary(model, case.size, dtypes=case.dtype)
    str(found)
    return Answer(found.totals.params_unique, found.totals.macs)


def torchinfo(model: nn.Module, case: Case) -> Answer:
    import torchinfo

    found = torchinfo.summary(model, (1, *case.size), dtypes=[case.dtype], verbose=0, device="cpu")
    str(found)
    return Answer(found.total_params, found.total_mult_adds)


def torchsummary(model: nn.Module, case: Case) -> Answer:
    from torchsummary import summary

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        summary(model, case.size, batch_size=1, device="cpu")
    found = re.search(r"Total params: ([\d,]+)", text.getvalue())
    return Answer(int(found[1].replace(",", "")) if found else None, None)


TOOLS = {"modelctl": ours, "torchinfo": torchinfo, "torchsummary": torchsummary}


def truth(case: Case) -> Answer:
    model = case.make().eval()
    data = torch.zeros((1, *case.size), dtype=case.dtype)
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), counter:
        model(data)
    torch.backends.mha.set_fastpath_enabled(True)
    return Answer(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def timed(tool: Callable[..., Answer], case: Case, meta: bool) -> tuple[float, float, Answer]:
    """Seconds of the call, seconds from the class to the table, and what it says."""
    start = time.perf_counter()
    with torch.device("meta" if meta else "cpu"):
        model = case.make().eval()
    built = time.perf_counter()
    try:
        answer = tool(model, case)
    except Exception as e:
        answer = Answer(None, None, f"{type(e).__name__}: {' '.join(str(e).split())[:60]}")
    end = time.perf_counter()
    return end - built, end - start, answer


def measure(rounds: int) -> None:
    """Print a row of a Markdown table for each model."""
    warnings.simplefilter("ignore")
    print("\n| model | truth | " + " | ".join(TOOLS) + " |")
    print("| --- | --- |" + " --- |" * len(TOOLS))
    for case in cases():
        right = truth(case)
        cells = []
        for name, tool in TOOLS.items():
            timed(tool, case, name == "modelctl")  # warm
            found = [timed(tool, case, name == "modelctl") for _ in range(rounds)]
            call, whole = (statistics.median(one[i] for one in found) for i in (0, 1))
            cells.append(f"{shown(found[0][2], right)}; {1e3 * call:.0f} / {1e3 * whole:.0f} ms")
        print(f"| {case.name} | {shown(right, right)} | {' | '.join(cells)} |", flush=True)


def shown(answer: Answer, right: Answer) -> str:
    if answer.error:
        return f"fails: {answer.error}"
    parts = []
    for what, found, wanted in (
        ("params", answer.params, right.params),
        ("MACs", answer.macs, right.macs),
    ):
        if found is not None:
            number = f"{found:,}"
            parts.append(f"{number if found == wanted else f'**{number}**'} {what}")
    return ", ".join(parts)
