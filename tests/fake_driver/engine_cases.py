"""The CUDA engine's start and end on the stand-in driver: memory as planned, and nothing left at any failing call.

Kernels do nothing here: of a step only its launches are looked at, results are the business of tests/gpu.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path

import gen_params
import numpy as np
import pytest
from fake_driver.cases import FAKE, NOTHING, leftovers
from fake_driver.launch_record import recorded
from helpers.gguf_patch import with_uint32
from helpers.golden_forge import fused_gate_up, fused_qkv, split_gate_up, split_qkv, take_apart

import worker_orcd
from worker_orcd import LLM, SamplingParams, _driver, _engine
from worker_orcd._ring import Control, TokenRing
from worker_orcd.cuda import memory, vram
from worker_orcd.cuda.lowering import lower
from worker_orcd.cuda.vram import VramPlan
from worker_orcd.engine.protocol import Batch, EngineConfig
from worker_orcd.engine.token_edits import MAX_WORDS, token_edits
from worker_orcd.errors import (
    CudaError,
    InsufficientMemory,
    InsufficientVram,
    InternalError,
    InvalidRequest,
    ModelLoadError,
)
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import ops, plan

pytestmark = pytest.mark.skipif(
    not (Path(worker_orcd.__file__).parent / "fatbins" / "manifest.json").exists(),
    reason="no kernel images are installed",
)


HEADERS = gen_params.read()
STRUCTS = gen_params.mirror(HEADERS)
#: of `ConvertParams.kind`
LAYER_NORM = next(header.constants["CONVERT_LAYER"] for header in HEADERS if "CONVERT_LAYER" in header.constants)


@pytest.fixture
def tiny(goldens_dir):
    """(open file, plan, config) of a tiny model."""
    with ModelFile(goldens_dir / "llama-Q4_K_M.gguf") as file:
        built = plan.build(file)
        yield file, built, EngineConfig(4, 64, 256, tuple(16 for _ in built.kv_groups))


@pytest.fixture(autouse=True)
def faults_off():
    yield
    _driver._fail_nth(0)


def test_memory_is_what_was_planned_and_comes_back(tiny):
    engine = _engine.CudaEngine(*tiny, chunk_bytes=65_536)
    assert FAKE.fake_device_bytes() == sum(arena.nbytes for arena in _engine.plan_memory(tiny[1], tiny[2]))
    assert all(m.residency()["memory_type"] == "device" for m in engine.context.allocations())
    engine.close()
    engine.close()
    del engine
    assert leftovers() == NOTHING


def test_a_model_that_does_not_fit_takes_nothing(tiny, monkeypatch):
    needed = VramPlan.of(_engine.plan_memory(tiny[1], tiny[2])).required
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(needed - 1))
    with pytest.raises(InsufficientVram) as e:
        _engine.CudaEngine(*tiny)
    assert (e.value.fields["bytes_required"], e.value.fields["bytes_available"]) == (needed, needed - 1)
    assert leftovers() == NOTHING


def test_a_file_cut_while_it_is_loaded(tiny, goldens_dir, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes((goldens_dir / "llama-Q4_K_M.gguf").read_bytes())
    with ModelFile(path) as file:
        os.truncate(path, file.size // 2)
        with pytest.raises(ModelLoadError):
            _engine.CudaEngine(file, tiny[1], tiny[2])
    assert leftovers() == NOTHING


def test_a_block_is_copied_in_all_layers_of_its_group(goldens_dir):
    """And nothing beside it; what is not there is refused."""
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as file:
        built = plan.build(file)
        n_blocks = (5, 3)
        engine = _engine.CudaEngine(file, built, EngineConfig(4, 64, 256, n_blocks))
        size = memory.kv_block_bytes(built)
        layers = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (n_blocks[g] * size)).from_address(region.address))
            for region, g in zip(engine.memory.kv.layers, built.kv_group_of, strict=True)
        ]
        for i, layer in enumerate(layers):
            layer[:] = np.random.default_rng(i).integers(0, 256, len(layer))
        before = [layer.copy() for layer in layers]
        engine.copy_block(1, 2, 0)
        engine.copy_block(0, 1, 1)
        for refused in ((2, 0, 0), (-1, 0, 0), (0, 5, 0), (1, 0, 3), (1, -1, 0), (1, 0, 1 << 40)):
            with pytest.raises(InternalError, match="has no block"):
                engine.copy_block(*refused)
        engine.block_tables[:, 0, 0] = 0
        one = np.zeros(1, np.int32)
        engine.forward(Batch(one, one, one, 0, one[:0]))  # waits for what is queued
        for layer, old, group in zip(layers, before, built.kv_group_of, strict=True):
            blocks, wanted = layer.reshape(-1, size), old.reshape(-1, size).copy()
            if group == 1:
                wanted[0] = wanted[2]
            assert (blocks == wanted).all()
        engine.close()
    assert leftovers() == NOTHING


@pytest.mark.parametrize("tensor", ["blk.1.attn_q.weight", "blk.0.ffn_norm.weight", "token_embd.weight"])
def test_infinity_is_refused_while_it_is_loaded(tensor, goldens_dir, tmp_path):
    """In a vector, in a product's matrix and in the embedding; where nobody asks, it loads."""
    path = tmp_path / "m.gguf"
    path.write_bytes((goldens_dir / "llama-F16.gguf").read_bytes())
    with ModelFile(path) as file:
        offset, step = file.tensors[tensor].offset, 4 if file.tensors[tensor].type_id == 0 else 2
    with open(path, "r+b") as raw:
        raw.seek(offset + 7 * step)
        raw.write(b"\0\0\x80\x7f" if step == 4 else b"\0\x7c")
    with pytest.raises(ModelLoadError, match=tensor) as e:
        LLM(path, device="cuda:0", progress=False, context_length=64, max_seqs=1)
    assert e.value.fields["offset"] == offset + 7 * step and e.value.fields["path"] == str(path)
    assert leftovers() == NOTHING
    LLM(path, device="cuda:0", progress=False, context_length=64, max_seqs=1, check_tensors=False).close()
    assert leftovers() == NOTHING


