// Random requests on several sites; argv[1]: a folder for the file that is read.
#include <algorithm>
#include <cerrno>

#include "check.h"
#include "engine.h"
#include "records.h"

namespace {

using namespace dipnet_tests;

constexpr std::size_t kChance = 100;

bool chance(std::size_t percent) { return generator() % kChance < percent; }

struct Request {
  std::size_t tokens;
  std::vector<float> x;
  std::unique_ptr<bool[]> masks;
};

Request random_request(const Layout& layout) {
  Request made{chance(70) ? 1 : chance(90) ? 1 + generator() % 6 : 70, {}, {}};
  const std::size_t units = layout.units(), percent = generator() % 101;
  made.masks = std::make_unique<bool[]>(made.tokens * units);
  for (std::size_t i = 0; i < made.tokens * units; ++i) made.masks[i] = chance(percent);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < made.tokens * layout.channels; ++i) {
    made.x.push_back(normal(generator));
  }
  return made;
}

class Test {
 public:
  Test(const std::string& path, std::vector<Group> groups, std::vector<Fault> faults,
       std::string_view backend, std::size_t threads, std::size_t frames)
      : groups_(std::move(groups)),
        faults_(std::move(faults)),
        engine_(make_faulty(make_reader(path, 8, backend), faults_), threads,
                frames * largest(), largest()) {
    for (const Group& group : groups_) {
      const std::size_t units = group.layout.units(), slots = generator() % (units + 1);
      engine_.add(group.layout, group.scale, chance(30) ? units : chance(30) ? 0 : slots,
                  chance(50) ? Policy::kLru : Policy::kLfu);
    }
  }

  // The file is `path` with some records changed: those that must be found out.
  void run(std::size_t requests, const std::vector<std::pair<std::size_t, std::size_t>>& damaged) {
    std::size_t failures = 0;
    for (std::size_t i = 0; i < requests; ++i) {
      try {
        request();
      } catch (const RecordError& error) {
        ++failures;
        const bool known = std::count(damaged.begin(), damaged.end(),
                                      std::pair(error.site, error.unit)) > 0;
        CHECK(error.error ? faulty(error.site, error.unit) : known);
        CHECK_THROWS(std::logic_error, engine_.result_shape());
      }
    }
    CHECK((failures > 0) == (!damaged.empty() || !faults_.empty()));
  }

 private:
  std::size_t largest() const {
    std::size_t bytes = 0;
    for (const Group& group : groups_) bytes = std::max(bytes, group.layout.record_bytes);
    return bytes;
  }

  bool faulty(std::size_t site, std::size_t unit) const {
    const Layout& layout = groups_[site].layout;
    const std::uint64_t begin = layout.offset + unit * layout.record_bytes;
    return std::any_of(faults_.begin(), faults_.end(), [&](const Fault& fault) {
      return begin < fault.end && fault.start < begin + layout.record_bytes;
    });
  }

  void look_ahead(std::size_t but) {
    const std::size_t site = generator() % groups_.size();
    if (site == but) {
      return;
    }
    const std::size_t units = groups_[site].layout.units();
    const auto wanted = std::make_unique<bool[]>(units);
    std::vector<float> score(units);
    for (std::size_t u = 0; u < units; ++u) {
      wanted[u] = chance(50);
      score[u] = chance(10) ? NAN : static_cast<float>(generator() % 100);
    }
    engine_.prefetch(site, wanted.get(), score.data(), chance(70));
  }

  void request() {
    const std::size_t site = generator() % groups_.size();
    Group& group = groups_[site];
    const std::size_t units = group.layout.units(), rows = group.layout.rows;
    if (chance(5)) engine_.load(site);
    if (chance(30)) look_ahead(groups_.size());
    const Request made = random_request(group.layout);
    for (std::size_t t = 0; t < made.tokens; ++t) engine_.access(site, &made.masks[t * units]);
    engine_.begin(site, made.x.data(), made.masks.get(), made.tokens);
    if (chance(50)) look_ahead(site);
    std::vector<float> y(made.tokens * rows);
    if (chance(20)) engine_.partial(y.data());
    if (chance(10)) return;  // given up: by the next request, or by the end
    engine_.finish(y.data());
    for (std::size_t t = 0; t < made.tokens; ++t) {
      const std::vector<float> expected =
          product(group, &made.x[t * group.layout.channels], &made.masks[t * units]);
      CHECK(std::memcmp(expected.data(), &y[t * rows], 4 * rows) == 0);
    }
  }

  std::vector<Group> groups_;
  std::vector<Fault> faults_;
  Engine engine_;
};

std::vector<Group> groups() {
  std::vector<Group> made;
  std::uint64_t offset = 0;
  const auto add = [&](Kind kind, std::size_t units, std::size_t block, std::size_t rows) {
    made.push_back(make_group(kind, units, block, rows, made.size() + 2, offset));
    offset += made.back().records.size() + 4096 - made.back().records.size() % 4096;
  };
  add(Kind::int4, 150, 1, 600);
  add(Kind::int8, 40, 3, 129);
  add(Kind::bf16, 200, 1, 100);
  add(Kind::bf16, 70, 2, 130);
  return made;
}

// Records of another content than their checksums say: zeros, swapped ones, one bit.
std::vector<std::pair<std::size_t, std::size_t>> damage(std::vector<Group>& groups) {
  std::vector<std::pair<std::size_t, std::size_t>> made;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const std::size_t bytes = groups[g].layout.record_bytes;
    std::memset(groups[g].record(3), 0, bytes);
    std::swap_ranges(groups[g].record(5), groups[g].record(5) + bytes, groups[g].record(6));
    groups[g].record(9)[generator() % bytes] ^= 1;
    for (const std::size_t unit : {3, 5, 6, 9}) made.emplace_back(g, unit);
  }
  return made;
}

}  // namespace

int main(int, char** argv) {
  const std::string path = std::string(argv[1]) + "/records";
  const std::vector<Group> sound = groups();
  write_groups(path, sound);
  CHECK_THROWS(std::invalid_argument, Engine(make_reader(path), 3, 0, 100));
  CHECK_THROWS(std::invalid_argument, Engine(make_reader(path), 3, 0, std::size_t{1} << 56));
  for (const std::size_t threads : {1, 3}) {
    Test(path, sound, {}, "auto", threads, 0).run(120, {});
    Test(path, sound, {}, "pread", threads, 1000).run(120, {});
    std::vector<Fault> faults;
    for (const Group& group : sound) {
      const std::uint64_t at = group.layout.offset + 7 * group.layout.record_bytes;
      faults.push_back({at + 9, at + 10, EIO});
    }
    Test(path, sound, faults, "pread", threads, 0).run(120, {});
  }
  std::vector<Group> bad = sound;
  const auto damaged = damage(bad);
  write_groups(path, bad);
  Test(path, bad, {}, "auto", 2, 0).run(120, damaged);
}
