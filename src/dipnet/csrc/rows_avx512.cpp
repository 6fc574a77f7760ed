#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#endif
#include <immintrin.h>

#include "rows_pass.h"
#include "rows_x86.h"

#define DIPNET_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma")))

namespace dipnet {
namespace {

DIPNET_TARGET
inline __m512i load(const std::uint8_t* row, const std::uint8_t* next, std::size_t byte) {
  _mm_prefetch(reinterpret_cast<const char*>(next + byte), _MM_HINT_T1);
  return _mm512_loadu_si512(row + byte);
}

// The sums of lanes that are 4 apart.
DIPNET_TARGET
inline __m128i fold(__m512i sums) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sums),
                                        _mm512_extracti64x4_epi64(sums, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

DIPNET_TARGET
void int4(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next, double* lanes) {
  const __m512i nibble = _mm512_set1_epi16(15);
  const std::uint8_t* multipliers = row + x.inputs / 2;
  __m256d total = _mm256_setzero_pd();
  for (std::size_t t = 0; t < x.tiles.size(); ++t, multipliers += kGroupLanes) {
    const RowTile& tile = x.tiles[t];
    const __m512i words = load(row, next, 64 * t);
    const __m512i plane[4] = {_mm512_and_si512(words, nibble),
                              _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble),
                              _mm512_and_si512(_mm512_srli_epi16(words, 8), nibble),
                              _mm512_srli_epi16(words, 12)};
    __m512i sums = _mm512_setzero_si512();
    for (std::size_t p = 0; p < 4; ++p) {
      sums = _mm512_dpwssd_epi32(sums, plane[p], _mm512_load_si512(tile.level[p]));
    }
    total = add_groups(total, fold(sums), tile, multipliers);
  }
  _mm256_storeu_pd(lanes, total);
}

DIPNET_TARGET
inline __m512i multiply_bytes(__m512i words, const std::int16_t (*level)[32]) {
  const __m512i even = _mm512_and_si512(words, _mm512_set1_epi16(255));
  const __m512i sums = _mm512_dpwssd_epi32(_mm512_setzero_si512(), even,
                                           _mm512_load_si512(level[0]));
  return _mm512_dpwssd_epi32(sums, _mm512_srli_epi16(words, 8), _mm512_load_si512(level[1]));
}

DIPNET_TARGET
void int8(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next, double* lanes) {
  const std::uint8_t* multipliers = row + x.inputs;
  __m256d total = _mm256_setzero_pd();
  for (std::size_t t = 0; t < x.tiles.size(); ++t, multipliers += kGroupLanes) {
    const RowTile& tile = x.tiles[t];
    const __m128i first = fold(multiply_bytes(load(row, next, kTile * t), tile.level));
    const __m128i second = fold(multiply_bytes(load(row, next, kTile * t + 64), tile.level + 2));
    total = add_groups(total, _mm_hadd_epi32(first, second), tile, multipliers);
  }
  _mm256_storeu_pd(lanes, total);
}

DIPNET_TARGET
void bf16(const RowInput& x, const std::uint8_t* row, const std::uint8_t* next, double* lanes) {
  __m512d sums[4] = {};
  for (std::size_t i = 0; i < x.inputs; i += kValueLanes) {
    _mm_prefetch(reinterpret_cast<const char*>(next + 2 * i), _MM_HINT_T1);
    for (std::size_t part = 0; part < 4; ++part) {
      const auto* const at = reinterpret_cast<const __m128i*>(row + 2 * i) + part;
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16);
      sums[part] = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_castsi256_ps(wide)),
                                   _mm512_load_pd(x.values[i / 8 + part].value), sums[part]);
    }
  }
  for (std::size_t part = 0; part < 4; ++part) _mm512_storeu_pd(lanes + 8 * part, sums[part]);
}

}  // namespace

const RowInstructions kRowsAvx512{"avx512", int4, int8, bf16};

}  // namespace dipnet
#endif