@pytest.mark.parametrize("tensor", ["blk.1.attn_q.weight", "blk.1.ffn_down.weight"])
def test_weights_that_a_gpu_cannot_multiply_are_refused(tensor, goldens_dir, tmp_path):
    """Where tensors are checked; and where they are only looked up, or the CPU multiplies them, nothing is refused."""
    path = tmp_path / "m.gguf"
    path.write_bytes((goldens_dir / "llama-Q4_K_M.gguf").read_bytes())
    with ModelFile(path) as file:
        info = file.tensors[tensor]
        kind = quants.TYPES[info.type_id]
    assert kind.block_size == 256
    place = info.offset + 3 * kind.type_size
    with open(path, "r+b") as raw:
        raw.seek(place + kind.number_at[0])
        raw.write(np.float16(5000).tobytes())
    options = {"progress": False, "context_length": 64, "max_seqs": 1}
    with pytest.raises(ModelLoadError, match=f"tensor '{tensor}' has a block of weights above 4,094") as e:
        LLM(path, device="cuda:0", **options)
    assert (e.value.fields["offset"], e.value.fields["tensor"]) == (place, tensor) and "--device cpu" in e.value.message
    assert leftovers() == NOTHING
    LLM(path, device="cuda:0", check_tensors=False, **options).close()
    LLM(path, device="cpu", **options).close()


