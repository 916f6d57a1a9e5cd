"""ServeConfig: everything the HTTP worker is told at start-up, checked before anything else happens.

Flags and environment variables are read in `cli/serve.py`; this module knows neither them nor what uses the values, and
imports nothing but the standard library and the error tree.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from worker_orcd.errors import InvalidRequest

#: characters of a prompt a request may hold
MAX_PROMPT_CHARS = 32_768
#: characters of a job id
MAX_JOB_ID_CHARS = 256
#: tokens generated where a request names no number, and the most a server gives where it is told no other limit
DEFAULT_MAX_TOKENS = 2048
#: stop strings of a request, and tokens of each
MAX_STOPS, MAX_STOP_TOKENS = 4, 32
#: most likely tokens whose log-probabilities a request may want with each token
MAX_LOGPROBS = 20
#: bytes of a request body; more is refused before it is parsed
MAX_BODY_BYTES = 1 << 20
#: threads beyond the streams: health probes, cancels, refusals and idle keep-alive connections
SPARE_THREADS = 8
#: seconds within which a stopping process is gone, whatever hangs
EXIT_LIMIT_SEC = 5.0
SHA256_RULE = "must be 64 lowercase hexadecimal digits"


@dataclass(frozen=True)
class ServeConfig:
    """Start-up values of the worker. Numbers are seconds, bytes or counts as named; None means "what fits".

    Attributes:
        model: path of the GGUF file.
        worker_id: a UUID, made up if not given.
        device: "auto", "cpu" or "cuda:N".
        host, port: where to listen; port 0 lets the system choose.
        max_tokens_in: tokens of a prompt, None: what the context holds.
        max_tokens_out: limit of a request's max_tokens.
        inference_timeout_sec: a job older than this ends with INFERENCE_TIMEOUT.
        kv_cache_bytes: size of the KV cache.
        context_length: positions of a sequence; None: as the file says.
        max_streams: sequences decoded together.
        max_queue: jobs waiting beyond those; more are answered 429.
        n_threads: CPU threads of the CPU engine, 0: one per core.
        chunk_bytes: size of a host-to-device copy.
        tokenizer: a tokenizer.json that takes the place of the file's vocabulary.
        check_tensors: look for NaN and infinity in norms, biases and block scales while loading.
        expect_sha256: lowercase hex digest the file must have.
        trusted_models: JSON list of the models that may be loaded.
        vram_limit_bytes: device memory that the model may take on a GPU in all; None: what is free.
        residency_check_sec: seconds between looks at whether the model's memory is still on the GPU.
        api_key: bearer token that /execute, /cancel and /shutdown then ask for.
        log_format: "json" or "text".
        grace_sec: time running jobs get after SIGTERM.
        print_curl: print a ready curl line once jobs are accepted.
        progress_bar: show loading as a progress bar instead of log events.
    """

    model: str
    worker_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8080
    max_tokens_in: int | None = None
    max_tokens_out: int = 2048
    inference_timeout_sec: float = 300.0
    kv_cache_bytes: int | None = None
    context_length: int | None = None
    max_streams: int = 32
    max_queue: int = 64
    n_threads: int = 0
    chunk_bytes: int = 1 << 20
    tokenizer: str | None = None
    check_tensors: bool = True
    expect_sha256: str | None = None
    trusted_models: str | None = None
    vram_limit_bytes: int | None = None
    residency_check_sec: float = 60.0
    api_key: str | None = None
    log_format: str = "json"
    grace_sec: float = 4.0
    print_curl: bool = False
    progress_bar: bool = False

    @property
    def gpu_device(self) -> int | None:
        """Index of the GPU, None on the CPU."""
        if self.device == "cpu":
            return None
        return int(self.device[5:]) if self.device.startswith("cuda:") else 0

    @property
    def threads(self) -> int:
        """Threads of the server: one for each stream that may be open, and the spare ones."""
        return self.max_streams + self.max_queue + SPARE_THREADS

    def check(self) -> None:
        """Check every value.

        Raises:
            InvalidRequest: naming the field.
        """
        try:
            uuid.UUID(self.worker_id)
        except ValueError:
            raise _refused("worker_id", f"must be a UUID, not {self.worker_id!r}") from None
        check_device(self.device)
        if not self.host:
            raise _refused("host", "must not be empty")
        _within("port", self.port, 0, 65_535)
        _within("max_tokens_in", self.max_tokens_in, 1, 1 << 30)
        _within("max_tokens_out", self.max_tokens_out, 1, 1 << 30)
        _within("inference_timeout_sec", self.inference_timeout_sec, 0.001, 1e9)
        _within("kv_cache_bytes", self.kv_cache_bytes, 1, 1 << 50)
        _within("vram_limit_bytes", self.vram_limit_bytes, 1, 1 << 50)
        if self.vram_limit_bytes is not None and self.device == "cpu":
            raise _refused("vram_limit_bytes", "is for a GPU, not for the CPU")
        _within("context_length", self.context_length, 1, 1 << 40)
        _within("max_streams", self.max_streams, 1, 1024)
        _within("max_queue", self.max_queue, 0, 4096)
        _within("n_threads", self.n_threads, 0, 4096)
        _within("chunk_bytes", self.chunk_bytes, 4096, 1 << 30)
        _within("residency_check_sec", self.residency_check_sec, 0.1, 1e6)
        _within("grace_sec", self.grace_sec, 0.0, EXIT_LIMIT_SEC - 1.0)
        if self.expect_sha256 is not None:
            check_sha256("expect_sha256", self.expect_sha256)
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise _refused("api_key", "must be printable ASCII and not empty")
        if self.log_format not in ("json", "text"):
            raise _refused("log_format", f"must be json or text, not {self.log_format!r}")


def check_device(device: str) -> None:
    """Raise `InvalidRequest` where `device` is not "auto", "cpu" or "cuda:N"."""
    if device in ("auto", "cpu"):
        return
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isascii() or not index.isdigit() or len(index) > 3:
        raise _refused("device", f"must be auto, cpu or cuda:N, not {device!r}")


def check_sha256(name: str, digest: str) -> None:
    """Raise `InvalidRequest` where `digest` is no SHA-256."""
    if not is_sha256(digest):
        raise _refused(name, SHA256_RULE)


def is_sha256(value: object) -> bool:
    """Whether `value` is a SHA-256 as this project writes it, see `SHA256_RULE`."""
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise _refused(name, f"must be {low:g} to {high:g}, not {value}")


def _refused(name: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {rule}", field=name)
