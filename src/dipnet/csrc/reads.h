// Which records one read takes in (docs/streaming.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dipnet {

// One read takes in this much at most: from 32 KiB on the disks we measured are as fast as when
// they read in sequence, and a request's first records should not wait for its last.
constexpr std::size_t kReadBytes = 128 << 10;
// A read goes on through this much that nobody wants: a disk takes as long to begin a read as to go
// on for some KiB (benchmarks/raw_disk.py), and reads whole pages anyway.
constexpr std::size_t kGapBytes = 8 << 10;

// Whether a read of the records `first` to `last` goes on to `next`.
inline bool read_goes_on(std::size_t first, std::size_t last, std::size_t next,
                         std::size_t record_bytes) {
  return (next - last - 1) * record_bytes <= kGapBytes &&
         (next - first + 1) * record_bytes <= kReadBytes;
}

struct ReadCount {
  std::size_t reads = 0, records = 0;  // records: with those that are read for nothing
};

// The reads of what is `missed` (units), when nothing else is in the way.
inline ReadCount count_reads(const bool* missed, std::size_t units, std::size_t record_bytes) {
  ReadCount found;
  std::size_t first = 0, last = 0;
  for (std::size_t u = 0; u < units; ++u) {
    if (!missed[u]) continue;
    if (found.reads == 0 || !read_goes_on(first, last, u, record_bytes)) {
      ++found.reads;
      found.records += 1;
      first = u;
    } else {
      found.records += u - last;
    }
    last = u;
  }
  return found;
}

}  // namespace dipnet
