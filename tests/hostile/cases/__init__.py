"""The cases, a module a kind. Each module's ``cases()`` gives its own."""

from __future__ import annotations

from ..case import Case, Fine
from . import clean, execution, headers, limits, lookalikes, named, places, shards, tensors, zips

_KINDS = (clean, execution, named, places, limits, zips, tensors, headers, shards, lookalikes)

CASES: list[Case] = [
    case._replace(name=f"{kind.__name__.rpartition('.')[2]}: {case.name}")
    for kind in _KINDS
    for case in kind.cases()
]
FINE: list[Case] = [case for case in CASES if isinstance(case.expect, Fine)]
