"""Hostile model files: each is refused with one clear error, quickly, in little memory, and nothing is left open."""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import limits
import pytest
from helpers import gguf_forge as g
from helpers.hostile_cases import CASES, SCALES, Case, go_through
from helpers.patience import SANITIZED, clock, patient

from worker_orcd._gguf import GgufFile, check_ranges
from worker_orcd.errors import ModelLoadError
from worker_orcd.gguf import quants
from worker_orcd.gguf.model_file import ModelFile
from worker_orcd.models import plan
from worker_orcd.tokenizer import metadata

TESTS = Path(__file__).resolve().parents[1]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(path: Path, stage: str = "all") -> ModelLoadError:
    """The error a file is refused with, having checked its form and what the refusal cost."""
    before, start = open_files(), clock()
    with pytest.raises(ModelLoadError) as info:
        go_through(str(path), stage)
    seconds = clock() - start
    error = info.value
    assert seconds < limits.REFUSAL_SECONDS, f"took {seconds:.2f} s, limit {limits.REFUSAL_SECONDS}"
    assert open_files() == before
    assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 1000
    offset = error.fields.get("offset")
    assert offset is None or 0 <= offset <= path.stat().st_size
    return error


def test_the_list_is_long_and_its_ids_differ():
    assert len(CASES) >= 200
    assert len({c.id for c in CASES}) == len(CASES)
    classes = {re.match(r"[GT]\d+", c.id)[0] for c in CASES}
    assert classes == {*(f"G{i}" for i in range(1, 19)), *(f"T{i}" for i in range(1, 6))}
    print(f"{len(CASES)} handcrafted files")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_refused(case: Case, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(case.build())
    error = refused(path, case.stage)
    assert re.search(case.says, error.fields["reason"]), error
    if case.id.startswith(tuple(f"G{i}-" for i in range(1, 16))):
        assert isinstance(error.fields.get("offset"), int) or path.stat().st_size == 0


def test_the_unspoiled_files_load(tmp_path):
    for forge in (g.tiny_llama(), g.tiny_vocab(model="gpt2"), g.tiny_vocab(model="llama")):
        for version in (2, 3):
            forge.version = version
            path = tmp_path / "good.gguf"
            path.write_bytes(forge.build())
            with ModelFile(path) as mf:
                assert mf.parts[0].version == version
                assert metadata.validate(mf.metadata) is not None
                if mf.tensors:
                    plan.build(mf)
                    mf.check_tensors()


def run_child(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, so that a signal or its memory is not ours."""
    prelude = f"import os, sys\nsys.path.insert(0, {str(TESTS)!r})\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, text=True, capture_output=True, timeout=patient(60), check=False)


def test_no_refusal_takes_much_memory(tmp_path):
    for i, case in enumerate(CASES):
        (tmp_path / f"{i:04}-{case.stage}").write_bytes(case.build())
    done = run_child("""
        import gc
        from helpers import hostile_cases as t
        from worker_orcd.errors import ModelLoadError
        def status(field):
            with open("/proc/self/status") as f:
                return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))
        worst, start = (0, ""), status("VmRSS")
        for name in sorted(os.listdir(sys.argv[1])):
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")   # the peak is counted from here
            before = status("VmRSS")
            try:
                t.go_through(sys.argv[1] + "/" + name, name.split("-")[1])
            except ModelLoadError:
                worst = max(worst, (status("VmHWM") - before, t.CASES[int(name.split("-")[0])].id))
                continue
            raise SystemExit(name + " was not refused")
        print(worst[0], worst[1], status("VmRSS") - start)
    """, tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    worst, where, kept = done.stdout.split()
    print(
        f"{len(CASES)} refusals: {float(worst):.1f} MiB more ({where}), {float(kept):.1f} kept; "
        f"limit {limits.REFUSAL_MIB}"
    )
    assert SANITIZED or (float(worst) < limits.REFUSAL_MIB and float(kept) < limits.REFUSAL_MIB)


@pytest.mark.parametrize("name", ["llama-Q4_0", "gpt-oss-MXFP4_MOE"])
def test_truncation_at_every_byte_of_the_header(goldens_dir, tmp_path, name):
    path = tmp_path / "cut.gguf"
    path.write_bytes((goldens_dir / f"{name}.gguf").read_bytes())
    with GgufFile(path, quants.BLOCK_SIZES) as file:
        header, size = file.data_offset, file.size
        last = max(t.offset + t.nbytes for t in file.tensors.values())
    lengths = [last - 1, (header + size) // 2, *range(header + 64, -1, -1)]
    slowest, before = 0.0, open_files()
    for length in lengths:
        os.truncate(path, length)
        start = clock()
        try:
            GgufFile(path, quants.BLOCK_SIZES)
        except ModelLoadError as e:
            slowest = max(slowest, clock() - start)
            assert e.fields["reason"] == "is empty" or 0 <= e.fields["offset"] <= length
        else:
            pytest.fail(f"{name} cut to {length} bytes was opened")
    assert open_files() == before
    print(
        f"{len(lengths)} lengths of {name}, slowest refusal {slowest * 1e3:.1f} ms, "
        f"limit {limits.REFUSAL_SECONDS * 1e3:.0f}"
    )
    assert slowest < limits.REFUSAL_SECONDS


def survives(path: Path, what: str) -> bool:
    """Whether a damaged file loads; True and ModelLoadError are the two good answers, within the time limit."""
    start = clock()
    try:
        go_through(str(path))
        fine = True
    except ModelLoadError:
        fine = False
    assert clock() - start < limits.REFUSAL_SECONDS, what
    return fine


def test_numbers_everywhere_replaced_by_extreme_ones(tmp_path):
    """Every 4th byte of a small file's header overwritten with 32- and 64-bit numbers that overflow something."""
    good = g.tiny_llama().build()
    path = tmp_path / "spoiled.gguf"
    path.write_bytes(good)
    with GgufFile(path, quants.BLOCK_SIZES) as file:
        header = file.data_offset
    tries = loaded = 0
    extremes = [struct.pack("<Q", v) for v in (0, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 - 32)]
    extremes += [struct.pack("<I", v) for v in (0, 9, 2**32 - 1)]
    with open(path, "r+b", buffering=0) as out:
        for at in range(4, header - 8, 4):
            for number in extremes:
                os.pwrite(out.fileno(), number, at)
                loaded += survives(path, f"{number.hex()} at {at}")
                os.pwrite(out.fileno(), good[at : at + 8], at)
                tries += 1
    print(f"{tries} files, {loaded} of them still good")
    assert 0 < loaded < tries


