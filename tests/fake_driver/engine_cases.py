"""The CUDA engine's start and end on the stand-in driver: memory as planned, and nothing left at any failing call.

Kernels do nothing here: results are the business of tests/gpu, launches that of launch_cases.py.
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

import worker_orcd
from worker_orcd import LLM, SamplingParams, _driver, _engine
from worker_orcd._ring import Control, TokenRing
from worker_orcd.cuda import memory, vram
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


STRUCTS = gen_params.mirror(gen_params.read())


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
