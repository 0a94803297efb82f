"""What is odd about a live model, each with its reason and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...core.notes import Note
from ...core.text import some
from ..freezing.batchnorm import held_batchnorms
from ..model_names import is_lazy, slots, unwrap
from .trace import Trace

# What a view keeps alive, against what it uses.
_WASTE_RATIO, _WASTE_BYTES = 4, 1 << 20


def advice(model: nn.Module, copied: nn.Module, trace: Trace | None, mode: str) -> list[Note]:
    """What is odd about a model and what a forward of its copy did, each with the way out."""
    bare = unwrap(model)
    found = [*_frozen(bare), *_moving_statistics(bare), *_dtypes(bare), *_views(bare)]
    if trace is not None:
        found += [*_biases(bare, copied, trace), *_dead(copied, trace, mode)]
    return [Note("advice", text, way_out) for text, way_out in found]


def _frozen(model: nn.Module) -> Iterator[tuple[str, str]]:
    params = [*model.parameters()]
    if params and not any(p.requires_grad for p in params):
        yield "every parameter is frozen: the loss will not move", "mnn.unfreeze(model, 'fc')"


def _moving_statistics(model: nn.Module) -> Iterator[tuple[str, str]]:
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.track_running_stats
        and module.weight is not None
        and not any(p.requires_grad for p in module.parameters())
    ]
    if names:
        yield (
            f"{_count(names, 'frozen BatchNorm')} in train mode ({some(names, 3)}): the running "
            "statistics go on moving, and with them what the layers do",
            "mnn.freeze(model, patterns, bn_eval=True) keeps them in eval mode",
        )


def _dtypes(model: nn.Module) -> Iterator[tuple[str, str]]:
    elements: dict[str, int] = {}
    for p in model.parameters():
        if p.is_floating_point() and not is_lazy(p):
            name = str(p.dtype).removeprefix("torch.")
            elements[name] = elements.get(name, 0) + p.numel()
    if len(elements) > 1:
        shown = ", ".join(f"{n:,} {name}" for name, n in elements.items())
        yield (
            f"parameters of several dtypes ({shown}): operators between them fail or convert",
            ("model.to(dtype) makes them one"),
        )


def _views(model: nn.Module) -> Iterator[tuple[str, str]]:
    used: dict[int, dict[Any, int]] = {}
    kept: dict[int, tuple[str, int]] = {}
    for slot in slots(model):
        if not _has_memory(slot.tensor):
            continue
        storage: Any = slot.tensor.untyped_storage()
        key = storage._cdata
        kept.setdefault(key, (slot.name, storage.nbytes()))
        view = (slot.tensor.storage_offset(), tuple(slot.tensor.shape))
        used.setdefault(key, {})[view] = slot.tensor.numel() * slot.tensor.element_size()
    for key, (name, nbytes) in kept.items():
        uses = sum(used[key].values())
        if nbytes > _WASTE_RATIO * uses and nbytes - uses > _WASTE_BYTES:
            yield (
                f"'{name}' uses {uses:,} of the {nbytes:,} bytes that it keeps alive: torch.save "
                "writes them all",
                "clone() it",
            )


def _has_memory(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and not tensor.is_meta and str(tensor.layout) == "torch.strided"


def _biases(model: nn.Module, copied: nn.Module, trace: Trace) -> Iterator[tuple[str, str]]:
    modules = dict(copied.named_modules())
    held = set(held_batchnorms(model))  # what these subtract stays as it is
    names = list(dict.fromkeys(name for name, norm in trace.normed if norm not in held))
    if names:
        biases: list[Any] = [modules[name].bias for name in names]
        elements = sum(bias.numel() for bias in biases)
        yield (
            f"{_count(names, 'bias', 'biases')} right before BatchNorm ({some(names, 3)}): it "
            f"subtracts the mean, so {elements:,} parameters do nothing",
            "bias=False",
        )


def _dead(model: nn.Module, trace: Trace, mode: str) -> Iterator[tuple[str, str]]:
    touched = trace.touched | trace.touched_in_training
    dead = {name: p for name, p in model.named_parameters() if id(p) not in touched}
    if not dead:
        return
    elements = sum(p.numel() for p in dead.values())
    homes = list(dict.fromkeys(name.rpartition(".")[0] or name for name in dead))
    yield (
        f"{_count([*dead], 'parameter')} ({elements:,} elements) that this forward never touches, "
        f"{mode} mode: {some(homes, 3)}",
        "they get no gradient; DistributedDataParallel wants find_unused_parameters=True for them",
    )


def _count(names: list[str], one: str, several: str | None = None) -> str:
    return f"{len(names):,} {one if len(names) == 1 else several or one + 's'}"
