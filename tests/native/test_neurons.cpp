// Random requests of whole neurons; argv[1]: a folder for the file that is read.
#include <algorithm>
#include <cerrno>

#include "check.h"
#include "engine.h"
#include "records.h"
#include "rows.h"

namespace {

using namespace dipnet_tests;

bool chance(std::size_t percent) { return generator() % 100 < percent; }

std::vector<float> normal_floats(std::size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> made(n);
  for (float& value : made) value = normal(generator);
  return made;
}

// One token's rows of the wanted neurons, each multiplied alone.
std::vector<float> rows_of(Group& group, const float* x, const bool* mask) {
  const Layout& layout = group.layout;
  RowInput input;
  input.set(layout.kind, x, layout.rows);
  std::vector<float> made(layout.input_rows * layout.units());
  for (std::size_t i = 0; i < made.size(); ++i) {
    const std::size_t unit = i % layout.units(), place = i / layout.units();
    if (!mask[unit]) continue;
    const float scale = group.scale.empty() ? 1.0f : group.scale[i];
    const Row row{group.record(unit) + place * layout.stride, scale, i};
    multiply_rows(input, &row, 1, made.data());
  }
  return made;
}

class Test {
 public:
  Test(const std::string& path, const std::vector<Group>& groups, const std::vector<Fault>& faults,
       std::string_view backend, std::size_t threads, std::size_t frames)
      : groups_(groups),
        engine_(make_faulty(make_reader(path, 8, backend), faults), threads, frames * largest(),
                largest()) {
    for (const Group& group : groups_) {
      const std::size_t units = group.layout.units();
      engine_.add(group.layout, group.scale, chance(20) ? units : generator() % units,
                  chance(50) ? Policy::kLru : Policy::kLfu);
    }
  }

  std::size_t run(std::size_t requests) {
    std::size_t failures = 0;
    for (std::size_t i = 0; i < requests; ++i) {
      try {
        request();
      } catch (const RecordError& error) {
        ++failures;
        CHECK(error.unit == 7);
        CHECK_THROWS(std::logic_error, engine_.columns(nullptr, nullptr));
      }
    }
    return failures;
  }

 private:
  std::size_t largest() const {
    std::size_t bytes = 0;
    for (const Group& group : groups_) bytes = std::max(bytes, group.layout.record_bytes);
    return bytes;
  }

  void request() {
    const std::size_t site = generator() % groups_.size();
    Group& group = groups_[site];
    const Layout& layout = group.layout;
    const std::size_t units = layout.units(), percent = generator() % 101;
    const std::size_t tokens = chance(70) ? 1 : chance(80) ? 1 + generator() % 6 : 70;
    const auto masks = std::make_unique<bool[]>(tokens * units);
    for (std::size_t i = 0; i < tokens * units; ++i) masks[i] = chance(percent);
    if (chance(10)) engine_.load(site);
    for (std::size_t t = 0; t < tokens; ++t) engine_.access(site, &masks[t * units]);
    if (chance(50)) ahead(site, masks.get());
    const std::vector<float> x = normal_floats(tokens * layout.rows);
    std::vector<float> made(tokens * layout.input_rows * units), y(tokens * layout.rows);
    engine_.rows(site, x.data(), masks.get(), tokens, made.data());
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto expected = rows_of(group, &x[t * layout.rows], &masks[t * units]);
      CHECK(std::memcmp(expected.data(), &made[t * expected.size()], 4 * expected.size()) == 0);
    }
    if (groups_.size() > 1 && chance(50)) ahead((site + 1) % groups_.size(), nullptr);
    if (chance(10)) return;  // given up: by the next request, or by the end
    const std::vector<float> h = normal_floats(tokens * units);
    engine_.columns(h.data(), y.data());
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto expected = product(group, &h[t * units], &masks[t * units]);
      CHECK(std::memcmp(expected.data(), &y[t * layout.rows], 4 * layout.rows) == 0);
    }
    CHECK_THROWS(std::logic_error, engine_.columns(h.data(), y.data()));
  }

  // Reads one token's mask ahead, or anything.
  void ahead(std::size_t site, const bool* mask) {
    const std::size_t units = groups_[site].layout.units();
    const auto wanted = std::make_unique<bool[]>(units);
    for (std::size_t u = 0; u < units; ++u) wanted[u] = mask ? mask[u] : chance(50);
    const std::vector<float> score(units);
    engine_.prefetch(site, wanted.get(), score.data(), true);
  }

  std::vector<Group> groups_;
  Engine engine_;
};

std::vector<Group> groups() {
  std::vector<Group> made;
  std::uint64_t offset = 0;
  const auto add = [&](Kind kind, std::size_t units, std::size_t rows, std::size_t input_rows) {
    made.push_back(make_group(kind, units, 1, rows, made.size(), offset, input_rows));
    offset += made.back().records.size() + 4096 - made.back().records.size() % 4096;
  };
  add(Kind::int4, 150, 600, 2);
  add(Kind::int8, 90, 129, 1);
  add(Kind::bf16, 200, 100, 2);
  add(Kind::bf16, 70, 130, 1);
  return made;
}

// Layouts that no record of a neuron has.
void check_layouts(const Group& sound, std::uint64_t file_bytes) {
  sound.layout.check(file_bytes);
  for (const std::size_t input_rows : {0, 1, 3, 1 << 30}) {
    Layout wrong = sound.layout;
    wrong.input_rows = input_rows;
    CHECK_THROWS(std::invalid_argument, wrong.check(file_bytes));
  }
  Layout blocks = sound.layout;
  blocks.block = 2;
  CHECK_THROWS(std::invalid_argument, blocks.check(file_bytes));
}

}  // namespace

int main(int, char** argv) {
  const std::string path = std::string(argv[1]) + "/records";
  std::vector<Group> all = groups();
  write_groups(path, all);
  check_layouts(all[0], make_reader(path)->file_bytes());
  std::vector<Fault> faults;
  for (const Group& group : all) {
    const std::uint64_t at = group.layout.offset + 7 * group.layout.record_bytes;
    faults.push_back({at + 9, at + 10, EIO});
  }
  for (const std::size_t threads : {1, 3}) {
    CHECK(Test(path, all, {}, "auto", threads, 0).run(120) == 0);
    CHECK(Test(path, all, {}, "pread", threads, 1000).run(120) == 0);
    CHECK(Test(path, all, faults, "pread", threads, 0).run(120) > 0);
  }
  for (Group& group : all) group.record(7)[40] ^= 4;
  write_groups(path, all);
  CHECK(Test(path, all, {}, "auto", 2, 0).run(120) > 0);
}
