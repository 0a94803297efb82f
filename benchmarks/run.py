"""Measure modelctl against what people do today, in one run: python benchmarks/run.py [NAME …]

Whole processes, in turn (A B A B …), so that both meet the same noise; the report is the median of
the paired ratios, with the median wall time, CPU time and peak memory of each. Needs the extra
``all``; writes its inputs to --folder (a temporary one by default). Results that count are kept in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import loading

PYTHON = sys.executable
SAMPLE = Path(__file__).parents[1] / "sample_models" / "cnn-ddp.pt"
MODELCTL = [PYTHON, "-m", "modelctl"]
HELLO = """
import sys, typer
app = typer.Typer()
@app.command()
def main(name: str = "x"): print("hello", name)
sys.argv = ["x"]; app()
"""
TORCH_LS = """
import sys, torch
for name, t in torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=True).items():
    print(name, t.dtype, tuple(t.shape))
"""
SAFE_OPEN_LS = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "np") as f:
    for name in f.keys():
        s = f.get_slice(name); print(name, s.get_dtype(), s.get_shape())
"""


# What a user would write today.
TORCH_STRIP = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
torch.save({name.removeprefix("module."): t for name, t in state.items()}, sys.argv[2])
"""
SAFE_STRIP = """
import sys
from safetensors.torch import load_file, save_file
state = {name.removeprefix("module."): t for name, t in load_file(sys.argv[1]).items()}
save_file(state, sys.argv[2], metadata={"format": "pt"})
"""
TORCH_TO_SAFE = """
import sys, torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
save_file({n: t.contiguous() for n, t in state.items()}, sys.argv[2], metadata={"format": "pt"})
"""
SAFE_TO_TORCH = """
import sys, torch
from safetensors.torch import load_file
torch.save(load_file(sys.argv[1]), sys.argv[2])
"""
HUB_SHARD = """
import os, sys
from safetensors.torch import load_file
from huggingface_hub import save_torch_state_dict
os.makedirs(sys.argv[2])
save_torch_state_dict(load_file(sys.argv[1]), sys.argv[2], max_shard_size=sys.argv[3])
"""
HUB_UNSHARD = """
import glob, sys
from safetensors.torch import load_file, save_file
state = {}
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    state.update(load_file(path))
save_file(state, sys.argv[2], metadata={"format": "pt"})
"""


# Microseconds a tensor of what works on all names of a file.
GROWTH = """
import os, sys, time
import modelctl
from modelctl.core.tree import walk
from modelctl.surgery.prefix import add_prefix
path, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def timed(work):
    start = time.process_time()
    found = work()
    print((time.process_time() - start) / count * 1e6)
    return found
ckpt = timed(lambda: modelctl.open(path))
timed(lambda: ckpt.sections)
timed(lambda: sum(1 for _ in walk(ckpt.root)))
timed(ckpt.tensors)
timed(ckpt.state_dict)
timed(lambda: add_prefix(ckpt, "module."))
for suffix in (".pt", ".safetensors"):
    timed(lambda: modelctl.save(ckpt, out + suffix, overwrite=True))
    os.remove(out + suffix)
