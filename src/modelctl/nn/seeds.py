"""One seed for every random number generator, and, as another wish, the same bits every time."""

from __future__ import annotations

import operator
import os
import random
import warnings

import numpy as np
import torch

from ..errors import UsageError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python's ``random``, numpy's global generator and torch's on every device.

    The same seed gives the same random numbers, and on one CPU mostly the same training. On a
    GPU it does not: some kernels add in whatever order their threads finish. ``deterministic``
    asks for kernels that don't, and for an error where an operation has none:
    ``use_deterministic_algorithms``, ``cudnn.deterministic``, a fixed workspace of cuBLAS
    (``CUBLAS_WORKSPACE_CONFIG=:4096:8`` unless it is set), and ``cudnn.benchmark`` off. It costs
    speed. Without it these settings stay as they are.

    ``cudnn.benchmark`` is the other wish: time several algorithms for each new input shape and
    take the fastest, which may be another one in the next run. Fast inputs of one size want it
    on, equal runs want it off; both at once want nothing.

    Workers of a DataLoader need no more: torch seeds its own generator, Python's and (since 1.9)
    numpy's in each, from its main process's. Generators of your own (``np.random.default_rng``,
    ``torch.Generator``) and the hash of strings (``PYTHONHASHSEED``, before the start) are not
    reached. The sources: torch's notes on randomness, cuBLAS's on reproducibility.

    Raises:
        UsageError: a seed that numpy can't take: it must be an integer from 0 to 2**32 - 1.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)  # numpy's integers, too
    except TypeError:
        number = -1
    if not 0 <= number < 2**32:
        raise UsageError(f"seed={seed!r:.40}: it must be an integer from 0 to 2**32 - 1")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)  # the CPU, and every CUDA, MPS and XPU device
    if deterministic:
        if _CUBLAS not in os.environ:
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                warnings.warn(
                    f"CUDA is up already, and cuBLAS may have read {_CUBLAS}: "
                    "call this first, or set it to :4096:8 before the start",
                    stacklevel=2,
                )
            os.environ[_CUBLAS] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
