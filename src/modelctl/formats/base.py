"""What a format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from ..core.checkpoint import Checkpoint
from ..core.notes import Loss, Note, info, warning
from ..core.records import records
from ..core.sections import is_nameless
from ..core.sections.devices import devices_of, devices_text
from ..core.tensors import TensorRef
from ..core.text import count, some
from ..core.tree import Path
from ..errors import ModelctlError
from ..storage.layout import FileLayout, Layout
from ..storage.places import Place


def no_state_dict(ckpt: Checkpoint) -> str:
    """The way out where a format wants one flat state_dict, and this is none."""
    if is_nameless(ckpt.root) and ckpt.origin is not None:
        saved = f"torch.load({ckpt.origin.path!r})"
        one = isinstance(ckpt.root, TensorRef)
        made = f"{{'tensor': {saved}}}" if one else f"{{str(i): t for i, t in enumerate({saved})}}"
        return f"give it a name: torch.save({made}, 'named.pt'); or write .pt"
    if not ckpt.sections.models:  # there is none in it, either
        return "write .pt: tensors that have no names go there"
    return "'modelctl convert --weights-only' keeps the model's tensors alone, or write .pt"


class Format(ABC):
    """One kind of checkpoint: how it is recognised and read.

    What a format can do beyond that is said by its class and its attributes; nobody asks for its
    name.

    Attributes:
        name: what ``--to`` takes and JSON shows.
        label: what people read.
        in_shards: whether a checkpoint of it lies in several files, which an index names.
    """

    name: str
    label: str
    in_shards: bool = False

    @abstractmethod
    def sniff(self, place: Place) -> bool:
        """Whether the place is of this format: by what is in it, never by its name."""

    @abstractmethod
    def read(self, place: Place) -> Checkpoint:
        """The structure of a place that :meth:`sniff` knows; no tensor is read. The place stays
        open for the tensors.

        Raises:
            UnreadableError: damaged, or two readers could understand it differently; says where.
            UnsupportedError: sound, but of a kind that is not read.
        """

    def explain(self, place: Place) -> ModelctlError | None:
        """For a place that no format knows: what is wrong with it, where it looks like one of
        this format; None where it does not."""
        return None

    def salvage(self, place: Place) -> Checkpoint | None:
        """What is whole of a file of this format whose end is missing: a checkpoint of which some
        storages can't be read. None where it is of another, or this one can't tell.

        Raises:
            UnreadableError: it is cut off in its structure.
        """
        return None


class Writable(Format):
    """A format that can be written, too.

    Attributes:
        suffixes: those that choose it for an output, the usual one first.
        whole_storages: whether it keeps storages whole: views of one share it, and tied tensors
            have all their names. Otherwise each tensor is by itself, and tied ones are kept once.
        string_metadata: whether it has a place of its own for a checkpoint's string metadata.
        keeps_records: whether what modelctl records in a state_dict (freeze, removed, history) is
            read again from what it writes.
        keeps_devices: whether it says on which device each storage was.
        by_name: whether an output can be asked to be of it (``--to``).
    """

    by_name: bool = True
    suffixes: tuple[str, ...] = ()
    whole_storages: bool = False
    string_metadata: bool = False
    keeps_records: bool = False
    keeps_devices: bool = False

    @abstractmethod
    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        """What of the checkpoint this format can't hold."""

    def remarks(self, ckpt: Checkpoint) -> list[Note]:
        """What becomes of the checkpoint in this format, and what other readers make of it, where
        that may surprise."""
        notes = [] if ckpt.device is None else [self._about_device(ckpt, ckpt.device)]
        if self.keeps_records or not ckpt.sections.models:
            return notes
        lost = list(records(ckpt.sections.models[0].node))
        if not self.string_metadata:
            lost += [key for key in ckpt.metadata if key != "format"]
        if lost:
            notes.append(warning(f"{self.label} has no place for {some(lost)}: left out"))
        return notes

    def _about_device(self, ckpt: Checkpoint, device: str) -> Note:
        if not self.keeps_devices:
            return info(f"{self.label} records no device: {device} is not written")
        tensors = count(len(ckpt.tensors()), "tensor")
        was = devices_of(ckpt.replace(device=None))
        before = "" if was is None else f", where they said {devices_text(was)}"
        return info(f"{tensors} say {device}{before}")

    def record_by_hand(self, ckpt: Checkpoint, path: str, section: Path, record: str) -> str | None:
        """Python that reads a record of ours in a file of this format without modelctl; None
        where that takes more than an expression.

        Args:
            ckpt: what the file holds.
            path: the file.
            section: where in it the model's state_dict is.
            record: what it is called (``modelctl.freeze``).
        """
        return None


class WritableFormat(Writable):
    """A format whose checkpoints are files.

    Attributes:
        shard_names: what the shards of a folder are called, stem and suffix (``model``,
            ``.safetensors``); None where there is no such folder.
    """

    shard_names: tuple[str, str] | None = None

    @abstractmethod
    def layout(self, ckpt: Checkpoint, name: str) -> FileLayout:
        """What the file called ``name`` would be (it has none where it goes to a stream); nothing
        is read but what the checkpoint's structure needs, and nothing is written.

        Raises:
            RefusedError: it holds a call that unpickling the output would run.
            UnsupportedError: a part of it can't be written.
        """


class WritableFolder(Writable):
    """A format whose checkpoints are folders of several files."""

    @abstractmethod
    def layout(self, ckpt: Checkpoint, there: Collection[str], *, in_place: bool) -> Layout:
        """What the files of the folder would be, the one that names the others last.

        Args:
            there: the names that are in the folder.
            in_place: whether it is the one that the checkpoint was read from, whose files the new
                ones may go on using.

        Raises:
            RefusedError, UnsupportedError: as :meth:`WritableFormat.layout`.
        """

    @abstractmethod
    def occupied(self, there: Collection[str]) -> list[str]:
        """Those of the names in a folder that are a checkpoint of this format already."""
