"""How an input becomes another one: bytes anywhere, or one part of what it is made of, so that what
guards it (lengths, checksums) stays right and the change gets as far as it can."""

from __future__ import annotations

import gzip
import io
import json
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

_ODD = (0, 1, -1, 127, 128, 255, 256, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1)
_ODD += (1 << 63, 1 << 64, -(1 << 63), 1 << 200)
_TEXTS = ("", "..", "/", "a" * 300, "\0", "\ud800", "__class__", "os", "system", "storage", "\x1b[")
# What appears in pickles of models, and what should not.
_NAMES = (
    *("torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter", "torch\nSize"),
    *("collections\nOrderedDict", "collections\ndefaultdict", "torch\nFloatStorage"),
    *("torch._utils\n_rebuild_sparse_tensor", "torch._utils\n_rebuild_qtensor", "torch\nfloat32"),
    *("torch\ndevice", "os\nsystem", "builtins\ngetattr", "builtins\nset", "numpy\ndtype"),
    *("numpy.core.multiarray\n_reconstruct", "numpy.core.multiarray\nscalar", "numpy\nndarray"),
    *(
        "torch._tensor\n_rebuild_from_type_v2",
        "torch.nn.modules.linear\nLinear",
        "torch\nLongStorage",
    ),
    *(
        "torch.storage\nUntypedStorage",
        "_codecs\nencode",
        "copyreg\n_reconstructor",
        "builtins\nobject",
    ),
    *(
        "argparse\nNamespace",
        "functools\npartial",
        "pathlib\nPosixPath",
        "torch.serialization\n_get_layout",
    ),
    *(
        "torch.nn.parameter\nParameter",
        "torch\n_utils",
        "datetime\ndatetime",
        "builtins\nbytearray",
    ),
)
_STACK = tuple(b"()]}ta0ues.R\x81bQ\x85\x86\x87N\x88\x89\x94lde2h\x00q\x00K\x01\x93\x8f\x90\x91")
_OPS = tuple(bytes([one]) for one in _STACK)

Mutator = Callable[[bytes, Random], bytes]


