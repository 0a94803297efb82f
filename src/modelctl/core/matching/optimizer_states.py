"""The one table of what optimizers keep: the state of each of torch's, and how one is recognised.

A saved optimizer says neither its class nor its parameters' shapes; the keys of its groups and of
its state do, as far as they are known here. Of keys that are not nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .matcher import Shape


class Kept(NamedTuple):
    """What an optimizer keeps of each parameter, and what its groups say.

    Attributes:
        name: its class in ``torch.optim``.
        settings: keys of its groups by which optimizers are told apart, all that it has of them.
        shaped: keys of state with the parameter's shape.
        scalars: keys of state with one number.
        others: keys of state that are neither: factored (rows, columns), or flat over all
            parameters.
        sign: the key of state that tells it where the settings don't; in the table's order.
        decoupled: whether weight decay is decoupled where no group says so; None where there is
            no such choice.
    """

    name: str
    settings: frozenset[str]
    shaped: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ("step",)
    others: tuple[str, ...] = ()
    sign: str | None = None
    decoupled: bool | None = None


def _set(*names: str) -> frozenset[str]:
    return frozenset(names)


_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM = _set("betas", "eps", "weight_decay", "amsgrad")
_MAX_MOMENTS = (*_MOMENTS, "max_exp_avg_sq")
_FLAT = (
    *("func_evals", "n_iter", "al", "d", "t", "old_dirs", "old_stps", "ro", "H_diag"),
    *("prev_flat_grad", "prev_loss"),
)

TABLE = (
    Kept(
        "Adafactor",
        _set("beta2_decay", "d", "eps", "weight_decay"),
        ("variance",),
        others=("row_var", "col_var"),
        sign="row_var",
    ),
    Kept(  # that of fairseq and transformers
        "Adafactor",
        _set("eps", "weight_decay"),
        _MOMENTS,
        ("step", "RMS"),
        ("exp_avg_sq_row", "exp_avg_sq_col"),
        sign="exp_avg_sq_row",
    ),
    Kept(
        "NAdam",
        _set("betas", "eps", "weight_decay", "momentum_decay"),
        _MOMENTS,
        ("step", "mu_product"),
        sign="mu_product",
        decoupled=False,
    ),
    Kept("Adamax", _set("betas", "eps", "weight_decay"), ("exp_avg", "exp_inf"), sign="exp_inf"),
    Kept("Adam", _ADAM, _MAX_MOMENTS, sign="exp_avg_sq", decoupled=False),
    Kept("AdamW", _ADAM, _MAX_MOMENTS, sign="exp_avg_sq", decoupled=True),
    Kept("Adam", _set("betas", "eps", "weight_decay"), _MOMENTS),  # before torch 0.4
    Kept("RAdam", _set("betas", "eps", "weight_decay"), _MOMENTS, decoupled=False),
    Kept("SparseAdam", _set("betas", "eps"), _MOMENTS),
    Kept(
        "Adadelta",
        _set("rho", "eps", "weight_decay"),
        ("square_avg", "acc_delta"),
        sign="acc_delta",
    ),
    Kept(
        "RMSprop",
        _set("momentum", "alpha", "eps", "centered", "weight_decay"),
        ("square_avg", "momentum_buffer", "grad_avg"),
        sign="square_avg",
    ),
    Kept(
        "ASGD",
        _set("lambd", "alpha", "t0", "weight_decay"),
        ("ax",),
        ("step", "eta", "mu"),
        sign="ax",
    ),
    Kept("Rprop", _set("etas", "step_sizes"), ("prev", "step_size"), sign="prev"),
    Kept(
        "Adagrad",
        _set("lr_decay", "eps", "weight_decay", "initial_accumulator_value"),
        ("sum",),
        sign="sum",
    ),
    Kept(
        "Muon",
        _set("weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps"),
        ("momentum_buffer",),
        (),
    ),
    Kept(
        "SGD",
        _set("momentum", "dampening", "weight_decay", "nesterov"),
        ("momentum_buffer",),
        (),
        sign="momentum_buffer",
    ),
    Kept(
        "LBFGS",
        _set(
            *("max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size"),
            "line_search_fn",
        ),
        scalars=(),
        others=_FLAT,
        sign="func_evals",
    ),
)

# How an optimizer runs, not what it computes.
HOW = ("foreach", "fused", "capturable", "differentiable")
# Settings that not every torch has, and what one does that lacks them.
MAXIMIZE, DECOUPLED = "maximize", "decoupled_weight_decay"
# By which optimizers are told apart.
TELLING = frozenset(key for kept in TABLE for key in kept.settings)

# fastai's average of squared gradients: its optimizers are in no table, a state shows its shape.
_SHAPED = frozenset(key for kept in TABLE for key in kept.shaped) | {"sqr_avg"}
# State in two factors, and whether the dimension that each lacks has length 1 or is not there:
# torch's Adafactor, and that of fairseq and transformers.
_FACTORED = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))
# LBFGS keeps all of its state with the first parameter; these keys no other optimizer has.
_ALL_IN_ONE = ("func_evals", "n_iter", "old_dirs", "prev_flat_grad")


# ---------------------------------------------------------------------- state of one parameter


def is_flat(state: Mapping[Any, Any]) -> bool:
    """Whether it is no parameter's own, but one state over all (LBFGS)."""
    return any(key in state for key in _ALL_IN_ONE)


