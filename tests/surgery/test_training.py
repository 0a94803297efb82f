"""Surgery keeps training exact: what goes on from an edited checkpoint takes the steps that the
run would have taken without that, bit for bit.

Each proof trains a net for some steps, saves it as training scripts do, edits the file by commands,
and loads it with plain torch into a net that is built anew. Compared after every further step:
parameters, buffers, optimizer state and learning rates, by name.

A new head makes another loss, and a loss moves the trunk. So the trunk has a loss of its own on its
features, and a head that an edit takes away sees them detached, in both runs: it trains, and moves
nothing but itself. All other losses are the real ones.
"""

from __future__ import annotations

import io
import itertools
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer, lr_scheduler

import modelctl.nn as mnn
from modelctl.cli import run as run_command

BEFORE, AFTER = range(2), range(2, 5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are split by threads, and with them the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------- nets


class Net(nn.Module):
    """A trunk with two heads: a probe of what its first layers make, and the head proper.

    The probe is registered among the trunk's layers: without it most ids are others.
    """

    HEAD: str
    BLOCKS: str  # what the blocks' names begin with,
    RENAMED: str  # and in another code base
    FIRST: tuple[str, ...]  # what a fine-tuning freezes

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those after the first layers, and the last ones."""
        raise NotImplementedError

    @staticmethod
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, alone: Collection[str] = ()) -> Tensor:
        """The loss; the heads that are ``alone`` move nothing but themselves."""
        early, last = self.features(x)
        loss = last.square().mean()
        for name, seen in (("probe", early), (self.HEAD, last)):
            head = getattr(self, name)
            if head is not None:
                loss = loss + cross_entropy(head(seen.detach() if name in alone else seen), y)
        return loss


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return torch.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(Net):
    HEAD, BLOCKS, RENAMED = "fc", "layer", "stage"
    FIRST = ("conv1", "bn1", "layer1")

    def __init__(self, classes: int = 5, blocks: str = BLOCKS, probe: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.probe = nn.Linear(4, 3) if probe else None
        self.stages = (f"{blocks}1", f"{blocks}2")
        self.add_module(self.stages[0], nn.Sequential(Residual(4, 4), Residual(4, 4)))
        self.add_module(self.stages[1], nn.Sequential(Residual(4, 6)))
        self.fc = nn.Linear(6, classes)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = early = torch.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return early.mean((2, 3)), x.mean((2, 3))

    @staticmethod
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        images = torch.randn(4, 3, 6, 6, generator=random)
        return images, torch.randint(3, (4,), generator=random)


class Transformer(Net):
    """Its blocks have the same shapes, and most of its vectors one: only order tells them apart."""

    HEAD, BLOCKS, RENAMED = "head", "blocks", "layers"
    FIRST = ("tok", "pos", "blocks.0")

    def __init__(self, classes: int = 5, blocks: str = BLOCKS, probe: bool = True) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(6, 8))
        self.tok = nn.Embedding(11, 8)
        self.probe = nn.Linear(8, 3) if probe else None
        self.called = blocks
        layers = [nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True) for _ in range(2)]
        self.add_module(blocks, nn.ModuleList(layers))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = early = self.tok(x) + self.pos
        for block in getattr(self, self.called):
            x = block(x)
        return early.mean(1), self.norm(x).mean(1)

    @staticmethod
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(11, (4, 6), generator=random)
        return tokens, torch.randint(3, (4,), generator=random)


NETS: dict[str, type[Net]] = {"resnet": ResNet, "transformer": Transformer}


def fresh(model: str, **options: Any) -> Net:
    """A net with weights that no file has: what was not loaded shows."""
    torch.manual_seed(99)
    return NETS[model](**options)


# ---------------------------------------------------------------------- optimizers, schedulers

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.9, centered=True),
}
# By layout of the param_groups: what is special in each of them.
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "one group": [{}],
    "decay, no decay": [{"weight_decay": 0.1}, {"weight_decay": 0.0}],
    "backbone, head": [{"lr": 0.002}, {"lr": 0.02}],
    "by depth": [{"lr": 0.001}, {"lr": 0.004}, {"lr": 0.02}],
}
OF_ITS_OWN = ("backbone, head", "by depth")  # there the head has the last group
NEW_LR = 0.03
# Those that make each lr of a list with an entry a group, and those that make it of the last lr.
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(
        optimizer,
        [lambda epoch, k=k: 1 / (k + epoch) for k, _ in enumerate(optimizer.param_groups, 2)],
    ),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [0.01 * k for k, _ in enumerate(optimizer.param_groups, 1)], total_steps=8
    ),
    "warm-up, step": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.StepLR(optimizer, 1)],
        [3],
    ),
}


def within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def unwrapped(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


# By (name, what): a tensor of the net, its optimizer state, its settings.
Snapshot = dict[tuple[str, str], Any]


def snapshot(net: nn.Module, optimizer: Optimizer) -> Snapshot:
    """All that the next step depends on."""
    found = {(unwrapped(name), ""): value.clone() for name, value in net.state_dict().items()}
    names = {parameter: unwrapped(name) for name, parameter in net.named_parameters()}
    for group in optimizer.param_groups:
        settings = {key: group[key] for key in group.keys() - {"params", "param_names"}}
        for parameter in group["params"]:
            for key, value in (settings | optimizer.state.get(parameter, {})).items():
                copied = value.clone() if isinstance(value, Tensor) else value
                found[names[parameter], key] = copied
    return found


@dataclass(frozen=True)
class Setup:
    """How a training is built: what a script fixes before its first step."""

    model: str
    kind: str
    layout: str = "one group"
    named: bool = False
    schedule: str = "cosine"

    def __str__(self) -> str:
        names = "names" if self.named else "ids"
        return f"{self.kind}-{self.model}-{self.layout}-{names}"

    @property
    def net(self) -> type[Net]:
        return NETS[self.model]

    def group_of(self, name: str, parameter: Tensor) -> int:
        if self.layout == "decay, no decay":
            return int(parameter.ndim <= 1)
        if within(name, (self.net.HEAD,)):
            return len(LAYOUTS[self.layout]) - 1
        return int(self.layout == "by depth" and not within(name, self.net.FIRST))

    def optimizer(
        self, net: nn.Module, without: Collection[str] = (), backwards: bool = False
    ) -> Optimizer:
        """Over the parameters of a net, or those but some, in order or not."""
        groups: list[dict[str, Any]] = []
        for i, special in enumerate(LAYOUTS[self.layout]):
            mine = {
                name: parameter
                for name, parameter in net.named_parameters()
                if name not in without and self.group_of(unwrapped(name), parameter) == i
            }
            if backwards:
                mine = dict(reversed(mine.items()))
            groups.append({"params": list(mine.values()), **special})
            if self.named:
                groups[-1]["param_names"] = list(mine)
        return OPTIMIZERS[self.kind](groups)

    def scheduler(self, optimizer: Optimizer) -> Any:
        return SCHEDULES[self.schedule](optimizer)

    def join(self, net: Net, optimizer: Optimizer, scheduler: Any) -> None:
        """A new head joins a training that was loaded: in its group, or as one more."""
        named = {f"{net.HEAD}.{name}": p for name, p in getattr(net, net.HEAD).named_parameters()}
        if self.layout in OF_ITS_OWN:
            group = optimizer.param_groups[-1]
            assert group["params"] == []
            group["params"] += named.values()
            if self.named:
                group["param_names"] += named
            return
        group = {"params": list(named.values()), "lr": NEW_LR, "initial_lr": NEW_LR}
        optimizer.add_param_group(group | ({"param_names": list(named)} if self.named else {}))
        scheduler.base_lrs.append(NEW_LR)
        if isinstance(scheduler, lr_scheduler.LambdaLR):
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])

    def train(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        seeds: range,
        alone: Collection[str] = (),
    ) -> list[Snapshot]:
        """Real steps on real batches; what there was after each."""
        found = []
        for seed in seeds:
            optimizer.zero_grad()
            net(*self.net.batch(seed), alone).backward()
            optimizer.step()
            scheduler.step()
            found.append(snapshot(net, optimizer))
        return found


def freeze(net: nn.Module, names: Collection[str]) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda net: net,
    "module.": nn.DataParallel,
    "_orig_mod.": lambda net: torch.compile(net, backend="eager"),
    "module._orig_mod.": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@lru_cache(maxsize=16)
def untouched(
    setup: Setup,
    wrap: str = "",
    alone: tuple[str, ...] = (),
    frozen: tuple[str, ...] = (),
    from_start: bool = False,
) -> tuple[bytes, list[Snapshot]]:
    """A training: the checkpoint that it wrote on its way, and how it went on, as if it hadn't.

    What is ``frozen`` trains until then, or was never in the optimizer.
    """
    torch.manual_seed(0)
    bare = setup.net()
    net = WRAPS[wrap](bare)
    cold = [name for name, _ in net.named_parameters() if within(unwrapped(name), frozen)]
    optimizer = setup.optimizer(net, cold if from_start else ())
    scheduler = setup.scheduler(optimizer)
    if from_start:
        freeze(net, cold)
    setup.train(net, optimizer, scheduler, BEFORE)
    file = io.BytesIO()
    parts = {"model": net, "optimizer": optimizer, "scheduler": scheduler}
    saved = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**saved, "epoch": len(BEFORE)}, file)
    freeze(net, cold)
    return file.getvalue(), setup.train(net, optimizer, scheduler, AFTER, alone)


# ---------------------------------------------------------------------- edits

RECIPE = """
[[edit]]
do = "strip-prefix"

[[edit]]
do = "strip-head"

[[edit]]
do = "drop"
pattern = "probe"

[[edit]]
do = "freeze"
pattern = {patterns}
optimizer = "drop"

[[edit]]
do = "rename"
map = "{blocks}*={renamed}*"
"""


def modelctl(line: str) -> None:
    assert run_command(shlex.split(line)) == 0, line


@dataclass(frozen=True)
class Edit:
    """Commands that make ``out.pt`` of ``in.pt``, and what they are to do to the net."""

    commands: str
    wrap: str = ""
    loses: tuple[str, ...] = ()  # heads
    renames: bool = False
    freezes: bool = False
    filters: bool = False  # what is frozen is not in the optimizer, now
    from_start: bool = False  # or since the start

    def run(self, net: type[Net], command: Callable[[str], None] = modelctl) -> None:
        words = {
            "head": net.HEAD,
            "blocks": net.BLOCKS,
            "renamed": net.RENAMED,
            "first": " ".join(f"--pattern {name}" for name in net.FIRST),
            "patterns": list(net.FIRST),
        }
        Path("all.toml").write_text(RECIPE.format(**words))
        for line in self.commands.format(**words).strip().splitlines():
            command(line)

    def lost(self, net: type[Net]) -> tuple[str, ...]:
        return tuple(name.format(head=net.HEAD) for name in self.loses)

    def left(self, net: type[Net], snapshots: list[Snapshot]) -> list[Snapshot]:
        """What of a run the edit leaves, under the names that it gives."""
        lost = self.lost(net)

        def stays(name: str, what: str) -> bool:
            filtered = self.filters and what and within(name, net.FIRST)
            return not filtered and not within(name, lost)

        def now(name: str) -> str:
            return name.replace(net.BLOCKS, net.RENAMED, 1) if self.renames else name

        return [
            {(now(name), what): value for (name, what), value in one.items() if stays(name, what)}
            for one in snapshots
        ]

    def kept(self, net: type[Net], snapshots: list[Snapshot]) -> list[Snapshot]:
        """A run that goes on after the edit, without the head that is new in it."""
        lost = self.lost(net)
        return [
            {key: value for key, value in one.items() if not within(key[0], lost)}
            for one in snapshots
        ]


EDITS = {
    "strip-head": Edit("strip-head in.pt -o out.pt", loses=("{head}",)),
    "drop": Edit("drop in.pt --pattern probe -o out.pt", loses=("probe",)),
    "keep": Edit(
        "keep in.pt --pattern '*' --exclude probe --exclude {head} -o out.pt",
        loses=("probe", "{head}"),
    ),
    "rename": Edit("rename in.pt --map '{blocks}*={renamed}*' -o out.pt", renames=True),
    "freeze": Edit("freeze in.pt {first} -o out.pt", freezes=True),
    "freeze --optimizer drop": Edit(
        "freeze in.pt {first} --optimizer drop -o out.pt", freezes=True, filters=True
    ),
    "strip-prefix": Edit("strip-prefix in.pt -o out.pt", "module."),
    "apply": Edit(
        "apply all.toml in.pt -o out.pt",
        wrap="module.",
        loses=("probe", "{head}"),
        renames=True,
        freezes=True,
        filters=True,
    ),
    # the weights go through another format, the rest of the checkpoint comes back to them
    "convert, merge": Edit(
        """
        strip-head in.pt -o stripped.pt
        convert stripped.pt --weights-only -o weights.safetensors
        merge --model weights.safetensors --optimizer stripped.pt --scheduler stripped.pt -o out.pt
        """,
        loses=("{head}",),
    ),
}


def rebuilt(setup: Setup, edit: Edit) -> Net:
    """The net that an edit was made for, with weights of its own."""
    lost = edit.lost(setup.net)
    return fresh(
        setup.model,
        classes=3 if setup.net.HEAD in lost else 5,
        blocks=setup.net.RENAMED if edit.renames else setup.net.BLOCKS,
        probe="probe" not in lost,
    )


def go_on(
    setup: Setup, edit: Edit, spoil: Callable[[dict[str, Any]], None] | None = None
) -> list[Snapshot]:
    """Train on from ``out.pt``, as a script does with torch alone."""
    saved = torch.load("out.pt", weights_only=True)
    net = rebuilt(setup, edit)
    lost = edit.lost(setup.net)
    new = [name for name, _ in net.named_parameters() if within(name, lost)]
    result = net.load_state_dict(saved["model"], strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (new, [])

    frozen: list[str] = []
    if edit.freezes:
        frozen = saved["model"]._metadata[""]["modelctl.freeze"]["frozen"]
        freeze(net, frozen)
    optimizer = setup.optimizer(net, [*new, *(frozen if edit.filters else ())])
    scheduler = setup.scheduler(optimizer)
    check(saved["optimizer"], optimizer)
    if spoil is not None:
        spoil(saved["optimizer"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    if new:
        setup.join(net, optimizer, scheduler)
    return setup.train(net, optimizer, scheduler, AFTER, lost)


def check(saved: dict[str, Any], optimizer: Optimizer) -> None:
    """A saved optimizer's ids and names are those that torch would give it over the edited net."""
    live = optimizer.state_dict()["param_groups"]
    for key in ("params", "param_names"):
        assert [one.get(key) for one in saved["param_groups"]] == [one.get(key) for one in live]
    assert list(saved["state"]) == [i for group in live for i in group["params"]]


def differences(run: list[Snapshot], other: list[Snapshot]) -> list[tuple[int, str, str]]:
    """Where two runs are not the same to the last bit: step, name, and what of it."""
    return [
        (step, *key)
        for step, (mine, theirs) in enumerate(zip(run, other, strict=True))
        for key in mine | theirs
        if not equal(mine.get(key), theirs.get(key))
    ]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------------- the proofs


# What takes nothing out of the optimizer, or a head like others: one net under each is enough.
GENTLE = ("rename", "freeze", "strip-prefix", "drop", "keep")


def cases() -> list[Any]:
    """Each edit of each net under each optimizer. The layouts of groups take turns, and so do
    names and none; where the head goes, which moves most, there is each layout."""
    found = []
    trainings = itertools.product(NETS, OPTIMIZERS)
    for (t, training), (e, edit) in itertools.product(enumerate(trainings), enumerate(EDITS)):
        if edit in GENTLE and (e + t) % 2:
            continue
        for at, layout in enumerate(("one group", "decay, no decay", "backbone, head")):
            if edit == "strip-head" or (e + t) % 3 == at:
                schedule = "lambda" if "decay" in layout else "cosine"
                setup = Setup(*training, layout, (t + at) % 2 == 1, schedule)
                found.append(pytest.param(EDITS[edit], setup, id=f"{edit}-{setup}"))
    return found


@pytest.mark.parametrize(("edit", "setup"), cases())
def test_training_goes_on_exactly(edit: Edit, setup: Setup) -> None:
    assert changed(edit, setup) == []


def changed(
    edit: Edit,
    setup: Setup,
    command: Callable[[str], None] = modelctl,
    spoil: Callable[[dict[str, Any]], None] | None = None,
) -> list[tuple[int, str, str]]:
    """What an edit changes of the next steps of a training."""
    net = setup.net
    expected = interrupted(setup, edit)
    edit.run(net, command)
    found = go_on(setup, edit, spoil)
    return differences(edit.kept(net, found), edit.left(net, expected))


def interrupted(setup: Setup, edit: Edit) -> list[Snapshot]:
    """A training writes ``in.pt``; how it went on."""
    frozen = setup.net.FIRST if edit.freezes else ()
    file, expected = untouched(setup, edit.wrap, edit.lost(setup.net), frozen, edit.from_start)
    Path("in.pt").write_bytes(file)
    return expected


@pytest.mark.parametrize("wrap", ["_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(("kind", "model"), [("adamw", "transformer"), ("sgd", "resnet")])
def test_what_compiled_nets_wrote(kind: str, model: str, wrap: str) -> None:
    """They run the code that torch makes of the net; what was bare then takes the same steps."""
    edit = Edit("strip-prefix in.pt -o out.pt", wrap)
    assert changed(edit, Setup(model, kind, named=model == "transformer")) == []


def in_a_process(line: str) -> None:
    command = [sys.executable, "-m", "modelctl", *shlex.split(line)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("edit", ["strip-head", "apply"])
def test_a_process_of_its_own(edit: str) -> None:
    assert changed(EDITS[edit], Setup("transformer", "adamw"), in_a_process) == []


@pytest.mark.parametrize("named", [False, True], ids=["ids", "names"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_on_in_every_group(schedule: str, named: bool) -> None:
    """The head's group stays when it is empty: the new head has the lr that the old one had."""
    setup, edit = Setup("resnet", "sgd", "by depth", named, schedule), EDITS["strip-head"]
    expected = interrupted(setup, edit)
    edit.run(setup.net)
    found = go_on(setup, edit)
    assert differences(edit.kept(setup.net, found), edit.left(setup.net, expected)) == []
    weight = f"{setup.net.HEAD}.weight"
    lrs = [[one[weight, "lr"] for one in run] for run in (found, expected)]
    assert lrs[0] == lrs[1]
    assert len({*lrs[0]}) == len(AFTER)


# ---------------------------------------------------------------------- resuming by modelctl.nn


@pytest.mark.parametrize("named", [False, True], ids=["ids", "names"])
@pytest.mark.parametrize("edit", ["rename", "strip-prefix", "drop", "freeze", "apply"])
def test_resumed(edit: str, named: bool) -> None:
    """Where names are recorded, even by an optimizer that has the parameters in another order."""
    setup, edited = Setup("transformer", "adamw", "backbone, head", named), EDITS[edit]
    expected = interrupted(setup, edited)
    edited.run(setup.net)
    net = rebuilt(setup, edited)
    lost = edited.lost(setup.net)
    if net.HEAD in lost:
        setattr(net, net.HEAD, None)
    if edited.freezes:
        mnn.apply_freeze(net, "out.pt")
    cold = [name for name, p in net.named_parameters() if not p.requires_grad]
    optimizer = setup.optimizer(net, cold if edited.filters else (), backwards=named)
    scheduler = setup.scheduler(optimizer)
    state = mnn.resume("out.pt", model=net, optimizer=optimizer, scheduler=scheduler)
    assert state.epoch == len(BEFORE)
    assert (state.missing, state.unused, state.joined, state.fresh) == (("rng",), (), (), ())
    found = setup.train(net, optimizer, scheduler, AFTER, lost)
    assert differences(found, edited.left(setup.net, expected)) == []


# ---------------------------------------------------------------------- which state is whose

# What is frozen never was in the optimizer: its ids begin behind that.
FILTERED = Edit(
    """
    freeze in.pt {first} -o frozen.pt
    strip-head frozen.pt -o out.pt
    """,
    loses=("{head}",),
    freezes=True,
    filters=True,
    from_start=True,
)
HARD = {"one group": FILTERED, "by depth": EDITS["strip-head"]}


@pytest.mark.parametrize("layout", HARD)
@pytest.mark.parametrize(
    ("model", "named"), [("resnet", False), ("resnet", True), ("transformer", True)]
)
def test_a_part_of_the_net_in_a_group(model: str, named: bool, layout: str) -> None:
    """Names say which part it is, or shapes that fit only there."""
    assert changed(HARD[layout], Setup(model, "adamw", layout, named)) == []


@pytest.mark.parametrize(("kind", "layout"), list(zip(["adafactor", "adamw"], HARD, strict=True)))
def test_blocks_of_one_shape_need_names(
    kind: str, layout: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup, edit = Setup("transformer", kind, layout), HARD[layout]
    expected = interrupted(setup, edit)
    before = Path("in.pt").read_bytes()
    for command in (
        "strip-head in.pt",
        "drop in.pt --pattern probe",
        "keep in.pt --pattern blocks",
    ):
        assert run_command([*shlex.split(command), "-o", "out.pt"]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert "ways, and it does not record their names" in error
        assert "--optimizer drop leaves the optimizer out" in hint
        assert "named_parameters()" in hint
    assert [path.name for path in place.iterdir()] == ["in.pt"]
    assert Path("in.pt").read_bytes() == before

    # both ways out: without the optimizer, or with one that takes the state and records names
    modelctl("strip-head in.pt --optimizer drop -o without.pt")
    assert list(torch.load("without.pt", weights_only=True)) == ["model", "epoch"]
    saved = torch.load("in.pt", weights_only=True)
    setup = replace(setup, named=True)
    net = setup.net()
    cold = [name for name, _ in net.named_parameters() if within(name, net.FIRST)]
    optimizer = setup.optimizer(net, cold if edit.filters else ())
    names = [group["param_names"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["param_names"] = own  # torch before 2.6 takes the groups of the file, whole
    torch.save({**saved, "optimizer": optimizer.state_dict()}, "in.pt")
    edit.run(setup.net)
    assert differences(edit.kept(net, go_on(setup, edit)), edit.left(net, expected)) == []


@pytest.mark.parametrize("named", [False, True], ids=["ids", "names"])
def test_weights_whose_names_are_sorted(named: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As safetensors' own writer leaves them: their order is not that of the ids. They go together
    and resume, but nothing is cut out of an optimizer that doesn't know names."""
    setup, edit = Setup("transformer", "adamw", "decay, no decay", named, "lambda"), Edit("")
    expected = interrupted(setup, edit)
    save_file(torch.load("in.pt", weights_only=True)["model"], "sorted.safetensors")
    modelctl("merge --model sorted.safetensors --optimizer in.pt --scheduler in.pt -o out.pt")
    assert ("the model's are sorted" in capsys.readouterr().err) is not named
    assert differences(go_on(setup, edit), expected) == []
    code = run_command(shlex.split("drop out.pt --pattern blocks.1 -o less.pt"))
    assert code == (0 if named else 2)
    if named:
        less = torch.load("less.pt", weights_only=True)["optimizer"]
        whole = torch.load("out.pt", weights_only=True)["optimizer"]
        assert by_recorded(less) == {
            name: state
            for name, state in by_recorded(whole).items()
            if not name.startswith("blocks.1.")
        }
    else:
        assert "the model's are sorted" in capsys.readouterr().err
        assert not Path("less.pt").exists()


def by_recorded(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of each name that an optimizer records, in plain lists."""
    return {
        name: {key: value.tolist() for key, value in optimizer["state"][i].items()}
        for group in optimizer["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }


@pytest.mark.parametrize("order", [list, sorted])
def test_block_10_is_not_block_2(order: Callable[[Any], list[str]]) -> None:
    """Sorted, it stands in its place, and everything fits: the wrong state would go."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    names = [[name for name, p in net.named_parameters() if p.ndim == ndim] for ndim in (2, 1)]
    net(torch.ones(1, 2)).sum().backward()
    optimizer = torch.optim.AdamW([{"params": [net.get_parameter(n) for n in g]} for g in names])
    optimizer.step()
    saved = optimizer.state_dict()
    model = {name: net.state_dict()[name] for name in order(net.state_dict())}
    torch.save({"model": model, "optimizer": saved}, "in.pt")
    code = run_command(shlex.split("drop in.pt --pattern 10 -o out.pt"))
    assert code == (2 if order is sorted else 0)
    if code == 0:
        left = torch.load("out.pt", weights_only=True)["optimizer"]["state"]
        stay = [i for i, name in enumerate(itertools.chain(*names)) if not name.startswith("10.")]
        for new, old in enumerate(stay):
            assert torch.equal(left[new]["exp_avg"], saved["state"][old]["exp_avg"])


@pytest.mark.parametrize("named", [False, True], ids=["ids", "names"])
def test_a_tied_tensor_that_stays_under_its_other_name(named: bool) -> None:
    """It stands elsewhere among the parameters then, and its state among the ids."""
    layers = {"tok": nn.Embedding(4, 4), "fc": nn.Linear(4, 4, bias=False)}
    net = nn.Sequential(OrderedDict(**layers, out=nn.Linear(4, 4, bias=False)))
    net.out.weight = net.tok.weight
    optimizer = torch.optim.AdamW(net.named_parameters() if named else net.parameters())
    net(torch.tensor([0, 1])).square().sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, "in.pt")
    modelctl("drop in.pt --pattern tok -o out.pt")

    rest = nn.Sequential(OrderedDict(fc=net.fc, out=net.out))
    saved = torch.load("out.pt", weights_only=True)
    again = torch.optim.AdamW(rest.named_parameters() if named else rest.parameters())
    check(saved["optimizer"], again)
    again.load_state_dict(saved["optimizer"])
    for parameter in rest.parameters():
        assert torch.equal(again.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


# ---------------------------------------------------------------------- that the proofs can fail

EACH = list(zip(OPTIMIZERS, itertools.cycle(NETS), strict=False))


@pytest.mark.parametrize(("kind", "model"), EACH)
def test_everything_moves(kind: str, model: str) -> None:
    """Else it would be no proof that it is the same."""
    _, run = untouched(Setup(model, kind))
    for one, after in itertools.pairwise(run):
        moving = [key for key, value in one.items() if isinstance(value, Tensor)]
        assert [key for key in moving if torch.equal(one[key], after[key])] == []


@pytest.mark.parametrize(("kind", "model"), EACH)
def test_swapped_state_shows(kind: str, model: str) -> None:
    """Of two layers of one shape, in the one block and the other: torch loads it without a word."""
    setup = Setup(model, kind, named=True)
    layer = {"resnet": "layer1.{}.conv.weight", "transformer": "blocks.{}.linear1.weight"}[model]
    twins = {layer.format(0), layer.format(1)}

    def swap(optimizer: dict[str, Any]) -> None:
        names = optimizer["param_groups"][0]["param_names"]
        one, other = (names.index(name) for name in sorted(twins))
        state = optimizer["state"]
        state[one], state[other] = state[other], state[one]

    found = changed(EDITS["strip-head"], setup, spoil=swap)
    assert {name for step, name, what in found if step == 0 and not what} == twins
    trunk = {name for name, _ in setup.net().named_parameters() if not name.startswith("probe")}
    assert trunk - {name for _, name, what in found if not what} == {
        name for name in trunk if within(name, (setup.net.HEAD,))
    }


@pytest.mark.parametrize(("kind", "model"), EACH[:2])
def test_lost_state_shows(kind: str, model: str) -> None:
    setup = Setup(model, kind)
    found = changed(EDITS["strip-head"], setup, spoil=lambda optimizer: optimizer["state"].clear())
    kept = {name for name, _ in setup.net().named_parameters()}
    kept -= {name for name in kept if within(name, (setup.net.HEAD,))}
    assert kept == {name for step, name, what in found if step == 0 and not what}


@pytest.mark.parametrize("model", NETS)
def test_old_ids_show(model: str) -> None:
    """Behind a head in the middle, which left, ids that were not issued anew are another's."""
    setup = Setup(model, "adamw")
    behind = [name for name, _ in setup.net().named_parameters()]
    at = behind.index("probe.weight")

    def keep_ids(optimizer: dict[str, Any]) -> None:
        state = optimizer["state"]
        optimizer["state"] = {i + 2 * (i >= at): one for i, one in state.items()}

    with pytest.raises(RuntimeError, match="size of tensor"):
        changed(EDITS["drop"], setup, spoil=keep_ids)