def raw(data: bytes, rng: Random) -> bytes:
    """Bytes turned, taken out, doubled, cut off, or of another place."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not out:
            break
        at = rng.randrange(len(out))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del out[at : at + rng.choice((1, 2, 4, 8, 64))]
        elif kind == 3:
            out[at:at] = out[at : at + rng.choice((1, 4, 16, 64))]
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(_ODD) & ((1 << 8 * size) - 1)
            out[at : at + size] = value.to_bytes(size, "little")
        else:
            there = rng.randrange(len(out))
            out[at : at + 8] = out[there : there + 8]
    return bytes(out)


# ---------------------------------------------------------------------- pickles


def pickle(data: bytes, rng: Random) -> bytes:
    """Opcodes taken out, doubled, swapped, put in, or of another argument."""
    try:
        ends = [at for _, _, at in pickletools.genops(data) if at is not None]
    except Exception:  # it was broken before: whatever genops finds to say
        return raw(data, rng)
    ops = [data[a:b] for a, b in zip(ends, [*ends[1:], ends[-1] + 1], strict=True)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(ops))
        kind = rng.randrange(20)
        if kind < 11:  # another value in its place, so that the stack stays what it was
            ops[at] = _changed(ops[at], rng)
        elif kind == 11 and len(ops) > 1:
            del ops[at]
        elif kind == 12:
            ops.insert(at, rng.choice(ops))
        elif kind == 13:
            there = rng.randrange(len(ops))
            ops[at], ops[there] = ops[there], ops[at]
        elif kind == 14:
            ops.insert(at, rng.choice(_OPS))
        elif kind == 15:
            ops.insert(at, _argument(rng))
        elif kind == 16:
            start = rng.randrange(len(ops))
            ops[at:at] = ops[start : start + rng.choice((2, 5, 20))]
        elif kind == 17:  # a value, and away with it
            ops.insert(at, rng.choice((_argument(rng), _named(rng))) + b"0")
        else:
            ops[at:at] = [b"q" + bytes([rng.randrange(8)])] if kind == 18 else [_named(rng)]
    return b"".join(ops) + data[ends[-1] + 1 :]


def _named(rng: Random) -> bytes:
    return b"c" + rng.choice(_NAMES).encode() + b"\n"


def _argument(rng: Random) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        value = rng.choice(_ODD)
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if kind == 1:
        text = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if kind == 2:
        return b"G" + struct.pack(">d", rng.choice((0.0, -1.0, 1e308, float("nan"), float("inf"))))
    if kind == 3:
        return b"I" + rng.choice((b"00", b"01", b"-1", b"9" * 30, b"x")) + b"\n"
    return bytes([rng.choice(b"hqKMJ")]) + bytes(rng.randrange(256) for _ in range(4))


def _changed(op: bytes, rng: Random) -> bytes:
    """Another value of the same kind, most of the time."""
    if op[:1] == b"c":
        return _named(rng)
    if op[:1] in (b"X", b"\x8c"):
        known = ("0", "1", "cpu", "cuda:0", "weight", "params", "state", "_parameters", "f4", "O")
        text = rng.choice(_TEXTS + known).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if op[:1] in (b"J", b"K", b"M", b"\x8a"):
        value = rng.choice((*range(9), 16, *_ODD))
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if op in (b"\x88", b"\x89", b"N"):
        return rng.choice((b"\x88", b"\x89", b"N", b"]", b"}", b")"))
    if op in (b")", b"]", b"}"):
        return rng.choice((b")", b"]", b"}", b"N"))
    if op in (b"R", b"\x81"):
        return rng.choice((b"R", b"\x81"))
    return op if len(op) == 1 else op[:1] + raw(op[1:], rng)


# ---------------------------------------------------------------------- containers


def inside(change: Mutator, *names: str) -> Mutator:
    """A member of a zip is changed, and its length and checksum with it; sometimes its entry."""

    def mutated(data: bytes, rng: Random) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as opened:
                members = [(one, opened.read(one)) for one in opened.infolist()]
        except Exception:  # as above
            return raw(data, rng)
        wanted = [i for i, (one, _) in enumerate(members) if one.filename.endswith(names)]
        kind = rng.randrange(10)
        if kind < 7 and wanted:
            at = rng.choice(wanted)
            members[at] = (members[at][0], change(members[at][1], rng))
        elif kind == 7:
            at = rng.randrange(len(members))
            members[at][0].filename = rng.choice(
                (
                    members[rng.randrange(len(members))][0].filename,
                    "a/../b",
                    "/x",
                    "a/data.pkl",
                    "x",
                )
            )
        elif kind == 8:
            del members[rng.randrange(len(members))]
        else:
            members.append(rng.choice(members))
        out = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as made:
            warnings.simplefilter("ignore")  # of two of one name
            for one, content in members:
                method = rng.choice((0, 0, 0, 8))
                named = zipfile.ZipInfo(one.filename)
                made.writestr(named, content, method)
        return out.getvalue()

    return either(raw, mutated, mutated, mutated)


def tar(change: Mutator) -> Mutator:
    """A member of a tar is changed, or a field of its header, and the checksum with it."""

    def mutated(data: bytes, rng: Random) -> bytes:
        out = bytearray(data)
        headers = [at for at in range(0, len(out), 512) if out[at + 257 : at + 262] == b"ustar"]
        if not headers:
            return raw(data, rng)
        at = rng.choice(headers)
        size_text = bytes(out[at + 124 : at + 135]).strip(b"\0 ")
        if rng.randrange(3) and size_text.isdigit() and not {*size_text} & {*b"89"}:
            size = min(int(size_text, 8), len(out))
            body = change(bytes(out[at + 512 : at + 512 + size]), rng)
            out[at + 124 : at + 136] = b"%011o\0" % len(body)
            out[at + 512 : at + 512 + size + -size % 512] = body + bytes(-len(body) % 512)
        else:
            field, length = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155)))
            out[at + field : at + field + length] = raw(
                bytes(out[at + field : at + field + length]), rng
            )[:length].ljust(length, b"\0")
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
        return bytes(out)

    return either(raw, mutated, mutated)


def gzipped(change: Mutator) -> Mutator:
    """What is compressed is changed, or the stream around it."""

    def mutated(data: bytes, rng: Random) -> bytes:
        try:
            plain = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return raw(data, rng)
        return gzip.compress(change(plain, rng), 1, mtime=0)

    return either(raw, mutated, mutated)


def json_value(data: bytes, rng: Random) -> bytes:
    """A value somewhere in a JSON is another, or a key."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return raw(data, rng)
    for _ in range(rng.choice((1, 1, 2))):
        root = _turned(root, rng)
    made = json.dumps(root, ensure_ascii=rng.random() < 0.5, separators=(",", ":"))
    return made.encode("utf-8", "surrogatepass")


def _turned(node: Any, rng: Random) -> Any:
    if rng.random() < 0.25 or not isinstance(node, dict | list) or not node:
        kinds = (*_ODD, *_TEXTS, None, True, [], {}, 1.5, float("nan"), [node], {"a": node})
        return rng.choice(kinds)
    if isinstance(node, list):
        at = rng.randrange(len(node))
        kind = rng.randrange(4)
        if kind == 0:
            return [*node, rng.choice(node)]
        if kind == 1:
            return node[:at] + node[at + 1 :]
        return [*node[:at], _turned(node[at], rng), *node[at + 1 :]]
    key = rng.choice(list(node))
    kind = rng.randrange(5)
    if kind == 0:
        return {k: v for k, v in node.items() if k != key}
    if kind == 1:
        return {**node, rng.choice(_TEXTS): node[key]}
    return {**node, key: _turned(node[key], rng)}


def header(data: bytes, rng: Random) -> bytes:
    """The header of a safetensors file, and its length with it."""
    if len(data) < 8:
        return raw(data, rng)
    length = int.from_bytes(data[:8], "little")
    changed = json_value(data[8 : 8 + length], rng)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def lines(data: bytes, rng: Random) -> bytes:
    """Text by its words."""
    words = data.split(b" ")
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(words))
        kind = rng.randrange(4)
        if kind == 0:
            words[at] = rng.choice(words) * rng.choice((1, 1, 3))
        elif kind == 1:
            words.insert(at, rng.choice((b"-" * 50, b"(" * 50, b"[", b'"', b"9" * 40, b"\n", b"=")))
        elif kind == 2:
            del words[at]
            words = words or [b""]
        else:
            words[at] = raw(words[at], rng)
    return b" ".join(words)


def either(*ways: Mutator) -> Mutator:
    def mutated(data: bytes, rng: Random) -> bytes:
        return rng.choice(ways)(data, rng)

    return mutated
