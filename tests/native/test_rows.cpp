// Against plain loops, with every instruction set; rows, scales, x and mask end where their memory
// ends.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>

#include "check.h"
#include "rows.h"

namespace {

using namespace dipnet;

std::mt19937 generator(1);

std::size_t padded(std::size_t inputs) { return (inputs + kTile - 1) / kTile * kTile; }

// As many bytes as `n` rows have and not one more, at an address that is aligned to nothing.
class Rows {
 public:
  Rows(Kind kind, std::size_t n, std::size_t inputs)
      : shift_(generator() % 40),
        bytes_(n * column_bytes(kind, padded(inputs))),
        memory_(new std::uint8_t[shift_ + bytes_]) {
    for (std::size_t i = 0; i < bytes_; ++i) at()[i] = static_cast<std::uint8_t>(generator());
    for (std::size_t i = 1; kind == Kind::bf16 && i < bytes_; i += 2) {
      at()[i] = 0x3f | (at()[i] & 0x80);  // numbers of ordinary size
    }
  }

  std::uint8_t* at() const { return memory_.get() + shift_; }

 private:
  std::size_t shift_, bytes_;
  std::unique_ptr<std::uint8_t[]> memory_;
};

// Weight i of a row without its scale.
double weight(Kind kind, const std::uint8_t* row, std::size_t inputs, std::size_t i) {
  if (kind == Kind::bf16) {
    std::uint16_t half;
    std::memcpy(&half, row + 2 * i, 2);
    return std::bit_cast<float>(std::uint32_t{half} << 16);
  }
  const std::size_t weights = kind == Kind::int4 ? padded(inputs) / 2 : padded(inputs);
  const auto multiplier = static_cast<std::int8_t>(row[weights + i / kGroup]);
  if (kind == Kind::int8) {
    const std::size_t byte = 16 * (i / 4 % 4) + 4 * (i % 64 / 16) + i % 4;
    return multiplier * (row[i / 64 * 64 + byte] - 128);
  }
  const std::size_t byte = 16 * (i / 4 % 4) + 4 * (i % 128 / 32) + i % 4;
  const std::uint8_t both = row[i / 128 * 64 + byte];
  return multiplier * ((i % 32 < 16 ? both & 15 : both >> 4) - 8);
}

// x as it is rounded for integer weights.
std::vector<double> rounded(const float* x, std::size_t n) {
  std::vector<double> made(x, x + n);
  for (std::size_t first = 0; first < n; first += kGroup) {
    const std::size_t last = std::min(n, first + kGroup);
    double most = 0;
    for (std::size_t i = first; i < last; ++i) most = std::max(most, std::abs(made[i]));
    int exponent;
    std::frexp(most, &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent, -125) - 14);
    for (std::size_t i = first; i < last; ++i) made[i] = std::nearbyint(made[i] / unit) * unit;
  }
  return made;
}

struct Case {
  Case(Kind kind, std::size_t n, std::size_t inputs)
      : rows(kind, n, inputs),
        x(new float[inputs]),
        scales(new float[n]),
        mask(new bool[n]),
        y(new float[n]) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < inputs; ++i) {
      x[i] = normal(generator) * std::ldexp(1.0f, static_cast<int>(generator() % 30) - 15);
    }
    for (std::size_t j = 0; j < n; ++j) {
      scales[j] = static_cast<float>(generator() % 100) / 50;
      mask[j] = generator() % 3 != 0;
    }
  }

  Rows rows;
  std::unique_ptr<float[]> x, scales;
  std::unique_ptr<bool[]> mask;
  std::unique_ptr<float[]> y;
};

