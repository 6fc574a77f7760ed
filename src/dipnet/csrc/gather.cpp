#include "gather.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "gather_pass.h"
#include "simd.h"

namespace dipnet {
namespace {

const InstructionSet* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kPortable};

const InstructionSet* best() {
  return *std::find_if(std::begin(kAll), std::end(kAll), [](auto* set) { return set->present(); });
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

std::size_t weight_bytes(Kind kind, std::size_t outputs) {
  return kind == Kind::int4 ? outputs / 2 : kind == Kind::int8 ? outputs : 2 * outputs;
}

// The first of `left` terms, at most kPass.
Columns gather(Kind kind, std::size_t all_outputs, const Term* terms, std::size_t left,
               const Activations& x, std::size_t first, std::size_t last) {
  const std::size_t count = std::min(kPass, left);
  Columns columns;
  columns.outputs = last - first;
  columns.count = kind == Kind::bf16 ? count : (count + 3) / 4 * 4;
  for (std::size_t k = 0; k < columns.count; ++k) {
    const Term& term = terms[std::min(k, count - 1)];
    const Term& next = terms[std::min(k + kPass, left - 1)];
    columns.weights[k] = term.column + weight_bytes(kind, first);
    columns.next[k] = next.column + weight_bytes(kind, first);
    if (kind == Kind::bf16) {
      columns.value[k] = x.value[term.channel];
      continue;
    }
    columns.groups[k] = reinterpret_cast<const std::int8_t*>(
        term.column + weight_bytes(kind, all_outputs) + first / kGroup);
    columns.factor[k] = k < count ? x.factor[term.channel] : 0;
  }
  return columns;
}

void add_integers(Kind kind, std::size_t outputs, const Term* terms, std::size_t count,
                  const Activations& x, const Totals& totals, std::size_t first,
                  std::size_t last) {
  const InstructionSet& set = *chosen();
  const auto pass = kind == Kind::int4 ? set.int4 : set.int8;
  for (std::size_t begin = 0; begin < count;) {
    const std::uint8_t c = x.magnitude[terms[begin].channel];
    std::size_t end = begin;
    while (end < count && x.magnitude[terms[end].channel] == c) ++end;
    const Sums sums{totals.sums(c) + first, totals.excess(c) + first / kGroup};
    for (std::size_t i = begin; i < end; i += kPass) {
      pass(gather(kind, outputs, terms + i, end - i, x, first, last), sums);
    }
    begin = end;
  }
}

void add_floats(std::size_t outputs, const Term* terms, std::size_t count, const Activations& x,
                const Totals& totals, std::size_t first, std::size_t last) {
  for (std::size_t i = 0; i < count; i += kPass) {
    chosen().load()->bf16(gather(Kind::bf16, outputs, terms + i, count - i, x, first, last),
                          totals.floats() + first);
  }
}

// Of whole bytes and of their high nibbles, 16-fold: see gather_pass.h.
DIPNET_SIMD
void add_nibbles(const std::int32_t* sums, const std::int32_t* excess, double weight,
                 std::size_t outputs, double* total) {
  for (std::size_t group = 0; group < outputs / kGroup; ++group) {
    const std::int32_t* const low = sums + group * kGroup;
    const std::int32_t* const high = low + kGroup / 2;
    double* const to = total + group * kGroup;
    for (std::size_t i = 0; i < kGroup / 2; ++i) {
      to[i] += weight * (low[i] - high[i] - excess[group]);
      to[i + kGroup / 2] += weight * ((high[i] >> 4) - excess[group]);
    }
  }
}

DIPNET_SIMD
void add_bytes(const std::int32_t* sums, const std::int32_t* excess, double weight,
               std::size_t outputs, double* total) {
  for (std::size_t group = 0; group < outputs / kGroup; ++group) {
    for (std::size_t o = group * kGroup; o < (group + 1) * kGroup; ++o) {
      total[o] += weight * (sums[o] - excess[group]);
    }
  }
}

DIPNET_SIMD
void to_floats(const double* total, double unit, std::size_t n, float* y) {
  for (std::size_t o = 0; o < n; ++o) y[o] = static_cast<float>(total[o] * unit);
}

// The loops below have no branch and no bool, and compare sizes as the integers that their bits are:
// so the compiler vectorises them without reordering floats.
inline std::uint32_t kept_bits(const bool* keep, std::size_t i) {  // all ones or none
  return 0u - reinterpret_cast<const std::uint8_t*>(keep)[i];
}

inline std::uint32_t size_bits(float value) {
  return std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
}

DIPNET_SIMD
float largest(const float* x, const float* scale, const bool* keep, std::size_t n) {
  std::uint32_t most = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t size = size_bits(x[i] * scale[i]) & kept_bits(keep, i);
    most = size > most ? size : most;
  }
  return std::bit_cast<float>(most);
}

DIPNET_SIMD
bool all_finite(const float* x, const bool* keep, std::size_t n) {
  std::uint32_t wrong = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t unbounded = size_bits(x[i]) >= 0x7f800000u ? 1u : 0u;
    wrong |= unbounded & kept_bits(keep, i);
  }
  return wrong == 0;
}

// To the nearest integer, ties to even, for less than 2^22: adding 1.5 * 2^23 leaves no room for a
// fraction. std::nearbyint would keep the loop from being vectorised.
inline std::int16_t round_to_even(float value) {
  constexpr float kShift = 12582912.0f;
  return static_cast<std::int16_t>(static_cast<std::int32_t>((value + kShift) - kShift));
}

