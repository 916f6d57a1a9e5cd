// Bytes that arrive in pieces become well-formed UTF-8: each maximal part of an ill-formed sequence turns into one
// U+FFFD as soon as it is known to be one, and an unfinished character waits (Unicode 15, section 3.9, table 3-7). It
// is Python's incremental "utf-8" decoder with "replace" to the byte, and so waits as that one does for a byte more
// where two could begin a surrogate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace worker_orcd {

class Utf8Stream {
  public:
    // Appends to `out` the characters that `n` bytes complete.
    void push(const char* data, size_t n, std::string& out) {
        for (size_t i = 0; i < n; ++i) {
            const uint8_t byte = (uint8_t)data[i];
            if (missing_ > 0) {
                if (byte >= low_ && byte <= high_) {
                    held_[n_held_++] = (char)byte;
                    low_ = 0x80, high_ = 0xBF;
                    if (--missing_ == 0) out.append(held_, n_held_);
                    continue;
                }
                if ((uint8_t)held_[0] == 0xED && n_held_ == 1 && byte >= 0xA0 && byte <= 0xBF) {
                    held_[n_held_++] = (char)byte;  // a surrogate: two ill-formed parts, whatever comes
                    low_ = 0xFF, high_ = 0x00;
                    continue;
                }
                replace_held(out);  // and the byte begins anew
            }
            if (byte < 0x80)
                out += (char)byte;
            else if (!begin(byte))
                out += kReplacement;
        }
    }

    // The end of the text: U+FFFD for an unfinished character. The stream is then as new.
    void flush(std::string& out) {
        if (missing_ > 0) replace_held(out);
    }

  private:
    static constexpr const char* kReplacement = "\xEF\xBF\xBD";

    void replace_held(std::string& out) {
        out += kReplacement;
        if (low_ > high_) out += kReplacement;
        missing_ = 0;
    }

    // Whether a character of several bytes begins with `byte`; sets what may follow.
    bool begin(uint8_t byte) {
        if (byte < 0xC2 || byte > 0xF4) return false;
        missing_ = byte < 0xE0 ? 1 : byte < 0xF0 ? 2 : 3;
        low_ = byte == 0xE0 ? 0xA0 : byte == 0xF0 ? 0x90 : 0x80;   // no overlong forms
        high_ = byte == 0xED ? 0x9F : byte == 0xF4 ? 0x8F : 0xBF;  // no surrogates, nothing past U+10FFFF
        held_[0] = (char)byte;
        n_held_ = 1;
        return true;
    }

    char held_[4] = {};
    uint8_t n_held_ = 0, missing_ = 0, low_ = 0x80, high_ = 0xBF;
};

}  // namespace worker_orcd
