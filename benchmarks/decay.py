"""Layer decay beside timm's, on every model of timm that has a ``group_matcher``:
``python benchmarks/decay.py [PATTERN]``.

Each of ``timm.list_models()`` is built on ``meta``, one after the other in one process: structure,
no values. Compared are the lr of each parameter and its weight decay: ``param_groups_layer_decay``,
given the model's own ``no_weight_decay()``, beside ``mnn.param_groups(layer_decay=…,
no_decay=True)``. Twice: as people call it, where the model's ``group_matcher`` says what its layers
are, and with that hidden, where they are found from the names and the order of modules. A table, a
line a family (file of timm); then those that differ, with the first parameter that does.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from typing import Any

import timm
import torch
from timm.models import list_models, list_modules
from timm.optim import param_groups_layer_decay

import modelctl.nn as mnn
from modelctl.errors import ModelctlError

LR, DECAY, RATE = 1.0, 0.1, 0.75


def theirs(model: Any) -> dict[str, tuple[float, float]]:
    """lr and weight decay of each parameter, as timm has them."""
    names = {id(p): name for name, p in model.named_parameters()}
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(
        model, weight_decay=DECAY, layer_decay=RATE, no_weight_decay_list=own
    )
    return {
        names[id(p)]: (LR * group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


def ours(model: Any) -> dict[str, tuple[float, float]]:
    groups = mnn.param_groups(model, lr=LR, weight_decay=DECAY, no_decay=True, layer_decay=RATE)
    return {
        name: (group["lr"], group["weight_decay"])
        for group in groups
        for name in group["param_names"]
    }


def differing(
    one: dict[str, tuple[float, float]], two: dict[str, tuple[float, float]], which: int
) -> list[str]:
    return [
        name
        for name in {**one, **two}
        if name not in one or name not in two or abs(one[name][which] - two[name][which]) > 1e-9
    ]


def steps(scales: dict[str, tuple[float, float]]) -> int:
    return len({lr for lr, _ in scales.values()})


def found(model: Any) -> dict[str, tuple[float, float]] | None:
    """What is found where the model does not say its layers; None where none are found."""
    kind = type(model)
    hidden = type(kind.__name__, (kind,), {"group_matcher": None})
    model.__class__ = hidden
    try:
        return ours(model)
    except ModelctlError:
        return None
    finally:
        model.__class__ = kind


def main(pattern: str = "*") -> None:
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    left: Counter[str] = Counter()
    said: list[str] = []
    rows: dict[str, Counter[str]] = {}
    for module in list_modules():
        for name in list_models(pattern, module=module):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception as e:
                left[f"not built on meta ({type(e).__name__})"] += 1
                continue
            if not hasattr(model, "group_matcher"):
                left["no group_matcher"] += 1
                continue
            row = rows.setdefault(module, Counter())
            row["models"] += 1
            try:
                reference = theirs(model)
            except Exception as e:
                row["timm fails"] += 1
                said.append(f"{name}: timm itself fails: {type(e).__name__}: {e}"[:150])
                continue
            try:
                mine = ours(model)
            except ModelctlError as e:
                said.append(f"{name}: {e}"[:150])
                continue
            for which, what in ((0, "lr"), (1, "decay")):
                differ = differing(reference, mine, which)
                row[what] += not differ
                if differ:
                    at = differ[0]
                    pair = mine.get(at, (None,) * 2)[which], reference.get(at, (None,) * 2)[which]
                    said.append(f"{name}: {what}: {len(differ)}, {at} {pair[0]}, timm {pair[1]}")
            guess = found(model)
            row["found"] += guess is not None
            if guess is not None:
                differ = differing(reference, guess, 0)
                row["found equal"] += not differ
                row["found as many"] += steps(guess) == steps(reference)
                if differ:
                    at = differ[0]
                    said.append(
                        f"{name}: found: {len(differ)} of {len(reference)}, {steps(guess)} layers, "
                        f"timm {steps(reference)}; {at}"
                    )
            else:
                said.append(f"{name}: found: none")
    keys = ("models", "lr", "decay", "found", "found equal", "found as many")
    print("| family | " + " | ".join(keys) + " |\n|" + " --- |" * (len(keys) + 1))
    for module, row in rows.items():
        print(f"| {module} | " + " | ".join(str(row[key]) for key in keys) + " |")
    total: Counter[str] = sum(rows.values(), Counter())
    print("| all | " + " | ".join(str(total[key]) for key in keys) + " |")
    print(f"\nleft out: {dict(left)}; {time.perf_counter() - began:.0f} s")
    print("\n".join(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
