"""Speed of a model on a device: prefill and decode through the engine protocol, beside the memory bandwidth.

No tokenizer and no scheduler are involved: random token ids, blocks handed out once, one step after the other. What a
decode step must read from memory (`bytes_per_step`), divided by its time, is compared with the bandwidth measured in
the same run, which is the bound of a small batch.

Every sequence of a batch begins with an id of its own and goes on with what it draws itself, so that the rows of a step
differ as those of real requests do: a mixture of experts reads other experts for each. Ids are of the whole vocabulary.
Control tokens are among them, a fraction of a percent that costs what any token costs; telling them apart would take a
tokenizer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from worker_orcd._ring import Control, TokenRing
from worker_orcd.config import GPU_MEMORY_UTILIZATION
from worker_orcd.cuda.vram import Allowance, VramPlan
from worker_orcd.diagnose import bench_kernels
from worker_orcd.diagnose.bandwidth import bytes_per_step, measure_bandwidth
from worker_orcd.engine import kv_blocks
from worker_orcd.engine.protocol import BLOCK_SIZE, Batch, Engine, EngineConfig
from worker_orcd.engine.sampling import SamplingParams
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.gguf.trusted_models import TrustedModels, verify
from worker_orcd.machine import usable_cores
from worker_orcd.models import plan
from worker_orcd.runtime import devices, sizing

if TYPE_CHECKING:
    from worker_orcd.diagnose.crowd import Crowd
    from worker_orcd.diagnose.mix import Mix
    from worker_orcd.diagnose.overhead import Overhead

#: tokens of one call of the decode loop; the ring is emptied between calls
DECODE_CHUNK = 64
_GREEDY = SamplingParams(temperature=0.0, seed=0)


@dataclass(frozen=True)
class Measured:
    """One line of the result.

    Attributes:
        test: "prefill" (one prompt of `n_tokens`) or "decode" (`n_tokens` for each of `batch` sequences).
        tokens_per_s: median over the repeats, of all sequences together.
        slowest, fastest: the extremes of the repeats.
        ms: median time of one repeat.
        gb_per_s: bytes read per step over the time of a step, decode only.
        percent_of_bandwidth: of the bandwidth measured in the same run, decode only.
        distinct: how many different tokens the sequences feed to a step, of as many as they are: 1.0 is all of them;
            mean over the steps of the last repeat, decode only.
    """

    test: str
    n_tokens: int
    batch: int
    tokens_per_s: float
    slowest: float
    fastest: float
    ms: float
    gb_per_s: float | None = None
    percent_of_bandwidth: float | None = None
    distinct: float | None = None


@dataclass(frozen=True)
class Report:
    """All of a run. Rates in GB/s (10^9). `load_s` is everything up to a ready engine, `load_gb_per_s` the rate of the
    copies to the GPU alone; None on the CPU. `rows` says how the sequences of a batch relate: "distinct", each has its
    own tokens. Reports of versions before that lack the field: there all sequences had the same. `http` is what HTTP
    costs, `kernels` what the launches of a decode step take, `crowd` what many requests at once get and `mix` what
    prompts do to running streams, where that was asked for."""

    model: str
    arch: str
    quant_kind: str
    device: str
    n_threads: int | None
    load_s: float
    weight_bytes: int
    vram_bytes: int
    bandwidth_gb_per_s: float | None
    load_gb_per_s: float | None = None
    rows: str = "distinct"
    results: list[Measured] = field(default_factory=list)
    http: Overhead | None = None
    kernels: bench_kernels.KernelReport | None = None
    crowd: Crowd | None = None
    mix: Mix | None = None

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


class Bench:
    """A loaded engine to be measured. Use as a context manager.

    Args:
        model: the GGUF file.
        device: "auto", "cpu" or "cuda:N".
        n_positions: positions a sequence must be able to reach.
        max_batch: sequences that decode together.
        n_threads: threads of the CPU engine, 0: one for each core that the process may use.
        on_plan, trusted_models, vram_limit_bytes, gpu_memory_utilization: as of `LLM`.

    Raises:
        WorkerError: whatever loading raises; `InvalidRequest` where the model has fewer positions.
    """

    def __init__(
        self,
        model: str,
        device: str,
        n_positions: int,
        max_batch: int = 1,
        n_threads: int = 0,
        on_plan: Callable[[VramPlan, int], object] | None = None,
        trusted_models: str | None = None,
        vram_limit_bytes: int | None = None,
        gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    ) -> None:
        self.device = devices.resolve(device)
        self.n_threads = n_threads or usable_cores()
        trusted = None if trusted_models is None else TrustedModels(trusted_models)
        self.model_file = ModelFile(model)
        try:
            verify(self.model_file, trusted, None)
            began = time.perf_counter()
            self.plan = plan.build(self.model_file, n_positions)
            limit = min(self.plan.context_length, self.plan.max_positions or self.plan.context_length)
            if n_positions > limit:
                raise InvalidRequest(f"{n_positions} positions are past the {limit} of the model", field="n_prompt")
            per_sequence = -(-n_positions // BLOCK_SIZE)
            n_blocks = tuple(per_sequence * max_batch for _ in self.plan.kv_groups)
            max_batch_tokens = devices.default_batch_tokens(self.device, max_batch)
            if self.device != "cpu":
                allowance = Allowance(*devices.device_memory(self.device), gpu_memory_utilization, vram_limit_bytes)
                max_batch_tokens = self._batch_tokens_within(allowance, n_positions, n_blocks, max_batch)
            elif vram_limit_bytes is not None:
                raise sizing.limit_on_cpu()
            self.config = EngineConfig(max_batch, max_batch_tokens, n_positions, n_blocks)
            self.engine: Engine = devices.open_engine(
                self.device,
                self.model_file,
                self.plan,
                self.config,
                n_threads=n_threads,
                chunk_bytes=1 << 20,
                progress=lambda done: None,
                on_plan=on_plan,
            )
        except BaseException:
            self.model_file.close()
            raise
        self.load_s = time.perf_counter() - began
        for slot in range(max_batch):
            blocks = np.arange(slot * per_sequence, (slot + 1) * per_sequence, dtype=np.int32)
            self.engine.block_tables[:, slot, :per_sequence] = blocks
        rng = np.random.default_rng(1)
        self._ids = rng.integers(0, self.plan.n_vocab, n_positions, dtype=np.int32)
        others = rng.permutation(self.plan.n_vocab).astype(np.int32)
        # a single sequence begins as the first of many does
        self._first_ids = np.resize(np.concatenate([self._ids[:1], others[others != self._ids[0]]]), max_batch)
        self._ring = TokenRing()
        self._control = Control()

    def _batch_tokens_within(
        self, allowance: Allowance, n_positions: int, n_blocks: tuple[int, ...], max_batch: int
    ) -> int:
        """Tokens of a step that leave room for the KV cache in what may be taken; refused where nothing fits."""
        kv_bytes = sum(n * b for n, b in zip(n_blocks, kv_blocks.block_bytes(self.plan), strict=True))
        path = self.model_file.path
        room = sizing.gpu_room(
            self.device, self.plan, path, n_positions, lambda seqs, rows: kv_bytes, max_batch, None, allowance
        )
        config = EngineConfig(max_batch, room.max_batch_tokens, n_positions, n_blocks)
        devices.vram_plan(self.plan, config).check(allowance, self.device, path)
        return room.max_batch_tokens

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free engine and file."""
        self.engine.close()
        self.model_file.close()

    def prefill(self, n_tokens: int) -> float:
        """Seconds for one prompt of `n_tokens` random ids."""
        self.engine.set_slot(0, _GREEDY)
        began = time.perf_counter()
        for start in range(0, n_tokens, self.config.max_batch_tokens):
            end = min(start + self.config.max_batch_tokens, n_tokens)
            last = np.array([end - start - 1] if end == n_tokens else [], np.int32)
            self.engine.step(
                Batch(
                    self._ids[start:end],
                    np.arange(start, end, dtype=np.int32),
                    np.zeros(end - start, np.int32),
                    0,
                    last,
                )
            )
        return time.perf_counter() - began

    def decode(self, n_tokens: int, batch: int = 1) -> tuple[float, np.ndarray]:
        """Time `n_tokens` decode steps of `batch` sequences, each of which begins with a random id of its own.

        Returns:
            (seconds, int32 [n_tokens, batch]: what each sequence fed to each step).
        """
        slots = np.arange(batch, dtype=np.int32)
        for slot in slots:
            self.engine.set_slot(int(slot), _GREEDY)
        tokens = self._first_ids[:batch].copy()
        fed = [tokens[np.newaxis]]
        positions = np.zeros(batch, np.int32)
        no_stops, stop_offsets = np.empty(0, np.int32), np.zeros(batch + 1, np.int32)
        seconds = 0.0
        for start in range(0, n_tokens, DECODE_CHUNK):
            n_steps = min(DECODE_CHUNK, n_tokens - start)
            began = time.perf_counter()
            out = self.engine.decode(
                slots,
                slots.astype(np.int64),
                tokens,
                positions,
                n_steps,
                no_stops,
                stop_offsets,
                self._ring,
                self._control,
            )
            seconds += time.perf_counter() - began
            fed.append(out)
            tokens, positions = np.ascontiguousarray(out[-1]), positions + np.int32(n_steps)
            for _ in range(batch * n_steps):  # a pop takes all there is; none waits
                if not self._ring.pop(0.0):
                    break
        return seconds, np.concatenate(fed)[:n_tokens]

    def decode_parts(self, batch: int, position: int, n_steps: int) -> Any:
        """The decode step of `batch` sequences at `position`, which goes on for `n_steps`, as the `DecodeParts` of a
        GPU's engine."""
        slots = np.arange(batch, dtype=np.int32)
        for slot in slots:
            self.engine.set_slot(int(slot), _GREEDY)
        engine: Any = self.engine
        return engine.decode_parts(slots, self._first_ids[:batch], np.full(batch, position, np.int32), n_steps)

    def prompt_parts(self, n_tokens: int) -> Any:
        """The step of the first `n_tokens` of a prompt as the `PromptParts` of a GPU's engine."""
        self.engine.set_slot(0, _GREEDY)
        engine: Any = self.engine
        return engine.prompt_parts(self._ids[:n_tokens])


