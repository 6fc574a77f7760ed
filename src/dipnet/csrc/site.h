// The records of one site: which are in memory and where. Knows no reader and no activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache.h"
#include "gather.h"
#include "memory.h"

namespace dipnet {

// Where a group's records lie in the file, and what one holds (docs/store-format.md).
struct Layout {
  Kind kind;
  std::size_t channels, block;
  std::size_t outputs;  // padded
  std::size_t rows;     // not padded
  std::size_t stride, record_bytes;
  std::uint64_t offset, group;
  // Of a record of a whole neuron: its rows of gate and up, which come before its column.
  std::size_t input_rows = 0;

  std::size_t runs() const { return input_rows + block; }  // of `stride` bytes in a record
  std::size_t units() const { return channels / block; }
  // Throws std::invalid_argument where the numbers contradict each other.
  void check(std::uint64_t file_bytes) const;
};

constexpr std::int32_t kNone = -1;

struct SiteTotals {
  std::uint64_t hits = 0, misses = 0;    // units wanted by a token, in the cache's view
  std::uint64_t read = 0;                // records that a request read from the disk
  std::uint64_t guessed = 0, useful = 0;  // records read ahead, and how many of them were wanted
  std::uint64_t early = 0;  // of those, the ones that had arrived when they were asked for
  double wait = 0, kernels = 0, bookkeeping = 0;  // seconds
};

// A record that is not in its slot lies in a frame of the engine's or nowhere.
struct Site {
  Site(const Layout& layout, std::vector<float> scale, std::size_t slots, Policy policy);

  std::uint8_t* slot(std::int32_t s) const { return memory.data() + s * layout.record_bytes; }
  bool in_memory(std::size_t unit) const { return slot_with[unit] != kNone; }
  bool complete() const { return present == layout.units(); }  // every record is in memory
  void put(std::int32_t unit, std::int32_t slot);
  void empty_slot(std::int32_t slot);

  Layout layout;
  std::vector<float> scale;  // (input_rows + 1, channels); empty for bf16
  Cache cache;               // what the masks and the policy see
  Memory memory;
  // What is really there, which lags behind the cache while records arrive.
  std::size_t present = 0;              // units in memory
  std::vector<std::int32_t> slot_with;  // (units)
  std::vector<std::int32_t> unit_at;    // (slots)
  std::vector<std::int32_t> frame_of;   // (units) read into a frame, arrived or not
  std::vector<std::uint8_t> arrived;    // (units) in its frame
  SiteTotals totals;
};

}  // namespace dipnet
