// Where the tokens of one job become its text: token ids, the text so far, and the pieces that nobody has taken yet -
// or their bytes in the stream of a client.
//
// It is fed either token by token, where it decodes by itself, or with pieces that somebody else made. Who reads asks
// for the next piece, and is told of the one after the last only where it wants to be. All methods may be called from
// any thread; none waits for anything.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "host/client_stream.h"
#include "host/piece_template.h"
#include "host/stop_matcher.h"
#include "host/text_decoder.h"

namespace worker_orcd {

// What became of a token.
struct Fed {
    bool told = false;     // somebody wants to be told of the new piece
    bool stopped = false;  // a stop string is complete: the text has ended
};

struct TakenPiece {
    std::string text;
    std::vector<int32_t> token_ids;
    size_t index = 0;
};

class JobSink {
  public:
    // From now on `push` decodes. Without a decoder every token is a piece with no text. `stops` and `stop_ids` end the
    // text and are no part of it; in the text of the first `n_unwatched` tokens stops do not count.
    void decode_with(std::unique_ptr<TextDecoder> decoder, std::vector<std::string> stops,
                     std::vector<int32_t> stop_ids, size_t n_unwatched) {
        std::lock_guard<std::mutex> lock(mutex_);
        decoder_ = std::move(decoder);
        matcher_ = StopMatcher(std::move(stops));
        stop_ids_ = std::move(stop_ids);
        n_unwatched_ = n_unwatched;
        decodes_ = true;
    }

    bool decodes() {
        std::lock_guard<std::mutex> lock(mutex_);
        return decodes_;
    }

    // Takes the next token.
    Fed push(int32_t token) {
        std::lock_guard<std::mutex> lock(mutex_);
        Fed fed;
        // an engine may draw a token or two more before it knows of the end
        if (closed_ || stop_token_ >= 0) return fed;
        if (std::find(stop_ids_.begin(), stop_ids_.end(), token) != stop_ids_.end()) {
            stop_token_ = token;
            return fed;
        }
        token_ids_.push_back(token);
        decoded_.clear();
        shown_.clear();
        if (decoder_) decoder_->push(token, decoded_);
        if (n_unwatched_ > 0) {
            --n_unwatched_;
            shown_ += decoded_;
        } else {
            fed.stopped = matcher_.push(decoded_, shown_);
        }
        fed.told = show(fed.stopped);
        closed_ = closed_ || fed.stopped;
        return fed;
    }

    // The sequence has no more tokens: shows what was held back.
    Fed end() {
        std::lock_guard<std::mutex> lock(mutex_);
        Fed fed;
        if (closed_) return fed;
        decoded_.clear();
        shown_.clear();
        if (decoder_) decoder_->flush(decoded_);
        fed.stopped = matcher_.push(decoded_, shown_);
        if (!fed.stopped) matcher_.flush(shown_);
        fed.told = show(true);
        closed_ = true;
        return fed;
    }

