"""Write into a checkpoint which parameters train: the freeze record (published, version 1)."""

from __future__ import annotations

from typing import Literal

from ..core.checkpoint import Checkpoint
from ..core.freeze_record import FreezeRecord
from ..core.names import Patterns, as_list, select
from ..core.notes import info, warning
from ..core.records import FREEZE, frozen_names, read_freeze, unread_freeze, write_records
from ..core.tree import rebuild
from ..errors import NoMatchError
from .carry.sections import check_choice, cut_optimizers
from .carry.whole_module import frozen_batchnorm_in_eval, set_requires_grad
from .prefix import wrapper_prefix


def freeze(
    ckpt: Checkpoint,
    pattern: Patterns,
    exclude: Patterns = (),
    regex: bool = False,
    bn_eval: bool = False,
    optimizer: Literal["keep", "drop"] = "keep",
) -> Checkpoint:
    """Record that the parameters that ``pattern`` matches don't train.

    In a whole module it is their ``requires_grad``, and with ``bn_eval`` the mode of BatchNorms
    of which every parameter is frozen. In a state_dict it is the freeze record, which travels in
    it, where torch ignores it; ``summary``, ``ls --long`` and ``modelctl.nn`` read it. It adds to
    what was frozen before. ``bn_eval`` says that frozen BatchNorm layers stay in eval mode, so
    that their statistics don't move either. ``optimizer="drop"`` takes the frozen parameters'
    state out of the optimizer.

    Raises:
        NoMatchError: a pattern matches no parameter.
        RefusedError, AmbiguousError: which optimizer state is the frozen parameters' can't be
            proved.
    """
    check_choice("optimizer", optimizer, ("keep", "drop"))
    model = ckpt.sections.model()
    known = ckpt.packed.parameters(model.tensors())
    chosen = {*select(list(known), pattern, exclude=exclude, regex=regex, what="parameter")}
    before = frozen_names(ckpt)
    # tied names are one parameter: it trains or it doesn't
    tied = {known[name].identity for name in known if name in before or name in chosen}
    frozen = [name for name, ref in known.items() if ref.identity in tied]
    if optimizer == "drop":
        going = {known[name].identity for name in chosen}
        names = {name for name, ref in known.items() if ref.identity in going}
        ckpt = ckpt.replace(root=rebuild(ckpt.root, cut_optimizers(ckpt, names, before)))
    if model.is_module:
        out = _set_flags(ckpt, dict.fromkeys(frozen, False), bn_eval)
    else:
        old = read_freeze(ckpt) or FreezeRecord()
        record = old.now(frozen, _as_given(pattern, exclude), bn_eval)
        out = write_records(ckpt, {FREEZE: record.node()})
    of = len({ref.identity for ref in known.values()})
    out = out.noting(info(f"frozen: {len(tied)} of {of} parameters"))
    if not model.is_module and unread_freeze(ckpt) is not None:
        out = out.noting(warning("a freeze record that can't be understood is replaced"))
    prefix = wrapper_prefix(list(known))
    if prefix and not model.is_module:
        out = out.noting(
            warning(
                f"the names start with '{prefix}': a bare model has other ones",
                "strip-prefix first",
            )
        )
    if len(frozen) == len(known):
        return out.noting(warning("every parameter is frozen: the loss will not move"))
    return out


def _set_flags(ckpt: Checkpoint, trains: dict[str, bool], bn_eval: bool = False) -> Checkpoint:
    """A whole module keeps ``requires_grad`` itself, and the mode of its BatchNorms."""
    ckpt = ckpt.replace(root=set_requires_grad(ckpt.root, ckpt.sections.model().node, trains))
    notes = []
    if bn_eval:
        module = ckpt.sections.model().node
        changed, count = frozen_batchnorm_in_eval(module)
        ckpt = ckpt.replace(root=rebuild(ckpt.root, {id(module): changed}))
        notes.append(
            info(
                f"BatchNorm in eval mode: {count}; model.train() turns them on again, "
                "modelctl.nn.freeze(bn_eval=True) keeps them"
            )
            if count
            else warning("no BatchNorm is frozen: --bn-eval changes nothing")
        )
    return ckpt.noting(*notes)


def unfreeze(
    ckpt: Checkpoint, pattern: Patterns, exclude: Patterns = (), regex: bool = False
) -> Checkpoint:
    """Take the parameters that ``pattern`` matches out of the freeze record.

    Raises:
        NoMatchError: a pattern matches no parameter, or none of the matched ones is frozen.
    """
    model = ckpt.sections.model()
    known = ckpt.packed.parameters(model.tensors())
    chosen = set(select(list(known), pattern, exclude=exclude, regex=regex, what="parameter"))
    before = frozen_names(ckpt)
    if not chosen & before:
        raise NoMatchError(
            f"none of the {len(chosen)} parameters is frozen",
            hint=f"{len(before)} are: see 'modelctl ls --long'" if before else None,
        )
    thawed = {known[name].identity for name in chosen}
    frozen = [name for name in known if name in before and known[name].identity not in thawed]
    if model.is_module:
        out = _set_flags(ckpt, {n: True for n, ref in known.items() if ref.identity in thawed})
    else:
        old = read_freeze(ckpt) or FreezeRecord()
        given = ["!" + one for one in as_list(pattern)]
        record = old.now(frozen, [*given, *as_list(exclude)])
        out = write_records(ckpt, {FREEZE: record.node() if frozen else None})
    still = {known[name].identity for name in frozen}
    of = {ref.identity for ref in known.values()}
    return out.noting(info(f"frozen: {len(still)} of {len(of)} parameters"))


def _as_given(pattern: Patterns, exclude: Patterns) -> list[str]:
    return [*as_list(pattern), *("!" + one for one in as_list(exclude))]


def by_hand(ckpt: Checkpoint, record: str) -> list[str]:
    """The three lines that apply the freeze record, which the expression ``record`` reads, without
    modelctl."""
    kept = read_freeze(ckpt)
    statistics = "(and keep its frozen BatchNorms in eval mode: modelctl.nn does that, too)"
    return [
        f"frozen = {record}['frozen']",
        "for name, parameter in model.named_parameters():",
        "    parameter.requires_grad = name not in frozen",
        *([statistics] if kept is not None and kept.bn_eval else []),
    ]
