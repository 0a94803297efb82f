"""docs/training-tricks.md: every block is run, a trick in a namespace of its own."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
np = pytest.importorskip("numpy")

PAGE = Path(__file__).parents[1] / "docs" / "training-tricks.md"
TEXT = PAGE.read_text("utf-8")
INTRO, *PARTS = re.split(r"^### ", TEXT, flags=re.M)
TRICKS = {part.partition("\n")[0]: part.partition("\n")[2] for part in PARTS}
_BLOCK = re.compile(r"^```python(.*)\n((?:.*\n)*?)```$", re.M)
_NEEDS = re.compile(r"needs=(\w+)")
# What the page has to have, by words of the heading that has it.
ASKED = """choosing gpus; several; traffic; contiguous; as_tensor; workers and pinned memory;
normalising; one image; one-hot; batch size and lr; output sizes; pretrained; dropping layers;
bias before batchnorm; saving a model; two ways to freeze; what the optimizer gets;
checking what is fixed; frozen batchnorm; lora; different lr; lr decay; warm-up and cosine;
onecycle; cycliclr; range test; adamw and fused; lars; zero_grad; gradient clipping; accumulation;
label smoothing; amp; activation checkpointing; averaged weights; eval and train;
validation without memory; resuming; seeds; cudnn.benchmark; debug tools; loop helpers; grid"""


def blocks(text: str, library: str = "") -> list[str]:
    """The blocks that need nothing else, and those that need the library, in the page's order."""
    found = [(_NEEDS.findall(info), code) for info, code in _BLOCK.findall(text)]
    return [code for needs, code in found if needs in ([], [library])]


def runs() -> Iterator[tuple[str, str]]:
    """Each trick with what is always there, and once more with each library that it names."""
    for trick, text in TRICKS.items():
        yield trick, ""
        yield from ((trick, library) for library in dict.fromkeys(_NEEDS.findall(text)))


(START,) = blocks(INTRO)


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, torchrun's variables for one process, and the settings put back."""
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        monkeypatch.setenv(name, value)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    cudnn.benchmark, cudnn.deterministic = flags


@pytest.mark.parametrize(("trick", "library"), list(runs()))
def test_every_block_runs_and_what_it_asserts_is_so(trick: str, library: str) -> None:
    if library:
        pytest.importorskip(library)
    code = blocks(TRICKS[trick], library)
    space = {"__name__": "tricks"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in (START, *code):
            exec(compile(block, f"{PAGE.name}: {trick}", "exec"), space)


def test_no_block_is_overlooked() -> None:
    fences = re.findall(r"^```(\S+)(.*)$", TEXT, re.M)
    assert {kind for kind, _ in fences} == {"python"}
    found = sum(len(blocks(TRICKS[trick], library)) for trick, library in runs() if library)
    plain = sum(len(blocks(text)) for text in TRICKS.values())
    again = sum(len(blocks(TRICKS[trick])) for trick, library in runs() if library)
    assert plain + found - again == len(fences) - 1  # the start is one of them


def test_each_trick_says_its_trap() -> None:
    assert [name for name, text in TRICKS.items() if "**Trap.**" not in text] == []
    assert [name for name, text in TRICKS.items() if not _BLOCK.search(text)] == []


def test_everything_that_was_asked_for_is_there() -> None:
    wanted = [words.strip() for words in ASKED.replace("\n", " ").split(";")]
    lower = [name.lower() for name in TRICKS]
    found = {words: [name for name in lower if words in name] for words in wanted}
    assert {words: len(names) for words, names in found.items()} == dict.fromkeys(wanted, 1)
    assert len(wanted) == len(TRICKS)


def test_the_contents_name_every_trick_once_and_links_lead_somewhere() -> None:
    def anchor(heading: str) -> str:  # as GitHub makes it
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    anchors = [anchor(name) for name in TRICKS]
    contents = re.findall(r"\]\(#([^)]+)\)", INTRO)
    assert contents == anchors
    assert {*re.findall(r"\]\(#([^)]+)\)", TEXT)} == {*anchors}


def _early_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1  # before anything was trained with 1.0
    optimizer.step()


def _old_weights() -> None:
    pytest.importorskip("torchvision.models").resnet18(pretrained=False)


def _old_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(2, 2)
    out = checkpoint(layer, torch.ones(1, 2), use_reentrant=True)
    assert not out.requires_grad  # so that layer gets no gradient


# What torch itself says of what is struck out.
SAID = {
    "scheduler.step() first": (_early_scheduler, r"before `optimizer\.step\(\)`"),
    "pretrained=True": (_old_weights, "'pretrained' is deprecated since 0.13"),
    "torch.cuda.amp": (lambda: torch.cuda.amp.autocast(), r"torch\.amp\.autocast\('cuda'"),
    "GradScaler": (lambda: torch.cuda.amp.GradScaler(), r"torch\.amp\.GradScaler\('cuda'"),
    "reentrant": (_old_checkpointing, "Gradients will be None"),
    "clip_grad_norm": (
        lambda: torch.nn.utils.clip_grad_norm([torch.nn.Parameter(torch.ones(1))], 1.0),
        "deprecated",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAID)
def test_torch_warns_of_it_too(name: str) -> None:
    call, message = SAID[name]
    with pytest.warns(match=message):
        call()


def test_running_statistics_that_move_twice_can_be_made_up_for() -> None:
    """Of activation checkpointing: the momentum that the page gives."""
    x = torch.randn(8, 3)
    once, twice = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, momentum=1 - (1 - 0.1) ** 0.5)
    once(x)
    twice(x)
    twice(x)
    torch.testing.assert_close(once.running_var, twice.running_var)


def test_a_bias_before_batchnorm_belongs_in_its_mean() -> None:
    conv, bn, x = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.randn(8, 3, 5, 5)
    bn(conv(x))
    bn.eval()
    out = bn(conv(x))
    bn.running_mean -= conv.bias.detach()
    conv.bias = None
    torch.testing.assert_close(bn(conv(x)), out)


def test_lines_are_short() -> None:
    assert [line for line in TEXT.splitlines() if len(line) > 100] == []
