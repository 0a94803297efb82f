"""The live view of a model: output shapes, parameters, MACs and memory, without side effects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ...core.notes import Note
from ...core.text import shape, short, some, table
from ...errors import UsageError
from ..devices import choose_device
from ..model_names import kind_of, unwrap
from .advice import advice
from .inputs import Dtypes, Inputs, Sizes, from_data, from_shapes
from .model_copy import Copy, structural_copy
from .rows import Layer, Totals, deepest, fitting, folded_if, layers, totals
from .said import Shapes, describe
from .trace import ForwardError, Trace, trace

_FEW = 6
# an error on the number of dimensions: "Expected 3D (unbatched) or 4D (batched) input"
_RANK = re.compile(r"\b[1-6]-?D\b")


@dataclass(frozen=True)
class ModelSummary:
    """What :func:`summary` found; ``print()`` shows it.

    Attributes:
        name: the model's class.
        rows: a :class:`Layer` a module, in the order of ``named_modules``; whatever the depth,
            they sum to the totals.
        totals: parameters, MACs, FLOPs and memory of the whole model.
        inputs: what the forward got, in words; None where none was run.
        batch: the batch dimension that was added to the shapes, or None.
        output: the shape of what the model returns, or a mapping of shapes.
        uncounted: (operator, module, calls) of what has matrix products or convolutions inside,
            for all that is known, but no formula: totals are lower bounds then.
        advice: what is odd and why, with the way out.
        mode: ``"eval"`` or ``"train"``. device: ``"meta"``, or where it was run for real.
        depth: how many levels have rows; None: all. deepest: how many there are.
    """

    name: str
    rows: list[Layer]
    totals: Totals
    inputs: str | None
    batch: int | None
    output: Shapes | None
    uncounted: list[tuple[str, str, int]]
    advice: list[Note]
    mode: str
    device: str
    depth: int | None
    deepest: int

    def __str__(self) -> str:
        names, cells, right = cells_of(self)
        lines = [title(self), "", table(names, cells, right), "", *foot(self)]
        for note in self.advice:
            lines.append(str(note))
            if note.way_out:
                lines.append(f"  hint: {note.way_out}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)  # what a notebook or the prompt shows


@torch.inference_mode(False)  # what autograd keeps is part of the view
def summary(
    model: nn.Module,
    input_size: Sizes | None = None,
    *,
    input_data: Any = None,
    dtypes: Dtypes = None,
    batch_size: int | None = 1,
    depth: int | str = "auto",
    fold: bool | None = None,
    mode: Literal["eval", "train"] = "eval",
    device: str | int | torch.device = "meta",
    **kwargs: Any,
) -> ModelSummary:
    """Output shapes, parameters, MACs and memory of a model, layer by layer.

    ``print(summary(model, (3, 224, 224)))``. The forward is of a copy on ``meta``: shapes without
    values, so that a model of any size takes milliseconds and no memory. The model itself is not
    called, moved or changed, its hooks aside: those run, and what they do to objects of their own,
    they do. A cache outside the model that its forward fills gets the copy's tensors. Random number
    generators are as before. Wrappers (DataParallel, DistributedDataParallel, ``torch.compile``)
    are taken off. Of a TorchScript program all that it does is the root's row.

    Args:
        input_size: the shape of the input without the batch dimension, which is added; where the
            forward fails on that, the shape as it is. Several inputs: a list of shapes; keyword
            inputs: a mapping of shapes. Without it and ``input_data`` nothing is run, and rows
            have parameters alone.
        input_data: tensors instead: one, a tuple or list of positional inputs, a mapping of
            keyword inputs. Only their shapes and dtypes count on ``meta``.
        dtypes: of the inputs: one for all, one for each, or a mapping of names; by default that
            of the model's parameters.
        batch_size: what is added to ``input_size``; None: nothing.
        depth: levels of modules that have rows: a number, ``"all"``, or ``"auto"``: as many as
            fit into 60 rows.
        fold: blocks that are alike in one row; by default where there would be over 60.
        mode: the forward is of a model in this mode. Saved activations depend on it.
        device: ``"meta"``, or where to run a copy with values for real: for models whose
            shapes depend on values.
        **kwargs: handed on to the forward.

    MACs are counted at torch's dispatcher (see :mod:`modelctl.nn.view.macs`): attention, einsum
    and functional calls count like modules, in train mode as in eval mode.

    Raises:
        ForwardError: the model's forward raised; names the module, shows the real error.
        UsageError: not a model, a shape or a depth.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a torch.nn.Module is expected, not {type(model).__name__}",
            hint="for a checkpoint there is 'modelctl summary FILE'",
        )
    if mode not in ("eval", "train"):
        raise UsageError(f"mode is 'eval' or 'train', not {mode!r}")
    levels = _levels(depth)
    if input_size is not None and input_data is not None:
        raise UsageError("input_size and input_data say the same: give one")
    where, bare = _where(device), unwrap(model)
    tries: list[Inputs] = []
    if input_size is not None:
        tries = from_shapes(bare, input_size, dtypes, batch_size, where, kwargs)
    elif input_data is not None:
        tries = [from_data(input_data, where, kwargs)]
    made, seen, used = _first_that_runs(bare, tries, where, mode)
    if seen is not None and used is not None:
        _look_again(made, seen, used, where, mode)
    copied = made.model
    if levels == "auto":
        rows, shown = fitting(copied, seen, fold)
    else:
        rows = folded_if(layers(copied, seen, levels), fold)
        shown = levels
    return ModelSummary(
        name=kind_of(bare),
        rows=rows,
        totals=totals(copied, seen),
        inputs=None if used is None else describe((*used.args, *used.kwargs.values())),
        batch=None if used is None else used.batch,
        output=None if seen is None else seen.output,
        uncounted=[(op, name, n) for (op, name), n in (seen.uncounted if seen else {}).items()],
        advice=advice(model, copied, seen, mode),
        mode=mode,
        device=str(where),
        depth=shown,
        deepest=deepest(copied),
    )


