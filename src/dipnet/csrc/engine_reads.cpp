// What the engine asks the disk for, and where it goes when it has come.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "engine.h"
#include "reads.h"

namespace dipnet {

// What is read next: missing records in the order of the file, each to its slot or to a frame.
void Engine::plan_reads() {
  Site& s = active();
  queue_.clear();
  ready_.clear();
  queued_ = missing_ = 0;
  if (s.complete()) return;
  drop_stale_guesses();
  for (std::size_t u = 0; u < wanted_.size(); ++u) {
    if (!wanted_[u] || s.in_memory(u)) continue;
    const auto unit = static_cast<std::int32_t>(u);
    ++missing_;
    if (s.frame_of[u] != kNone) {
      ++s.totals.useful;
      s.totals.early += s.arrived[u];
      if (s.arrived[u]) ready_.push_back(unit);
      continue;
    }
    std::int32_t slot = s.cache.slot_of()[u];
    // Another token of this request still needs what is in the slot: it moves there later.
    if (slot != kNone && s.unit_at[slot] != kNone && wanted_[s.unit_at[slot]]) slot = kNone;
    if (slot != kNone) s.empty_slot(slot);
    queue_.push_back({unit, slot, kNone});
  }
  s.totals.read += queue_.size();
  feed();
}

// Starts reads of the queue as long as there is room for what they bring.
void Engine::feed() {
  if (queued_ < queue_.size()) queued_ += read(active_, std::span(queue_).subspan(queued_));
}

// Reads pieces that are in the order of the file, neighbours together; returns how many of them are
// under way: the others find no room now.
std::size_t Engine::read(std::size_t site, std::span<const Piece> pieces) {
  std::vector<Read> reads;
  std::size_t begun = 0;
  while (begun < pieces.size()) {
    const auto rest = pieces.subspan(begun);
    const auto together = rest.first(run_length(site, rest));
    if (together.empty() || !add_flight(site, together, reads)) break;
    begun += together.size();
  }
  if (!reads.empty()) reader_->submit(std::move(reads));
  return begun;
}

// How many of the first pieces one read takes in, as far as there are frames for what has no slot.
std::size_t Engine::run_length(std::size_t site, std::span<const Piece> pieces) const {
  const std::size_t record_bytes = sites_[site].layout.record_bytes;
  std::size_t count = 0, frames = 0;
  for (; count < pieces.size(); ++count) {
    const Piece& piece = pieces[count];
    const bool goes_on = count == 0 || read_goes_on(pieces[0].unit, pieces[count - 1].unit,
                                                    piece.unit, record_bytes);
    frames += piece.slot == kNone && piece.frame == kNone;
    if (!goes_on || frames > free_frames_.size()) break;
  }
  return count;
}

// Adds the read of a run, and says false when there is no room for it now. Small records arrive side
// by side: a read into many places takes the system longer than to copy them afterwards.
bool Engine::add_flight(std::size_t site, std::span<const Piece> run, std::vector<Read>& reads) {
  Site& s = sites_[site];
  const std::size_t record_bytes = s.layout.record_bytes;
  const std::size_t bytes = (run.back().unit - run.front().unit + 1) * record_bytes;
  Flight flight{site, {run.begin(), run.end()}, nullptr};
  if (run.size() > 1 && record_bytes <= kGapBytes) {
    flight.room = staging_.take(bytes);
    if (!flight.room) return false;
  }
  for (Piece& piece : flight.pieces) {
    if (piece.slot == kNone && piece.frame == kNone) piece.frame = take_frame(s, piece.unit);
  }
  if (free_flights_.empty()) {
    free_flights_.push_back(flights_.size());
    flights_.emplace_back();
  }
  Read read;
  read.tag = free_flights_.back();
  free_flights_.pop_back();
  read.offset = s.layout.offset + run.front().unit * record_bytes;
  if (flight.room) {
    read.into.push_back({flight.room, bytes});
  } else {
    for (const Piece& piece : flight.pieces) {
      read.into.push_back({place(s, piece), record_bytes});
    }
  }
  flights_[read.tag] = std::move(flight);
  reads.push_back(std::move(read));
  return true;
}

std::int32_t Engine::take_frame(Site& s, std::int32_t unit) {
  s.frame_of[unit] = free_frames_.back();
  s.arrived[unit] = 0;
  free_frames_.pop_back();
  return s.frame_of[unit];
}

std::uint8_t* Engine::place(const Site& s, const Piece& piece) const {
  return piece.frame != kNone ? frame(piece.frame) : s.slot(piece.slot);
}

void Engine::reap(bool block) {
  const auto begun = Clock::now();
  done_.clear();
  if (block) {
    if (reader_->wait(done_) == 0) throw std::logic_error("waits for a record that nobody reads");
    active().totals.wait += seconds_since(begun);
  } else {
    reader_->poll(done_);
  }
  std::int32_t lost = kNone;
  int error = 0;
  for (const Done& done : done_) {
    const std::int32_t unit = land(done);
    if (unit != kNone) std::tie(lost, error) = std::pair(unit, done.error);
  }
  if (lost != kNone) fail(lost, error);
  feed();
}

// Takes the flight of a read that has come or was cancelled, and gives its room back.
Engine::Flight Engine::end_flight(std::uint64_t tag) {
  Flight flight = std::move(flights_[tag]);
  free_flights_.push_back(tag);
  if (flight.room) staging_.give(flight.room);  // it is not taken again before the caller returns
  return flight;
}

// Takes note of a finished read; returns a wanted unit that it failed to bring.
std::int32_t Engine::land(const Done& done) {
  const Flight flight = end_flight(done.tag);
  Site& s = sites_[flight.site];
  if (done.error && flight.pieces.size() > 1) {  // which of them is it?
    for (const Piece& piece : flight.pieces) read(flight.site, {&piece, 1});
    return kNone;
  }
  const std::size_t record_bytes = s.layout.record_bytes;
  std::int32_t lost = kNone;
  if (!done.error) brought_ += flight.pieces.size() * record_bytes;
  for (const Piece& piece : flight.pieces) {
    const bool ours = running_ && flight.site == active_ && wanted_[piece.unit];
    if (piece.frame != kNone && s.frame_of[piece.unit] != piece.frame) {
      free_frames_.push_back(piece.frame);  // a guess that was given up meanwhile
      continue;
    }
    if (done.error) {
      if (piece.frame != kNone) free_frames_.push_back(piece.frame);
      s.frame_of[piece.unit] = kNone;
      if (ours) lost = piece.unit;
      continue;
    }
    if (flight.room) {
      const std::size_t behind = piece.unit - flight.pieces.front().unit;
      std::memcpy(place(s, piece), flight.room + behind * record_bytes, record_bytes);
    }
    if (piece.slot != kNone) s.put(piece.unit, piece.slot);
    s.arrived[piece.unit] = piece.frame != kNone;
    if (!ours) continue;
    ready_.push_back(piece.unit);
    last_arrival_ = Clock::now();
  }
  return lost;
}

}  // namespace dipnet
