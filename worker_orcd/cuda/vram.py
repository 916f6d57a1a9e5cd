"""The VRAM plan: what a model takes on a GPU, known before anything is allocated, shown, compared with what is free.

Pure arithmetic over the arenas of `memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.cuda import memory as cuda_memory
from worker_orcd.errors import InsufficientVram

#: of what is free, bytes that are never planned: the driver hands out whole pages, and others take some meanwhile
MARGIN_BYTES = 256 << 20
#: about what the driver takes for the context of a process on a Hopper GPU
CONTEXT_BYTES = 512 << 20


@dataclass(frozen=True)
class Allowance:
    """What a process may take of a GPU beside its context.

    Attributes:
        free, total: bytes of the GPU, as the driver says once the process has its context.
        utilization: share of the total that the process may take, its context included.
        limit: bytes that may be taken beside the context, None: no further limit.
    """

    free: int
    total: int
    utilization: float
    limit: int | None = None

    @property
    def share(self) -> int:
        """What `utilization` leaves beside the context; below 0 where that alone is more."""
        return int(self.total * self.utilization) - min(CONTEXT_BYTES, self.total - self.free)

    @property
    def nbytes(self) -> int:
        """The smallest of the share, the limit and what is free less `MARGIN_BYTES`; >= 0."""
        bounds = [self.share, self.free - MARGIN_BYTES, *([] if self.limit is None else [self.limit])]
        return max(0, min(bounds))

    def __str__(self) -> str:
        """What binds, for a message: bytes free, and how many of them may be taken and why."""
        n = self.nbytes
        if n == self.limit:
            return f"{self.free:,} free, the limit is {n:,}"
        by_share = self.share < self.free - MARGIN_BYTES
        why = f"gpu_memory_utilization is {self.utilization:g}" if by_share else f"{MARGIN_BYTES:,} stay free"
        return f"{self.free:,} of {self.total:,} free, of which {n:,} may be taken ({why})"


@dataclass(frozen=True)
class VramPlan:
    """Device bytes of a loaded model.

    Attributes:
        weights, kv, workspace: the three arenas.
        reserve: kernels, graphs and what the driver takes for them.
        staging: taken only while weights are loaded; freed before the reserve is needed.
    """

    weights: int
    kv: int
    workspace: int
    reserve: int = cuda_memory.RESERVE_BYTES
    staging: int = cuda_memory.STAGING_BYTES

    @classmethod
    def of(cls, arenas: cuda_memory.Arenas) -> VramPlan:
        """The plan of the arenas."""
        return cls(arenas.weights.nbytes, arenas.kv.nbytes, arenas.workspace.nbytes)

    @property
    def resident(self) -> int:
        """What stays allocated by name while the model serves."""
        return self.weights + self.kv + self.workspace

    @property
    def required(self) -> int:
        """What must be free before loading starts."""
        return self.resident + max(self.reserve, self.staging)

    def largest_kv(self, free: int) -> int:
        """Bytes the KV cache may have at most where `free` bytes are free, whatever this plan's KV cache is; >= 0."""
        return max(0, free - (self.required - self.kv)) // cuda_memory.ALIGN * cuda_memory.ALIGN

    def check(self, room: int | Allowance, device: str, path: str) -> None:
        """Raise InsufficientVram, with both numbers and the parts, where the plan does not fit.

        Args:
            room: bytes that are free, or what may be taken of them.
            device, path: what has them and what needs them, for the message.
        """
        available = room.nbytes if isinstance(room, Allowance) else room
        if self.required <= available:
            return
        most = self.largest_kv(available)
        advice = f"; a KV cache of up to {most:,} bytes would fit" if most and self.kv else ""
        has = str(room) if isinstance(room, Allowance) else f"{room:,} free"
        raise InsufficientVram(
            f"{path} needs {self.required:,} bytes of device memory (weights {self.weights:,}, KV cache {self.kv:,}, "
            f"workspace {self.workspace:,}, reserve {max(self.reserve, self.staging):,}); {device} has {has}{advice}",
            self.required,
            available,
            device=device,
            path=path,
        )

    def to_dict(self) -> dict[str, int]:
        """The numbers by name, for the log and for JSON."""
        return {
            "weights_bytes": self.weights,
            "kv_bytes": self.kv,
            "workspace_bytes": self.workspace,
            "reserve_bytes": max(self.reserve, self.staging),
            "bytes_required": self.required,
        }

    def table(self, free: int | None = None) -> str:
        """The plan as text of a few aligned lines, for people."""
        rows = [
            ("weights", self.weights),
            ("KV cache", self.kv),
            ("workspace", self.workspace),
            ("reserve", max(self.reserve, self.staging)),
            ("required", self.required),
        ]
        if free is not None:
            rows.append(("free", free))
        width = max(len(f"{n:,}") for _, n in rows)
        return "\n".join(f"{name:<10} {n:>{width},} B  {n / 1e6:>10,.1f} MB" for name, n in rows)
