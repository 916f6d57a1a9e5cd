# cython: language_level=3
"""From files to device memory at the speed of the link: reader threads, a pinned ring, copies that overlap.

Each reader takes the next chunk of the load, reads it with pread into one of its own pinned slots and queues the copy
on its own stream. No lock of Python is needed meanwhile, so a load does not wait for other Python threads. A file is
never read through a mapping here, so one that is cut during the load is a short read and an error, never a signal.

What is loaded is a list of `FileRange`s. A range with an address goes straight there. The others pass through a staging
area on the device, cut into windows that are filled in turn; when a window is complete, a `Consumer` queues whatever
turns the raw bytes into their place (repacking kernels) behind the copies.
"""

import math
import os
import threading
import time
from dataclasses import dataclass

from cpython.exc cimport PyErr_CheckSignals
from cuda.bindings cimport cydriver as cu
from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libcpp cimport bool as cbool
from libcpp.vector cimport vector
from posix.types cimport off_t
from posix.unistd cimport pread

from worker_orcd._gguf cimport Rule, rule_of
from worker_orcd._gguf import CHECK_REASONS
from worker_orcd.errors import CudaError, InsufficientMemory, InternalError, ModelLoadError, quoted
from worker_orcd.machine import usable_cores

from worker_orcd._driver cimport Context, DeviceMemory, Event, PinnedMemory, Stream, await_event, mark_nogil


cdef extern from "host/upload_queue.h" namespace "worker_orcd" nogil:
    cdef struct UploadChunk:
        uint64_t offset
        uint64_t to
        uint32_t nbytes
        uint32_t window
        int32_t fd
        int32_t rule

    cdef cppclass UploadQueue:
        void add(const UploadChunk& chunk) except +
        size_t n_windows() noexcept
        cbool take(UploadChunk* out) noexcept
        void sent(const UploadChunk& chunk) noexcept
        int wait_full(uint32_t window, double timeout_s) noexcept
        void open(size_t n) noexcept
        void began() noexcept
        void consumed(size_t n) noexcept
        int wait_began(size_t n, double timeout_s) noexcept
        int wait_consumed(size_t n, double timeout_s) noexcept
        size_t n_consumed() noexcept
        void stop() noexcept
        uint64_t bytes_sent() noexcept


cdef extern from "host/tensor_check.h" namespace "check" nogil:
    int check_scan "check::scan"(const Rule& rule, const uint8_t* data, size_t nbytes, size_t* at) noexcept


#: readers where the caller names no number; more do not help (a reader brings 6-8 GB/s, the link carries 50)
MAX_READERS = 16
#: alignment of a range in the staging area
ALIGN = 256
#: most page-locked memory of a load: with huge chunks there are fewer readers
MAX_PINNED = 512 << 20
#: pinned slots of a reader: one is read into while the copies of the others are on their way
cdef enum:
    SLOTS = 3
    N_WINDOWS = 4       # of the staging area: one is being consumed while the others are filled
#: seconds between looks at signals and the caller's progress
cdef double TICK = 0.05


@dataclass(frozen=True)
class FileRange:
    """A run of bytes of a file.

    Attributes:
        file: an open `GgufFile` (`fileno`, `path`, `check_unchanged`).
        offset, nbytes: where in it.
        to: the device address it belongs at, or None: it passes through staging and `consume`.
        tag: what `consume` is told, for example (tensor, first row, rows).
        rule: how the bytes, whole blocks, are checked for NaN and infinity (`QuantType.check_rule`), and for weights
            that are too large (`gpu_check_rule`); None: any bytes.
        name: what the error calls them.
    """

    file: object
    offset: int
    nbytes: int
    to: int | None = None
    tag: object = None
    rule: tuple | None = None
    name: str = ""


