"""DeepSpeed's universal layout (docs/formats.md#zero), as ds_to_universal.py writes it: a folder
for each parameter, with its weights in fp32 and its moments in files of their own."""

from __future__ import annotations

from math import prod
from typing import Any

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import mapping
from ...core.notes import warning
from ...core.tensors import TensorRef
from ...core.text import count
from ...errors import UnreadableError
from ...storage.places import Place
from ...storage.source import Reopened
from ..base import Format
from ..pytorch.zip import TorchZip
from .flat import Flat, joined, own
from .zero import MODEL, OF_RANKS, Save, after, followed, tagged_of

_FILES = TorchZip()
_LATEST = "latest_universal"
_WEIGHTS, _OPTIONS = "fp32.pt", "optimizer_state.pt"


class UniversalZero(Format):
    """``zero/NAME/fp32.pt``, ``exp_avg.pt``, …, beside the model states of ZeRO."""

    name = "zero-universal"
    label = "DeepSpeed universal"

    def sniff(self, place: Place) -> bool:
        tagged = tagged_of(place, _LATEST)
        return (
            tagged is not None
            and "zero" in tagged.names
            and tagged.member("zero").is_folder
            and any(map(MODEL.fullmatch, tagged.names))
        )

    def read(self, place: Place) -> Checkpoint:
        try:
            return _Universal(followed(place, _LATEST), place.name).checkpoint()
        except UnreadableError as e:
            if e.path:
                raise
            raise UnreadableError(
                e.reason, path=place.name, hint="copy the folder again, or make it anew"
            ) from None


class _Universal:
    """The files of one save."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        self.save = Save(place, name, whole=True)
        self.zero = place.inside("zero")
        self.read = self.save.read

    def checkpoint(self) -> Checkpoint:
        groups = self.save.groups()
        shapes = {name: shape for group in groups for name, shape in group.items()}
        folders = [n for n in self.zero.names if n != _OPTIONS and self.zero.inside(n).is_folder]
        parts = {name: self._parameter(name, shapes.get(name)) for name in folders}
        missing = [name for name in shapes if name not in parts]
        if missing:
            raise UnreadableError(f"zero/{missing[0]!r:.200} is missing")
        trained = {name: entries.pop(_WEIGHTS.partition(".")[0]) for name, entries in parts.items()}
        root = {**self.save.model, "module": self.save.module(trained)}
        for key in OF_RANKS:
            root.pop(key, None)
        warnings = []
        if _OPTIONS in self.zero.names and set(parts) == set(shapes):
            root = after(root, "module", "optimizer", self._optimizer(groups, parts))
        else:  # several pipeline stages, each with groups of its own
            warnings.append(warning("it does not say the groups of its optimizer: left out"))
        return Checkpoint(
            root,
            Origin(
                self.name,
                UniversalZero.name,
                f"DeepSpeed universal, {count(len(parts), 'parameter')}",
                sum(one.origin.bytes_on_disk for one in self.read if one.origin),
            ),
            warnings=(*warnings, *dict.fromkeys(w for one in self.read for w in one.warnings)),
            findings=tuple(finding for one in self.read for finding in one.findings),
        )

    def _parameter(self, name: str, shape: tuple[int, ...] | None) -> dict[str, Any]:
        """What its folder holds, by the names of the files: weights, moments, the step."""
        folder = self.zero.inside(name)
        found: dict[str, Any] = {}
        for file in folder.names:
            if not file.endswith(".pt"):
                continue
            root = self._file(folder.inside(file))
            value = (mapping(root) or {}).get("param", root)
            flat = isinstance(value, TensorRef) and value.shape == (prod(shape or ()),)
            if flat and shape is not None:  # stage 3 leaves them so
                value = joined(value.dtype, shape, Flat([value]).cut(0, value.numel), self.name)
            found[file.removesuffix(".pt")] = value
        weights = found.get(_WEIGHTS.removesuffix(".pt"))
        if not isinstance(weights, TensorRef):
            raise UnreadableError(f"zero/{name!r:.200} has no weights in {_WEIGHTS}")
        for key, value in found.items():
            if key != "step" and isinstance(value, TensorRef) and value.shape != weights.shape:
                raise UnreadableError(
                    f"zero/{name!r:.200}: {key} is of {list(value.shape)}, the weights of "
                    f"{list(weights.shape)}"
                )
        if shape is not None and prod(shape) > weights.numel and len(weights.shape) != len(shape):
            raise UnreadableError(
                f"zero/{name!r:.200} is of {list(weights.shape)}, the model of {list(shape)}"
            )
        return found

    def _file(self, place: Place) -> Any:
        """There may be more files than a process may have open."""
        source = Reopened(place.name)
        self.read.append(_FILES.read(place.holding(source)))
        return self.read[-1].root

    def _optimizer(self, groups: Any, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        fields = mapping(self._file(self.zero.inside(_OPTIONS))) or {}
        options = fields.get("param_groups")
        options = [mapping(one) or {} for one in options] if isinstance(options, list) else []
        if len(options) != len(groups):
            raise UnreadableError(f"zero/{_OPTIONS} has {count(len(options), 'group')}")
        inner = mapping((mapping(fields.get("optimizer_state_dict")) or {}).get("state")) or {}
        step = (mapping(inner.get(0)) or {}).get("step")  # of stage 3
        names = [name for group in groups for name in group]
        numbers = {name: number for number, name in enumerate(names)}
        common = {} if step is None else {"step": step}
        return {
            "state": {
                numbers[name]: {key: own(value) for key, value in {**common, **parts[name]}.items()}
                for name in names
            },
            "param_groups": [
                {**old, "params": [numbers[name] for name in group], "param_names": [*group]}
                for old, group in zip(options, groups, strict=True)
            ],
        }
