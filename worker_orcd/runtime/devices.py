"""Devices by name: which one is meant, how much memory it has, and the engine that runs on it.

The CPU is chosen by name only; nothing here ever falls back to it. Compiled modules are imported when their device is
asked for, so that a machine without a GPU never touches the CUDA ones.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from worker_orcd.config import check_device
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.engine.protocol import Engine, EngineConfig
from worker_orcd.errors import CudaError, InternalError
from worker_orcd.machine import free_memory
from worker_orcd.models.plan import Plan

if TYPE_CHECKING:
    from worker_orcd.gguf.model_file import ModelFile

#: tokens of one step where the caller names no number
CPU_BATCH_TOKENS, CUDA_BATCH_TOKENS = 256, 2048

_ADVICE = 'choose device "cpu" by name to run without a GPU'


def resolve(device: str) -> str:
    """ "auto", "cpu", "cuda" or "cuda:N" as "cpu" or "cuda:N".

    Raises:
        InvalidRequest: another name.
        CudaError: no driver, no GPU, no such GPU, or a build without the CUDA engine.
    """
    check_device(device)
    if device == "cuda":
        device = "cuda:0"
    if device == "cpu":
        return device
    index = 0 if device == "auto" else int(device.partition(":")[2])
    driver = _module("_driver")
    _module("_engine")
    try:
        n_devices = driver.device_count()
    except CudaError as error:
        raise CudaError(f"{error.message}; {_ADVICE}", device=device, **error.fields) from error
    if n_devices == 0:
        raise CudaError(f"the driver shows no GPU; {_ADVICE}", device=device)
    if index >= n_devices:
        raise CudaError(f"there is no device cuda:{index}; the driver shows {n_devices} GPU(s)", device=device)
    return f"cuda:{index}"


def default_batch_tokens(device: str, max_seqs: int) -> int:
    """Tokens of one step on a resolved device."""
    return max(max_seqs, CPU_BATCH_TOKENS if device == "cpu" else CUDA_BATCH_TOKENS)


def host_memory() -> int:
    """Bytes of memory that this process can take.

    Raises:
        InternalError: the system does not tell.
    """
    free = free_memory()
    if free is None:
        raise InternalError("/proc/meminfo does not say MemAvailable")
    return free


@contextlib.contextmanager
def retain_context(device: str) -> Iterator[None]:
    """Keep a GPU's context alive for a while: making one anew takes a quarter of a second. Nothing on the CPU.

    Raises:
        CudaError: no context can be made.
    """
    if device == "cpu":
        yield
        return
    context = _module("_driver").Context(_index(device))
    try:
        yield
    finally:
        context.close()


def device_memory(device: str) -> tuple[int, int]:
    """Bytes of a GPU: what it has free beside the context of this process, and in all.

    Raises:
        CudaError: the driver does not tell.
        InsufficientVram: there is not even room for a context.
    """
    context = _module("_driver").Context(_index(device))
    try:
        free, total = context.memory()
        return int(free), int(total)
    finally:
        context.close()


def vram_plan(plan: Plan, config: EngineConfig) -> VramPlan:
    """What the model takes on a GPU. Needs the CUDA modules of the package, but neither a driver nor a GPU.

    Raises:
        CudaError: this installation has no CUDA modules.
    """
    return VramPlan.of(_module("_engine").plan_memory(plan, config))


def open_engine(
    device: str,
    model_file: ModelFile,
    plan: Plan,
    config: EngineConfig,
    *,
    n_threads: int,
    chunk_bytes: int,
    progress: Callable[[int], None],
    check_tensors: bool = False,
    on_plan: Callable[[VramPlan, int], object] | None = None,
) -> Engine:
    """Load the model on a resolved device.

    Args:
        n_threads: of the CPU engine, 0: one for each core that the process may use.
        chunk_bytes: bytes of one host-to-device copy; nothing is copied on the CPU.
        progress: called with the bytes loaded so far; what it raises ends the load, and everything is freed.
        check_tensors: on a GPU, refuse NaN and infinity in what is loaded, as `ModelFile.check_tensors`, which is for
            the CPU.
        on_plan: called on a GPU with its `VramPlan` and the free bytes, before anything is allocated.
    """
    if device == "cpu":
        cpu: Engine = _module("_cpu").CpuEngine(model_file, plan, config, n_threads=n_threads)
        return cpu
    cuda: Engine = _module("_engine").CudaEngine(
        model_file,
        plan,
        config,
        device=_index(device),
        chunk_bytes=chunk_bytes,
        progress=lambda done, total: progress(done),
        check=check_tensors,
        on_plan=on_plan,
    )
    return cuda


def engine_facts(engine: Any) -> dict[str, Any]:
    """What an engine adds to `ModelInfo`: device memory, compute capability, driver version, lowering and slow paths.
    Nothing on the CPU."""
    context = getattr(engine, "context", None)
    if context is None:
        return {}
    major, minor = context.capability
    return {
        "vram_bytes": engine.vram_plan.resident,
        "sm": f"sm_{major}{minor}",
        "cuda_runtime_version": ".".join(map(str, _module("_driver").driver_version())),
        "lowering": engine.lowering,
        "slow_paths": tuple(map(str, engine.slow_paths)),
    }


def _index(device: str) -> int:
    return int(device.partition(":")[2])


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"worker_orcd.{name}")
    except ImportError as error:
        if name == "_cpu":
            raise InternalError(f"this installation has no CPU engine (worker_orcd._cpu): {error}") from error
        raise CudaError(f"this installation has no CUDA engine (worker_orcd.{name}): {error}; {_ADVICE}") from error
