"""Far files through fsspec, read and written: s3, gs, az, and whatever else it knows."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any, NoReturn

from ...errors import MissingExtraError, ModelctlError, UnreadableError, UsageError, WriteError
from .blocks import HEAD, FarObject
from .stores import Store, no_such_place
from .uploads import ClosedUpload, RenamedUpload, S3Upload, Upload
from .urls import Url, shown

# The longest that any call may take: a store has timeouts of its own, which end before.
TIMEOUT = 120.0
_WHO = "who asks is what the store's own tools would say: environment, profile, login"
# What reads a kind of URL for fsspec, where it has another name.
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip
# Of these the first part of a path is a bucket, which no output makes.
_BUCKETS = frozenset(_PACKAGES)
# What tells one version of an object from another, as the stores call it.
_STATE = (
    *("size", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "modified"),
    *("generation", "md5Hash", "content_settings", "VersionId", "version_id", "created"),
)


def filesystem(url: Url, near: str | None) -> tuple[Store, str]:
    """What knows the files of a URL, and the path that it is there.

    Args:
        near: a kind of URL that may have been meant.

    Raises:
        UsageError: fsspec knows no such kind.
        MissingExtraError: fsspec, or what reads this kind for it, is not installed.
        ModelctlError: it can't be reached.
    """
    name = shown(url.text)
    extra = "pip install fsspec s3fs"
    package = _PACKAGES.get(url.scheme)
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError:
        if near is not None and near != url.scheme:
            raise _unknown(name, url.scheme, near) from None
        raise MissingExtraError(
            f"{name}: {url.scheme}:// goes through fsspec, which is not installed", hint=extra
        ) from None
    try:
        fs, path = _in_time(lambda: url_to_fs(url.text), name, ImportError, ValueError)
    except ImportError:
        how = extra if package in ("s3fs", None) else f"pip install fsspec {package}"
        known = known_implementations.get(url.scheme, {})
        says = package or known.get("err", "another package")
        raise MissingExtraError(
            f"{name}: {url.scheme}:// goes through fsspec and {says}, which is not installed",
            hint=how,
        ) from None
    except ValueError:
        raise _unknown(name, url.scheme, near) from None
    return Filesystem(fs, url, str(path)), str(path).rstrip("/")


def _unknown(name: str, scheme: str, near: str | None) -> UsageError:
    return UsageError(
        f"{name}: nothing reads {scheme}://",
        hint=f"{near}://?" if near else "https://, s3://, gs://, az:// or hf://",
    )


class Filesystem(Store):
    """A file system of fsspec."""

    def __init__(self, fs: Any, url: Url, path: str) -> None:
        self._fs, self._url, self._path = fs, url, path.rstrip("/")
        self._known: dict[str, dict[str, Any] | None] = {}

    def open(self, path: str) -> FarObject:
        if self._info(path) is None:
            raise no_such_place(self, path)
        return _Object(self._fs, path, self.shown(path))

    def is_folder(self, path: str) -> bool:
        info = self._info(path)
        return info is not None and info.get("type") == "directory"

    def size(self, path: str) -> int | None:
        size = (self._info(path) or {}).get("size")
        return size if type(size) is int else None

    def names(self, path: str) -> list[str]:
        found = _in_time(lambda: self._fs.ls(path, detail=True), self.shown(path))
        names = []
        for one in found:
            own = str(one["name"]).rstrip("/")
            if own != path:  # a store may keep an entry for the folder itself
                names.append(own.rpartition("/")[2])
                self._known[own] = one
        return sorted(names)

    def shown(self, path: str) -> str:
        said = shown(self._url.text).rstrip("/")
        if path == self._path:
            return said
        if path.startswith(self._path + "/"):
            return said + path[len(self._path) :]
        up = self._path.rpartition("/")[0]
        if path.rpartition("/")[0] == up:
            return f"{said.rpartition('/')[0]}/{path.rpartition('/')[2]}"
        return f"{self._url.scheme}://{path.lstrip('/')}"

    # ------------------------------------------------------------------ writing

    def now(self, path: str) -> dict[str, Any] | None:
        """What stands at a path as it is now; None where nothing does."""
        try:
            return _info(self._fs, path, self.shown(path))
        except FileNotFoundError:
            return None

    def check_bucket(self, path: str) -> None:
        """Raises WriteError where the bucket of a path is not there: nothing can be written."""
        bucket = path.lstrip("/").partition("/")[0]
        if self._url.scheme in _BUCKETS and bucket != path and self.now(bucket) is None:
            raise self._no_bucket(path)

    def _no_bucket(self, path: str) -> WriteError:
        bucket = path.lstrip("/").partition("/")[0]
        return WriteError(
            f"{self.shown(path)}: there is no bucket {bucket}",
            hint="a bucket is made with the store's own tools",
        )

    def check_still(self, read: FarObject | None, path: str) -> None:
        """Raises WriteError where an object that was read is the one at a path, and is no longer
        as it was."""
        if not isinstance(read, _Object) or read.place != (type(self._fs), path):
            return
        try:
            read.check()
        except UnreadableError as e:
            raise WriteError(
                f"{self.shown(path)}: changed while it was edited: nothing was written",
                hint="run it again",
            ) from e

    def forget(self) -> None:
        """Ask anew for what was listed before."""
        self._known.clear()
        self._fs.invalidate_cache()

    def read(self, path: str) -> bytes:
        """All of a small file. Raises FileNotFoundError."""
        return bytes(_in_time(lambda: self._fs.cat_file(path), self.shown(path)))

    def upload(self, path: str, nbytes: int) -> Upload:
        """What takes a file of so many bytes."""
        scheme = self._url.scheme
        if scheme in ("s3", "s3a"):
            return S3Upload(self._fs, path, nbytes)
        if scheme in _BUCKETS:
            return ClosedUpload(self._fs, path, nbytes)
        return RenamedUpload(self._fs, path, nbytes, self._move)

    def _move(self, path: str, to: str) -> None:
        from fsspec.spec import AbstractFileSystem

        if type(self._fs).mv is not AbstractFileSystem.mv:
            self._fs.mv(path, to)
        else:  # the general one takes names for patterns
            self._fs.cp_file(path, to)
            self._fs.rm_file(path)

    def remove(self, path: str) -> None:
        """Remove a file. Raises WriteError."""
        self.do(lambda: self._fs.rm_file(path), path)

    def do(self, call: Callable[[], object], path: str) -> None:
        """A call that writes to a path.

        Raises:
            WriteError: it failed.
        """
        try:
            call()
        except ModelctlError:
            raise
        except Exception as e:
            self._failed(e, path)

    def do_whole(self, call: Callable[[], object], path: str) -> None:
        """A call that is not cut off: Ctrl-C waits until it is known what became of it.

        Raises:
            WriteError: it failed.
            KeyboardInterrupt: it was done.
        """
        failed: list[Exception] = []

        def run() -> None:
            try:
                call()
            except Exception as e:
                failed.append(e)

        thread = Thread(target=run, daemon=True)
        thread.start()
        interrupted = False
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt:
                interrupted = True
        if failed:
            self._failed(failed[0], path)
        if interrupted:
            raise KeyboardInterrupt

    def _failed(self, e: Exception, path: str) -> NoReturn:
        if isinstance(e, FileNotFoundError) and self._url.scheme in _BUCKETS:
            raise self._no_bucket(path) from e
        name, why = self.shown(path), _first_line(e)
        if isinstance(e, PermissionError):
            raise WriteError(f"{name}: it may not be written ({why})", hint=_WHO) from e
        raise WriteError(f"{name}: not written: {why}", hint="run it again") from e

    def _info(self, path: str) -> dict[str, Any] | None:
        if path not in self._known:
            try:
                self._known[path] = _info(self._fs, path, self.shown(path))
            except FileNotFoundError:
                self._known[path] = None
        return self._known[path]


class _Object(FarObject):
    """A file of a file system of fsspec. Its ranges don't say which version they are of: after
    each the store is asked whether it is still the same.

    ``place`` is where it is, whatever it is called.
    """

    def __init__(self, fs: Any, path: str, name: str) -> None:
        self._fs, self._path, self.name = fs, path, name
        self.place = type(fs), path
        self._state = self._now()
        size = self._state.get("size")
        if not isinstance(size, int):
            raise UnreadableError("nothing says how long it is", path=name, hint="download it")
        self.size = size
        self.head = self.fetch(0, min(HEAD, size)) if size else b""

    def fetch(self, start: int, stop: int) -> bytes:
        try:
            data: bytes = _in_time(
                lambda: self._fs.cat_file(self._path, start=start, end=stop), self.name
            )
        except FileNotFoundError:
            raise self._removed() from None
        self.check()
        if len(data) != stop - start:
            raise UnreadableError(
                f"{len(data):,} bytes came where {stop - start:,} are asked",
                path=self.name,
                offset=start,
            )
        return data

    def check(self) -> None:
        """Raises UnreadableError where it is no longer as it was at first."""
        try:
            now = self._now()
        except FileNotFoundError:
            raise self._removed() from None
        for what, before in self._state.items():
            if now.get(what) != before:
                raise UnreadableError(
                    f"it changed while it was read: its {what} is {now.get(what)!s:.80}, it was "
                    f"{before!s:.80}",
                    path=self.name,
                    hint="do it again",
                )

    def _removed(self) -> UnreadableError:
        return UnreadableError("it was removed while it was read", path=self.name)

    def _now(self) -> dict[str, Any]:
        info = _info(self._fs, self._path, self.name)
        return {key: info[key] for key in _STATE if info.get(key) is not None}


def _info(fs: Any, path: str, name: str) -> dict[str, Any]:
    """What a store says of a path now. Raises FileNotFoundError where there is nothing."""

    def ask() -> Any:
        fs.invalidate_cache(fs._parent(path))
        return fs.info(path)

    return dict(_in_time(ask, name))


def _in_time(call: Any, name: str, *passes: type[Exception]) -> Any:
    """What a call gives, on a thread that nobody waits for too long.

    Raises:
        FileNotFoundError: as the call; and what else ``passes``.
        ModelctlError: it failed otherwise, or takes too long.
    """
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as e:
            failed.append(e)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if thread.is_alive():
        raise ModelctlError(f"{name}: no answer in {TIMEOUT:.0f} seconds")
    if not failed:
        return found[0]
    e = failed[0]
    if isinstance(e, (FileNotFoundError, ModelctlError, *passes)):
        raise e
    if isinstance(e, PermissionError):
        raise ModelctlError(
            f"{name}: it may not be read ({_first_line(e)})",
            hint=_WHO,
        )
    raise ModelctlError(f"{name}: can't be read: {_first_line(e)}")


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200] or type(e).__name__
