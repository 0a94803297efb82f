"""What `run.py load` measures: scripts that fill a model from a file, ours and what people write.

Each builds the same model (no initialisation, memory not touched yet; for a GPU on ``meta``, so
that nobody pays for weights that are thrown away), imports what it loads with, and prints the
seconds of that import and of the load.
"""

from __future__ import annotations

from typing import NamedTuple

_SCRIPT = """
import sys, time
import torch
from torch import nn

path, layers = sys.argv[1], int(sys.argv[2])
new = lambda: nn.utils.skip_init(nn.Linear, 1600, 1600, device="{built}")
model = nn.Sequential(*(new() for _ in range(layers)))
{before}
start = time.perf_counter()
{imports}
middle = time.perf_counter()
{load}
{after}
print(middle - start, time.perf_counter() - middle)
"""


class Way(NamedTuple):
    """A way to load: what is imported for it, and the lines that do it."""

    name: str
    imports: str
    load: str


class Kind(NamedTuple):
    """A kind of model, with the ways to fill it, by the suffix of the file; ours is the first."""

    title: str
    built: str
    ways: dict[str, list[Way]]
    before: str = ""
    after: str = ""

    def script(self, way: Way) -> str:
        return _SCRIPT.format(**self._asdict(), **way._asdict())


def _ours(options: str) -> Way:
    return Way("load_into", "from modelctl.nn import load_into", f"load_into(model, path{options})")


def _torch(name: str, options: str, assign: str = "") -> Way:
    load = f"torch.load(path, weights_only=True, {options})"
    return Way(name, "", f"model.load_state_dict({load}{assign})")


def _load_file(device: str) -> Way:
    load = f"model.load_state_dict(load_file(path, device='{device}'), assign=True)"
    return Way("load_file, assign", "from safetensors.torch import load_file", load)


def _accelerate(options: str = "") -> Way:
    return Way(
        "accelerate",
        "from accelerate import load_checkpoint_in_model",
        f"load_checkpoint_in_model(model, path{options})",
    )


_ASSIGN = ", assign=True"
_LOAD_MODEL = Way(
    "load_model", "from safetensors.torch import load_model", "load_model(model, path)"
)
# A first pass over all weights, which is when the pages of a mapped file come.
_PASS = "sum(float(p.detach().sum()) for p in model.parameters())"

_CPU = {
    ".pt": [
        _ours(""),
        _torch("torch.load", "map_location='cpu'"),
        _torch("torch.load(mmap)", "map_location='cpu', mmap=True"),
        _accelerate(),
    ],
    ".safetensors": [_ours(""), _LOAD_MODEL, _accelerate()],
}
_META = {
    ".pt": [
        _ours(_ASSIGN),
        _torch("torch.load(mmap), assign", "map_location='cpu', mmap=True", _ASSIGN),
        _accelerate(", device_map={'': 'cpu'}"),
    ],
    ".safetensors": [
        _ours(_ASSIGN),
        _load_file("cpu"),
        _accelerate(", device_map={'': 'cpu'}"),
    ],
}
_CUDA = {
    ".pt": [
        _ours(", device='cuda'"),
        _torch("torch.load(cuda), assign", "map_location='cuda'", _ASSIGN),
        _accelerate(", device_map={'': 0}"),
    ],
    ".safetensors": [
        _ours(", device='cuda'"),
        _load_file("cuda"),
        _accelerate(", device_map={'': 0}"),
    ],
}
_SYNC = "torch.cuda.synchronize()"

CPU = Kind("CPU", "cpu", _CPU)
META = Kind("meta, assigned", "meta", _META)
PASS = Kind("meta, assigned, and a pass over it", "meta", _META, after=_PASS)
CUDA = Kind("CUDA", "meta", _CUDA, before=f"torch.zeros(1, device='cuda'); {_SYNC}", after=_SYNC)


def layers(count: int) -> dict[str, object]:
    """The state_dict of the model that the scripts build."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    one = nn.utils.skip_init(nn.Linear, 1600, 1600)
    return {
        f"{i}.{name}": torch.randn(tensor.shape)
        for i in range(count)
        for name, tensor in one.named_parameters()
    }
