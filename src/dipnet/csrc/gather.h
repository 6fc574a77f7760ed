// Products with the kept columns of a matrix: y = sum over kept channels of x_i * column_i.
// Knows columns and activations; knows no file, no cache and no mask. Layout: docs/store-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory.h"

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
  std::uint32_t classes = 0;          // bit c: some channel is of class c

  // x, scale and keep have n entries; scale is null for bf16. Dropped channels become zero.
  void set(const float* x, const float* scale, const bool* keep, std::size_t n);
};

struct Term {
  const std::uint8_t* column;
  std::uint32_t channel;
};

constexpr std::size_t kMostTerms = 65536;  // of one class: 255 * 127 * terms stays an int32

// What the products of one token have added up to, for all outputs of a group.
class Totals {
 public:
  // Zero, for activations of these classes.
  void reset(Kind kind, std::size_t outputs, std::uint32_t classes);

  std::int32_t* sums(std::size_t c) const;    // (outputs) of class c
  std::int32_t* excess(std::size_t c) const;  // (outputs / kGroup), what the offsets added to them
  float* floats() const;                      // (outputs) of bf16

 private:
  std::size_t outputs_ = 0, row_ = 0;
  Memory memory_;
};

// Adds the terms' products to outputs [first, last) of the totals; first is a multiple of 512, last
// one too or the end. The terms of a call are sorted by class.
//
// int4, int8: exact, over any number of calls with at most kMostTerms terms of a class altogether.
// bf16: floats are added in the order of the terms and calls.
void accumulate(Kind kind, std::size_t outputs, const Term* terms, std::size_t count,
                const Activations& activations, Totals& totals, std::size_t first,
                std::size_t last);

// y[first, last) = the sum of the parts in the activations' units; NaN all over when an activation
// was not finite. Integer totals may come in parts, each of some of the columns; bf16 has one.
void finish(Kind kind, const Activations& activations, const Totals* parts, std::size_t count,
            std::size_t first, std::size_t last, float* y);

// The instruction sets that this CPU has: "avx512", "avx2", "portable". Choosing another than the
// best is for tests; an unknown or missing one throws std::invalid_argument.
const char* instruction_set();
void use_instruction_set(const char* name);

}  // namespace dipnet
