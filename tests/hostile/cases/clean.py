"""Files that are fine, however odd they look: nothing is said about them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..build.containers import (
    BIAS,
    STATE_DICT,
    WEIGHT,
    Entry,
    described,
    legacy,
    safetensors,
    tar,
    tar_members,
    torch_members,
    torch_zip,
    zipped,
)
from ..build.pickles import (
    EMPTY_DICT,
    NONE,
    call,
    get,
    group,
    make,
    mapping,
    name,
    number,
    ordered,
    program,
    put,
    real,
    tensor,
    text,
    with_state,
)
from ..case import Case, Fine, Link, one_file

META = {"sizes": [{"as_int": 4}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}
WEIGHTS = {
    "config": {
        "w": {
            "path_name": "weight_0",
            "is_param": True,
            "use_pickle": False,
            "tensor_meta": {"dtype": 7, **META},
        }
    }
}
INDEX = json.dumps(
    {"metadata": {"total_size": 32}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
).encode()
ONE, TWO = (safetensors({name: described()}) for name in "ab")
SHARDED = {"model.safetensors.index.json": INDEX, "one.safetensors": ONE, "two.safetensors": TWO}


def cases() -> Iterator[Case]:
    yield from _containers()
    yield from _trees()


def _containers() -> Iterator[Case]:
    yield one_file("a torch zip", torch_zip(), Fine())
    yield one_file("a legacy file", legacy(), Fine())
    yield one_file("a tar of torch 0.1", tar(tar_members()), Fine())
    yield one_file("safetensors", safetensors({"a": described()}), Fine())
    yield one_file(
        "a gzipped tar", tar({"weights.th": torch_zip(), "config.json": b"{}"}, "w:gz"), Fine()
    )
    yield one_file(
        "TorchScript", zipped(*torch_members(), Entry("a/constants.pkl", program(group()))), Fine()
    )
    yield one_file("a zip of checkpoints", zipped(Entry("policy.pth", torch_zip())), Fine())
    yield one_file(
        "an export",
        zipped(
            Entry("a/archive_format", b"pt2"),
            Entry("a/data/weights/m_weights_config.json", json.dumps(WEIGHTS).encode()),
            Entry("a/data/weights/weight_0", BIAS),
        ),
        Fine(),
    )
    yield Case("shards", SHARDED, Fine(), "model.safetensors.index.json")
    yield Case("a folder of shards", SHARDED, Fine(), ".")
    cache = {f"models--a--b/blobs/{i}": data for i, data in enumerate(SHARDED.values())}
    links = {
        f"models--a--b/snapshots/x/{file}": Link(f"../../blobs/{i}")
        for i, file in enumerate(SHARDED)
    }
    yield Case(
        "links inside one cache of the Hugging Face hub",
        {**cache, **links},
        Fine(),
        "models--a--b/snapshots/x/model.safetensors.index.json",
    )
    yield one_file(
        "deflated members",
        torch_zip(data_pkl={"deflated": True}, data_0={"deflated": True}),
        Fine(),
    )
    yield one_file("checksums that were left out", torch_zip(data_0={"lies": {"crc": 0}}), Fine())
    swapped = {
        key: bytes(raw[i ^ 3] for i in range(len(raw)))
        for key, raw in {"0": WEIGHT, "1": BIAS}.items()
    }
    yield one_file(
        "a big-endian zip", torch_zip(storages=swapped, byteorder={"data": b"big"}), Fine()
    )
    yield one_file("another suffix", torch_zip(), Fine(), called="holiday.jpg")
    yield one_file(
        "tensors of no elements",
        safetensors({"a": described(shape=(0, 2**62), end=0)}, b""),
        Fine(),
    )
    yield one_file(
        "spaces after the header",
        safetensors(json.dumps({"a": described()}).encode() + b" " * 99),
        Fine(),
    )
    smuggled = (b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR." + bytes(64))[:64]
    yield one_file(
        "a pickle among the values",
        safetensors({"a": described("U8", (64,), 0, 64)}, smuggled),
        Fine(),
    )


def _trees() -> Iterator[Case]:
    def saved(what: str, value: bytes) -> Case:
        data = program(mapping(state_dict=STATE_DICT, other=value))
        return one_file(what, torch_zip(data), Fine())

    yield saved(
        "a Namespace", with_state(make(name("argparse", "Namespace")), mapping(lr=real(0.1)))
    )
    yield saved("a path", call(name("pathlib", "PosixPath"), text("/"), text("data")))
    yield saved(
        "a scalar of numpy",
        call(
            name("numpy.core.multiarray", "scalar"),
            call(name("numpy", "dtype"), text("f8"), NONE, NONE),
            call(name("_codecs", "encode"), text("\0" * 8), text("latin1")),
        ),
    )
    yield saved("a set", call(name("__builtin__", "set"), b"](" + number(1) + b"e"))
    yield saved("a dict that holds itself", EMPTY_DICT + put(9) + text("me") + get(9) + b"s")
    many = {f"w{i}": tensor("1", (4,)) for i in range(3000)}
    yield one_file("3,000 tensors over one storage", torch_zip(program(ordered(many))), Fine())
