// A file of records that the engine's tests read, and what their products are.
#pragma once

#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checksum.h"
#include "gather.h"
#include "reader.h"
#include "site.h"

namespace dipnet_tests {

using namespace dipnet;

inline std::mt19937 generator(1);

// Random records, sound but for their content, and random scales.
struct Group {
  Layout layout;
  std::vector<float> scale;
  std::vector<std::uint8_t> records;

  std::uint8_t* record(std::size_t unit) { return records.data() + unit * layout.record_bytes; }

  void seal(std::size_t unit) {
    const std::uint64_t sum =
        record_checksum(record(unit), layout.record_bytes, layout.group, unit);
    std::memcpy(record(unit) + layout.record_bytes - kChecksumBytes, &sum, kChecksumBytes);
  }
};

inline Group make_group(Kind kind, std::size_t units, std::size_t block, std::size_t rows,
                        std::uint64_t number, std::uint64_t offset,
                        std::size_t input_rows = 0) {
  Group made;
  const std::size_t outputs = (rows + kTile - 1) / kTile * kTile;
  const std::size_t stride = column_bytes(kind, outputs);
  const std::size_t record_bytes =
      ((block + input_rows) * stride + kChecksumBytes + kSector - 1) / kSector * kSector;
  made.layout = {kind,   units * block, block,  outputs, rows,
                 stride, record_bytes,  offset, number,  input_rows};
  made.records.resize(units * record_bytes);
  for (std::uint8_t& byte : made.records) {
    byte = static_cast<std::uint8_t>(generator());
    if (byte == 0x80 || byte == 0x7f || byte == 0xff) byte = 3;  // no multiplier, no NaN of bf16
  }
  for (std::size_t u = 0; u < units; ++u) made.seal(u);
  for (std::size_t i = 0; kind != Kind::bf16 && i < units * block * (input_rows + 1); ++i) {
    made.scale.push_back(static_cast<float>(generator() % 1000) / 500);
  }
  return made;
}

inline void write_groups(const std::string& path, const std::vector<Group>& groups) {
  std::ofstream file(path, std::ios::binary);
  for (const Group& group : groups) {
    file.seekp(static_cast<std::streamoff>(group.layout.offset));
    file.write(reinterpret_cast<const char*>(group.records.data()),
               static_cast<std::streamsize>(group.records.size()));
  }
}

// One token's product, all records at hand: bf16 in batches of 64 units, as is documented.
inline std::vector<float> product(Group& group, const float* x, const bool* mask) {
  const Layout& layout = group.layout;
  const auto keep = std::make_unique<bool[]>(layout.channels);
  for (std::size_t i = 0; i < layout.channels; ++i) keep[i] = mask[i / layout.block];
  Activations activations;
  const float* const scale =
      group.scale.empty() ? nullptr : group.scale.data() + layout.input_rows * layout.channels;
  activations.set(x, scale, keep.get(), layout.channels);
  Totals total;
  total.reset(layout.kind, layout.outputs, activations.classes);
  const auto add = [&](std::size_t first, std::size_t last, int magnitude) {
    std::vector<Term> terms;
    for (std::size_t i = first * layout.block; i < last * layout.block; ++i) {
      if (!keep[i] || (magnitude >= 0 && activations.magnitude[i] != magnitude)) continue;
      const std::size_t unit = i / layout.block, place = layout.input_rows + i % layout.block;
      terms.push_back({group.record(unit) + place * layout.stride, static_cast<std::uint32_t>(i)});
    }
    accumulate(layout.kind, layout.outputs, terms.data(), terms.size(), activations, total, 0,
               layout.outputs);
  };
  if (layout.kind == Kind::bf16) {
    for (std::size_t u = 0; u < layout.units(); u += 64) {
      add(u, std::min(layout.units(), u + 64), -1);
    }
  } else {
    for (int magnitude = 0; magnitude < static_cast<int>(kClasses); ++magnitude) {
      add(0, layout.units(), magnitude);
    }
  }
  std::vector<float> y(layout.rows);
  finish(layout.kind, activations, &total, 1, 0, layout.rows, y.data());
  return y;
}

}  // namespace dipnet_tests
