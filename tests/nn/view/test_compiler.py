"""nn.summary and torch's compiler: it is not called, and not even imported."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from modelctl.nn import summary

# without a garbage collector, as on the command line
ALONE = """
import gc, sys
gc.disable()
from torch import nn
from modelctl.nn import summary
net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.ReLU())
print(summary(net, (100, 4)).totals.activations, "torch._dynamo" in sys.modules)
"""


def test_the_compiler_is_not_imported_and_keeps_no_tensor_alive():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(2 * 4 * 400), "False"]  # two tensors at once


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_compiled_functions_count_as_what_they_were_compiled_from(device):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x, weight: torch.relu(x @ weight), backend=backend)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = torch.compile(nn.Linear(4, 4), backend=backend)

        def forward(self, x):
            return function(self.second(self.first(x)), self.first.weight)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary(Net(), (4,), device=device)
    assert found.totals.macs == 3 * 16
    assert found.uncounted == []
    if hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        assert compiled == []
