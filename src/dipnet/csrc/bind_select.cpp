#include <stdexcept>

#include "bind.h"
#include "select.h"

namespace {

void check_rows(Rows<const float> scores, Rows<bool> mask, std::size_t k, std::size_t threads) {
  if (scores.ndim() == 0 || mask.size() != scores.size()) {
    throw std::invalid_argument("scores and mask must have one shape (..., n)");
  }
  if (k == 0 || k > scores.shape(scores.ndim() - 1)) {
    throw std::invalid_argument("k must be in 1..n");
  }
  if (threads == 0) throw std::invalid_argument("threads must be at least 1");
}

void topk_mask(Rows<const float> scores, Rows<bool> mask, std::size_t k, std::size_t threads) {
  check_rows(scores, mask, k, threads);
  const std::size_t n = scores.shape(scores.ndim() - 1);
  nb::gil_scoped_release unlocked;
  dipnet::topk_mask(scores.data(), mask.data(), scores.size() / n, n, k, threads);
}

void cache_aware_topk(Rows<const float> scores, Rows<const bool> resident, float gamma,
                      Rows<bool> mask, std::size_t k, std::size_t threads) {
  check_rows(scores, mask, k, threads);
  const std::size_t n = scores.shape(scores.ndim() - 1);
  if (resident.size() != n) throw std::invalid_argument("resident must have the shape (n,)");
  nb::gil_scoped_release unlocked;
  dipnet::cache_aware_topk(scores.data(), resident.data(), gamma, mask.data(), scores.size() / n, n,
                           k, threads);
}

}  // namespace

void bind_select(nb::module_& m) {
  m.def("topk_mask", &topk_mask, nb::arg("scores").noconvert(), nb::arg("mask").noconvert(),
        nb::arg("k"), nb::arg("threads"));
  m.def("cache_aware_topk", &cache_aware_topk, nb::arg("scores").noconvert(),
        nb::arg("resident").noconvert(), nb::arg("gamma"), nb::arg("mask").noconvert(),
        nb::arg("k"), nb::arg("threads"));
}
