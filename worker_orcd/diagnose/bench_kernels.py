"""Where the time of a step goes on a GPU, a decode step or one of a prompt: each kind of launch by itself, beside what
bounds it.

Launches of a step that run one kernel over one grid, for ops of one name in different layers, are a kind. A graph holds
all launches of a kind, in the order of the step and with its dependencies, each with its own layer's weights. It is
replayed with the L2 cache emptied before each time, as it is of weights when a step of a model larger than the cache
comes to them. A kind of few launches is recorded several times over, so that the start of a graph does not count, where
each reads so little, or so much, that the cache does not help the next.

The whole step is timed as the engine runs it, one replay behind the other. What it takes less than the sum of its kinds
it gains by their overlap, and what it takes more is lost between them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from worker_orcd.cuda import lowering
from worker_orcd.cuda.memory import Region
from worker_orcd.diagnose import cublas
from worker_orcd.engine import kv_blocks
from worker_orcd.errors import InsufficientVram, InvalidRequest
from worker_orcd.models.ops import Attention, Embed, ExpertMatMul, MatMul, Op
from worker_orcd.models.plan import Plan

if TYPE_CHECKING:
    from worker_orcd.cuda.launches import StepLaunch
    from worker_orcd.diagnose.bench import Bench

#: timed replays of a graph, and steps that are timed together
REPLAYS, STEPS = 21, 64
#: bytes that are copied to empty the L2 cache: well over that of the GPUs this is for
EVICT_BYTES = 128 << 20
#: launches that a graph of a kind has at least, where it reads at most so many bytes of weights a launch; and where it
#: reads more than a cache holds
FEW_LAUNCHES, FEW_BYTES = 16, 64 << 10
LARGE_LAUNCHES, LARGE_BYTES = 4, 64 << 20
#: most matrices of one shape that cuBLAS gets, and most bytes of them, but for one matrix that is larger
CUBLAS_MATRICES, CUBLAS_BYTES = 32, 512 << 20


@dataclass(frozen=True)
class Kind:
    """Launches of one kind in a step.

    Attributes:
        kernel: its name.
        ops: of the plan, without their layers, that a launch is for; "sample" for the draw.
        launches: that a step has.
        grid: blocks of each.
        weight_bytes: of a launch, as they lie on the GPU; of experts those expected to be chosen.
        kv_bytes: of the KV cache that a launch reads.
        us: of a launch.
        gb_per_s, percent_of_copy: of these bytes; of the copy bandwidth. None where there are none.
        tflops: of products of matrices and of a prompt's attention, two operations a product and its addition; None of
            others.
        cublas_us: of a cuBLAS product of bfloat16 matrices of the same shape; None where it is no product, or there was
            no cuBLAS or no memory for it.
    """

    kernel: str
    ops: tuple[str, ...]
    launches: int
    grid: tuple[int, int, int]
    weight_bytes: int
    kv_bytes: int
    us: float
    gb_per_s: float | None
    percent_of_copy: float | None
    tflops: float | None
    cublas_us: float | None


@dataclass(frozen=True)
class Step:
    """A decode step of `batch` sequences at `position`, or one of a prompt's first `n_prompt` tokens: `us` by itself,
    `kinds_us` by the sum of its kinds; `between_us` is the difference, less than zero where kinds overlap."""

    batch: int
    position: int
    n_prompt: int
    launches: int
    us: float
    kinds_us: float
    between_us: float
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class KernelReport:
    """Steps of a model on a GPU.

    Attributes:
        gpu: its name.
        lowering: "fused" or "plain".
        copy_gb_per_s: of a device-to-device copy in the same run, bytes read and written both counted.
        cublas: version, or None.
        cublas_absent: why there are no products of cuBLAS, or not of all.
    """

    gpu: str
    lowering: str
    copy_gb_per_s: float
    cublas: str | None
    cublas_absent: str | None
    steps: tuple[Step, ...]


def check_device(device: str) -> None:
    """Refuse the CPU.

    Raises:
        InvalidRequest: the resolved `device` has no kernels that are launched.
    """
    if device == "cpu":
        raise InvalidRequest("--kernels measures launches of a GPU, and the device is the CPU", field="kernels")


def measure(
    bench: Bench,
    batches: Iterable[int],
    n_tokens: int,
    copy_gb_per_s: float,
    progress: Callable[[str], None] = lambda text: None,
    prompts: Iterable[int] = (),
) -> KernelReport:
    """Measure a step of one sequence and of each of `batches`, in the middle of `n_tokens` positions, and one of each
    of `prompts`, of which no more tokens count than a step takes.

    Raises:
        InsufficientVram: there is no room to empty the L2 cache.
        CudaError: the driver refused something.
    """
    check_device(bench.device)
    engine: Any = bench.engine
    position = n_tokens // 2
    n_steps = min(STEPS, n_tokens - position)
    steps = []
    with closing(_Timer(engine.context)) as timer, closing(_Yardstick(timer)) as yardstick:
        for batch in sorted({1, *batches}):
            progress(f"kernels x {batch}")
            parts = bench.decode_parts(batch, position, n_steps)
            rows = _Rows(batch, batch, position, 0)
            steps.append(_step(engine, bench.plan, parts, timer, yardstick, rows, n_steps, copy_gb_per_s))
        for n in sorted({min(n, engine.config.max_batch_tokens) for n in prompts}):
            progress(f"kernels of {n}")
            rows = _Rows(n, 1, 0, n)
            steps.append(_step(engine, bench.plan, bench.prompt_parts(n), timer, yardstick, rows, 4, copy_gb_per_s))
        version, absent = yardstick.version, yardstick.absent
    return KernelReport(engine.context.name, engine.lowering, copy_gb_per_s, version, absent, tuple(steps))


class _Timer:
    """Times graphs of a context in a stream of its own."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.stream, self._begin, self._end = context.stream(), context.event(), context.event()
        self._evict = context.allocate(2 * EVICT_BYTES, "bench")
        self._evict.fill(0)

    def cold_us(self, graph: Any, before: Callable[[], object] = lambda: None) -> float:
        """Microseconds of a replay with an empty L2 cache: the median. `before` is called before each."""
        found = []
        for i in range(REPLAYS + 1):
            before()
            self.stream.copy(self._evict.pointer + EVICT_BYTES, self._evict.pointer, EVICT_BYTES)
            found.append(self._between(graph, 1))
            if i == 0:
                found.clear()
        return statistics.median(found)

    def us(self, graph: Any, n: int) -> float:
        """Microseconds of each of `n` replays, one behind the other."""
        return self._between(graph, n) / n

    def _between(self, graph: Any, n: int) -> float:
        self._begin.record(self.stream)
        for _ in range(n):
            graph.launch(self.stream)
        self._end.record(self.stream)
        self._end.synchronize()
        return 1e3 * float(self._end.elapsed_ms(self._begin))

    def run(self, graph: Any) -> None:
        """Run it once and wait."""
        graph.launch(self.stream)
        self.stream.synchronize()

    def close(self) -> None:
        """Free everything."""
        for held in (self._evict, self._begin, self._end, self.stream):
            held.close()


