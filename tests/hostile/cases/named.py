"""Names that are not called, and may be: by whatever is allowed, and is handed them."""

from __future__ import annotations

from collections.abc import Iterator

from ..build.containers import STATE_DICT, legacy, torch_zip
from ..build.pickles import (
    EMPTY_DICT,
    MARK,
    NONE,
    ORDERED,
    POP,
    call,
    get,
    group,
    make,
    mapping,
    name,
    number,
    program,
    put,
    sequence,
    short_text,
    stack_name,
    tensor,
    text,
    with_state,
)
from ..case import Case, Fine, Found, one_file
from .execution import SHELL

SYSTEM = name("os", "system")
NAMED, CALLED = Found("name", "os.system"), Found("call", "os.system")
NAMESPACE = make(name("argparse", "Namespace"))
PARTIAL = with_state(
    make(name("functools", "partial"), name("builtins", "int")),
    group(SYSTEM, group(SHELL), EMPTY_DICT, NONE),
)

# Where a name may stand that nobody calls here.
PLACES: dict[str, bytes] = {
    "alone": SYSTEM,
    "an attribute": with_state(NAMESPACE, mapping(astype=SYSTEM)),
    "an attribute of an attribute": with_state(
        NAMESPACE, mapping(a=with_state(make(name("types", "SimpleNamespace")), mapping(b=SYSTEM)))
    ),
    "slots": with_state(NAMESPACE, group(NONE, mapping(detach=SYSTEM))),
    "a value of a dict": mapping(x=SYSTEM),
    "a key of a dict": EMPTY_DICT + SYSTEM + NONE + b"s",
    "a list": sequence(SYSTEM),
    "a tuple": group(SYSTEM, SYSTEM),
    "a tuple in a tuple": group(group(group(SYSTEM))),
    "a set": call(name("builtins", "set"), sequence(SYSTEM)),
    "a frozenset": call(name("builtins", "frozenset"), sequence(SYSTEM)),
    "a deque": call(name("collections", "deque"), sequence(SYSTEM)),
    "an entry of an OrderedDict": ORDERED + text("x") + SYSTEM + b"s",
    "the state of an OrderedDict": with_state(ORDERED, mapping(update=SYSTEM)),
    "the state of a Counter": with_state(
        call(name("collections", "Counter"), EMPTY_DICT), mapping(update=SYSTEM)
    ),
    "a factory": call(name("collections", "defaultdict"), SYSTEM),
    "what a partial keeps": make(name("functools", "partial"), SYSTEM),
    "an argument of a partial": make(name("functools", "partial"), name("builtins", "int"), SYSTEM),
    "an argument of a path": call(name("pathlib", "PurePosixPath"), SYSTEM),
    "an argument of a UUID": call(name("uuid", "UUID"), SYSTEM),
    "an argument of a text": call(name("builtins", "str"), SYSTEM),
    "the state of somebody's object": with_state(
        make(name("acme_utils", "Config")), mapping(x=SYSTEM)
    ),
    "an attribute of a layer": with_state(
        make(name("torch.nn.modules.linear", "Linear")), mapping(reset=SYSTEM)
    ),
    "an argument of a numpy object": call(
        name("numpy.core.multiarray", "_reconstruct"), SYSTEM, group(number(0)), text("b")
    ),
    "arguments by name": name("argparse", "Namespace") + b")" + mapping(x=SYSTEM) + b"\x92",
    "behind a mark that is dropped": MARK + SYSTEM + b"1" + NONE,
    "a memo that nobody reads": SYSTEM + put(200) + POP + NONE,
}

# Names that are no better, and look as if they were.
NAMES: dict[str, tuple[str, str]] = {
    "posix.system": ("posix", "system"),
    "nt.system": ("nt", "system"),
    "subprocess.Popen": ("subprocess", "Popen"),
    "builtins.eval": ("__builtin__", "eval"),
    "builtins.getattr": ("builtins", "getattr"),
    "builtins.__import__": ("builtins", "__import__"),
    "builtins.print": ("builtins", "print"),
    "operator.getitem": ("operator", "getitem"),
    "_operator.methodcaller": ("_operator", "methodcaller"),
    "operator.attrgetter": ("operator", "attrgetter"),
    "re._compile": ("re", "_compile"),
    "logging.getLogger": ("logging", "getLogger"),
    "typing.ForwardRef": ("typing", "ForwardRef"),
    "typing.get_type_hints": ("typing", "get_type_hints"),
    "enum.Enum": ("enum", "Enum"),
    "importlib.import_module": ("importlib", "import_module"),
    "runpy.run_path": ("runpy", "run_path"),
    "ctypes.CDLL": ("ctypes", "CDLL"),
    "antigravity.x": ("antigravity", "x"),
    "pip._internal.main": ("pip._internal", "main"),
    "setuptools.setup": ("setuptools", "setup"),
    "IPython.embed": ("IPython", "embed"),
    "numpy.load": ("numpy", "load"),
    "numpy.testing._private.utils.runstring": ("numpy.testing._private.utils", "runstring"),
    "torch.load": ("torch", "load"),
    "torch.hub.load": ("torch.hub", "load"),
    "torch.optim.lr_scheduler.partial": ("torch.optim.lr_scheduler", "partial"),
    "torch.optim.optimizer.deepcopy": ("torch.optim.optimizer", "deepcopy"),
    "torch.nn.functional.boolean_dispatch": ("torch.nn.functional", "boolean_dispatch"),
    "torch.nn.functional.handle_torch_function": (
        "torch.nn.functional",
        "handle_torch_function",
    ),
    "torch.fx._symbolic_trace.wrap": ("torch.fx._symbolic_trace", "wrap"),
    "torch.storage._load_from_bytes": ("torch.storage", "_load_from_bytes"),
    "torch.utils.data.dataloader.DataLoader": ("torch.utils.data.dataloader", "DataLoader"),
}

