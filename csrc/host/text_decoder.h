// Token ids one at a time in, complete characters out, by a table that says which bytes each token stands for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "host/utf8_stream.h"

namespace worker_orcd {

// Bytes of every token of a vocabulary. Never changed, shared by all decoders.
struct TokenTable {
    std::string blob;
    std::vector<uint32_t> offsets;  // n_vocab + 1, ascending, the last one blob.size()
    std::vector<uint8_t> control;   // n_vocab: 1 for a control token
    bool strip_space = false;       // a leading space of a whole text is the tokenizer's own

    size_t n_vocab() const noexcept { return offsets.size() - 1; }
    const char* data(size_t token) const noexcept { return blob.data() + offsets[token]; }
    size_t size(size_t token) const noexcept { return offsets[token + 1] - offsets[token]; }
};

class TextDecoder {
  public:
    TextDecoder() = default;
    TextDecoder(std::shared_ptr<const TokenTable> table, bool skip_control, bool continues)
        : table_(std::move(table)),
          skip_control_(skip_control),
          strips_(table_->strip_space && !continues),
          strip_next_(strips_) {}

    // Appends the characters that `token` >= 0 completes. An id past the vocabulary has no text: models with padded
    // outputs can draw one.
    void push(int32_t token, std::string& out) {
        const size_t id = (size_t)token;
        if (id >= table_->n_vocab() || (skip_control_ && table_->control[id])) return;
        const char* data = table_->data(id);
        size_t n = table_->size(id);
        if (strip_next_ && n > 0) {
            strip_next_ = false;
            if (*data == ' ') ++data, --n;
        }
        utf8_.push(data, n, out);
    }

    // See Utf8Stream::flush.
    void flush(std::string& out) {
        utf8_.flush(out);
        strip_next_ = strips_;
    }

  private:
    std::shared_ptr<const TokenTable> table_;
    bool skip_control_ = false, strips_ = false, strip_next_ = false;
    Utf8Stream utf8_;
};

}  // namespace worker_orcd
