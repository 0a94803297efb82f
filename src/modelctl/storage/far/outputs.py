"""Outputs that are far: every file comes to its store in parts, and none appears before all were
written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from shlex import quote

from ...core.storages import Run, Source
from ...errors import ModelctlError, UsageError, WriteError
from ..layout import FileLayout, Layout, check_layout
from ..outputs import Group, OutPlace
from ..sink import Checker, Progress, Sink
from ..source import check_unchanged
from ..targets import plain_name
from ..torchrun.ranks import joined
from .blocks import FarSource
from .filesystems import Filesystem
from .place import store_of
from .uploads import Upload
from .urls import Url, shown


def far_out_place(url: Url) -> FarOutPlace:
    """The place that a URL names as an output.

    Raises:
        UsageError: nothing is written to such a URL; no bucket is named.
        MissingExtraError: what writes there is not installed.
    """
    name = shown(url.text)
    file = quote(name.rstrip("/").rpartition("/")[2] or "FILE")
    if url.scheme in ("http", "https"):
        raise UsageError(
            f"{name}: a web server is read, not written to",
            hint=f"-o {file}, and upload that; or name the store: -o s3://BUCKET/{file}",
        )
    if url.scheme == "hf":
        repo = "/".join(url.rest.split("@")[0].split("/")[:2])
        raise UsageError(
            f"{name}: the hub is read, not written to: what is new there is a commit",
            hint=f"-o {file}, then hf upload {quote(repo)} {file}",
        )
    store, path = store_of(url)
    assert isinstance(store, Filesystem)
    if not path.strip("/"):
        raise UsageError(f"{name}: names no file", hint=f"{url.scheme}://BUCKET/NAME.pt")
    return FarOutPlace(store, path, url, folder=url.rest.endswith("/"))


class FarOutPlace(OutPlace):
    """A file or a folder of a store that an output goes to."""

    def __init__(self, store: Filesystem, path: str, url: Url, *, folder: bool = False) -> None:
        self._store, self._far, self._url = store, path, url
        self.path, self.name = url.text, shown(url.text)
        self.said_folder = folder

    @cached_property
    def is_folder(self) -> bool:
        return self.said_folder or self._kind == "directory"

    @property
    def is_there(self) -> bool:
        return self._kind is not None

    @cached_property
    def _kind(self) -> str | None:
        return (self._store.now(self._far) or {}).get("type")

    @property
    def names(self) -> list[str]:
        self._store.forget()
        try:
            return self._store.names(self._far)
        except FileNotFoundError:  # a folder that is still to be
            return []

    @property
    def filename(self) -> str:
        return "" if self.said_folder else self._far.rpartition("/")[2]

    @property
    def folder(self) -> FarOutPlace:
        up = self._far.rpartition("/")[0]
        rest = self._url.rest.rstrip("/").rpartition("/")[0]
        return FarOutPlace(self._store, up, self._url._replace(rest=rest))

    @property
    def bare(self) -> FarOutPlace:
        rest = self._url.rest.rstrip("/")
        return FarOutPlace(self._store, self._far, self._url._replace(rest=rest))

    @property
    def result(self) -> Path | str:
        return self.path

    @property
    def key(self) -> str:
        return f"{self._url.scheme}://{self._far}"

    def member(self, name: str) -> FarOutPlace:
        rest = f"{self._url.rest.rstrip('/')}/{name}"
        path = self._store.join(self._far, name)
        return FarOutPlace(self._store, path, self._url._replace(rest=rest))

    def read(self) -> bytes:
        return self._store.read(self._far)

    def holds(self, read_from: str, *, as_folder: bool) -> bool:
        return False  # all of a far folder is written: nothing there is patched

    # ------------------------------------------------------------------ writing

    def check_file(self, *, overwrite: bool) -> None:
        _Output(self._store, self._far, self.name, overwrite, ()).look()

    def check_folder(self) -> None:
        kind = (self._store.now(self._far) or {}).get("type")
        if kind is None:
            self._store.check_bucket(self._far)
        elif kind != "directory":
            raise WriteError(f"{self.name}: exists already, and is no folder")

    @property
    def is_missing(self) -> bool:
        return False  # a store's folders are parts of names

    def made(self) -> AbstractContextManager[None]:
        return nullcontext()

    def staged_file(
        self, *, overwrite: bool, sources: Iterable[Source]
    ) -> AbstractContextManager[Group]:
        folder, _, name = self._far.rpartition("/")
        return _staged(FarGroup(self._store, folder, overwrite, sources, only=name))

    def staged_files(
        self, *, overwrite: bool, sources: Iterable[Source]
    ) -> AbstractContextManager[Group]:
        return _staged(FarGroup(self._store, self._far, overwrite, sources, there=self.names))


@contextmanager
def _staged(group: FarGroup) -> Iterator[FarGroup]:
    """The files stand once the block ends without an error."""
    if joined() is not None:
        raise UsageError(
            "torchrun's processes write together on a file system alone, not to a store",
            hint="-o FILE, and upload that; or do it without torchrun",
        )
    try:
        yield group
        group.commit()
    except BaseException as e:
        left = group.discard()
        if left and isinstance(e, ModelctlError):
            e.hint = f"{left}: parts that were sent may be left there, unseen and paid for"
        raise


class FarGroup:
    """Files on their way to one folder of a store, where all appear or none.

    Attributes:
        names: what stands in the folder already, of a group of one its file.
    """

    def __init__(
        self,
        store: Filesystem,
        folder: str,
        overwrite: bool,
        sources: Iterable[Source],
        *,
        only: str = "",
        there: Iterable[str] = (),
    ) -> None:
        self._store, self._folder, self._overwrite = store, folder, overwrite
        self._read = list(sources)
        self._sources = [one for one in self._read if isinstance(one, FarSource)]
        self._only = only
        self.names = [only] if only else list(there)
        self._outputs: dict[str, _Output] = {}
        self._superseded: dict[str, _Output] = {}

    def carry_out(self, layout: Layout, progress: Progress | None = None) -> None:
        """Send all files of a layout; none of them appears yet.

        Args:
            progress: called with the number of bytes that were taken since the last call.

        Raises:
            UnreadableError: what they are made from can't be read.
            WriteError: one exists and is not to be replaced; the store fails; the layout is wrong.
        """
        for file in layout.files:
            check_layout(file)
            name = self._only or plain_name(file.name)
            if name in self._outputs:
                raise WriteError(f"{name}: to be written twice")
            self._outputs[name] = self._output(name, self._overwrite)
            self._outputs[name].look()
        for name in layout.superseded:
            if name not in self._outputs:
                self._superseded[name] = self._output(name, True)
        with Checker() as checker:  # what is sent can be taken back
            for file, output in zip(layout.files, self._outputs.values(), strict=True):
                output.send(file, checker, progress)

    def _output(self, name: str, overwrite: bool) -> _Output:
        path = self._store.join(self._folder, plain_name(name))
        return _Output(self._store, path, self._store.shown(path), overwrite, self._sources)

    def commit(self) -> None:
        """Let all files stand, the one that names the others last; then remove what they take the
        place of."""
        outputs = list(self._outputs.values())
        for output in (*outputs, *self._superseded.values()):
            output.look()
        check_unchanged(self._read)
        try:
            for output in outputs:
                output.commit()
        except BaseException as e:
            for output in outputs:
                output.withdraw()
            stand = [output.name for output in outputs if output.committed]
            if stand:
                raise WriteError(
                    f"{e}; new already: {', '.join(stand)}; the rest is as it was",
                    hint="run it again",
                ) from e
            raise
        for output in self._superseded.values():
            with suppress(ModelctlError):
                output.remove()

    def discard(self) -> str:
        """Take back what was sent and was not committed; of the first that could not be its
        name."""
        failed = ""
        for output in self._outputs.values():
            output.stop()
        for output in self._outputs.values():
            try:
                output.discard()
            except ModelctlError:
                failed = failed or output.name
        return failed


class _Output:
    """One file on its way to its store."""

    def __init__(
        self,
        store: Filesystem,
        path: str,
        name: str,
        overwrite: bool,
        sources: Iterable[FarSource],
    ) -> None:
        self._store, self._path, self.name, self._overwrite = store, path, name, overwrite
        self._sources = sources
        self._upload: Upload | None = None
        self._fresh = True
        self.committed = False

    def look(self) -> None:
        """Raises WriteError where something stands there that may not be replaced, nothing can
        stand there, or it is a source that is no longer as it was read."""
        now = self._store.now(self._path)
        self._fresh = now is None
        if now is None:
            self._store.check_bucket(self._path)
        elif now.get("type") == "directory":
            raise WriteError(f"{self.name}: is a folder", hint=f"-o {quote(self.name + '/')}")
        elif not self._overwrite:
            raise WriteError(f"{self.name}: exists already", hint="--overwrite replaces it")
        for source in self._sources:
            self._store.check_still(source.opened, self._path)

    def send(self, file: FileLayout, checker: Checker, progress: Progress | None) -> None:
        """All of a file, by its layout."""
        self._upload = self._store.upload(self._path, file.nbytes)
        put = self._upload.put
        sink = _FarSink(
            self.name, lambda part: self._store.do(lambda: put(part), self._path), progress
        )
        sink.carry_out(file, checker)
        if sink.position != file.nbytes:
            raise WriteError(f"{self.name}: {sink.position:,} of {file.nbytes:,} bytes were sent")
        self._store.do(self._upload.finish, self._path)

    def commit(self) -> None:
        assert self._upload is not None
        try:
            self._store.do_whole(self._upload.commit, self._path)
        except KeyboardInterrupt:  # it was done all the same
            self._upload, self.committed = None, True
            raise
        self._upload, self.committed = None, True

    def withdraw(self) -> None:
        """Take away what was committed where nothing stood."""
        if self.committed and self._fresh:
            with suppress(ModelctlError):
                self.remove()
                self.committed = False

    def remove(self) -> None:
        self._store.remove(self._path)

    def stop(self) -> None:
        if self._upload is not None:
            self._upload.stop()

    def discard(self) -> None:
        if self._upload is not None:
            upload, self._upload = self._upload, None
            self._store.do_whole(upload.discard, self._path)


class _FarSink(Sink):
    """A file that is sent from its start to its end."""

    def __init__(
        self, name: str, send: Callable[[memoryview], None], progress: Progress | None
    ) -> None:
        super().__init__(-1, Path(name), progress)
        self._name, self._send = name, send

    def begin(self, nbytes: int) -> None:
        """A store has no room to ask for."""

    def _put(self, view: memoryview, at: int, *, new: bool = True) -> int:
        if at != self.position:
            raise WriteError(
                f"{self._name}: what stands at {at:,} is known when more was sent, which no store "
                "takes",
                hint="-o FILE, and copy that there",
            )
        self._send(view)
        self._advance(at, len(view))
        return at + len(view)

    def _copy_range(self, run: Run, at: int) -> int:
        run.source.check(run.offset, run.nbytes)
        return 0

    def _begin_writing(self) -> None:
        self._sent = self.position
