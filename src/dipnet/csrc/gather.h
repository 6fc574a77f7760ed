// Products with the kept columns of a matrix: y = sum over kept channels of x_i * column_i.
// Knows columns and activations; knows no file, no cache and no mask. Layout: docs/store-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dipnet {

enum class Kind : std::uint8_t { int4, int8, bf16 };

constexpr std::size_t kTile = 128;   // outputs are padded to a multiple of this
constexpr std::size_t kGroup = 32;   // outputs that share a group multiplier
constexpr std::size_t kClasses = 6;  // classes of magnitude: each a quarter of the one before

// Bytes of one column of `outputs` weights (a multiple of kTile), a multiple of 64.
std::size_t column_bytes(Kind kind, std::size_t outputs);

// What one token multiplies a site's columns with.
//
// Integer weights meet integer activations: the kept activations, times their channel's scale, are
// put into classes of magnitude relative to the largest (class c: (1/4^(c+1), 1/4^c]), and rounded
// to 15 bits within the class. All products and sums are then exact integers, so the result has
// the same bits in whatever order, on however many threads and with whatever instructions it is
// computed: columns are used as they arrive from the disk.
struct Activations {
  std::vector<float> value;           // x_i: what bf16 columns are multiplied with
  std::vector<std::int16_t> factor;   // in units of 2^-15 of the class's bound
  std::vector<std::uint8_t> magnitude;  // class
  float bound = 0;                    // max |x_i| * scale_i * 127 over the kept channels

  // x, scale and keep have n entries; scale is null for bf16. Dropped channels become zero.
  void set(const float* x, const float* scale, const bool* keep, std::size_t n);
};

struct Term {
  const std::uint8_t* column;
  std::uint32_t channel;
};

// Adds the terms' products to total[first, last), both multiples of kTile.
//
// int4, int8: `total` collects exact sums, in units of bound / 127, over any number of calls.
// The terms of a call are sorted by class. bf16: one call brings all terms, in the order of addition.
void accumulate(Kind kind, std::size_t outputs, const Term* terms, std::size_t count,
                const Activations& activations, double* total, std::size_t first,
                std::size_t last);

// y = total in the activations' units, over n outputs; NaN all over when an activation was not finite.
void finish(Kind kind, const Activations& activations, const double* total, std::size_t n, float* y);

// The instruction sets that this CPU has: "avx512", "avx2", "portable". Choosing another than the
// best is for tests; an unknown or missing one throws std::invalid_argument.
const char* instruction_set();
void use_instruction_set(const char* name);

}  // namespace dipnet
