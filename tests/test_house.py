"""The house rules of imports, read from the source: who may use whom, and what nobody may use."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelctl.formats.registry import built_in

SOURCE = Path(__file__).resolve().parent.parent / "src" / "modelctl"
MOST_LINES, MOST_FILES = 450, 15

_BELOW_FILES = {"formats", "pickles", "storage", "core"}
# The arrows: a room and the rooms that it may use besides itself; all may use errors.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "core": set(),
    "storage": {"core"},
    "pickles": {"core"},
    "formats": {"pickles", "storage", "core"},
    "files": _BELOW_FILES,
    "surgery": {"core"},
    "inspection": {"core"},
    "progress": {"core"},
    "nn": {"inspection", "surgery", "files", "progress", *_BELOW_FILES},
    "rewrite": {"inspection", "surgery", "files", *_BELOW_FILES},
    "cli": {
        "nn",
        "rewrite",
        "scanning",
        "integrity",
        "inspection",
        "surgery",
        "files",
        "progress",
        *_BELOW_FILES,
    },
    "reports": {"integrity", "inspection", "files", *_BELOW_FILES},
    "integrity": {"inspection", "surgery", "files", *_BELOW_FILES},
    "scanning": {"inspection", "files", *_BELOW_FILES},
    "testing": {"inspection", "surgery", "files", *_BELOW_FILES},
    "__main__": {"cli"},
}
# Modules that look past the checkpoint at the file itself.
WIDER = {"inspection.verify": {"pickles", "storage"}}

# Imports what the user names on the command line (--arch package.module:factory), no file does.
COMPUTED = {"nn.view.build"}

# Libraries and who alone may import them (prefixes of module names).
ONLY = {
    "torch": ("nn", "testing", "storage.torchrun.ranks"),
    "torchvision": ("nn",),
    "safetensors": ("nn",),
    "fsspec": ("storage.far.filesystems",),
    "timm": ("nn",),
    "matplotlib": ("nn.tuning.lr_range",),
    "rich": ("cli.output", "progress"),
    "tabulate": ("cli.output",),
    "typer": ("cli",),
    "click": (),
    "pytest": ("testing",),
    "pickle": (),
    "_pickle": (),
    "marshal": (),
    "shelve": (),
    "dill": (),
}
NEVER_AT_START = {"numpy", "torch", "rich", "tabulate", "isal", "fsspec"}
ALLOWED_LIBRARIES = {*sys.stdlib_module_names, "numpy", "tomli", "isal"}
# What formats are called; what they can do is asked of them.
FORMATS = {one.name for one in built_in()} - {"archive", "folder"}


def module_name(path: Path) -> str:
    """``core/tensors.py`` is ``core.tensors``, ``cli/__init__.py`` is ``cli``, the top is ''."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, bool, int]]:
    """(absolute name, whether of modelctl, line) of each import, wherever it stands."""
    here = module.split(".") if module else []
    package = here if is_package else here[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                inside = alias.name.split(".")[0] == "modelctl"
                name = alias.name.partition(".")[2] if inside else alias.name
                yield name, inside, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                up = node.level - 1
                assert up <= len(package), f"{module}: an import from above the package"
                base = package[: len(package) - up] + base
                inside = True
            else:
                inside = base[0] == "modelctl"
                base = base[1:] if inside else base
            if inside:
                for alias in node.names:
                    yield ".".join([*base, alias.name]), True, node.lineno
            else:
                yield ".".join(base), False, node.lineno


def _type_checking(tree: ast.Module) -> set[int]:
    """Lines of the blocks ``if TYPE_CHECKING:``, which never run."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.body:
                lines.update(range(inner.lineno, (inner.end_lineno or inner.lineno) + 1))
    return lines


def _lazy_lines(tree: ast.Module) -> set[int]:
    """Lines inside functions: what stands there is not imported at start-up."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def violations(text: str, module: str, is_package: bool = False) -> list[str]:
    """What a module does against the rules, a line each."""
    tree = ast.parse(text)
    found: list[str] = []
    room = module.split(".")[0]
    hidden, lazy = _type_checking(tree), _lazy_lines(tree)

    def bad(line: int, what: str) -> None:
        found.append(f"{module or 'modelctl'}:{line}: {what}")

    if text.count("\n") > MOST_LINES:
        bad(MOST_LINES, f"{text.count(chr(10))} lines, more than {MOST_LINES}")
    for name, inside, line in imports(tree, module, is_package):
        top = name.split(".")[0]
        if inside:
            if room == "":
                continue  # the public API: lazy, for type checkers only
            may = (
                {room, "errors", "__version__"} | ARROWS.get(room, set()) | WIDER.get(module, set())
            )
            if room not in ARROWS:
                bad(line, f"'{room}' is no room of the house")
            elif top not in may:
                bad(line, f"{room} may not use {top}")
            continue
        if line in hidden:
            continue
        if top in ONLY:
            if not any(module == p or module.startswith(p + ".") for p in ONLY[top]):
                bad(line, f"only {ONLY[top] or 'nobody'} may import {top}")
        elif top not in ALLOWED_LIBRARIES:
            bad(line, f"{top} is no dependency")
        if top in NEVER_AT_START and line not in lazy and room != "nn":
            bad(line, f"{top} is imported at start-up")
    if room == "" and not hidden >= {line for _, inside, line in imports(tree, "", True) if inside}:
        bad(1, "the public API imports something of its own at start-up")
    found += [
        f"{module}:{line}: {what}"
        for line, what in _dynamic(tree, is_package or module in COMPUTED)
    ]
    if room not in ("formats", "testing"):
        found += [f"{module}:{line}: {what}" for line, what in _format_names(tree)]
    return found


def _format_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Places where the name of a format is compared, or looked up in a table of formats."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {one.value for side in sides for one in ast.walk(side) if _is_text(one)}
            text = ast.unparse(node)
            about_formats = "format" in text or "fmt" in text  # torch is a module's name, too
            if names & (FORMATS if about_formats else FORMATS - {"torch"}):
                yield node.lineno, f"compares with {', '.join(sorted(names & FORMATS))}"
        elif isinstance(node, ast.Dict):
            keys = {one.value for one in node.keys if one is not None and _is_text(one)}
            if len(keys & FORMATS) > 1:
                yield node.lineno, "a table of formats by name"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def graph() -> dict[str, set[str]]:
    """The modules of the house, and which ones each imports, wherever the import stands."""
    known = {module_name(path): path for path in sources()}
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        if module == "" or module == "nn":  # their names are resolved when they are used
            continue
        tree = ast.parse(path.read_text("utf-8"))
        hidden = _type_checking(tree)
        used = set()
        for name, inside, line in imports(tree, module, path.name == "__init__.py"):
            if inside and line not in hidden:
                used.add(name if name in known else name.rpartition(".")[0])
        found[module] = {one for one in used if one in known and one not in ("", module)}
    return found


def circles(found: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in found.get(module, ()):
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for module in found:
        if module not in order:
            visit(module)
    return groups


def _dynamic(tree: ast.Module, may_compute: bool) -> Iterator[tuple[int, str]]:
    """Ways to run or import what is only known at run time."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            yield node.lineno, f"uses {node.id}"
        if isinstance(node, ast.Attribute) and node.attr in (
            "__import__",
            "run_module",
            "run_path",
        ):
            yield node.lineno, f"uses {node.attr}"
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
            if name == "import_module" and not literal and not may_compute:
                yield node.lineno, "imports a computed name"


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: module_name(path) or "modelctl")
def test_rules(path: Path) -> None:
    found = violations(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_no_circle() -> None:
    assert circles(graph()) == []


def test_no_circle_of_rooms_in_nn() -> None:
    """The rooms of nn, and its single files, use each other one way."""
    rooms: dict[str, set[str]] = {}
    for module, used in graph().items():
        parts = module.split(".")
        if parts[0] == "nn" and len(parts) > 1:
            others = {one.split(".")[1] for one in used if one.startswith("nn.")}
            rooms.setdefault(parts[1], set()).update(others - {parts[1]})
    assert circles(rooms) == []
    assert len(rooms) <= 10
    assert sum(map(len, rooms.values())) <= 24, rooms


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_folder_is_crowded() -> None:
    for folder in (SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir())):
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, folder


def test_it_sees_every_room() -> None:
    rooms = {module_name(path).split(".")[0] for path in sources()}
    assert {"core", "storage", "pickles", "formats", "files", "errors"} <= rooms


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("core.x", "from ..storage import source"),
        ("core.x", "from .. import storage"),
        ("core.x", "import modelctl.formats"),
        ("core.x", "from modelctl.files import open"),
        ("storage.x", "from ..pickles.writer import pickle"),
        ("pickles.x", "from ..storage.source import FileSource"),
        ("formats.x", "from ..files import open"),
        ("surgery.x", "from ..files import open"),
        ("surgery.x", "from ..inspection.ls import ls"),
        ("surgery.x", "def f():\n    from ..formats import detect"),
        ("inspection.ls", "from ..storage.source import FileSource"),
        ("inspection.scan", "from ..formats import detect"),
        ("files", "from .cli import main"),
        ("nn.load", "from ..cli.output import table"),
        ("rewrite.x", "from ..nn.loading.load import load"),
        ("surgery.x", "from ..rewrite.edit import edit"),
        ("files", "from .rewrite.edit import edit"),
        ("novel.x", "from ..core import tree"),
        ("core.x", "import torch"),
        ("core.x", "def f():\n    import torch.nn"),
        ("formats.x", "from safetensors import safe_open"),
        ("cli.app", "import rich.console"),
        ("surgery.x", "import tabulate"),
        ("surgery.x", "import typer"),
        ("cli.app", "import click"),
        ("core.x", "import numpy as np"),
        ("core.x", "if True:\n    import numpy"),
        ("core.x", "class C:\n    import numpy"),
        ("storage.x", "from isal import isal_zlib"),
        ("core.x", "import requests"),
        ("pickles.x", "import pickle"),
        ("pickles.x", "from pickle import loads"),
        ("pickles.x", "from _pickle import Unpickler"),
        ("core.x", "eval('1')"),
        ("core.x", "f = exec"),
        ("core.x", "__import__('os')"),
        ("core.x", "import builtins\nbuiltins.__import__('os')"),
        ("core.x", "import importlib\nimportlib.import_module(name)"),
        ("core.x", "from importlib import import_module\nimport_module(f'a{b}')"),
        ("", "from .files import open"),
        ("core.x", "\n" * (MOST_LINES + 1)),
        ("files", "if fmt.name == 'safetensors':\n    pass"),
        ("cli.x", "plain = origin.format in ('torch', 'safetensors')"),
        ("cli.x", "SUFFIX = {'torch': '.pt', 'safetensors': '.safetensors'}"),
        ("surgery.x", "import pytest"),
    ],
)
def test_a_violation_is_seen(module: str, text: str) -> None:
    assert violations(text, module, is_package=not module)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("core.x", "from ..errors import ModelctlError\nfrom .tree import walk\nimport os"),
        ("core.x", "def f():\n    import numpy as np"),
        ("formats.x", "from ..pickles.writer import pickle\nfrom ..core import tree"),
        (
            "scanning.walk",
            "from ..pickles import interpreter\nfrom ..storage.containers import zipdir",
        ),
        ("nn.load", "import torch\nfrom .. import files"),
        ("cli.output", "def f():\n    import rich.table, tabulate"),
        ("cli.app", "import typer\nfrom ..nn import load"),
        ("rewrite.x", "from ..inspection.edits import EditReport\nfrom .. import files"),
        ("core.x", "from importlib import import_module\nimport_module('json')"),
        ("", "if TYPE_CHECKING:\n    from .files import open"),
    ],
)
def test_what_is_allowed_is_not_flagged(module: str, text: str) -> None:
    assert not violations(text, module, is_package=not module)