@dataclass(frozen=True)
class UploadStats:
    """What a load was: bytes, seconds, reader threads."""

    nbytes: int
    seconds: float
    n_readers: int

    @property
    def gb_per_s(self):
        """10^9 bytes per second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


cdef class Consumer:
    """What is done with the ranges in staging."""

    cdef int prepare(self, tag, uintptr_t address, size_t nbytes) except -1:
        """Called for each range without an address, in order, before anything is read: it will lie at `address`."""
        raise NotImplementedError

    cdef int queue(self, size_t index, cu.CUstream stream) except -1 nogil:
        """Queue what turns range `index` (in the order of `prepare`) into its place: its bytes are on their way."""
        with gil:
            raise NotImplementedError


cdef class _Calls(Consumer):
    """A Python callable as a consumer: called as (tag, address, nbytes) when the bytes are on their way."""

    cdef object call
    cdef list ranges

    def __init__(self, call):
        self.call, self.ranges = call, []

    cdef int prepare(self, tag, uintptr_t address, size_t nbytes) except -1:
        self.ranges.append((tag, address, nbytes))
        return 0

    cdef int queue(self, size_t index, cu.CUstream stream) except -1 nogil:
        with gil:
            self.call(*self.ranges[index])
        return 0


cdef class _Reader:
    """One thread's share of a load: its stream, its pinned slots, and what ended it."""

    cdef Stream stream
    cdef PinnedMemory ring
    cdef list events            # one for each slot: its copy is done; one more for everything queued so far
    cdef cu.CUevent copied[SLOTS]
    cdef cu.CUevent tail
    cdef int fault_errno        # of a read that failed; 0 with fault_fd >= 0: the file ended early
    cdef int fault_fd
    cdef uint64_t fault_offset
    cdef int fault_check        # what was found in the bytes, a key of CHECK_REASONS; 0: nothing
    cdef object error           # an exception of this thread, or None

    def __init__(self, Context context, size_t chunk_bytes):
        self.fault_fd = -1
        self.stream = Stream(context)
        self.ring = PinnedMemory(context, SLOTS * chunk_bytes)
        self.events = [Event(context, False, True) for _ in range(SLOTS + 1)]
        for i in range(SLOTS):
            self.copied[i] = (<Event>self.events[i]).handle
        self.tail = (<Event>self.events[SLOTS]).handle

    cdef int fill(self, char* slot, const UploadChunk* chunk) noexcept nogil:
        """Read a chunk into `slot`. 0, or -1 with the fault noted."""
        cdef size_t done = 0
        cdef ssize_t got
        while done < chunk.nbytes:
            got = pread(chunk.fd, slot + done, chunk.nbytes - done, <off_t>(chunk.offset + done))
            if got > 0:
                done += got
            elif got == 0 or errno != EINTR:
                self.fault_errno = 0 if got == 0 else errno
                self.fault_fd, self.fault_offset = chunk.fd, chunk.offset + done
                return -1
        return 0

    cdef int scan(self, const char* slot, const UploadChunk* chunk, const Rule* rules) noexcept nogil:
        """Check the numbers of a chunk while they are in the cache. 0, or -1 with the fault noted."""
        cdef size_t at = 0
        if chunk.rule < 0:
            return 0
        self.fault_check = check_scan(rules[chunk.rule], <const uint8_t*>slot, chunk.nbytes, &at)
        if self.fault_check == 0:
            return 0
        self.fault_fd, self.fault_offset = chunk.fd, chunk.offset + at
        return -1

    def close(self):
        """Free everything; the copies must be done. Idempotent; never raises."""
        for event in self.events:
            event.close()
        self.ring.close()
        self.stream.close()


