"""A folder of several ranks to one file, beside a copy of as many bytes and the framework's own
script; then what edits of a folder in place write:
python benchmarks/folders.py [--gb 4] [--rounds 3] [--zero-to-fp32 FILE]

The folders are laid out as torch.distributed.checkpoint (two ranks' files, cut by rows and by
columns) and DeepSpeed's ZeRO-3 (two ranks) write them, of random values. DeepSpeed's script is only
run where it is named, and its imports of deepspeed are stood in for. Results that count are kept in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

from run import MODELCTL, Run, python, remove, run

TENSORS = 100
DCP_TO_TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
ZERO_TO_FP32 = """
import importlib.util, logging, sys, types
script, folder, out = sys.argv[1:]
for name in ("deepspeed", "deepspeed.utils", "deepspeed.checkpoint"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["deepspeed.utils"].logger = logging.getLogger()
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
load("deepspeed.checkpoint.constants", script.replace("utils/zero_to_fp32", "checkpoint/constants"))
import torch
found = load("deepspeed.utils.zero_to_fp32", script)
torch.save(found.get_fp32_state_dict_from_zero_checkpoint(folder), out)
"""
# One rank of two; the other's file is made of the same values.
MAKE_DCP = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
folder, store, rank, rows, tensors, dim = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = {
    f"layers.{i}.weight": DTensor.from_local(torch.rand(rows, 1024), mesh, [Shard(dim)])
    for i in range(tensors)
}
dcp.save({"model": state, "epoch": 3}, checkpoint_id=folder)
"""


# What a command wrote, in bytes, whichever way.
COUNTED = """
import sys
from modelctl.cli import main
try:
    main()
finally:
    sys.stderr.write(open("/proc/self/io").read())
"""


def make_dcp(folder: Path, gb: float, dim: int = 0) -> Path:
    path, store = folder / "dcp", folder / "store"
    rows = int(gb * 1e9 / 4 / 1024 / TENSORS / 2)
    arguments = [[path, store, str(rank), str(rows), str(TENSORS), str(dim)] for rank in (0, 1)]
    ranks = [subprocess.Popen(python(MAKE_DCP, *one)) for one in arguments]
    codes = [rank.wait() for rank in ranks]
    store.unlink()
    if any(codes):
        raise SystemExit("the ranks failed")
    return path


MAKE_ZERO = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from folders import zero
zero(Path(sys.argv[2]), float(sys.argv[3]))
"""


def make_zero(folder: Path, gb: float) -> Path:
    """In a process of its own: a big parent would be counted in every child's peak memory."""
    here = str(Path(__file__).parent)
    subprocess.run(python(MAKE_ZERO, here, folder / "zero", str(gb)), check=True)
    return folder / "zero"


def zero(path: Path, gb: float) -> None:
    """Weights in fp32 and two moments of each, a third of the bytes each."""
    import torch

    columns = int(gb * 1e9 / 4 / 3 / 1001 / TENSORS)
    shape = torch.Size((1001, columns))
    names = [f"layers.{i}.weight" for i in range(TENSORS)]
    each = -(-shape.numel() // 2)
    (path / "global_step1").mkdir(parents=True)
    (path / "latest").write_text("global_step1")
    path = path / "global_step1"
    for rank in (0, 1):
        flat = [torch.rand(each * 10) for _ in range(TENSORS // 10)]
        model = {
            "module": OrderedDict((name, torch.zeros(0)) for name in names),
            "buffer_names": [],
            "param_shapes": [OrderedDict((name, shape) for name in names)],
            "shared_params": {},
            "global_steps": 1,
            "dp_world_size": 2,
            "ds_version": "0.19.8",
        }
        torch.save(model, path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {
            i: {"step": torch.tensor(1.0), "exp_avg": one * 0.5, "exp_avg_sq": one * one}
            for i, one in enumerate(flat)
        }
        options = {"lr": 1e-3, "params": list(state)}
        fields = {
            "zero_stage": 3,
            "partition_count": 2,
            "fp32_flat_groups": flat,
            "optimizer_state_dict": {"state": state, "param_groups": [options]},
        }
        torch.save(
            {"optimizer_state_dict": fields},
            path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


def row(title: str, source: Path, theirs: list[str] | None, rounds: int, *more: str) -> None:
    """Ours, a copy and their script in turn, each round; prints a row of a Markdown table. ``more``
    are options of ours."""
    out, copy, other = (source.with_name(name) for name in ("out.pt", "copy", "other.pt"))
    copied = ["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', source, copy]
    commands = {
        "ours": [*MODELCTL, "convert", str(source), "-o", str(out), "--overwrite", *more],
        "cp": [str(part) for part in copied],
        **({"theirs": theirs} if theirs else {}),
    }
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(run(command))
            remove(out), remove(copy), remove(other)

    def ratio(peer: str) -> float:
        return statistics.median(
            a.wall / b.wall for a, b in zip(found["ours"], found[peer], strict=True)
        )

    wall = {name: statistics.median(one.wall for one in runs) for name, runs in found.items()}
    peak = {name: max(one.peak_mb for one in runs) for name, runs in found.items()}
    cells = [
        title,
        f"{wall['ours']:.2f} s, {peak['ours']:.0f} MB",
        f"{wall['cp']:.2f} s",
        f"{ratio('cp'):.2f}",
    ]
    if theirs:
        cells += [f"{wall['theirs']:.2f} s, {peak['theirs']:,.0f} MB", f"{ratio('theirs'):.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def in_place(path: Path, rounds: int) -> None:
    """Edits that write names alone, each of what the one before left; rows of a Markdown table."""
    there = sum(one.stat().st_size for one in path.iterdir())
    steps = {
        "rename": ["--map", "layers.*=blocks.*"],
        "add-prefix": ["--prefix", "module."],
        "strip-prefix": [],
        "drop": ["--pattern", "blocks.?.weight"],
    }
    for command, options in steps.items():
        walls, wrote = [], 0
        for i in range(rounds):
            copy = path.with_name(f"{command}-{i}")  # of links to the same bytes
            shutil.copytree(path, copy, copy_function=os.link)
            start = time.perf_counter()
            done = subprocess.run(
                [*python(COUNTED), command, str(copy), *options, "--in-place"],
                capture_output=True,
                text=True,
                check=True,
            )
            walls.append(time.perf_counter() - start)
            wrote = int(done.stderr.split("wchar: ")[1].split()[0])
            last = i == rounds - 1
            remove(path if last else copy)
            if last:
                copy.rename(path)
        wall = statistics.median(walls)
        print(f"| {command} | {there:,} | {wall:.2f} s | {wrote:,} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--zero-to-fp32", type=Path, help="deepspeed/utils/zero_to_fp32.py")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        path = make_dcp(folder, options.gb)
        theirs = python(DCP_TO_TORCH, path, folder / "other.pt")
        row(f"DCP, 2 ranks, {options.gb:g} GB, to .pt", path, theirs, options.rounds)
        in_place(path, options.rounds)
        remove(path)
        path = make_dcp(folder, options.gb, dim=1)
        row(f"DCP, 2 ranks, {options.gb:g} GB, by columns, to .pt", path, None, options.rounds)
        remove(path)
        path = make_zero(folder, options.gb)
        script = options.zero_to_fp32
        fp32 = python(ZERO_TO_FP32, script, path, folder / "other.pt") if script else None
        title = f"ZeRO-3, 2 ranks, {options.gb:g} GB, to .pt"
        row(title, path, fp32, options.rounds)
        row(f"{title}, the weights alone", path, fp32, options.rounds, "--weights-only")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
