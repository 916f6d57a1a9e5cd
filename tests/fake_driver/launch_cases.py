"""The launches of the CUDA engine on the stand-in driver, where kernels do nothing: what they read and write, what
fused ones stand for, and which come first. Results are the business of tests/gpu."""

from __future__ import annotations

from pathlib import Path

import gen_params
import numpy as np
import pytest
from fake_driver.cases import FAKE, NOTHING, leftovers
from fake_driver.launch_record import recorded
from helpers.golden_forge import fused_gate_up, fused_qkv, split_gate_up, split_qkv, take_apart

import worker_orcd
from worker_orcd import LLM, _driver, _engine
from worker_orcd.cuda import expert_layout, layout, lowering
from worker_orcd.cuda.layout import chunk_columns
from worker_orcd.cuda.lowering import lower
from worker_orcd.engine.protocol import Batch, EngineConfig
from worker_orcd.errors import (
    CudaError,
    InvalidRequest,
)
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import ops, plan

pytestmark = pytest.mark.skipif(
    not (Path(worker_orcd.__file__).parent / "fatbins" / "manifest.json").exists(),
    reason="no kernel images are installed",
)


#: of `ConvertParams.kind`
LAYER_NORM = next(h.constants["CONVERT_LAYER"] for h in gen_params.read() if "CONVERT_LAYER" in h.constants)


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
    assert {launch.kernel.split("_")[0] for launch in prefill} >= {"rows", "convert", "wgmma", "rope", "attention"}
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
    assert len(ropes) == len(decodes) == len(of(both, "attention_warpgroup")) == built.n_layer
    assert not of(alone, "rope_kv") and len(of(alone, "attention_decode")) == built.n_layer
    for rope, own in zip(ropes, decodes, strict=True):
        assert rope.grid[0] == 5 and own.grid[2] == 2
        for field, step in (("k", "k_stride"), ("v", "v_stride"), ("positions", None), ("slots", None)):
            words = 2 * (own.fields[step] if step else 1)
            assert rope.fields[field] == (own.fields[field][0], own.fields[field][1] + 4 * words)
        for field in ("inv_freq", "n_rot", "rope_type", "mscale", "kv", "block_table", "rope_tables"):
            assert rope.fields[field] == own.fields[field]
        assert own.fields["groups"] == own.fields["depth"] == 2 and (own.fields["n_rot"] == 0) == (name == "gpt2-Q8_0")
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


@pytest.mark.parametrize("many", lowering.MANY_ROWS)
def test_a_layer_of_experts_is_three_launches_of_few_rows(many, goldens_dir, monkeypatch):
    """And with prompt rows beside them or many decode rows those that all of them can share."""
    monkeypatch.setenv(lowering.MANY_ROWS_VARIABLE, many)
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
            return [one for one in launches if one.kernel.startswith(("route_", "expert_", "wgmma_experts_"))]

        few_mixes, other_mixes = [(1, 0), (2, 0), (8, 0)], [(2, 7), (9, 0)]
        (few_mixes if many == "wgmma" else other_mixes).append((0, 7))
        for n_decode, n_prompt in few_mixes:
            launches = step(n_decode, n_prompt)
            assert len(launches) == 3 * built.n_layer
            for route, up, down in zip(launches[::3], launches[1::3], launches[2::3], strict=True):
                n_rows = n_decode + n_prompt
                assert route.kernel == "route_few_f32" and route.grid[0] == route.fields["n_logit_blocks"] + n_rows
                assert route.fields["route.list.items"] == up.fields["list.items"] == down.fields["list.items"]
                assert (up.fields["mode"], down.fields["mode"]) == (2, 3)
                assert up.fields["rows"] == route.fields["convert.out"] and not up.fields["x"]
                assert down.fields["x"] == up.fields["out"] and down.fields["x_slot_stride"] == down.fields["k"]
                assert (up.fields["holds_next"], up.fields["has_list"]) == (1, 0)
                assert (down.fields["holds_next"], down.fields["has_list"]) == (0, 1)
        for n_decode, n_prompt in other_mixes:
            launches = step(n_decode, n_prompt)
            kernels = [one.kernel for one in launches]
            assert not any(kernel.startswith("route_few_") for kernel in kernels)
            assert kernels.count("expert_sum") == built.n_layer
            few = [one.fields for one in launches if one.kernel.startswith("expert_few_")]
            assert len(few) == (2 * built.n_layer if n_decode == 2 and many == "mma" else 0)
            assert not any(one["holds_next"] or one["has_list"] or one["mode"] == 3 for one in few)
            of_all_rows = [kernel for kernel in kernels if kernel.startswith("wgmma_experts_")]
            assert len(of_all_rows) == (2 * built.n_layer if many == "wgmma" else 0)
        engine.close()


