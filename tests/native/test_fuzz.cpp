// Layouts and records of any content: refused, found damaged, or used; memory stays whole.
// argv[1]: a folder for the file that is read; argv[2]: how many rounds, for a longer run.
#include <climits>
#include <cstdlib>

#include "check.h"
#include "engine.h"
#include "records.h"

namespace {

using namespace dipnet_tests;

std::uint64_t any_number() {
  constexpr std::uint64_t kEdges[] = {0,        1,         2,    127,       128, 129,
                                      512,      1024,      4096, 1u << 31,  ~0u, INT32_MAX,
                                      1ull << 40, 1ull << 63, ~0ull, ~0ull - 511};
  switch (generator() % 3) {
    case 0: return kEdges[generator() % std::size(kEdges)];
    case 1: return generator() % 2000;
    default: return std::uint64_t{generator()} << generator() % 32;
  }
}

void change(Layout& layout) {
  const std::uint64_t to = any_number();
  switch (generator() % 9) {
    case 0: layout.channels = to; break;
    case 1: layout.block = to; break;
    case 2: layout.outputs = to; break;
    case 3: layout.rows = to; break;
    case 4: layout.stride = to; break;
    case 5: layout.record_bytes = to; break;
    case 6: layout.offset = to; break;
    case 7: layout.input_rows = to; break;
    default: layout.kind = static_cast<Kind>(generator() % 3);
  }
}

// Bytes of all kinds; in most records with a checksum that fits.
void change(Group& group) {
  for (std::size_t u = 0; u < group.layout.units(); ++u) {
    for (int i = 0; i < 40; ++i) {
      group.record(u)[generator() % group.layout.record_bytes] =
          generator() % 2 ? 0x80 : static_cast<std::uint8_t>(generator());
    }
    if (generator() % 50) group.seal(u);
  }
}

void use(Engine& engine, std::size_t site) {
  const Layout& layout = engine.site(site).layout;
  constexpr std::size_t kTokens = 2;
  const auto masks = std::make_unique<bool[]>(kTokens * layout.units());
  for (std::size_t i = 0; i < kTokens * layout.units(); ++i) masks[i] = generator() % 2;
  std::vector<float> x(kTokens * layout.channels, 1.0f), y(kTokens * layout.rows);
  engine.access(site, masks.get());
  try {
    if (layout.input_rows > 0) {
      std::vector<float> made(kTokens * layout.input_rows * layout.units());
      engine.rows(site, y.data(), masks.get(), kTokens, made.data());
      engine.columns(x.data(), y.data());
    } else {
      engine.begin(site, x.data(), masks.get(), kTokens);
      engine.finish(y.data());
    }
  } catch (const RecordError& error) {
    CHECK(error.site == site && error.unit < layout.units() && error.error == 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = std::string(argv[1]) + "/records";
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 300;
  std::size_t used = 0, refused = 0;
  for (int round = 0; round < rounds; ++round) {
    const Kind kind = static_cast<Kind>(round % 3);
    const std::size_t input_rows = generator() % 3;
    Group group = make_group(kind, 1 + generator() % 20, input_rows ? 1 : 1 + generator() % 3,
                             1 + generator() % 300, 1, 4096 * (generator() % 2), input_rows);
    change(group);
    write_groups(path, {group});
    Engine engine(make_reader(path, 4, "pread"), 1, 0, group.layout.record_bytes);
    for (int i = 0; i < 20; ++i) {
      Layout layout = group.layout;
      for (std::uint64_t n = generator() % 3; n-- > 0;) change(layout);
      std::vector<float> scale = group.scale;
      if (generator() % 5 == 0) scale.resize(generator() % 100);
      const std::size_t slots = generator() % 4 ? generator() % 20 : any_number();
      try {
        use(engine, engine.add(layout, scale, slots, Policy::kLfu));
        ++used;
      } catch (const std::invalid_argument&) {
        ++refused;
      }
    }
  }
  CHECK(used > 0 && refused > 0);
}
