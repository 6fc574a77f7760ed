#include "engine.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "checksum.h"
#include "reads.h"

namespace dipnet {
namespace {

// The staging's part of the memory for records on their way.
constexpr std::size_t kStagingShare = 4;
// Weight of the newest of the times that the disk had nothing to do.
constexpr double kNewest = 0.1;
constexpr double kLongIdle = 0.05;  // seconds: not the model's own doing

std::string describe(std::size_t site, std::size_t unit, int error) {
  const std::string reason = error ? std::strerror(error) : "its checksum does not fit";
  return "record " + std::to_string(unit) + " of site " + std::to_string(site) + ": " + reason;
}

}  // namespace

RecordError::RecordError(std::size_t at, std::size_t number, int reason)
    : std::runtime_error(describe(at, number, reason)), site(at), unit(number), error(reason) {}

Engine::Engine(std::unique_ptr<Reader> reader, std::size_t threads, std::size_t frame_bytes,
               std::size_t largest_record)
    : reader_(std::move(reader)),
      pool_(threads),
      staging_(std::max(frame_bytes / kStagingShare, 2 * kReadBytes)),
      frame_bytes_(largest_record) {
  if (largest_record == 0 || largest_record % kSector != 0 ||
      largest_record > std::max<std::uint64_t>(reader_->file_bytes(), kSector)) {
    throw std::invalid_argument(
        "the largest record is a multiple of the sector size, and no larger than the file");
  }
  // Half of the frames may hold guesses; the other half has room for an ordered batch.
  frame_count_ = std::max((frame_bytes - frame_bytes / kStagingShare) / largest_record,
                          4 * kOrdered);
  constexpr std::size_t kMost = std::numeric_limits<std::int32_t>::max();
  if (frame_count_ > kMost || largest_record > std::size_t{1} << 40) {
    throw std::invalid_argument("there is no memory for frames of this size");
  }
  frames_ = Memory(frame_count_ * largest_record);
  for (std::size_t f = frame_count_; f-- > 0;) {
    free_frames_.push_back(static_cast<std::int32_t>(f));
  }
}

Engine::~Engine() {
  reader_.reset();  // waits for reads that still write to memory of ours
}

std::size_t Engine::add(const Layout& layout, std::vector<float> scale, std::size_t slots,
                        Policy policy) {
  layout.check(reader_->file_bytes());
  if (layout.record_bytes > frame_bytes_) {
    throw std::invalid_argument("a record is larger than the largest that was announced");
  }
  if (slots > layout.units()) throw std::invalid_argument("a site has more slots than units");
  if (layout.input_rows > 0 && columns_.bytes() < layout.units() * layout.stride) {
    columns_ = Memory(layout.units() * layout.stride);
  }
  sites_.emplace_back(layout, std::move(scale), slots, policy);
  idle_.push_back(0);
  guessed_at_.push_back({});
  return sites_.size() - 1;
}

Access Engine::access(std::size_t site, const bool* wanted) {
  Site& s = sites_.at(site);
  // A request that nobody finished must not see its slots change hands.
  if (running_ && site == active_) abandon();
  const Access found = s.cache.access(wanted);
  s.totals.hits += found.hits;
  s.totals.misses += found.misses;
  return found;
}

void Engine::load(std::size_t site) {
  if (running_) abandon();
  Site& s = sites_.at(site);
  active_ = site;
  tokens_ = 0;
  wanted_.assign(s.layout.units(), 0);
  for (std::size_t u = 0; u < wanted_.size(); ++u) {
    wanted_[u] = s.cache.resident()[u] && !s.in_memory(u);
  }
  running_ = true;
  plan_reads();
  finish(nullptr);
}

// Begins a request and its reads; returns the wanted units that are in memory, in order.
std::vector<std::int32_t> Engine::ask(std::size_t site, const bool* masks, std::size_t tokens) {
  if (running_) abandon();
  const auto begun = Clock::now();
  if (reader_->outstanding() > 0) reap(false);  // what was read ahead and has come
  Site& s = sites_.at(site);
  active_ = site;
  tokens_ = tokens;
  first_token_ = 0;
  made_ = nullptr;
  const std::size_t units = s.layout.units();
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(masks);
  masks_.assign(bytes, bytes + tokens * units);
  wanted_.assign(masks_.begin(), masks_.begin() + units);
  for (std::size_t t = 1; t < tokens; ++t) {
    for (std::size_t u = 0; u < units; ++u) wanted_[u] |= masks_[t * units + u];
  }
  const double idle = seconds_since(std::max(last_arrival_, guessed_at_[site]));
  if (idle < kLongIdle) idle_[site] += kNewest * (idle - idle_[site]);
  running_ = true;
  plan_reads();
  std::vector<std::int32_t> here(units);
  std::size_t found = 0;
  for (std::size_t u = 0; u < units; ++u) {
    here[found] = static_cast<std::int32_t>(u);
    found += wanted_[u] && s.in_memory(u);
  }
  here.resize(found);
  s.totals.bookkeeping += seconds_since(begun);
  return here;
}

void Engine::begin(std::size_t site, const float* x, const bool* masks, std::size_t tokens) {
  const std::vector<std::int32_t> here = ask(site, masks, tokens);
  set_activations(x);
  if (active().layout.kind == Kind::bf16) return;
  multiply_held(here);
  for (const std::int32_t u : here) wanted_[u] = 0;
}

void Engine::multiply_held(const std::vector<std::int32_t>& units) {
  for (std::size_t i = 0; i < units.size();) {
    const std::size_t count = std::min(missing_ > 0 ? kHeld : units.size(), units.size() - i);
    multiply(units.data() + i, count);
    i += count;
    if (missing_ > 0) reap(false);  // the disk gets its next reads meanwhile
  }
}

void Engine::finish(float* y) {
  if (!running_) throw std::logic_error("finish comes after begin");
  if (active().layout.kind == Kind::bf16 && tokens_ > 0) {
    in_order();
  } else {
    arrive();
  }
  if (y) write(y);
  running_ = false;
}

// Multiplies with the missing records in the order in which they come.
void Engine::arrive() {
  while (missing_ > 0) {
    reap(false);
    if (ready_.size() >= std::min(missing_, kBatch) || reader_->outstanding() == 0) {
      collect();
    } else {
      reap(true);
    }
  }
}

// Floats are added in the order of the units, in batches that do not depend on what was cached.
void Engine::in_order() {
  Site& s = active();
  std::vector<std::int32_t> batch;
  for (std::size_t first = 0; first < wanted_.size(); first += kOrdered) {
    batch.clear();
    for (std::size_t u = first; u < std::min(wanted_.size(), first + kOrdered); ++u) {
      if (wanted_[u]) batch.push_back(static_cast<std::int32_t>(u));
    }
    const auto absent = [&](std::int32_t u) { return !record(s, u); };
    while (std::any_of(batch.begin(), batch.end(), absent)) reap(true);
    // Which of the batch just arrived: those that are not counted as done yet.
    std::vector<std::int32_t> later, now;
    for (const std::int32_t u : ready_) {
      (static_cast<std::size_t>(u) < first + kOrdered ? now : later).push_back(u);
    }
    ready_ = std::move(now);
    verify();
    multiply(batch.data(), batch.size());
    for (const std::int32_t u : batch) wanted_[u] = 0;
    settle();
    ready_ = std::move(later);
  }
}

const std::uint8_t* Engine::record(const Site& site, std::size_t unit) const {
  if (site.in_memory(unit)) return site.slot(site.slot_with[unit]);
  return site.frame_of[unit] != kNone && site.arrived[unit] ? frame(site.frame_of[unit]) : nullptr;
}

// Multiplies with what has arrived, as much at a time as stays in a core's cache between the
// verification and the product.
void Engine::collect() {
  while (!ready_.empty()) {
    const std::size_t rest = ready_.size() - std::min(ready_.size(), kBatch);
    const std::vector<std::int32_t> later(ready_.begin(), ready_.begin() + rest);
    ready_.erase(ready_.begin(), ready_.begin() + rest);
    verify();
    multiply(ready_.data(), ready_.size());
    settle();
    ready_ = later;
  }
}

void Engine::verify() {
  const auto begun = Clock::now();
  Site& s = active();
  std::vector<std::uint8_t> intact(ready_.size());
  pool_.run(ready_.size(), [&](std::size_t i) {
    intact[i] = record_intact(record(s, ready_[i]), s.layout.record_bytes, s.layout.group,
                              static_cast<std::uint64_t>(ready_[i]));
  });
  s.totals.bookkeeping += seconds_since(begun);
  const auto bad = std::find(intact.begin(), intact.end(), 0);
  if (bad != intact.end()) fail(ready_[bad - intact.begin()], 0);
}

// Moves used records to their slots or gives up their frames, and lets others come.
void Engine::settle() {
  const auto begun = Clock::now();
  Site& s = active();
  for (const std::int32_t unit : ready_) {
    --missing_;
    wanted_[unit] = 0;
    const std::int32_t slot = s.cache.slot_of()[unit], f = s.frame_of[unit];
    if (f == kNone) continue;
    // What is still to be multiplied stays where it is; then this record is read again when wanted.
    const bool blocked = slot != kNone && s.unit_at[slot] != kNone && wanted_[s.unit_at[slot]];
    if (slot != kNone && !blocked) {
      std::memcpy(s.slot(slot), frame(f), s.layout.record_bytes);
      s.put(unit, slot);
    } else if (made_) {
      keep_column(unit);
    }
    free_frames_.push_back(f);
    s.frame_of[unit] = kNone;
    s.arrived[unit] = 0;
  }
  feed();
  s.totals.bookkeeping += seconds_since(begun);
}

void Engine::fail(std::int32_t unit, int error) {
  const std::size_t site = active_;
  abandon();
  throw RecordError(site, static_cast<std::size_t>(unit), error);
}

// Ends the request where it is: nothing of it is under way or half in its place afterwards.
void Engine::abandon() {
  running_ = false;
  made_ = nullptr;
  Site& s = active();
  queue_.clear();
  queued_ = 0;
  while (reader_->outstanding() > 0) {
    done_.clear();
    reader_->wait(done_);
    for (const Done& done : done_) land(done);
  }
  // Nothing that arrived for it has been verified for certain: whatever it wanted is read again.
  for (std::size_t u = 0; u < wanted_.size(); ++u) {
    if (!wanted_[u]) continue;
    if (s.in_memory(u)) s.empty_slot(s.slot_with[u]);
    if (s.frame_of[u] != kNone) free_frames_.push_back(s.frame_of[u]);
    s.frame_of[u] = kNone;
    s.arrived[u] = 0;
  }
  ready_.clear();
  missing_ = 0;
}

void Engine::reset_totals() {
  for (Site& site : sites_) site.totals = {};
}

}  // namespace dipnet