@pytest.mark.parametrize("lowered", ["fused", "plain"])
def test_rows_of_experts_lie_at_the_places_of_their_pairs_where_an_expert_has_many(lowered, goldens_dir, monkeypatch):
    """A conversion for each input, after the list, to where the list says; all within the memory for converted rows."""
    monkeypatch.setenv("WORKER_ORCD_LOWERING", lowered)
    with ModelFile(goldens_dir / "gpt-oss-MXFP4.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        route = next(op for op in built.ops if isinstance(op, ops.Route))
        config = EngineConfig(4, 512, 512, tuple(32 for _ in built.kv_groups))
        engine = _engine.CudaEngine(file, built, config, context=context)
        engine.block_tables[:] = 0
        steps = {}
        for n in (20, 512):
            rows = np.arange(n, dtype=np.int32)
            with recorded() as launches:
                engine.step(Batch(np.zeros(n, np.int32), rows, 0 * rows, 0, rows[:0]))
            steps[n] = launches
        converted = engine.memory.workspace.converted
        engine.close()
    few = [one for one in steps[20] if one.kernel.startswith(("convert_", "route_"))]
    assert few and not any(one.fields.get("places") or one.fields.get("list.places") for one in few)
    n_pairs = 512 * route.n_used
    n_places = expert_layout.n_places(n_pairs, route.n_expert)
    products = [one for one in steps[512] if one.kernel.startswith("wgmma_experts_")]
    assert len(products) == (2 if lowered == "fused" else 3) * built.n_layer
    lists = [one for one in steps[512] if one.kernel == "route_list"]
    assert len(lists) == built.n_layer
    latest = None
    for launch in steps[512]:
        fields = launch.fields
        if launch.kernel == "convert_rows_to_places" and fields["places"]:
            latest = fields
            assert fields["factor_stride"] == n_places and fields["places_stride"] == route.n_used
            assert fields["n_copies"] * launch.grid[1] == route.n_used and launch.grid[0] == fields["n_rows"] == 512
        elif launch in products:
            assert launch.kernel.endswith("_96") and fields["factor_stride"] == n_places
            assert [fields[f] for f in ("factors", "k")] == [latest[f] for f in ("factors", "k")]
            assert fields["x"] == latest["out"] and fields["list.places"] == latest["places"]
            assert fields["list.places"] == lists[0].fields["list.places"]
            ends = fields["factors"][1] + 4 * n_places * layout.n_chunks(fields["k"])
            assert ends <= converted.address - fields["factors"][0] + converted.nbytes
    roots = [one.fields for one in steps[512] if one.kernel == "convert_rows_to_places" and not one.fields["out"]]
    assert len(roots) == (built.n_layer if lowered == "fused" else 0) and all(one["roots"] for one in roots)


def test_an_unknown_lowering_takes_nothing(tiny, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_LOWERING", "fast")
    with pytest.raises(InvalidRequest, match="WORKER_ORCD_LOWERING is fused or plain, not 'fast'"):
        _engine.CudaEngine(*tiny)
    assert leftovers() == NOTHING


def test_an_unknown_way_for_many_rows_takes_nothing(tiny, monkeypatch):
    monkeypatch.setenv("WORKER_ORCD_MANY_ROWS", "fast")
    with pytest.raises(InvalidRequest, match="WORKER_ORCD_MANY_ROWS is wgmma or mma, not 'fast'") as e:
        _engine.CudaEngine(*tiny)
    assert e.value.fields["field"] == "WORKER_ORCD_MANY_ROWS" and leftovers() == NOTHING


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
@pytest.mark.parametrize(
    ("n_decode", "n_prompt"),
    [(1, 0), (2, 0), (8, 0), (9, 0), (16, 0), (64, 0), (65, 0), (0, 70), (1, 5), (3, 70), (100, 20)],
)
def test_products_take_each_row_once(name, n_decode, n_prompt, goldens_dir, monkeypatch):
    """Without products of warpgroups: decode rows by decode_* or matvec_*, prompt rows, and all where there are more
    than 64 decode rows, by matmul_*, of rows that were converted once; or not at all, where a single decode row is
    converted by its product."""
    monkeypatch.setenv("WORKER_ORCD_MANY_ROWS", "mma")
    n = n_decode + n_prompt
    with ModelFile(goldens_dir / f"{name}.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        engine = _engine.CudaEngine(file, built, EngineConfig(101, 128, 256, tuple(80 for _ in built.kv_groups)),
                                    context=context)  # fmt: skip
        engine.block_tables[:] = np.arange(4)
        positions = np.r_[np.full(n_decode, 7), np.arange(n_prompt)].astype(np.int32)
        slots = np.r_[np.arange(n_decode), np.full(n_prompt, n_decode)].astype(np.int32)
        with recorded() as step:
            engine.step(Batch(np.ones(n, np.int32), positions, slots, n_decode, np.array([n - 1], np.int32)))
        engine.close()
    layers = step[: next(i for i, launch in enumerate(step) if launch.kernel.startswith("gather_rows"))]
    assert any(launch.kernel.startswith("attention_decode") for launch in layers) == (n_decode > 0)
    if n_decode > 64:
        n_decode, n_prompt = 0, n
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


@pytest.mark.parametrize("name", ["llama-Q4_K_M", "phi3-Q8_0", "gpt2-Q8_0"])
@pytest.mark.parametrize(("n_decode", "n_prompt"), [(1, 0), (8, 0), (9, 0), (0, 1), (0, 8), (3, 5), (3, 70), (0, 200)])
def test_warpgroups_take_all_rows_together(name, n_decode, n_prompt, goldens_dir):
    """Up to eight rows of whatever kind by decode_*, more by wgmma_*, in one launch for all and with what comes after
    the product."""
    n = n_decode + n_prompt
    with ModelFile(goldens_dir / f"{name}.gguf") as file, _driver.Context(0) as context:
        built = plan.build(file)
        engine = _engine.CudaEngine(file, built, EngineConfig(17, 256, 256, tuple(80 for _ in built.kv_groups)),
                                    context=context)  # fmt: skip
        engine.block_tables[:] = np.arange(4)
        positions = np.r_[np.full(n_decode, 7), np.arange(n_prompt)].astype(np.int32)
        slots = np.r_[np.arange(n_decode), np.full(n_prompt, n_decode)].astype(np.int32)
        with recorded() as step:
            engine.step(Batch(np.ones(n, np.int32), positions, slots, n_decode, np.array([n - 1], np.int32)))
        converted = engine.memory.workspace.converted
        engine.close()
    layers = step[: next(i for i, launch in enumerate(step) if launch.kernel.startswith("gather_rows"))]
    conversion, n_products = None, 0
    for launch in layers:
        fields, kind = launch.fields, launch.kernel.split("_")[0]
        if kind == "convert":
            conversion = fields
            padded = -(-n // 8) * 8
            if n > 8:
                at = fields["out"][1] + padded * 512 * -(-fields["k"] // 256)
                assert fields["factors"] == (fields["out"][0], at) and fields["factor_stride"] == padded
                assert fields["n_rows"] == n and fields["n_pad_rows"] == launch.grid[0] == padded
                ends = at + 4 * padded * -(-fields["k"] // min(1024, chunk_columns(fields["k"])))
                assert ends <= converted.address - fields["out"][0] + converted.nbytes
            else:
                assert not fields["factors"]
        elif kind in ("decode", "wgmma"):
            n_products += 1
            assert (kind == "decode") == (n <= 8) and fields["n_rows"] == n
            if kind == "wgmma":
                same = ("factors", "factor_stride", "k", "n_rows")
                assert [fields[f] for f in same] == [conversion[f] for f in same] and fields["x"] == conversion["out"]
                assert launch.grid[0] <= fields["n_tiles_m"] * fields["n_tiles_n"]
        else:
            assert kind not in ("matvec", "matmul", "glu")
    assert n_products >= 4 * built.n_layer


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
    families = ("wgmma_", "wgmma_experts_") if "gpt-oss" in name else ("wgmma_",)
    for family in families if max_seqs > 1 else ():
        kinds = {kernel for kernel in launched if kernel.startswith(family)}
        assert len(kinds) > 1, "not a family of tiles of several sizes"
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
