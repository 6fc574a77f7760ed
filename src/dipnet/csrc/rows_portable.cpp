#include <bit>
#include <cstring>

#include "rows_pass.h"

namespace dipnet {
namespace {

std::uint16_t load(const std::uint8_t* at) {
  std::uint16_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

// The sums of a tile's groups times the row's multipliers.
void add_groups(const std::int32_t* sums, const RowTile& tile, const std::uint8_t* multipliers,
                double* lanes) {
  for (std::size_t g = 0; g < kGroupLanes; ++g) {
    const double multiplier = static_cast<std::int8_t>(multipliers[g]);
    lanes[g] += (sums[g] - tile.offset[g]) * (multiplier * tile.unit[g]);
  }
}

void int4(const RowInput& x, const std::uint8_t* row, const std::uint8_t*, double* lanes) {
  const std::uint8_t* const multipliers = row + x.inputs / 2;
  for (std::size_t t = 0; t < x.tiles.size(); ++t) {
    std::int32_t sums[kGroupLanes] = {};
    for (std::size_t w = 0; w < 32; ++w) {
      const std::uint32_t word = load(row + 64 * t + 2 * w);
      for (std::size_t plane = 0; plane < 4; ++plane) {
        const auto nibble = static_cast<std::int32_t>(word >> (4 * plane) & 15);
        sums[w / 2 % 4] += nibble * x.tiles[t].level[plane][w];
      }
    }
    add_groups(sums, x.tiles[t], multipliers + kGroupLanes * t, lanes);
  }
}

void int8(const RowInput& x, const std::uint8_t* row, const std::uint8_t*, double* lanes) {
  const std::uint8_t* const multipliers = row + x.inputs;
  for (std::size_t t = 0; t < x.tiles.size(); ++t) {
    std::int32_t sums[kGroupLanes] = {};
    for (std::size_t w = 0; w < 64; ++w) {
      const std::uint8_t* const bytes = row + kTile * t + 2 * w;
      for (std::size_t odd = 0; odd < 2; ++odd) {
        const std::int16_t level = x.tiles[t].level[2 * (w / 32) + odd][w % 32];
        sums[2 * (w / 32) + w / 2 % 4 / 2] += bytes[odd] * level;
      }
    }
    add_groups(sums, x.tiles[t], multipliers + kGroupLanes * t, lanes);
  }
}

void bf16(const RowInput& x, const std::uint8_t* row, const std::uint8_t*, double* lanes) {
  for (std::size_t i = 0; i < x.inputs; ++i) {
    const std::uint32_t bits = load(row + 2 * i);
    const double weight = std::bit_cast<float>(bits << 16);
    lanes[i % kValueLanes] += weight * x.values[i / 8].value[i % 8];
  }
}

}  // namespace

const RowInstructions kRowsPortable{"portable", int4, int8, bf16};

}  // namespace dipnet
