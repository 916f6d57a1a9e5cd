// The GGUF header as data: a checked cursor over the file's bytes, and the parse of key-values and tensor records.
//
// Why: every size in a GGUF file is an attacker's number, and readers have overflowed in the same few places again and
// again. All size arithmetic of the project's file reading is here, through __builtin_*_overflow, and every byte is
// read through `Cursor`, which knows where the file ends. Each number is read once: the bytes may change meanwhile.
// The caller hands in the block sizes of the tensor types that exist. No key but general.alignment has a meaning here.
//
// Layout (little endian): "GGUF", u32 version, u64 n_tensors, u64 n_keys, keys, tensor records, padding, data.
//   key     string name, u32 type, value
//   record  string name, u32 n_dims, u64 dims[n_dims] (row length first), u32 type, u64 offset from the data's start
//   string  u64 length, bytes
//   array   u32 type, u64 count, elements
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

namespace gguf {

enum : uint32_t {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    BOOL = 7,
    STRING = 8,
    ARRAY = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
};

constexpr uint64_t kMaxKeys = 65535;                     // published models have 20 to 60
constexpr uint64_t kMaxTensors = 65535;                  // the largest have a few thousand
constexpr uint64_t kMaxKeyBytes = 65535;                 // the format's own limit
constexpr size_t kMaxQuoted = 80;                        // characters of a file's text in a message
constexpr uint64_t kMaxNameBytes = 63;                   // ggml's limit: 64 with the terminating zero
constexpr uint64_t kMaxArray = uint64_t(1) << 24;        // elements of one array
constexpr uint64_t kMaxAllKeyBytes = uint64_t(4) << 20;  // the names of all keys together
constexpr uint64_t kMinAlignment = 8, kMaxAlignment = uint64_t(1) << 20;
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMaxElements = uint64_t(INT64_MAX);

// Why a file was refused, and the byte where that was seen.
struct Fault {
    uint64_t offset = 0;
    std::string reason;
};

[[noreturn]] inline void refuse(uint64_t offset, std::string reason) { throw Fault{offset, std::move(reason)}; }

inline bool add(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_add_overflow(a, b, out); }
inline bool mul(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_mul_overflow(a, b, out); }
// The next multiple of `alignment` (a power of two); false where that is no uint64.
inline bool align_up(uint64_t a, uint64_t alignment, uint64_t* out) {
    if (!add(a, alignment - 1, out)) return false;
    *out &= ~(alignment - 1);
    return true;
}

// Bytes of one scalar of `type`; 0 for strings, arrays and unknown types.
inline uint64_t scalar_bytes(uint32_t type) {
    switch (type) {
        case U8:
        case I8:
        case BOOL:
            return 1;
        case U16:
        case I16:
            return 2;
        case U32:
        case I32:
        case F32:
            return 4;
        case U64:
        case I64:
        case F64:
            return 8;
        default:
            return 0;
    }
}

// Text of untrusted bytes for a message: printable ASCII, short.
inline std::string quoted(const std::string& s) {
    std::string out = "'";
    for (size_t i = 0; i < s.size(); i++) {
        unsigned char c = s[i];
        char piece[5] = {static_cast<char>(c)};
        if (c < 0x20 || c > 0x7e || c == '\'' || c == '\\') std::snprintf(piece, sizeof piece, "\\x%02x", c);
        // room for the dots, where more comes
        if (out.size() - 1 + std::strlen(piece) > kMaxQuoted - (i + 1 < s.size() ? 3 : 0)) return out + "...'";
        out += piece;
    }
    return out + "'";
}

// Reads forward through base[0, size); whatever would pass the end is refused with the offset it started at.
struct Cursor {
    const uint8_t* base;
    uint64_t size;
    uint64_t at;

