"""Types of pyx/worker_orcd/_engine.pyx: the CUDA engine."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worker_orcd._driver import Context, Graph
from worker_orcd._ring import Control, TokenRing
from worker_orcd._upload import UploadStats
from worker_orcd.cuda.launches import StepLaunch
from worker_orcd.cuda.memory import Arenas
from worker_orcd.cuda.slow_paths import SlowPath
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.engine.protocol import Batch, EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.engine.token_edits import TokenEdits
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models.ops import Op
from worker_orcd.models.plan import Plan

#: type id of vectors that need no widening
F32: int
#: head widths that the attention kernels are built for
HEAD_DIMS: tuple[int, ...]
#: columns of a row that the product kernels take at once
ROW_STEP: int
#: batch sizes for which a decode step is captured
DECODE_SIZES: tuple[int, ...]

def plan_memory(plan: Plan, config: EngineConfig) -> Arenas:
    """The three arenas (weights, kv, workspace), before anything is allocated."""

def check_supported(model_file: ModelFile, plan: Plan) -> None:
    """Raise ModelLoadError for a model whose shapes no kernel is built for."""

class CudaEngine:
    """A model in the memory of one GPU; see `worker_orcd.engine.protocol.Engine`."""

    config: EngineConfig
    block_tables: NDArray[np.int32]
    rope_tables: NDArray[np.int32]
    n_vocab: int
    warm_rows: tuple[int, ...]
    warm_outputs: tuple[int, ...]
    warm_seqs: tuple[int, ...]
    #: "fused" or "plain", as the environment asked for when the engine was made
    lowering: str
    #: the lowered ops of a step, in order
    ops: tuple[Op, ...]
    #: which matrices this GPU multiplies by a slower path
    slow_paths: tuple[SlowPath, ...]
    def __init__(
        self,
        model_file: ModelFile,
        plan: Plan,
        config: EngineConfig,
        device: int = 0,
        chunk_bytes: int = 1 << 20,
        progress: Callable[[int, int], object] | None = None,
        context: Context | None = None,
        on_plan: Callable[[VramPlan, int], object] | None = None,
        check: bool = False,
    ) -> None: ...
    @property
    def plan(self) -> Plan:
        """What it runs."""

    @property
    def memory(self) -> Arenas:
        """The arenas (weights, kv, workspace)."""

    @property
    def vram_plan(self) -> VramPlan:
        """What was compared with the free memory."""

    @property
    def context(self) -> Context:
        """The device's context."""

    @property
    def load_stats(self) -> UploadStats:
        """How the weights were loaded."""

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

    def forward_ops(self, batch: Batch, ops: Sequence[Op]) -> NDArray[np.float32]:
        """Run lowered ops in order, of either lowering or of both in turns: the whole buffer that the last writes."""

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

    def decode_parts(self, slots: ArrayLike, tokens: ArrayLike, positions: ArrayLike, n_steps: int) -> DecodeParts:
        """A decode step of these rows in parts, for who measures."""

    def prompt_parts(self, tokens: ArrayLike) -> PromptParts:
        """A step of a prompt's first tokens in parts, for who measures."""

    def check_residency(self) -> list[str]:
        """What the driver says of every allocation that is not plain device memory."""

    def copy_bandwidth(self) -> float:
        """GB/s of a device-to-device copy, bytes read and written both counted."""

    def close(self) -> None:
        """Free everything; the engine is dead afterwards. Idempotent."""

class StepParts:
    """The launches of a step, and graphs of some of them, for who measures."""

    @property
    def launches(self) -> list[StepLaunch]:
        """All of them, in order."""

    def graph(self, chosen: Iterable[int]) -> Graph:
        """Those of the indices `chosen`, recorded in that order and launched as in the step."""

    def reset(self) -> None:
        """The rows are again those of the first step."""

class DecodeParts(StepParts):
    """Of a decode step of greedy rows."""

    def __init__(
        self, engine: CudaEngine, slots: ArrayLike, tokens: ArrayLike, positions: ArrayLike, n_steps: int
    ) -> None: ...

class PromptParts(StepParts):
    """Of a step of a prompt's first tokens."""

    def __init__(self, engine: CudaEngine, tokens: ArrayLike) -> None: ...
