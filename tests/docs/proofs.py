"""What tests/docs/test_adding.py runs inside a copy of the tree: each function shows that one addition works there."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import subprocess
import time
from pathlib import Path

import numpy as np
from helpers import gguf_forge as forge
from helpers.quant_blocks import dequantized, random_blocks

from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan

ROOT = Path(__file__).resolve().parents[2]


def random_model(arch: str, shapes: dict[str, tuple[int, ...]], keys: dict[str, int], type_of: dict[str, int]) -> bytes:
    """A GGUF of random weights, float32 but for the tensors of `type_of`; norms near one."""
    rng = np.random.default_rng(1)
    file = forge.Forge().put("general.architecture", forge.STR, arch)
    for key, value in keys.items():
        file.put(f"{arch}.{key}", forge.U32, value)
    file.put(f"{arch}.attention.layer_norm_rms_epsilon", forge.F32, 1e-5)
    forge.tiny_vocab(file, "llama")
    for name, dims in shapes.items():
        if name in type_of:
            data = random_blocks(type_of[name], int(np.prod(dims[1:])), dims[0], rng).tobytes()
            file.tensors.append(forge.Tensor(name, dims, type_of[name], data=data))
            continue
        x = rng.standard_normal(dims[::-1], np.float32)
        x = 1 + 0.1 * x if "norm" in name else x / np.sqrt(np.float32(dims[0]))
        file.tensors.append(forge.Tensor(name, dims, 0, data=x.astype(np.float32).tobytes()))
    return file.build()


KEYS = {"block_count": 2, "context_length": 64, "embedding_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 2}  # fmt: skip
N_VOCAB = 262


def shapes(layer_shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of two layers, 64 wide, with 4 heads and 2 KV heads of 16."""
    found = {"token_embd.weight": (64, N_VOCAB), "output_norm.weight": (64,), "output.weight": (64, N_VOCAB)}
    for i in range(2):
        layer = {"attn_norm": (64,), "attn_q": (64, 64), "attn_k": (64, 32), "attn_v": (64, 32),
                 "attn_output": (64, 64), "ffn_norm": (64,), **layer_shapes}  # fmt: skip
        found |= {f"blk.{i}.{name}.weight": dims for name, dims in layer.items()}
    return found


def oracle_logits(mf: ModelFile, tokens: np.ndarray) -> np.ndarray:
    from oracle.numpy_engine import NumpyEngine

    n = len(tokens)
    return NumpyEngine(mf, plan.build(mf)).run(tokens, np.arange(n), np.zeros(n, int), np.arange(n))


