// What the loops of rows.cpp share for AVX2 and AVX-512.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "rows_pass.h"

namespace dipnet {

// Adds the sums of a tile's groups times the row's multipliers.
__attribute__((target("avx2,fma")))
inline __m256d add_groups(__m256d lanes, __m128i sums, const RowTile& tile,
                          const std::uint8_t* multipliers) {
  std::int32_t four;
  std::memcpy(&four, multipliers, sizeof four);
  const __m256d r = _mm256_cvtepi32_pd(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
  const auto* const offset = reinterpret_cast<const __m128i*>(tile.offset);
  const __m256d sum = _mm256_cvtepi32_pd(_mm_sub_epi32(sums, _mm_load_si128(offset)));
  return _mm256_fmadd_pd(sum, _mm256_mul_pd(r, _mm256_load_pd(tile.unit)), lanes);
}

}  // namespace dipnet
