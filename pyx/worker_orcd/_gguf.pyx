# distutils: language = c++
"""GGUF files: mapped read-only, parsed with bounds checked in one place, tensors as zero-copy views.

What it is for: everything that reads a model starts here, and a model file is untrusted input. The parse and all its
size arithmetic are C++ (csrc/host/gguf.h); this module maps the file (csrc/host/mapping.h: a cut file is an error, no
SIGBUS), turns the result into Python objects, and decodes metadata when somebody asks. It does not know what a key or a
tensor means.
"""

import os
import stat
from collections.abc import ItemsView, KeysView, Mapping, ValuesView

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.unordered_map cimport unordered_map
from libcpp.vector cimport vector
from posix.unistd cimport close as posix_close

from worker_orcd.errors import ModelLoadError, excerpt, quoted


cdef extern from "host/gguf.h" namespace "gguf" nogil:
    enum:
        U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64

    cppclass Fault:
        uint64_t offset
        string reason

    cppclass Value:
        string key
        uint32_t type
        uint32_t elem
        uint64_t count
        uint64_t offset
        uint64_t end

    cppclass Tensor:
        string name
        uint32_t type
        uint32_t n_dims
        uint64_t dims[4]
        uint64_t offset
        uint64_t nbytes

    cppclass BlockSize:
        uint64_t elements
        uint64_t bytes

    cppclass Header:
        uint32_t version
        uint64_t alignment
        uint64_t data_offset
        vector[Value] values
        vector[Tensor] tensors

    uint64_t scalar_bytes(uint32_t type)
    cbool parse(const uint8_t* base, uint64_t size, const unordered_map[uint32_t, BlockSize]& blocks, Header& header,
                Fault& fault) noexcept
    cbool next_string(const uint8_t* base, uint64_t end, uint64_t* at, uint64_t* start, uint64_t* length) noexcept


cdef extern from "host/mapping.h" namespace "mapping" nogil:
    int map_file(int fd, uint64_t size, const uint8_t** base)
    void unmap(int slot, uint64_t size)
    cbool slot_was_cut "mapping::was_cut"(int slot) noexcept


cdef extern from "host/tensor_check.h" namespace "check" nogil:
    cppclass FileRange:
        int fd
        Rule rule
        uint64_t offset
        uint64_t nbytes

    cppclass CheckFault "check::Fault":
        int kind
        int error
        size_t range
        uint64_t offset

    CheckFault check_run "check::run"(const FileRange* ranges, size_t n_ranges, int n_threads) noexcept


_TYPE_NAMES = {
    U8: "uint8", I8: "int8", U16: "uint16", I16: "int16", U32: "uint32", I32: "int32", F32: "float32", BOOL: "bool",
    STRING: "string", ARRAY: "array", U64: "uint64", I64: "int64", F64: "float64",
}  # fmt: skip
#: how a number may be written, see `check_ranges`
_NUMBERS = {"F32": CHECK_F32, "F16": CHECK_F16, "BF16": CHECK_BF16, "E8M0": CHECK_E8M0}
#: types whose weights may be too large for a GPU
_K_QUANTS = {"Q2_K": CHECK_Q2_K, "Q3_K": CHECK_Q3_K, "Q4_K": CHECK_Q4_K, "Q5_K": CHECK_Q5_K, "Q6_K": CHECK_Q6_K}
#: what `check_ranges` says of a fault, by its kind
CHECK_REASONS = {
    1: "holds NaN or infinity", 2: "holds NaN or infinity in a block scale", 3: "holds the E8M0 scale 255 (NaN)",
    4: "is cut: the file ends inside it", 6: "is no run of whole blocks",
    7: "has a block of weights above 4,094, which a GPU cannot multiply; the CPU engine takes it (--device cpu)",
}  # fmt: skip


