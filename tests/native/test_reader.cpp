// argv[1]: a folder for the file that is read.
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <system_error>

#include "check.h"
#include "reader.h"

namespace {

using namespace dipnet;

constexpr std::size_t kFileBytes = 8 << 20;
std::mt19937 generator(1);

struct Free {
  void operator()(std::uint8_t* room) const { std::free(room); }
};
using Room = std::unique_ptr<std::uint8_t, Free>;

Room room(std::size_t bytes) {
  auto* data = static_cast<std::uint8_t*>(std::aligned_alloc(kSector, bytes));
  std::memset(data, 0, bytes);
  return Room(data);
}

std::vector<std::uint8_t> write_file(const std::string& path) {
  std::vector<std::uint8_t> content(kFileBytes);
  for (std::uint8_t& byte : content) byte = static_cast<std::uint8_t>(generator());
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), kFileBytes);
  return content;
}

// A range of up to 128 sectors, in parts of any number of sectors.
Read random_read(std::uint8_t* into, std::uint64_t tag) {
  std::size_t sectors = 1 + generator() % 128;
  Read read{generator() % (kFileBytes / kSector - sectors) * kSector, {}, tag};
  while (sectors > 0) {
    const std::size_t part = 1 + generator() % sectors;
    read.into.push_back({into, part * kSector});
    into += part * kSector;
    sectors -= part;
  }
  return read;
}

std::vector<Done> wait_for_all(Reader& reader) {
  std::vector<Done> done;
  while (reader.outstanding() > 0) {
    if (generator() % 2) reader.poll(done); else CHECK(reader.wait(done) > 0);
  }
  CHECK(reader.wait(done) == 0 && reader.poll(done) == 0);
  return done;
}

void test_random_reads(Reader& reader, const std::vector<std::uint8_t>& content) {
  constexpr std::size_t kReads = 300, kMost = 128 * kSector;
  const Room memory = room(kReads * kMost);
  std::vector<Read> reads;
  for (std::size_t i = 0; i < kReads; ++i) reads.push_back(random_read(&*memory + i * kMost, i));
  reader.submit({reads.begin(), reads.begin() + kReads / 2});
  for (std::size_t i = kReads / 2; i < kReads; ++i) reader.submit(reads[i]);
  CHECK(reader.outstanding() == kReads);
  std::set<std::uint64_t> seen;
  std::uint64_t bytes = 0;
  for (const Done& done : wait_for_all(reader)) {
    CHECK(done.error == 0 && seen.insert(done.tag).second);
    const std::uint64_t offset = reads[done.tag].offset;
    CHECK(std::memcmp(&*memory + done.tag * kMost, &content[offset], done.bytes) == 0);
    bytes += done.bytes;
  }
  CHECK(seen.size() == kReads);
  CHECK(reader.totals().reads == kReads && reader.totals().bytes == bytes);
  CHECK(reader.totals().busy_seconds > 0);
}

void test_more_parts_than_a_call_takes(Reader& reader, const std::vector<std::uint8_t>& content) {
  constexpr std::size_t kParts = 2500;
  const Room memory = room(kParts * kSector);
  Read read{kSector, {}, 7};
  for (std::size_t i = 0; i < kParts; ++i) {  // back to front
    read.into.push_back({&*memory + (kParts - 1 - i) * kSector, kSector});
  }
  reader.submit(read);
  const std::vector<Done> done = wait_for_all(reader);
  CHECK(done.size() == 1 && done[0].error == 0 && done[0].bytes == kParts * kSector);
  for (std::size_t i = 0; i < kParts; ++i) {
    CHECK(std::memcmp(read.into[i].iov_base, &content[(i + 1) * kSector], kSector) == 0);
  }
}

void test_end_of_file(Reader& reader) {
  const Room memory = room(4 * kSector);
  reader.submit(Read{kFileBytes - 2 * kSector, {{&*memory, 4 * kSector}}, 1});
  reader.submit(Read{2 * kFileBytes, {{&*memory, kSector}}, 2});
  const std::vector<Done> done = wait_for_all(reader);
  CHECK(done.size() == 2);
  for (const Done& d : done) {
    CHECK(d.error == ENODATA && d.bytes == (d.tag == 1 ? 2 * kSector : 0));
  }
  CHECK(reader.totals().failed == 2);
}

