#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "select.h"

namespace {

std::mt19937 generator(1);

std::vector<bool> plain(const std::vector<float>& scores, std::size_t k) {
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto key = [&](std::size_t i) { return std::isnan(scores[i]) ? 1 : 0; };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return key(a) != key(b) ? key(a) > key(b) : key(a) == 0 && scores[a] > scores[b];
  });
  std::vector<bool> mask(scores.size());
  for (std::size_t i = 0; i < k; ++i) mask[order[i]] = true;
  return mask;
}

float any_score() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kOdd[] = {0.0f, -0.0f, kInfinity, -kInfinity, NAN, 1e-45f, 1.0f};
  if (generator() % 3 == 0) return kOdd[generator() % std::size(kOdd)];
  return static_cast<float>(generator() % 5000) / 1000 - 1;
}

void test(std::size_t rows, std::size_t n, std::size_t threads) {
  std::vector<float> scores(rows * n);
  for (float& score : scores) score = any_score();
  const std::size_t k = 1 + generator() % n;
  const auto resident = std::make_unique<bool[]>(n), mask = std::make_unique<bool[]>(rows * n);
  for (std::size_t i = 0; i < n; ++i) resident[i] = generator() % 2;
  for (const float gamma : {1.0f, 0.3f}) {
    if (gamma == 1.0f) {
      dipnet::topk_mask(scores.data(), mask.get(), rows, n, k, threads);
    } else {
      dipnet::cache_aware_topk(scores.data(), resident.get(), gamma, mask.get(), rows, n, k,
                               threads);
    }
    for (std::size_t row = 0; row < rows; ++row) {
      std::vector<float> weighed(&scores[row * n], &scores[row * n] + n);
      for (std::size_t i = 0; i < n; ++i) weighed[i] *= resident[i] ? 1.0f : gamma;
      const std::vector<bool> expected = plain(weighed, k);
      for (std::size_t i = 0; i < n; ++i) CHECK(mask[row * n + i] == expected[i]);
    }
  }
}

}  // namespace

int main() {
  for (std::size_t n = 1; n < 70; ++n) test(1 + n % 3, n, 1);
  for (const std::size_t n : {448, 1000, 5120, 17920}) test(3, n, 2);
}
