from __future__ import annotations

import pytest
import torch

from .nets import Net

# One thread a process: the tests run beside each other on few cores.
torch.set_num_threads(1)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()
