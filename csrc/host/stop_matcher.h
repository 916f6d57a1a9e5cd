// Finds stop strings in text that arrives in pieces, and holds back what may still become one.
//
// It looks at bytes: stops and text are well-formed UTF-8, where a match never begins or ends inside a character. Of
// several stops the one that is complete first ends the text; of two complete at once, the longer. One automaton of
// Knuth, Morris and Pratt for each stop, so the work is linear in the text.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace worker_orcd {

class StopMatcher {
  public:
    StopMatcher() = default;
    // `stops`: none empty.
    explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)), matched_(stops_.size(), 0) {
        // longest first: of two that end together the longer begins earlier
        std::stable_sort(stops_.begin(), stops_.end(),
                         [](const std::string& a, const std::string& b) { return a.size() > b.size(); });
        for (const std::string& stop : stops_) falls_.push_back(fall_table(stop));
    }

    // Takes `text` and appends to `shown` what is free to be shown. True where a stop is complete: then nothing is held
    // any more, and what came behind it is dropped.
    bool push(const std::string& text, std::string& shown) {
        if (stops_.empty()) {
            shown += text;
            return false;
        }
        const size_t before = held_.size();
        held_ += text;
        for (size_t at = before; at < held_.size(); ++at) {
            for (size_t i = 0; i < stops_.size(); ++i) {
                const std::string& stop = stops_[i];
                size_t n = matched_[i];
                while (n > 0 && stop[n] != held_[at]) n = falls_[i][n];
                if (stop[n] == held_[at]) ++n;
                matched_[i] = n;
                if (n == stop.size()) {
                    found_ = stop;
                    shown.append(held_, 0, at + 1 - n);
                    held_.clear();
                    return true;
                }
            }
        }
        const size_t free = held_.size() - *std::max_element(matched_.begin(), matched_.end());
        shown.append(held_, 0, free);
        held_.erase(0, free);
        return false;
    }

    // The stop that is complete; empty before.
    const std::string& found() const noexcept { return found_; }

    // Appends what was held back: the text has ended, so no stop can claim it.
    void flush(std::string& shown) {
        shown += held_;
        held_.clear();
    }

  private:
    // table[n]: the longest proper prefix of `stop` that is also a suffix of its first n bytes.
    static std::vector<size_t> fall_table(const std::string& stop) {
        std::vector<size_t> table(stop.size() + 1, 0);
        size_t n = 0;
        for (size_t i = 1; i < stop.size(); ++i) {
            while (n > 0 && stop[n] != stop[i]) n = table[n];
            if (stop[n] == stop[i]) ++n;
            table[i + 1] = n;
        }
        return table;
    }

    std::vector<std::string> stops_;
    std::vector<std::vector<size_t>> falls_;
    std::vector<size_t> matched_;  // bytes of each stop that the text's end matches
    std::string held_, found_;
};

}  // namespace worker_orcd
