"""`worker-orcd generate`: the same text every time, streamed, seeded, ended by Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from helpers.command_line import one_error_line

from worker_orcd.cli import main
from worker_orcd.engine.sampling import RULES, SamplingParams

PROGRAM = [sys.executable, "-m", "worker_orcd"]  # runs worker_orcd/__main__.py


def test_generate_is_the_same_every_time_and_streams_what_json_tells(call, model_path):
    args = [
        "generate",
        "--model",
        model_path("smollm2"),
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max-tokens",
        "12",
        "--prompt",
        "The capital of France is",
    ]
    runs = {call(*args)[1] for _ in range(3)}
    assert len(runs) == 1
    (text,) = runs
    code, out, err = call(*args, "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["text"] + "\n" == text and "Paris" in text
    assert facts["tokens_out"] == len(facts["token_ids"]) == 12 and facts["finish_reason"] == "length"
    assert 0 <= facts["seed"] < 2**53 and facts["device"] == "cpu"


def test_generate_seed_is_made_up_told_and_enough_to_repeat(call, model_path):
    args = [
        "generate",
        "--model",
        model_path("smollm2"),
        "--device",
        "cpu",
        "--max-tokens",
        "10",
        "--prompt",
        "Once",
        "--json",
    ]
    first, second = (json.loads(call(*args)[1]) for _ in range(2))
    assert first["seed"] != second["seed"]
    # as a program in JavaScript reads and writes it
    through_doubles = int(json.loads(json.dumps(float(first["seed"]))))
    again = json.loads(call(*args, "--seed", through_doubles)[1])
    assert again["token_ids"] == first["token_ids"]


def test_generate_chat_stop_and_limits(call, model_path):
    base = ["generate", "--model", model_path("smollm2"), "--device", "cpu", "--temperature", "0"]
    code, out, _ = call(*base, "--chat", "--max-tokens", "8", "--prompt", "Say hello.", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["tokens_in"] > 8  # the template is there
    whole = json.loads(call(*base, "--max-tokens", "12", "--prompt", "One, two, three,", "--json")[1])["text"]
    stop = whole[4:7]
    cut = json.loads(call(*base, "--max-tokens", "12", "--prompt", "One, two, three,", "--stop", stop, "--json")[1])
    assert cut["finish_reason"] == "stop" and cut["text"] == whole[: whole.index(stop)]
    one_error_line(call(*base, "--max-tokens", "9000", "--prompt", "x"), "INVALID_REQUEST")
    one_error_line(call(*base, "--context-length", "9000", "--prompt", "x"), "INVALID_REQUEST")
    one_error_line(call(*base, "--expect-sha256", "0" * 64, "--prompt", "x"), "MODEL_LOAD_FAILED")


def test_ctrl_c_is_130_without_a_traceback(model_path):
    process = subprocess.Popen(
        [
            *PROGRAM,
            "generate",
            "--model",
            str(model_path("smollm2")),
            "--device",
            "cpu",
            "--prompt",
            "Count: 1 2 3",
            "--max-tokens",
            "2000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err


def test_prompt_from_standard_input(model_path):
    command = [
        *PROGRAM,
        "generate",
        "--model",
        str(model_path("smollm2")),
        "--device",
        "cpu",
        "--prompt",
        "-",
        "--max-tokens",
        "3",
        "--temperature",
        "0",
    ]
    done = subprocess.run(command, input="The capital of France is", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Paris" in done.stdout and done.stderr == ""


def test_generate_has_a_flag_for_each_sampling_field_that_names_one():
    defaults = SamplingParams()
    options_of = {p.name: p for p in main.cli.commands["generate"].params}
    for name, rule in RULES.items():
        assert (name in options_of) == bool(rule.flag), name
        if rule.flag:
            option = options_of[name]
            assert option.opts == [f"--{name.replace('_', '-')}"] and option.help == rule.flag
            assert option.multiple == (rule.kind in (list, dict))
            if getattr(defaults, name) not in (None, ()):
                assert option.default == getattr(defaults, name)


def test_generate_with_lists_of_tokens(call, model_path):
    base = ["generate", "--model", model_path("smollm2"), "--device", "cpu", "--temperature", "0", "--max-tokens", "9",
            "--prompt", "The capital of France is", "--json"]  # fmt: skip
    whole = json.loads(call(*base)[1])
    assert "Paris" in whole["text"] and whole["stop_reason"] is None
    paris = next(i for i in whole["token_ids"] if i == whole["token_ids"][0])
    for flags in (["--bad-words", "Paris"], ["--logit-bias", f"{paris}=-100", "--logit-bias", "5=-1"],
                  ["--logit-bias", f"{paris}=-99.5"]):  # fmt: skip
        facts = json.loads(call(*base, *flags)[1])
        assert paris not in facts["token_ids"] and len(facts["token_ids"]) == 9, flags
    third = whole["token_ids"][2]
    cut = json.loads(call(*base, "--stop-token-ids", f"99,{third}")[1])
    at = whole["token_ids"].index(third)
    assert (cut["token_ids"], cut["finish_reason"], cut["stop_reason"]) == (whole["token_ids"][:at], "stop", third)
    at_least = json.loads(call(*base, "--stop-token-ids", third, "--min-tokens", "9")[1])
    assert len(at_least["token_ids"]) == 9 and third not in at_least["token_ids"]
    for flags, text in ((["--logit-bias", "5"], "198=-100"), (["--stop-token-ids", "a"], "whole numbers")):
        code, _, err = call(*base, *flags)
        assert code == 2 and text in err
    one_error_line(call(*base, "--logit-bias", "5=101"), "INVALID_REQUEST")
    one_error_line(call(*base, "--min-tokens", "10"), "INVALID_REQUEST")