@pytest.mark.parametrize("name", ["tiny", "llama-Q4_0", "gpt-oss-MXFP4_MOE", "phi3-Q4_K_M"])
def test_random_damage(goldens_dir, tmp_path, name):
    good = g.tiny_llama().build() if name == "tiny" else (goldens_dir / f"{name}.gguf").read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(good)
    with GgufFile(path, quants.BLOCK_SIZES) as file:
        header = file.data_offset
    rng = random.Random(f"damage {name}")
    loaded = 0
    with open(path, "r+b", buffering=0) as out:
        for i in range(600):
            places = [rng.randrange(header) for _ in range(rng.choice((1, 1, 2, 8)))]
            for at in places:
                os.pwrite(out.fileno(), bytes([rng.choice((rng.randrange(256), good[at] ^ 1 << rng.randrange(8)))]), at)
            loaded += survives(path, f"damage {i} at {places}")
            for at in places:
                os.pwrite(out.fileno(), good[at : at + 1], at)
    print(f"600 damaged files, {loaded} of them still loaded")


def test_the_scales_of_every_quantized_type_are_attacked():
    for type_id, (size, elements, at) in SCALES.items():
        assert quants.BLOCK_SIZES[type_id] == (elements, size)
        assert quants.TYPES[type_id].check_rule == (size, "F16", at)
    others = {t.name: t.number for t in quants.TYPES.values() if t.id not in SCALES}
    assert others == {"F32": "F32", "F16": "F16", "BF16": "BF16", "MXFP4": "E8M0"}


