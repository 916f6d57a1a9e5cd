"""Every limit that a test or check holds a number to. What was measured is printed beside it.

NMSE is the normalized mean squared error, mean((a - b)^2) / mean(b^2), against float64 or a reference program.
A limit is as tight as the arithmetic allows, not as loose as a bug would need: the reason stands beside it.
"""

from __future__ import annotations

# ---- whole models: logits against the reference programs ---------------------------------------------------------

#: device -> start of a reference file's name -> NMSE of its logits. On a GPU experts round more
LOGITS_NMSE = {"cpu": {"": 2e-6}, "cuda": {"gpt-oss": 1e-4, "": 2e-5}}
#: device -> real model -> mean Kullback-Leibler divergence of its predictions, in nats
REAL_KL = {"cpu": {"real-qwen": 2e-5, "real-smol": 2e-5}, "cuda": {"real-qwen": 2e-5, "real-smol": 2e-5}}
#: device -> share of positions whose most likely token is the reference's, at least
REAL_TOP1 = {"cpu": 0.998, "cuda": 0.995}
#: a greedy id may differ from the reference only where its two best logits are closer than this
GREEDY_MARGIN = 0.01

# ---- the NumPy oracle and the CPU engine -------------------------------------------------------------------------

#: start of a reference file's name -> NMSE of the oracle's logits (the references are float32)
ORACLE_NMSE = {"gpt-oss": 2e-6, "": 5e-7}
#: NMSE of one op on the CPU: float32 sums alone
CPU_OP_NMSE = 1e-11
#: NMSE of a product of integer codes on the CPU: activations round to 1/32767 of the largest of 32, which is at most
#: 32 / (12 * 32767^2) of their mean square
CPU_CODES_NMSE = 2.5e-9
#: NMSE of an op past the KV cache on the CPU: keys and values are float16, and a float32 error can round the other way
CPU_OP_NMSE_PAST_CACHE = 5e-7
#: NMSE of the logits past the change of rotary tables, on both engines
LONG_ROPE_NMSE = 2e-5
#: a greedy token there may miss the exact best logit by this share of the logits' standard deviation
LONG_ROPE_MARGIN = 1e-2

# ---- CUDA kernels, NMSE against float64 --------------------------------------------------------------------------

#: weights, their scales and activations each rounded to fp16 once: 4e-8 each
MATMUL_NMSE = 6e-7
#: as MATMUL_NMSE, but of five outputs alone, where sums may cancel
EXPERTS_NMSE = 3e-6
#: float32 logits of order 1 and one exp each
GATES_NMSE = 1e-10
#: q as two halves, the weights as one
ATTENTION_NMSE = 5e-8
#: float32 arithmetic: norms, rotation, GLU
POINTWISE_NMSE = 1e-12
#: LayerNorm, whose mean cancels
LAYER_NORM_NMSE = 1e-9
#: an op of the CUDA engine inside a model, against the oracle
CUDA_OP_NMSE = 5e-5
#: a drawn token may differ only where a running sum comes this close to a limit (exp of the device and of NumPy)
SAMPLE_MARGIN = 2e-6

# ---- memory and time ---------------------------------------------------------------------------------------------

#: share by which device memory in use may differ from the plan
VRAM_PLAN_SHARE = 0.02
#: bytes of the workspace of 64 sequences of Qwen2.5 0.5B: 5 % above the 279,668,480 that it took when no more could run
WORKSPACE_64_BYTES = 293_600_000
#: bytes that the driver may keep for itself of an engine that was closed: its own pools, once
DRIVER_KEEPS_BYTES = 32 << 20
#: bytes that a sweep of hundreds of failed driver calls may cost for good (26 MiB were seen on an H100)
FAULT_SWEEP_BYTES = 32 << 20
#: seconds and MiB that the refusal of a hostile file may take
REFUSAL_SECONDS, REFUSAL_MIB = 1.0, 64
#: seconds of processor time for a text of a million characters, whatever they are
TOKENIZE_SECONDS = 1.0
#: MiB of anonymous memory of the tokenizer of a 150,000-token vocabulary
TOKENIZER_MIB = 150
#: bytes of anonymous memory that opening a 0.5B model on the CPU may take beyond its KV cache
CPU_ENGINE_BYTES = 64 << 20


def by_prefix(table: dict[str, float], name: str) -> float:
    """The limit of the first row whose key begins `name`."""
    return next(limit for prefix, limit in table.items() if name.startswith(prefix))
