#include "rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <string_view>

#include "gather_pass.h"
#include "pool.h"
#include "rows_pass.h"
#include "simd.h"

namespace dipnet {
namespace {

const RowInstructions& chosen() {
#if defined(__x86_64__)
  const std::string_view name = instruction_set();
  if (name == kRowsAvx512.name) return kRowsAvx512;
  if (name == kRowsAvx2.name) return kRowsAvx2;
#endif
  return kRowsPortable;
}

// Where input i of a tile lies in RowTile::level. Loaded as words of 16 bits, a tile of int4 is four
// planes of nibbles, and each half of a tile of int8 two planes of bytes; a plane has 32 levels. The
// two levels of 4 bytes then belong to one group in every plane.
constexpr std::size_t place_of(Kind kind, std::size_t i) {
  if (kind == Kind::int8) {
    const std::size_t byte = output_of_byte(i % 64);  // which is its own inverse
    return 32 * (2 * (i / 64) + byte % 2) + byte / 2;
  }
  const std::size_t byte = 16 * (i / 4 % 4) + 4 * (i / 32) + i % 4, high = i / 16 % 2;
  return 32 * (2 * (byte % 2) + high) + byte / 2;
}

template <Kind kind>
constexpr auto kPlaces = [] {
  std::array<std::uint8_t, kTile> places{};
  for (std::size_t i = 0; i < kTile; ++i) places[i] = static_cast<std::uint8_t>(place_of(kind, i));
  return places;
}();

constexpr int kBits = 14;  // a level is at most 2^14: 255 * 2^14 * 32 products stay an int32

constexpr double power_of_two(int exponent) {  // of a normal double
  return std::bit_cast<double>(static_cast<std::uint64_t>(1023 + exponent) << 52);
}

inline std::uint32_t size_bits(float value) {
  return std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
}

DIPNET_SIMD
bool all_finite(const float* x, std::size_t n) {
  std::uint32_t most = 0;
  for (std::size_t i = 0; i < n; ++i) most = std::max(most, size_bits(x[i]));
  return most < 0x7f800000u;
}

// Rounds the finite x of one group, ties to even; returns their unit. As in gather.cpp the loops are
// such that compilers vectorise them.
DIPNET_SIMD
double quantise(const float* x, std::int16_t* level) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52 leaves no room for a fraction
  std::uint32_t most = 0;
  for (std::size_t i = 0; i < kGroup; ++i) most = std::max(most, size_bits(x[i]));
  const int exponent = std::max(static_cast<int>(most >> 23), 1) - 126;  // |x| < 2^exponent
  const double inverse = power_of_two(kBits - exponent);
  for (std::size_t i = 0; i < kGroup; ++i) {
    const double rounded = (static_cast<double>(x[i]) * inverse + kShift) - kShift;
    level[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(rounded));
  }
  return power_of_two(exponent - kBits);
}

RowTile make_tile(Kind kind, const float* x) {
  RowTile tile;
  std::int16_t natural[kTile];
  const auto& places = kind == Kind::int4 ? kPlaces<Kind::int4> : kPlaces<Kind::int8>;
  for (std::size_t group = 0; group < kTile / kGroup; ++group) {
    const std::size_t first = group * kGroup;
    tile.unit[group] = quantise(x + first, natural + first);
    std::int32_t sum = 0;
    for (std::size_t i = first; i < first + kGroup; ++i) {
      sum += natural[i];
      tile.level[places[i] / 32][places[i] % 32] = natural[i];
    }
    tile.offset[group] = (kind == Kind::int4 ? 8 : 128) * sum;
  }
  return tile;
}

// Always in halves, whatever the compiler makes of it: the order decides the bits.
double sum_of(double* lanes, std::size_t n) {
  for (std::size_t half = n / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace

void RowInput::set(Kind new_kind, const float* x, std::size_t n) {
  kind = new_kind;
  inputs = (n + kTile - 1) / kTile * kTile;
  finite = all_finite(x, n);
  tiles.clear();
  values.clear();
  if (kind == Kind::bf16) {
    values.resize(inputs / 8);
    for (std::size_t i = 0; i < n; ++i) values[i / 8].value[i % 8] = static_cast<double>(x[i]);
    return;
  }
  for (std::size_t first = 0; finite && first < n; first += kTile) {
    float padded[kTile] = {};
    std::copy_n(x + first, std::min(kTile, n - first), padded);
    tiles.push_back(make_tile(kind, padded));
  }
}

void multiply_rows(const RowInput& x, const Row* rows, std::size_t count, float* y) {
  const bool floats = x.kind == Kind::bf16;
  const RowInstructions& set = chosen();
  const RowPass pass = floats ? set.bf16 : x.kind == Kind::int4 ? set.int4 : set.int8;
  for (std::size_t k = 0; k < count; ++k) {
    const Row& row = rows[k];
    if (!floats && !x.finite) {
      y[row.output] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    double lanes[kValueLanes] = {};
    pass(x, row.data, rows[std::min(k + 1, count - 1)].data, lanes);
    const double sum = sum_of(lanes, floats ? kValueLanes : kGroupLanes);
    y[row.output] = static_cast<float>(floats ? sum : static_cast<double>(row.scale) * sum);
  }
}

void gather_rows(Kind kind, const std::uint8_t* rows, const float* scales, std::size_t n,
                 const float* x, std::size_t inputs, const bool* mask, float* y,
                 std::size_t threads) {
  constexpr std::size_t kWorthAThread = 1 << 20;  // bytes: about 100 us, starting one takes 20
  RowInput input;
  input.set(kind, x, inputs);
  const std::size_t stride = column_bytes(kind, input.inputs);
  std::vector<Row> kept;
  for (std::size_t j = 0; j < n; ++j) {
    if (mask[j]) kept.push_back({rows + j * stride, scales ? scales[j] : 1.0f, j});
    else y[j] = 0.0f;
  }
  const std::size_t parts =
      std::clamp<std::size_t>(kept.size() * stride / kWorthAThread, 1, threads);
  Pool pool(parts);
  pool.run(parts, [&](std::size_t part) {
    const std::size_t first = kept.size() * part / parts;
    const std::size_t last = kept.size() * (part + 1) / parts;
    multiply_rows(input, kept.data() + first, last - first, y);
  });
}

}  // namespace dipnet