DIPNET_SIMD
void to_factors(const float* x, const float* scale, const bool* keep, std::size_t n, float bound,
                std::int16_t* factor, std::uint8_t* magnitude) {
  for (std::size_t i = 0; i < n; ++i) {
    const auto product = std::bit_cast<std::uint32_t>(x[i] * scale[i]) & kept_bits(keep, i);
    const auto value = std::bit_cast<float>(product);
    const float size = std::bit_cast<float>(product & 0x7fffffffu);
    float limit = bound, lower = bound;
    std::uint32_t c = 0;
    for (std::size_t step = 1; step < kClasses; ++step) {
      lower *= 0.25f;
      c += size <= lower ? 1u : 0u;
      limit = size <= lower ? lower : limit;
    }
    magnitude[i] = static_cast<std::uint8_t>(c);
    factor[i] = round_to_even(value / limit * 32767.0f);
  }
}

DIPNET_SIMD
std::uint32_t classes_of(const std::uint8_t* magnitude, std::size_t n) {
  std::uint8_t found = 0;
  for (std::size_t i = 0; i < n; ++i) found |= static_cast<std::uint8_t>(1u << magnitude[i]);
  return found;
}

}  // namespace

std::size_t column_bytes(Kind kind, std::size_t outputs) {
  const std::size_t groups = kind == Kind::bf16 ? 0 : (outputs / kGroup + 63) / 64 * 64;
  return weight_bytes(kind, outputs) + groups;
}

void Activations::set(const float* x, const float* scale, const bool* keep, std::size_t n) {
  if (!scale) {
    bound = 1;
    value.resize(n);
    for (std::size_t i = 0; i < n; ++i) value[i] = keep[i] ? x[i] : 0.0f;
    return;
  }
  factor.resize(n);
  magnitude.resize(n);
  const float most = largest(x, scale, keep, n);
  bound = all_finite(x, keep, n) ? most * 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (most > 0 && std::isfinite(bound)) {
    to_factors(x, scale, keep, n, most, factor.data(), magnitude.data());
  } else {
    std::fill(factor.begin(), factor.end(), 0);
    std::fill(magnitude.begin(), magnitude.end(), 0);
  }
  classes = classes_of(magnitude.data(), n);
}

void Totals::reset(Kind kind, std::size_t outputs, std::uint32_t classes) {
  constexpr std::size_t kLine = 16;  // int32 of a cache line
  outputs_ = outputs;
  row_ = outputs + (outputs / kGroup + kLine - 1) / kLine * kLine;
  const std::size_t bytes = kClasses * row_ * sizeof(std::int32_t);
  if (memory_.bytes() < bytes) memory_ = Memory(bytes);
  if (kind == Kind::bf16) {
    std::fill_n(floats(), outputs, 0.0f);
    return;
  }
  for (std::size_t c = 0; c < kClasses; ++c) {
    if (classes >> c & 1) std::fill_n(sums(c), row_, 0);
  }
}

std::int32_t* Totals::sums(std::size_t c) const {
  return reinterpret_cast<std::int32_t*>(memory_.data()) + c * row_;
}

std::int32_t* Totals::excess(std::size_t c) const {
  return sums(c) + outputs_;
}

float* Totals::floats() const { return reinterpret_cast<float*>(memory_.data()); }

void accumulate(Kind kind, std::size_t outputs, const Term* terms, std::size_t count,
                const Activations& activations, Totals& totals, std::size_t first,
                std::size_t last) {
  for (std::size_t chunk = first; count > 0 && chunk < last; chunk += kChunk) {
    const std::size_t end = std::min(last, chunk + kChunk);
    if (kind == Kind::bf16) {
      add_floats(outputs, terms, count, activations, totals, chunk, end);
    } else {
      add_integers(kind, outputs, terms, count, activations, totals, chunk, end);
    }
  }
}

void finish(Kind kind, const Activations& activations, const Totals* parts, std::size_t count,
            std::size_t first, std::size_t last, float* y) {
  if (kind == Kind::bf16) {
    std::copy(parts->floats() + first, parts->floats() + last, y + first);
    return;
  }
  const double unit = static_cast<double>(activations.bound) / 127.0;
  const auto add = kind == Kind::int4 ? add_nibbles : add_bytes;
  double total[kChunk];
  for (std::size_t chunk = first; chunk < last; chunk += kChunk) {
    const std::size_t n = std::min(kChunk, last - chunk);
    std::fill_n(total, kChunk, 0.0);
    for (std::size_t part = 0; part < count * kClasses; ++part) {
      const std::size_t c = part % kClasses;
      const Totals& totals = parts[part / kClasses];
      if (!(activations.classes >> c & 1)) continue;
      add(totals.sums(c) + chunk, totals.excess(c) + chunk / kGroup,
          std::ldexp(1.0, -2 * static_cast<int>(c)), (n + kGroup - 1) / kGroup * kGroup, total);
    }
    to_floats(total, unit, n, y + chunk);
  }
}

const char* instruction_set() { return chosen().load()->name; }

void use_instruction_set(const char* name) {
  for (const InstructionSet* set : kAll) {
    if (set->name == std::string(name) && set->present()) {
      chosen() = set;
      return;
    }
  }
  throw std::invalid_argument("this CPU has no instruction set '" + std::string(name) + "'");
}

}  // namespace dipnet
