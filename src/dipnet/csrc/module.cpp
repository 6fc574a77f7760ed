// The Python module dipnet._native: argument shapes are checked here, the work is done elsewhere.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "select.h"

namespace nb = nanobind;

namespace {

template <typename T>
using Rows = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void topk_mask(Rows<const float> scores, Rows<bool> mask, std::size_t k, std::size_t threads) {
  if (scores.ndim() == 0 || mask.size() != scores.size()) {
    throw std::invalid_argument("topk_mask: scores and mask must have one shape (..., n)");
  }
  const std::size_t n = scores.shape(scores.ndim() - 1);
  if (k == 0 || k > n) throw std::invalid_argument("topk_mask: k must be in 1..n");
  if (threads == 0) throw std::invalid_argument("topk_mask: threads must be at least 1");
  nb::gil_scoped_release unlocked;
  dipnet::topk_mask(scores.data(), mask.data(), scores.size() / n, n, k, threads);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("topk_mask", &topk_mask, nb::arg("scores").noconvert(), nb::arg("mask").noconvert(),
        nb::arg("k"), nb::arg("threads"));
}
