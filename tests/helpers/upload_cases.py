"""What the uploader promises, on any driver: run on a GPU by tests/gpu/test_upload.py, and on the stand-in driver of
tests/fake_driver by tests/compiled/test_driver.py."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest
from helpers.patience import patient, turns_of_another_thread

from worker_orcd._upload import FileRange, upload
from worker_orcd.errors import CudaError, InternalError, ModelLoadError
from worker_orcd.gguf import quants

MIB = 1 << 20


class PlainFile:
    """What the uploader needs of a `GgufFile`."""

    def __init__(self, path: Path) -> None:
        self.path, self.fd = str(path), os.open(path, os.O_RDONLY)
        self.first = os.fstat(self.fd)

    def fileno(self) -> int:
        return self.fd

    def check_unchanged(self) -> None:
        now = os.fstat(self.fd)
        if (now.st_size, now.st_mtime_ns) != (self.first.st_size, self.first.st_mtime_ns):
            raise ModelLoadError("was written to while it was open", self.path)


@pytest.fixture
def make_file(tmp_path: Path):
    files = []

    def make(size: int) -> tuple[PlainFile, bytes]:
        data = random.Random(size).randbytes(size)
        path = tmp_path / f"file{len(files)}"
        path.write_bytes(data)
        files.append(PlainFile(path))
        return files[-1], data

    yield make
    for f in files:
        os.close(f.fd)


def contents(memory) -> bytes:
    out = bytearray(memory.nbytes)
    memory.copy_to(out)
    return bytes(out)


@pytest.mark.parametrize(
    ("size", "chunk", "readers"),
    [
        (1, 4096, 1),
        (4096, 4096, 4),
        (4097, 4096, 3),
        (3 * MIB + 77, 65536, 4),
        (5 * MIB, MIB, 0),
        (2 * MIB, 64 * MIB, 2),
    ],
)
def test_bytes_arrive_at_their_address(context, make_file, size: int, chunk: int, readers: int):
    file, data = make_file(size + 100)
    memory = context.allocate(size)
    stats = upload(context, [FileRange(file, 100, size, memory.pointer)], chunk_bytes=chunk, n_readers=readers)
    assert contents(memory) == data[100:]
    assert stats.nbytes == size and stats.seconds > 0 and stats.gb_per_s > 0


@pytest.mark.parametrize(
    ("n_ranges", "largest", "window"), [(40, 200_000, 262_144), (300, 5_000, 16_384), (3, 60_000, 65_536)]
)
def test_ranges_through_staging_are_consumed_in_order(context, make_file, n_ranges: int, largest: int, window: int):
    """Staged ranges of two files, some direct ones between them; every window is used many times over."""
    rng = random.Random(n_ranges)
    sizes = [rng.randint(1, largest) for _ in range(n_ranges)]
    file, data = make_file(sum(sizes))
    other, other_data = make_file(largest)
    target = context.allocate(sum(sizes) + n_ranges * 256)
    target.fill(0)
    direct = context.allocate(largest)
    staging, stream = context.allocate(4 * window), context.stream()
    ranges, at, to, expected = [], 0, 0, bytearray(target.nbytes)
    for i, n in enumerate(sizes):
        ranges.append(FileRange(file, at, n, None, (i, to)))
        expected[to : to + n] = data[at : at + n]
        at, to = at + n, to + n + 256
        if i == n_ranges // 2:
            ranges.append(FileRange(other, 0, largest, direct.pointer))
    order, told = [], []

    def consume(tag, address: int, nbytes: int) -> None:
        order.append(tag[0])
        assert address % 256 == 0 and staging.pointer <= address <= staging.pointer + staging.nbytes - nbytes
        stream.copy(target.pointer + tag[1], address, nbytes)

    upload(
        context,
        ranges,
        consume=consume,
        stream=stream,
        staging=staging,
        chunk_bytes=16_384,
        n_readers=4,
        progress=told.append,
    )
    assert order == list(range(n_ranges))
    assert contents(target) == bytes(expected)
    assert contents(direct) == other_data
    assert told == sorted(told) and told[-1] == sum(sizes) + largest


def test_a_file_that_ends_early_is_an_error_with_its_offset(context, make_file):
    file, _ = make_file(300_000)
    memory = context.allocate(400_000)
    with pytest.raises(ModelLoadError, match="ended early") as e:
        upload(context, [FileRange(file, 0, 400_000, memory.pointer)], chunk_bytes=65_536, n_readers=4)
    assert e.value.fields["path"] == file.path and e.value.fields["offset"] == 300_000


def test_a_file_cut_during_the_load(context, make_file):
    file, _ = make_file(8 * MIB)
    memory = context.allocate(8 * MIB)

    def cut(done: int) -> None:
        if done and os.fstat(file.fd).st_size > MIB:
            os.truncate(file.path, MIB)

    with pytest.raises(ModelLoadError, match=r"ended early|written to"):
        staging, stream = context.allocate(MIB), context.stream()
        ranges = [FileRange(file, i * 65_536, 65_536, None, i) for i in range(128)]
        upload(
            context,
            ranges,
            consume=lambda tag, a, n: stream.copy(memory.pointer + tag * 65_536, a, n),
            stream=stream,
            staging=staging,
            chunk_bytes=4096,
            n_readers=2,
            progress=cut,
        )


def test_a_file_written_to_during_the_load(context, make_file):
    file, _ = make_file(4 * MIB)
    memory = context.allocate(4 * MIB)

    def write(done: int) -> None:
        with open(file.path, "r+b") as f:
            f.write(b"new")
        os.utime(file.path, ns=(1, 1))

    with pytest.raises(ModelLoadError, match="written to"):
        upload(context, [FileRange(file, 0, 4 * MIB, memory.pointer)], progress=write)


@pytest.mark.parametrize(
    ("type_id", "block", "reason"),
    [
        (39, 17, "E8M0 scale 255"),
        (2, 18, "NaN or infinity in a block scale"),
        (0, 4, "holds NaN or infinity"),
        (14, 210, "NaN or infinity in a block scale"),
    ],
)
@pytest.mark.parametrize("chunk", [4096, 65_536])
def test_numbers_that_no_weight_may_be(context, make_file, type_id: int, block: int, reason: str, chunk: int):
    """The first bad block of two is named, in a piece that begins anywhere; without a type any bytes are good."""
    n = 200_000 // block * block
    file, _ = make_file(n + 5)
    data = bytearray(n + 5)
    places = [5 + block * (n // block - 3), 5 + block * (n // block // 2)]
    for place in places:
        data[place : place + block] = b"\xff" * block if type_id != 39 else b"\xff" + b"\0" * (block - 1)
    with open(file.path, "r+b") as f:
        f.write(data)
    file.first = os.fstat(file.fd)
    memory = context.allocate(n)

    def load(type_id: int | None) -> None:
        rule = None if type_id is None else quants.TYPES[type_id].check_rule
        upload(context, [FileRange(file, 5, n, memory.pointer, None, rule, "blk.7.w")], chunk_bytes=chunk, n_readers=4)

    load(None)
    assert contents(memory) == bytes(data[5:])
    with pytest.raises(ModelLoadError, match=f"tensor 'blk.7.w' .*{reason}") as e:
        load(type_id)
    assert e.value.fields["path"] == file.path and e.value.fields["tensor"] == "blk.7.w"
    assert places[1] <= e.value.fields["offset"] < places[1] + block
    for place in places:
        data[place : place + block] = bytes(block)
    with open(file.path, "r+b") as f:
        f.write(data)
    file.first = os.fstat(file.fd)
    load(type_id)
    assert contents(memory) == bytes(data[5:])


def test_the_first_fault_in_the_order_of_the_ranges_is_reported(context, make_file):
    """Not that of the reader that was quicker, nor the first in the file: the same error every time."""
    file, _ = make_file(16 * MIB)
    data = bytearray(16 * MIB)
    data[:4] = data[2 * MIB - 4 : 2 * MIB] = b"\xff" * 4
    with open(file.path, "r+b") as f:
        f.write(data)
    file.first = os.fstat(file.fd)
    memory = context.allocate(16 * MIB)

    def file_range(name: str, offset: int, nbytes: int) -> FileRange:
        return FileRange(file, offset, nbytes, memory.pointer + offset, None, quants.BY_NAME["F32"].check_rule, name)

    ranges = [
        file_range("good", 2 * MIB, 14 * MIB),
        file_range("bad at its end", MIB, MIB),
        file_range("bad at once", 0, 4096),
    ]
    for _ in range(20):
        with pytest.raises(ModelLoadError, match="'bad at its end'") as e:
            upload(context, ranges, n_readers=4)
        assert e.value.fields["offset"] == 2 * MIB - 4


def test_a_checked_piece_is_whole_blocks(context, make_file):
    file, _ = make_file(1000)
    memory = context.allocate(1000)
    for type_id, n in ((39, 16), (2, 19)):
        with pytest.raises(ValueError, match="no run of blocks"):
            upload(context, [FileRange(file, 0, n, memory.pointer, None, quants.TYPES[type_id].check_rule, "w")])


def test_a_file_that_cannot_be_read(context, make_file, tmp_path: Path):
    class Folder(PlainFile):
        pass

    folder = Folder(tmp_path)
    memory = context.allocate(1000)
    with pytest.raises(ModelLoadError, match="cannot be read: Is a directory"):
        upload(context, [FileRange(folder, 0, 1000, memory.pointer)])
    os.close(folder.fd)


@pytest.mark.parametrize("where", ["progress", "consume"])
def test_what_a_callback_raises_ends_the_load(context, make_file, where: str):
    file, _ = make_file(4 * MIB)
    n_threads = threading.active_count()

    def stop(*args) -> None:
        raise KeyboardInterrupt

    free = []
    for _ in range(3):  # what a driver keeps after the first time (streams) is no leak; what grows is
        with pytest.raises(KeyboardInterrupt):
            staging, stream = context.allocate(MIB), context.stream()
            callbacks = {"consume": lambda *a: None, where: stop}
            upload(
                context,
                [FileRange(file, i * 65_536, 65_536) for i in range(64)],
                stream=stream,
                staging=staging,
                chunk_bytes=4096,
                **callbacks,
            )
        staging.close()
        stream.close()
        free.append(context.memory()[0])
    assert free[1] == free[2]
    assert threading.active_count() == n_threads


@pytest.mark.parametrize("which", ["upload-0", "upload-1", "upload"])
def test_a_thread_that_the_system_does_not_give_ends_the_load(context, make_file, monkeypatch, which: str):
    file, data = make_file(MIB)
    memory = context.allocate(MIB)
    n_threads = threading.active_count()
    start = threading.Thread.start

    def failing(thread: threading.Thread) -> None:
        if thread.name == which:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        with pytest.raises(InternalError, match="the system gives no thread for the upload: can't start new thread"):
            upload(context, [FileRange(file, 0, MIB, memory.pointer)], chunk_bytes=4096, n_readers=2)
    assert threading.active_count() == n_threads
    upload(context, [FileRange(file, 0, MIB, memory.pointer)], chunk_bytes=4096, n_readers=2)
    assert contents(memory) == data


def test_arguments_are_checked(context, make_file):
    file, _ = make_file(1000)
    memory, stream = context.allocate(4096), context.stream()
    for ranges, options, match in (
        ([FileRange(file, 0, 10)], {}, "need consume"),
        ([FileRange(file, 0, 0, memory.pointer)], {}, "range of 0 bytes"),
        ([FileRange(file, 0, 10, memory.pointer)], {"chunk_bytes": 100}, "chunk_bytes"),
        (
            [FileRange(file, 0, 1000)],
            {"consume": print, "stream": stream, "staging": context.allocate(3000)},
            "does not fit",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            upload(context, ranges, **options)
    assert upload(context, []).nbytes == 0


def test_other_python_threads_run_meanwhile(context, make_file):
    file, _ = make_file(32 * MIB)
    memory = context.allocate(32 * MIB)
    ticks, stop = [], threading.Event()

    def load() -> None:
        upload(context, [FileRange(file, 0, 32 * MIB, memory.pointer)], chunk_bytes=65_536)

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    load()
    end = time.monotonic()
    stop.set()
    thread.join()
    during = [t for t in ticks if start <= t <= end]
    longest = max((b - a for a, b in zip([start, *during], [*during, end], strict=True)), default=0)
    print(f"load {end - start:.3f} s, longest pause of another thread {longest * 1000:.1f} ms (limit 250)")
    assert longest < patient(0.25)
    assert turns_of_another_thread(load) > 2


def test_a_copy_outside_the_memory_is_a_cuda_error(context, make_file):
    """Kept last: on a GPU the address is refused or poisons nothing, as the copy is checked when it is queued."""
    file, _ = make_file(1000)
    with pytest.raises(CudaError) as e:
        upload(context, [FileRange(file, 0, 1000, 1 << 20)])
    assert e.value.fields["call"].startswith("cu")
