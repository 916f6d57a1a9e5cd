"""Types of pyx/worker_orcd/_driver.pyx: contexts, memory, kernels, streams and graphs of the CUDA driver."""

from typing import Self, TypedDict

from typing_extensions import Buffer

class _Residency(TypedDict):
    memory_type: str
    managed: bool
    host_alias: bool

def device_count() -> int:
    """Number of GPUs the driver shows."""

def driver_version() -> tuple[int, int]:
    """The driver's CUDA version as (major, minor)."""

def device_copy_gbps(context: Context, nbytes: int = 1 << 30, repeat: int = 10) -> float:
    """Bandwidth of a device-to-device copy in GB/s, bytes read and written both counted."""

class Context:
    """The primary context of one GPU."""

    def __init__(self, device: int = 0) -> None: ...
    @property
    def device(self) -> int:
        """Index of the GPU."""

    @property
    def pid(self) -> int:
        """The process that may use the context."""

    @property
    def name(self) -> str:
        """Of the GPU."""

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability (major, minor)."""

    @property
    def sm_count(self) -> int:
        """Multiprocessors."""

    @property
    def max_smem(self) -> int:
        """Most dynamic shared memory of a block, in bytes."""

    @property
    def total_bytes(self) -> int:
        """Memory of the GPU."""

    def activate(self) -> None:
        """Make the context current on the calling thread."""

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""

    def load(self, name: str) -> Library:
        """The kernels of the packaged `fatbins/<name>.fatbin`."""

    def allocate(self, nbytes: int, label: str = "") -> DeviceMemory:
        """Device memory, 256-byte aligned."""

    def pinned(self, nbytes: int) -> PinnedMemory:
        """Page-locked host memory that the device can address."""

    def stream(self) -> Stream:
        """A new stream that does not wait for the default one."""

    def event(self, *, timing: bool = True, blocking: bool = False) -> Event:
        """A new event; `blocking`: `synchronize` sleeps instead of spinning."""

    def allocations(self) -> list[DeviceMemory]:
        """The live device memory of this context."""

    def close(self) -> None:
        """Close everything that was made in the context, and release it. Idempotent."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

class DeviceMemory:
    """Device memory with one owner."""

    def __init__(self, context: Context, nbytes: int, label: str = "", managed: bool = False) -> None: ...
    @property
    def context(self) -> Context:
        """Where it is."""

    @property
    def label(self) -> str:
        """What it is for."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    @property
    def managed(self) -> bool:
        """Whether the driver may move it to the host."""

    @property
    def pointer(self) -> int:
        """The device address; 0 once closed."""

    def copy_from(self, source: Buffer, offset: int = 0) -> None:
        """Copy host bytes (a flat buffer of uint8) to the device at `offset`, and wait."""

    def copy_to(self, target: Buffer, offset: int = 0) -> None:
        """Copy bytes at `offset` of the device to the host, and wait."""

    def fill(self, value: int) -> None:
        """Set every byte, and wait."""

    def residency(self) -> _Residency:
        """What the driver says of the allocation."""

    def close(self) -> None:
        """Free the memory. Idempotent."""

class PinnedMemory:
    """Page-locked host memory, mapped into the device's address space."""

    def __init__(self, context: Context, nbytes: int) -> None: ...
    @property
    def context(self) -> Context:
        """Where it is."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    @property
    def pointer(self) -> int:
        """The address the device uses."""

    @property
    def host_address(self) -> int:
        """The address the host uses."""

    def write(self, source: Buffer, offset: int = 0) -> None:
        """Copy bytes in at `offset`."""

    def read(self, n: int, offset: int = 0) -> bytes:
        """`n` bytes from `offset`."""

    def close(self) -> None:
        """Free the memory. Idempotent."""

class Stream:
    """An in-order queue of device work."""

    def __init__(self, context: Context) -> None: ...
    @property
    def context(self) -> Context:
        """Where it is."""

    def synchronize(self) -> None:
        """Wait until everything queued so far is done."""

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Queue a copy between two device addresses."""

    def wait(self, event: Event) -> None:
        """Let later work of this stream wait for `event`."""

    def begin_capture(self) -> None:
        """Record the following work into a graph instead of running it."""

    def end_capture(self) -> Graph:
        """Stop recording: the recorded work, ready to be replayed."""

    def abandon_capture(self) -> None:
        """Stop recording and forget what was recorded. Never raises."""

    @property
    def pointer(self) -> int:
        """The driver's handle, for another library; 0 once closed."""

    def close(self) -> None:
        """Let go of the stream; what is queued still runs. Idempotent."""

class Event:
    """A point in a stream."""

    def __init__(self, context: Context, timing: bool = True, blocking: bool = False) -> None: ...
    @property
    def context(self) -> Context:
        """Where it is."""

    def record(self, stream: Stream) -> None:
        """Mark the present end of `stream`."""

    def synchronize(self) -> None:
        """Wait for the event."""

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds between `since` and this event, both recorded and done."""

    def close(self) -> None:
        """Let go of the event. Idempotent."""

class Library:
    """The kernels of one fatbin."""

    def __init__(self, context: Context, name: str, code: bytes) -> None: ...
    @property
    def context(self) -> Context:
        """Where it is."""

    @property
    def name(self) -> str:
        """Of the fatbin."""

    def kernel(self, name: str, max_dynamic_smem: int = 0) -> Kernel:
        """The kernel `name`, allowed to use `max_dynamic_smem` bytes of dynamic shared memory."""

    def close(self) -> None:
        """Unload the kernels; none of them may be running. Idempotent."""

class Kernel:
    """One kernel; takes exactly one parameter, a struct by value."""

    def __init__(self, library: Library, name: str, max_dynamic_smem: int = 0) -> None: ...
    @property
    def library(self) -> Library:
        """The kernels it is one of."""

    @property
    def name(self) -> str:
        """Of the function."""

    @property
    def param_bytes(self) -> int:
        """Size of its one parameter."""

    @property
    def registers(self) -> int:
        """Registers a thread of it uses."""

    def launch(
        self, stream: Stream, grid: tuple[int, int, int], block: int, smem: int, params: bytes, pdl: bool = False
    ) -> None:
        """Queue a launch: blocks (x, y, z), threads of a block, bytes of dynamic shared memory, the struct."""

class LaunchList:
    """Launches in order, for compiled modules: put together with the Python lock, queued without it."""

class Graph:
    """Recorded work, ready to be replayed. Made by `Stream.end_capture`."""

    @property
    def context(self) -> Context:
        """Where it is."""

    @property
    def n_nodes(self) -> int:
        """Pieces of work in it."""

    def launch(self, stream: Stream) -> None:
        """Queue one replay."""

    def close(self) -> None:
        """Let go of the graph; none of its replays may be running. Idempotent."""
