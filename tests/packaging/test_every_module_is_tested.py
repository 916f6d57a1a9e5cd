"""Every module has a test file of its name, or stands in the one list here with the tests that cover it.

The test file of worker_orcd/ROOM/NAME.py is tests/ROOM/test_NAME.py; of wsgi/NAME.py and of a resource in a folder of
wsgi/, tests/service/test_NAME.py; of a compiled module _NAME, tests/compiled/test_NAME.py. `__init__` files hold names
only; tests/packaging covers them.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"

#: module -> the test files that cover it, below tests/; each names the module
COVERED_BY = {
    "worker_orcd/__main__.py": ["cli/test_generate.py"],
    "worker_orcd/errors.py": ["gguf/test_quoting.py", "cli/test_main.py", "serving/test_engine_loop.py"],
    "worker_orcd/machine.py": ["runtime/test_machine.py"],
    "worker_orcd/config.py": ["cli/test_serve_options.py", "runtime/test_limits.py"],
    # commands: the rooms below them have the arithmetic
    "worker_orcd/cli/compare.py": ["compare/test_run.py"],
    "worker_orcd/cli/options.py": ["cli/test_main.py"],
    "worker_orcd/cli/provenance.py": ["gguf/test_provenance.py"],
    "worker_orcd/cli/serve.py": ["cli/test_serve_options.py", "cli/test_main.py"],
    "worker_orcd/diagnose/bench.py": ["cli/test_bench.py"],
    "worker_orcd/diagnose/inspect.py": ["cli/test_inspect.py"],
    "worker_orcd/compare/layers.py": ["compare/test_run.py"],
    "worker_orcd/compare/report.py": ["compare/test_run.py"],
    "worker_orcd/compare/settings.py": ["compare/test_run.py"],
    # a loaded model
    "worker_orcd/runtime/devices.py": ["runtime/test_llm.py", "runtime/test_sizing.py"],
    "worker_orcd/runtime/info.py": ["runtime/test_llm.py", "gguf/test_provenance.py"],
    "worker_orcd/runtime/loading.py": ["runtime/test_llm.py"],
    "worker_orcd/runtime/token_stream.py": ["runtime/test_llm.py"],
    # the loop: its parts run in two threads, so they are tested together
    "worker_orcd/serving/detokenizer.py": ["serving/test_engine_loop.py", "serving/test_output.py"],
    "worker_orcd/serving/engine_work.py": ["serving/test_engine_loop.py", "serving/test_loop_failures.py"],
    "worker_orcd/serving/entry.py": ["serving/test_engine_loop.py", "serving/test_output.py"],
    "worker_orcd/serving/job.py": ["serving/test_engine_loop.py", "runtime/test_llm.py"],
    "worker_orcd/serving/logits_job.py": ["serving/test_engine_loop.py"],
    "worker_orcd/serving/score_job.py": ["service/openai/test_logprobs.py"],
    "worker_orcd/serving/logprobs.py": ["engine/test_sampling.py", "runtime/test_llm_answers.py"],
    "worker_orcd/serving/work.py": ["serving/test_scheduler.py"],
    "worker_orcd/runtime/arguments.py": ["runtime/test_llm.py"],
    "worker_orcd/runtime/text_bounds.py": ["runtime/test_request.py"],
    # plans
    "worker_orcd/engine/protocol.py": ["compiled/test_cpu_engine.py", "engine/test_kv_blocks.py"],
    "worker_orcd/models/blocks.py": ["models/test_plan.py"],
    "worker_orcd/models/gpt2.py": ["models/test_plan.py", "oracle/test_numpy_engine.py"],
    "worker_orcd/models/gpt_oss.py": ["models/test_gpt_oss_errors.py", "oracle/test_numpy_engine.py"],
    "worker_orcd/models/hparams.py": ["models/test_plan.py"],
    "worker_orcd/models/llama.py": ["models/test_plan.py", "oracle/test_numpy_engine.py"],
    "worker_orcd/models/ops.py": ["models/test_plan.py", "compiled/test_cpu_ops.py"],
    "worker_orcd/models/phi3.py": ["models/test_plan.py", "oracle/test_numpy_engine.py"],
    "worker_orcd/models/qwen.py": ["models/test_plan.py", "oracle/test_numpy_engine.py"],
    # files
    "worker_orcd/observe/stats.py": ["observe/test_metrics.py", "serving/test_loop_stats.py"],
    "worker_orcd/gguf/digests.py": ["gguf/test_provenance.py"],
    "worker_orcd/gguf/quants.py": ["gguf/test_model_file.py", "compiled/test_cpu_dequantize.py"],
    "worker_orcd/gguf/regular_file.py": ["gguf/test_provenance.py"],
    "worker_orcd/gguf/trusted_models.py": ["gguf/test_provenance.py"],
    "worker_orcd/tokenizer/from_gguf.py": ["tokenizer/test_tokenizer.py"],
    "worker_orcd/tokenizer/metadata.py": ["tokenizer/test_tokenizer.py", "gguf/test_hostile.py"],
    "worker_orcd/tokenizer/parts.py": ["tokenizer/test_tokenizer.py"],
    "worker_orcd/tokenizer/special_tokens.py": ["tokenizer/test_tokenizer.py", "tokenizer/test_spm.py"],
    "worker_orcd/tokenizer/vocab.py": ["tokenizer/test_stream.py"],
    # HTTP: in-process clients, and a real server for what they cannot see
    "wsgi/gunicorn_worker.py": ["service/test_server.py"],
    "wsgi/connections.py": ["service/test_collecting_worker.py"],
    "wsgi/raw_answers.py": ["service/test_collecting_worker.py"],
    "wsgi/http_errors.py": ["service/test_app.py"],
    "wsgi/native/cancel.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/native/execute.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/native/health.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/native/requests.py": ["service/test_app.py"],
    "wsgi/native/shutdown.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/openai/answers.py": ["service/openai/test_completions.py", "service/openai/test_openapi.py"],
    "wsgi/openai/asked.py": ["service/openai/test_fields.py", "service/openai/test_completions.py"],
    "wsgi/openai/bodies.py": ["service/openai/test_fields.py"],
    "wsgi/openai/chat.py": ["service/openai/test_chat.py"],
    "wsgi/openai/completions.py": ["service/openai/test_completions.py"],
    "wsgi/openai/fields.py": ["service/openai/test_fields.py"],
    "wsgi/openai/formats.py": ["service/openai/test_errors.py"],
    "wsgi/openai/generation.py": ["service/openai/test_completions.py"],
    "wsgi/openai/heads.py": ["service/openai/test_completions.py"],
    "wsgi/openai/ids.py": ["service/openai/test_errors.py"],
    "wsgi/openai/logprobs.py": ["service/openai/test_logprobs.py"],
    "wsgi/openai/messages.py": ["service/openai/test_chat.py"],
    "wsgi/openai/models.py": ["service/openai/test_tokens.py"],
    "wsgi/openai/openapi.py": ["service/openai/test_openapi.py"],
    "wsgi/openai/operations.py": ["service/openai/test_openapi.py"],
    "wsgi/openai/tokens.py": ["service/openai/test_tokens.py"],
    "wsgi/openai/types.py": ["service/openai/test_fields.py", "service/openai/test_openapi.py"],
    "wsgi/service.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/native/events.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/sse.py": ["service/test_app.py", "service/test_server.py"],
    "wsgi/places.py": ["service/test_event_writer.py"],
    "wsgi/job_record.py": ["service/test_app.py", "service/test_event_writer.py"],
    "wsgi/whole_answer.py": ["service/test_event_writer.py"],
    "wsgi/stream_format.py": ["service/test_protocol.py"],
    # compiled modules
    "pyx/worker_orcd/_cpu.pyx": ["compiled/test_cpu_engine.py", "compiled/test_cpu_sampling.py"],
    "pyx/worker_orcd/_engine.pyx": ["gpu/test_engine.py", "fake_driver/engine_cases.py"],
    "pyx/worker_orcd/_gguf.pyx": ["gguf/test_model_file.py", "gguf/test_hostile.py"],
    "pyx/worker_orcd/_nodes.pyx": ["cuda/test_launches.py"],
    "pyx/worker_orcd/_spm.pyx": ["tokenizer/test_spm.py"],
    "pyx/worker_orcd/_upload.pyx": ["gpu/test_upload.py", "fake_driver/cases.py"],
}


def modules() -> list[Path]:
    """Every Python and compiled module, without `__init__` files."""
    found = [*(ROOT / "worker_orcd").rglob("*.py"), *(ROOT / "wsgi").rglob("*.py"), *(ROOT / "pyx").rglob("*.pyx")]
    return sorted(path.relative_to(ROOT) for path in found if path.stem != "__init__")


def own_test(module: Path) -> Path:
    """Where the test file of a module belongs, below tests/."""
    match module.parts[0]:
        case "wsgi":
            room = "service"
        case "pyx":
            room = "compiled"
        case _:
            room = "/".join(module.parts[1:-1])
    return Path(room) / f"test_{module.stem.lstrip('_')}.py"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_a_module_is_tested(module: Path):
    covering = COVERED_BY.get(str(module))
    if (TESTS / own_test(module)).exists():
        assert covering is None, f"tests/{own_test(module)} exists: take {module} out of the list"
        return
    assert covering, f"{module} has no tests/{own_test(module)} and is not in the list"
    for name in covering:
        path = TESTS / name
        assert path.exists(), f"{name}, which covers {module}, does not exist"
        assert re.search(rf"(?<![A-Za-z0-9_]){module.stem}(?![A-Za-z0-9_])", path.read_text()), (
            f"{name} does not name {module.stem}"
        )


def test_the_list_names_only_modules():
    assert set(COVERED_BY) <= {str(module) for module in modules()}
