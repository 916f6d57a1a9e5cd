"""Step, context and KV cache that fit a GPU: GPT-OSS-20B with its published shapes, inside budgets, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.fake_file import FakeFile
from helpers.gpt_oss_file import GptOssFile

from worker_orcd.cuda import memory
from worker_orcd.cuda.vram import CONTEXT_BYTES, MARGIN_BYTES
from worker_orcd.engine import kv_blocks
from worker_orcd.errors import InsufficientMemory, InsufficientVram, InvalidRequest
from worker_orcd.models import plan
from worker_orcd.runtime import devices, sizing

MIB = 1 << 20
TOTAL, FREE = 81_000 * MIB, 80_000 * MIB


@pytest.fixture(scope="module")
def gpt_oss() -> plan.Plan:
    return plan.build(GptOssFile(), 8192)


@pytest.fixture(autouse=True)
def free(monkeypatch) -> list[int]:
    """Bytes free on the GPU that is not there."""
    pytest.importorskip("worker_orcd._engine")
    bytes_free = [FREE]
    monkeypatch.setattr(devices, "device_memory", lambda device: (bytes_free[0], TOTAL))
    return bytes_free


def size(the_plan, limit_mib=None, context=8192, kv=None, seqs=None, rows=None):
    limit = None if limit_mib is None else limit_mib * MIB
    config = sizing.engine_config("cuda:0", the_plan, "m.gguf", context, kv, seqs, rows, limit)
    vram = devices.vram_plan(the_plan, config)
    print(
        f"limit {limit_mib} MiB: {config.max_seqs} sequences, {config.max_batch_tokens} rows, context "
        f"{config.context_length}, blocks {config.n_blocks}\n{vram.table(limit)}"
    )
    return config, vram


@pytest.mark.parametrize("seqs", [None, 1, 32])
@pytest.mark.parametrize("limit", [16384, 24576])
def test_gpt_oss_20b_with_8192_positions_inside_a_budget(gpt_oss, limit, seqs):
    config, vram = size(gpt_oss, limit, seqs=seqs)
    assert vram.required <= limit * MIB
    assert (config.context_length, config.max_batch_tokens, config.max_seqs) == (8192, 2048, seqs or 64)
    assert 12.0e9 < vram.weights < 12.2e9, "as stored, not widened"
    assert config.n_blocks[0] >= 128 and config.n_blocks[1] >= kv_blocks.window_blocks(128)
    if seqs == 32:
        assert config.n_blocks[0] > 16 * 128, "room for more than 16 sequences of the whole context"


def test_a_budget_is_used_up_and_not_passed(gpt_oss):
    for limit in (12_800, 13_579, 16_384):
        _, vram = size(gpt_oss, limit)
        block = sum(kv_blocks.block_bytes(gpt_oss))
        assert limit * MIB - block < vram.required <= limit * MIB


def test_what_is_free_is_a_budget_too(gpt_oss, free):
    free[0] = 14_000 * MIB
    for limit in (None, 16_384):
        _, vram = size(gpt_oss, limit)
        assert vram.required <= free[0] - MARGIN_BYTES
    _, vram = size(gpt_oss, 13_000)
    assert vram.required <= 13_000 * MIB


@pytest.mark.parametrize("total_mib", [81_079, 143_771])
@pytest.mark.parametrize("seqs", [None, 64])
def test_by_default_a_part_of_the_gpu_is_left_to_others(monkeypatch, total_mib, seqs):
    """GPT-OSS-20B with all its positions and 64 sequences, which would take whatever there is of 80 GB."""
    total = total_mib * MIB
    free = total - CONTEXT_BYTES
    monkeypatch.setattr(devices, "device_memory", lambda device: (free, total))
    config, vram = size(plan.build(GptOssFile()), context=None, seqs=seqs)
    assert config.context_length == 131_072 and config.max_seqs == 64
    assert free - vram.required > 0.06 * total
    assert total - free + vram.required <= 0.92 * total, "the context counts too"
    if total_mib < 100_000:
        assert total - free + vram.required > 0.91 * total, "and what may be taken is taken"


def test_what_others_have_taken_cannot_be_planned(gpt_oss, free):
    free[0] = 14_000 * MIB
    for utilization in (0.92, 1.0):
        config = sizing.engine_config("cuda:0", gpt_oss, "m.gguf", 8192, None, None, None, utilization=utilization)
        assert free[0] - 2 * MARGIN_BYTES < devices.vram_plan(gpt_oss, config).required <= free[0] - MARGIN_BYTES


def test_the_smallest_of_share_limit_and_what_is_free_counts(gpt_oss):
    def required(limit_mib, utilization):
        limit = None if limit_mib is None else limit_mib * MIB
        sizes = sizing.engine_config("cuda:0", gpt_oss, "m.gguf", 8192, None, None, None, limit, utilization)
        return devices.vram_plan(gpt_oss, sizes).required

    assert required(16_384, 0.92) == required(16_384, 0.5) <= 16_384 * MIB
    assert required(16_384, 0.18) == required(None, 0.18) <= 0.18 * TOTAL - CONTEXT_BYTES
    with pytest.raises(InsufficientVram, match=r"may be taken \(gpu_memory_utilization is 0\.15\)") as e:
        required(None, 0.15)
    assert e.value.fields["bytes_available"] == int(0.15 * TOTAL) - CONTEXT_BYTES


def test_each_try_takes_less_and_what_was_named_stays(gpt_oss):
    """What `loading` does where a device gives less than it promised: sizes get smaller until none is left."""

    def choose(at_most, **named):
        sizes = {"context": None, "kv": None, "seqs": None, "tokens": None} | named
        return sizing.engine_config("cuda:0", gpt_oss, "m.gguf", *sizes.values(), at_most=at_most)

    config, taken = choose(None), []
    with pytest.raises(InsufficientVram):
        while len(taken) < 1000:
            taken.append(sizing.taken_bytes("cuda:0", gpt_oss, config))
            at_most = sizing.next_smaller("cuda:0", gpt_oss, config)
            config = choose(at_most)
            assert sizing.taken_bytes("cuda:0", gpt_oss, config) <= at_most < taken[-1]
    assert 12 < len(taken) < 100 and taken[11] < 12.2e9 + 0.07 * (taken[0] - 12.2e9)
    named = {"context": 4096, "kv": 1000 * MIB, "seqs": 16, "tokens": 512}
    with pytest.raises(InsufficientVram):
        choose(sizing.next_smaller("cuda:0", gpt_oss, choose(None, **named)), **named)
    config = choose(13_000 * MIB, seqs=16, context=4096)
    assert (config.max_seqs, config.context_length) == (16, 4096)


# -- the CPU


def cpu_size(the_plan, free, context=None, kv=None, seqs=32, at_most=None, monkeypatch=None):
    monkeypatch.setattr(devices, "free_memory", lambda: free)
    return sizing.engine_config("cpu", the_plan, "m.gguf", context, kv, seqs, None, at_most=at_most)


def test_on_the_cpu_all_promised_sequences_run_where_memory_allows(gpt_oss, monkeypatch):
    """Each of 32 requests that name no number of tokens has its positions; of less memory a quarter is taken."""
    sizes = kv_blocks.block_bytes(gpt_oss)

    def kv_bytes(config):
        return sum(n * size for n, size in zip(config.n_blocks, sizes, strict=True))

    usual = sizing.sequence_bytes(gpt_oss, 4096)
    config = cpu_size(gpt_oss, 64 << 30, monkeypatch=monkeypatch)
    assert 32 * usual - sum(sizes) < kv_bytes(config) <= 32 * usual
    needed = [kv_blocks.blocks_needed(g, 2048 + 64) for g in gpt_oss.kv_groups]
    assert all(have >= 32 * need for have, need in zip(config.n_blocks, needed, strict=True))
    for free in (8 << 30, 2 << 30):
        config = cpu_size(gpt_oss, free, monkeypatch=monkeypatch)
        assert free // 4 - sum(sizes) < kv_bytes(config) <= free // 4
    small = plan.build(FakeFile())
    config = cpu_size(small, 64 << 30, monkeypatch=monkeypatch)
    assert config.n_blocks == (32 * 2,), "no more than can be used"


def test_on_the_cpu_a_try_that_fails_is_followed_by_smaller_ones(gpt_oss, monkeypatch):
    config = cpu_size(gpt_oss, 64 << 30, monkeypatch=monkeypatch)
    at_most = sizing.next_smaller("cpu", gpt_oss, config)
    assert at_most < sizing.taken_bytes("cpu", gpt_oss, config)
    smaller = cpu_size(gpt_oss, 64 << 30, at_most=at_most, monkeypatch=monkeypatch)
    assert sizing.taken_bytes("cpu", gpt_oss, smaller) <= at_most
    with pytest.raises(InsufficientMemory):
        cpu_size(gpt_oss, 64 << 30, kv=1 << 30, at_most=at_most, monkeypatch=monkeypatch)
    with pytest.raises(InsufficientVram, match="a context of 8192 positions"):
        cpu_size(gpt_oss, 64 << 30, context=8192, at_most=100 << 20, monkeypatch=monkeypatch)


def test_steps_get_smaller_before_a_model_is_refused(gpt_oss):
    found = []
    for limit in range(12_900, 11_800, -4):
        try:
            config = sizing.engine_config("cuda:0", gpt_oss, "m.gguf", 8192, None, None, None, limit * MIB)
        except InsufficientVram:
            break
        vram = devices.vram_plan(gpt_oss, config)
        assert vram.required <= limit * MIB and config.context_length == 8192
        found.append((config.max_batch_tokens, config.max_seqs))
    print(f"{limit} MiB are refused; steps (rows, sequences): {list(dict.fromkeys(found))}")
    assert found == sorted(found, reverse=True), "smaller and smaller"
    assert {rows for rows, _ in found} == {2048, 1024, 512, 256}
    assert {seqs for _, seqs in found} == {64, 32, 16, 8}
    assert limit < 12_300, "a step of 2048 rows alone takes 300 MB more"


def test_what_the_caller_named_stays(gpt_oss):
    size(gpt_oss, 12_300)
    for named in ({"rows": 2048}, {"rows": 2048, "seqs": 64}):
        with pytest.raises(InsufficientVram):
            size(gpt_oss, 12_300, **named)
    config, _ = size(gpt_oss, 12_300, rows=128)
    assert config.max_batch_tokens == 128 and config.max_seqs == 64
    config, _ = size(gpt_oss, 16_384, rows=16)
    assert config.max_seqs == 16, "a step has a row for each sequence"
    assert size(gpt_oss, 12_300, seqs=3)[0].max_seqs == 3


def test_weights_and_workspace_alone_do_not_fit(gpt_oss):
    with pytest.raises(InsufficientVram) as e:
        size(gpt_oss, 11_000)
    required, available = e.value.fields["bytes_required"], e.value.fields["bytes_available"]
    assert required > available == 11_000 * MIB
    for part in ("m.gguf", f"{required:,}", f"{available:,}", "the limit is", "weights 12,1"):
        assert part in e.value.message
    assert e.value.fields["path"] == "m.gguf" and e.value.fields["device"] == "cuda:0"


def test_a_context_or_a_cache_that_does_not_fit(gpt_oss):
    with pytest.raises(InsufficientVram, match="a context of 131072 positions needs"):
        size(gpt_oss, 13_000, context=131072)
    with pytest.raises(InsufficientVram, match="the limit is 17,179,869,184; a KV cache of up to"):
        size(gpt_oss, 16_384, kv=8000 * MIB, seqs=64)
    assert size(gpt_oss, 16_384, kv=8000 * MIB)[0].max_seqs == 16, "whose cache is smaller"
    assert size(gpt_oss, 16_384, kv=300 * MIB)[1].kv <= 300 * MIB
    config, vram = size(gpt_oss, 13_000, context=None)
    assert config.context_length < 131072 and vram.required <= 13_000 * MIB, "nobody asked for a context: what fits"


def test_a_limit_is_for_a_gpu(gpt_oss):
    with pytest.raises(InvalidRequest) as e:
        sizing.engine_config("cpu", gpt_oss, "m.gguf", 128, None, None, None, 1 << 34)
    assert e.value.fields["field"] == "vram_limit_bytes"


def test_sliding_layers_keep_their_window_only(gpt_oss):
    full, sliding = 128, 4
    assert [g.window for g in gpt_oss.kv_groups] == [0, 128]
    assert [kv_blocks.blocks_needed(g, 8192) for g in gpt_oss.kv_groups] == [full, sliding]
    per_block = kv_blocks.block_bytes(gpt_oss)
    assert per_block == (12 * 64 * 2 * 8 * 64 * 2,) * 2
    for seqs in (1, 4):
        config, vram = size(gpt_oss, kv=1 << 40, seqs=seqs)
        if_all_were_full = 2 * seqs * full * per_block[0]
        in_flight = 2048 // 64
        print(f"{seqs} sequences of 8,192: KV {vram.kv:,} bytes, with full layers only {if_all_were_full:,}")
        assert config.n_blocks == (seqs * full, seqs * sliding + in_flight)
        assert vram.kv == sum(n * b for n, b in zip(config.n_blocks, per_block, strict=True))
        assert vram.kv < (0.65 if seqs == 1 else 0.55) * if_all_were_full
    assert sizing.sequence_bytes(gpt_oss, 8192) == (full + sliding) * per_block[0]


def test_one_long_sequence_fits_where_its_cache_does(gpt_oss):
    exactly = sizing.sequence_bytes(gpt_oss, 8192)
    assert kv_blocks.blocks_within(gpt_oss, exactly, 8, 2048, 8192) == (128, 4)
    assert min(kv_blocks.blocks_within(gpt_oss, exactly - 1, 8, 2048, 8192)) < 128
    for extra in (0, 10**6, 10**7, 10**8, 10**9):
        blocks = kv_blocks.blocks_within(gpt_oss, exactly + extra, 8, 2048, 8192)
        assert blocks[0] >= 128 and blocks[1] >= 4
        assert sum(n * b for n, b in zip(blocks, kv_blocks.block_bytes(gpt_oss), strict=True)) <= exactly + extra


def test_every_model_of_the_plan_fits_what_it_says(free):
    """A small model gets all the sequences and rows there are, and a cache no larger than it can use."""
    small = plan.build(FakeFile())
    config = sizing.engine_config("cuda:0", small, "m.gguf", None, None, None, None)
    assert (config.max_seqs, config.max_batch_tokens, config.context_length) == (64, 2048, 128)
    assert config.n_blocks == (64 * 2,)
    vram = devices.vram_plan(small, config)
    free[0] = vram.required + MARGIN_BYTES
    assert sizing.engine_config("cuda:0", small, "m.gguf", None, None, None, None) == config
    without_kv = replace(vram, kv=0).required
    free[0] = MARGIN_BYTES + without_kv + memory.kv_block_bytes(small) - 1
    with pytest.raises(InsufficientVram):
        sizing.engine_config("cuda:0", small, "m.gguf", None, None, 64, 2048)