def _levels(depth: int | str) -> Any:
    if depth in ("all", "auto"):
        return None if depth == "all" else depth
    if isinstance(depth, int) and not isinstance(depth, bool) and depth > 0:
        return depth
    raise UsageError(f"depth is a number from 1, 'all' or 'auto', not {depth!r}")


def _where(device: str | int | torch.device) -> torch.device:
    return torch.device("meta") if str(device) == "meta" else choose_device(device)


def _first_that_runs(
    model: nn.Module, tries: list[Inputs], where: torch.device, mode: str
) -> tuple[Copy, Trace | None, Inputs | None]:
    """A copy, and what the first inputs did that it takes; where none do, the error of those that
    came furthest."""
    errors: list[ForwardError] = []
    for inputs in tries:
        saving, from_python = True, False
        while True:
            copied = _copy(model, where, mode)
            try:
                found = trace(copied, inputs.args, inputs.kwargs, where, saving, from_python)
                return copied, found, inputs
            except ForwardError as e:
                if saving and e.backward:  # it takes gradients itself
                    saving = False
                elif e.values and not from_python:
                    from_python = True
                else:
                    errors.append(e)
                    break
    if errors:
        error = max(errors, key=lambda one: one.modules)
        if error is errors[0] and len(errors) > 1 and _RANK.search(str(error)):
            error.hint = error.hint or "batch_size=None takes the shape as it is, without a batch"
        elif len(errors) == 1 and _RANK.search(str(error)):
            error.hint = error.hint or "the shape is taken whole, the batch dimension and all"
        raise error
    return _copy(model, where, mode), None, None


def _copy(model: nn.Module, where: torch.device, mode: str) -> Copy:
    copied = structural_copy(model, where)
    with suppress(NotImplementedError):  # an exported program keeps the mode it was exported in
        copied.model.train(mode == "train")
    return copied


def _look_again(copied: Copy, seen: Trace, inputs: Inputs, where: torch.device, mode: str) -> None:
    """What a forward in eval mode leaves out may be for training alone (auxiliary heads)."""
    own = {id(p) for p in copied.model.parameters()}
    if mode == "eval" and not own <= seen.touched:
        copied.model.train()
        # BatchNorm does not train on one value; where neither runs, eval mode has to do
        for one in (inputs.doubled(), inputs):
            with suppress(ForwardError):
                again = trace(copied, one.args, one.kwargs, where, from_python=True)
                seen.touched_in_training = again.touched
                break
        copied.model.eval()


# ---------------------------------------------------------------------- for people


def title(found: ModelSummary) -> str:
    parts = [found.name]
    if found.inputs is not None:
        added = f" (batch of {found.batch} added)" if found.batch is not None else ""
        parts.append(f"input {found.inputs}{added}")
        how = "on meta, nothing moved" if found.device == "meta" else f"run on {found.device}"
        parts.append(f"{found.mode} mode, {how}")
    return " · ".join(parts)


