"""The same attack in every place where a reader of some container unpickles."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..build.containers import (
    LEGACY,
    MAGIC,
    STATE_DICT,
    SYSTEM,
    VERSION,
    Entry,
    legacy,
    legacy_tensor,
    tar,
    tar_members,
    torch_members,
    torch_zip,
    zipped,
)
from ..build.pickles import (
    FALSE,
    ORDERED,
    POP,
    call,
    group,
    make,
    mapping,
    name,
    number,
    ordered,
    program,
    sequence,
    storage_id,
    tensor,
    text,
    with_state,
)
from ..case import Case, Found, Refused, one_file
from .execution import SYSTEM as ATTACK

CALLED = Found("call", "os.system")
EVIL = torch_zip(program(ATTACK, POP, STATE_DICT))


def before(clean: bytes) -> bytes:
    """A pickle that runs the attack, drops its result, and goes on as ``clean``."""
    return clean[:2] + ATTACK + POP + clean[2:]


def cases() -> Iterator[Case]:
    yield from _zips()
    yield from _legacy()
    yield from _old_tars()
    yield from _archives()
    yield from _tensors()


def _zips() -> Iterator[Case]:
    evil = program(ATTACK, POP, STATE_DICT)
    yield one_file("a deflated data.pkl", torch_zip(evil, data_pkl={"deflated": True}), CALLED)
    yield one_file(
        "an attack, and then what is no pickle",
        torch_zip(b"\x80\x02" + ATTACK + b"\xff"),
        Refused("unknown opcode 0xff", "a/data.pkl", 2 + len(ATTACK)),
    )
    yield one_file(
        "an attack in a pickle that is cut off",
        torch_zip(b"\x80\x02" + ATTACK),
        Refused("cut off", "a/data.pkl", 2 + len(ATTACK)),
    )
    yield one_file("named .safetensors", torch_zip(evil), CALLED, called="model.safetensors")
    yield one_file("named .txt", torch_zip(evil), CALLED, called="notes.txt")
    yield one_file(
        "a bare pickle",
        program(ATTACK),
        Refused("a plain pickle", error="UnsupportedError"),
        attack=program(ATTACK),
    )
    yield one_file(
        "a bare pickle of protocol 0",
        b"cos\nsystem\n(S'echo > fired'\ntR.",
        Refused("not a checkpoint"),
        attack=b"cos\nsystem\n(S'echo > fired'\ntR.",
    )


def _legacy() -> Iterator[Case]:
    keys = program(sequence(text("0"), text("1")))
    yield one_file("legacy: the magic number", legacy(magic=before(MAGIC)), CALLED)
    yield one_file("legacy: the version", legacy(version=before(VERSION)), CALLED)
    yield one_file("legacy: the system's sizes", legacy(system=before(SYSTEM)), CALLED)
    yield one_file("legacy: the object", legacy(before(LEGACY)), CALLED)
    yield one_file("legacy: the storage keys", legacy(keys=before(keys)), CALLED)
    source = group(text("module"), ATTACK, text("net.py"), text("class Net: pass")) + b"Q"
    yield one_file(
        "legacy: a class with its source",
        legacy(
            program(
                source,
                POP,
                ordered({"weight": legacy_tensor("0", 4, 4), "bias": legacy_tensor("1", 4)}),
            )
        ),
        CALLED,
    )


def _old_tars() -> Iterator[Case]:
    honest = tar_members()
    for member in honest:
        evil = {**honest, member: before(honest[member])}
        yield one_file(f"tar: {member}", tar(evil), CALLED)


def _archives() -> Iterator[Case]:
    script = torch_members(program(ATTACK, POP, STATE_DICT))
    constants = Entry("a/constants.pkl", program(group()))
    yield one_file("TorchScript: data.pkl", zipped(*script, constants), CALLED)
    evil = Entry("a/constants.pkl", before(program(group())))
    yield one_file("TorchScript: constants.pkl", zipped(*torch_members(), evil), CALLED)
    inner = Entry("policy.pth", EVIL)
    yield one_file(
        "a zip of checkpoints", zipped(Entry("data", b"{}"), inner), CALLED, called="agent.zip"
    )
    old = zipped(
        Entry("serialized_exported_program.json", b"{}"),
        Entry("serialized_state_dict.json", EVIL),
        Entry("version", b"5.1"),
    )
    yield one_file("an export: its state_dict", old, CALLED, called="model.pt2")
    yield one_file("a gzipped tar", tar({"weights.th": EVIL}, "w:gz"), CALLED, called="m.tar.gz")
    index = {"metadata": {"total_size": 80}, "weight_map": {"weight": "x.bin", "bias": "x.bin"}}
    files = {"x.bin": EVIL, "pytorch_model.bin.index.json": json.dumps(index).encode()}
    yield Case("a shard", files, CALLED, "pytorch_model.bin.index.json")


def _tensors() -> Iterator[Case]:
    """In what the functions that rebuild tensors are handed."""
    plain = tensor("1", (4,))
    hooks = call(name("collections", "OrderedDict"), sequence(group(text("a"), ATTACK)))
    places = {
        "backward hooks": plain.replace(ORDERED, hooks),
        "a parameter": call(
            name("torch._utils", "_rebuild_parameter_with_state"),
            *(plain, FALSE, ORDERED, mapping(note=ATTACK)),
        ),
        "a subclass's state": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("torch._utils", "_rebuild_tensor_v2"),
            name("torch", "Tensor"),
            plain[plain.index(b"(") : plain.rindex(b"R")],
            mapping(note=ATTACK),
        ),
        "a quantized tensor's scale": call(
            name("torch._utils", "_rebuild_qtensor"),
            storage_id("1", 4) + b"Q",
            number(0),
            group(number(4)),
            group(number(1)),
            group(name("torch", "per_tensor_affine"), ATTACK, number(0)),
            FALSE,
            ORDERED,
        ),
        "a sparse tensor's layout": call(
            name("torch._utils", "_rebuild_sparse_tensor"),
            call(name("torch.serialization", "_get_layout"), ATTACK),
            group(plain, plain, group(number(4))),
        ),
        "a meta tensor's size": call(
            name("torch._utils", "_rebuild_meta_tensor_no_storage"),
            name("torch", "float32"),
            group(ATTACK),
            group(number(1)),
            FALSE,
        ),
    }
    for place, made in places.items():
        yield one_file(f"tensors: {place}", torch_zip(program(ordered({"w": made}))), CALLED)
    pid = storage_id("1", 4, name("os", "system"))
    yield one_file(
        "a storage whose class is a function",
        torch_zip(program(ordered({"w": tensor("1", (4,), storage=pid)}))),
        Refused("a storage of the class 'os.system'", "a/data.pkl", -1),
    )
    module = with_state(
        make(name("torch.nn.modules.linear", "Linear")),
        mapping(
            _parameters=ordered({"weight": tensor("0", (4, 4))}), _modules=ORDERED, note=ATTACK
        ),
    )
    yield one_file("a whole module's attribute", torch_zip(program(module)), CALLED)
    yield one_file(
        "a persistent id that is a function",
        torch_zip(program(name("os", "system") + b"Q")),
        Refused("a persistent id that is no storage", "a/data.pkl", -1),
    )