@pytest.mark.parametrize("rule", [(18, "F8", (0,)), (18, "F16", ()), (18, "F16", (0, 2, 4)), (18, "F16", (18,))])
def test_a_rule_that_no_check_can_follow_is_refused(rule, tmp_path):
    with open(tmp_path / "data", "wb+") as file, pytest.raises(ValueError, match="no rule to check numbers by"):
        check_ranges([(file.fileno(), rule, 0, 18)], 1)


# G19: what is at the path


@pytest.mark.parametrize("made, says", [
    ("nothing", "No such file"), ("directory", "is a directory"), ("pipe", "is a pipe"), ("empty", "is empty"),
    ("/dev/zero", "is a character device"), ("/dev/null", "is a character device"), ("loop", "symbolic links"),
    ("socket", "cannot be opened"), ("dangling", "No such file"), ("file/below", "Not a directory"),
    ("name" * 100, "File name too long"),
])  # fmt: skip
def test_g19_no_regular_file(tmp_path, made, says):
    path = tmp_path / "model.gguf"
    if made == "directory":
        path.mkdir()
    elif made == "pipe":
        os.mkfifo(path)
    elif made == "empty":
        path.touch()
    elif made == "loop":
        path.symlink_to(path)
    elif made == "dangling":
        path.symlink_to(tmp_path / "gone")
    elif made == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    elif made == "file/below":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "below"
    elif made.startswith(("/dev", "name")):
        path = tmp_path / made
    before, start = open_files(), clock()
    with pytest.raises(ModelLoadError, match=says):
        ModelFile(path)
    assert clock() - start < limits.REFUSAL_SECONDS
    assert open_files() == before


def test_g19_odd_paths(tmp_path):
    with pytest.raises(ModelLoadError, match="zero byte"):
        ModelFile("a\0b")
    with pytest.raises(ModelLoadError, match="No such file"):
        ModelFile(os.fsencode(tmp_path) + b"/\xff\xfe.gguf")
    path = tmp_path / "a name \u00e9\u4e2d.gguf"
    path.write_bytes(g.tiny_llama().build())
    with ModelFile(path) as mf:
        assert mf.path == str(path)


def test_g19_no_permission(tmp_path):
    """In a child, which gives up root where it has it."""
    path = tmp_path / "secret.gguf"
    path.write_bytes(g.tiny_llama().build())
    path.chmod(0)
    done = run_child("""
        from worker_orcd.gguf.model_file import ModelFile
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            ModelFile(sys.argv[1])
        except Exception as e:
            print(type(e).__name__, e)
    """, path)  # fmt: skip
    assert done.stdout.startswith("ModelLoadError") and "Permission denied" in done.stdout, done.stderr


# G19: the file changes while it is open


def spoil_open_file(path: Path, how: str) -> None:
    if how == "cut":
        os.truncate(path, 5000)
    elif how == "grown":
        with open(path, "ab") as f:
            f.write(b"x")
    elif how == "written":
        with open(path, "r+b") as f:
            f.seek(20000)
            f.write(b"x")
        os.utime(path)
    elif how == "replaced":
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
    elif how == "removed":
        path.unlink()


@pytest.mark.parametrize("how, says", [
    ("cut", "was cut from 40352 to 5000 bytes"), ("grown", "was written to"), ("written", "was written to"),
    ("replaced", "was replaced"), ("removed", "no longer at its path"),
])  # fmt: skip
def test_g19_changes_of_an_open_file_are_noticed(tmp_path, how, says):
    path = tmp_path / "model.gguf"
    path.write_bytes(g.tiny_llama().build())
    os.utime(path, (1, 1))
    with ModelFile(path) as mf:
        mf.check_unchanged()
        spoil_open_file(path, how)
        with pytest.raises(ModelLoadError, match=says):
            mf.check_unchanged()
        if how in ("replaced", "removed"):
            mf.check_unchanged(same_path=False)
        else:
            with pytest.raises(ModelLoadError, match=says):
                mf.check_unchanged(same_path=False)
        with pytest.raises(ModelLoadError, match="is cut" if how == "cut" else says):
            mf.check_tensors()