def distinct_share(fed: np.ndarray) -> float:
    """Different tokens of a step over the sequences in it, mean over the steps of `fed`, int32 [n_steps, batch]."""
    return statistics.fmean(len(set(step.tolist())) / len(step) for step in fed)


@dataclass(frozen=True)
class Measurements:
    """What to measure.

    Attributes:
        prompts: lengths of the prompts to prefill.
        n_decode: tokens to decode; 0 for none.
        batches: numbers of sequences to decode together.
        repeat: how often each test is timed, after one untimed run.
        kernels: measure the launches of steps too, on a GPU.
    """

    prompts: Sequence[int]
    n_decode: int
    batches: Sequence[int]
    repeat: int
    kernels: bool = False


def run(
    model: str,
    device: str,
    asked: Measurements,
    *,
    n_threads: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    on_plan: Callable[[VramPlan, int], object] | None = None,
    trusted_models: str | None = None,
    vram_limit_bytes: int | None = None,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
) -> Report:
    """Measure everything once asked for.

    Args:
        progress: called with the name of each test before it runs.
        n_threads, on_plan, trusted_models, vram_limit_bytes, gpu_memory_utilization: as of `LLM`.

    Raises:
        WorkerError: the model or the device cannot do it.
    """
    runs = [("prefill", n, 1) for n in asked.prompts]
    runs += [("decode", asked.n_decode, b) for b in asked.batches if asked.n_decode]
    for name, n, batch in runs:
        if n < 1 or batch < 1:
            raise InvalidRequest(f"{name} of {n} tokens in {batch} sequences measures nothing", field="n_prompt")
    if not runs:
        raise InvalidRequest("there is nothing to measure", field="n_gen")
    if asked.kernels:
        bench_kernels.check_device(devices.resolve(device))
    progress("load")
    with Bench(
        model,
        device,
        max(n for _, n, _ in runs),
        max(b for _, _, b in runs),
        n_threads,
        on_plan,
        trusted_models,
        vram_limit_bytes,
        gpu_memory_utilization,
    ) as bench:
        progress("bandwidth")
        bandwidth = measure_bandwidth(bench.engine, bench.device, bench.n_threads)
        vram_bytes = devices.engine_facts(bench.engine).get("vram_bytes")
        stats = getattr(bench.engine, "load_stats", None)
        report = Report(
            model=bench.model_file.name,
            arch=bench.plan.arch,
            quant_kind=bench.model_file.quant_kind,
            device=bench.device,
            n_threads=bench.n_threads if bench.device == "cpu" else None,
            load_s=bench.load_s,
            weight_bytes=sum(bench.model_file.tensors[name].nbytes for name in bench.plan.weights),
            vram_bytes=vram_bytes if isinstance(vram_bytes, int) else 0,
            bandwidth_gb_per_s=bandwidth,
            load_gb_per_s=None if stats is None else stats.gb_per_s,
        )
        for name, n, batch in runs:
            progress(f"{name} {n} x {batch}" if name == "decode" else f"{name} {n}")
            if name == "prefill":
                report.results.append(_prefill(bench, n, asked.repeat))
            else:
                report.results.append(_decode(bench, n, batch, asked.repeat, bandwidth))
        if asked.kernels:
            assert bandwidth is not None, "a GPU's engine measures it"
            kernels = bench_kernels.measure(bench, asked.batches, asked.n_decode, bandwidth, progress, asked.prompts)
            report = replace(report, kernels=kernels)
    return report


def _prefill(bench: Bench, n: int, repeat: int) -> Measured:
    bench.prefill(n)
    return Measured("prefill", n, 1, *_rates(n, [bench.prefill(n) for _ in range(repeat)]))


def _decode(bench: Bench, n: int, batch: int, repeat: int, bandwidth: float | None) -> Measured:
    bench.decode(n, batch)
    runs = [bench.decode(n, batch) for _ in range(repeat)]
    rates = _rates(n * batch, [seconds for seconds, _ in runs])
    rate = 1e-9 * bytes_per_step(bench.plan, bench.model_file, batch, n // 2) * rates[0] / batch
    percent = 100 * rate / bandwidth if bandwidth else None
    return Measured("decode", n, batch, *rates, rate, percent, distinct_share(runs[-1][1]))


def _rates(n: int, seconds: list[float]) -> tuple[float, float, float, float]:
    """Of runs of `n` tokens: tokens a second by their median, of the slowest, of the fastest; the median in ms."""
    rates, median = [n / s for s in seconds], statistics.median(seconds)
    return n / median, min(rates), max(rates), 1e3 * median