cdef class _Load:
    """One load: the chunks, the readers, the windows and the events that say that a window was consumed."""

    cdef UploadQueue upload_queue
    cdef Context context
    cdef Stream consumer        # where windows are consumed
    cdef size_t chunk_bytes
    cdef list readers
    cdef Consumer consume
    cdef vector[Rule] rules     # what chunks are checked by
    cdef dict rule_index
    cdef vector[size_t] staged  # of each window the number of staged ranges up to its end
    cdef list events
    cdef cu.CUevent consumed[N_WINDOWS]
    cdef vector[cu.CUstream] streams    # of the readers
    cdef vector[cu.CUevent] tails
    cdef object error           # an exception of the coordinator, or None

    def __init__(self, Context context, Stream consumer, Consumer consume, size_t chunk_bytes):
        self.context, self.consumer, self.consume, self.chunk_bytes = context, consumer, consume, chunk_bytes
        self.readers, self.rule_index = [], {}
        self.events = [Event(context, False, False) for _ in range(N_WINDOWS)]
        for i in range(N_WINDOWS):
            self.consumed[i] = (<Event>self.events[i]).handle

    def plan(self, ranges, uintptr_t staging, size_t window_bytes):
        """Lay the ranges out in windows and cut them into chunks.

        Ranges that go straight to their place count towards a window's size too, so that progress is told meanwhile.
        """
        cdef size_t used = 0, counted = 0, n_staged = 0, need
        cdef uint32_t window = 0
        cdef uintptr_t to
        for r in ranges:
            if r.nbytes <= 0:
                raise ValueError(f"a range of {r.nbytes} bytes")
            staged = r.to is None
            need = (r.nbytes + ALIGN - 1) // ALIGN * ALIGN if staged else 0
            if need > window_bytes:
                raise ValueError(f"a range of {r.nbytes} bytes does not fit a staging window of {window_bytes}")
            if used + need > window_bytes or counted >= window_bytes > 0:
                self.staged.push_back(n_staged)
                used, counted, window = 0, 0, window + 1
            if staged:
                to = staging + (window % N_WINDOWS) * window_bytes + used
                self.consume.prepare(r.tag, to, r.nbytes)
                n_staged += 1
            else:
                to = r.to
            used += need
            counted += r.nbytes
            self.cut(r, to, window)
        self.staged.push_back(n_staged)

    cdef int cut(self, r, uintptr_t to, uint32_t window) except -1:
        """Append the chunks of a range; of one that is checked they are whole blocks."""
        cdef UploadChunk chunk
        cdef size_t done = 0, nbytes = r.nbytes, most = self.chunk_bytes
        cdef uint64_t offset = r.offset
        chunk.fd, chunk.window, chunk.rule = r.file.fileno(), window, -1
        if r.rule is not None:
            block = r.rule[0]
            if nbytes % block:
                raise ValueError(f"a range of {nbytes} bytes is no run of blocks of {block}")
            if r.rule not in self.rule_index:
                self.rules.push_back(rule_of(r.rule))
                self.rule_index[r.rule] = len(self.rule_index)
            chunk.rule = self.rule_index[r.rule]
            unit = math.lcm(block, ALIGN)   # copies to aligned addresses, where a chunk is large enough
            most = most // unit * unit if unit <= most else most // block * block
        while done < nbytes:
            chunk.offset, chunk.to = offset + done, to + done
            chunk.nbytes = <uint32_t>min(most, nbytes - done)
            self.upload_queue.add(chunk)
            done += chunk.nbytes
        return 0

    def read(self, _Reader reader):
        """A reader thread: until nothing is left or the load has stopped."""
        try:
            self.context.activate()
            with nogil:
                self.upload_queue.began()
                self.pump(reader)
        except BaseException as e:
            reader.error = e
        if reader.error is not None or reader.fault_fd >= 0:
            self.upload_queue.stop()

    cdef int pump(self, _Reader reader) except -1 nogil:
        cdef UploadChunk chunk
        cdef char* slot
        cdef int64_t uses = 0
        cdef int i
        cdef int64_t followed = -1
        while self.upload_queue.take(&chunk):
            i = uses % SLOTS
            if uses >= SLOTS:
                await_event(reader.copied[i])
            slot = <char*>reader.ring.host + i * self.chunk_bytes
            if reader.fill(slot, &chunk) or reader.scan(slot, &chunk, self.rules.data()):
                return 0
            if chunk.window >= N_WINDOWS and followed != chunk.window:
                # the memory of this window is free once the window before in it was consumed
                reader.stream.follow_nogil(self.consumed[chunk.window % N_WINDOWS])
                followed = chunk.window
            reader.stream.copy_in_nogil(<cu.CUdeviceptr>chunk.to, slot, chunk.nbytes)
            reader.stream.mark_nogil(reader.copied[i])
            self.upload_queue.sent(chunk)
            uses += 1
        return 0

    def coordinate(self):
        """The coordinator's thread: until every window is consumed or the load has stopped."""
        try:
            self.context.activate()
            with nogil:
                self.upload_queue.began()
                self.consume_windows()
        except BaseException as e:
            self.error = e
            self.upload_queue.stop()

    cdef int consume_windows(self) except -1 nogil:
        cdef uint32_t window
        cdef size_t i, done = 0
        cdef int state
        for window in range(self.upload_queue.n_windows()):
            state = 0
            while state == 0:
                state = self.upload_queue.wait_full(window, 1.0)
            if state < 0:
                return 0
            if done < self.staged[window]:
                for i in range(self.streams.size()):    # behind all copies so far
                    mark_nogil(self.streams[i], self.tails[i])
                    self.consumer.follow_nogil(self.tails[i])
            while done < self.staged[window]:
                self.consume.queue(done, self.consumer.handle)
                done += 1
            self.consumer.mark_nogil(self.consumed[window % N_WINDOWS])
            self.upload_queue.open(window + 1 + N_WINDOWS)
            self.upload_queue.consumed(window + 1)
        return 0

    def run(self, int n_readers, progress):
        """Load everything. Returns when all copies and all that is done with them are queued, or something failed."""
        cdef _Reader reader
        for _ in range(n_readers):
            try:
                reader = _Reader(self.context, self.chunk_bytes)
            except InsufficientMemory:
                if not self.readers:
                    raise
                break       # fewer readers than were wanted are slower, and that is all
            self.readers.append(reader)
            self.streams.push_back(reader.stream.handle)
            self.tails.push_back(reader.tail)
        threads = [threading.Thread(target=self.read, args=(r,), name=f"upload-{i}", daemon=True)
                   for i, r in enumerate(self.readers)]
        threads.append(threading.Thread(target=self.coordinate, name="upload", daemon=True))
        self.upload_queue.open(N_WINDOWS)
        try:
            try:
                for thread in threads:
                    thread.start()
            except RuntimeError as e:
                raise InternalError(f"the system gives no thread for the upload: {e}") from e
            self.attend(len(threads), progress)
        finally:
            self.upload_queue.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()

    cdef int attend(self, size_t n_threads, progress) except -1:
        """Wait for the threads, with an eye on signals, and tell how far they are: first when all are at work."""
        cdef size_t seen = 0
        cdef int state = 0
        while state == 0:
            with nogil:
                state = self.upload_queue.wait_began(n_threads, TICK)
            PyErr_CheckSignals()
        while state >= 0:
            if progress is not None:
                progress(self.upload_queue.bytes_sent())
            seen = self.upload_queue.n_consumed()
            if seen == self.upload_queue.n_windows():
                break
            with nogil:
                state = self.upload_queue.wait_consumed(seen, TICK)
            PyErr_CheckSignals()
        return 0

    def finish(self):
        """Wait for everything that is queued."""
        cdef _Reader reader
        for reader in self.readers:
            reader.stream.synchronize()
        self.consumer.synchronize()

    def raise_fault(self, ranges):
        """Raise what ended a reader, if something did: a CUDA error, a file that could not be read to its end, or a
        number that no weight may be."""
        cdef _Reader reader
        if self.error is not None:
            raise self.error
        for reader in self.readers:
            if reader.error is not None:
                raise reader.error
        # chunks are taken in the order of the ranges, so the first fault in that order is always among those seen
        faults = []
        for reader in self.readers:
            if reader.fault_fd >= 0:
                index = next(i for i, p in enumerate(ranges) if p.file.fileno() == reader.fault_fd
                             and p.offset <= reader.fault_offset < p.offset + p.nbytes)
                faults.append((index, reader.fault_offset, reader.fault_errno, reader.fault_check))
        if faults:
            index, offset, number, found = min(faults)
            r = ranges[index]
            if found:
                raise ModelLoadError(f"tensor {quoted(r.name)} {CHECK_REASONS[found]}", r.file.path, offset,
                                     tensor=r.name)
            reason = (f"cannot be read: {os.strerror(number)}" if number else
                      "ended early: it was cut while it was being loaded")
            raise ModelLoadError(reason, r.file.path, offset)

    def close(self):
        """Free everything, after what is queued has ended. Idempotent; never raises."""
        cdef _Reader reader
        # not the context: what its other streams do is not the business of a load
        streams = [self.consumer]
        for reader in self.readers:
            streams.append(reader.stream)
        for stream in streams:
            try:
                stream.synchronize()
            except CudaError:
                pass    # a poisoned context: nothing runs any more
        for resource in (*self.readers, *self.events):
            resource.close()