    uint64_t left() const { return size - at; }
    void need(uint64_t n, const char* what) const {
        if (n > left())
            refuse(at, std::string("truncated: ") + what + " needs " + std::to_string(n) + " bytes, " +
                           std::to_string(left()) + " are left");
    }
    template <class T>
    T number(const char* what) {
        need(sizeof(T), what);
        T v;
        std::memcpy(&v, base + at, sizeof v);
        at += sizeof v;
        return v;
    }
    // Skips a string's bytes and returns their length; `at` is behind them, they start at at - length.
    uint64_t skip_string(const char* what) {
        uint64_t n = number<uint64_t>(what);
        need(n, what);
        at += n;
        return n;
    }
    void skip(uint64_t n, const char* what) {
        need(n, what);
        at += n;
    }
};

// One key-value: where its value's bytes are; decoded only when somebody asks.
struct Value {
    std::string key;
    uint32_t type;    // of the value
    uint32_t elem;    // of the elements, for ARRAY
    uint64_t count;   // of elements, for ARRAY
    uint64_t offset;  // first byte of the value; for ARRAY of its first element
    uint64_t end;     // behind its last byte
};

struct Tensor {
    std::string name;
    uint32_t type;
    uint32_t n_dims;
    uint64_t dims[kMaxDims];
    uint64_t offset;  // from the start of the file
    uint64_t nbytes;
};

struct BlockSize {
    uint64_t elements, bytes;
};

struct Header {
    uint32_t version = 0;
    uint64_t alignment = 32;
    uint64_t data_offset = 0;
    std::vector<Value> values;
    std::vector<Tensor> tensors;
};

namespace detail {

inline void check_bools(const Cursor& c, uint64_t start, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        if (c.base[start + i] > 1)
            refuse(start + i, "a bool byte is " + std::to_string(c.base[start + i]) + ", must be 0 or 1");
}

// Element count of an array of `elem`, whose smallest element takes `least` bytes; no count beyond the file passes.
inline uint64_t array_count(Cursor& c, uint64_t least, const std::string& key) {
    uint64_t where = c.at, n = c.number<uint64_t>("an array's count");
    if (n > kMaxArray)
        refuse(where,
               "key " + key + ": array of " + std::to_string(n) + " elements, limit " + std::to_string(kMaxArray));
    uint64_t bytes;
    if (!mul(n, least, &bytes) || bytes > c.left())
        refuse(where, "key " + key + ": truncated: array of " + std::to_string(n) + " elements, " +
                          std::to_string(c.left()) + " bytes are left");
    return n;
}

// Skips `count` elements of a flat array of `elem`.
inline void skip_elements(Cursor& c, uint32_t elem, uint64_t count) {
    if (elem == STRING) {
        for (uint64_t i = 0; i < count; i++) c.skip_string("a string in an array");
        return;
    }
    uint64_t start = c.at, bytes;
    if (!mul(count, scalar_bytes(elem), &bytes)) refuse(start, "array size overflows");
    c.skip(bytes, "an array");
    if (elem == BOOL) check_bools(c, start, count);
}

inline uint64_t least_bytes(uint32_t elem) { return elem == STRING ? 8 : elem == ARRAY ? 12 : scalar_bytes(elem); }

inline uint32_t element_type(Cursor& c, const std::string& key) {
    uint64_t where = c.at;
    uint32_t elem = c.number<uint32_t>("an array's element type");
    if (elem > F64) refuse(where, "key " + key + ": unknown element type " + std::to_string(elem));
    return elem;
}

inline Value read_value(Cursor& c, std::string key) {
    uint64_t where = c.at;
    Value v{std::move(key), c.number<uint32_t>("a value's type"), 0, 0, 0, 0};
    if (v.type > F64) refuse(where, "key " + quoted(v.key) + ": unknown value type " + std::to_string(v.type));
    v.offset = c.at;
    if (v.type == ARRAY) {
        std::string name = quoted(v.key);
        v.elem = element_type(c, name);
        v.count = array_count(c, least_bytes(v.elem), name);
        v.offset = c.at;
        if (v.elem == ARRAY) {  // one level of nesting, as a loop
            for (uint64_t i = 0; i < v.count; i++) {
                uint64_t inner_at = c.at;
                uint32_t inner = element_type(c, name);
                if (inner == ARRAY) refuse(inner_at, "key " + name + ": arrays nested more than one deep");
                skip_elements(c, inner, array_count(c, least_bytes(inner), name));
            }
        } else {
            skip_elements(c, v.elem, v.count);
        }
    } else if (v.type == STRING) {
        c.skip_string("a string value");
    } else {
        c.skip(scalar_bytes(v.type), "a value");
        if (v.type == BOOL) check_bools(c, v.offset, 1);
    }
    v.end = c.at;
    return v;
}

// A name of 1..limit printable ASCII bytes.
inline std::string read_name(Cursor& c, const char* what, uint64_t limit) {
    uint64_t where = c.at, n = c.number<uint64_t>(what);
    if (n == 0) refuse(where, std::string(what) + " is empty");
    if (n > limit)
        refuse(where, std::string(what) + " has " + std::to_string(n) + " bytes, limit " + std::to_string(limit));
    c.need(n, what);
    std::string s(reinterpret_cast<const char*>(c.base + c.at), n);
    c.at += n;
    for (unsigned char ch : s)
        if (ch < 0x20 || ch > 0x7e) refuse(where + 8, std::string(what) + " " + quoted(s) + " is not printable ASCII");
    return s;
}

inline void refuse_duplicates(std::vector<std::pair<std::string, uint64_t>> names, const char* what) {
    std::sort(names.begin(), names.end());
    for (size_t i = 1; i < names.size(); i++)
        if (names[i].first == names[i - 1].first)
            refuse(names[i].second, std::string(what) + " " + quoted(names[i].first) + " occurs twice");
}

// One record of the tensor table, its size computed; the offset is still relative to the data's start.
inline Tensor read_tensor(Cursor& c, const std::unordered_map<uint32_t, BlockSize>& blocks) {
    Tensor t{};
    t.name = read_name(c, "a tensor's name", kMaxNameBytes);
    const std::string who = "tensor " + quoted(t.name);
    uint64_t where = c.at;
    t.n_dims = c.number<uint32_t>("a tensor's n_dims");
    if (t.n_dims == 0 || t.n_dims > kMaxDims)
        refuse(where, who + " has " + std::to_string(t.n_dims) + " dimensions, must be 1..4");
    uint64_t n_elements = 1;
    for (uint32_t d = 0; d < t.n_dims; d++) {
        where = c.at;
        t.dims[d] = c.number<uint64_t>("a tensor's dimension");
        if (t.dims[d] == 0) refuse(where, who + ": dimension " + std::to_string(d) + " is 0");
        if (!mul(n_elements, t.dims[d], &n_elements) || n_elements > kMaxElements)
            refuse(where, who + ": number of elements overflows at dimension " + std::to_string(d));
    }
    where = c.at;
    t.type = c.number<uint32_t>("a tensor's type");
    auto block = blocks.find(t.type);
    if (block == blocks.end()) refuse(where, who + ": unknown or removed tensor type " + std::to_string(t.type));
    if (t.dims[0] % block->second.elements)
        refuse(where, who + ": row length " + std::to_string(t.dims[0]) + " is no multiple of the " +
                          std::to_string(block->second.elements) + " elements of a block of type " +
                          std::to_string(t.type));
    if (!mul(n_elements / block->second.elements, block->second.bytes, &t.nbytes) || t.nbytes > kMaxElements)
        refuse(where, who + ": size in bytes overflows");
    t.offset = c.number<uint64_t>("a tensor's offset");
    return t;
}

inline void read_alignment(Header& h, const Cursor& c) {
    for (const Value& v : h.values) {
        if (v.key != "general.alignment") continue;
        if (v.type != U32)
            refuse(v.offset, "general.alignment is of type " + std::to_string(v.type) + ", must be uint32");
        Cursor value{c.base, v.end, v.offset};
        h.alignment = value.number<uint32_t>("general.alignment");
        if ((h.alignment & (h.alignment - 1)) || h.alignment < kMinAlignment || h.alignment > kMaxAlignment)
            refuse(v.offset,
                   "general.alignment is " + std::to_string(h.alignment) + ", must be a power of two from 8 to 2^20");
    }
}

inline void parse(const uint8_t* base, uint64_t size, const std::unordered_map<uint32_t, BlockSize>& blocks,
                  Header& h) {
    Cursor c{base, size, 0};
    c.need(4, "the magic");
    if (std::memcmp(base, "GGUF", 4) != 0)
        refuse(0, "not a GGUF file: it begins with " + quoted(std::string(reinterpret_cast<const char*>(base), 4)));
    c.at = 4;
    h.version = c.number<uint32_t>("the version");
    if (h.version != 0 && (h.version & 0xffff) == 0)
        refuse(4, "a big-endian GGUF file; only little-endian ones are supported");
    if (h.version != 2 && h.version != 3)
        refuse(4, "GGUF version " + std::to_string(h.version) + " is not supported; 2 and 3 are");
    uint64_t where = c.at, n_tensors = c.number<uint64_t>("the number of tensors");
    if (n_tensors > kMaxTensors)
        refuse(where, "claims " + std::to_string(n_tensors) + " tensors, limit " + std::to_string(kMaxTensors));
    where = c.at;
    uint64_t n_keys = c.number<uint64_t>("the number of keys");
    if (n_keys > kMaxKeys)
        refuse(where, "claims " + std::to_string(n_keys) + " keys, limit " + std::to_string(kMaxKeys));

    std::vector<std::pair<std::string, uint64_t>> names;
    uint64_t name_bytes = 0;
    for (uint64_t i = 0; i < n_keys; i++) {
        where = c.at;
        std::string key = read_name(c, "a key", kMaxKeyBytes);
        if (!add(name_bytes, key.size(), &name_bytes) || name_bytes > kMaxAllKeyBytes)
            refuse(where, "the names of the keys take more than " + std::to_string(kMaxAllKeyBytes) + " bytes");
        names.emplace_back(key, where);
        h.values.push_back(read_value(c, std::move(key)));
    }
    refuse_duplicates(std::move(names), "key");
    read_alignment(h, c);

    names.clear();
    std::vector<uint64_t> offset_at;
    for (uint64_t i = 0; i < n_tensors; i++) {
        where = c.at;
        h.tensors.push_back(read_tensor(c, blocks));
        names.emplace_back(h.tensors.back().name, where);
        offset_at.push_back(c.at - 8);
    }
    refuse_duplicates(std::move(names), "tensor");
    if (!align_up(c.at, h.alignment, &h.data_offset)) refuse(c.at, "the padding behind the tensor table overflows");

    uint64_t free_from = 0;  // end of the tensor before, padded, from the data's start
    for (size_t i = 0; i < h.tensors.size(); i++) {
        Tensor& t = h.tensors[i];
        const std::string who = "tensor " + quoted(t.name);
        if (t.offset % h.alignment)
            refuse(offset_at[i], who + ": offset " + std::to_string(t.offset) + " is no multiple of the alignment " +
                                     std::to_string(h.alignment));
        if (t.offset < free_from)
            refuse(offset_at[i], who + ": offset " + std::to_string(t.offset) +
                                     " lies before the end of the tensor before it, " + std::to_string(free_from));
        uint64_t end, absolute_end;
        if (!add(t.offset, t.nbytes, &end) || !add(h.data_offset, end, &absolute_end) ||
            !align_up(end, h.alignment, &free_from))
            refuse(offset_at[i], who + ": its end overflows");
        if (absolute_end > size)
            refuse(offset_at[i],
                   who + " ends at byte " + std::to_string(absolute_end) + ", the file has " + std::to_string(size));
        t.offset += h.data_offset;
    }
}

}  // namespace detail

// Parses base[0, size). blocks: tensor type id -> elements and bytes of one block. False: `fault` says why.
inline bool parse(const uint8_t* base, uint64_t size, const std::unordered_map<uint32_t, BlockSize>& blocks,
                  Header& header, Fault& fault) noexcept {
    try {
        detail::parse(base, size, blocks, header);
        return true;
    } catch (Fault& f) {
        fault = std::move(f);
    } catch (const std::bad_alloc&) {
        fault.reason = "out of memory";  // short enough to need no allocation
    }
    return false;
}

// Start and length of the string at `at` (its length field first), inside [at, end); false where that does not fit,
// which at parse time it did: the file was changed. Moves `at` behind it.
inline bool next_string(const uint8_t* base, uint64_t end, uint64_t* at, uint64_t* start, uint64_t* length) noexcept {
    if (*at > end || end - *at < 8) return false;
    std::memcpy(length, base + *at, 8);
    *start = *at + 8;
    if (*length > end - *start) return false;
    *at = *start + *length;
    return true;
}

}  // namespace gguf
