// Score-ranked merging of a text into vocabulary tokens (SentencePiece's BPE): start with one piece a character; while
// two neighbours together are a token, join those whose token has the largest score, the leftmost of equals.
//
// A heap of candidate pairs over a linked list of pieces: n characters give at most 3n candidates, so O(n log n) also
// for one word of 10^6 characters. A candidate is outdated when a side was joined meanwhile, which its length tells.
// Special tokens are the caller's to find: the text here has none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <queue>
#include <string>
#include <vector>

namespace worker_orcd {

// Token texts by hash: open addressing over the caller's blob, which is copied.
class SpmVocab {
  public:
    struct Entry {
        uint32_t offset, n_bytes;  // of the text in the blob; n_bytes 0 = free slot
        int32_t id;
        float score;
    };

    // blob: all texts; offsets [n_vocab + 1] non-decreasing; scores [n_vocab]. Of equal texts the first id is kept.
    void build(const char* blob, const uint32_t* offsets, const float* scores, size_t n_vocab) {
        text_.assign(blob, offsets[n_vocab]);
        size_t n_slots = 16;
        while (n_slots < 2 * n_vocab) n_slots *= 2;
        slots_.assign(n_slots, Entry{0, 0, -1, 0.0f});
        for (size_t i = 0; i < n_vocab; ++i) {
            const uint32_t n_bytes = offsets[i + 1] - offsets[i];
            if (n_bytes == 0) continue;
            max_bytes_ = std::max(max_bytes_, n_bytes);
            size_t slot = hash(text_.data() + offsets[i], n_bytes) & (n_slots - 1);
            while (slots_[slot].n_bytes && !equal(slots_[slot], text_.data() + offsets[i], n_bytes))
                slot = (slot + 1) & (n_slots - 1);
            if (slots_[slot].n_bytes == 0)
                slots_[slot] = Entry{offsets[i], n_bytes, static_cast<int32_t>(i), scores[i]};
        }
    }

    // The token of this text, or nullptr.
    const Entry* find(const char* text, uint32_t n_bytes) const {
        if (n_bytes > max_bytes_) return nullptr;
        const size_t mask = slots_.size() - 1;
        for (size_t slot = hash(text, n_bytes) & mask; slots_[slot].n_bytes; slot = (slot + 1) & mask)
            if (equal(slots_[slot], text, n_bytes)) return &slots_[slot];
        return nullptr;
    }

  private:
    bool equal(const Entry& e, const char* text, uint32_t n_bytes) const {
        return e.n_bytes == n_bytes && std::memcmp(text_.data() + e.offset, text, n_bytes) == 0;
    }

    // FNV-1a with a final mix, so that short texts spread over the low bits
    static size_t hash(const char* text, uint32_t n_bytes) {
        uint64_t h = 0xcbf29ce484222325u;
        for (uint32_t i = 0; i < n_bytes; ++i) h = (h ^ static_cast<unsigned char>(text[i])) * 0x100000001b3u;
        return static_cast<size_t>(h ^ (h >> 29));
    }

    std::string text_;
    std::vector<Entry> slots_;
    uint32_t max_bytes_ = 0;
};

// Append the ids of `text` (valid UTF-8, at most 2^30 bytes) to `out`. A piece without token becomes its bytes' ids, or
// `unk_id` once where `byte_ids` [256] is null.
inline void spm_merge(const SpmVocab& vocab, const char* text, size_t n_bytes, const int32_t* byte_ids, int32_t unk_id,
                      std::vector<int32_t>& out) {
    struct Piece {
        int32_t prev, next;       // indices, -1 = none
        uint32_t offset, length;  // in text; length 0 = joined into its left neighbour
    };
    struct Candidate {
        float score;
        int32_t left, right;
        uint32_t length;  // of both together
        bool operator<(const Candidate& o) const { return score < o.score || (score == o.score && left > o.left); }
    };

    std::vector<Piece> pieces;
    pieces.reserve(n_bytes / 2 + 1);
    for (uint32_t at = 0; at < n_bytes;) {
        const unsigned char lead = static_cast<unsigned char>(text[at]);
        const uint32_t width = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        const uint32_t length = std::min<uint32_t>(width, static_cast<uint32_t>(n_bytes) - at);
        const int32_t i = static_cast<int32_t>(pieces.size());
        pieces.push_back(Piece{i - 1, i + 1, at, length});
        at += length;
    }
    if (pieces.empty()) return;
    pieces.back().next = -1;

    auto candidate = [&](int32_t left, int32_t right, Candidate& c) {
        if (left < 0 || right < 0) return false;
        const uint32_t length = pieces[left].length + pieces[right].length;
        const SpmVocab::Entry* e = vocab.find(text + pieces[left].offset, length);
        if (e) c = Candidate{e->score, left, right, length};
        return e != nullptr;
    };
    std::vector<Candidate> first;
    first.reserve(pieces.size());
    Candidate c;
    for (int32_t i = 1; i < static_cast<int32_t>(pieces.size()); ++i)
        if (candidate(i - 1, i, c)) first.push_back(c);
    std::priority_queue<Candidate> queue(std::less<Candidate>(), std::move(first));

    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        Piece &left = pieces[best.left], &right = pieces[best.right];
        if (left.length == 0 || right.length == 0 || left.length + right.length != best.length) continue;
        left.length = best.length;
        right.length = 0;
        left.next = right.next;
        if (right.next >= 0) pieces[right.next].prev = best.left;
        if (candidate(left.prev, best.left, c)) queue.push(c);
        if (candidate(best.left, left.next, c)) queue.push(c);
    }

    for (int32_t i = 0; i >= 0; i = pieces[i].next) {
        const char* piece = text + pieces[i].offset;
        if (const SpmVocab::Entry* e = vocab.find(piece, pieces[i].length)) {
            out.push_back(e->id);
        } else if (byte_ids) {
            for (uint32_t j = 0; j < pieces[i].length; ++j)
                out.push_back(byte_ids[static_cast<unsigned char>(piece[j])]);
        } else {
            out.push_back(unk_id);
        }
    }
}

}  // namespace worker_orcd
