#include <bit>

#include "gather_pass.h"

namespace dipnet {
namespace {

void int4(const Columns& columns, const Sums& sums) {
  for (std::size_t k = 0; k < columns.count; ++k) {
    for (std::size_t group = 0; group < columns.outputs / kGroup; ++group) {
      const std::int32_t m = multiplier(columns.factor[k], columns.groups[k][group]);
      const std::uint8_t* bytes = columns.weights[k] + group / 4 * (kTile / 2);
      const std::size_t v = group % 4;
      for (std::size_t i = 0; i < kGroup / 2; ++i) {
        const std::int32_t byte = bytes[16 * (i / 4) + 4 * v + i % 4];
        sums.sum[group * kGroup + i] += m * byte;
        sums.sum[group * kGroup + kGroup / 2 + i] += m * (byte & 0xf0);
      }
      sums.excess[group] += 8 * m;
    }
  }
}

void int8(const Columns& columns, const Sums& sums) {
  for (std::size_t k = 0; k < columns.count; ++k) {
    for (std::size_t tile = 0; tile < columns.outputs; tile += 64) {
      for (std::size_t p = 0; p < 64; ++p) {
        const std::size_t output = tile + output_of_byte(p);
        sums.sum[output] += multiplier(columns.factor[k], columns.groups[k][output / kGroup]) *
                            (columns.weights[k][tile + p] - 128);
      }
    }
  }
}

void bf16(const Columns& columns, float* sums) {
  for (std::size_t k = 0; k < columns.count; ++k) {
    const auto* weights = reinterpret_cast<const std::uint16_t*>(columns.weights[k]);
    for (std::size_t o = 0; o < columns.outputs; ++o) {
      const auto weight = std::bit_cast<float>(static_cast<std::uint32_t>(weights[o]) << 16);
      sums[o] += columns.value[k] * weight;
    }
  }
}

}  // namespace

const InstructionSet kPortable{"portable", [] { return true; }, int4, int8, bf16};

}  // namespace dipnet
