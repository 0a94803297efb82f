"""What `run.py load` measures: scripts that fill a model from a file, ours and what people write.

Each builds the same model (no initialisation, memory not touched yet; for a GPU on ``meta``, so
that nobody pays for weights that are thrown away) and prints the seconds of the load alone.
"""

from __future__ import annotations

_START = """
import sys, time
import torch
from torch import nn

path, layers = sys.argv[1], int(sys.argv[2])

def build(device):
    new = lambda: nn.utils.skip_init(nn.Linear, 1600, 1600, device=device)
    return nn.Sequential(*(new() for _ in range(layers)))
"""
_CPU = (
    _START
    + """
model = build("cpu")
start = time.perf_counter()
{load}
print(time.perf_counter() - start)
"""
)
_GPU = (
    _START
    + """
model = build("meta")
torch.zeros(1, device="cuda")  # CUDA starts
torch.cuda.synchronize()
start = time.perf_counter()
{load}
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
)


def cpu(load: str) -> str:
    return _CPU.format(load=load)


def gpu(load: str) -> str:
    return _GPU.format(load=load)


_MAPPED = _CPU.replace('build("cpu")', 'build("meta")')


def mapped(load: str, then: str = "") -> str:
    """Into a model on ``meta``, without copying; ``then`` is done with it, timed too."""
    return _MAPPED.format(load=f"{load}\n{then}")


# A first pass over all weights, which is when the pages come.
PASS = "sum(float(p.detach().sum()) for p in model.parameters())"
OURS_MAPPED = "from modelctl.nn import load_into\nload_into(model, path, assign=True)"
TORCH_MAPPED = (
    "state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)\n"
    "model.load_state_dict(state, assign=True)"
)
SAFETENSORS_MAPPED = (
    "from safetensors.torch import load_file\nmodel.load_state_dict(load_file(path), assign=True)"
)

OURS = cpu("from modelctl.nn import load_into\nload_into(model, path)")
TORCH = cpu("model.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))")
TORCH_MMAP = TORCH.replace("weights_only=True", "weights_only=True, mmap=True")
SAFETENSORS = cpu("from safetensors.torch import load_model\nload_model(model, path)")

OURS_GPU = gpu("from modelctl.nn import load_into\nload_into(model, path, device='cuda')")
TORCH_GPU = gpu(
    "state = torch.load(path, map_location='cuda', weights_only=True)\n"
    "model.load_state_dict(state, assign=True)"
)
SAFETENSORS_GPU = gpu(
    "from safetensors.torch import load_file\n"
    "model.load_state_dict(load_file(path, device='cuda'), assign=True)"
)


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
