"""ServeConfig: everything the HTTP worker is told at start-up, checked before anything else happens; and the limits of
requests.

A field carries its `Flag`: help, range and name on the command line, from which `cli` makes the options. So a serve
option is a field here and the place that uses it.
"""

from __future__ import annotations

import ipaddress
import os
import uuid
from dataclasses import dataclass, field, fields
from typing import Any

from worker_orcd.errors import InvalidRequest, quoted

#: characters of a prompt a request may hold
MAX_PROMPT_CHARS = 32_768
#: characters of a job id
MAX_JOB_ID_CHARS = 256
#: characters of the name that a model is served under
MAX_MODEL_NAME_CHARS = 256
#: tokens generated where a request names no number, and the most a server gives where it is told no other limit
DEFAULT_MAX_TOKENS = 2048
#: stop strings of a request, and tokens of each
MAX_STOPS, MAX_STOP_TOKENS = 4, 32
#: characters of a stop string where they count and not its tokens, in the OpenAI-compatible API
MAX_STOP_CHARS = 256
#: entries of a logit bias, tokens that end a request beside the model's, tokens of all its bad words and of each
MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_BAD_WORD_TOKENS, MAX_TOKENS_OF_A_BAD_WORD = 1024, 128, 1024, 32
#: most likely tokens whose log-probabilities a request may want with each token
MAX_LOGPROBS = 20
#: share of a GPU's memory that a process takes at most where nobody says another
GPU_MEMORY_UTILIZATION = 0.92
#: bytes of a request body; more is refused before it is parsed
MAX_BODY_BYTES = 1 << 20
#: threads beyond those that answers given whole keep: health probes, cancels, refusals, beginnings of streams
SPARE_THREADS = 8
#: seconds within which a stopping process is gone, whatever hangs
EXIT_LIMIT_SEC = 5.0
#: among allowed hosts or origins: any
ANY = "*"
SHA256_RULE = "must be 64 lowercase hexadecimal digits"


@dataclass(frozen=True)
class Flag:
    """How a value is given on the command line, and its rule.

    Attributes:
        help: what it is, and its default where that is no value.
        metavar: what stands for a value in the help.
        kind: str, int, float or bool.
        least, most: the ends of its range, both in it.
        usage: which of them the command line knows: a number past one is wrong usage. "both", "least" or "none".
        name: of the flag, without "--"; "": the field's.
        aliases: other names of the flag.
        unit: what one of the flag's numbers is of the field's: 1 << 20 where MiB are given for bytes.
        choices: the values it may have; (): any.
        chosen: it has no fixed default on the command line: who runs it chooses one.
        guard: it protects something, so a variable that is set but empty is refused and not taken as absent.
        many: it may be given several times; its variable holds values with blanks between them.
    """

    help: str
    metavar: str = ""
    kind: type = str
    least: float | None = None
    most: float | None = None
    usage: str = "both"
    name: str = ""
    aliases: tuple[str, ...] = ()
    unit: int = 1
    choices: tuple[str, ...] = ()
    chosen: bool = False
    guard: bool = False
    many: bool = False


def _flag(help: str, metavar: str = "", kind: type = str, *args: Any, **settings: Any) -> dict[str, Flag]:
    return {"flag": Flag(help, metavar, kind, *args, **settings)}