def test_an_embedding_that_is_only_looked_up_may_be_large(goldens_dir, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes((goldens_dir / "phi3-Q4_K_M.gguf").read_bytes())
    with ModelFile(path) as file:
        built = plan.build(file)
        info = file.tensors["token_embd.weight"]
    kind = quants.TYPES[info.type_id]
    assert kind.block_size == 256 and not any(getattr(op, "weight", "") == info.name for op in built.ops
                                              if isinstance(op, ops.MatMul))  # fmt: skip
    with open(path, "r+b") as raw:
        raw.seek(info.offset + kind.number_at[0])
        raw.write(np.float16(5000).tobytes())
    LLM(path, device="cuda:0", progress=False, context_length=64, max_seqs=1).close()


def test_an_engine_tells_what_is_slow_on_its_gpu(goldens_dir):
    with LLM(goldens_dir / "llama-F16.gguf", device="cuda:0", progress=False, max_seqs=1) as llm:
        assert len(llm.info.slow_paths) == 1 and llm.info.slow_paths[0].startswith("F16 blk.*.attn_q.weight (2), ")
    with LLM(goldens_dir / "llama-Q4_0.gguf", device="cuda:0", progress=False, max_seqs=1) as llm:
        assert llm.info.slow_paths == ()


def test_a_slot_that_is_set_begins_anew_and_alone(tiny):
    """What is sent and cleared of one slot, and nothing of its neighbours; who asks for little sends little."""
    engine = _engine.CudaEngine(*tiny)
    n_vocab, regions = engine.n_vocab, engine.memory.workspace.sampling
    strides = {"samples": memory.SLOT_SAMPLING_BYTES, "edits": 4 * MAX_WORDS, "history": 4 * memory.HISTORY_WORDS,
               "seen": 4 * -(-n_vocab // 32), "counts": 4 * n_vocab}  # fmt: skip

    def slot(name, index):
        return ctypes.string_at(getattr(regions, name).address + index * strides[name], strides[name])

    def set_slot(*args):
        for name in strides:
            region = getattr(regions, name)
            assert region.nbytes == 4 * strides[name]
            ctypes.memset(region.address, 0x5A, region.nbytes)
        engine.set_slot(1, *args)
        for name, stride in strides.items():
            assert slot(name, 0) == slot(name, 2) == slot(name, 3) == b"\x5a" * stride

    params = SamplingParams(seed=7, logit_bias={3: 1.5}, frequency_penalty=0.5, min_tokens=9)
    edits = token_edits(params, [(1, 2)], (4,))
    set_slot(params, edits)
    sent = STRUCTS["SlotSampling"].from_buffer_copy(slot("samples", 1))
    assert (sent.seed, sent.frequency_penalty, sent.n_bias, sent.n_edits) == (7, 0.5, 1, 3)
    assert slot("edits", 1).startswith(edits.words.tobytes() + b"\x5a")
    assert not any(slot("history", 1) + slot("seen", 1) + slot("counts", 1))
    set_slot(SamplingParams(seed=8))
    sent = STRUCTS["SlotSampling"].from_buffer_copy(slot("samples", 1))
    assert (sent.seed, sent.n_edits) == (8, 0) and not any(slot("seen", 1))
    for name in ("edits", "history", "counts"):
        assert slot(name, 1) == b"\x5a" * strides[name]
    bias = SamplingParams(seed=1, logit_bias=dict.fromkeys(range(n_vocab), 1.0))
    words = [tuple(range(32))] * 32
    most = token_edits(dataclasses.replace(bias, min_tokens=1), [*words], range(256))
    set_slot(bias, most)
    assert slot("edits", 1)[: 4 * len(most.words)] == most.words.tobytes()
    with pytest.raises(InvalidRequest, match="edits"):
        engine.set_slot(1, params, token_edits(SamplingParams(logit_bias={n_vocab: 1.0})))
    engine.close()


def test_rows_with_a_small_top_k_decode_as_greedy_ones_do(tiny):
    """Both have their graph of one launch of sampling; one row that needs two takes all of its step to the other."""
    with recorded() as start:
        engine = _engine.CudaEngine(*tiny)
    captured = [launch.kernel for launch in start if launch.captured]
    assert captured.count("sample_max") == 2 * captured.count("sample_draw") == 2 * len(engine.warm_seqs)
    engine.block_tables[:] = 0

    def new_graphs(n_rows, **sampling):
        """Graphs that a step of `n_rows`, of which one samples so, is the first to take."""
        before = FAKE.fake_new_graphs()
        engine.set_slot(1, SamplingParams(seed=1, **sampling))
        slots = np.arange(n_rows, dtype=np.int32)
        engine.decode(slots, slots.astype(np.int64), slots, 0 * slots, 1, np.empty(0, np.int32),
                      np.zeros(n_rows + 1, np.int32), TokenRing(), Control())  # fmt: skip
        return before - FAKE.fake_new_graphs()

    assert engine.n_vocab > 129
    assert new_graphs(2, temperature=0.0) == 1
    assert new_graphs(2, temperature=0.7, top_k=40, top_p=0.95, min_p=0.1) == new_graphs(2, top_k=128) == 0
    assert new_graphs(2, top_k=129) == 1
    assert new_graphs(2) == new_graphs(2, top_p=0.9) == 0
    assert new_graphs(3, top_k=1) == 1
    assert new_graphs(3, min_p=0.1) == 1
    assert new_graphs(4, top_k=engine.n_vocab) == 1
    assert new_graphs(4, temperature=0.0) == 1
    engine.close()


def test_progress_may_end_the_load(tiny):
    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        _engine.CudaEngine(*tiny, progress=stop)
    assert leftovers() == NOTHING


def test_any_call_may_fail_and_nothing_is_left(tiny, monkeypatch):
    """The n-th driver call of a start fails, for a spread of n over all of them."""
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "0")
    n, refused = 1, 0
    while True:
        _driver._fail_nth(n)
        try:
            engine = _engine.CudaEngine(*tiny, chunk_bytes=1 << 20)
        except CudaError as e:
            refused += 1
            assert e.fields["call"].startswith("cu")
        else:
            engine.close()
            del engine
            if _driver._fail_nth(0) != 0:
                break
        assert leftovers() == NOTHING, f"call {n}"
        n += 1 if n < 60 else n // 8
    print(f"{refused} faults spread over fewer than {n} driver calls")
    assert refused > 60


#: the driver's status for memory that is not there, and bytes of a GPU that a cache of `large` fills
OOM, GPU_BYTES = 2, 160 << 20


def test_any_call_may_find_no_memory(tiny, monkeypatch):
    """The n-th driver call of a start finds no memory, for a spread of n: both numbers, never a bare CUDA_ERROR."""
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "0")
    n, refused = 1, set()
    with _driver.Context(0) as context:
        while True:
            _driver._fail_nth(n, "", OOM)
            try:
                engine = _engine.CudaEngine(*tiny, chunk_bytes=1 << 20, context=context)
            except (InsufficientVram, InsufficientMemory) as e:
                refused.add(e.code)
                assert e.fields["bytes_required"] > 0 and e.fields["bytes_available"] > 0
            else:
                engine.close()
                del engine
                if _driver._fail_nth(0) != 0:
                    break
            assert leftovers() == {**NOTHING, "contexts": 1}, f"call {n}"
            n += 1 + n // 4
    assert "INSUFFICIENT_VRAM" in refused and n > 60


@pytest.fixture
def large(goldens_dir, tmp_path, monkeypatch):
    """A tiny model whose cache takes whatever there is, and a small GPU."""
    monkeypatch.setattr(vram, "MARGIN_BYTES", 4 << 20)
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(GPU_BYTES))
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "0")
    return with_uint32(goldens_dir / "llama-Q4_0.gguf", tmp_path / "m.gguf", "llama.context_length", 16384)


