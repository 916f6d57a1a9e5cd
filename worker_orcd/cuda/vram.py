"""The VRAM plan: what a model takes on a GPU, known before anything is allocated, shown, compared with what is free.

Pure arithmetic over the arenas of `memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker_orcd.cuda import memory as cuda_memory
from worker_orcd.errors import InsufficientVram


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

    def check(self, free: int, device: str, path: str, limit: int | None = None) -> None:
        """Raise InsufficientVram, with both numbers and the parts, where the plan does not fit.

        Args:
            free: bytes that are free.
            device, path: what has them and what needs them, for the message.
            limit: bytes of them that may be taken, None: all.
        """
        available = free if limit is None else min(free, limit)
        if self.required <= available:
            return
        most = self.largest_kv(available)
        advice = f"; a KV cache of up to {most:,} bytes would fit" if most and self.kv else ""
        of_them = f", the limit is {limit:,}" if limit is not None else ""
        raise InsufficientVram(
            f"{path} needs {self.required:,} bytes of device memory (weights {self.weights:,}, KV cache {self.kv:,}, "
            f"workspace {self.workspace:,}, reserve {max(self.reserve, self.staging):,}); {device} has {free:,} free"
            f"{of_them}{advice}",
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
