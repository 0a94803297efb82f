"""The freeze record: which parameters of a model don't train (docs/records.md, version 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from ..errors import UsageError
from .matching.matcher import without
from .names import unwrapped
from .nodes import mapping

VERSION = 1


@dataclass(frozen=True)
class FreezeRecord:
    """What of a model is frozen; one without names says that everything trains.

    Attributes:
        frozen: names of the parameters that don't train.
        bn_eval: whether BatchNorms of which every parameter is frozen stay in eval mode.
        patterns: what froze them, as it was given.
        others: what else stands in it; a newer version may know more.
    """

    frozen: tuple[str, ...] = ()
    bn_eval: bool = False
    patterns: tuple[str, ...] = ()
    version: Any = VERSION
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, node: Any) -> FreezeRecord | None:
        """The record of whatever version in a node; None where it says nothing that can be
        understood."""
        entries = _entries(node)
        frozen = entries.get("frozen")
        if not _texts(frozen):
            return None
        patterns = entries.get("patterns")
        known = ("frozen", "bn_eval", "patterns", "version")
        return cls(
            tuple(frozen),
            entries.get("bn_eval") is True,
            tuple(patterns) if _texts(patterns) else (),
            entries.get("version"),
            {key: value for key, value in entries.items() if key not in known},
        )

    @classmethod
    def parse(cls, node: Any) -> FreezeRecord:
        """The record in a node, all of it understood.

        Raises:
            UsageError: not a freeze record of version 1.
        """
        record = cls.read(node)
        if record is None or not isinstance(_entries(node).get("bn_eval", False), bool):
            raise UsageError(f"not a freeze record: {node!r:.80}")
        if record.version != VERSION:
            raise UsageError(
                f"a freeze record of version {record.version!r:.20}; only {VERSION} is known",
                hint="a newer modelctl wrote it: upgrade",
            )
        return record

    def node(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "version": self.version,
            "frozen": list(self.frozen),
            "bn_eval": self.bn_eval,
            "patterns": list(self.patterns),
            **self.others,
        }

    @property
    def freezes(self) -> bool:
        """Whether it holds anything back."""
        return bool(self.frozen or (self.bn_eval and self.patterns))

    def renamed(self, renaming: Mapping[str, str | None]) -> FreezeRecord:
        """With other names of parameters, and without those that are None now."""
        names = (renaming.get(name, name) for name in self.frozen)
        return replace(self, frozen=tuple(name for name in names if name is not None))

    def without(self, prefix: str, alone: bool = False) -> FreezeRecord:
        """In the names of the model that has not that prefix; see :func:`matcher.without`."""
        if not prefix:
            return self
        frozen, patterns = (
            tuple(bare for name in names if (bare := without(name, prefix, alone)) is not None)
            for names in (self.frozen, self.patterns)
        )
        return replace(self, frozen=frozen, patterns=patterns)

    def under(self, prefix: str) -> FreezeRecord:
        """In the names of a model that the recorded one is a part of."""
        if not prefix:
            return self
        frozen, patterns = (
            tuple(prefix + unwrapped(name) for name in names)
            for names in (self.frozen, self.patterns)
        )
        return replace(self, frozen=frozen, patterns=patterns)

    def now(
        self, frozen: Iterable[str], patterns: Sequence[str] = (), bn_eval: bool = False
    ) -> FreezeRecord:
        """With what is frozen from now on, and the patterns that made it so."""
        return replace(
            self,
            frozen=tuple(frozen),
            bn_eval=self.bn_eval or bn_eval,
            patterns=(*self.patterns, *patterns),
        )


def _entries(node: Any) -> Mapping[Any, Any]:
    return node if isinstance(node, Mapping) else mapping(node) or {}


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