NAMED = {"kv_cache_bytes": 64 << 20, "max_seqs": 4, "max_batch_tokens": 128}


@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemHostAlloc", "cuLibraryLoadData", "cuGraphInstantiate"])
def test_sizes_of_ours_get_smaller_where_an_allocation_fails(call, large):
    """The n-th call of that name finds no memory: with sizes of ours a good model, with named ones an error; at any n
    nothing is left afterwards."""

    def load(**named):
        return LLM(large, device="cuda:0", progress=False, **named)

    with load() as llm:
        whole = llm.info
    outcomes = set()
    for named, numbers in (({}, (1, 2, 4)), (NAMED, (1, 3))):
        for n in numbers:
            _driver._fail_nth(n, call, OOM)
            try:
                with load(**named) as llm:
                    unused = _driver._fail_nth(0)
                    smaller = llm.info.kv_bytes < whole.kv_bytes
                    assert unused or named or smaller or call == "cuMemHostAlloc"
                    outcomes.add(("good", bool(named), bool(unused)))
            except (InsufficientVram, InsufficientMemory) as error:
                assert named, error
                assert error.fields["bytes_required"] > 0
                outcomes.add(("refused", True, False))
            assert leftovers() == NOTHING, (n, named)
    assert outcomes >= {("good", False, False), ("refused", True, False)}


@pytest.mark.parametrize("left", [110 << 20, 90 << 20])
def test_others_take_memory_between_plan_and_allocation(large, left):
    """The first plan is void when it is told; the model gets what is left then, and no more is asked for."""
    shown, hogs = [], []
    with _driver.Context(0) as other:

        def take(plan, free):
            shown.append(plan.required)
            if len(shown) == 1:
                hogs.append(other.allocate(free - left, "another process"))

        with LLM(large, device="cuda:0", progress=False, on_plan=take) as llm:
            assert shown[0] > left >= shown[-1] and shown == sorted(shown, reverse=True) and len(shown) <= 12
            assert llm.info.kv_bytes > 0 and llm.info.context_length > 64
            assert FAKE.fake_device_bytes() <= hogs[0].nbytes + left
        hogs.pop().close()
        shown.clear()
        with pytest.raises(InsufficientVram) as e:
            LLM(large, device="cuda:0", progress=False, on_plan=take, **NAMED)
        assert len(shown) == 1 and e.value.fields["bytes_required"] > e.value.fields["bytes_available"] > 0
        hogs.pop().close()
    assert leftovers() == NOTHING


def test_others_take_memory_again_and_again(large):
    """Tries are bounded, and the last error is the one that is told."""
    shown, hogs = [], []
    with _driver.Context(0) as other:

        def take(plan, free):
            shown.append(plan.required)
            hogs.append(other.allocate(free - plan.required + (1 << 20)))

        with pytest.raises(InsufficientVram, match="gives no"):
            LLM(large, device="cuda:0", progress=False, on_plan=take)
        assert 1 < len(shown) <= 12 and shown == sorted(shown, reverse=True)
        for hog in hogs:
            hog.close()
    assert leftovers() == NOTHING


@pytest.mark.parametrize("utilization", [0.92, 0.75])
def test_a_share_of_the_gpu_is_not_passed(large, utilization):
    with LLM(large, device="cuda:0", progress=False, gpu_memory_utilization=utilization) as llm:
        allowed = int(utilization * GPU_BYTES)
        taken = FAKE.fake_device_bytes() + vram.VramPlan(0, 0, 0).required
        assert allowed - (1 << 20) < taken <= allowed and llm.info.kv_bytes > 0
    with pytest.raises(InsufficientVram, match=r"may be taken \(gpu_memory_utilization is 0\.1\)"):
        LLM(large, device="cuda:0", progress=False, gpu_memory_utilization=0.1)


