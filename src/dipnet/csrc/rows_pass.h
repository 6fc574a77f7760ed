// The inner loops of rows.cpp, one set for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace dipnet {

constexpr std::size_t kGroupLanes = 4;   // group g is added to lane g % 4
constexpr std::size_t kValueLanes = 32;  // bf16: input i is added to lane i % 32

// Adds a row's products to the lanes. `next` is the row to be multiplied after this one, fetched
// meanwhile: the hardware fetches ahead within a page only.
using RowPass = void (*)(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next,
                         double* lanes);

struct RowInstructions {
  const char* name;  // that of the InstructionSet in gather_pass.h
  RowPass int4, int8, bf16;
};

extern const RowInstructions kRowsPortable;
#if defined(__x86_64__)
extern const RowInstructions kRowsAvx2, kRowsAvx512;
#endif

}  // namespace dipnet
