#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "rows.h"

namespace {

template <typename T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void need(bool fact, const char* what) {
  if (!fact) throw std::invalid_argument(std::string("gather_rows: ") + what);
}

dipnet::Kind kind_of(const std::string& name) {
  if (name == "int4") return dipnet::Kind::int4;
  if (name == "int8") return dipnet::Kind::int8;
  need(name == "bf16", "the kind is int4, int8 or bf16");
  return dipnet::Kind::bf16;
}

void gather_rows(Bytes rows, std::optional<Array<const float>> scales, Array<const float> x,
                 Array<const bool> mask, Array<float> y, const std::string& kind_name,
                 std::size_t threads) {
  const dipnet::Kind kind = kind_of(kind_name);
  const std::size_t n = rows.shape(0);
  const std::size_t padded = (x.size() + dipnet::kTile - 1) / dipnet::kTile * dipnet::kTile;
  need(rows.shape(1) == dipnet::column_bytes(kind, padded), "rows are (n, stride) for the inputs");
  need(scales.has_value() == (kind != dipnet::Kind::bf16), "int4 and int8 have scales, bf16 none");
  need(!scales || scales->size() == n, "scales are (n,)");
  need(mask.size() == n && y.size() == n, "mask and y are (n,)");
  need(threads > 0 && threads <= 1024, "between 1 and 1024 threads");
  nb::gil_scoped_release unlocked;
  dipnet::gather_rows(kind, rows.data(), scales ? scales->data() : nullptr, n, x.data(), x.size(),
                      mask.data(), y.data(), threads);
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("gather_rows", &gather_rows, nb::arg("rows").noconvert(),
        nb::arg("scales").noconvert().none(), nb::arg("x").noconvert(),
        nb::arg("mask").noconvert(), nb::arg("y").noconvert(), nb::arg("kind"),
        nb::arg("threads"));
}