def test_an_llm_stays_inside_its_budget(goldens_dir, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(8 << 30))
    path, shown = goldens_dir / "llama-Q4_0.gguf", []

    def load(limit_mib):
        shown.clear()
        return LLM(
            path,
            device="cuda:0",
            progress=False,
            vram_limit_bytes=limit_mib << 20,
            on_plan=lambda vram, free: shown.append(vram),
        )

    sizes = []
    floor = max(memory.RESERVE_BYTES, memory.STAGING_BYTES) >> 20  # what every model needs beside itself
    for limit in (1000, floor + 24, floor + 14):
        with load(limit) as llm:
            assert shown[0].required <= limit << 20 and FAKE.fake_device_bytes() == shown[0].resident
            sizes.append((llm.info.kv_bytes, llm.info.max_batch_tokens))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    with pytest.raises(InsufficientVram) as e:
        load(floor)
    assert e.value.fields["bytes_required"] > e.value.fields["bytes_available"] == floor << 20
    assert e.value.fields["path"] == str(path) and shown == []
    assert leftovers() == NOTHING


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, None) for name in ("llama-Q4_K_M", "gpt-oss-MXFP4", "phi3-Q4_K_M")]
    + [("llama-Q4_0", fused_qkv), ("llama-Q4_K_M", fused_gate_up), ("phi3-Q4_K_M", split_qkv),
       ("phi3-Q8_0", split_gate_up)],
)  # fmt: skip
def test_launches_point_into_the_arenas_and_graphs_hold_those_of_a_step(name, change, goldens_dir, tmp_path):
    """A captured decode step launches what an ordinary step of the same rows does, but for where it draws from."""
    path = goldens_dir / f"{name}.gguf"
    if change is not None:
        forge = change(take_apart(path))
        path = tmp_path / "variant.gguf"
        path.write_bytes(forge.build())
    with ModelFile(path) as file, _driver.Context(0) as context:
        built = plan.build(file)
        config = EngineConfig(3, 64, 256, tuple(16 for _ in built.kv_groups))
        with recorded() as start:
            engine = _engine.CudaEngine(file, built, config, context=context)
        engine.block_tables[:] = np.arange(4)
        rows = np.arange(3, dtype=np.int32)
        with recorded() as step:
            engine.step(Batch(rows, rows, rows, 3, rows))
        prompt = np.arange(40, dtype=np.int32)
        with recorded() as prefill:
            engine.step(Batch(prompt, prompt, 0 * prompt, 0, prompt[-1:]))
        labels = {memory.pointer: memory.label for memory in context.allocations()}
        places_of = {engine.memory.weights.tensors[name].address: name for name in built.weights}
        engine.close()

    def norms_of(launches):
        """Weights of the norms that launches apply, whichever kernel does it."""
        names = ("norm_weight", "weight", "convert.weight")
        found = [next(filter(None, map(launch.fields.get, names)), None) for launch in launches]
        return {places_of[sum(address)] for address in found if address}

    graph = [launch for launch in start if launch.captured][-len(step) :]  # the last one: of three rows, drawn
    assert [launch.kernel for launch in graph] == [launch.kernel for launch in step]
    assert step[-1].kernel == "sample_draw" and all(launch.pdl for launch in step + prefill)
    for ours, theirs in zip(graph, step, strict=True):
        assert (ours.grid, ours.block, ours.smem) == (theirs.grid, theirs.block, theirs.smem)
        differ = {field for field, value in ours.fields.items() if value != theirs.fields[field]}
        assert differ == ({"slots", "positions", "next_tokens", "advance"} if "sample" in ours.kernel else set())
    assert {launch.kernel.split("_")[0] for launch in prefill} >= {"rows", "convert", "matmul", "rope", "attention"}
    for launches in (step, prefill):
        assert norms_of(launches) == {op.weight for op in built.ops if isinstance(op, ops.Norm)}
    places = {
        labels.get(value[0], "host" if field in ("out", "host_step") else field)
        for launch in step + prefill
        for field, value in launch.fields.items()
        if isinstance(value, tuple)
    }
    assert places == {"weights", "kv", "workspace", "host"}


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "phi3-swa-Q8_0", "gpt2-Q8_0"])
def test_decode_rows_rotate_within_attention(name, goldens_dir):
    """And prompt rows of the same step before it; with `stop_after` all rows do."""
    with ModelFile(goldens_dir / f"{name}.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        engine = _engine.CudaEngine(file, built, EngineConfig(3, 64, 256, tuple(16 for _ in built.kv_groups)),
                                    context=context)  # fmt: skip
        engine.block_tables[:] = np.arange(4)
        positions, slots = np.array([7, 9, 0, 1, 2, 3, 4], np.int32), np.array([0, 1, 2, 2, 2, 2, 2], np.int32)
        mixed = Batch(np.ones(7, np.int32), positions, slots, 2, np.array([0, 1, 6], np.int32))
        decode = Batch(np.ones(2, np.int32), positions[:2], slots[:2], 2, np.arange(2, dtype=np.int32))
        with recorded() as both:
            engine.step(mixed)
        with recorded() as alone:
            engine.step(decode)
        with recorded() as plain:
            engine.forward(mixed, stop_after=next(op.name for op in built.ops if op.name.endswith("attention")))
        engine.close()

    def of(launches, kernel):
        return [launch for launch in launches if launch.kernel.startswith(kernel)]

    ropes, decodes = of(both, "rope_kv"), of(both, "attention_decode")
    assert len(ropes) == len(decodes) == len(of(both, "attention_prefill")) == built.n_layer
    assert not of(alone, "rope_kv") and len(of(alone, "attention_decode")) == built.n_layer
    for rope, own in zip(ropes, decodes, strict=True):
        assert rope.grid[0] == 5 and own.grid[2] == 2
        for field, step in (("k", "k_stride"), ("v", "v_stride"), ("positions", None), ("slots", None)):
            words = 2 * (own.fields[step] if step else 1)
            assert rope.fields[field] == (own.fields[field][0], own.fields[field][1] + 4 * words)
        for field in ("inv_freq", "n_rot", "rope_type", "mscale", "kv", "block_table", "rope_tables"):
            assert rope.fields[field] == own.fields[field]
        assert own.fields["stages"] == 2 and (own.fields["n_rot"] == 0) == (name == "gpt2-Q8_0")
    assert any(launch.grid[0] == 7 and launch.fields["v"] for launch in of(plain, "rope_kv"))
    assert [launch.fields["k"] for launch in of(plain, "attention_decode")] == [0]


