"""Models for the live view: built from a name, or loaded whole where that is asked for."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...core.names import nearest
from ...core.text import some
from ...errors import MissingExtraError, ModelctlError, RefusedError, UsageError
from ..training.rng import random_numbers_kept

_FORMS = "torchvision:NAME, timm:NAME, package.module:factory, file.py:factory"


def build(arch: str, given: Mapping[str, Any], *, meta: bool = True) -> nn.Module:
    """A model by the name of its architecture, without pretrained weights.

    ``torchvision:NAME`` and ``timm:NAME`` are those libraries' models; ``package.module:factory``
    and ``file.py:factory`` call a function or class of yours (its code runs). ``given`` are its
    keyword arguments. With ``meta`` parameters have no values and take no memory.

    Raises:
        MissingExtraError: torchvision or timm is not installed.
        UsageError: no such name, module or factory.
        ModelctlError: the factory raised, or gave no module.
    """
    library, found, name = arch.rpartition(":")
    if not found or not library or not name:
        raise UsageError(f"'{arch}' is not an architecture", hint=f"there are {_FORMS}")
    if library == "torchvision":
        factory, arguments = _torchvision(name), dict(given)
        _without_weights(factory, arguments)
    elif library == "timm":
        factory, arguments = _timm(name), {"pretrained": False, **given}
    else:
        factory, arguments = _factory(library, name), dict(given)
        if isinstance(factory, nn.Module):
            return factory
    return _call(arch, factory, arguments, meta)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as keyword arguments; a value is a Python literal, true, false, or text.

    Raises:
        UsageError: not ``NAME=VALUE``.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"'{text}' is no argument: NAME=VALUE is")
        words = {"true": True, "false": False, "none": None, "null": None}
        try:
            found[name] = words.get(value.lower(), ast.literal_eval(value))
        except (ValueError, SyntaxError):
            found[name] = words.get(value.lower(), value)
    return found


def _torchvision(name: str) -> Callable[..., Any]:
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError(
            "torchvision is not installed", hint="pip install torchvision"
        ) from None
    known = models.list_models()
    if name not in known:
        raise _unknown(f"torchvision has no model '{name}'", name, known)
    builder: Callable[..., Any] = models.get_model_builder(name)
    return builder


def _without_weights(factory: Callable[..., Any], given: dict[str, Any]) -> None:
    """A detection model downloads weights for its backbone unless told not to."""
    for name in ("weights", "weights_backbone"):
        if name in inspect.signature(factory).parameters:
            if isinstance(given.get(name), str):
                raise UsageError(
                    f"--arch-arg {name}: the table needs no weights, and nothing is downloaded"
                )
            given[name] = None


def _timm(name: str) -> Callable[..., Any]:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        raise MissingExtraError("timm is not installed: pip install timm", hint=None) from None
    if not timm.is_model(name):
        raise _unknown(f"timm has no model '{name}'", name, timm.list_models())

    def create(**arguments: Any) -> Any:
        return timm.create_model(name, **arguments)

    return create


def _unknown(message: str, name: str, known: Sequence[str]) -> UsageError:
    near = nearest(name, known)
    return UsageError(message, hint=f"nearest: {', '.join(near)}" if near else None)


def _factory(module: str, name: str) -> Any:
    """Something of the user's own: what it imports is looked for beside it, too."""
    path = Path(module)
    is_file = module.endswith(".py") or path.is_file()
    if is_file and not path.is_file():
        raise UsageError(f"there is no file '{module}'")
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    with _importable(folder):
        try:
            found: Any = _from_file(path) if is_file else importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise UsageError(
                f"'{module}' can't be imported: {e}", hint=f"--arch takes {_FORMS}"
            ) from e
        except (Exception, SystemExit) as e:
            raise ModelctlError(f"importing '{module}' failed: {type(e).__name__}: {e}") from e
    for part in name.split("."):
        inside = [one for one in dir(found) if not one.startswith("_")]
        if not hasattr(found, part):
            raise _unknown(f"'{module}' has no '{name}'", part, inside)
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"'{module}:{name}' is neither a function nor a class")
    return found


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"'{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise
    return module


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


class _EmptyOnMeta(TorchFunctionMode):
    """Parameters are made by ``torch.empty``: those have no values. What is computed while the
    model is built (the widths of a RegNet) keeps its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _call(
    arch: str, factory: Callable[..., Any], arguments: Mapping[str, Any], meta: bool
) -> nn.Module:
    def call() -> Any:
        return factory(**arguments)

    only_parameters: Any = _EmptyOnMeta
    with random_numbers_kept():
        try:
            if not meta:
                model = call()
            else:
                try:
                    with torch.device("meta"):
                        model = call()
                except (RuntimeError, NotImplementedError):
                    with only_parameters():
                        model = call()
        except ModelctlError:
            raise
        except (Exception, SystemExit) as e:
            raise ModelctlError(
                f"{arch} can't be built: {type(e).__name__}: {' '.join(str(e).split())}",
                hint=_way_out(factory, e),
            ) from e
    if not isinstance(model, nn.Module):
        raise UsageError(f"{arch} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _way_out(factory: Callable[..., Any], error: BaseException) -> str | None:
    if not isinstance(error, TypeError):
        return None
    try:
        names = [*inspect.signature(factory).parameters]
    except (TypeError, ValueError):
        return None
    return f"--arch-arg NAME=VALUE gives it arguments; it takes {some(names, 8)}"


# ---------------------------------------------------------------------- whole modules


def load_whole(path: str, kind: str) -> nn.Module:
    """A whole module or TorchScript program from a file, by running what the file says.

    Raises:
        RefusedError: the file can't be loaded, for instance since its class is not here.
    """
    try:
        if kind == "program":
            load: Any = torch.jit.load
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch would rather not
                found: Any = load(path, map_location="cpu")
        else:
            with _importable(os.getcwd()):
                found = torch.load(path, map_location="cpu", weights_only=False)
    except (ModuleNotFoundError, AttributeError) as e:
        raise RefusedError(
            f"the class of the module is not here: {e}",
            hint=f"modelctl summary {quote(path)}, without an input, needs no class; "
            "or run it where the class can be imported",
        ) from e
    except (Exception, SystemExit) as e:
        raise RefusedError(f"torch can't load it: {type(e).__name__}: {e}") from e
    if not isinstance(found, nn.Module):
        raise RefusedError(f"the file holds a {type(found).__name__}, not a whole module")
    return found
