"""The command line: thin commands that call the library and show what it reports."""

from __future__ import annotations

import codecs
import contextlib
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from ..errors import ModelctlError, UsageError


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a finding, 2 an error (docs/cli.md#exit-codes)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: 2>&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: what is half-written goes away
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupted)
    codecs.register_error("modelctl", _degraded)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="modelctl")
    gc.disable()  # a command is over before there is anything to collect
    sys.exit(run(sys.argv[1:]))


def _degraded(e: UnicodeError) -> tuple[str | bytes, int]:
    from .output import degrade

    return degrade(e)


def _interrupted(number: int, frame: object) -> NoReturn:
    """The system's request to end, a scheduler's or a closed terminal's, is as good as Ctrl-C."""
    signal.signal(number, signal.SIG_IGN)  # the way out is not to be interrupted
    _received.append(number)
    raise KeyboardInterrupt


_received: list[int] = []
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # is in the environment of what torchrun starts
_INTERRUPTED = 130
_HELP = {"--help", "-h"}


def run(argv: Sequence[str]) -> int:
    """Run one command; the exit code. Errors are printed to stderr, in one or two lines; where the
    report was to be JSON they are a document on stdout."""
    stdout = sys.stdout
    try:
        return _guarded(argv)
    finally:
        sys.stdout = stdout


def _guarded(argv: Sequence[str]) -> int:
    try:
        code = _by_all(list(argv)) if _TORCHRUN in os.environ else _run(list(argv))
        _flush()
    except ModelctlError as e:
        return _failed(argv, e.as_dict(), e)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as e:
        if "_MODELCTL_COMPLETE" in os.environ:  # typer's own way out, here and of a broken pipe
            return 0
        if isinstance(e.__context__, BrokenPipeError):
            _discard_stdout()
            return 0
        return _failed(argv, _error("exit", _who_ended(e)), e)
    except BrokenPipeError:
        # the reader (head, less) has seen enough; what is left in the buffer has nowhere to go
        _discard_stdout()
        return 0
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        return _failed(argv, _error("os", f"{where}{e.strerror or e}"), e)
    except Exception as e:
        hint = f"this is a bug in {_whose(e)}; MODELCTL_DEBUG=1 shows where"
        return _failed(argv, _error("bug", f"{type(e).__name__}: {e}", hint), e)
    if code == _INTERRUPTED:  # typer gives this code, too
        print("interrupted", file=sys.stderr)
        return 128 + _received[-1] if _received else _INTERRUPTED
    return code


def _by_all(argv: list[str]) -> int:
    """A command of several processes, where torchrun started them: they are one, and the first
    speaks for all."""
    from ..storage.torchrun.ranks import join, leave, was_started

    if not was_started():
        return _run(argv)
    ranks = join()
    try:
        if not ranks.is_first:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if "-" in argv:
            raise UsageError(
                "torchrun's processes have no stdin and stdout in common",
                hint="name a file, or do it without torchrun",
            )
        return ranks.run(lambda: _run(argv))
    finally:
        leave()


def _run(argv: list[str]) -> int:
    """A command that is well said is run at once; typer is for help, mistakes and completion."""
    from .commands import COMMANDS
    from .quick import check_once, said

    if not argv or "_MODELCTL_COMPLETE" in os.environ:
        return _by_typer(argv)
    if argv[0] not in COMMANDS and (not argv[0].startswith("-") or argv[0] == "-"):
        from .mistakes import is_file, no_such_command

        if not is_file(argv[0]):
            no_such_command(argv[0], COMMANDS)
        argv.insert(0, "summary")
    command = COMMANDS.get(argv[0])
    options = said(command, argv[1:]) if command is not None else None
    if command is not None and options is not None:
        return command(**options)
    if command is not None and not _HELP & {*argv}:
        from .mistakes import check_said

        check_once(command, argv[1:])
        check_said(command, argv[1:], COMMANDS.values())
    return _by_typer(argv)


def _by_typer(argv: list[str]) -> int:
    import typer

    from .app import make_app

    # a completion is asked of the whole program
    only = argv[0] if argv and "_MODELCTL_COMPLETE" not in os.environ else None
    try:
        # without standalone mode, typer gives back the code of a command, and of typer.Exit
        code = make_app(only)(argv, prog_name="modelctl", standalone_mode=False)
    except typer.TyperException as e:
        raise _usage(e) from e
    except typer.Abort:
        return _INTERRUPTED
    return code if isinstance(code, int) else 0


def _usage(e: Exception) -> UsageError:
    context = getattr(e, "ctx", None)
    command = getattr(context, "command_path", "modelctl")
    text = e.format_message() if hasattr(e, "format_message") else str(e)
    text = text or "which command?"  # its help was printed
    text = text.replace("Value error, ", "")
    text = re.sub(r"Input should be (a valid \w+)(, .*)?$", r"it takes \1", text)
    text = text.replace("Input should be ", "it must be ")
    return UsageError(text.rstrip("."), hint=f"see '{command} --help'")


def _who_ended(e: SystemExit) -> str:
    """Whose code would have ended the program before its work was done, without a word."""
    import traceback

    last = traceback.extract_tb(e.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}: ended the program ({e.code!r:.80})"


def _whose(e: Exception) -> str:
    """Whose code raised it: ours, or that of a format of another package that we called."""
    import traceback
    from pathlib import Path

    last = traceback.extract_tb(e.__traceback__)[-1]
    ours = Path(__file__).resolve().parents[1] in Path(last.filename).resolve().parents
    return "modelctl" if ours else f"modelctl, or in {last.filename}, line {last.lineno}"


def _flush() -> None:
    from .output import to_stdout

    with to_stdout():
        sys.stdout.flush()


def _discard_stdout() -> None:
    """What is left in the buffer must not fail a second time when Python exits."""
    if sys.stdout is sys.stderr:  # an output went to stdout, which holds nothing of ours
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _error(kind: str, message: str, hint: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "message": message, "hint": hint}


def _failed(argv: Sequence[str], error: dict[str, Any], cause: BaseException) -> int:
    from .output import say

    if os.environ.get("MODELCTL_DEBUG") == "1":
        raise cause
    if _wants_json(argv):
        from .output import write_json

        try:
            write_json("error", {"error": error})
            _flush()
            return 2
        except (OSError, ModelctlError) as e:  # stdout can't be written: stderr is what is left
            cause = e
    if isinstance(cause, OSError) or isinstance(cause.__cause__, OSError):  # it may be stdout's
        _discard_stdout()
    color = _said(argv, "--color")
    say("error", error["message"], color or "auto")
    if error["hint"]:
        say("hint", error["hint"], color or "auto")
    return 2


def _wants_json(argv: Sequence[str]) -> bool:
    """Whether the report was to be JSON, also where the rest of the line is no command."""
    return "--json" in _words(argv) or _said(argv, "--format") == "json"


def _said(argv: Sequence[str], option: str) -> str:
    """What an option was said to be, at last."""
    last = ""
    for word, following in pairwise((*_words(argv), "")):
        flag, equals, text = word.partition("=")
        if flag == option:
            last = text if equals else following
    return last


def _words(argv: Sequence[str]) -> list[str]:
    return list(argv[: argv.index("--")] if "--" in argv else argv)
