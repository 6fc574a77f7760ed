// A cache of units (ids only): which of them hold a slot of memory. Knows no weights and no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dipnet {

enum class Policy { kLru, kLfu };

// What one access found: wanted units that were resident, that were not, and how many of the
// latter are resident now.
struct Access {
  std::size_t hits, misses, admitted;
};

// The rules are those of src/dipnet/cache/reference.py, to the slot.
class Cache {
 public:
  // Needs slots <= units < 2^31.
  Cache(std::size_t units, std::size_t slots, Policy policy);

  // Uses the units with a true in wanted (units); at most 2^31 - 1 times between resets.
  Access access(const bool* wanted);

  // The misses of the last access: first those admitted, in that order, then the others, by unit.
  std::span<const std::int32_t> missed() const { return {missed_.data(), misses_}; }

  const std::int32_t* slot_of() const { return slot_of_.data(); }  // (units), -1: not resident
  const std::int32_t* unit_in() const { return unit_in_.data(); }  // (slots), -1: free
  const bool* resident() const { return reinterpret_cast<const bool*>(resident_.data()); }
  std::size_t units() const { return slot_of_.size(); }
  std::size_t slots() const { return unit_in_.size(); }

  // Back to the empty cache.
  void reset();

 private:
  void place(std::int32_t unit, std::int32_t slot);
  void lowest(const std::vector<std::int32_t>& units, const std::vector<std::int32_t>& keys,
              std::size_t n, std::size_t count, std::vector<std::int32_t>& out);

  Policy policy_;
  std::int32_t clock_ = 0;
  std::size_t used_ = 0, misses_ = 0;  // slots are taken in order and never given back
  std::vector<std::int32_t> slot_of_, unit_in_, priority_;
  std::vector<std::uint8_t> resident_;
  // Room for one access: units and their sort keys; an entry that is sorted has both.
  std::vector<std::int32_t> split_misses_, candidates_, miss_keys_, candidate_keys_;
  std::vector<std::int32_t> missed_, victims_;
  std::vector<std::uint64_t> sorted_, spare_;
};

}  // namespace dipnet