cdef class FileMapping:
    """Bytes [0, size) of an open file, mapped read-only until the last view of them is gone."""

    cdef const uint8_t* base  # uint8 [size]
    cdef uint64_t size
    cdef int slot             # of mapping.h's table; -1: nothing mapped

    def __cinit__(self):
        self.slot = -1

    def __dealloc__(self):
        if self.slot >= 0:
            unmap(self.slot, self.size)

    cdef bint was_cut(self) noexcept nogil:
        return self.slot >= 0 and slot_was_cut(self.slot)


cdef FileMapping _map(int fd, uint64_t size, str path):
    cdef FileMapping m = FileMapping()
    cdef int slot = map_file(fd, size, &m.base)
    if slot < 0:
        raise ModelLoadError(f"cannot be mapped: {os.strerror(-slot)}", path)
    m.slot = slot
    m.size = size
    return m


cdef class _Bytes:
    """Buffer exporter of a range of a mapping; what keeps the mapping alive under a memoryview."""

    cdef FileMapping mapping
    cdef uint64_t offset, nbytes

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("a model file is read-only")
        PyBuffer_FillInfo(buffer, self, <void*>(self.mapping.base + self.offset), <Py_ssize_t>self.nbytes, 1, flags)


class TensorInfo:
    """One record of the tensor table.

    Attributes:
        name: the tensor's name.
        shape: dimensions in GGUF order, row length first; trailing ones mean nothing and are dropped, as ggml does.
        type_id: ggml type id.
        offset: of its first byte in its file.
        nbytes: its size in bytes.
    """

    __slots__ = ("name", "shape", "type_id", "offset", "nbytes")

    def __init__(self, name: str, shape: tuple[int, ...], type_id: int, offset: int, nbytes: int) -> None:
        self.name = name
        self.shape = shape
        self.type_id = type_id
        self.offset = offset
        self.nbytes = nbytes

    def __repr__(self) -> str:
        return (f"TensorInfo({self.name!r}, {self.shape}, type {self.type_id}, offset {self.offset}, "
                f"{self.nbytes} bytes)")


cdef object _number(const uint8_t* p, uint32_t type):
    cdef uint16_t u16
    cdef uint32_t u32
    cdef uint64_t u64
    cdef float f32
    cdef double f64
    if type == U8:
        return p[0]
    if type == I8:
        return <int8_t>p[0]
    if type == BOOL:
        return p[0] != 0
    if type == U16 or type == I16:
        memcpy(&u16, p, 2)
        return u16 if type == U16 else <int16_t>u16
    if type == U32 or type == I32:
        memcpy(&u32, p, 4)
        return u32 if type == U32 else <int32_t>u32
    if type == F32:
        memcpy(&f32, p, 4)
        return f32
    if type == F64:
        memcpy(&f64, p, 8)
        return f64
    memcpy(&u64, p, 8)
    return u64 if type == U64 else <int64_t>u64