void check(Kind kind, std::size_t n, std::size_t inputs, const Case& c) {
  const bool floats = kind == Kind::bf16;
  const std::vector<double> x =
      floats ? std::vector<double>(c.x.get(), c.x.get() + inputs) : rounded(c.x.get(), inputs);
  for (std::size_t j = 0; j < n; ++j) {
    if (!c.mask[j]) {
      CHECK(c.y[j] == 0.0f);
      continue;
    }
    const std::uint8_t* const row = c.rows.at() + j * column_bytes(kind, padded(inputs));
    double sum = 0, size = 0;
    for (std::size_t i = 0; i < inputs; ++i) {
      const double product = weight(kind, row, inputs, i) * x[i];
      sum += product;
      size += std::abs(product);
    }
    const double scale = floats ? 1.0 : static_cast<double>(c.scales[j]);
    const double slack = 1e-12 * size * scale + std::abs(sum * scale) * 1e-7;
    CHECK(std::abs(static_cast<double>(c.y[j]) - sum * scale) <= slack);
  }
}

void test(Kind kind, std::size_t n, std::size_t inputs, std::size_t threads,
          const std::vector<const char*>& sets) {
  Case c(kind, n, inputs);
  const float* const scales = kind == Kind::bf16 ? nullptr : c.scales.get();
  std::vector<float> first;
  for (const char* set : sets) {
    use_instruction_set(set);
    std::fill_n(c.y.get(), n, std::numeric_limits<float>::quiet_NaN());
    gather_rows(kind, c.rows.at(), scales, n, c.x.get(), inputs, c.mask.get(), c.y.get(), threads);
    if (first.empty()) {
      first.assign(c.y.get(), c.y.get() + n);
      check(kind, n, inputs, c);
    }
    for (std::size_t j = 0; j < n; ++j) CHECK(c.y[j] == first[j]);
  }
}

void test_not_finite(Kind kind, float value) {
  Case c(kind, 5, 200);
  c.x[150] = value;
  const float* const scales = kind == Kind::bf16 ? nullptr : c.scales.get();
  gather_rows(kind, c.rows.at(), scales, 5, c.x.get(), 200, c.mask.get(), c.y.get(), 1);
  for (std::size_t j = 0; j < 5; ++j) {
    CHECK(c.mask[j] ? !std::isfinite(c.y[j]) : c.y[j] == 0.0f);
  }
}

// The largest products of the most words.
void test_no_overflow(Kind kind) {
  constexpr std::size_t kInputs = 4 * kTile;
  const std::size_t weights = kind == Kind::int4 ? kInputs / 2 : kInputs;
  for (const std::uint8_t byte : {0x00, 0xff}) {
    Case c(kind, 1, kInputs);
    std::memset(c.rows.at(), byte, weights);
    std::memset(c.rows.at() + weights, 0x80, kInputs / kGroup);  // -128
    std::fill_n(c.x.get(), kInputs, 1.99999f);                   // rounded up to 2
    c.scales[0] = 1;
    c.mask[0] = true;
    gather_rows(kind, c.rows.at(), c.scales.get(), 1, c.x.get(), kInputs, c.mask.get(), c.y.get(),
                1);
    const int level = kind == Kind::int4 ? (byte & 15) - 8 : byte - 128;
    CHECK(c.y[0] == static_cast<float>(kInputs * 2.0 * -128 * level));
  }
}

}  // namespace

int main() {
  std::vector<const char*> sets;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    try {
      use_instruction_set(name);
      sets.push_back(name);
    } catch (const std::invalid_argument& error) {
      std::printf("%s\n", error.what());
    }
  }
  for (const Kind kind : {Kind::int4, Kind::int8, Kind::bf16}) {
    for (const std::size_t inputs : {1, 31, 32, 33, 127, 128, 129, 640, 1000, 2049, 5120}) {
      for (const std::size_t n : {0, 1, 2, 9}) test(kind, n, inputs, 1, sets);
    }
    test(kind, 700, 4000, 3, sets);
    for (const char* set : sets) {
      use_instruction_set(set);
      for (const float value : {NAN, INFINITY, -INFINITY}) test_not_finite(kind, value);
      if (kind != Kind::bf16) test_no_overflow(kind);
    }
  }
}
