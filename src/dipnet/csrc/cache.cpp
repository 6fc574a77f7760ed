#include "cache.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "simd.h"

// An access is a few passes over the units without a branch that depends on the data; only what is
// admitted and what it replaces is put in order. Most of the time is split_units. Half of n units
// wanted, half resident (benchmarks/cache_access.py):
//     n = 5120: LRU 13 us, LFU 18; sorting them all with numpy 966, 377
//     n = 17920: LRU 45 us, LFU 70; sorting them all with numpy 3848, 1085

namespace dipnet {
namespace {

constexpr std::int32_t kFree = -1;
constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

// GCC widens bytes, but not bools: a loop over bools would not be vectorised.
const std::uint8_t* bytes(const bool* flags) {
  return reinterpret_cast<const std::uint8_t*>(flags);
}

DIPNET_SIMD
void touch_recent(const std::uint8_t* __restrict wanted, std::int32_t* __restrict last,
                  std::size_t n, std::int32_t now) {
  for (std::size_t i = 0; i < n; ++i) last[i] = wanted[i] ? now : last[i];
}

DIPNET_SIMD
void touch_frequent(const std::uint8_t* __restrict wanted, std::int32_t* __restrict count,
                    std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) count[i] += wanted[i];
}

struct Split {
  std::size_t missed, candidates;
};

// Writes the units that are wanted and not resident, and those that are resident and not wanted.
DIPNET_SIMD
Split split_units(const std::uint8_t* __restrict wanted, const std::uint8_t* __restrict resident,
                  std::size_t n, std::int32_t* __restrict missed,
                  std::int32_t* __restrict candidates) {
  constexpr std::size_t kBlock = 32;  // where residency is what is wanted, there is nothing to do
  std::size_t m = 0, c = 0;
  for (std::size_t start = 0; start < n; start += kBlock) {
    const std::size_t end = std::min(n, start + kBlock);
    if (end - start == kBlock && !std::memcmp(wanted + start, resident + start, kBlock)) continue;
    for (std::size_t i = start; i < end; ++i) {
      missed[m] = candidates[c] = static_cast<std::int32_t>(i);
      m += wanted[i] > resident[i];
      c += wanted[i] < resident[i];
    }
  }
  return {m, c};
}

DIPNET_SIMD
std::size_t count_upto(const std::int32_t* keys, std::size_t n, std::int32_t most) {
  std::int32_t count = 0;
  for (std::size_t i = 0; i < n; ++i) count += keys[i] <= most;
  return static_cast<std::size_t>(count);
}

struct Range {
  std::int32_t least, most;
};

DIPNET_SIMD
Range range_of(const std::int32_t* keys, std::size_t n) {
  Range range{kMost, 0};
  for (std::size_t i = 0; i < n; ++i) {
    range.least = std::min(range.least, keys[i]);
    range.most = std::max(range.most, keys[i]);
  }
  return range;
}

// A value that at least k of keys[0, n) do not exceed, and no more than k but for ties at it.
std::int32_t kth_lowest(const std::int32_t* keys, std::size_t n, std::size_t k) {
  auto [lo, hi] = range_of(keys, n);
  while (lo < hi) {
    const std::int32_t mid = std::midpoint(lo, hi);
    const std::size_t count = count_upto(keys, n, mid);
    if (count == k) return mid;
    (count > k ? hi : lo) = count > k ? mid : mid + 1;
  }
  return lo;
}

std::uint64_t entry(std::int32_t key, std::int32_t unit) {
  return static_cast<std::uint64_t>(key) << 32 | static_cast<std::uint32_t>(unit);
}

std::int32_t unit_of(std::uint64_t entry) { return static_cast<std::int32_t>(entry); }

// Sorts items[0, n), whose lower halves ascend already: a radix sort of the upper halves, byte by
// byte where they differ. Without mispredicted branches it takes a fifth of std::sort's time.
void radix_sort(std::vector<std::uint64_t>& items, std::vector<std::uint64_t>& spare,
                std::size_t n) {
  std::uint64_t differing = 0;
  for (std::size_t i = 1; i < n; ++i) differing |= items[i] ^ items[0];
  for (unsigned shift = 32; shift < 64; shift += 8) {
    if (!(differing >> shift & 0xff)) continue;
    std::array<std::uint32_t, 257> start{};
    for (std::size_t i = 0; i < n; ++i) ++start[(items[i] >> shift & 0xff) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (std::size_t i = 0; i < n; ++i) spare[start[items[i] >> shift & 0xff]++] = items[i];
    items.swap(spare);
  }
}

// LFU: how many of the misses may take the place of a candidate.
// The a-th miss may replace the a-th candidate when its priority is not lower, so the answer is
// the most, over all priorities t, of min(misses from t up, candidates up to t): where the two
// cross. `spared` misses, the highest, need no place. miss_keys are kMost - priority.
std::size_t count_replaceable(std::span<const std::int32_t> miss_keys, std::size_t spared,
                              std::span<const std::int32_t> candidate_keys) {
  const auto from = [&](std::int32_t t) {
    const std::size_t count = count_upto(miss_keys.data(), miss_keys.size(), kMost - t);
    return count - std::min(count, spared);
  };
  const auto upto = [&](std::int32_t t) {
    return count_upto(candidate_keys.data(), candidate_keys.size(), t);
  };
  auto [lo, hi] = range_of(candidate_keys.data(), candidate_keys.size());
  if (upto(hi) < from(hi)) return upto(hi);
  while (lo < hi) {  // the lowest t where the candidates are no longer fewer
    const std::int32_t mid = std::midpoint(lo, hi);
    if (upto(mid) >= from(mid)) {
      hi = mid;
    } else {
      lo = mid + 1;
    }
  }
  return std::max(from(lo), upto(lo - 1));
}

}  // namespace

Cache::Cache(std::size_t units, std::size_t slots, Policy policy)
    : policy_(policy),
      slot_of_(units),
      unit_in_(slots),
      priority_(units),
      resident_(units),
      split_misses_(units),
      candidates_(units),
      miss_keys_(units),
      candidate_keys_(units),
      missed_(units + 1),  // what is found is written before it is counted
      victims_(units),
      sorted_(units + 1),
      spare_(units + 1) {
  if (slots > units) throw std::invalid_argument("Cache: slots must be at most units");
  if (units >= static_cast<std::size_t>(kMost)) throw std::invalid_argument("Cache: units >= 2^31");
  reset();
}

void Cache::reset() {
  clock_ = 0;
  used_ = misses_ = 0;
  std::fill(slot_of_.begin(), slot_of_.end(), kFree);
  std::fill(unit_in_.begin(), unit_in_.end(), kFree);
  std::fill(priority_.begin(), priority_.end(), 0);
  std::fill(resident_.begin(), resident_.end(), 0);
}

DIPNET_SIMD
std::size_t count_wanted(const std::uint8_t* wanted, std::size_t n) {
  constexpr std::size_t kBlock = 128;  // what a byte can count
  std::size_t total = 0;
  for (std::size_t start = 0; start < n; start += kBlock) {
    std::uint8_t count = 0;
    for (std::size_t i = start; i < std::min(n, start + kBlock); ++i) count += wanted[i];
    total += count;
  }
  return total;
}

Access Cache::access(const bool* wanted) {
  if (used_ == units()) {  // there is nothing to evict any more, and no priority matters
    misses_ = 0;
    return {count_wanted(bytes(wanted), units()), 0, 0};
  }
  ++clock_;
  if (policy_ == Policy::kLru) {
    touch_recent(bytes(wanted), priority_.data(), units(), clock_);
  } else {
    touch_frequent(bytes(wanted), priority_.data(), units());
  }
  const auto [misses, candidates] = split_units(bytes(wanted), resident_.data(), units(),
                                                split_misses_.data(), candidates_.data());
  const std::size_t hits = used_ - candidates;
  for (std::size_t i = 0; i < misses; ++i) miss_keys_[i] = kMost - priority_[split_misses_[i]];
  for (std::size_t i = 0; i < candidates; ++i) candidate_keys_[i] = priority_[candidates_[i]];

  const std::size_t spared = std::min(misses, slots() - used_);
  std::size_t replaced = std::min(misses - spared, candidates);
  if (policy_ == Policy::kLfu && replaced > 0) {
    replaced = count_replaceable({miss_keys_.data(), misses}, spared,
                                 {candidate_keys_.data(), candidates});
  }
  const std::size_t admitted = spared + replaced;
  lowest(split_misses_, miss_keys_, misses, admitted, missed_);
  lowest(candidates_, candidate_keys_, candidates, replaced, victims_);
  for (std::size_t i = 0; i < spared; ++i) place(missed_[i], static_cast<std::int32_t>(used_++));
  for (std::size_t i = 0; i < replaced; ++i) {
    const std::int32_t slot = slot_of_[victims_[i]];
    slot_of_[victims_[i]] = kFree;
    resident_[victims_[i]] = 0;
    place(missed_[spared + i], slot);
  }
  misses_ = admitted;
  for (std::size_t i = 0; i < misses; ++i) {
    missed_[misses_] = split_misses_[i];
    misses_ += !resident_[split_misses_[i]];
  }
  return {hits, misses, admitted};
}

void Cache::place(std::int32_t unit, std::int32_t slot) {
  unit_in_[slot] = unit;
  slot_of_[unit] = slot;
  resident_[unit] = 1;
}

// Writes the `count` of units[0, n) with the lowest keys in the order of their keys, ties by the
// lowest unit. The units ascend.
void Cache::lowest(const std::vector<std::int32_t>& units, const std::vector<std::int32_t>& keys,
                   std::size_t n, std::size_t count, std::vector<std::int32_t>& out) {
  if (count == 0) return;
  const std::int32_t cut = kth_lowest(keys.data(), n, count);
  std::size_t ties = count - std::min(count, count_upto(keys.data(), n, cut - 1));
  for (std::size_t i = 0, found = 0; i < n; ++i) {
    const bool tie = keys[i] == cut && ties > 0;
    sorted_[found] = entry(keys[i], units[i]);
    found += keys[i] < cut || tie;
    ties -= tie;
  }
  radix_sort(sorted_, spare_, count);
  for (std::size_t i = 0; i < count; ++i) out[i] = unit_of(sorted_[i]);
}

}  // namespace dipnet
