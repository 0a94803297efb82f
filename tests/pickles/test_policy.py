"""What is harmless to call with some arguments, and with no others."""

from __future__ import annotations

import pytest

from modelctl.pickles.interpreter import unpickle


@pytest.mark.parametrize(
    ("owner", "name", "harmless"),
    [
        (
            b"torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING",
            b"TORCH_CHANNELS_LAST",
            True,
        ),
        (b"torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", b"__class__", False),
        (b"os\nsystem", b"TORCH_CHANNELS_LAST", False),
    ],
)
def test_a_member_of_an_enum_of_layouts_by_its_name(owner: bytes, name: bytes, harmless: bool):
    """As the first Pythons 3.11 pickle members of Enums."""
    text = b"X" + len(name).to_bytes(4, "little") + name
    data = b"\x80\x02c__builtin__\ngetattr\nc" + owner + b"\n" + text + b"\x86R."
    assert (unpickle(data).findings == []) is harmless
