#include <stdexcept>

#include "bind.h"
#include "checksum.h"
#include "reads.h"

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

// (tokens, 2) reads, and the records that they take in, of (tokens, units) missed records.
nb::ndarray<nb::numpy, std::int32_t, nb::ndim<2>> count_reads(
    nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu> missed,
    std::size_t record_bytes) {
  const std::size_t tokens = missed.shape(0), units = missed.shape(1);
  auto* counts = new std::int32_t[2 * tokens];
  nb::capsule owner(counts, [](void* p) noexcept { delete[] static_cast<std::int32_t*>(p); });
  for (std::size_t t = 0; t < tokens; ++t) {
    const auto found = dipnet::count_reads(missed.data() + t * units, units, record_bytes);
    counts[2 * t] = static_cast<std::int32_t>(found.reads);
    counts[2 * t + 1] = static_cast<std::int32_t>(found.records);
  }
  return {counts, {tokens, 2}, owner};
}

}  // namespace

void bind_store(nb::module_& m) {
  m.def("record_checksums", &record_checksums, nb::arg("records").noconvert(), nb::kw_only(),
        nb::arg("group"), nb::arg("first_unit"));
  m.attr("READ_BYTES") = dipnet::kReadBytes;
  m.attr("GAP_BYTES") = dipnet::kGapBytes;
  m.def("count_reads", &count_reads, nb::arg("missed").noconvert(), nb::kw_only(),
        nb::arg("record_bytes"));
}