def cells_of(found: ModelSummary) -> tuple[list[str], list[list[str]], list[int]]:
    """Headings, cells, and which columns are numbers."""
    ran = found.inputs is not None
    total, params = found.totals, found.totals.params_unique
    frozen, buffers = total.frozen > 0, total.buffers > 0
    columns = ["name", "type", *(["output"] if ran else []), "params", "%"]
    columns += [*(["trainable"] if frozen else []), *(["buffers"] if buffers else [])]
    columns += ["MACs", "%"] if ran else []
    rows = []
    for row in found.rows:
        cells = [row.path or "(root)", _type(row)]
        if ran:
            cells.append(_output(row))
        counted = "tied" if row.tied else _number(row.params)
        cells += [counted, _share(row.params, params)]
        cells += [_number(row.trainable)] if frozen else []
        cells += [_number(row.buffers)] if buffers else []
        if ran:
            cells += [_macs(row), _share(row.macs or 0, total.macs or 0)]
        rows.append(cells)
    left = {"name", "type", "output"}
    return columns, rows, [i for i, name in enumerate(columns) if name not in left]


def _type(row: Layer) -> str:
    words = [row.type]
    if row.kernel is not None:
        words.append(shape(row.kernel))
        if row.stride is not None and set(row.stride) != {1} and row.stride != row.kernel:
            words[-1] += f"/{shape(row.stride if len(set(row.stride)) > 1 else row.stride[:1])}"
    if row.calls is not None and row.calls > 1:
        words.append(f"called {row.calls}x")
    text = " ".join(words)
    return f"{row.repeat} x {text}" if row.repeat > 1 else text


def _output(row: Layer) -> str:
    if row.calls != 0:
        return shown(row.out_shape)
    # attention takes out_proj's weights, and does not call it
    return "weights only" if row.touched else "not called"


def _macs(row: Layer) -> str:
    if row.macs is None:
        return "?"
    return (short(row.macs) if row.macs else "-") + ("+?" if row.uncounted else "")


def shown(shapes: Shapes | None) -> str:
    """``1x1000``, of several ``out 1x21x224x224, aux 1x21x224x224``."""
    if shapes is None:
        return "-"
    if isinstance(shapes, tuple):
        return shape(shapes)
    leaves = list(_leaves(shapes))
    more = f" +{len(leaves) - 2}" if len(leaves) > 2 else ""
    named = [f"{name} {shown(one)}" if not name.isdecimal() else shown(one) for name, one in leaves]
    return ", ".join(named[:2]) + more


def _leaves(shapes: Mapping[str, Any]) -> Any:
    for name, one in shapes.items():
        if isinstance(one, tuple):
            yield name, one
        else:
            yield from ((inner, found) for inner, found in _leaves(one))


def foot(found: ModelSummary) -> list[str]:
    """Totals, memory, and what is not counted."""
    t = found.totals
    tied = f" (with ties {t.params:,})" if t.params != t.params_unique else ""
    lines = [
        f"params {t.params_unique:,}{tied} · trainable {t.trainable:,} · frozen {t.frozen:,} · "
        f"buffers {t.buffers:,}"
    ]
    if t.macs is not None:
        least = "at least " if found.uncounted else ""
        lines.append(
            f"MACs {least}{t.macs:,} ({short(t.macs)}) · FLOPs {least}{short(2 * t.macs)} "
            f"· output {shown(found.output)}"
        )
    memory = f"memory: weights {short(t.param_bytes + t.buffer_bytes, 'B')}"
    lines.append(
        memory if t.activations is None else f"{memory} · forward + {short(t.activations, 'B')}"
    )
    if t.training is not None and t.saved is not None:
        lines.append(
            f"training {short(t.training, 'B')}: weights + gradients {short(t.gradients, 'B')} "
            f"+ Adam {short(t.optimizer, 'B')} + activations {short(t.saved, 'B')}"
        )
    by_op: dict[str, list[str]] = {}
    for op, module, _ in found.uncounted:
        by_op.setdefault(op, []).append(module or "(root)")
    for op, modules in by_op.items():
        lines.append(f"uncounted: {op} in {some(modules, _FEW)}")
    return lines


def _number(n: int) -> str:
    return f"{n:,}" if n else "-"


def _share(part: int, whole: int) -> str:
    if not part or not whole:
        return "-"
    return f"{100 * part / whole:.1f}" if 2000 * part >= whole else "<0.1"