def upload(Context context, ranges, *, consume=None, Stream stream=None, DeviceMemory staging=None,
           size_t chunk_bytes=1 << 20, int n_readers=0, progress=None):
    """Bring bytes of files to the device, and wait until they are there.

    Args:
        context: the device's context; other streams of it may be busy meanwhile.
        ranges: `FileRange`s, in the order in which they are consumed (best the order of the file).
        consume: a `Consumer`, or a callable: called from another thread as consume(tag, address, nbytes) for each range
            without an address, in order, once its bytes are on their way to `address`. Work that it queues on `stream`
            finds them there; when that work is done the memory is used for other ranges.
        stream: where `consume` queues its work.
        staging: device memory for ranges on their way to `consume`; a range must fit a quarter of it.
        chunk_bytes: bytes of one read and one copy, 4096 .. 2^30.
        n_readers: reader threads; 0: one for each core, at most 16.
        progress: called with the bytes sent so far, first when all threads are at work, then now and then; what it
            raises ends the load.

    Returns:
        `UploadStats`.

    Raises:
        ModelLoadError: a file was cut, written to or replaced meanwhile, or cannot be read, or a range with a type
            holds NaN or infinity; path and offset.
        CudaError: the driver refused something.
        InternalError: the system gives no thread.
    """
    cdef size_t window_bytes = 0
    ranges = list(ranges)
    if not 4096 <= chunk_bytes <= 1 << 30:
        raise ValueError(f"chunk_bytes must be 4096 to {1 << 30}, not {chunk_bytes}")
    if any(r.to is None for r in ranges) and (consume is None or stream is None or staging is None):
        raise ValueError("ranges without an address need consume, stream and staging")
    start = time.monotonic()
    files = {r.file.fileno(): r.file for r in ranges}
    total = sum(r.nbytes for r in ranges)
    n_readers = n_readers or min(usable_cores(), MAX_READERS)
    n_readers = max(1, min(n_readers, MAX_READERS, MAX_PINNED // (SLOTS * chunk_bytes), total // chunk_bytes + 1))
    if staging is not None:
        window_bytes = staging.nbytes // N_WINDOWS // ALIGN * ALIGN
    own = Stream(context) if stream is None else None
    consumer = consume if isinstance(consume, Consumer) else _Calls(consume)
    load = _Load(context, stream or own, consumer, chunk_bytes)
    try:
        load.plan(ranges, staging.pointer if staging is not None else 0, window_bytes)
        load.run(n_readers, progress)
        load.raise_fault(ranges)
        load.finish()
        for file in files.values():
            file.check_unchanged()
        if progress is not None:
            progress(total)
    finally:
        load.close()
        if own is not None:
            own.close()
    return UploadStats(total, time.monotonic() - start, len(load.readers))
