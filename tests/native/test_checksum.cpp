#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "checksum.h"

namespace {

std::uint64_t plain(const std::vector<std::uint8_t>& record, std::uint64_t group,
                    std::uint64_t unit) {
  std::uint64_t sum = 0x9E3779B97F4A7C15u * (1 + unit + (group << 32));
  for (std::uint64_t j = 0; 4 * j + 8 < record.size(); ++j) {
    std::uint32_t word = 0;
    for (int byte = 3; byte >= 0; --byte) word = word << 8 | record[4 * j + byte];
    sum += word * (2 * j + 1);
  }
  return sum;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (std::size_t bytes : {8, 12, 36, 40, 44, 512, 1024, 22528, 1 << 20}) {
    std::vector<std::uint8_t> record(bytes);
    for (auto& byte : record) byte = static_cast<std::uint8_t>(random() | random() % 2 * 255);
    const std::uint64_t group = random() % 1000, unit = random();
    const std::uint64_t sum = dipnet::record_checksum(record.data(), bytes, group, unit);
    CHECK(sum == plain(record, group, unit));
    std::memcpy(record.data() + bytes - 8, &sum, 8);
    CHECK(dipnet::record_intact(record.data(), bytes, group, unit));
    CHECK(!dipnet::record_intact(record.data(), bytes, group, unit + 1));
    CHECK(!dipnet::record_intact(record.data(), bytes, group + 1, unit));
    record[random() % bytes] ^= static_cast<std::uint8_t>(1 << random() % 8);
    CHECK(!dipnet::record_intact(record.data(), bytes, group, unit));
  }
}
