#if defined(__x86_64__)
#include <immintrin.h>

#include "gather_pass.h"

#define DIPNET_TARGET __attribute__((target("avx2,fma")))

namespace dipnet {
namespace {

using Multipliers = std::int32_t[kPass / 4][kGroups];

// The sum of the four products of unsigned bytes with signed ones in each 32-bit lane. The pairs
// that are added in 16 bits must not leave them: 2 * 15 * 127 and 2 * 127 * 127 do not.
DIPNET_TARGET
inline __m256i dot(__m256i sum, __m256i bytes, __m256i factors) {
  const __m256i pairs = _mm256_maddubs_epi16(bytes, factors);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Chunks start at multiples of 16 groups and a column's groups are padded to 64 bytes, so that a
// load of 16 stays inside the column.
DIPNET_TARGET
inline void multiply_groups(const Columns& columns, Multipliers& made) {
  const __m256i low = _mm256_set1_epi16(0xff);
  for (std::size_t quad = 0; quad < columns.count / 4; ++quad) {
    for (std::size_t group = 0; group < columns.outputs / kGroup; group += 16) {
      __m256i column[4];
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t k = 4 * quad + i;
        const auto* at = reinterpret_cast<const __m128i*>(columns.groups[k] + group);
        column[i] = _mm256_mulhrs_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(at)),
                                        _mm256_set1_epi16(columns.factor[k]));
      }
      const __m256i ab = _mm256_or_si256(_mm256_and_si256(column[0], low),
                                         _mm256_slli_epi16(column[1], 8));
      const __m256i cd = _mm256_or_si256(_mm256_and_si256(column[2], low),
                                         _mm256_slli_epi16(column[3], 8));
      const __m256i even = _mm256_unpacklo_epi16(ab, cd), odd = _mm256_unpackhi_epi16(ab, cd);
      auto* const to = reinterpret_cast<__m256i*>(made[quad] + group);
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

struct Interleaved {
  __m256i part[4];
};

DIPNET_TARGET
inline __m256i load(const std::uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

DIPNET_TARGET
inline Interleaved interleave(const Columns& from, std::size_t quad, std::size_t byte) {
  const std::uint8_t* const* const columns = from.weights + 4 * quad;
  for (std::size_t i = 0; i < 4; ++i) {  // see gather_avx512.cpp
    _mm_prefetch(reinterpret_cast<const char*>(from.next[4 * quad + i] + byte), _MM_HINT_T1);
  }
  const __m256i a = load(columns[0] + byte), b = load(columns[1] + byte);
  const __m256i c = load(columns[2] + byte), d = load(columns[3] + byte);
  const __m256i ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
  return {{_mm256_unpacklo_epi16(ab_low, cd_low), _mm256_unpackhi_epi16(ab_low, cd_low),
           _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)}};
}

// Adds the products of two nibbles of each byte. A whole byte times a multiplier would not fit the 16
// bits of a pair, so the byte's sum is put together from the nibbles'.
DIPNET_TARGET
inline void add(std::int32_t* low_at, std::int32_t* high_at, __m256i low, __m256i high,
                std::int32_t factors) {
  const __m256i m = _mm256_set1_epi32(factors), zero = _mm256_setzero_si256();
  const __m256i sixteenfold = _mm256_slli_epi32(dot(zero, high, m), 4);
  auto* const low_sum = reinterpret_cast<__m256i*>(low_at);
  auto* const high_sum = reinterpret_cast<__m256i*>(high_at);
  const __m256i whole = _mm256_add_epi32(dot(_mm256_load_si256(low_sum), low, m), sixteenfold);
  _mm256_store_si256(low_sum, whole);
  _mm256_store_si256(high_sum, _mm256_add_epi32(_mm256_load_si256(high_sum), sixteenfold));
}

// 32 bytes of a tile are its outputs 32 v + 8 half + (0..7) and those 16 further on, v = 0..3.
DIPNET_TARGET
void int4(const Columns& columns, const Sums& sums) {
  Multipliers made;
  multiply_groups(columns, made);
  const __m256i low_nibbles = _mm256_set1_epi8(15);
  for (std::size_t quad = 0; quad < columns.count / 4; ++quad) {
    for (std::size_t group = 0; group < columns.outputs / kGroup; group += 8) {
      auto* const e = reinterpret_cast<__m256i*>(sums.excess + group);
      const auto* m = reinterpret_cast<const __m256i*>(made[quad] + group);
      _mm256_store_si256(e, dot(_mm256_load_si256(e), _mm256_set1_epi8(8), _mm256_loadu_si256(m)));
    }
    for (std::size_t tile = 0; tile < columns.outputs; tile += kTile) {
      const std::int32_t* const m = made[quad] + tile / kGroup;
      for (std::size_t half = 0; half < 2; ++half) {
        const Interleaved bytes = interleave(columns, quad, tile / 2 + 32 * half);
        std::int32_t* const at = sums.sum + tile + 8 * half;
        for (std::size_t v = 0; v < 4; ++v) {
          const __m256i low = _mm256_and_si256(bytes.part[v], low_nibbles);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes.part[v], 4), low_nibbles);
          add(at + 32 * v, at + 32 * v + kGroup / 2, low, high, m[v]);
        }
      }
    }
  }
}

// The stored byte less 128, as magnitude and sign: the sign moves to the multiplier.
DIPNET_TARGET
void int8(const Columns& columns, const Sums& sums) {
  Multipliers made;
  multiply_groups(columns, made);
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80));
  for (std::size_t quad = 0; quad < columns.count / 4; ++quad) {
    for (std::size_t byte = 0; byte < columns.outputs; byte += 32) {
      const Interleaved bytes = interleave(columns, quad, byte);
      const std::size_t tile = byte / 64 * 64;
      for (std::size_t v = 0; v < 4; ++v) {
        const __m256i weight = _mm256_xor_si256(bytes.part[v], offset);
        auto* const sum =
            reinterpret_cast<__m256i*>(sums.sum + tile + 8 * (byte / 32 % 2) + 16 * v);
        const __m256i m = _mm256_set1_epi32(made[quad][tile / kGroup + v / 2]);
        _mm256_store_si256(sum, dot(_mm256_load_si256(sum), _mm256_abs_epi8(weight),
                                    _mm256_sign_epi8(m, weight)));
      }
    }
  }
}

DIPNET_TARGET
void bf16(const Columns& columns, float* sums) {
  for (std::size_t o = 0; o < columns.outputs; o += 8) {
    __m256 sum = _mm256_loadu_ps(sums + o);
    for (std::size_t k = 0; k < columns.count; ++k) {
      const auto* at = reinterpret_cast<const __m128i*>(columns.weights[k] + 2 * o);
      _mm_prefetch(reinterpret_cast<const char*>(columns.next[k] + 2 * o), _MM_HINT_T1);
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16);
      sum = _mm256_fmadd_ps(_mm256_set1_ps(columns.value[k]), _mm256_castsi256_ps(wide), sum);
    }
    _mm256_storeu_ps(sums + o, sum);
  }
}

bool present() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const InstructionSet kAvx2{"avx2", present, int4, int8, bf16};

}  // namespace dipnet
#endif
