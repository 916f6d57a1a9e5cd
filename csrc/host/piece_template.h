// A piece of text as the bytes of one event: `before`, the text as the inside of a JSON string, `after`; where it
// counts also the piece's index in digits, and `end`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace worker_orcd {

// Appends well-formed UTF-8 as the inside of a JSON string that is one line for everybody: the line breaks of Unicode
// (U+0085, U+2028, U+2029), at which many clients cut lines too, are escaped.
inline void append_json(const char* text, size_t n, std::string& out) {
    static const char* const kHex = "0123456789abcdef";
    for (size_t i = 0; i < n; ++i) {
        const uint8_t c = (uint8_t)text[i];
        if (c == '"' || c == '\\') {
            out += '\\';
            out += (char)c;
        } else if (c < 0x20) {
            switch (c) {
                case '\b':
                    out += "\\b";
                    break;
                case '\t':
                    out += "\\t";
                    break;
                case '\n':
                    out += "\\n";
                    break;
                case '\f':
                    out += "\\f";
                    break;
                case '\r':
                    out += "\\r";
                    break;
                default:
                    out += "\\u00";
                    out += kHex[c >> 4];
                    out += kHex[c & 15];
            }
        } else if (c == 0xC2 && i + 1 < n && (uint8_t)text[i + 1] == 0x85) {
            out += "\\u0085";
            ++i;
        } else if (c == 0xE2 && i + 2 < n && (uint8_t)text[i + 1] == 0x80 && ((uint8_t)text[i + 2] | 1) == 0xA9) {
            out += (uint8_t)text[i + 2] == 0xA8 ? "\\u2028" : "\\u2029";
            i += 2;
        } else {
            out += (char)c;
        }
    }
}

struct PieceTemplate {
    std::string before, after, end;
    bool counts = false;

    // Appends one piece to `out`.
    void encode(const char* text, size_t n, size_t index, std::string& out) const {
        out += before;
        append_json(text, n, out);
        out += after;
        if (counts) {
            out += std::to_string(index);
            out += end;
        }
    }
};

}  // namespace worker_orcd