def run_with_open_model(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a child with `mf` an open model of 40352 bytes at `path`, and `view` a tensor at its end."""
    path = tmp_path / "model.gguf"
    path.write_bytes(g.tiny_llama().build())
    opening = """
        import mmap, threading
        from worker_orcd.errors import ModelLoadError
        from worker_orcd.gguf.model_file import ModelFile
        path = sys.argv[1]
        mf = ModelFile(path)
        view = mf.view("blk.0.ffn_down.weight")
    """
    return run_child(textwrap.dedent(opening) + textwrap.dedent(code), path)


def test_g19_reading_a_cut_mapping_is_an_error_and_no_crash(tmp_path):
    done = run_with_open_model("""
        before = os.stat(path)
        os.truncate(path, 5000)
        threads = [threading.Thread(target=bytes, args=(mf.view(n),)) for n in mf.tensors for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert bytes(view) == bytes(len(view))
        os.truncate(path, before.st_size)   # even where size and time are as they were, the cut is remembered
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        try:
            mf.check_unchanged()
        except ModelLoadError as e:
            print(e)
        mf.close()
        assert bytes(view) == bytes(len(view))
        ModelFile(path).check_unchanged()   # a new mapping starts afresh
    """, tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "could not be read everywhere" in done.stdout


@pytest.mark.skipif(SANITIZED, reason="the sanitizer has a say in signals")
@pytest.mark.parametrize("also", ["", "import faulthandler; faulthandler.enable()"])
def test_g19_other_bus_errors_still_end_the_process(tmp_path, also):
    other = tmp_path / "other"
    other.write_bytes(bytes(8192))
    done = run_with_open_model(f"""
        {also}
        f = open({str(other)!r}, "r+b")
        m = mmap.mmap(f.fileno(), 8192)
        os.truncate({str(other)!r}, 0)
        m[5000]
    """, tmp_path)  # fmt: skip
    assert done.returncode == -signal.SIGBUS, (done.returncode, done.stderr)


@pytest.mark.skipif(SANITIZED, reason="the sanitizer has a say in signals")
def test_g19_a_bus_error_sent_by_somebody_still_ends_the_process(tmp_path):
    done = run_with_open_model("os.kill(os.getpid(), 7)", tmp_path)
    assert done.returncode == -signal.SIGBUS, (done.returncode, done.stderr)


def test_g19_a_file_that_is_cut_and_written_all_the_time(tmp_path):
    """Opened and read while another process cuts it and writes it again: loads or errors, never a signal."""
    path = tmp_path / "model.gguf"
    path.write_bytes(g.tiny_llama().build())
    done = run_child("""
        import random, threading, time
        from helpers import hostile_cases as t
        from worker_orcd.errors import ModelLoadError
        good = open(sys.argv[1], "rb").read()
        pid = os.fork()
        if pid == 0:
            rng = random.Random(1)
            fd = os.open(sys.argv[1], os.O_RDWR)
            while os.getppid() != 1:
                os.ftruncate(fd, rng.choice((0, 100, 3000, 5000, 30000)))
                time.sleep(rng.random() * 0.001)
                os.pwrite(fd, good, 0)
                time.sleep(rng.random() * 0.001)
        end = time.monotonic() + 2
        loads = errors = 0
        try:
            while time.monotonic() < end or not errors:
                try:
                    with t.ModelFile(sys.argv[1]) as mf:
                        for name in mf.tensors:
                            bytes(mf.view(name))
                    t.go_through(sys.argv[1])
                    loads += 1
                except ModelLoadError:
                    errors += 1
        finally:
            os.kill(pid, 9)
        print(loads, errors)
    """, path)  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    loads, errors = map(int, done.stdout.split())
    print(f"{loads} loads and {errors} errors in 2 s")
    assert errors > 0
