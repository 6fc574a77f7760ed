// Reading ahead: guesses go to frames, and are given up when they were wrong.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace dipnet {

void Engine::prefetch(std::size_t site, const bool* wanted, const float* score, bool certain) {
  Site& s = sites_.at(site);
  if (running_ && site == active_) abandon();  // nobody finished it, and it reads the same records
  guessed_at_[site] = Clock::now();
  std::vector<std::int32_t> units;
  for (std::size_t u = 0; u < s.layout.units(); ++u) {
    if (wanted[u] && !s.in_memory(u) && s.frame_of[u] == kNone) {
      units.push_back(static_cast<std::int32_t>(u));
    }
  }
  const std::size_t spare = frame_count_ / 2;
  std::size_t most = free_frames_.size() > spare ? free_frames_.size() - spare : 0;
  if (!certain) most = std::min(most, idle_records(site));
  if (units.size() > most) {
    if (!certain) {
      // NaN counts as the highest, as in the masks: a sort must have an order.
      const auto key = [&](auto u) { return std::isnan(score[u]) ? INFINITY : score[u]; };
      std::nth_element(units.begin(), units.begin() + static_cast<std::ptrdiff_t>(most),
                       units.end(), [&](auto a, auto b) { return key(a) > key(b); });
    }
    units.resize(most);
    std::sort(units.begin(), units.end());
  }
  std::vector<Piece> pieces;
  for (const std::int32_t unit : units) pieces.push_back({unit, kNone, kNone});
  s.totals.guessed += read(site, pieces);
}

// How many of a site's records the disk delivers while it would otherwise wait for its request.
std::size_t Engine::idle_records(std::size_t site) const {
  const double busy = reader_->totals().busy_seconds;
  if (busy <= 0) return 0;
  const double bytes = idle_[site] * static_cast<double>(brought_) / busy;
  return static_cast<std::size_t>(bytes / static_cast<double>(sites_[site].layout.record_bytes));
}

// Gives up what was read ahead for this site and is not wanted.
void Engine::drop_stale_guesses() {
  Site& s = active();
  for (std::size_t u = 0; u < wanted_.size(); ++u) {
    if (s.frame_of[u] == kNone || wanted_[u]) continue;
    if (s.arrived[u]) free_frames_.push_back(s.frame_of[u]);
    s.frame_of[u] = kNone;  // one under way gives its frame back when it lands
    s.arrived[u] = 0;
  }
  const auto stale = [&](std::uint64_t tag) {
    const Flight& flight = flights_[tag];
    return flight.site == active_ && std::all_of(flight.pieces.begin(), flight.pieces.end(),
                                                 [&](const Piece& p) { return !wanted_[p.unit]; });
  };
  for (const std::uint64_t tag : reader_->cancel_queued(stale)) {
    for (const Piece& piece : end_flight(tag).pieces) free_frames_.push_back(piece.frame);
  }
}

}  // namespace dipnet
