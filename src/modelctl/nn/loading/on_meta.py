"""Models whose parameters take no memory until a file fills them, and whose buffers are real."""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..model_names import is_lazy

_Twins = MutableMapping[nn.Parameter, nn.Parameter]


class _Building(threading.local):
    """Of each thread that is in a block, the twins on meta of what was registered there."""

    twins: _Twins | None = None


_here = _Building()
_installing = threading.Lock()
_installed = False


@contextmanager
def on_meta() -> Iterator[None]:
    """A block in which the parameters of modules go to ``meta`` as they are registered: they have
    a shape and a dtype, but no memory. ::

        with mnn.on_meta():
            model = LlamaForCausalLM(config)
        mnn.load_into(model, path)

    Buffers get their values as ever, since no file holds those that aren't persistent (the
    rotary tables of Llama, BERT's position ids), which is why ``torch.device("meta")`` can't be
    used for such models. What is made in the block and is no parameter is not affected, and a
    parameter that is registered in several places stays tied. Parameters of a class of their own,
    and those of lazy modules, stay as they are.

    Blocks may stand inside each other, and other threads build as ever. Within the block
    parameters have no values: code that reads them there (``weight.sum().item()``) raises what
    torch raises, as does a model that runs a part of itself over a BatchNorm while it is built
    (torchvision's ssdlite320); a module that takes a buffer from a parameter has it on ``meta``.
    """
    _install()
    outer = _here.twins
    if outer is None:
        _here.twins = cast(_Twins, WeakIdKeyDictionary())
    try:
        yield
    finally:
        _here.twins = outer


def _install() -> None:
    """Have torch ask about each parameter, once and for all: a hook that goes away while another
    thread builds a model would make torch raise there."""
    global _installed
    with _installing:
        if not _installed:
            hook: Any = _without_memory
            register_module_parameter_registration_hook(hook)
            _installed = True


def _without_memory(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
    """What is registered for a parameter; None for itself."""
    twins = _here.twins
    if twins is None or type(parameter) is not nn.Parameter or parameter.is_meta:
        return None
    if is_lazy(parameter):
        return None
    if parameter not in twins:
        twin = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        twin.__dict__.update(parameter.__dict__)
        twins[parameter] = twin
    return twins[parameter]