#: op of a plan -> beginnings of the names of its launches in a decode step of one row, nothing folded
ALONE = {
    ops.Embed: ("rows_",), ops.Norm: ("norm_",), ops.MatMul: ("decode_",), ops.Rope: ("rope_kv",),
    ops.KvWrite: ("rope_kv",), ops.Attention: ("attention_decode_",), ops.Glu: ("glu",), ops.Act: ("act_",),
    ops.Add: ("add",), ops.Gather: ("gather_rows",), ops.Route: ("route_logits_", "route_choose"),
    ops.ExpertMatMul: ("expert_few_",), ops.ExpertSum: ("expert_sum",),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "phi3-swa-Q8_0", "gpt2-Q8_0", "gpt-oss-MXFP4"])
def test_plain_lowering_launches_every_op_by_itself(name, goldens_dir, monkeypatch):
    """What the environment says later is no concern of an engine that is there."""
    path = goldens_dir / f"{name}.gguf"
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "plain")
    with ModelFile(path) as file, _driver.Context(0) as context:
        built = plan.build(file)
        config = EngineConfig(1, 64, 256, tuple(16 for _ in built.kv_groups))
        with recorded() as start:
            engine = _engine.CudaEngine(file, built, config, context=context)
        monkeypatch.setenv("WORKER_ORCD_LOWERING", "fused")
        fused = _engine.CudaEngine(file, built, config, context=context)
        assert (engine.lowering, fused.lowering) == ("plain", "fused")
        assert [op.name for op in engine.ops] == [op.name for op in built.ops] and len(fused.ops) < len(engine.ops)
        one, steps = np.zeros(1, np.int32), []
        for each in (engine, fused):
            each.block_tables[:] = 0
            with recorded() as step:
                each.step(Batch(one, one, one, 1, one))
            steps.append(step)
            each.close()
    wanted = []
    for op in built.ops:
        wanted += ALONE[type(op)] * (2 if isinstance(op, ops.Embed) and op.positions else 1)
    wanted += ["sample_max", "sample_draw"]
    step = steps[0]
    assert [kernel for kernel, launch in zip(wanted, step, strict=True) if not launch.kernel.startswith(kernel)] == []
    for launch in step:
        if launch.kernel.startswith(("decode_", "expert_few_")):
            assert launch.fields["mode"] == 0 and not launch.fields.get("norm_weight")
        assert launch.fields.get("n_matrices", 1) == 1
    captured = [launch.kernel for launch in start if launch.captured]
    assert captured[-len(step) :] == [launch.kernel for launch in step]
    assert len(steps[1]) < len(step)
    with LLM(path, device="cuda:0", progress=False, max_seqs=1) as llm:
        assert llm.info.lowering == "fused"
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "plain")
    with LLM(path, device="cuda:0", progress=False, max_seqs=1, warm_up=True) as llm:
        assert llm.info.lowering == "plain"


def test_a_layer_of_experts_is_three_launches_of_few_rows(goldens_dir):
    """And with prompt rows beside them or many decode rows those that all of them can share."""
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        config = EngineConfig(12, 64, 256, tuple(16 for _ in built.kv_groups))
        engine = _engine.CudaEngine(file, built, config, context=context)
        engine.block_tables[:] = 0

        def step(n_decode, n_prompt):
            n = n_decode + n_prompt
            slots = np.minimum(np.arange(n), n_decode).astype(np.int32)
            positions = np.where(np.arange(n) < n_decode, 5, np.arange(n) - n_decode).astype(np.int32)
            tokens, outputs = np.zeros(n, np.int32), np.arange(n_decode, dtype=np.int32)
            with recorded() as launches:
                engine.step(Batch(tokens, positions, slots, n_decode, outputs))
            return [one for one in launches if one.kernel.startswith(("route_", "expert_"))]

        for n in (1, 2, 8):
            launches = step(n, 0)
            assert len(launches) == 3 * built.n_layer
            for route, up, down in zip(launches[::3], launches[1::3], launches[2::3], strict=True):
                assert route.kernel == "route_few_f32" and route.grid[0] == route.fields["n_logit_blocks"] + n
                assert route.fields["route.list.items"] == up.fields["list.items"] == down.fields["list.items"]
                assert (up.fields["mode"], down.fields["mode"]) == (2, 3)
                assert up.fields["rows"] == route.fields["convert.out"] and not up.fields["x"]
                assert down.fields["x"] == up.fields["out"] and down.fields["x_slot_stride"] == down.fields["k"]
                assert (up.fields["holds_next"], up.fields["has_list"]) == (1, 0)
                assert (down.fields["holds_next"], down.fields["has_list"]) == (0, 1)
        for n_decode, n_prompt in ((2, 7), (9, 0), (0, 7)):
            launches = step(n_decode, n_prompt)
            kernels = [one.kernel for one in launches]
            assert not any(kernel.startswith("route_few_") for kernel in kernels)
            assert kernels.count("expert_sum") == built.n_layer
            few = [one.fields for one in launches if one.kernel.startswith("expert_few_")]
            assert len(few) == (2 * built.n_layer if n_decode == 2 else 0)
            assert not any(one["holds_next"] or one["has_list"] or one["mode"] == 3 for one in few)
        engine.close()


