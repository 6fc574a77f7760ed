// Products with the kept rows of a matrix: y_j = row_j * x for kept j, 0 for the others. A row has the
// bytes of a column (docs/store-format.md) and runs over inputs where that runs over outputs.
// Knows rows and activations; knows no file, no cache and no site.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gather.h"

namespace dipnet {

// What a tile of integer weights is multiplied with. The levels lie in the order in which 32 words of
// 16 bits are cut into their nibbles or bytes: see place_of in rows.cpp.
struct alignas(64) RowTile {
  std::int16_t level[4][32];  // x_i in units of its group, to 14 bits and sign
  double unit[4];             // of the 4 groups: powers of two
  std::int32_t offset[4];     // what the weights' offset, 8 or 128, adds to a group's sum
};

struct alignas(64) RowValues {
  double value[8];
};

// The activations that rows are multiplied with, the same for all rows.
//
// Each group of 32 is rounded to 15 bits, in a unit that is a power of two. A group's sum is then an
// exact integer, and so is its product with the row's multiplier; bf16 weights times floats are exact
// doubles. Only the sum over groups rounds, as doubles in a fixed order: the result has the same
// bits with whatever instructions and on however many threads it is computed.
struct RowInput {
  Kind kind = Kind::bf16;
  std::size_t inputs = 0;  // padded to a multiple of kTile
  bool finite = true;      // else integer weights give NaN
  std::vector<RowTile> tiles;     // int4, int8
  std::vector<RowValues> values;  // bf16

  void set(Kind kind, const float* x, std::size_t n);
};

struct Row {
  const std::uint8_t* data;
  float scale;  // unused by bf16
  std::size_t output;
};

// y[row.output] = the product of each row: column_bytes(x.kind, x.inputs) bytes at any address.
void multiply_rows(const RowInput& x, const Row* rows, std::size_t count, float* y);

// All y of n rows that lie one after the other. x has `inputs` entries, n those of the others; scales
// is null for bf16. Uses at most `threads` threads, and fewer when there is too little work.
void gather_rows(Kind kind, const std::uint8_t* rows, const float* scales, std::size_t n,
                 const float* x, std::size_t inputs, const bool* mask, float* y,
                 std::size_t threads);

}  // namespace dipnet
