#include <bit>

#include "gather_pass.h"

namespace dipnet {
namespace {

void int4(const Columns& columns, Sums& sums) {
  for (std::size_t k = 0; k < columns.count; ++k) {
    for (std::size_t tile = 0; tile < columns.outputs; tile += kTile) {
      const std::uint8_t* bytes = columns.weights[k] + tile / 2;
      for (std::size_t p = 0; p < kTile / 2; ++p) {
        const std::size_t low = tile + output_of_byte(p), high = low + kTile / 2;
        sums.sum[low] += multiplier(columns.factor[k], columns.groups[k][low / kGroup]) *
                         ((bytes[p] & 15) - 8);
        sums.sum[high] += multiplier(columns.factor[k], columns.groups[k][high / kGroup]) *
                          ((bytes[p] >> 4) - 8);
      }
    }
  }
}

void int8(const Columns& columns, Sums& sums) {
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