void test_refused_reads(Reader& reader) {
  const Room memory = room(2 * kSector);
  CHECK_THROWS(std::invalid_argument, reader.submit(Read{0, {}, 1}));
  if (!reader.direct()) return;
  CHECK_THROWS(std::invalid_argument, reader.submit(Read{1, {{&*memory, kSector}}, 1}));
  CHECK_THROWS(std::invalid_argument, reader.submit(Read{0, {{&*memory + 1, kSector}}, 1}));
  CHECK_THROWS(std::invalid_argument, reader.submit(Read{0, {{&*memory, kSector - 1}}, 1}));
  CHECK(reader.outstanding() == 0);
}

void test_cancel(Reader& reader) {
  constexpr std::size_t kReads = 200, kMost = 128 * kSector;
  const Room memory = room(kReads * kMost);
  std::vector<Read> reads;
  for (std::size_t i = 0; i < kReads; ++i) reads.push_back(random_read(&*memory + i * kMost, i));
  reader.submit(std::move(reads));
  const auto dropped = reader.cancel_queued([](std::uint64_t tag) { return tag % 2 == 1; });
  CHECK(dropped.size() >= (kReads - reader.depth()) / 2 && dropped.size() <= kReads / 2);
  std::set<std::uint64_t> seen(dropped.begin(), dropped.end());
  for (const Done& done : wait_for_all(reader)) {
    CHECK(done.error == 0 && seen.insert(done.tag).second);
  }
  CHECK(seen.size() == kReads);
}

// Memory that is freed while it is read into is what the address sanitizer is here for.
void test_end_with_reads_in_flight(std::unique_ptr<Reader> reader) {
  constexpr std::size_t kReads = 100, kMost = 128 * kSector;
  const Room memory = room(kReads * kMost);
  std::vector<Read> reads;
  for (std::size_t i = 0; i < kReads; ++i) reads.push_back(random_read(&*memory + i * kMost, i));
  reader->submit(std::move(reads));
  std::vector<Done> done;
  reader->poll(done);
  reader.reset();
  std::memset(&*memory, 0, kReads * kMost);
  ::usleep(10000);
  for (std::size_t i = 0; i < kReads * kMost; ++i) CHECK((&*memory)[i] == 0);
}

void test_faults(std::unique_ptr<Reader> inner, const std::vector<std::uint8_t>& content) {
  const auto reader = make_faulty(std::move(inner), {{1024, 1025, EIO}, {4096, 8192, EPERM}});
  const Room memory = room(8 * kSector);
  const std::vector<int> errors = {0, 0, EIO, 0, 0, 0, 0, 0, EPERM};
  std::vector<Read> reads;
  for (std::size_t i : {2, 8}) reads.push_back({i * kSector, {{&*memory, kSector}}, i});
  reader->submit(reads);
  reader->submit(Read{3 * kSector, {{&*memory, 5 * kSector}}, 3});
  CHECK(reader->outstanding() == 3);
  const std::vector<Done> done = wait_for_all(*reader);
  CHECK(done.size() == 3 && reader->totals().failed == 2 && reader->totals().reads == 1);
  for (const Done& d : done) CHECK(d.error == errors[d.tag]);
  CHECK(std::memcmp(&*memory, &content[3 * kSector], 5 * kSector) == 0);
}

void test_opening(const std::string& folder) {
  CHECK_THROWS(std::system_error, make_reader(folder + "/none"));
  CHECK_THROWS(std::system_error, make_reader(folder));
  CHECK_THROWS(std::system_error, make_reader("/dev/null"));
  CHECK_THROWS(std::invalid_argument, make_reader(folder + "/content", 0));
  CHECK_THROWS(std::invalid_argument, make_reader(folder + "/content", 1, "mmap"));
}

}  // namespace

int main(int, char** argv) {
  const std::string folder = argv[1], path = folder + "/content";
  const std::vector<std::uint8_t> content = write_file(path);
  test_opening(folder);
  for (const std::string& backend : reader_backends()) {
    const auto open = [&](std::size_t depth) -> std::unique_ptr<Reader> {
      try {
        return make_reader(path, depth, backend);
      } catch (const std::runtime_error& error) {  // io_uring may be forbidden here
        std::printf("%s\n", error.what());
        CHECK(backend == "io_uring");
        return make_reader(path, depth);
      }
    };
    for (const std::size_t depth : {1, 3, 128}) test_random_reads(*open(depth), content);
    test_more_parts_than_a_call_takes(*open(2), content);
    test_end_of_file(*open(4));
    test_refused_reads(*open(4));
    test_cancel(*open(8));
    test_end_with_reads_in_flight(open(16));
    test_faults(open(4), content);
  }
}
