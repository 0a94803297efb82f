"""TorchScript archives (``torch.jit.save``): read only, their code is not run.

``data.pkl`` is the pickle of a module whose classes are ``__torch__.*``; which of its attributes
are parameters and buffers is said by the class bodies in ``code/``, in two lists of names.
"""

from __future__ import annotations

import re
from typing import Any

from ...core.checkpoint import Checkpoint, Origin, Recorded
from ...core.modules import make_module
from ...core.nodes import Global, Obj, attributes
from ...core.tensors import TensorRef
from ...core.tree import containers, rebuild
from ...storage.containers.zipdir import ZipDirectory
from ...storage.places import Place
from ..base import Format
from ..pytorch.zip import SavedZip

MAX_CODE = 64 << 20
_CLASS = re.compile(r"^class (\w+)\((\w+)\):\n((?:  .*\n|\n)*)", re.M)
# Names of parameters and of buffers; None where torch wrote no list of those (up to 1.4): a tensor
# that is no parameter is one then.
Lists = tuple[tuple[str, ...], tuple[str, ...] | None]
_NAMES = re.compile(r"^  __(parameters|buffers)__ = (\[[^\]]*\])", re.M)
_STRING = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'")


class TorchScript(Format):
    """A TorchScript archive: a zip of ``torch.save``'s layout with code and constants beside."""

    name = "torchscript"
    label = "TorchScript"

    def sniff(self, place: Place) -> bool:
        names = place.zip.members if place.zip is not None else ()
        return any(
            name.endswith("/constants.pkl")
            and f"{name.removesuffix('constants.pkl')}data.pkl" in names
            for name in names
        )

    def read(self, place: Place) -> Checkpoint:
        assert place.zip is not None
        saved = SavedZip(place, place.zip)
        root = as_modules(saved.unpickle("data.pkl", "data"), place.zip, saved.folder)
        constants = saved.unpickle("constants.pkl", "constants")
        return Checkpoint(
            root,
            Origin(place.name, self.name, self.label, place.size),
            constants=constants,
            outside="the TorchScript program",
            program=ScriptProgram(),
            warnings=tuple(saved.warnings),
            findings=tuple(f for f in saved.findings if not f.name.startswith("__torch__")),
        )


class ScriptProgram:
    """The program of a TorchScript archive: it can be run, and recorded no shapes."""

    loader: str | None = "torch.jit.load"

    def recorded(self) -> list[Recorded]:
        """Nothing."""
        return []


def as_modules(root: Any, directory: ZipDirectory, folder: str) -> Any:
    """The tree of ``data.pkl`` with its script modules in the shape of pickled ``nn.Module``."""
    lists = _Lists(directory, folder)
    modules = [
        node
        for node, _ in containers(root).values()
        if isinstance(node, Obj) and lists.of(node.func) is not None
    ]
    # shells first: a module's attributes are other modules
    made = {id(node): Obj(node.func, (), "newobj") for node in modules}
    for node in modules:
        made[id(node)].state = _module(node, lists.of(node.func) or ((), ()), made).state
    return rebuild(root, made)


def _module(node: Obj, names: Lists, made: dict[int, Obj]) -> Obj:
    parameters, buffers, modules, others = {}, {}, {}, {}
    for name, value in attributes(node).items():
        if id(value) in made:
            modules[name] = made[id(value)]
        elif name in names[0] and isinstance(value, TensorRef):
            grad = value.requires_grad is True
            parameters[name] = value.replace(role="parameter", requires_grad=grad)
        elif (names[1] is None or name in names[1]) and isinstance(value, TensorRef):
            buffers[name] = value.replace(role="buffer")
        elif name in (names[1] or ()) or name in names[0]:
            buffers[name] = value
        else:
            others[name] = value
    cls = node.func if isinstance(node.func, Global) else Global("__torch__", "?")
    return make_module(cls, others, parameters=parameters, buffers=buffers, modules=modules)


class _Lists:
    """What ``__parameters__`` and ``__buffers__`` of each script class say."""

    def __init__(self, directory: ZipDirectory, folder: str) -> None:
        self.directory, self.folder = directory, folder
        self.files: dict[str, dict[str, Lists]] = {}

    def of(self, cls: Any) -> Lists | None:
        """(parameters, buffers) of a class; None where it is no script module."""
        if not isinstance(cls, Global) or not cls.module.startswith("__torch__"):
            return None
        file = f"{self.folder}/code/{cls.module.replace('.', '/')}.py"
        if file not in self.files:
            self.files[file] = self._read(file)
        return self.files[file].get(cls.name)

    def _read(self, file: str) -> dict[str, Lists]:
        if file not in self.directory.members:
            return {}
        text = self.directory.read(file, MAX_CODE).decode("utf-8", "replace")
        found = {}
        for name, base, body in _CLASS.findall(text):
            if base != "Module":
                continue
            lists = {which: _strings(names) for which, names in _NAMES.findall(body)}
            found[name] = (lists.get("parameters", ()), lists.get("buffers"))
        return found


def _strings(source: str) -> tuple[str, ...]:
    """The texts in a list, as written: without Python's parser, whose stack they could fill."""
    found = (one[1] or one[2] or "" for one in _STRING.finditer(source))
    return tuple(re.sub(r"\\(.)", r"\1", text) for text in found)
