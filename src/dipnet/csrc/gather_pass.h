// The inner loops of gather.cpp, one set for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gather.h"

namespace dipnet {

constexpr std::size_t kChunk = 8192;  // outputs whose sums stay in the first-level cache
constexpr std::size_t kGroups = kChunk / kGroup;
constexpr std::size_t kPass = 16;  // columns added together: sums are loaded and stored once

// Up to kPass columns, seen from the first output of a chunk.
struct Columns {
  const std::uint8_t* weights[kPass];
  const std::uint8_t* next[kPass];   // the columns after these, to be fetched meanwhile
  const std::int8_t* groups[kPass];  // group multipliers; unused by bf16
  std::int16_t factor[kPass];
  float value[kPass];
  std::size_t count;    // of columns: a multiple of 4 but for bf16; filled up with factor 0
  std::size_t outputs;  // of the chunk, a multiple of kTile
};

// Sums of a chunk. A weight's value is its stored number less an offset; an instruction set may leave
// the offset's share in `sum` and collect it once for each group in `excess`. Of a byte with two
// nibbles, the sum of the low one's output is that of the whole byte, and the sum of the high one's
// output that of 16 times the nibble: that masks once instead of twice and shifts nothing.
// Both begin at the chunk's first output; `excess` has room for a multiple of 8 groups.
struct Sums {
  std::int32_t* sum;
  std::int32_t* excess;
};

struct InstructionSet {
  const char* name;
  bool (*present)();
  void (*int4)(const Columns& columns, const Sums& sums);
  void (*int8)(const Columns& columns, const Sums& sums);
  void (*bf16)(const Columns& columns, float* sums);
};

// The place within a tile of 64 bytes of the weight in byte p: vector instructions that interleave
// four columns then find neighbouring outputs in neighbouring lanes.
constexpr std::size_t output_of_byte(std::size_t p) {
  return 16 * (p / 4 % 4) + 4 * (p / 16) + p % 4;
}

// factor * group in units of the class: what a stored number is multiplied with, in -127..127.
constexpr std::int32_t multiplier(std::int16_t factor, std::int8_t group) {
  return (((static_cast<std::int32_t>(factor) * group) >> 14) + 1) >> 1;
}

extern const InstructionSet kPortable;
#if defined(__x86_64__)
extern const InstructionSet kAvx2, kAvx512;
#endif

}  // namespace dipnet
