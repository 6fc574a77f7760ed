#if defined(__x86_64__)
#include <immintrin.h>

#include "gather_pass.h"

#define DIPNET_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace dipnet {
namespace {

// For each quad of columns and each group, the four columns' multipliers as the bytes of an int32.
using Multipliers = std::int32_t[kPass / 4][kGroups];

DIPNET_TARGET
inline void add_excess(std::int32_t* at, __m512i offset, __m512i multipliers, __mmask16 valid) {
  const __m512i before = _mm512_maskz_loadu_epi32(valid, at);
  _mm512_mask_storeu_epi32(at, valid, _mm512_dpbusd_epi32(before, offset, multipliers));
}

// Four columns' multipliers for 32 groups; adds `offset` times their sums to the excess.
DIPNET_TARGET
inline void multiply_groups(const Columns& columns, std::size_t quad, std::size_t group,
                            std::size_t groups, __m512i offset, std::int32_t* made,
                            std::int32_t* excess) {
  const auto valid = static_cast<__mmask32>(
      groups - group >= 32 ? 0xffffffffu : (1u << (groups - group)) - 1);
  __m512i column[4];
  for (std::size_t i = 0; i < 4; ++i) {
    const std::size_t k = 4 * quad + i;
    const __m256i stored = _mm256_maskz_loadu_epi8(valid, columns.groups[k] + group);
    column[i] = _mm512_mulhrs_epi16(_mm512_cvtepi8_epi16(stored),
                                    _mm512_set1_epi16(columns.factor[k]));
  }
  const __m512i low = _mm512_set1_epi16(0xff);
  const __m512i ab = _mm512_or_si512(_mm512_and_si512(column[0], low),
                                     _mm512_slli_epi16(column[1], 8));
  const __m512i cd = _mm512_or_si512(_mm512_and_si512(column[2], low),
                                     _mm512_slli_epi16(column[3], 8));
  const __m512i even = _mm512_unpacklo_epi16(ab, cd);  // lane L: groups 8L..8L+3
  const __m512i odd = _mm512_unpackhi_epi16(ab, cd);   // lane L: groups 8L+4..8L+7
  const __m512i first = _mm512_permutex2var_epi64(
      even, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), odd);
  const __m512i second = _mm512_permutex2var_epi64(
      even, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), odd);
  _mm512_storeu_si512(made + group, first);
  _mm512_storeu_si512(made + group + 16, second);
  add_excess(excess + group, offset, first, static_cast<__mmask16>(valid));
  add_excess(excess + group + 16, offset, second, static_cast<__mmask16>(valid >> 16));
}

DIPNET_TARGET
inline void multiply_groups(const Columns& columns, int offset, Multipliers& made,
                            std::int32_t* excess) {
  const std::size_t groups = columns.outputs / kGroup;
  for (std::size_t quad = 0; quad < columns.count / 4; ++quad) {
    for (std::size_t group = 0; group < groups; group += 32) {
      multiply_groups(columns, quad, group, groups, _mm512_set1_epi8(static_cast<char>(offset)),
                      made[quad], excess);
    }
  }
}

// Bytes of four columns to vectors of four columns' bytes for each of 16 outputs.
struct Interleaved {
  __m512i part[4];
};

// The hardware fetches ahead within a page only, and a pass reads 2 KiB from each of 16 columns: the
// next pass's share is asked for here.
DIPNET_TARGET
inline Interleaved interleave(const Columns& from, std::size_t quad, std::size_t byte) {
  const std::uint8_t* const* const columns = from.weights + 4 * quad;
  for (std::size_t i = 0; i < 4; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(from.next[4 * quad + i] + byte), _MM_HINT_T0);
  }
  const __m512i a = _mm512_loadu_si512(columns[0] + byte);
  const __m512i b = _mm512_loadu_si512(columns[1] + byte);
  const __m512i c = _mm512_loadu_si512(columns[2] + byte);
  const __m512i d = _mm512_loadu_si512(columns[3] + byte);
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
           _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)}};
}

DIPNET_TARGET
void int4(const Columns& columns, const Sums& sums) {
  Multipliers made;
  multiply_groups(columns, 8, made, sums.excess);
  const __m512i high_nibbles = _mm512_set1_epi8(static_cast<char>(0xf0));
  const std::size_t quads = columns.count / 4;
  for (std::size_t tile = 0; tile < columns.outputs; tile += kTile) {
    std::int32_t* const at = sums.sum + tile;
    __m512i sum[8];
    for (std::size_t v = 0; v < 8; ++v) sum[v] = _mm512_load_si512(at + 16 * v);
    for (std::size_t quad = 0; quad < quads; ++quad) {
      const Interleaved bytes = interleave(columns, quad, tile / 2);
      const std::int32_t* const m = made[quad] + tile / kGroup;
      for (std::size_t v = 0; v < 4; ++v) {
        const __m512i factors = _mm512_set1_epi32(m[v]);
        const __m512i high = _mm512_and_si512(bytes.part[v], high_nibbles);
        sum[2 * v] = _mm512_dpbusd_epi32(sum[2 * v], bytes.part[v], factors);
        sum[2 * v + 1] = _mm512_dpbusd_epi32(sum[2 * v + 1], high, factors);
      }
    }
    for (std::size_t v = 0; v < 8; ++v) _mm512_store_si512(at + 16 * v, sum[v]);
  }
}

DIPNET_TARGET
void int8(const Columns& columns, const Sums& sums) {
  Multipliers made;
  multiply_groups(columns, 128, made, sums.excess);
  const std::size_t quads = columns.count / 4;
  for (std::size_t tile = 0; tile < columns.outputs; tile += 64) {
    std::int32_t* const at = sums.sum + tile;
    __m512i sum[4];
    for (std::size_t v = 0; v < 4; ++v) sum[v] = _mm512_load_si512(at + 16 * v);
    for (std::size_t quad = 0; quad < quads; ++quad) {
      const Interleaved bytes = interleave(columns, quad, tile);
      const std::int32_t* const m = made[quad] + tile / kGroup;
      for (std::size_t v = 0; v < 4; ++v) {
        sum[v] = _mm512_dpbusd_epi32(sum[v], bytes.part[v], _mm512_set1_epi32(m[v / 2]));
      }
    }
    for (std::size_t v = 0; v < 4; ++v) _mm512_store_si512(at + 16 * v, sum[v]);
  }
}

DIPNET_TARGET
void bf16(const Columns& columns, float* sums) {
  for (std::size_t o = 0; o < columns.outputs; o += 16) {
    __m512 sum = _mm512_loadu_ps(sums + o);
    for (std::size_t k = 0; k < columns.count; ++k) {
      const auto* at = reinterpret_cast<const __m256i*>(columns.weights[k] + 2 * o);
      _mm_prefetch(reinterpret_cast<const char*>(columns.next[k] + 2 * o), _MM_HINT_T0);
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16);
      sum = _mm512_fmadd_ps(_mm512_set1_ps(columns.value[k]), _mm512_castsi512_ps(wide), sum);
    }
    _mm512_storeu_ps(sums + o, sum);
  }
}

bool present() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const InstructionSet kAvx512{"avx512", present, int4, int8, bf16};

}  // namespace dipnet
#endif