def test_an_unknown_lowering_takes_nothing(tiny, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "fast")
    with pytest.raises(InvalidRequest, match="WORKER_ORCD_LOWERING is fused or plain, not 'fast'"):
        _engine.CudaEngine(*tiny)
    assert leftovers() == NOTHING


def test_ops_of_both_lowerings_run_in_turns(tiny):
    """Those that are asked for and no others; what the last writes is read."""
    engine = _engine.CudaEngine(*tiny)
    engine.block_tables[:] = 0
    fused, plain = engine.ops, lower(engine.plan, fuse=False)
    rows = np.arange(5, dtype=np.int32)
    batch = Batch(rows, rows, 0 * rows, 0, rows[3:])
    with recorded() as both:
        got = engine.forward_ops(batch, [*fused[:3], *plain[12:14]])
    with recorded() as first:
        engine.forward_ops(batch, fused[:3])
    assert [launch.kernel for launch in both[: len(first)]] == [launch.kernel for launch in first]
    buffer = engine.plan.buffers[ops.output_of(engine.plan.ops[13]).buf]
    assert len(both) > len(first) and got.shape == (5, buffer.width)
    assert engine.forward_ops(batch, fused).shape == engine.forward(batch).shape == (2, engine.n_vocab)
    with pytest.raises(InvalidRequest, match="has no op 'blk"):
        engine.forward(batch, stop_after="blk.9.attn_q")
    engine.close()


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "phi3-Q8_0", "gpt2-Q8_0"])
@pytest.mark.parametrize(("n_decode", "n_prompt"), [(1, 0), (2, 0), (8, 0), (9, 0), (16, 0), (0, 70), (1, 5), (3, 70)])
def test_products_take_each_row_once(name, n_decode, n_prompt, goldens_dir):
    """Decode rows by decode_* or matvec_*, prompt rows by matmul_*, of rows that were converted once; or not at all,
    where a single decode row is converted by its product."""
    n = n_decode + n_prompt
    with ModelFile(goldens_dir / f"{name}.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        engine = _engine.CudaEngine(file, built, EngineConfig(17, 128, 256, tuple(80 for _ in built.kv_groups)),
                                    context=context)  # fmt: skip
        engine.block_tables[:] = np.arange(4)
        positions = np.r_[np.full(n_decode, 7), np.arange(n_prompt)].astype(np.int32)
        slots = np.r_[np.arange(n_decode), np.full(n_prompt, n_decode)].astype(np.int32)
        with recorded() as step:
            engine.step(Batch(np.ones(n, np.int32), positions, slots, n_decode, np.array([n - 1], np.int32)))
        engine.close()
    layers = step[: next(i for i, launch in enumerate(step) if launch.kernel.startswith("gather_rows"))]
    inline = n_decode == 1 and name != "gpt2-Q8_0"  # products take in RMS norms only
    conversion, rows, seen = None, None, set()
    for launch in layers:
        fields, kind = launch.fields, launch.kernel.split("_")[0]
        if kind == "convert":
            first = int(n_decode == 1 and fields["kind"] != LAYER_NORM)
            conversion, rows = fields, (fields["out"][0], fields["out"][1] - first * fields["out_bytes"])
            assert fields["n_rows"] == n - first and fields["n_pad_rows"] == launch.grid[0]
            assert launch.grid[0] == n_decode - first + -(-n_prompt // 64) * 64
        elif kind in ("decode", "matvec"):
            seen.add(kind)
            assert fields["n_rows"] == n_decode and (kind == "decode") == (n_decode <= 8)
            if not (n_decode == 1 and fields.get("x")):
                assert (fields["rows"], fields["x_bytes"]) == (rows, conversion["out_bytes"])
                assert conversion["k"] == fields["k"] and not fields.get("norm_weight")
        elif kind == "matmul":
            seen.add(kind)
            assert fields["n_rows"] == n_prompt and conversion["k"] == fields["k"]
            assert fields["x"] == (rows[0], rows[1] + n_decode * conversion["out_bytes"])
        elif kind == "glu":
            of_prompts = n_prompt > 0
            assert launch.grid[1] == (n_prompt if of_prompts else n_decode) and (of_prompts or n_decode > 8)
    assert seen == {kind for kind, there in (("decode", 0 < n_decode < 9), ("matvec", n_decode > 8),
                                             ("matmul", n_prompt)) if there}  # fmt: skip
    kinds = [launch.kernel.split("_")[0] for launch in layers]
    if inline:
        assert all(launch.fields["x"] for launch in layers if launch.kernel.startswith("decode_"))
        assert ("convert" in kinds) == (n_prompt > 0)
    gated = built.n_layer * (name != "gpt2-Q8_0") * (n_prompt > 0 or n_decode > 8)
    assert kinds.count("glu") == gated


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "phi3-swa-Q8_0"])
def test_rows_that_share_their_splits_have_room_for_them(name, goldens_dir, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_SMS", "500")
    with ModelFile(goldens_dir / f"{name}.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        config = EngineConfig(64, 64, 4096, tuple(16 for _ in built.kv_groups))
        space = _engine.plan_memory(built, config).workspace
        engine = _engine.CudaEngine(file, built, config, context=context)
        engine.block_tables[:] = np.arange(16)[:, None].repeat(4, 1).reshape(-1)
        grids = set()
        for n in (1, 3, 31, 32, 33, 64):
            rows = np.arange(n, dtype=np.int32)
            with recorded() as step:
                engine.step(Batch(rows, rows, rows, n, rows))
            for launch in step:
                if launch.kernel.startswith("attention_decode_"):
                    (x, y, z), fields = launch.grid, launch.fields
                    row_bytes = fields["n_head"] * fields["max_splits"] * (built.head_dim + 4) * 4
                    assert z == n and (x == 1 or z * row_bytes <= space.attention_partial.nbytes)
                    assert x == 1 or z * y * 4 <= space.attention_counters.nbytes
                    grids.add(x)
        engine.close()
    # of more rows with four KV heads each none is shared
    assert max(grids) == fields["max_splits"] > 1 and (1 in grids) == (name == "phi3-swa-Q8_0")


@pytest.mark.parametrize(
    ("name", "max_seqs"),
    [("llama-Q4_K_M", 64), ("gpt-oss-MXFP4", 1), ("gpt-oss-MXFP4", 64), ("phi3-swa-Q8_0", 5), ("gpt2-Q8_0", 12)],
)
def test_after_a_warm_up_no_launch_is_the_first_of_its_kernel(name, max_seqs, goldens_dir, monkeypatch):
    """Steps of many shapes: what they launch was launched before, and so was every graph."""
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "0")
    monkeypatch.setenv("FAKE_CUDA_SMS", "2")  # a model this small fills no more, so that there are large tiles too
    rng = np.random.default_rng(max_seqs)
    options = {"max_seqs": max_seqs, "max_batch_tokens": 1024, "context_length": 128, "progress": False}
    path = goldens_dir / f"{name}.gguf"
    with recorded() as cold, LLM(path, device="cuda:0", **options) as llm:
        assert FAKE.fake_new_graphs() > 0
    assert leftovers() == NOTHING and FAKE.fake_new_graphs() == 0
    with recorded() as warm, LLM(path, device="cuda:0", warm_up=True, **options) as llm:
        assert FAKE.fake_new_graphs() == 0, "graphs that were never launched"
        engine = llm._running._loaded.engine
        before = {launch.kernel for launch in warm}
        assert before > {launch.kernel for launch in cold if not launch.captured}
        engine.block_tables[:] = 0
        with recorded() as later:
            for _ in range(30):
                n_decode = int(rng.integers(0, max_seqs + 1))
                lengths = rng.integers(0, 129, max_seqs - n_decode) if rng.integers(2) else [int(rng.integers(0, 129))]
                lengths = [int(n) for n in lengths[: max_seqs - n_decode] if n]
                while n_decode + sum(lengths) > 1024:
                    lengths.pop()
                if not n_decode and not lengths:
                    continue
                positions = np.concatenate([np.full(n_decode, 3), *(np.arange(n) for n in lengths)]).astype(np.int32)
                slots = np.repeat(np.arange(n_decode + len(lengths)), [1] * n_decode + lengths).astype(np.int32)
                outputs = np.flatnonzero(np.diff(np.append(slots, -1))).astype(np.int32)
                batch = Batch(np.ones(len(slots), np.int32), positions, slots, n_decode, outputs)
                engine.step(batch, bool(rng.integers(2)))
                engine.forward(batch)
            every = np.arange(128, dtype=np.int32)
            engine.forward(Batch(every, every, 0 * every, 0, every))
    launched = {launch.kernel for launch in later}
    assert not launched - before and len(later) > 1000
    families = ("matmul_", "expert_matmul_") if "gpt-oss" in name else ("matmul_",)
    for family in families if max_seqs > 1 else ():
        kinds = {kernel for kernel in launched if kernel.startswith(family)}
        assert len(kinds) > 1, "not a family of small and large tiles"
    assert leftovers() == NOTHING


def test_a_fault_in_a_warm_up_is_a_load_error(goldens_dir, monkeypatch):
    """Graphs are launched there and nowhere else in a load."""
    monkeypatch.setenv("FAKE_CUDA_DELAY_US", "0")
    for n in (1, 2, 5):
        _driver._fail_nth(n, "cuGraphLaunch", 700)
        with pytest.raises(CudaError) as e:
            LLM(goldens_dir / "llama-Q4_0.gguf", device="cuda:0", progress=False, max_seqs=4, warm_up=True)
        assert e.value.sticky and e.value.fields["call"] == "cuGraphLaunch"
        assert leftovers() == NOTHING