cdef class Metadata:
    """The key-values of a file, in file order: a Mapping, decoded on each access (so keep what you use twice).

    Scalars are int, float, bool or str, arrays are lists of them. A string that is not UTF-8 raises ModelLoadError
    naming key, index and offset, where it is accessed and nowhere else.
    """

    cdef FileMapping mapping
    cdef vector[Value] entries
    cdef dict index
    cdef readonly str path

    cdef object changed(self, str key, uint64_t at):
        return ModelLoadError(f"key {quoted(key)} was changed after the file was opened", self.path, at,
                              field=excerpt(key))

    cdef list strings(self, str key, uint64_t* at, uint64_t end, uint64_t count, bint single):
        """`count` strings from `at` on; UTF-8 faults name key, index and offset."""
        cdef uint64_t i, start, length
        cdef const uint8_t* base = self.mapping.base
        cdef list out = []
        for i in range(count):
            if not next_string(base, end, at, &start, &length):
                raise self.changed(key, at[0])
            try:
                out.append(PyUnicode_DecodeUTF8(<const char*>base + start, <Py_ssize_t>length, NULL))
            except UnicodeDecodeError as e:
                index = "" if single else f"[{i}]"
                raise ModelLoadError(f"key {quoted(key)}{index} is not UTF-8", self.path, start + e.start,
                                     field=excerpt(key)) from None
        return out

    cdef list numbers(self, uint64_t at, uint32_t type, uint64_t count):
        """`count` scalars from `at` on, which the parse found inside the file."""
        cdef uint64_t i, step = scalar_bytes(type)
        cdef const uint8_t* p = self.mapping.base + at
        cdef list out = []
        for i in range(count):
            out.append(_number(p + i * step, type))
        return out

    cdef list nested(self, str key, Value* v, uint64_t limit):
        """An array of arrays; its inner headers are read again, so they are checked again."""
        cdef uint64_t _, at = v.offset, count, step
        cdef uint32_t elem
        cdef const uint8_t* base = self.mapping.base
        cdef list out = []
        for _ in range(min(v.count, limit)):
            if v.end - at >= 12:
                memcpy(&elem, base + at, 4)
                memcpy(&count, base + at + 4, 8)
                at += 12
                if elem == STRING:
                    out.append(self.strings(key, &at, v.end, count, False))
                    continue
                step = scalar_bytes(elem)
                if step and count <= (v.end - at) // step:
                    out.append(self.numbers(at, elem, count))
                    at += count * step
                    continue
            raise self.changed(key, at)
        return out

    cdef Value* find(self, key) except NULL:
        return &self.entries[<size_t>self.index[key]]

    def head(self, str key not None, uint64_t n) -> object:
        """As `self[key]`, but of an array only the first `n` elements are decoded."""
        cdef Value* v = self.find(key)
        cdef uint64_t at = v.offset
        if self.mapping is None:
            raise ValueError(f"{self.path} is closed")
        if v.type == STRING:
            return self.strings(key, &at, v.end, 1, True)[0]
        if v.type != ARRAY:
            return _number(self.mapping.base + at, v.type)
        if v.elem == STRING:
            return self.strings(key, &at, v.end, min(v.count, n), False)
        if v.elem == ARRAY:
            return self.nested(key, v, n)
        return self.numbers(at, v.elem, min(v.count, n))

    def __getitem__(self, str key not None) -> object:
        return self.head(key, self.find(key).count)

    def get(self, str key not None, default=None) -> object:
        """The value of `key`, or `default` where the file lacks it."""
        return self[key] if key in self.index else default

    def __contains__(self, key) -> bool:
        return key in self.index

    def __iter__(self):
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def keys(self) -> KeysView:
        """The keys."""
        return KeysView(self)

    def values(self) -> ValuesView:
        """The values, decoded while they are iterated over."""
        return ValuesView(self)

    def items(self) -> ItemsView:
        """(key, value) pairs, decoded while they are iterated over."""
        return ItemsView(self)

    def value_type(self, str key not None) -> str:
        """The type a value is stored as: "uint32", "string", "array[string]", "array[array]", ..."""
        cdef Value* v = self.find(key)
        return f"array[{_TYPE_NAMES[v.elem]}]" if v.type == ARRAY else _TYPE_NAMES[v.type]

    def array_len(self, str key not None) -> int:
        """Elements of an array.

        Raises:
            TypeError: the value is no array.
        """
        cdef Value* v = self.find(key)
        if v.type != ARRAY:
            raise TypeError(f"{key} is no array but {self.value_type(key)}")
        return v.count

    def offset(self, str key not None) -> int:
        """Byte offset of a value in the file; of an array that of its first element."""
        return self.find(key).offset

    def raw(self, str key not None) -> bytes:
        """A value as it is stored: of an array its elements one after another, strings with their lengths."""
        cdef Value* v = self.find(key)
        if self.mapping is None:
            raise ValueError(f"{self.path} is closed")
        return (<const char*>self.mapping.base + v.offset)[:v.end - v.offset]


