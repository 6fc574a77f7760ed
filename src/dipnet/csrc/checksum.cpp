#include "checksum.h"

#include <bit>
#include <cstring>

#include "simd.h"

static_assert(std::endian::native == std::endian::little, "records are little endian");

namespace dipnet {
namespace {

// Blocks of 32 bytes are four lanes of two words, the even and the odd one. The words of one lane
// have factors that grow by 16 from block to block, so that instead of multiplying, each lane adds
// up its words, and those sums again: in the second sum a word of block b of n is found n - b
// times.
constexpr std::size_t kLanes = 4, kBlock = 32;
typedef std::uint64_t Lanes __attribute__((vector_size(kBlock)));

DIPNET_SIMD
std::uint64_t sum_of_blocks(const std::uint8_t* bytes, std::size_t blocks) {
  Lanes even{}, odd{}, evens{}, odds{};
  for (std::size_t b = 0; b < blocks; ++b) {
    Lanes words;
    std::memcpy(&words, bytes + b * kBlock, kBlock);
    even += words & 0xffffffffu;
    odd += words >> 32;
    evens += even;
    odds += odd;
  }
  std::uint64_t sum = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    sum += even[lane] * (4 * lane + 1) + odd[lane] * (4 * lane + 3);
    sum += 16 * (blocks * (even[lane] + odd[lane]) - evens[lane] - odds[lane]);
  }
  return sum;
}

std::uint64_t weighted_sum(const std::uint8_t* bytes, std::size_t words) {
  const std::size_t blocks = words * 4 / kBlock;
  std::uint64_t sum = sum_of_blocks(bytes, blocks);
  for (std::uint64_t j = blocks * kBlock / 4; j < words; ++j) {
    std::uint32_t word;
    std::memcpy(&word, bytes + 4 * j, sizeof word);
    sum += word * (2 * j + 1);
  }
  return sum;
}

}  // namespace

std::uint64_t record_checksum(const std::uint8_t* record, std::size_t record_bytes,
                              std::uint64_t group, std::uint64_t unit) {
  const std::uint64_t place = 0x9E3779B97F4A7C15u * (1 + unit + (group << 32));
  return place + weighted_sum(record, (record_bytes - kChecksumBytes) / 4);
}

bool record_intact(const std::uint8_t* record, std::size_t record_bytes, std::uint64_t group,
                   std::uint64_t unit) {
  std::uint64_t stored;
  std::memcpy(&stored, record + record_bytes - kChecksumBytes, kChecksumBytes);
  return stored == record_checksum(record, record_bytes, group, unit);
}

}  // namespace dipnet
