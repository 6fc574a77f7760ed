#include <stdexcept>

#include "bind.h"
#include "checksum.h"

namespace {

using Checksums = nb::ndarray<nb::numpy, std::uint64_t, nb::ndim<1>>;
using Records = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Checksums record_checksums(Records records, std::uint64_t group, std::uint64_t first_unit) {
  const std::size_t count = records.shape(0), bytes = records.shape(1);
  if (bytes < dipnet::kChecksumBytes || bytes % 4 != 0) {
    throw std::invalid_argument("record_checksums: a record is a multiple of 4 bytes, at least 8");
  }
  auto* sums = new std::uint64_t[count];
  nb::capsule owner(sums, [](void* p) noexcept { delete[] static_cast<std::uint64_t*>(p); });
  {
    nb::gil_scoped_release unlocked;
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint8_t* record = records.data() + i * bytes;
      sums[i] = dipnet::record_checksum(record, bytes, group, first_unit + i);
    }
  }
  return Checksums(sums, {count}, owner);
}

}  // namespace

void bind_store(nb::module_& m) {
  m.def("record_checksums", &record_checksums, nb::arg("records").noconvert(), nb::kw_only(),
        nb::arg("group"), nb::arg("first_unit"));
}
