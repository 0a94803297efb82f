"""Chunks on their way to a device: filled by several threads, in any order, and none filled again
before what it held has arrived."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from threading import Lock

import pytest
import safetensors.torch
import torch

import modelctl as mc
from modelctl.core.dtypes import BY_NAME
from modelctl.core.tensors import TensorRef
from modelctl.errors import DamagedError, UnreadableError
from modelctl.nn.loading import reader as reading
from modelctl.nn.loading import ring as rings
from modelctl.nn.loading.reader import Reader, thread_count
from modelctl.nn.loading.ring import Bus, CudaBus, OneLane, Part, Ring, bus_to
from modelctl.storage.chunked import Chunk, ChunkedStorage
from modelctl.storage.source import FileSource


class SlowBus(Bus):
    """Copies that happen as late as their waits allow, as they may on CUDA: what a chunk holds at
    that time is what arrives."""

    chunks = 3

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.sent: list[tuple[list[Part], int]] = []
        self.on_their_way = 0
        self.lock = Lock()

    def send(self, chunk, parts, after):
        with self.lock:
            self.sent.append((parts, after))
            self.on_their_way += 1
        arrived = False

        def arrive() -> None:
            nonlocal arrived
            if not arrived:
                super(SlowBus, self).send(chunk, parts, after)
                arrived = True
                with self.lock:
                    self.on_their_way -= 1

        return arrive


@pytest.fixture
def bus(monkeypatch) -> SlowBus:
    """What all that changes its dtype goes through."""
    bus = SlowBus()
    monkeypatch.setattr(reading, "bus_to", lambda device: bus)
    return bus


def saved(path: Path, *sizes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {f"{i:03}": torch.randn(n) for i, n in enumerate(sizes)}
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    return state


def fill(refs: dict[str, TensorRef], reader: Reader) -> dict[str, torch.Tensor]:
    """Tensors of float64 that are read."""
    made = {}
    with reader:
        for name, ref in refs.items():
            made[name] = torch.full(ref.shape, torch.nan, dtype=torch.float64)
            reader.read(ref, made[name])
    return made


def read(path: Path) -> dict[str, torch.Tensor]:
    with mc.open(path) as ckpt:
        return fill(ckpt.tensors(), Reader())


def equal(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return found.keys() == state.keys() and all(
        torch.equal(found[name], value.double()) for name, value in state.items()
    )


# ------------------------------------------------------------------ what arrives


@pytest.mark.parametrize("size", [64, 256, 4096, 1 << 20])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_chunk_is_filled_again_before_it_has_arrived(size, suffix, bus, tmp_path):
    bus.size = size
    state = saved(tmp_path / f"a{suffix}", 3, 40, 1, 200, 16, 17, 5, 3000, *[2] * 40)
    assert equal(read(tmp_path / f"a{suffix}"), state)
    nbytes = sum(value.nbytes for value in state.values())
    assert len(bus.sent) >= nbytes / size
    assert all(part.stop <= size for parts, _ in bus.sent for part in parts)


def test_what_is_on_its_way_arrives_before_an_error_is_told(bus, tmp_path):
    """Its memory may be freed then."""
    bus.size = 256
    path = tmp_path / "a.safetensors"
    saved(path, *[64] * 30)
    with mc.open(path) as ckpt:
        refs = ckpt.tensors()
        os.truncate(path, path.stat().st_size - 300)
        with pytest.raises(UnreadableError, match="became shorter"):
            fill(refs, Reader())
    assert len(bus.sent) > bus.chunks
    assert not bus.on_their_way


def test_a_chunk_that_can_not_be_filled_goes_back():
    ring = Ring(SlowBus())

    def fill(chunk: torch.Tensor) -> None:
        raise OSError

    for _ in range(5 * ring.bus.chunks):  # else it would wait for ever
        with pytest.raises(OSError):
            ring.pass_on(fill, [])
    ring.finish()


def test_a_copy_comes_after_what_had_the_memory(bus, tmp_path, monkeypatch):
    """The mark of a chunk is set when the last tensor in it is there."""
    bus.size = 512
    asked: list[int] = []  # the targets, in their order
    begin = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda *given: asked.append(given[2].data_ptr()) or begin(*given)
    )
    bus.mark = lambda: len(asked)
    saved(tmp_path / "a.pt", *range(1, 30))
    read(tmp_path / "a.pt")
    starts = [(part.target.data_ptr(), after) for parts, after in bus.sent for part in parts]
    known = [(asked.index(at), after) for at, after in starts if at in asked]
    assert len(known) == 29
    assert all(place < after for place, after in known)


def test_a_tensor_of_several_files_goes_through_chunks(bus, tmp_path):
    """On a device nothing else would take it: what made a temporary tensor there had to read
    that in turn."""
    bus.size = 256
    state = saved(tmp_path / "a.pt", 300, 200)
    with mc.open(tmp_path / "a.pt") as ckpt:
        two = [*ckpt.tensors().values()]
        chunks = [Chunk.of((at,), ref, "there") for at, ref in zip((0, 300), two, strict=True)]
        storage = ChunkedStorage(BY_NAME["float32"], (500,), chunks)
        made = fill({"": TensorRef(BY_NAME["float32"], (500,), storage)}, Reader())
    assert equal(made, {"": torch.cat([*state.values()])})
    assert sum(part.target.numel() for parts, _ in bus.sent for part in parts) == 500


def test_damage_is_found_on_the_way(bus, tmp_path):
    bus.size = 256
    path = tmp_path / "a.pt"
    state = saved(path, 10, 500, 10)
    data = bytearray(path.read_bytes())
    at = data.find(state["001"].numpy().tobytes())
    data[at + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="'001' is damaged"):
        read(path)


# ------------------------------------------------------------------ how it is read


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_small_tensors_are_read_together(suffix, tmp_path, monkeypatch):
    # so few that their order in the file is the model's: torch before 2.6 has 10 before 2
    state = saved(tmp_path / f"a{suffix}", *[5] * 10)
    calls = []
    fetch = FileSource.read_into
    monkeypatch.setattr(
        FileSource, "read_into", lambda *given: calls.append(given[2].nbytes) or fetch(*given)
    )
    assert equal(read(tmp_path / f"a{suffix}"), state)
    assert len(calls) == 1


def test_small_tensors_in_place_are_shared_out_by_the_megabyte(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 4096)
    state = saved(tmp_path / "a.pt", *[300] * 50)
    jobs = []
    start = Reader._start
    monkeypatch.setattr(
        Reader, "_start", lambda self, job, n: jobs.append(n) or start(self, job, n)
    )
    with mc.open(tmp_path / "a.pt") as ckpt, Reader() as reader:
        made = {name: torch.empty(ref.shape) for name, ref in ckpt.tensors().items()}
        for name, ref in ckpt.tensors().items():
            reader.read(ref, made[name])
    assert all(torch.equal(made[name], value) for name, value in state.items())
    assert sum(jobs) == 50 * 300 * 4
    assert 10 <= len(jobs) <= 20


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_threads_are_as_many_as_the_cpus_that_may_be_used(monkeypatch):
    for usable, threads in ((1, 4), (6, 6), (100, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=usable: {*range(n)})
        assert thread_count() == threads


def test_threads_run_in_the_mode_of_who_asks(tmp_path):
    state = saved(tmp_path / "a.pt", 10, 2000)
    with torch.inference_mode():
        made = read(tmp_path / "a.pt")
        assert all(value.is_inference() for value in made.values())
        assert equal(made, state)


# ------------------------------------------------------------------ which bus


def test_the_bus_of_a_device():
    kinds = {"cpu": Bus, "cuda:1": CudaBus, "mps": OneLane, "xla": OneLane}
    for name, kind in kinds.items():
        assert type(bus_to(torch.device(name))) is kind
    assert 8 <= bus_to(torch.device("cuda")).chunks <= 16
    assert 4 << 20 <= CudaBus.size <= 8 << 20


class Cuda:
    """torch.cuda as far as a bus needs it, on the CPU: says what was asked of which stream."""

    def __init__(self) -> None:
        self.said: list[tuple[str, object, object]] = []
        self.now = local = threading.local()
        cuda = self

        class Stream:
            def __init__(self, device: object = None) -> None:
                self.thread = threading.get_ident()

            def wait_event(self, event: object) -> None:
                cuda.said.append(("wait", self, event))

            def record_event(self) -> Event:
                event = Event()
                event.record(self)
                return event

            def synchronize(self) -> None:
                cuda.said.append(("synchronize", self, None))

        class Event:
            def __init__(self, blocking: bool = False) -> None: ...

            def record(self, stream: Stream) -> None:
                cuda.said.append(("record", stream, self))

            def synchronize(self) -> None:
                cuda.said.append(("arrived", None, self))

        class Within:
            def __init__(self, stream: Stream) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                local.stream = self.stream

            def __exit__(self, *_: object) -> None:
                del local.stream

        self.Stream, self.Event, self.stream = Stream, Event, Within
        self.main = Stream()

    def current_stream(self, device: object) -> object:
        return self.main


@pytest.mark.parametrize("many", [False, True])
def test_copies_to_cuda_lie_between_what_they_wait_for_and_their_event(many, monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(rings.torch, "cuda", cuda)
    bus = CudaBus(torch.device("cpu"))
    bus.memory = lambda: Bus.memory(bus)
    copied = CudaBus._copy

    def copy(self: CudaBus, chunk: torch.Tensor, parts: list[Part]) -> None:
        cuda.said.append(("copy", cuda.now.stream, None))
        copied(self, chunk, parts)

    monkeypatch.setattr(CudaBus, "_copy", copy)
    targets = [
        torch.zeros(4, dtype=torch.float64 if many else None) for _ in range(9 if many else 2)
    ]
    parts = [Part(64 * i, 64 * i + 16, torch.float32, to) for i, to in enumerate(targets)]

    def fill(chunk: torch.Tensor) -> None:
        for i, part in enumerate(parts):
            part.window(chunk).fill_(i + 1)

    ring = Ring(bus)
    mark = bus.mark()
    threads = [
        threading.Thread(target=ring.pass_on, args=(fill, parts, mark), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
        thread.join()
    ring.finish()
    assert [target.tolist() for target in targets] == [[i + 1.0] * 4 for i in range(len(targets))]
    asked = [what for what, _, _ in cuda.said]
    assert asked == ["record", *["wait", "copy", "record"] * 2, "arrived", "arrived"]
    first, second = cuda.said[1:4], cuda.said[4:7]
    for one in (first, second):
        assert one[0][2] is mark
        assert len({stream for _, stream, _ in one}) == 1
    assert first[0][1] is not second[0][1]
    assert {event for _, _, event in cuda.said[7:]} == {first[2][2], second[2][2]}


def test_a_chunk_of_which_a_copy_failed_is_free_when_that_is_told(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(rings.torch, "cuda", cuda)
    bus = CudaBus(torch.device("cpu"))
    bus.memory = lambda: Bus.memory(bus)
    part = Part(0, 16, torch.float32, torch.zeros(3))  # of another size
    with pytest.raises(RuntimeError):
        Ring(bus).pass_on(lambda chunk: None, [part], bus.mark())
    assert [what for what, _, _ in cuda.said] == ["record", "wait", "synchronize"]
