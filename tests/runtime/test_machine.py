"""What the machine allows: affinity, and control groups of both versions, nested, hidden and broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from worker_orcd import machine
from worker_orcd.machine import free_memory, usable_cores

MIB = 1 << 20
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)


@pytest.fixture(autouse=True)
def affinity(monkeypatch):
    """16 cores, wherever the tests run."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.fixture
def root(tmp_path):
    """(groups, mounts, {file below /sys/fs/cgroup: text}) -> a folder that stands for "/"."""

    def make(groups: str, mounts: str, files: dict[str, str], meminfo: str = "MemAvailable:  1048576 kB") -> Path:
        written = {
            "proc/self/cgroup": groups,
            "proc/self/mountinfo": f"22 1 0:5 / / rw - ext4 /dev/sda rw\n{mounts}",
            "proc/meminfo": f"MemTotal: 9999999 kB\n{meminfo}",
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        }
        for name, text in written.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("1000 100000", 1),
        ("9900000 100000", 16),
        ("50000", 16),
        ("", 16),
        ("0 100000", 16),
        ("-1 100000", 16),
        ("200000 0", 16),
        ("two hundred", 16),
        ("²00000 100000", 16),
    ],
)
def test_the_quota_of_version_2(root, text, cores):
    assert usable_cores(root("0::/", V2, {"cpu.max": text})) == cores


def test_the_smallest_quota_of_nested_groups_counts(root):
    files = {"a/b/c/cpu.max": "800000 100000", "a/b/cpu.max": "max 100000", "a/cpu.max": "30000 10000"}
    assert usable_cores(root("0::/a/b/c", V2, files)) == 3
    assert usable_cores(root("0::/a/b/c", V2, {**files, "a/b/c/cpu.max": "150000 100000"})) == 2
    assert usable_cores(root("0::/other", V2, files)) == 16


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("400000", 4), ("350001", 4), ("5000", 1), ("nan", 16)])
def test_the_quota_of_version_1(root, quota, cores):
    groups = "9:name=systemd:/x\n5:cpuset:/x\n4:cpu,cpuacct:/x/y\n0::/"
    files = {
        "cpu,cpuacct/x/y/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/x/y/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/x/cpu.cfs_quota_us": quota,
        "cpu,cpuacct/x/cpu.cfs_period_us": "100000",
        "cpuset/x/cpu.cfs_quota_us": "100000",
        "cpuset/x/cpu.cfs_period_us": "100000",
    }
    assert usable_cores(root(groups, V1, files)) == cores


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/inner", "/", "/../elsewhere"])
def test_a_container_that_is_shown_its_own_part_of_the_hierarchy(root, path):
    mount = "30 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw"
    assert usable_cores(root(f"0::{path}", mount, {"cpu.max": "200000 100000"})) == 2


def test_affinity_alone_where_nothing_else_is_told(root, tmp_path, monkeypatch):
    assert usable_cores(tmp_path) == 16
    for mounts in ("", "garbage", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2", "-"):
        assert usable_cores(root("0::/\nnonsense\n\0:\0", mounts, {"cpu.max": "100000 100000"})) == 16
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3})
    assert usable_cores(root("0::/", V2, {"cpu.max": "800000 100000"})) == 1


def test_a_limit_that_is_no_file_sets_none(root, tmp_path):
    base = root("0::/", V2, {})
    (tmp_path / "sys/fs/cgroup/cpu.max").mkdir(parents=True)
    assert usable_cores(base) == 16


def test_memory_of_the_system_and_of_the_group(root):
    free = 1024 * MIB
    assert free_memory(root("0::/", V2, {})) == free
    assert free_memory(root("0::/", V2, {"memory.max": "max", "memory.current": "1"})) == free
    files = {"g/memory.max": str(500 * MIB), "g/memory.current": str(400 * MIB)}
    assert free_memory(root("0::/g", V2, files)) == 100 * MIB
    files["g/memory.stat"] = f"anon 7\nactive_file {50 * MIB}\ninactive_file {200 * MIB}"
    assert free_memory(root("0::/g", V2, files)) == 350 * MIB, "pages of files are given back"
    files["g/memory.current"] = str(900 * MIB)
    assert free_memory(root("0::/g", V2, files)) == 0
    assert free_memory(root("0::/g", V2, {}, meminfo="MemFree: 1 kB")) == 0, "the group alone tells"


def test_memory_of_a_group_of_version_1(root):
    files = {"memory/m/memory.limit_in_bytes": str(300 * MIB), "memory/m/memory.usage_in_bytes": str(100 * MIB)}
    assert free_memory(root("4:memory:/m", V1, files)) == 200 * MIB
    files = {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "5"}
    assert free_memory(root("4:memory:/", V1, files)) == 1024 * MIB


def test_nobody_tells_of_memory(tmp_path):
    assert free_memory(tmp_path) is None


def test_this_machine():
    assert 1 <= usable_cores() <= 16
    assert (free_memory() or 0) > 0 and os.path.exists("/proc/meminfo")


def test_nobody_else_counts_cores():
    """A second way to count them would be one without the quota."""
    tree = Path(__file__).resolve().parents[2]
    files = [tree / "setup.py"]
    for folder in ("worker_orcd", "wsgi", "pyx", "csrc", "tools"):
        files += [f for f in (tree / folder).rglob("*") if f.suffix in (".py", ".pyx", ".pxi", ".pxd", ".h", ".cpp")]
    count = re.compile(r"cpu_count|getaffinity|hardware_concurrency|_SC_NPROCESSORS|get_nprocs")
    assert [f.name for f in files if count.search(f.read_text())] == ["machine.py"]


#: what is left of 40 MB that a thread took and gave back. Before that it gave back a large block, after which glibc
#: (2.36), left to itself, would keep all of it, even where it is asked to give everything back
HEAP_PROGRAM = """
import ctypes, os, sys, threading
from worker_orcd import machine
machine.share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def take(n):
    block = libc.malloc(n)
    ctypes.memset(block, 1, n)
    return block

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def work():
    libc.free(take(30 << 20))
    blocks = [0] * 80
    before = resident()
    for i in range(80):
        blocks[i] = take(500_000)
    for block in blocks:
        libc.free(block)
    machine.give_back_memory()
    print(resident() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(os.environ.get("WORKER_ORCD_SANITIZED") == "1", reason="its allocator is not glibc's")
def test_heaps_that_are_shared_keep_little_of_what_is_free():
    command = [sys.executable, "-P", "-c", HEAP_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 4 * MIB


def test_memory_goes_back_where_the_allocator_can_do_that():
    assert machine._of_glibc("malloc_trim")(0) in (0, 1)
    assert machine._of_glibc("no_such_function")(1, 2) is None
    machine.give_back_memory()
