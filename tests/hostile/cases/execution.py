"""Pickles that run code where they are unpickled. Each creates a file ``fired``, and nothing else.

What a finding names is what would be called. Who calls it is somebody else: this project reads
these files, and calls nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..build.containers import STATE_DICT, torch_zip
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
    raw_bytes,
    sequence,
    short_text,
    stack_name,
    text,
    with_state,
)
from ..case import Case, Found, one_file

SHELL = text("echo > fired")
PYTHON = text("open('fired', 'w').close()")
ARGV = sequence(text("touch"), text("fired"))
SYSTEM = call(name("os", "system"), SHELL)
MODULE = call(name("importlib", "import_module"), text("os"))
CODE = call(name("builtins", "compile"), PYTHON, text("x"), text("exec"))

# By REDUCE: the function that a finding must name, and what calls it.
CALLS: dict[str, bytes] = {
    "os.system": SYSTEM,
    "posix.system": call(name("posix", "system"), SHELL),
    "os.popen": call(name("os", "popen"), SHELL),
    "os.open": call(name("os", "open"), text("fired"), number(0o101)),
    "os.mkdir": call(name("os", "mkdir"), text("fired")),
    "os.symlink": call(name("os", "symlink"), text("/"), text("fired")),
    "shutil.copyfile": call(name("shutil", "copyfile"), text("/dev/null"), text("fired")),
    "subprocess.call": call(name("subprocess", "call"), ARGV),
    "subprocess.getoutput": call(name("subprocess", "getoutput"), SHELL),
    "pty.spawn": call(name("pty", "spawn"), ARGV),
    "builtins.eval": call(name("builtins", "eval"), PYTHON),
    "builtins.exec": call(name("__builtin__", "exec"), PYTHON),  # Python 2's name for it
    "builtins.open": call(name("builtins", "open"), text("fired"), text("w")),
    "_io.FileIO": call(name("_io", "FileIO"), text("fired"), text("w")),
    "logging.FileHandler": call(name("logging", "FileHandler"), text("fired")),
    "sqlite3.connect": call(name("sqlite3", "connect"), text("fired")),
    "timeit.timeit": call(
        name("timeit", "timeit"), PYTHON, text(""), name("time", "perf_counter"), number(1)
    ),
    "cProfile.run": call(name("cProfile", "run"), PYTHON, text("/dev/null")),
    "runpy._run_code": call(name("runpy", "_run_code"), CODE, EMPTY_DICT),
    "types.FunctionType": call(
        call(name("types", "FunctionType"), CODE, mapping(open=name("builtins", "open")))
    ),
    "builtins.getattr": call(call(name("builtins", "getattr"), MODULE, text("system")), SHELL),
    "_operator.attrgetter": call(
        call(call(name("_operator", "attrgetter"), text("system")), MODULE), SHELL
    ),
    "_operator.methodcaller": call(
        call(name("_operator", "methodcaller"), text("system"), SHELL), MODULE
    ),
    "builtins.map": call(
        name("builtins", "list"),
        call(name("builtins", "map"), name("os", "system"), sequence(SHELL)),
    ),
    "_pickle.loads": call(name("_pickle", "loads"), raw_bytes(program(SYSTEM))),
    "multiprocessing.util.spawnv_passfds": call(
        name("multiprocessing.util", "spawnv_passfds"),
        raw_bytes(b"/usr/bin/touch"),
        sequence(raw_bytes(b"touch"), raw_bytes(b"fired")),
        group(),
    ),
}

# Functions of numpy and torch that run text, or unpickle once more.
LIBRARIES: dict[str, bytes] = {
    "numpy.testing._private.utils.runstring": call(
        name("numpy.testing._private.utils", "runstring"), PYTHON, EMPTY_DICT
    ),
    "numpy.f2py.crackfortran.getlincoef": call(
        name("numpy.f2py.crackfortran", "getlincoef"), PYTHON, EMPTY_DICT
    ),
    "torch.utils.collect_env.run": call(name("torch.utils.collect_env", "run"), SHELL),
    "torch.jit.unsupported_tensor_ops.execWrapper": call(
        name("torch.jit.unsupported_tensor_ops", "execWrapper"), PYTHON, EMPTY_DICT, EMPTY_DICT
    ),
    "torch.fx.graph_module._exec_with_source": call(
        name("torch.fx.graph_module", "_exec_with_source"), PYTHON, EMPTY_DICT
    ),
    "torch.storage._load_from_bytes": call(
        name("torch.storage", "_load_from_bytes"), raw_bytes(torch_zip(program(SYSTEM)))
    ),
}

# By other opcodes, and in other places: the id and the name of the finding, and what it is about.
WAYS: dict[str, tuple[str, str, bytes]] = {
    "INST": ("call", "os.system", b"(S'echo > fired'\nios\nsystem\n"),
    "OBJ": ("call", "os.system", MARK + name("os", "system") + SHELL + b"o"),
    "NEWOBJ": ("call", "subprocess.Popen", call(name("subprocess", "Popen"), ARGV)),
    "EXT1": (
        "extension",
        "241",
        call(name("copyreg", "add_extension"), text("os"), text("system"), number(241))
        + POP
        + call(b"\x82\xf1", SHELL),
    ),
    "EXT4": (
        "extension",
        "70000",
        call(name("copyreg", "add_extension"), text("os"), text("system"), number(70000))
        + POP
        + call(b"\x84" + (70000).to_bytes(4, "little"), SHELL),
    ),
    "a name with dots": (
        "dotted-name",
        "logging.os.system",
        call(stack_name("logging", "os.system"), SHELL),
    ),
    "a method": (
        "dotted-name",
        "pathlib.Path.touch",
        call(
            stack_name("pathlib", "Path.touch"),
            call(name("pathlib", "PosixPath"), text("fired")),
        ),
    ),
    "a name put together from the memo": (
        "call",
        "os.system",
        short_text("system") + b"\x940" + short_text("os") + b"\x940"
        + call(get(1) + get(0) + b"\x93", SHELL),
    ),
    "a name behind decoys": (
        "call",
        "os.system",
        short_text("os") + short_text("system") + short_text("collections") + POP
        + call(b"\x93", SHELL),
    ),
    "a name of byte strings": ("call", "os.system", call(b"U\x02osU\x06system\x93", SHELL)),
    "an escaped name": (
        "call",
        "os.system",
        call(b"V\\u006f\\u0073\n" + b"V\\u0073ystem\n" + b"\x93", SHELL),
    ),
    "a function that a call gave": (
        "computed-call",
        "?",
        call(call(name("functools", "partial"), name("os", "system")), SHELL),
    ),
    "a change of sys.modules": (
        "setitem-on-global",
        "sys.modules",
        name("sys", "modules") + put(0) + text("sys") + get(0) + b"s0"
        + call(name("sys", "get"), text("os")) + put(1) + POP
        + get(0) + text("sys") + get(1) + b"s0" + call(name("sys", "system"), SHELL),
    ),
    "attributes of a module": (
        "build-on-global",
        "builtins.help",
        with_state(name("builtins", "help"), mapping(x=SYSTEM)),
    ),
    "a state that changes the class": (
        "dunder-state",
        "__class__",
        with_state(
            make(name("types", "SimpleNamespace")),
            mapping(x=SYSTEM, __class__=name("types", "SimpleNamespace")),
        ),
    ),
    "an argument": (
        "call",
        "os.system",
        call(name("collections", "OrderedDict"), sequence(group(text("a"), SYSTEM))),
    ),
    "a key": ("call", "os.system", EMPTY_DICT + SYSTEM + NONE + b"s"),
    "a state": (
        "call",
        "os.system",
        with_state(make(name("types", "SimpleNamespace")), mapping(x=SYSTEM)),
    ),
    "an OrderedDict's own state": ("call", "os.system", with_state(ORDERED, mapping(x=SYSTEM))),
}  # fmt: skip


def cases() -> Iterator[Case]:
    for called, attack in {**CALLS, **LIBRARIES}.items():
        # the result is dropped, and a state_dict given back
        data = torch_zip(program(attack, POP, STATE_DICT))
        needs = "torch" if called in LIBRARIES else "pickle"
        found = Found("call", called)
        yield one_file(f"calls {called}", data, found, attack=program(attack), needs=needs)
    for what, (id, shown, attack) in WAYS.items():
        data = torch_zip(program(attack, POP, STATE_DICT, protocol=4))
        yield one_file(
            f"runs by {what}", data, Found(id, shown), attack=program(attack, protocol=4)
        )
    rebuilt = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("os", "system"),
        name("builtins", "int"),
        group(SHELL),
        NONE,
    )
    yield one_file(
        "a tensor rebuilt by os.system",
        torch_zip(program(rebuilt, POP, STATE_DICT)),
        Found("call", "os.system"),
        attack=program(rebuilt),
        needs="torch",
    )
    reconstructed = call(
        name("copyreg", "_reconstructor"),
        name("subprocess", "Popen"),
        name("builtins", "object"),
        NONE,
    )
    yield one_file(
        "an object made by a function that is handed its class",
        torch_zip(program(reconstructed, POP, STATE_DICT)),
        Found("call", "subprocess.Popen"),
    )
    yield one_file(
        "a function of a package that nobody knows",
        torch_zip(program(call(name("acme_utils", "bootstrap")), POP, STATE_DICT)),
        Found("call", "acme_utils.bootstrap"),
    )
    yield one_file(
        "a class of a package that nobody knows",
        torch_zip(program(make(name("acme_utils", "Config")), POP, STATE_DICT)),
        Found("custom-class", "acme_utils.Config", "suspicious"),
    )
