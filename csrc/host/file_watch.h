// Whether the files that a computation reads are what they were when they were opened.
//
// Why: weights that lie in a mapping change under a computation when somebody writes to the file, and nothing else says
// so. A write changes the time of the file before it changes a byte, so what was read before a check that finds
// nothing is good. Two kinds of writes stay unseen: through a shared mapping into a page that is dirty already, and one
// whose time is put back before the next check. Names do not count: a file that was moved, unlinked or replaced is
// still the one that is mapped.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <vector>

namespace worker_orcd {

struct WatchedFile {
    int fd;  // of the caller, open as long as it is watched
    int64_t size, mtime_ns;
};

class FileWatch {
  public:
    void add(const WatchedFile& file) { files_.push_back(file); }

    // A fraction of a microsecond a file. Once it has found a change it says so for ever.
    bool changed() noexcept {
        for (const WatchedFile& f : files_) {
            struct stat now;
            if (fstat(f.fd, &now) != 0 || now.st_size != f.size ||
                now.st_mtim.tv_sec * INT64_C(1000000000) + now.st_mtim.tv_nsec != f.mtime_ns)
                changed_ = true;
        }
        return changed_;
    }

  private:
    std::vector<WatchedFile> files_;
    bool changed_ = false;
};

}  // namespace worker_orcd
