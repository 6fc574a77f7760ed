#if defined(__x86_64__)
#include <immintrin.h>

#include "rows_pass.h"
#include "rows_x86.h"

#define DIPNET_TARGET __attribute__((target("avx2,fma")))

namespace dipnet {
namespace {

DIPNET_TARGET
inline __m256i load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

DIPNET_TARGET
inline void fetch(const std::uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

// The sums of lanes that are 4 apart.
DIPNET_TARGET
inline __m128i fold(__m256i sums) {
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

DIPNET_TARGET
void int4(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next, double* lanes) {
  const __m256i nibble = _mm256_set1_epi16(15);
  const std::uint8_t* multipliers = row + x.inputs / 2;
  __m256d total = _mm256_setzero_pd();
  for (std::size_t t = 0; t < x.tiles.size(); ++t, multipliers += kGroupLanes) {
    const RowTile& tile = x.tiles[t];
    fetch(next + 64 * t);
    __m256i sums = _mm256_setzero_si256();
    for (std::size_t half = 0; half < 2; ++half) {
      const __m256i words = load(row + 64 * t + 32 * half);
      const __m256i plane[4] = {_mm256_and_si256(words, nibble),
                                _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble),
                                _mm256_and_si256(_mm256_srli_epi16(words, 8), nibble),
                                _mm256_srli_epi16(words, 12)};
      for (std::size_t p = 0; p < 4; ++p) {
        const __m256i level = load(tile.level[p] + 16 * half);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(plane[p], level));
      }
    }
    total = add_groups(total, fold(sums), tile, multipliers);
  }
  _mm256_storeu_pd(lanes, total);
}

DIPNET_TARGET
inline __m256i multiply_bytes(const std::uint8_t* bytes, const std::int16_t (*level)[32]) {
  __m256i sums = _mm256_setzero_si256();
  for (std::size_t half = 0; half < 2; ++half) {
    const __m256i words = load(bytes + 32 * half);
    const __m256i even = _mm256_and_si256(words, _mm256_set1_epi16(255));
    const __m256i odd = _mm256_srli_epi16(words, 8);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, load(level[0] + 16 * half)));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(odd, load(level[1] + 16 * half)));
  }
  return sums;
}

DIPNET_TARGET
void int8(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next, double* lanes) {
  const std::uint8_t* multipliers = row + x.inputs;
  __m256d total = _mm256_setzero_pd();
  for (std::size_t t = 0; t < x.tiles.size(); ++t, multipliers += kGroupLanes) {
    const RowTile& tile = x.tiles[t];
    fetch(next + kTile * t);
    fetch(next + kTile * t + 64);
    const __m128i first = fold(multiply_bytes(row + kTile * t, tile.level));
    const __m128i second = fold(multiply_bytes(row + kTile * t + 64, tile.level + 2));
    total = add_groups(total, _mm_hadd_epi32(first, second), tile, multipliers);
  }
  _mm256_storeu_pd(lanes, total);
}

DIPNET_TARGET
void bf16(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next, double* lanes) {
  __m256d sums[8] = {};
  for (std::size_t i = 0; i < x.inputs; i += kValueLanes) {
    fetch(next + 2 * i);
    for (std::size_t part = 0; part < 8; ++part) {
      const auto* const at = reinterpret_cast<const __m128i*>(row + 2 * i + 8 * part);
      const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(at)), 16);
      const double* const values = x.values[i / 8 + part / 2].value + 4 * (part % 2);
      sums[part] = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_castsi128_ps(wide)),
                                   _mm256_load_pd(values), sums[part]);
    }
  }
  for (std::size_t part = 0; part < 8; ++part) _mm256_storeu_pd(lanes + 4 * part, sums[part]);
}

}  // namespace

const RowInstructions kRowsAvx2{"avx2", int4, int8, bf16};

}  // namespace dipnet
#endif
