"""Every place in a pickle where a name may stand, and every module that has another's under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelctl.scanning.scan import scan

from ..hostile.build.pickles import EMPTY_DICT, MARK, NONE, POP, STOP, name, put, text

SYSTEM = name("os", "system")
ID = text("id")

PLACES = {
    "a value": SYSTEM,
    "an item of a dict": EMPTY_DICT + text("a") + SYSTEM + b"s",
    "a key": EMPTY_DICT + SYSTEM + NONE + b"s",
    "an item of a set": b"\x8f" + MARK + SYSTEM + b"\x90",
    "of a frozenset": MARK + SYSTEM + b"\x91",
    "remembered and thrown away": SYSTEM + put(0) + POP + NONE,
    "called": SYSTEM + MARK + ID + b"tR",
    "called by INST": MARK + ID + b"ios\nsystem\n",
    "called by OBJ": MARK + SYSTEM + ID + b"o",
    "made": name("subprocess", "Popen") + MARK + ID + b"t\x81",
    "made with keywords": name("subprocess", "Popen") + ID + b"\x85}\x92",
    "put together": b"\x8c\x02os\x94\x8c\x06system\x94\x93" + MARK + ID + b"tR",
    "an extension": b"\x82\x01",
    "a state": name("torch.nn", "Linear") + b")\x81}" + text("__setstate__") + SYSTEM + b"sb",
    "an argument": name("builtins", "getattr") + MARK + SYSTEM + text("__call__") + b"tR",
}
NAMES = [
    *("nt.system", "__builtin__.eval", "commands.getoutput", "pydoc.pipepager", "timeit.timeit"),
    *("torch.hub.load", "torch.jit.load", "torch.storage._load_from_bytes", "torch._C._jit_pass"),
    *(
        "numpy.memmap",
        "numpy.testing._private.utils.runstring",
        "functools.reduce",
        "runpy.run_path",
    ),
    *(
        "torch.utils.data.DataLoader",
        "torch.optim.adam.Adam",
        "torch.nn.ModuleList",
        "shutil.rmtree",
    ),
    *("torch.serialization.os", "collections._sys", "collections.abc", "argparse._os", "enum.sys"),
    *("pathlib.os", "typing.sys", "importlib.import_module", "pickle.loads", "webbrowser.open"),
]


@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_stands(place: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + PLACES[place] + STOP)
    assert scan(path).verdict == "dangerous"


@pytest.mark.parametrize("dotted", NAMES)
def test_whatever_it_is_called(dotted: str, tmp_path: Path) -> None:
    module, _, attribute = dotted.rpartition(".")
    path = tmp_path / "x.pkl"
    path.write_bytes(name(module, attribute) + MARK + ID + b"tR" + STOP)
    assert scan(path).verdict == "dangerous"