@dataclass(frozen=True)
class ServeConfig:
    """Start-up values of the worker, each with its flag of `worker-orcd serve`.

    Numbers are seconds, bytes or counts as named; None means "what fits". `progress_bar` alone has no flag: a command
    on a terminal shows loading so, instead of as log events.
    """

    model: str = field(metadata=_flag("The GGUF file.", "FILE"))
    served_model_name: str | None = field(
        default=None,
        metadata=_flag("Name of the model in answers and health. Default: the one in the file.", "NAME"),
    )
    worker_id: str = field(
        default_factory=lambda: str(uuid.uuid4()),
        metadata=_flag("Name of this worker in its log and health. Default: made up.", "UUID", chosen=True),
    )
    device: str = field(
        default="auto",
        metadata=_flag("cpu, cuda:N, or auto: cuda:0 where there is a driver and a GPU, an error elsewhere.", "DEVICE"),
    )
    host: str = field(default="127.0.0.1", metadata=_flag("Address to listen on.", "ADDRESS"))
    port: int = field(
        default=8080,
        metadata=_flag("Port to listen on; 0 lets the system choose one, which the log tells.", "N", int, 0, 65_535),
    )
    max_tokens_in: int | None = field(
        default=None,
        metadata=_flag("Tokens of a prompt. Default: what the context holds.", "N", int, 1, 1 << 30, "least"),
    )
    max_tokens_out: int = field(
        default=DEFAULT_MAX_TOKENS,
        metadata=_flag("Limit of a request's max_tokens.", "N", int, 1, 1 << 30, "least"),
    )
    inference_timeout_sec: float = field(
        default=300.0,
        metadata=_flag("A job that takes longer ends with INFERENCE_TIMEOUT.", "S", float, 0.001, 1e9, "none"),
    )
    context_length: int | None = field(
        default=None,
        metadata=_flag(
            "Positions a sequence may reach. Default: as many as the file says and the KV cache holds.",
            "N",
            int,
            1,
            1 << 40,
            "least",
        ),
    )
    kv_cache_bytes: int | None = field(
        default=None,
        metadata=_flag(
            "Size of the KV cache in MiB. Default: what fits.",
            "MB",
            int,
            1,
            1 << 50,
            "least",
            name="kv-cache-size-mb",
            unit=1 << 20,
        ),
    )
    vram_limit_bytes: int | None = field(
        default=None,
        metadata=_flag(
            "MiB of the GPU's memory that the model may take in all. Default: what --gpu-memory-utilization allows.",
            "MB",
            int,
            1,
            1 << 50,
            "least",
            name="vram-limit-mb",
            unit=1 << 20,
        ),
    )
    gpu_memory_utilization: float = field(
        default=GPU_MEMORY_UTILIZATION,
        metadata=_flag(
            "Share of the GPU's memory that this process may take at most; never more than what is free.",
            "SHARE",
            float,
            0.01,
            1.0,
        ),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=_flag("A tokenizer.json (or another GGUF file) in the place of the file's own vocabulary.", "FILE"),
    )
    check_tensors: bool = field(
        default=True,
        metadata=_flag(
            "Refuse NaN and infinity in norms, biases and block scales while loading. Default: check.", kind=bool
        ),
    )
    prefix_cache: bool = field(
        default=True,
        metadata=_flag(
            "Compute what a prompt begins with only once, as far as the KV cache still holds it. Default: do.",
            kind=bool,
        ),
    )
    expect_sha256: str | None = field(
        default=None, metadata=_flag("The digest the model file must have.", "HEX", guard=True)
    )
    trusted_models: str | None = field(
        default=None,
        metadata=_flag(
            "JSON list of the models that may be loaded, as the command provenance writes its entries; any other is "
            "refused.",
            "FILE",
            guard=True,
        ),
    )
    max_seqs: int = field(
        default=32,
        metadata=_flag(
            "Sequences decoded together; a GPU takes up to 256.", "N", int, 1, 1024, aliases=("max-streams",)
        ),
    )
    max_queue: int = field(
        default=64,
        metadata=_flag("Jobs that may wait beyond those; more are answered 429.", "N", int, 0, 4096),
    )
    n_threads: int = field(
        default=0,
        metadata=_flag(
            "Threads of the CPU engine; 0: one for each core that the process may use.",
            "N",
            int,
            0,
            4096,
            name="threads",
        ),
    )
    chunk_bytes: int = field(
        default=1 << 20, metadata=_flag("Bytes of one host-to-device copy.", "N", int, 4096, 1 << 30)
    )
    residency_check_sec: float = field(
        default=60.0,
        metadata=_flag(
            "Time between looks at whether the model's memory is still on the GPU.", "S", float, 0.1, 1e6, "least"
        ),
    )
    watchdog_sec: float = field(
        default=30.0,
        metadata=_flag(
            "The worker ends with exit code 70 where its engine finishes no step for so long and has work; 0: never.",
            "S",
            float,
            0,
            1e6,
            "least",
        ),
    )
    api_key: str | None = field(
        default=None,
        metadata=_flag(
            "Ask for 'Authorization: Bearer KEY' on all but /health, /ready and the page's files. Better given as "
            "variable.",
            "KEY",
            guard=True,
        ),
    )
    allow_unauthenticated: bool = field(
        default=False,
        metadata=_flag("Listen beyond this machine without --api-key: whoever reaches it may use it.", kind=bool),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            "A name by which clients may call the worker beside its own, with or without a port: of a proxy, a "
            "container, a service. May be repeated.",
            "HOST",
            name="allowed-host",
            many=True,
        ),
    )
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            "A web page's origin, like https://app.example, that may use the worker from a browser. May be repeated.",
            "ORIGIN",
            name="cors-origin",
            many=True,
        ),
    )
    log_format: str = field(
        default="json",
        metadata=_flag(
            "Form of the log on stderr. Default: text on a terminal, else json.", choices=("json", "text"), chosen=True
        ),
    )
    grace_sec: float = field(
        default=4.0,
        metadata=_flag("Time running jobs get to finish after SIGTERM or Ctrl-C.", "S", float, 0, EXIT_LIMIT_SEC - 1),
    )
    print_curl: bool = field(
        default=False, metadata=_flag("Print a ready curl line once jobs are accepted.", kind=bool)
    )
    progress_bar: bool = False

    @property
    def gpu_device(self) -> int | None:
        """Index of the GPU, None on the CPU."""
        if self.device == "cpu":
            return None
        return int(self.device[5:]) if self.device.startswith("cuda:") else 0

    @property
    def max_streams(self) -> int:
        """Streams that may be open: one for each job that may be."""
        return self.max_seqs + self.max_queue

    @property
    def threads(self) -> int:
        """Threads of the server at most: one for each answer given whole that may be under way, and the spare ones."""
        return self.max_streams + SPARE_THREADS

    @property
    def is_open(self) -> bool:
        """Whether others than this machine may be let in: they need a key, or were said to need none."""
        return self.api_key is not None or self.allow_unauthenticated

    def check_reach(self, address: str) -> None:
        """Refuse to listen on `address` where that lets in others who need no key, and nobody said that they may.

        Raises:
            InvalidRequest: naming the host.
        """
        if not (self.is_open or is_loopback(address)):
            raise _refused(
                "host",
                f"{quoted(self.host)} can be reached from other machines, and there is no API key: give --api-key "
                f"(better as the variable WORKER_ORCD_API_KEY), or --allow-unauthenticated where everybody is meant",
            )

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
        name = self.served_model_name
        if name is not None and not (0 < len(name) <= MAX_MODEL_NAME_CHARS and name.isprintable() and name.strip()):
            raise _refused("served_model_name", f"must be 1 to {MAX_MODEL_NAME_CHARS} printable characters")
        if not self.host:
            raise _refused("host", "must not be empty")
        if is_address(self.host):
            self.check_reach(self.host)
        for name in ("allowed_hosts", "cors_origins"):
            if ANY in getattr(self, name) and not self.is_open:
                raise _refused(name, f"may be {ANY} only with --api-key or --allow-unauthenticated")
        for name in FLAGS:
            check_range(name, getattr(self, name))
        if self.vram_limit_bytes is not None and self.device == "cpu":
            raise _refused("vram_limit_bytes", "is for a GPU, not for the CPU")
        if self.expect_sha256 is not None:
            check_sha256("expect_sha256", self.expect_sha256)
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise _refused("api_key", "must be printable ASCII, not empty, and without blanks at its ends")
        if self.trusted_models == "":
            raise _refused("trusted_models", "must not be empty")
        formats = FLAGS["log_format"].choices
        if self.log_format not in formats:
            raise _refused("log_format", f"must be {' or '.join(formats)}, not {self.log_format!r}")


