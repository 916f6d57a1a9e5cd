"""Types of pyx/worker_orcd/_cpu.pyx: the CPU engine."""

from collections.abc import Iterable
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Buffer

from worker_orcd._ring import Control, TokenRing
from worker_orcd.engine.protocol import Batch, EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import TokenEdits
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models.plan import Plan

#: prompt tokens of a warm-up
WARM_ROWS: int

class _CpuFeatures(TypedDict):
    isa: str | None
    available: list[str]
    cores: int

def cpu_features() -> _CpuFeatures:
    """The kernels in use, those this processor runs, and the cores usable by this process."""

def dequantize(type_id: int, buffer: Buffer, n_elements: int, isa: str | None = None) -> NDArray[np.float32]:
    """Exact float32 values [n_elements] of quantized blocks."""

def sample_token(
    logits: ArrayLike, position: int, sampling: SamplingParams, sampled: Iterable[int] = (), edits: TokenEdits = ...
) -> int:
    """Draw one token from float32 logits [n_vocab]; -1 where there is nothing to draw from."""

class CpuEngine:
    """A model on the CPU; see `worker_orcd.engine.protocol.Engine`."""

    config: EngineConfig
    block_tables: NDArray[np.int32]
    rope_tables: NDArray[np.int32]
    n_vocab: int
    warm_rows: tuple[int, ...]
    warm_outputs: tuple[int, ...]
    warm_seqs: tuple[int, ...]
    def __init__(self, model_file: ModelFile, plan: Plan, config: EngineConfig, n_threads: int = 0) -> None: ...
    @property
    def isa(self) -> str:
        """The kernels in use."""

    @property
    def n_threads(self) -> int:
        """Threads that work on a step, the caller's included; 0 once closed."""

    @property
    def kv_bytes(self) -> int:
        """Reserved for the KV pools; 0 once closed."""

    @property
    def workspace_bytes(self) -> int:
        """Reserved for activations and scratch; 0 once closed."""

    def set_slot(self, slot: int, sampling: SamplingParams, edits: TokenEdits = ...) -> None:
        """Give a slot to a new sequence."""

    def step(
        self, batch: Batch, want_logits: bool = False, control: Control | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        """Run one ragged step: sampled tokens [n_out], logits [n_out, n_vocab] or None."""

    def forward(
        self, batch: Batch, stop_after: str | None = None, control: Control | None = None
    ) -> NDArray[np.float32]:
        """Run one step without sampling: logits [n_out, n_vocab], or the buffer that op `stop_after` writes."""

    def copy_block(self, group: int, source: int, target: int) -> None:
        """See `engine.Engine.copy_block`."""

    def decode(
        self,
        slots: ArrayLike,
        seq_ids: ArrayLike,
        tokens: ArrayLike,
        positions: ArrayLike,
        n_steps: int,
        stop_ids: ArrayLike,
        stop_offsets: ArrayLike,
        ring: TokenRing,
        control: Control,
    ) -> NDArray[np.int32]:
        """Run up to `n_steps` steps of all `slots` together: the sampled tokens [steps_done, n]."""

    def close(self) -> None:
        """Free everything; the engine is dead afterwards. Idempotent."""
