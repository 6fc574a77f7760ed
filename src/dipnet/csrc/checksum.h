// The checksum at the end of every record of a store. Knows no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dipnet {

constexpr std::size_t kChecksumBytes = 8;  // little endian, the last ones of a record

// Of a record's bytes but the last 8, as little-endian uint32 words w_j:
//     0x9E3779B97F4A7C15 * (1 + unit + (group << 32)) + sum over j of w_j * (2j + 1)   (mod 2^64)
// A change within one word always changes it (its factor is odd), and so do a record that stands in
// another's place and a record of zeros. Needs record_bytes >= 8 and a multiple of 4.
std::uint64_t record_checksum(const std::uint8_t* record, std::size_t record_bytes,
                              std::uint64_t group, std::uint64_t unit);

// Whether the record ends with its checksum.
bool record_intact(const std::uint8_t* record, std::size_t record_bytes, std::uint64_t group,
                   std::uint64_t unit);

}  // namespace dipnet