"""
GROWING = ("open", "sections", "walk", "tensors", "state_dict", "add_prefix", "save .pt",
           "save .safetensors")  # fmt: skip


class Run(NamedTuple):
    wall: float
    cpu: float
    peak_mb: float
    importing: float = 0.0
    inside: float = 0.0


def run(command: list[str], inside: bool = False) -> Run:
    """One process, its output thrown away; with ``inside`` the seconds are its own: to
    import what it needs, and to do its work."""
    # compiled files are part of an installation: both sides may have theirs
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    to = subprocess.PIPE if inside else subprocess.DEVNULL
    child = subprocess.Popen(command, stdout=to, env=env)
    printed = child.stdout.read().split() if child.stdout else ()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    # match ends with 1 where a file does not fit as it is
    if os.waitstatus_to_exitcode(status) not in ((0, 1) if "match" in command else (0,)):
        raise SystemExit(f"{' '.join(command)} failed")
    wall = time.perf_counter() - start
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, usage.ru_maxrss / 1024, *map(float, printed))


def compare(title: str, ours: list[str], peer_name: str, peer: list[str], pairs: int) -> None:
    """Time two commands in turn and print one row of a Markdown table."""
    run(ours), run(peer)  # warm
    a, b = [], []
    for _ in range(pairs):
        a.append(run(ours))
        b.append(run(peer))
    ratio = statistics.median(x.wall / y.wall for x, y in zip(a, b, strict=True))

    def middle(runs: list[Run]) -> str:
        wall = statistics.median(r.wall for r in runs)
        cpu = statistics.median(r.cpu for r in runs)
        peak = statistics.median(r.peak_mb for r in runs)
        return f"{wall:.3f} s, {cpu:.3f} s CPU, {peak:.0f} MB"

    print(f"| {title} | {middle(a)} | {peer_name}: {middle(b)} | {ratio:.2f} |", flush=True)


def compare_loads(kind: loading.Kind, path: Path, pairs: int) -> None:
    """Time all ways to fill a kind of model from a file in turn, and print a row for each."""
    ways = kind.ways[path.suffix]
    scripts = [python(kind.script(way), path, str(LAYERS)) for way in ways]
    for script in scripts:  # warm
        run(script, inside=True)
    rounds = [[run(script, inside=True) for script in scripts] for _ in range(pairs)]
    for i, way in enumerate(ways):
        mine = [found[i] for found in rounds]
        load, importing, wall, peak = (
            statistics.median(getattr(one, what) for one in mine)
            for what in ("inside", "importing", "wall", "peak_mb")
        )

        def ratio(of: Callable[[Run], float], i: int = i) -> str:
            return f"{statistics.median(of(found[0]) / of(found[i]) for found in rounds):.2f}"

        ratios = [
            ratio(lambda one: one.inside),
            ratio(lambda one: one.inside + one.importing),
            ratio(lambda one: one.wall),
        ]
        cells = [
            *(kind.title, path.suffix, way.name, f"{1000 * load:.0f} ms"),
            *(f"{1000 * importing:.0f} ms", f"{wall:.2f} s, {peak:,.0f} MB"),
            *(ratios if i else ("", "", "")),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def compare_writes(
    title: str, ours: list[str], output: Path, copied: Path, script: list[str], pairs: int
) -> None:
    """Time an edit, ``cp`` and fsync of the same bytes, and a user's script, in turn."""
    copy = output.with_name("copy")
    # our output is on the disk when we are done: cp's is to be, too
    cp = ["sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', copied, copy]
    commands = {"ours": ours, "cp": [str(part) for part in cp], "script": script}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for i in range(pairs):
        for name, command in commands.items():
            if name == "script" and i % 3:  # far from the limit, and long
                continue
            remove(output), remove(copy)
            runs[name].append(run(command))
    remove(output), remove(copy)

    def ratio(peer: str) -> float:
        return statistics.median(
            a.wall / b.wall
            for a, b in zip(runs["ours"][:: 3 if peer == "script" else 1], runs[peer], strict=True)
        )

    wall = {name: statistics.median(r.wall for r in found) for name, found in runs.items()}
    peak = {name: max(r.peak_mb for r in found) for name, found in runs.items()}
    print(
        f"| {title} | {wall['ours']:.2f} s, {peak['ours']:.0f} MB | {wall['cp']:.2f} s | "
        f"{ratio('cp'):.2f} | {wall['script']:.2f} s, {peak['script']:,.0f} MB | "
        f"{ratio('script'):.2f} |",
        flush=True,
    )


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def python(code: str, *arguments: Path | str) -> list[str]:
    return [PYTHON, "-c", code, *map(str, arguments)]


# ---------------------------------------------------------------------- inputs


def make(folder: Path, name: str) -> Path:
    """An input, made in a process of its own: a big parent would be counted in every child's
    peak memory."""
    path = folder / name
    if not path.exists():
        subprocess.run([PYTHON, __file__, "--make", str(path)], check=True)
    return path


def resnet50(path: Path) -> None:
    import torch
    import torchvision

    torch.save(torchvision.models.resnet50().state_dict(), path)


def many(n: int) -> dict[str, object]:
    import torch

    return {f"blocks.{i // 10}.p{i % 10}.weight": torch.rand(1 + i % 8) for i in range(n)}


def many_pt(path: Path) -> None:
    import torch

    torch.save(many(100_000), path)


def numbered(path: Path) -> None:
    """As torch.save would write it, byte for byte, without its gigabytes; a stem says how many."""
    count = NUMBERED[path.name]
    import modelctl
    from modelctl.core.dtypes import BY_NAME
    from modelctl.core.storages import MemoryStorage
    from modelctl.core.tensors import TensorRef

    def tensor(i: int) -> TensorRef:
        size = 1 + i % 8
        return TensorRef(BY_NAME["float32"], (size,), MemoryStorage(bytes(4 * size)))

    names = (f"blocks.{i // 10}.p{i % 10}.weight" for i in range(count))
    root = {name: tensor(i) for i, name in enumerate(names)}
    modelctl.save(modelctl.Checkpoint(root), path)


def many_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(many(100_000), path)


def ten_thousand(path: Path, prefix: str) -> None:
    from safetensors.torch import save_file

    save_file({f"{prefix}{name}": tensor for name, tensor in many(10_000).items()}, path)


def of_size(total: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import torch

        torch.save({f"layers.{i}.weight": torch.rand(total // 4 // 200) for i in range(200)}, path)

    return write


def named_layers(total: int) -> dict[str, object]:
    """Tensors like a language model's, under DataParallel's prefix."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = total // 4 // 100 // 1024
    return {
        f"module.layers.{i}.weight": torch.randn(rows, 1024, generator=generator)
        for i in range(100)
    }


def ddp_pt(path: Path) -> None:
    import torch

    torch.save(named_layers(SIZE), path)


def ddp_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(named_layers(SIZE), path, metadata={"format": "pt"})


def sharded(path: Path) -> None:
    source = make(path.parent, "ddp.safetensors")
    command = [*MODELCTL, "convert", str(source), "-o", f"{path}/", "--max-shard-size", SHARD]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


NUMBERED = {"10k.pt": 10_000, "100k.pt": 100_000, "million.pt": 1_000_000}
SIZE = int(float(os.environ.get("MODELCTL_BENCH_GB", "1")) * 1e9)
SHARD = f"{SIZE // 5_000_000}MB"

LAYERS = SIZE // 4 // (1600 * 1600 + 1600)


def layers_pt(path: Path) -> None:
    import torch

    torch.save(loading.layers(LAYERS), path)


def layers_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(loading.layers(LAYERS), path, metadata={"format": "pt"})


def again(path: Path) -> None:
    """The same bytes in another file."""
    shutil.copyfile(make(path.parent, f"4GB{path.suffix}"), path)


def as_safetensors(path: Path) -> None:
    command = [*MODELCTL, "convert", str(make(path.parent, "4GB.pt")), "-o", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


INPUTS = {
    "layers.pt": layers_pt,
    "layers.safetensors": layers_safetensors,
    "ddp.pt": ddp_pt,
    "ddp.safetensors": ddp_safetensors,
    "shards": sharded,
    "resnet50.pt": resnet50,
    "many.pt": many_pt,
    **dict.fromkeys(NUMBERED, numbered),
    "many.safetensors": many_safetensors,
    "10k.safetensors": lambda path: ten_thousand(path, "model."),
    "10k-other.safetensors": lambda path: ten_thousand(path, ""),
    "100MB.pt": of_size(100_000_000),
    "4GB.pt": of_size(4_000_000_000),
    "4GB.safetensors": as_safetensors,
    "4GB-again.pt": again,
    "4GB-again.safetensors": again,
}

# ---------------------------------------------------------------------- what is measured


def bench_ls(folder: Path, pairs: int) -> None:
    r50 = make(folder, "resnet50.pt")
    ls = [*MODELCTL, "ls", str(r50)]
    compare("ls, resnet50 .pt", ls, "torch.load(mmap)", python(TORCH_LS, r50), pairs)
    compare("ls, resnet50 .pt", ls, "typer hello", python(HELLO), 3 * pairs)


def bench_many(folder: Path, pairs: int) -> None:
    pt = make(folder, "many.pt")
    ours = [*MODELCTL, "ls", str(pt)]
    compare("ls, 100,000 tensors .pt", ours, "torch.load(mmap)", python(TORCH_LS, pt), pairs)
    st = make(folder, "many.safetensors")
    ours = [*MODELCTL, "ls", str(st)]
    compare("ls, 100,000 .safetensors", ours, "safe_open", python(SAFE_OPEN_LS, st), pairs)
    empty = run([*MODELCTL, "ls", str(SAMPLE)]).peak_mb
    for path in (pt, st):
        more = run([*MODELCTL, "ls", str(path)]).peak_mb - empty
        print(f"{path.name}: {more * (1 << 20) / 100_000:,.0f} bytes a tensor")
    found = []
    for path, count in ((pt, 100_000), (make(folder, "million.pt"), 1_000_000)):
        script = python(GROWTH, path, folder / "grown", str(count))
        done = subprocess.run(script, stdout=subprocess.PIPE, check=True, text=True)
        found.append([float(line) for line in done.stdout.split()])
    print("\n| us a tensor | of 100,000 | of 1,000,000 |\n| --- | --- | --- |")
    for what, few, all_of_them in zip(GROWING, *found, strict=True):
        print(f"| {what} | {few:.1f} | {all_of_them:.1f} |")


# What is to take time and memory as the tensors do.
COMMANDS = {
    "ls": [],
    "summary": [],
    "summary --json": [],
    "show": [],
    "identify": [],
    "diff": ["SRC"],
    "match": ["--like", "SRC"],
    "freeze": ["--pattern", "*.p1.*", "-o", "OUT.pt"],
    "rename": ["--map", "blocks.*=layers.*", "-o", "OUT.pt"],
    "drop": ["--pattern", "*.p1.*", "-o", "OUT.pt"],
    "strip-prefix": ["--prefix", "blocks", "-o", "OUT.pt"],
    "convert": ["-o", "OUT.safetensors"],
}


def bench_commands(folder: Path, pairs: int) -> None:
    sources = [make(folder, name) for name in NUMBERED]
    heads = " | ".join(f"{count:,} tensors" for count in NUMBERED.values())
    print(f"\n| command | {heads} |\n| --- |{' --- |' * len(sources)}")
    for name, options in COMMANDS.items():
        cells = []
        for source in sources:
            words = {"SRC": str(source)}
            for suffix in (".pt", ".safetensors"):
                words[f"OUT{suffix}"] = str(folder / f"out{suffix}")
                remove(folder / f"out{suffix}")
            command, *flags = name.split()
            found = run(
                [*MODELCTL, command, str(source), *flags, *(words.get(o, o) for o in options)]
            )
            cells.append(f"{found.wall:.2f} s, {found.peak_mb:.0f} MB")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def bench_size(folder: Path, pairs: int) -> None:
    import json

    small = make(folder, "100MB.pt")
    big = make(folder, "4GB.pt")
    ls = [*MODELCTL, "ls"]
    compare("ls, 4 GB .pt", [*ls, str(big)], "the same of 100 MB", [*ls, str(small)], 3 * pairs)
    for path in (small, big):
        report = subprocess.run(
            [*MODELCTL, "summary", str(path), "--format", "json"], capture_output=True, check=True
        )
        source = json.loads(report.stdout)["source"]
        print(f"{path.name}: {source['bytes_read']:,} of {source['bytes_on_disk']:,} bytes read")


def bench_known(folder: Path, pairs: int) -> None:
    r50 = str(make(folder, "resnet50.pt"))
    big, other = (str(make(folder, f"10k{n}.safetensors")) for n in ("", "-other"))
    arch = "torchvision:resnet50"
    for title, path, ours in (
        ("identify, resnet50 .pt", r50, ["identify", r50]),
        ("match, resnet50 .pt", r50, ["match", r50, "--arch", arch]),
        ("identify, 10,000 tensors", big, ["identify", big]),
        ("match, 10,000 tensors", big, ["match", big, "--like", other]),
    ):
        compare(title, [*MODELCTL, *ours, "--quiet"], "ls of it", [*MODELCTL, "ls", path], pairs)


def bench_write(folder: Path, pairs: int) -> None:
    pt, st = make(folder, "ddp.pt"), make(folder, "ddp.safetensors")
    shards = make(folder, "shards")
    out_pt, out_st = folder / "out.pt", folder / "out.safetensors"
    out = folder / "out"
    print("\n| what | modelctl | cp + fsync | ratio | a script | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")

    def ours(command: str, source: Path, output: Path, *options: str) -> list[str]:
        slash = "" if output.suffix else "/"
        return [*MODELCTL, command, str(source), "-o", f"{output}{slash}", *options]

    def row(title: str, command: list[str], output: Path, source: Path, script: list[str]) -> None:
        compare_writes(title, command, output, source, script, pairs)

    row(
        "strip-prefix .pt",
        ours("strip-prefix", pt, out_pt),
        out_pt,
        pt,
        python(TORCH_STRIP, pt, out_pt),
    )
    row(
        "strip-prefix .safetensors",
        ours("strip-prefix", st, out_st),
        out_st,
        st,
        python(SAFE_STRIP, st, out_st),
    )
    row(
        ".pt to .safetensors",
        ours("convert", pt, out_st),
        out_st,
        pt,
        python(TORCH_TO_SAFE, pt, out_st),
    )
    row(
        ".safetensors to .pt",
        ours("convert", st, out_pt),
        out_pt,
        st,
        python(SAFE_TO_TORCH, st, out_pt),
    )
    row(
        "shard .safetensors",
        ours("convert", st, out, "--max-shard-size", SHARD),
        out,
        st,
        python(HUB_SHARD, st, out, SHARD),
    )
    row(
        "unshard .safetensors",
        ours("convert", shards, out_st),
        out_st,
        shards,
        python(HUB_UNSHARD, shards, out_st),
    )


def bench_load(folder: Path, pairs: int) -> None:
    import torch

    paths = make(folder, "layers.pt"), make(folder, "layers.safetensors")
    kinds = [loading.CPU, loading.META, loading.PASS]
    if torch.cuda.is_available():
        kinds.append(loading.CUDA)
    heads = (
        "model | file | by | load | import | process | ours to it: load | with imports | process"
    )
    print(f"\n| {heads} |\n|{' --- |' * 9}")
    for kind in kinds:
        for path in paths:
            compare_loads(kind, path, pairs)
    print(f"\nload of the machine: {', '.join(f'{one:.1f}' for one in os.getloadavg())}")


def bench_diff(folder: Path, pairs: int) -> None:
    """Two equal files, from a warm cache; the second one is deleted, since it is large."""
    empty = run(python("")).peak_mb
    for suffix in (".pt", ".safetensors"):
        files = [make(folder, f"4GB{again}{suffix}") for again in ("", "-again")]
        ours = [*MODELCTL, "diff", *map(str, files)]
        compare(f"diff of two equal 4 GB {suffix}", ours, "cmp", ["cmp", *map(str, files)], pairs)
        print(f"over Python's start: {run(ours).peak_mb - empty:.0f} MB")
        remove(files[1])


def bench_view(folder: Path, pairs: int) -> None:
    import views

    views.measure(pairs)


BENCHES = {
    "ls": bench_ls,
    "many": bench_many,
    "commands": bench_commands,
    "size": bench_size,
    "known": bench_known,
    "write": bench_write,
    "diff": bench_diff,
    "load": bench_load,
    "view": bench_view,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--folder", type=Path, help="where the inputs are kept")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        INPUTS[options.make.name](options.make)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n")
        if not set(options.names or BENCHES) <= {"write", "load", "view"}:
            print("| what | modelctl | peer | ratio |\n| --- | --- | --- | --- |")
        for name in options.names or BENCHES:
            BENCHES[name](folder, options.pairs)


if __name__ == "__main__":
    main()
