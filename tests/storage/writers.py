"""Writers to be disturbed: what they write, and what must be there afterwards."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from modelctl.core.storages import RunStorage
from modelctl.storage.layout import Layout, LayoutBuilder
from modelctl.storage.source import FileSource
from modelctl.storage.staging import staged_file, staged_files

from .faults import killed_before, leftovers

PIECE = 5_000
SHARDS = ("a", "b")


def content(state: str, name: str = "") -> bytes:
    return f"{state:>8}{name:>8}".encode() * PIECE


def state_of(path: Path, name: str = "") -> str:
    """What was written there, which must be whole."""
    data = path.read_bytes()
    state = data[:8].decode().strip()
    assert data == content(state, name)
    return state


class AFile:
    """A file that is new, or replaces one."""

    def __init__(self, folder: Path, name: str = "f") -> None:
        self.target = folder / name
        self.source = folder.parent / "source"

    def prepare(self) -> None:
        self.run("old")

    def run(self, state: str) -> None:
        """Half of it from memory, half by the kernel."""
        if not self.source.exists():
            self.source.write_bytes(content("old") + content("new") + content("newer"))
        half, at = len(content(state)) // 2, ["old", "new", "newer"].index(state)
        with staged_file(self.target, overwrite=True) as group:
            source = FileSource(self.source)
            out = LayoutBuilder()
            out.add(content(state)[:half])
            out.copy(RunStorage(source, half * 2 * at + half, half))
            group.carry_out(Layout([out.file(self.target.name)]))
            source.close()

    def state(self) -> str:
        return state_of(self.target)

    def again(self) -> None:
        self.run("new")
        self.run("old")


class ANewFile(AFile):
    def prepare(self) -> None:
        pass

    def state(self) -> str:
        return state_of(self.target) if self.target.exists() else "old"


class InPlace(AFile):
    """An edit of the file itself, of which a half stays as it is."""

    def prepare(self) -> None:
        self.target.write_bytes(self.expected("old"))

    def run(self, state: str) -> None:
        source = FileSource(self.target)
        half = source.size // 2
        with staged_file(self.target, overwrite=True, sources=[source]) as group:
            out = LayoutBuilder()
            out.add(content(state)[:half])
            out.copy(RunStorage(source, half, half))
            group.carry_out(Layout([out.file(self.target.name)]))
        source.close()

    def expected(self, state: str) -> bytes:
        half = len(content(state)) // 2
        return content(state)[:half] + content("kept")[half:]

    def state(self) -> str:
        data = self.target.read_bytes()
        state = data[:8].decode().strip()
        assert data == self.expected(state)
        return state


class AfterKilledOnes(AFile):
    """A run that finds what killed ones left: its own target's, another file's, a folder's."""

    def prepare(self) -> None:
        left = self.target.parent.parent / "left"
        if not left.exists():
            left.mkdir()
            self.leave(left)
        shutil.copytree(left, self.target.parent, dirs_exist_ok=True)

    @staticmethod
    def leave(folder: Path) -> None:
        AFile(folder).prepare()
        aside = folder / "aside"
        for case, nth in ((AFile, 1), (partial(AFile, name="g"), 1), (AFolder, 2), (Files, 2)):
            aside.mkdir()  # or each would tidy up after the one before
            # before the second replace, some are in place and some are not
            assert killed_before(nth, partial(case(aside).run, "new"), ("os.replace",))
            assert len(leftovers(aside)) >= 2
            for name in os.listdir(aside):
                os.replace(aside / name, folder / name)
            aside.rmdir()
        AFile(folder).target.write_bytes(content("old"))


class AFolder:
    """A folder that did not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "m"

    def prepare(self) -> None:
        pass

    def run(self, state: str) -> None:
        files = []
        for name in (*SHARDS, "index"):
            out = LayoutBuilder()
            out.add(content(state, name))
            files.append(out.file(name))
        with staged_files(self.folder, overwrite=True) as group:
            group.carry_out(Layout(files))

    def state(self) -> str:
        if not self.folder.exists():
            return "old"
        assert sorted(os.listdir(self.folder)) == [*SHARDS, "index"]
        (state,) = {state_of(self.folder / name, name) for name in (*SHARDS, "index")}
        return state

    def again(self) -> None:
        self.run("new")
        gone = self.folder.with_name("gone")
        os.replace(self.folder, gone)
        shutil.rmtree(gone)


class Files:
    """Files of a folder that exists: new shards, their index, and the old shards go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        self.run("old")

    def run(self, state: str) -> None:
        with staged_files(self.folder, overwrite=True) as group:
            for shard in SHARDS:
                with group.open(f"{shard}.{state}") as sink:
                    sink.write(content(state, shard))
            with group.open("index") as sink:
                sink.write(content(state))
            group.remove_after([f"{shard}.{old}" for shard in SHARDS for old in self.others(state)])

    def others(self, state: str) -> list[str]:
        return [path.name[2:] for path in self.folder.glob("a.*") if path.name != f"a.{state}"]

    def state(self) -> str:
        state = state_of(self.folder / "index")
        for shard in SHARDS:
            assert state_of(self.folder / f"{shard}.{state}", shard) == state
        return state

    def again(self) -> None:
        self.run("new")
        self.run("old")


class SameNames(AFolder):
    """Files that replace those of the same names: of old and new ones, but each whole."""

    def prepare(self) -> None:
        self.run("old")

    def state(self) -> str:
        shards = {state_of(self.folder / name, name) for name in SHARDS}
        index = state_of(self.folder / "index", "index")
        assert index == "old" or shards == {index}
        return index


Case = type[AFile] | type[AFolder] | type[Files]
CASES: list[Case] = [ANewFile, AFile, InPlace, AfterKilledOnes, AFolder, Files, SameNames]
