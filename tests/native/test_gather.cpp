// Against plain loops, with every instruction set; each column ends where its memory ends.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>

#include "check.h"
#include "gather.h"

namespace {

using namespace dipnet;

std::mt19937 generator(1);

// As many bytes as a column has and not one more, at an address that is aligned to nothing but 2.
class Column {
 public:
  Column(Kind kind, std::size_t outputs)
      : shift_(generator() % 20 * 2), memory_(new std::uint8_t[shift_ + column_bytes(kind, outputs)]) {
    const std::size_t bytes = column_bytes(kind, outputs);
    for (std::size_t i = 0; i < bytes; ++i) at()[i] = static_cast<std::uint8_t>(generator());
    if (kind == Kind::bf16) {  // numbers of ordinary size
      for (std::size_t i = 1; i < bytes; i += 2) at()[i] = 0x3f | (at()[i] & 0x80);
      return;
    }
    const std::size_t weights = kind == Kind::int4 ? outputs / 2 : outputs;
    for (std::size_t i = weights; i < bytes; ++i) at()[i] = at()[i] == 0x80 ? 0 : at()[i];
  }

  std::uint8_t* at() const { return memory_.get() + shift_; }

 private:
  std::size_t shift_;
  std::unique_ptr<std::uint8_t[]> memory_;
};

int level(Kind kind, const std::uint8_t* column, std::size_t output) {
  const std::size_t within = output % 64, pair = output % 128;
  if (kind == Kind::int8) {
    const std::size_t byte = 16 * (within / 4 % 4) + 4 * (within / 16) + within % 4;
    return column[output / 64 * 64 + byte] - 128;
  }
  const std::size_t byte = 16 * (pair / 4 % 4) + 4 * (pair / 32) + pair % 4;
  const std::uint8_t both = column[output / 128 * 64 + byte];
  return (pair % 32 < 16 ? both & 15 : both >> 4) - 8;
}

double plain(Kind kind, std::size_t outputs, const std::vector<Term>& terms, const Activations& x,
             std::size_t output) {
  double sum = 0;
  for (const Term& term : terms) {
    if (kind == Kind::bf16) {
      std::uint16_t half;
      std::memcpy(&half, term.column + 2 * output, 2);
      const std::uint32_t bits = std::uint32_t{half} << 16;
      float weight;
      std::memcpy(&weight, &bits, 4);
      sum += static_cast<double>(x.value[term.channel]) * static_cast<double>(weight);
      continue;
    }
    const std::size_t weights = kind == Kind::int4 ? outputs / 2 : outputs;
    const auto group = static_cast<std::int8_t>(term.column[weights + output / kGroup]);
    const int multiplier = (((x.factor[term.channel] * group) >> 14) + 1) >> 1;
    sum += std::ldexp(multiplier * level(kind, term.column, output), -2 * x.magnitude[term.channel]);
  }
  return sum;
}

Activations activations(Kind kind, std::size_t n) {
  std::vector<float> x(n), scale(n);
  const auto keep = std::make_unique<bool[]>(n);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < n; ++i) {
    x[i] = normal(generator) * std::ldexp(1.0f, -static_cast<int>(generator() % 14));
    scale[i] = static_cast<float>(generator() % 100) / 50;
    keep[i] = generator() % 8 != 0;
  }
  Activations made;
  made.set(x.data(), kind == Kind::bf16 ? nullptr : scale.data(), keep.get(), n);
  return made;
}

void check(Kind kind, std::size_t outputs, const std::vector<Term>& terms, const Activations& x,
           const std::vector<float>& y) {
  const double unit = kind == Kind::bf16 ? 1.0 : static_cast<double>(x.bound) / 127.0;
  for (std::size_t o = 0; o < y.size(); ++o) {
    const double expected = plain(kind, outputs, terms, x, o) * unit;
    if (kind != Kind::bf16) CHECK(y[o] == static_cast<float>(expected));
    const double tolerance = 1e-4 * (1 + static_cast<double>(terms.size()));
    if (kind == Kind::bf16) CHECK(std::abs(y[o] - expected) < tolerance);
  }
}

void test_sums(Kind kind, std::size_t outputs, std::size_t count) {
  const Activations x = activations(kind, std::max<std::size_t>(count, 1));
  std::vector<Column> columns;
  std::vector<Term> terms;
  for (std::size_t i = 0; i < count; ++i) {
    columns.emplace_back(kind, outputs);
    terms.push_back({columns.back().at(), static_cast<std::uint32_t>(i)});
  }
  if (kind != Kind::bf16) {
    std::stable_sort(terms.begin(), terms.end(), [&](const Term& a, const Term& b) {
      return x.magnitude[a.channel] < x.magnitude[b.channel];
    });
  }
  Totals total;
  total.reset(kind, outputs, x.classes);
  for (std::size_t first = 0; first < outputs;) {  // in shares, as threads do it
    const std::size_t last = std::min(outputs, first + 512 * (1 + generator() % 9));
    accumulate(kind, outputs, terms.data(), terms.size(), x, total, first, last);
    first = last;
  }
  std::vector<float> y(outputs - 1);
  finish(kind, x, &total, 1, 0, y.size(), y.data());
  check(kind, outputs, terms, x, y);
}

// The largest products, of as many columns as may be.
void test_no_overflow(Kind kind) {
  Column column(kind, kTile);
  std::memset(column.at(), 0xff, kTile / (kind == Kind::int4 ? 2 : 1));
  std::memset(column.at() + kTile / (kind == Kind::int4 ? 2 : 1), 127, kTile / kGroup);
  const std::vector<float> one(1, 1.0f);
  const bool keep = true;
  Activations x;
  x.set(one.data(), one.data(), &keep, 1);
  const std::vector<Term> terms(kMostTerms, Term{column.at(), 0});
  Totals total;
  total.reset(kind, kTile, x.classes);
  accumulate(kind, kTile, terms.data(), terms.size(), x, total, 0, kTile);
  std::vector<float> y(kTile);
  finish(kind, x, &total, 1, 0, kTile, y.data());
  const double most = kMostTerms * 127.0 * (kind == Kind::int4 ? 7 : 127);
  for (const float sum : y) CHECK(sum == static_cast<float>(most));
}

}  // namespace

int main() {
  CHECK_THROWS(std::invalid_argument, use_instruction_set("mmx"));
  for (const char* name : {"portable", "avx2", "avx512"}) {
    try {
      use_instruction_set(name);
    } catch (const std::invalid_argument& error) {
      std::printf("%s\n", error.what());
      continue;
    }
    for (const Kind kind : {Kind::int4, Kind::int8, Kind::bf16}) {
      for (const std::size_t outputs : {128, 256, 640, 1664, 2048, 4096, 4224, 8320}) {
        for (const std::size_t count : {0, 1, 5, 19}) test_sums(kind, outputs, count);
      }
      for (std::size_t count = 0; count < 40; ++count) test_sums(kind, 384, count);
      if (kind != Kind::bf16) test_no_overflow(kind);
    }
  }
}
