"""The program of a torch.export archive: what each module gave, as it was recorded.

``models/model.json`` (older: ``serialized_exported_program.json``) has a size for every value of
the graph, and for every node the modules that it is inside of (torch/_export/serde/schema.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ...core.checkpoint import Recorded
from ...errors import UnreadableError
from ...storage.containers.zipdir import ZipDirectory

MAX_JSON = 1 << 30
_PROGRAM = re.compile(r"(?:.*/)?(?:models/[^/]+\.json|serialized_exported_program\.json)")
# A module's second call is recorded under ``name@1``.
_CALL = re.compile(r"@\d+$")
_SYMBOL = re.compile(r"Symbol\('(\w+)'")


class ExportedProgram:
    """The program of an archive, which is read when it is asked for."""

    loader: str | None = None

    def __init__(self, directory: ZipDirectory) -> None:
        self.directory = directory

    def recorded(self) -> list[Recorded]:
        """The modules in the order in which they gave their first outputs; empty where the
        archive has several programs or none.

        Raises:
            UnreadableError: a program that is not as torch writes it.
        """
        return _recorded(self.directory)


def _recorded(directory: ZipDirectory) -> list[Recorded]:
    names = [name for name in directory.members if _PROGRAM.fullmatch(name)]
    if len(names) != 1:
        return []
    try:
        data = json.loads(directory.read(names[0], MAX_JSON))
        data = data.get("exported_program", data)
        graph = data["graph_module"]["graph"]
        values = graph["tensor_values"]
        found: dict[str, Recorded] = {}
        for node in graph["nodes"]:
            shape = next(_shapes(node["outputs"], values), None)
            stack = str(node.get("metadata", {}).get("nn_module_stack") or "")
            for entry in filter(None, stack.split(";")):
                _, path, kind = entry.split(",", 2)
                path = _CALL.sub("", path)
                if shape is not None:  # the last one in a module is what it gives
                    found[path] = Recorded(path, kind.rpartition(".")[2], shape)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UnreadableError(
            "not a program as torch.export writes it", path=directory.source.name, member=names[0]
        ) from None
    return list(found.values())


def _shapes(outputs: list[Any], values: dict[str, Any]) -> Iterator[tuple[int | str, ...]]:
    for output in outputs:
        for one in (output.get("as_tensor"), *(output.get("as_tensors") or ())):
            if one is not None:
                yield tuple(_size(size) for size in values[one["name"]]["sizes"])


def _size(size: dict[str, Any]) -> int | str:
    if "as_int" in size:
        return int(size["as_int"])
    text = str(size["as_expr"]["expr_str"])
    found = _SYMBOL.search(text)
    return found[1] if found else text[:20]
