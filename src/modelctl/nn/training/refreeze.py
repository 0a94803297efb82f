"""A checkpoint's freeze record onto a live model, exactly: what does not train, and what does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...core.freeze_record import FreezeRecord
from ...core.matcher import match_names
from ...core.text import some
from ...errors import RefusedError
from ..freezing.batchnorm import held_batchnorms, release_batchnorms
from ..freezing.freeze import Frozen, apply_record, count_trainable, set_grad
from ..loading.report import LoadReport
from ..model_names import Parameters


class Refreezing:
    """A freeze record that was compared with a model; nothing is changed yet.

    What the record does not name was trained when it was written. What the file does not know at
    all (a part that the model has got since) keeps what it has.

    Attributes:
        change: the parameters whose ``requires_grad`` changes.
    """

    def __init__(self, model: nn.Module, record: FreezeRecord, loaded: LoadReport) -> None:
        self.model, self.record, self.params = model, record, Parameters(model)
        called = self.params.called
        found = match_names(record.frozen, called).values()
        frozen = {n for name in found for n in called[name]}
        known = [*loaded.loaded, *(name for name, _, _ in loaded.mismatched)]
        self.modules = {name.rpartition(".")[0] for name in known}
        grads = {name: p.requires_grad for name, p in self.params.by_name.items()}
        self.thaw = {n for n in {*known} & {*grads} if not grads[n] and n not in frozen}
        self.change = [n for n in grads if n in self.thaw or (n in frozen and grads[n])]

    def run(self) -> Frozen:
        """Thaw what trained, and then freeze what did not."""
        before = count_trainable(self.params)
        thawed = set_grad(self.params, [n for n in self.change if n in self.thaw], True)
        held = [n for n in held_batchnorms(self.model) if n in self.modules]
        held = [] if self.record.bn_eval else held
        released = release_batchnorms(self.model, held)
        frozen = apply_record(self.model, self.record, strict=False)
        return replace(
            frozen,
            changed=(*frozen.changed, *thawed),
            before=before,
            batchnorms=(*released, *frozen.batchnorms),
        )


def check_wrapped(model: nn.Module, params: Parameters, change: Iterable[str]) -> None:
    """Raises RefusedError where what trains would change behind a wrapper that looks once."""
    names = [name for name in change if params.by_name[name].is_floating_point()]
    if names and any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise RefusedError(
            f"resuming changes what trains ({some(names, 3)}), and DistributedDataParallel "
            "looks at that only when it is built",
            hint="resume the bare model, or apply_freeze(model, path) first; then wrap it",
        )