# What may stand anywhere.
HARMLESS: dict[str, bytes] = {
    "a dtype": name("torch", "bfloat16"),
    "a layout": name("torch", "strided"),
    "a memory format": name("torch", "channels_last"),
    "a tensor's class": name("torch", "Tensor"),
    "DTensor": name("torch.distributed.tensor", "DTensor"),
    "an activation": name("torch.nn.functional", "relu"),
    "a layer's class": name("torch.nn.modules.linear", "Linear"),
    "a type": name("builtins", "int"),
    "an exception": name("builtins", "ValueError"),
    "Any": name("typing", "Any"),
    "numpy's float32": name("numpy", "float32"),
    "a class of TorchScript": make(name("__torch__.net", "Net")),
    "torch's version": make(name("torch.torch_version", "TorchVersion"), text("2.9.0")),
    "the bytes of Transformer Engine": make(name("_io", "BytesIO")),
}


def _beside(node: bytes) -> bytes:
    """A pickle of a state_dict under a key, and of something else under another."""
    return program(mapping(args=node, state_dict=STATE_DICT), protocol=4)


# Where it stands for what calls it.
_CALLS = ("a factory", "what a partial keeps")


def cases() -> Iterator[Case]:
    for where, node in PLACES.items():
        found = CALLED if where in _CALLS else NAMED
        yield one_file(f"os.system as {where}", torch_zip(_beside(node)), found)
    for shown, (module, attribute) in NAMES.items():
        data = torch_zip(_beside(with_state(NAMESPACE, mapping(f=name(module, attribute)))))
        yield one_file(f"names {shown}", data, Found("name", shown))
    for what, node in HARMLESS.items():
        data = torch_zip(_beside(with_state(NAMESPACE, mapping(f=node))))
        yield one_file(f"harmless: {what}", data, Fine())
    # allowed, and calls what it is handed
    fires = call(
        name("torch.nn.parameter", "Parameter"), with_state(NAMESPACE, mapping(detach=PARTIAL))
    )
    yield one_file(
        "a parameter of a namespace with a detach",
        torch_zip(program(fires, POP, STATE_DICT)),
        CALLED,
        attack=program(fires),
        needs="torch",
    )
    compared = call(name("uuid", "UUID"), with_state(NAMESPACE, mapping(replace=PARTIAL)))
    yield one_file(
        "a UUID of a namespace with a replace",
        torch_zip(program(compared, POP, STATE_DICT)),
        CALLED,
    )
    flood = b"".join(make(name("acme_utils", f"C{i}")) + POP for i in range(1500))
    yield one_file(
        "behind 1,500 classes of somebody's",
        torch_zip(program(flood, call(SYSTEM, SHELL), POP, STATE_DICT)),
        CALLED,
        attack=program(call(SYSTEM, SHELL)),
    )
    # called as it may be, and kept as it may not
    getattr_ = name("builtins", "getattr") + put(100)
    fine = call(
        getattr_,
        name("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        text("TORCH_CONTIGUOUS_FORMAT"),
    )
    yield one_file("harmless: getattr of an Enum of torch's", torch_zip(_beside(fine)), Fine())
    kept = with_state(NAMESPACE, mapping(a=fine, b=get(100)))
    yield one_file(
        "getattr, called as it may be and kept",
        torch_zip(_beside(kept)),
        Found("name", "builtins.getattr"),
    )
    stacked = with_state(NAMESPACE, mapping(f=stack_name("os", "system")))
    yield one_file("named by STACK_GLOBAL", torch_zip(_beside(stacked)), NAMED)
    yield one_file(
        "in a legacy file", legacy(program(mapping(args=SYSTEM, state_dict=STATE_DICT))), NAMED
    )
    hooked = tensor("0", (2, 2)) + put(101) + POP + get(101)
    yield one_file(
        "in _metadata",
        torch_zip(
            program(
                with_state(
                    ORDERED + text("w") + hooked + b"s",
                    mapping(_metadata=ORDERED + short_text("") + mapping(version=SYSTEM) + b"s"),
                ),
                protocol=4,
            )
        ),
        NAMED,
    )
