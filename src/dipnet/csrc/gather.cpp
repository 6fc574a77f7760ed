#include "gather.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "gather_pass.h"

#if defined(__x86_64__) && defined(__GLIBC__)
#define DIPNET_SIMD __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define DIPNET_SIMD
#endif

namespace dipnet {
namespace {

constexpr std::size_t kFlush = 65536;  // terms until 255 * 127 * terms might leave an int32

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

Columns gather(Kind kind, std::size_t all_outputs, const Term* terms, std::size_t count,
               const Activations& x, std::size_t first, std::size_t last) {
  Columns columns;
  columns.outputs = last - first;
  columns.count = kind == Kind::bf16 ? count : (count + 3) / 4 * 4;
  for (std::size_t k = 0; k < columns.count; ++k) {
    const Term& term = terms[std::min(k, count - 1)];
    columns.weights[k] = term.column + weight_bytes(kind, first);
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

DIPNET_SIMD
void add_to_total(const Sums& sums, double weight, std::size_t outputs, double* total) {
  for (std::size_t group = 0; group < outputs / kGroup; ++group) {
    const std::int32_t excess = sums.excess[group];
    for (std::size_t o = group * kGroup; o < (group + 1) * kGroup; ++o) {
      total[o] += weight * (sums.sum[o] - excess);
    }
  }
}

void add_integers(Kind kind, std::size_t outputs, const Term* terms, std::size_t count,
                  const Activations& x, double* total, std::size_t first, std::size_t last) {
  const InstructionSet& set = *chosen();
  const auto pass = kind == Kind::int4 ? set.int4 : set.int8;
  Sums sums;
  for (std::size_t begin = 0; begin < count;) {
    const std::uint8_t magnitude = x.magnitude[terms[begin].channel];
    std::fill_n(sums.sum, last - first, 0);
    std::fill_n(sums.excess, kGroups, 0);
    std::size_t end = begin;
    while (end < count && end - begin < kFlush && x.magnitude[terms[end].channel] == magnitude) {
      ++end;
    }
    for (std::size_t i = begin; i < end; i += kPass) {
      pass(gather(kind, outputs, terms + i, std::min(kPass, end - i), x, first, last), sums);
    }
    add_to_total(sums, std::ldexp(1.0, -2 * magnitude), last - first, total + first);
    begin = end;
  }
}

void add_floats(std::size_t outputs, const Term* terms, std::size_t count, const Activations& x,
                double* total, std::size_t first, std::size_t last) {
  float sums[kChunk] = {};
  for (std::size_t i = 0; i < count; i += kPass) {
    chosen().load()->bf16(
        gather(Kind::bf16, outputs, terms + i, std::min(kPass, count - i), x, first, last), sums);
  }
  for (std::size_t o = first; o < last; ++o) total[o] += sums[o - first];
}

DIPNET_SIMD
float largest(const float* x, const float* scale, const bool* keep, std::size_t n) {
  float bound = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float size = keep[i] ? std::abs(x[i] * scale[i]) : 0.0f;
    bound = size > bound ? size : bound;
  }
  return bound;
}

bool all_finite(const float* x, const bool* keep, std::size_t n) {
  float sum = 0;  // 0 * x is NaN just for NaN and the infinities
  for (std::size_t i = 0; i < n; ++i) sum += keep[i] ? 0.0f * x[i] : 0.0f;
  return sum == 0;
}

DIPNET_SIMD
void to_factors(const float* x, const float* scale, const bool* keep, std::size_t n, float bound,
                std::int16_t* factor, std::uint8_t* magnitude) {
  for (std::size_t i = 0; i < n; ++i) {
    const float value = keep[i] ? x[i] * scale[i] : 0.0f;
    const float size = std::abs(value);
    float limit = bound;
    std::uint8_t c = 0;
    for (std::size_t step = 1; step < kClasses; ++step) {
      const bool smaller = size <= limit * 0.25f;
      c = smaller ? static_cast<std::uint8_t>(step) : c;
      limit = smaller ? limit * 0.25f : limit;
    }
    magnitude[i] = c;
    factor[i] = static_cast<std::int16_t>(std::nearbyint(value / limit * 32767.0f));
  }
}

}  // namespace

std::size_t column_bytes(Kind kind, std::size_t outputs) {
  const std::size_t groups = kind == Kind::bf16 ? 0 : (outputs / kGroup + 63) / 64 * 64;
  return weight_bytes(kind, outputs) + groups;
}

void Activations::set(const float* x, const float* scale, const bool* keep, std::size_t n) {
  value.resize(n);
  for (std::size_t i = 0; i < n; ++i) value[i] = keep[i] ? x[i] : 0.0f;
  if (!scale) {
    bound = 1;
    return;
  }
  factor.assign(n, 0);
  magnitude.assign(n, 0);
  const float most = largest(x, scale, keep, n);
  bound = all_finite(x, keep, n) ? most * 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (most > 0 && std::isfinite(bound)) {
    to_factors(x, scale, keep, n, most, factor.data(), magnitude.data());
  }
}

void accumulate(Kind kind, std::size_t outputs, const Term* terms, std::size_t count,
                const Activations& activations, double* total, std::size_t first,
                std::size_t last) {
  for (std::size_t chunk = first; count > 0 && chunk < last; chunk += kChunk) {
    const std::size_t end = std::min(last, chunk + kChunk);
    if (kind == Kind::bf16) {
      add_floats(outputs, terms, count, activations, total, chunk, end);
    } else {
      add_integers(kind, outputs, terms, count, activations, total, chunk, end);
    }
  }
}

void finish(Kind kind, const Activations& activations, const double* total, std::size_t n,
            float* y) {
  const double unit = kind == Kind::bf16 ? 1.0 : static_cast<double>(activations.bound) / 127.0;
  for (std::size_t o = 0; o < n; ++o) y[o] = static_cast<float>(total[o] * unit);
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