def flag_variant() -> None:
    """A file of architecture qwen3moe gives the same logits on the CPU engine as by the oracle."""
    from helpers.cpu_engines import open_engine, rows

    from worker_orcd.cuda.lowering import ExpertGroup, lower

    experts = {"attn_q_norm": (16,), "attn_k_norm": (16,), "ffn_gate_inp": (64, 8), "ffn_gate_exps": (64, 32, 8),
               "ffn_up_exps": (64, 32, 8), "ffn_down_exps": (32, 64, 8)}  # fmt: skip
    keys = {**KEYS, "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 32}
    path = Path("qwen3moe.gguf")
    path.write_bytes(random_model("qwen3moe", shapes(experts), keys, {}))
    tokens = np.random.default_rng(2).integers(0, N_VOCAB, 40)
    with ModelFile(str(path)) as mf:
        model = plan.build(mf)
        kinds = [type(op).__name__ for op in model.ops]
        want = oracle_logits(mf, tokens)
    assert kinds.count("ExpertMatMul") == 6 and kinds.count("Route") == 2 and kinds.count("Rope") == 4
    groups = [len(op.parts) for op in lower(model) if isinstance(op, ExpertGroup)]
    assert groups == [2, 1] * 2, "what the CUDA engine makes of it: gate and up together, then down"
    got = open_engine(path).forward(rows((0, 0, tokens)))
    error = float(((got - want) ** 2).mean() / (want**2).mean())
    print(f"qwen3moe: NMSE {error:.2g} of the CPU engine against the oracle, limit 1e-6")
    assert 0 < error < 1e-6


def quant_type() -> None:
    """Q4_S: the CPU's kernels and the checks of files against the formula, and a model file that holds it."""
    from worker_orcd.cuda import layout
    from worker_orcd.models import registry

    t = quants.BY_NAME["Q4_S"]
    raw = random_blocks(t.id, 24, 512, np.random.default_rng(3))
    w = dequantized(t.id, raw)
    block = raw[0, :18]
    d, code = float(block[:2].view(np.float16)[0]), int(block[3]) & 15
    assert w[0, 1] == np.float32(d * (code - 7)), "element 1 is the low nibble of the second byte"

    lib = cpu_kernels()
    got = np.full(w.shape, np.nan, np.float32)
    assert lib.dequantize(t.id, pointer(raw), pointer(got), ctypes.c_int64(w.size))
    assert np.array_equal(got.view(np.uint32), w.view(np.uint32)), "the CPU's decoder gives other bits than the oracle"
    x, y = np.random.default_rng(4).standard_normal(512, np.float32), np.full(24, np.nan, np.float32)
    lib.matvec(
        t.id,
        pointer(raw),
        ctypes.c_int64(512),
        ctypes.c_int64(24),
        pointer(x),
        pointer(y),
        ctypes.c_int64(raw.shape[1]),
    )
    want = w.astype(np.float64) @ x
    error = float(np.abs(y - want).max() / np.abs(want).max())
    print(f"Q4_S: matvec off by {error:.2g}, limit 1e-6")
    assert error < 1e-6

    assert layout.packed_tile_bytes(t.id) == 16 * 2 * 18 and layout.tile_k(t.id) == 64
    assert layout.packed_bytes(t.id, 32, 128) == 32 * 4 * 18 and layout.kernel_suffix(t.id) == "q4_s"
    assert layout.decode_launch(t.id, 512, 64, 1, n_sm=132).kernel == "decode_q4_s_256e1"
    assert layout.matvec_launch(t.id, 512, (64,), 9, n_sm=132).kernel == "matvec_q4_s_2"

    ffn = {"ffn_gate": (64, 96), "ffn_up": (64, 96), "ffn_down": (96, 64)}
    quantized = {f"blk.{i}.{name}.weight": t.id for i in range(2) for name in ffn}
    data = random_model("llama", shapes(ffn), {**KEYS, "feed_forward_length": 96}, quantized)
    path = Path("q4_s.gguf")
    path.write_bytes(data)
    with ModelFile(str(path)) as mf:
        mf.check_tensors()
        assert registry.row_of(mf).name == "llama"
        info = mf.tensors["blk.1.ffn_down.weight"]
        assert (info.type_id, info.shape, len(mf.view("blk.1.ffn_down.weight"))) == (t.id, (96, 64), 64 * 3 * 18)
        assert np.isfinite(oracle_logits(mf, np.arange(8))).all()
        at = data.index(bytes(mf.view("blk.1.ffn_down.weight")))
    path.write_bytes(data[:at] + b"\x00\x7e" + data[at + 2 :])  # NaN as the first block's d
    with ModelFile(str(path)) as mf:
        try:
            mf.check_tensors()
        except Exception as error:
            assert "blk.1.ffn_down.weight" in str(error), error
        else:
            raise AssertionError("a NaN scale was not found")


def cpu_kernels() -> ctypes.CDLL:
    """The baseline kernels of csrc/cpu as a library."""
    source = ROOT / "tests" / "helpers" / "cpu_kernels_host.cpp"
    command = ["g++", "-std=c++17", "-O0", "-fPIC", "-shared", "-I", str(ROOT / "csrc"), str(source),
               str(ROOT / "csrc" / "cpu" / "kernels_baseline.cpp"), "-o", "cpu_kernels.so"]  # fmt: skip
    subprocess.run(command, check=True)
    lib = ctypes.CDLL(str(Path("cpu_kernels.so").resolve()))
    lib.dequantize.restype = ctypes.c_bool
    return lib


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def client(load, **config):
    """A test client of the application with an LLM that `load` makes, once it is ready; and its service."""
    from falcon import testing

    from worker_orcd.config import ServeConfig
    from worker_orcd.observe.events import EventLog
    from worker_orcd.wsgi.app import create_app
    from worker_orcd.wsgi.service import Service

    service = Service(ServeConfig(**{"model": "m.gguf", "device": "cpu", **config}), EventLog(io.StringIO()), load)
    service.start()
    end = time.monotonic() + 20
    while service.state == "loading" and time.monotonic() < end:
        time.sleep(0.005)
    assert service.state == "ready"
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    return testing.TestClient(create_app(service), headers=headers), service


def fake_client(**config):
    from service.fake_llm import FakeLLM

    return client(lambda config, progress, on_fatal, on_plan: FakeLLM(config, on_fatal), **config)


def route() -> None:
    """GET /limits answers, and nothing else does at its path."""
    app, service = fake_client(max_tokens_out=77, max_queue=5)
    answer = app.simulate_get("/limits")
    assert answer.status_code == 200 and answer.json == {"max_tokens_out": 77, "max_queue": 5}
    assert answer.headers["x-correlation-id"]
    assert app.simulate_post("/limits").status_code == 405
    service.stop(0)


def serve_option() -> None:
    """--weight is a flag with its help, a variable and a range, and reaches GET /health."""
    from click.testing import CliRunner

    from worker_orcd.cli import main
    from worker_orcd.config import ServeConfig
    from worker_orcd.errors import InvalidRequest
    from worker_orcd.wsgi import server

    shown = CliRunner().invoke(main.cli, ["serve", "--help"]).output
    assert "--weight N" in shown and "WORKER_ORCD_WEIGHT" in shown and "Share of the requests" in shown
    served = []
    server.serve = served.append
    for given, env, want in (([], {}, 1), ([], {"WORKER_ORCD_WEIGHT": "9"}, 9), (["--weight", "0"], {}, 0)):
        done = CliRunner().invoke(main.cli, ["serve", "--model", "m.gguf", *given], env=env)
        assert done.exit_code == 0 and served.pop().weight == want, (given, env, done.output)
    done = CliRunner().invoke(main.cli, ["serve", "--model", "m.gguf", "--weight", "1001"])
    assert done.exit_code == 2 and "--weight" in done.output and not served
    try:
        ServeConfig(model="m.gguf", weight=-1).check()
    except InvalidRequest as error:
        assert error.fields["field"] == "weight" and "0 to 1000" in error.message
    else:
        raise AssertionError("a weight of -1 was taken")
    app, service = fake_client(weight=7)
    assert app.simulate_get("/health").json["weight"] == 7
    service.stop(0)


def sampling_parameter() -> None:
    """max_gap decides what is drawn, as the reference says: from logits, through `LLM`, and through POST /execute."""
    from helpers.sampling_reference import draw

    from worker_orcd import LLM, SamplingParams
    from worker_orcd._cpu import sample_token
    from worker_orcd.errors import InvalidRequest

    rng = np.random.default_rng(5)
    base = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    changed = 0
    for i in range(300):
        logits = rng.standard_normal(200).astype(np.float32)
        kw = {**base, "seed": i, "temperature": [1.0, 0.7][i % 2], "top_k": [0, 50][i % 3 == 0]}
        gap = float(rng.choice([0.0, 0.5, 2.0, 5.0, 40.0]))
        token = sample_token(logits, 7, SamplingParams(**kw, max_gap=gap))
        assert token == draw(logits, 7, (), **kw, max_gap=gap), (i, gap)
        changed += token != draw(logits, 7, (), **kw)
        assert not gap or (logits.max() - logits[token]) / kw["temperature"] <= gap * 1.0001
    assert changed > 50

    path = Path("llama.gguf")
    ffn = {"ffn_gate": (64, 96), "ffn_up": (64, 96), "ffn_down": (96, 64)}
    path.write_bytes(random_model("llama", shapes(ffn), {**KEYS, "feed_forward_length": 96}, {}))
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=11, ignore_eos=True)
    narrow = dataclasses.replace(params, max_gap=0.8)
    with LLM(path, device="cpu", progress=False) as llm:
        prompt = [5, 6, 7]
        wide_ids, narrow_ids = (llm.generate([prompt], p)[0].token_ids for p in (params, narrow))
        for ids, gap in ((wide_ids, 0.0), (narrow_ids, 0.8)):
            logits = llm.logits([*prompt, *ids])
            for i, token in enumerate(ids):
                row = len(prompt) - 1 + i
                assert token == draw(logits[row], row, (), **base, seed=11, max_gap=gap), (gap, i)
        assert len(narrow_ids) == 30 and wide_ids != narrow_ids
        try:
            llm.generate([prompt], dataclasses.replace(params, max_gap=101.0))
        except InvalidRequest as error:
            assert error.fields["field"] == "max_gap"
        else:
            raise AssertionError("a gap of 101 was taken")

    def load(config, progress, on_fatal, on_plan):
        return LLM(path, device="cpu", progress=progress, on_fatal=on_fatal)

    app, service = client(load)
    texts = []
    for gap in ({}, {"max_gap": 0.8}):
        body = {"job_id": f"j{gap}", "prompt": "ab", "max_tokens": 30, "seed": 11, **gap}
        answer = app.simulate_post("/execute", body=json.dumps(body))
        assert answer.status_code == 200, answer.text
        pieces = [ln for ln in answer.text.splitlines() if ln.startswith('data: {"t"')]
        texts.append("".join(json.loads(piece.removeprefix("data: "))["t"] for piece in pieces))
        assert texts[-1] == service.llm().generate(["ab"], SamplingParams(max_tokens=30, seed=11, **gap))[0].text
    assert texts[0] != texts[1]
    refused = app.simulate_post("/execute", body=json.dumps({"job_id": "k", "prompt": "ab", "max_gap": -1}))
    assert refused.status_code == 400 and refused.json["field"] == "max_gap"
    service.stop(0)