Mapping.register(Metadata)


cdef Metadata _metadata(FileMapping mapping, vector[Value]& values, str path):
    cdef Metadata m = Metadata()
    cdef size_t i
    m.mapping = mapping
    m.entries.swap(values)
    m.path = path
    m.index = {m.entries[i].key.decode("ascii"): i for i in range(m.entries.size())}
    return m


def _open_regular(path: str) -> int:
    """A descriptor of the regular file at `path`; never waits, whatever is there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as e:
        raise ModelLoadError(f"cannot be opened: {e.strerror}", path) from None
    except ValueError:
        raise ModelLoadError("cannot be opened: the path holds a zero byte", path) from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a character device"),
                 (stat.S_ISBLK, "a block device"))
        kind = next((name for test, name in kinds if test(mode)), "no regular file")
        raise ModelLoadError(f"is {kind}, not a model file", path)
    return fd


cdef class GgufFile:
    """One open GGUF file.

    Args:
        path: the file.
        block_sizes: tensor type id -> (elements, bytes) of a block; other types are refused.

    Attributes:
        path, version, alignment, size (bytes), data_offset: of the file.
        metadata: its key-values, see `Metadata`.
        tensors: its tensors by name, in file order.

    Raises:
        ModelLoadError: the path cannot be opened or is no regular file, or the file breaks a rule of the format; the
            message holds path, reason and byte offset.
    """

    cdef readonly str path
    cdef readonly int version
    cdef readonly uint64_t alignment, size, data_offset
    cdef readonly Metadata metadata
    cdef readonly dict tensors
    cdef FileMapping mapping
    cdef readonly object stat
    cdef int fd

    def __cinit__(self):
        self.fd = -1

    def __init__(self, path, block_sizes) -> None:
        self.path = os.fsdecode(path)
        self.close()
        self.fd = _open_regular(self.path)
        try:
            self._load(block_sizes)
        except BaseException:
            self.close()
            raise

    cdef _load(self, block_sizes):
        cdef Header header
        cdef Fault fault
        cdef unordered_map[uint32_t, BlockSize] blocks
        cdef BlockSize block
        cdef FileMapping mapping
        cdef cbool fine
        for type_id, (elements, n_bytes) in block_sizes.items():
            block.elements, block.bytes = elements, n_bytes
            blocks[<uint32_t>type_id] = block
        self.stat = os.fstat(self.fd)
        self.size = self.stat.st_size
        if self.size == 0:
            raise ModelLoadError("is empty", self.path)
        self.mapping = mapping = _map(self.fd, self.size, self.path)
        with nogil:
            fine = parse(mapping.base, mapping.size, blocks, header, fault)
        self.check_unchanged()
        if not fine:
            raise ModelLoadError(fault.reason.decode("ascii", "replace"), self.path, fault.offset)
        self.version, self.alignment, self.data_offset = header.version, header.alignment, header.data_offset
        self.metadata = _metadata(mapping, header.values, self.path)
        self.tensors = _tensor_infos(header.tensors)

    def view(self, str name not None) -> memoryview:
        """The bytes of a tensor: a read-only memoryview into the mapping, which it keeps alive after `close`.

        Raises:
            KeyError: there is no such tensor.
        """
        info = self.tensors[name]
        if self.mapping is None:
            raise ValueError(f"{self.path} is closed")
        cdef _Bytes b = _Bytes()
        b.mapping = self.mapping
        b.offset = info.offset
        b.nbytes = info.nbytes
        return memoryview(b)

    def fileno(self) -> int:
        """The file descriptor, for pread; it belongs to this object."""
        if self.fd < 0:
            raise ValueError(f"{self.path} is closed")
        return self.fd

    def check_unchanged(self, same_path: bool = True) -> None:
        """Raise ModelLoadError if the file was cut or written to since it was opened; costs about a microsecond.

        Args:
            same_path: also where another file (or none) is at the path now. A worker that serves passes False: the
                mapping stays good when a newer model is moved over the old one.
        """
        now = os.fstat(self.fileno())
        if now.st_size < self.size:
            raise ModelLoadError(f"was cut from {self.size} to {now.st_size} bytes while it was open", self.path,
                                 now.st_size)
        if self.mapping.was_cut():
            reason = "could not be read everywhere: it was cut while it was open, or its disk fails"
            raise ModelLoadError(reason, self.path)
        if now.st_size != self.size or now.st_mtime_ns != self.stat.st_mtime_ns:
            raise ModelLoadError("was written to while it was open", self.path)
        if not same_path:
            return
        try:
            there = os.stat(self.path)
        except OSError as e:
            raise ModelLoadError(f"is no longer at its path: {e.strerror}", self.path) from None
        if (there.st_dev, there.st_ino) != (now.st_dev, now.st_ino):
            raise ModelLoadError("was replaced by another file while it was open", self.path)

    def close(self) -> None:
        """Let go of file and mapping. Idempotent; views stay valid, metadata no longer decodes."""
        if self.fd >= 0:
            posix_close(self.fd)
            self.fd = -1
        self.mapping = None
        if self.metadata is not None:
            self.metadata.mapping = None

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __dealloc__(self):
        if self.fd >= 0:
            posix_close(self.fd)


cdef dict _tensor_infos(vector[Tensor]& tensors):
    cdef dict out = {}
    cdef size_t i
    cdef uint32_t d, n_dims
    for i in range(tensors.size()):
        name = tensors[i].name.decode("ascii")
        n_dims = tensors[i].n_dims
        while n_dims > 1 and tensors[i].dims[n_dims - 1] == 1:
            n_dims -= 1
        shape = tuple([tensors[i].dims[d] for d in range(n_dims)])
        out[name] = TensorInfo(name, shape, tensors[i].type, tensors[i].offset, tensors[i].nbytes)
    return out


cdef Rule rule_of(tuple description):
    """The C form of a rule, see `check_ranges`."""
    cdef Rule rule
    block_bytes, number, offsets, *weights = description
    if number not in _NUMBERS or not 1 <= len(offsets) <= 2 or max(offsets) >= block_bytes or not (
            weights == [] or (len(weights) == 1 and weights[0] in _K_QUANTS)):
        raise ValueError(f"no rule to check numbers by: {description}")
    rule.block_bytes, rule.n_at = block_bytes, len(offsets)
    rule.number = <Number><int>_NUMBERS[number]
    rule.weights = <KQuant><int>(_K_QUANTS[weights[0]] if weights else CHECK_NO_K_QUANT)
    for i, offset in enumerate(offsets):
        rule.at[i] = offset
    return rule


def check_ranges(ranges, int n_threads) -> tuple[int, int, str] | None:
    """Look for NaN and infinity in values and block scales, without the GIL.

    Args:
        ranges: (file descriptor, rule, offset, nbytes) each, whole blocks; read with pread. A rule is (bytes of a
            block, format of its numbers, offsets of those in the block): `QuantType.check_rule`; or
            `QuantType.gpu_check_rule`, which has the type's name for K-quants: then their weights must fit a GPU too.
        n_threads: threads to use at most.

    Returns:
        None, or (index of the range, byte offset, what was found) of the first fault.
    """
    cdef vector[FileRange] todo
    cdef FileRange r
    cdef CheckFault fault
    for fd, rule, offset, nbytes in ranges:
        r.fd, r.rule, r.offset, r.nbytes = fd, rule_of(rule), offset, nbytes
        todo.push_back(r)
    with nogil:
        fault = check_run(todo.data(), todo.size(), n_threads)
    if fault.kind == 0:
        return None
    reason = CHECK_REASONS.get(fault.kind) or f"cannot be read: {os.strerror(fault.error)}"
    return fault.range, fault.offset, reason