def shape_shown(state: Mapping[Any, Any]) -> Shape | None:
    """The parameter's shape, as far as its state shows it."""
    for rows, columns, kept in _FACTORED:
        row, column = _shape(state.get(rows)), _shape(state.get(columns))
        if row is not None and column:  # (…, o, 1) and (…, 1, i), or (…, o) and (…, i)
            return (*(row[:-1] if kept else row), column[-1])
    shapes = _shapes(state)
    return shapes.pop() if len(shapes) == 1 else None


def _shapes(state: Mapping[Any, Any]) -> set[Shape]:
    """Those that tensors of a parameter's shape have. One number beside others (NovoGrad's second
    moment is one of each parameter) says nothing."""
    shapes = {_shape(value) for key, value in state.items() if key in _SHAPED} - {None}
    return {shape for shape in shapes if shape is not None and (shape or len(shapes) == 1)}


def misfit(state: Mapping[Any, Any], shape: Shape) -> str | None:
    """The key of a tensor that a parameter of that shape can't have; None where all can be its."""
    several = _shapes(state) - {()}
    for key, value in state.items():
        found = _shape(value)
        if key in _SHAPED and found == () and several:
            continue
        if found is not None and found != _expected(key, shape, found):
            return str(key)
    return None


def _expected(key: Any, shape: Shape, found: Shape) -> Shape:
    """The shape of a state of a parameter; that of an unknown key is as it is."""
    if key in _SHAPED:
        return shape
    for rows, columns, kept in _FACTORED:
        length = (1,) if kept else ()
        if key == rows:
            return (*shape[:-1], *length)
        if key == columns:
            return (*shape[:-2], *length, *shape[-1:])
    return found


def _shape(value: Any) -> Shape | None:
    """That of a tensor in a file, or of a live one; None for anything else."""
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


# ---------------------------------------------------------------------- which optimizer


def kinds(state: Iterable[Any], group: Mapping[Any, Any]) -> list[str]:
    """Which of torch's optimizers may have keys like these in the state of its parameters, and
    such a group; none where nothing is known to."""
    keys, settings = set(state), TELLING & group.keys()
    found = [
        kept
        for kept in TABLE
        if kept.settings == settings and keys <= {*kept.shaped, *kept.scalars, *kept.others}
    ]
    if not found:
        signs = [kept.sign for kept in TABLE if kept.sign is not None and kept.sign in keys]
        found = [kept for kept in TABLE if kept.sign in signs[:1]]
    if DECOUPLED in group:
        found = [kept for kept in found if kept.decoupled is not None] or found
        found = [kept for kept in found if kept.decoupled is group[DECOUPLED]] or found
    return [*dict.fromkeys(kept.name for kept in found)]


def implied(classes: Iterable[str]) -> dict[str, Any]:
    """What an optimizer does whose groups lack a recent setting, by the names of its class and of
    those that it is derived from; a setting that it is not known to have is not in it."""
    known = {kept.name: kept for kept in reversed(TABLE)}
    kept = next((known[name] for name in classes if name in known), None)
    if kept is None:
        return {}
    recent: dict[str, Any] = {MAXIMIZE: False}
    return recent if kept.decoupled is None else {**recent, DECOUPLED: kept.decoupled}
