"""The command line: thin commands that open, call, save and show."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from typing import NoReturn

from ..errors import ModelctlError


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a finding, 2 an error (docs/cli.md#exit-codes)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: 2>&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: what is half-written goes away
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupted)
    gc.disable()  # a command is over before there is anything to collect
    sys.exit(run(sys.argv[1:]))


def _interrupted(number: int, frame: object) -> NoReturn:
    """The system's request to end, a scheduler's or a closed terminal's, is as good as Ctrl-C."""
    signal.signal(number, signal.SIG_IGN)  # the way out is not to be interrupted
    _received.append(number)
    raise KeyboardInterrupt


_received: list[int] = []
_INTERRUPTED = 130


def run(argv: list[str]) -> int:
    """Run one command; the exit code. Errors are printed to stderr, in one or two lines."""
    import typer

    from .app import make_app

    # a completion is asked of the whole program
    only = argv[0] if argv and "_MODELCTL_COMPLETE" not in os.environ else None
    try:
        # without standalone mode, typer gives the code of typer.Exit back
        code = make_app(only)(argv, prog_name="modelctl", standalone_mode=False)
        sys.stdout.flush()
    except ModelctlError as e:
        return _failed(e.message, e.hint, e)
    except typer.TyperException as e:
        return _failed(*_usage(e), e)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except (BrokenPipeError, SystemExit):  # typer's own way out of a broken pipe
        # the reader (head, less) has seen enough; what is left in the buffer has nowhere to go
        _discard_stdout()
        return 0
    except OSError as e:
        _discard_stdout()
        where = f"{e.filename}: " if e.filename else ""
        return _failed(f"{where}{e.strerror or e}", None, e)
    except Exception as e:
        hint = "this is a bug in modelctl; MODELCTL_DEBUG=1 shows where"
        return _failed(f"{type(e).__name__}: {e}", hint, e)
    if code == _INTERRUPTED:  # typer gives this code, too
        print("interrupted", file=sys.stderr)
        return 128 + _received[-1] if _received else _INTERRUPTED
    return code if isinstance(code, int) else 0


def _discard_stdout() -> None:
    """What is left in the buffer must not fail a second time when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(e: Exception) -> tuple[str, str]:
    context = getattr(e, "ctx", None)
    command = getattr(context, "command_path", "modelctl")
    text = e.format_message() if hasattr(e, "format_message") else str(e)
    text = text or "which command?"  # its help was printed
    return text.rstrip("."), f"see '{command} --help'"


def _failed(message: str, hint: str | None, cause: BaseException) -> int:
    from ..core.text import printable

    if os.environ.get("MODELCTL_DEBUG") == "1":
        raise cause
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
    return 2