class _Yardstick:
    """Times of cuBLAS products by shape; None for all of them where there is no library.

    Attributes:
        version: of the library, or None.
        absent: why there is no time, or not for every shape.
    """

    def __init__(self, timer: _Timer) -> None:
        self._timer, self._known = timer, dict[tuple[int, int, int], float | None]()
        self._handle: cublas.Cublas | None = None
        self.version: str | None = None
        self.absent: str | None = None
        try:
            self._handle = cublas.Cublas(cublas.load(), timer.context, timer.stream)
            self.version = self._handle.version
        except (cublas.CublasError, InsufficientVram) as error:
            self.close()
            self.absent = str(error)

    def us(self, n_rows: int, n_out: int, k: int) -> float | None:
        """Microseconds of a product of [n_rows, k] and a matrix [n_out, k], one of several that take turns."""
        if self._handle is None:
            return None
        shape = n_rows, n_out, k
        if shape not in self._known:
            try:
                self._known[shape] = self._measured(self._handle, n_rows, n_out, k)
            except (cublas.CublasError, InsufficientVram) as error:
                self._known[shape], self.absent = None, str(error)
        return self._known[shape]

    def _measured(self, handle: cublas.Cublas, n_rows: int, n_out: int, k: int) -> float:
        n_bytes, timer = 2 * n_out * k, self._timer
        n = max(1, min(CUBLAS_MATRICES, CUBLAS_BYTES // n_bytes))
        with (
            closing(timer.context.allocate(n * n_bytes, "bench")) as w,
            closing(timer.context.allocate(2 * n_rows * k, "bench")) as x,
            closing(timer.context.allocate(4 * n_rows * n_out, "bench")) as out,
        ):
            for memory in (w, x):
                _fill(memory, timer)

            def products() -> None:
                for i in range(n):
                    handle.product(out.pointer, w.pointer + i * n_bytes, x.pointer, n_rows, n_out, k)

            products()  # what the library loads at the first call must not be recorded
            timer.stream.synchronize()
            timer.stream.begin_capture()
            try:
                products()
            except BaseException:
                timer.stream.abandon_capture()
                raise
            with closing(timer.stream.end_capture()) as graph:
                return timer.cold_us(graph) / n

    def close(self) -> None:
        """Let go of the library's handle."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _fill(memory: Any, timer: _Timer) -> None:
    """Bfloat16 numbers as weights and activations have them: what multiplying takes of a GPU's power, and so of its
    speed, depends on the numbers."""
    rng, most = np.random.default_rng(0), 1 << 22
    floats = rng.standard_normal(min(most, memory.nbytes // 2), np.float32)
    some = (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    memory.copy_from(some)
    for at in range(len(some), memory.nbytes, len(some)):
        timer.stream.copy(memory.pointer + at, memory.pointer, min(len(some), memory.nbytes - at))
    timer.stream.synchronize()


@dataclass(frozen=True)
class _Rows:
    """Of a step: how many rows it has, and what of `Step` they are."""

    n: int
    batch: int
    position: int
    n_prompt: int


def _step(engine: Any, plan: Plan, parts: Any, timer: _Timer, yardstick: _Yardstick, rows: _Rows, n_steps: int,
          copy_gb_per_s: float) -> Step:  # fmt: skip
    """One step, measured."""
    launches: list[StepLaunch] = parts.launches
    kinds = []
    with closing(parts.graph(range(len(launches)))) as whole:

        def begin() -> None:
            """Everything as a step leaves it, but that the rows are those of the first one again."""
            parts.reset()
            timer.run(whole)
            parts.reset()

        for which, members in _kinds(plan, engine.ops, launches, engine.memory.weights.tensors, rows).items():
            begin()
            kv_bytes = _kv_bytes(plan, which.window, rows.batch, rows.position)
            n_bytes = which.weight_bytes + kv_bytes
            least = FEW_LAUNCHES if n_bytes <= FEW_BYTES else LARGE_LAUNCHES if n_bytes >= LARGE_BYTES else 1
            again = max(1, -(-least // len(members)))
            with closing(parts.graph(members * again)) as graph:
                us = timer.cold_us(graph, parts.reset) / (again * len(members))
            rate = 1e-3 * n_bytes / us if n_bytes else None
            product = which.product and yardstick.us(*which.product)
            kinds.append(
                Kind(which.kernel, which.ops, len(members), which.grid, which.weight_bytes, kv_bytes, us, rate,
                     None if rate is None else 100 * rate / copy_gb_per_s,
                     1e-6 * which.operations / us if which.operations else None, product or None)
            )  # fmt: skip
        begin()
        us = timer.us(whole, n_steps)
        parts.reset()
    total = sum(kind.us * kind.launches for kind in kinds)
    return Step(rows.batch, rows.position, rows.n_prompt, len(launches), us, total, us - total, tuple(kinds))


@dataclass(frozen=True)
class _Which:
    """What launches of a kind have in common: `product` (rows, n_out, k) where it is one of matrices, `operations` of
    products and of a prompt's attention, `window` where decode rows read the KV cache: of how many positions, 0 for
    all."""

    kernel: str
    ops: tuple[str, ...]
    grid: tuple[int, int, int]
    weight_bytes: int
    operations: int = 0
    product: tuple[int, int, int] | None = None
    window: int | None = None


def _kinds(plan: Plan, ops: tuple[Op, ...], launches: Sequence[StepLaunch], regions: Mapping[str, Region],
           rows: _Rows) -> dict[_Which, list[int]]:  # fmt: skip
    """The launches of each kind by index; kinds come in the order of their first launch."""
    spans = dict(zip(ops, lowering.spans(plan, ops), strict=True))
    kinds: dict[_Which, list[int]] = {}
    at = 0
    for op, members in groupby(launches, key=lambda launch: launch.op):
        of_op = list(members)
        span = () if op is None else spans[op]
        tensors = {name: regions[name] for part in span for name in _weights(plan, part)}
        for launch, names in zip(of_op, owners(of_op, tensors), strict=True):
            kinds.setdefault(_which(plan, span, launch, names, regions, rows), []).append(at)
            at += 1
    return kinds


def owners(launches: Sequence[StepLaunch], tensors: Mapping[str, Region]) -> list[set[str]]:
    """Names of the tensors that each of the launches of one op reads.

    A launch is told where its matrices begin, and those that lie behind it as one are not named: a tensor belongs to
    the launch that names the nearest address at or before its own.
    """
    starts = [
        (word, -i)
        for i, launch in enumerate(launches)
        for word in launch.params
        if any(region.address <= word < region.address + region.nbytes for region in tensors.values())
    ]
    found: list[set[str]] = [set() for _ in launches]
    for name, region in tensors.items():
        before = [start for start in starts if start[0] <= region.address]
        if before:
            found[-max(before)[1]].add(name)
    return found


def _which(plan: Plan, span: tuple[Op, ...], launch: StepLaunch, names: set[str], regions: Mapping[str, Region],
           rows: _Rows) -> _Which:  # fmt: skip
    """The kind of a launch for the ops `span` that reads the tensors `names`."""
    converts = launch.kernel.startswith("convert_")
    mine = [op for op in span if (set(read) & names if (read := _weights(plan, op)) else not converts)]
    n_bytes = sum(_share(plan, op, name, rows.n) * regions[name].nbytes
                  for op in mine for name in _weights(plan, op) if name in names)  # fmt: skip
    multiplied = [op for op in mine if isinstance(op, MatMul | ExpertMatMul) and op.weight in names and not converts]
    shapes = [plan.weights[op.weight].shape for op in multiplied if isinstance(op, MatMul)]
    # of a prompt the last row alone has logits
    n = 1 if rows.n_prompt and any(plan.buffers[op.out.buf].rows == "outputs" for op in multiplied) else rows.n
    operations = sum(2 * n * math.prod(plan.weights[op.weight].shape[:2]) * getattr(op, "n_used", 1)
                     for op in multiplied)  # fmt: skip
    if launch.kernel.startswith(("attention_prefill", "attention_warpgroup")):
        operations = sum(_attention_operations(op, rows.n) for op in span if isinstance(op, Attention))
    reads_kv = launch.kernel.startswith("attention_decode")
    return _Which(
        launch.kernel,
        tuple(_short(op.name) for op in mine or span) or ("sample",),
        launch.grid,
        int(n_bytes),
        operations,
        (n, sum(shape[1] for shape in shapes), shapes[0][0]) if shapes else None,
        next((op.window for op in span if isinstance(op, Attention)), 0) if reads_kv else None,
    )


def _weights(plan: Plan, op: Op) -> list[str]:
    """Names of the tensors that an op of the plan reads."""
    return [value for value in vars(op).values() if isinstance(value, str) and value in plan.weights]


def _share(plan: Plan, op: Op, name: str, batch: int) -> float:
    """The part of a tensor that a step of `batch` rows reads for `op`: rows looked up, experts that are chosen."""
    if isinstance(op, Embed):
        return min(1.0, batch / plan.weights[name].shape[1])
    if isinstance(op, ExpertMatMul):
        return 1 - (1 - op.n_used / op.n_expert) ** batch
    return 1.0


def _kv_bytes(plan: Plan, window: int | None, batch: int, position: int) -> int:
    """Bytes of the KV cache that attention of `batch` rows at `position` reads in one layer; `window` 0: all of it."""
    if window is None:
        return 0
    return batch * kv_blocks.position_bytes(plan) * (min(position + 1, window) if window else position + 1)


def _attention_operations(op: Attention, n: int) -> int:
    """Of causal attention of a prompt of `n` tokens: two products of each query with each key that it sees."""
    seen = sum(min(i + 1, op.window or n) for i in range(n))
    return 4 * op.n_head * op.head_dim * seen


def _short(name: str) -> str:
    """An op's name without its layer."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[2] if first == "blk" else name


# -- as text


def as_text(report: KernelReport) -> str:
    """The table for people."""
    out = [
        f"kernels of {report.gpu}, {report.lowering} lowering; copy {report.copy_gb_per_s:.0f} GB/s; "
        + (f"cuBLAS {report.cublas}" if report.cublas else "no cuBLAS")
        + (f" ({report.cublas_absent})" if report.cublas_absent else "")
    ]
    for step in report.steps:
        head = ["launches", "grid", "MB each", "us each", "GB/s", "of copy", "TFLOP/s", "us a step"]
        rows = [_cells(kind) for kind in step.kinds]
        if report.cublas:
            head.append("cuBLAS us")
            rows = [[*row, _number(kind.cublas_us)] for row, kind in zip(rows, step.kinds, strict=True)]
        labels = [(kind.kernel, " ".join(kind.ops)) for kind in step.kinds]
        for name, us in (("all kinds", step.kinds_us), ("between them", step.between_us), ("the step", step.us)):
            labels.append((name, ""))
            n = str(step.launches) if name == "the step" else ""
            rows.append([n, *[""] * 6, f"{us:.1f}", *[""] * (len(head) - 8)])
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        first, second = (max(len(label[i]) for label in labels) for i in (0, 1))
        what = f"prompt of {step.n_prompt}" if step.n_prompt else f"decode of {step.batch} at position {step.position}"
        out += ["", what]
        for label, row in zip([("kernel", "ops"), *labels], [head, *rows], strict=True):
            cells = "  ".join(f"{cell:>{width}s}" for cell, width in zip(row, widths, strict=True))
            out.append(f"{label[0]:{first}s}  {label[1]:{second}s}  {cells}".rstrip())
    return "\n".join(out)


def _cells(kind: Kind) -> list[str]:
    percent = "" if kind.percent_of_copy is None else f"{kind.percent_of_copy:.0f} %"
    return [
        str(kind.launches),
        "x".join(map(str, kind.grid)),
        f"{1e-6 * (kind.weight_bytes + kind.kv_bytes):.2f}",
        f"{kind.us:.2f}",
        _number(kind.gb_per_s, 0),
        percent,
        _number(kind.tflops, 0),
        f"{kind.us * kind.launches:.1f}",
    ]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