    // Takes a piece that was made elsewhere, and sends it where it goes to a client. Whether somebody is to be told.
    bool add_piece(const std::string& text, const std::vector<int32_t>& token_ids) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) return false;
        token_ids_.insert(token_ids_.end(), token_ids.begin(), token_ids.end());
        shown_ = text;
        const bool told = add_shown();
        if (stream_) stream_->flush();
        return told;
    }

    // Takes tokens that gave no text to show: part of the result, of no piece.
    void add_silent(const std::vector<int32_t>& token_ids) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) return;
        token_ids_.insert(token_ids_.end(), token_ids.begin(), token_ids.end());
        n_shown_ = token_ids_.size();
    }

    // The job has ended: nothing is taken any more.
    void close() {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        stream_.reset();
    }

    // The next piece, or false.
    bool take(TakenPiece& piece) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (pieces_.empty()) return false;
        const Ends ends = pieces_.front();
        pieces_.pop_front();
        piece.text.assign(text_, text_taken_, ends.text - text_taken_);
        piece.token_ids.assign(token_ids_.begin() + (ptrdiff_t)tokens_taken_,
                               token_ids_.begin() + (ptrdiff_t)ends.tokens);
        piece.index = n_pieces_ - pieces_.size() - 1;
        text_taken_ = ends.text;
        tokens_taken_ = ends.tokens;
        return true;
    }

    // Whether a piece is there; else whoever asks is told of the next one.
    bool ready() {
        std::lock_guard<std::mutex> lock(mutex_);
        wanted_ = pieces_.empty();
        return !wanted_;
    }

    // From now on pieces are bytes of `stream`, made by `form`; those that are there are the first.
    void attach(std::shared_ptr<ClientStream> stream, const PieceTemplate& form) {
        std::lock_guard<std::mutex> lock(mutex_);
        wanted_ = false;
        size_t index = n_pieces_ - pieces_.size();
        stream->append([&](std::string& body) {
            for (const Ends& ends : pieces_) {
                form.encode(text_.data() + text_taken_, ends.text - text_taken_, index++, body);
                text_taken_ = ends.text;
                tokens_taken_ = ends.tokens;
            }
        });
        pieces_.clear();
        stream->flush();
        if (closed_) return;
        form_ = form;
        stream_ = std::move(stream);
    }

    // Where its pieces go; none where they are kept.
    std::shared_ptr<ClientStream> stream() {
        std::lock_guard<std::mutex> lock(mutex_);
        return stream_;
    }

    // The stop string that ended its text, or empty; the stop token that did, or -1.
    std::pair<std::string, int32_t> ended_by() {
        std::lock_guard<std::mutex> lock(mutex_);
        return {matcher_.found(), stop_token_};
    }

    std::string text() {
        std::lock_guard<std::mutex> lock(mutex_);
        return text_;
    }

    // The tokens of all pieces so far, and the silent ones.
    std::vector<int32_t> token_ids() {
        std::lock_guard<std::mutex> lock(mutex_);
        return std::vector<int32_t>(token_ids_.begin(), token_ids_.begin() + (ptrdiff_t)n_shown_);
    }

    size_t n_tokens() {
        std::lock_guard<std::mutex> lock(mutex_);
        return n_shown_;
    }

  private:
    struct Ends {
        size_t text, tokens;  // where a piece ends
    };

    // Makes a piece of shown_ and the tokens that wait, or lets them wait on. Whether somebody is to be told.
    bool show(bool last) {
        if (!shown_.empty() || (!decoder_ && n_shown_ < token_ids_.size())) return add_shown();
        if (last) n_shown_ = token_ids_.size();
        return false;
    }

    bool add_shown() {
        text_ += shown_;
        n_shown_ = token_ids_.size();
        const size_t index = n_pieces_++;
        if (stream_) {
            stream_->append([&](std::string& body) { form_.encode(shown_.data(), shown_.size(), index, body); });
            return false;
        }
        pieces_.push_back(Ends{text_.size(), token_ids_.size()});
        const bool told = wanted_;
        wanted_ = false;
        return told;
    }

    std::mutex mutex_;
    std::string text_;
    std::vector<int32_t> token_ids_;
    size_t n_shown_ = 0;  // of token_ids_: those behind wait for their text
    std::deque<Ends> pieces_;
    size_t n_pieces_ = 0, text_taken_ = 0, tokens_taken_ = 0;
    bool closed_ = false, wanted_ = false;

    bool decodes_ = false;
    int32_t stop_token_ = -1;  // that ended the text
    size_t n_unwatched_ = 0;
    std::unique_ptr<TextDecoder> decoder_;
    StopMatcher matcher_;
    std::vector<int32_t> stop_ids_;
    std::string decoded_, shown_;  // kept for their memory

    std::shared_ptr<ClientStream> stream_;
    PieceTemplate form_;
};

}  // namespace worker_orcd