#: the flag of each field that has one, by the field's name, in the order of the fields
FLAGS: dict[str, Flag] = {f.name: f.metadata["flag"] for f in fields(ServeConfig) if "flag" in f.metadata}


def file_path(name: str, value: object) -> str:
    """The argument `name`, a path as text or `os.PathLike`, as text, with a leading ~ as the user's home.

    Raises:
        InvalidRequest: it is no path, or holds a NUL character, which would end it, or a lone surrogate.
    """
    try:
        path = str.__str__(os.fsdecode(value))  # type: ignore[arg-type]  # of a subclass of str the text alone
        os.fsencode(path)
    except TypeError:
        raise _refused(name, f"must be a path, not {type(value).__name__}") from None
    except UnicodeEncodeError:
        raise _refused(name, "holds a surrogate code point, which no path can") from None
    if "\0" in path:
        raise _refused(name, "holds a NUL character, which no path can")
    return os.path.expanduser(path)


def is_address(host: str) -> bool:
    """Whether `host` is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether `host` is an address of loopback, or `localhost`. Other names are not looked up."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".") == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_device(device: str) -> None:
    """Raise `InvalidRequest` where `device` is not "auto", "cpu", "cuda" or "cuda:N"."""
    if not isinstance(device, str):
        raise _refused("device", f"must be auto, cpu or cuda:N, not {type(device).__name__}")
    if device in ("auto", "cpu", "cuda"):
        return
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index.isascii() or not index.isdigit() or len(index) > 3:
        raise _refused("device", f"must be auto, cpu or cuda:N, not {quoted(device)}")


def check_sha256(name: str, digest: str) -> None:
    """Raise `InvalidRequest` where `digest` is no SHA-256."""
    if not is_sha256(digest):
        raise _refused(name, SHA256_RULE)


def is_sha256(value: object) -> bool:
    """Whether `value` is a SHA-256 as this project writes it, see `SHA256_RULE`."""
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def check_range(name: str, value: float | None) -> None:
    """Raise `InvalidRequest` where `value` is outside the range of the field `name`; None never is."""
    flag = FLAGS[name]
    if value is None or flag.least is None or flag.most is None:
        return
    if not flag.least <= value <= flag.most:
        shown = value if abs(value) < 1e30 else "a number of more than 30 digits"  # an int of thousands has no text
        raise _refused(name, f"must be {flag.least:g} to {flag.most:g}, not {shown}")


def _refused(name: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {rule}", field=name)
