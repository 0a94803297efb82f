"""summarize, list_tensors and the object tree, against what torch itself counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.core.notes import warning
from modelctl.errors import AmbiguousError, NoMatchError, UsageError
from modelctl.inspection import show as values
from modelctl.inspection.ls import trainability


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(6, 2, 12) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("inv_freq", torch.ones(3))
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight


def deep() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    return nn.Sequential(*(block() for _ in range(25)), nn.Linear(4, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "deep": deep,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "gru": lambda: nn.Sequential(nn.Embedding(9, 3), nn.GRU(3, 4)),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)),
    "half": lambda: nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 3).bfloat16()),
    "wrapped": lambda: nn.DataParallel(deep()),
    "one": lambda: nn.Linear(2, 2),
}


def opened(tmp_path: Path, obj: Any) -> Checkpoint:
    torch.save(obj, tmp_path / "in.pt")
    return mc.open(tmp_path / "in.pt")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_totals_are_torchs(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    with opened(tmp_path, model.state_dict()) as ckpt:
        totals = mc.summarize(ckpt).totals
    unique = sum(p.numel() for p in model.parameters())  # parameters() gives tied ones once
    by_name = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    assert (totals.params_unique, totals.params) == (unique, by_name)
    assert totals.buffers == sum(b.numel() for b in model.buffers())
    tensors = [*model.parameters(), *model.buffers()]
    assert totals.nbytes == totals.bytes_stored == sum(t.nbytes for t in tensors)
    assert totals.tensors == len(model.state_dict())
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    assert totals.by_dtype == dtypes
    assert (totals.trainable, totals.frozen) == (None, None)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fold", [None, True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_rows_sum_to_the_totals(
    tmp_path: Path, make: Callable[[], nn.Module], fold: bool | None, depth: int | None
) -> None:
    with opened(tmp_path, make().state_dict()) as ckpt:
        for of in (ckpt, mc.freeze(ckpt, "*")):
            found = mc.summarize(of, depth=depth, fold=fold)
            totals, rows = found.totals, found.rows
            assert sum(row.params for row in rows) == totals.params_unique
            assert sum(row.buffers for row in rows) == totals.buffers
            assert sum(row.nbytes for row in rows) == totals.nbytes
            assert sum(row.tensors for row in rows) == totals.tensors
            if of is not ckpt:
                assert sum(row.trainable or 0 for row in rows) == totals.trainable == 0


def test_repeated_blocks_fold(tmp_path: Path) -> None:
    with opened(tmp_path, deep().state_dict()) as ckpt:
        assert len(mc.summarize(ckpt, depth=1).rows) == 26
        rows = mc.summarize(ckpt, depth=2).rows  # over 40 rows: folded unasked
        assert [(row.path, row.repeat) for row in rows] == [
            ("{0-24}.0", 25),
            ("{0-24}.1", 25),
            ("25", 1),
        ]
        assert rows[0].params == 25 * (4 * 4 * 9 + 4)
        assert len(mc.summarize(ckpt, depth=2, fold=False).rows) == 51


def test_only_what_is_alike_folds(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 3))
    with opened(tmp_path, model.state_dict()) as ckpt:
        paths = [row.path for row in mc.summarize(ckpt, fold=True).rows]
    assert paths == ["{0-1}", "2", "3"]


def test_kinds(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 2, (3, 5)),
            "bn": nn.BatchNorm2d(2),
            "ln": nn.LayerNorm(3),
            "embed": nn.Embedding(4, 3),
            "fc": nn.Linear(3, 3),
            "attn": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(2, 3),
            "gru": nn.GRU(2, 3),
            "rnn": nn.RNN(2, 3),
        }
    )
    with opened(tmp_path, model.state_dict()) as ckpt:
        kinds = {row.path: row.kind for row in mc.summarize(ckpt, depth=None).rows}
        inferred = {row.inferred for row in mc.summarize(ckpt, depth=None).rows}
    assert inferred == {True}
    assert [kinds[name] for name in ("conv", "bn", "ln", "embed", "fc")] == [
        *("conv 3x5", "norm", "norm", "embedding", "linear"),
    ]
    assert [kinds[name] for name in ("attn", "lstm", "gru", "rnn")] == [
        *("attention", "lstm", "gru", "rnn"),
    ]


def test_ties_and_what_is_stored(tmp_path: Path) -> None:
    with opened(tmp_path, Tied().state_dict()) as ckpt:
        assert mc.summarize(ckpt).tied == [["embed.weight", "lm_head.weight"]]
    big = torch.zeros(1000, 1000)
    with opened(tmp_path, {"a.weight": big[0], "b.weight": torch.ones(3)}) as ckpt:
        found = mc.summarize(ckpt)
    assert found.totals.nbytes == 4000 + 12
    assert found.totals.bytes_stored == 4_000_000 + 12
    assert [note.text for note in found.warnings] == [
        "'a.weight' uses 4,000 of the 4,000,000 bytes that it keeps alive"
    ]


def test_warnings(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(2, 2)).state_dict()
    with opened(tmp_path, state) as ckpt:
        assert mc.summarize(ckpt).warnings == []
        frozen = mc.summarize(mc.freeze(ckpt, "*"))
        assert frozen.warnings == [
            warning(
                "every parameter is frozen: the loss will not move",
                f"modelctl unfreeze {tmp_path / 'in.pt'} -o NEW.pt",
            )
        ]
        assert (frozen.totals.trainable, frozen.totals.frozen) == (0, 6)
    for prefix, by in (("module.", "DataParallel"), ("_orig_mod.", "torch.compile")):
        with opened(tmp_path, {prefix + key: value for key, value in state.items()}) as ckpt:
            ((_, text, hint),) = mc.summarize(ckpt).warnings
        assert by in text
        assert hint == f"modelctl strip-prefix {tmp_path / 'in.pt'} -o NEW.pt"

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("called",)

    with opened(tmp_path, {"model": state, "x": Evil()}) as ckpt:
        ((_, text, _),) = mc.summarize(ckpt).warnings
    assert "would run code: builtins.print" in text


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_training_panel(tmp_path: Path, name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 4,
        "global_step": 17,
        "ema": {"shadow": model.state_dict(), "decay": 0.9},
    }
    with opened(tmp_path, saved) as ckpt:
        found = mc.summarize(ckpt)
    training = found.training
    assert found.kind == "training checkpoint"
    assert training is not None
    assert (training.epoch, training.step, training.lr) == (4, 17, [0.1])
    assert (training.groups, training.states, training.scheduler) == (1, 2, True)
    assert training.ema == ["ema.shadow"]
    alike = name in ("Adam", "AdamW") and training.optimizer == "Adam or AdamW"  # of old torch
    assert training.optimizer == name or alike
    tensors = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert training.optimizer_bytes == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    "entries",
    [
        {"rnn.weight_ih_l0": torch.ones(4, 3)},
        {"rnn.weight_ih_l0": torch.tensor(1.0), "rnn.weight_hh_l0": torch.tensor(1.0)},
        {"rnn.weight_ih_l0": torch.ones(4, 3), "rnn.weight_hh_l0": torch.ones(4)},
    ],
)
def test_a_part_of_a_recurrent_layer(entries: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with opened(tmp_path, entries) as ckpt:
        assert [row.kind for row in mc.summarize(ckpt).rows] == ["rnn"]


def test_two_models_are_not_mixed(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    with opened(tmp_path, {"encoder": state, "decoder": state}) as ckpt:
        both = mc.summarize(ckpt)
        assert [row.path for row in both.rows] == ["encoder", "decoder"]
        assert (both.totals.params, both.totals.params_unique) == (12, 6)  # tied here
        with pytest.raises(AmbiguousError):
            ckpt.state_dict()
        assert mc.summarize(ckpt.replace(key=("decoder",))).totals.params == 6


# ---------------------------------------------------------------------- ls

SAVED: dict[str, Any] = {
    "model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": [{"params": [0]}]},
    "state_dict_ema": nn.Linear(2, 2).state_dict(),
    "rng_state": torch.zeros(5, dtype=torch.uint8),
    "extra": [torch.ones(1)],
}


def test_list_tensors(tmp_path: Path) -> None:
    with opened(tmp_path, SAVED) as ckpt:
        rows = mc.list_tensors(ckpt)
        assert [row.name for row in rows] == list(SAVED["model"])
        first, counter = rows[0], rows[-1]
        assert (first.dtype, first.short_dtype, first.shape) == ("float32", "f32", (2, 2))
        assert (first.nbytes, first.section, first.role, first.inferred) == (
            *(16, "model", "parameter", True),
        )
        assert first.requires_grad is None
        assert (counter.name, counter.role) == ("1.num_batches_tracked", "buffer")
        assert [row.role for row in mc.list_tensors(ckpt, role="buffer")] == ["buffer"] * 3
        assert len(mc.list_tensors(ckpt, role="parameter")) == 4
        sections = {row.name: row.section for row in mc.list_tensors(ckpt, section="all")}
        assert sections == {
            **{f"model.{name}": "model" for name in SAVED["model"]},
            "optimizer.state.0.exp_avg": "optimizer",
            "state_dict_ema.weight": "ema",
            "state_dict_ema.bias": "ema",
            "rng_state": "rng",
            "extra.0": None,
        }
        assert list(sections) == list(ckpt.tensors())
        ema = [row.name for row in mc.list_tensors(ckpt, section="ema")]
        assert ema == ["state_dict_ema.weight", "state_dict_ema.bias"]
        assert [r.name for r in mc.list_tensors(ckpt, ["0", "*.weight"])] == [
            *("0.weight", "0.bias", "1.weight"),
        ]
        assert [r.name for r in mc.list_tensors(ckpt, r"^1\.b", regex=True)] == ["1.bias"]
        with pytest.raises(NoMatchError):
            mc.list_tensors(ckpt, "zzz")
        with pytest.raises(UsageError):
            mc.list_tensors(ckpt, section="nowhere")
        grads = {r.name: r.requires_grad for r in mc.list_tensors(ckpt, section="all")}
        assert set(grads.values()) == {None}
        frozen = mc.freeze(ckpt, "0.weight")
        grads = {r.name: r.requires_grad for r in mc.list_tensors(frozen, section="all")}
        assert grads["model.0.weight"] is False
        assert grads["model.0.bias"] is True
        assert grads["state_dict_ema.weight"] is None
    with opened(tmp_path, {"w": torch.ones(1)}) as ckpt, pytest.raises(NoMatchError):
        mc.list_tensors(ckpt, section="ema")


def test_trainability_is_what_the_file_says(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    with opened(tmp_path, model.state_dict()) as ckpt:
        assert set(trainability(ckpt).values()) == {None}
    with opened(tmp_path, model.state_dict(keep_vars=True)) as ckpt:
        grads = trainability(ckpt)
        assert (grads["0.weight"], grads["0.bias"], grads["1.running_mean"]) == (True, False, None)


# ---------------------------------------------------------------------- show

TREE = {
    "epoch": 3,
    "a.b": {"c": [1, (2.5, None)]},
    "text": "two\nlines",
    "model": nn.Linear(2, 3).state_dict(),
    "many": dict.fromkeys(range(9), 0),
    "long": list(range(99)),
}


@pytest.mark.parametrize(
    ("path", "value"), [("epoch", 3), ("a.b.c.0", 1), ("a.b.c.1.0", 2.5), ("long.98", 98)]
)
def test_find(tmp_path: Path, path: str, value: object) -> None:
    with opened(tmp_path, TREE) as ckpt:
        assert values.find(ckpt, path) == value
        assert values.find(ckpt, "model.weight").shape == (3, 2)


def test_find_shows_the_nearest(tmp_path: Path) -> None:
    with opened(tmp_path, TREE) as ckpt, pytest.raises(NoMatchError) as e:
        values.find(ckpt, "epochs")
    assert "epoch" in (e.value.hint or "")


def test_outline(tmp_path: Path) -> None:
    with opened(tmp_path, TREE) as ckpt:
        lines = {line.label: line.text for line in values.outline(ckpt.root)}
    assert lines["epoch"] == "3"
    assert lines["text"] == r"'two\nlines'"
    assert lines["model"] == "state_dict of 2 tensors, 36 bytes"
    assert lines["many"] == "9 entries: 0, 1, 2, …"
    assert lines["long"].startswith("list of 99: ")


def test_outline_of_a_cycle(tmp_path: Path) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    with opened(tmp_path, {"loop": loop}) as ckpt:
        texts = [line.text for line in values.outline(ckpt.root)]
    assert "(refers to itself)" in texts


def test_as_json(tmp_path: Path) -> None:
    with opened(tmp_path, {"x": float("nan"), "y": (1, b"a"), 3: torch.ones(2)}) as ckpt:
        assert values.as_json(ckpt.root) == {
            "x": "nan",
            "y": [1, "a"],
            "3": {"tensor": {"dtype": "float32", "shape": [2]}},
        }


def test_as_many_levels_as_fit(tmp_path: Path) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))

    layers = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(12))})
    model = nn.ModuleDict({"net": nn.ModuleDict({"encoder": layers, "embed": nn.Embedding(9, 4)})})
    with opened(tmp_path, model.state_dict()) as ckpt:
        assert [row.path for row in mc.summarize(ckpt).rows] == [
            "net.encoder.layers.{0-11}.0",
            "net.encoder.layers.{0-11}.1.0",
            "net.encoder.layers.{0-11}.1.1",
            "net.embed",
        ]
        assert len(mc.summarize(ckpt, depth=1).rows) == 1
        found = mc.summarize(ckpt, fold=False)  # the blocks alone are more than four
        assert (found.depth, len(found.rows)) == (4, 13)
        assert len(mc.summarize(ckpt, depth=6, fold=False).rows) == 37
    wide = {f"layer{i}.{j}.weight": torch.zeros(i + 1, j + 1) for i in range(7) for j in range(3)}
    with opened(tmp_path, wide) as ckpt:
        assert len(mc.summarize(ckpt).rows) == 7
    flat = {f"w{i}.weight": torch.zeros(i + 1) for i in range(50)}
    with opened(tmp_path, flat) as ckpt:
        assert len(mc.summarize(ckpt).rows) == 50  # never less than one level


def test_names_of_many_levels_take_no_time(tmp_path: Path) -> None:
    with opened(tmp_path, {".".join(["a"] * 3000) + ".w": torch.zeros(1)}) as ckpt:
        (row,) = mc.summarize(ckpt).rows
        assert row.params == 1


def test_numbers_of_a_fold_in_a_file_that_is_sorted_by_name(tmp_path: Path) -> None:
    """There block 10 comes after block 1: what is said of the run is its least and its greatest."""

    def summarized(*numbers: int, wide: int | None = None) -> list[str]:
        names = sorted(f"h.{i}.fc.weight" for i in numbers)
        state = {n: torch.zeros(5 if n == f"h.{wide}.fc.weight" else 3, 4) for n in names}
        torch.save(state, tmp_path / "h.pt")
        with mc.open(tmp_path / "h.pt") as ckpt:
            return [row.path for row in mc.summary(ckpt, fold=True).rows]

    assert summarized(*range(12)) == ["h.{0-11}.fc"]
    assert summarized(*range(12), wide=5) == ["h.{0-4,10-11}.fc", "h.5.fc", "h.{6-9}.fc"]
    assert summarized(0, 2, 4) == ["h.{0,2,4}.fc"]
    assert summarized(0, 2, 4, 6, 8) == ["h.{0-8}.fc"]  # 5 x says the rest
