// Requests of whole neurons: their rows of gate and up, then their columns of down.
//
// Integer columns are multiplied with activations that are rounded relative to the token's largest,
// so that the columns come after all rows. A record that was streamed past the cache, or that loses
// its slot to another token's, is then gone but for its column, which is kept aside.
//
// Rows and columns give the same bits whatever was cached and in whatever order records arrive: each
// row's product is a number of its own, and the columns are added exactly, those of bf16 in the order
// of the units.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "engine.h"

namespace dipnet {
namespace {

// Tokens whose columns are multiplied together: their sums take memory.
constexpr std::size_t kPiece = 64;
// Neurons of a task at most: few, so that all threads end together.
constexpr std::size_t kTask = 16;

}  // namespace

void Engine::rows(std::size_t site, const float* x, const bool* masks, std::size_t tokens,
                  float* y) {
  const std::vector<std::int32_t> here = ask(site, masks, tokens);
  Site& s = active();
  const Layout& layout = s.layout;
  neurons_.clear();
  for (std::size_t u = 0; u < layout.units(); ++u) {
    if (wanted_[u]) neurons_.push_back(static_cast<std::int32_t>(u));
  }
  column_of_.assign(layout.units(), kNone);
  columns_kept_ = 0;
  const auto begun = Clock::now();
  inputs_.resize(std::max(inputs_.size(), tokens));
  pool_.run(tokens, [&](std::size_t t) {
    inputs_[t].set(layout.kind, x + t * layout.rows, layout.rows);
  });
  std::fill_n(y, tokens * layout.input_rows * layout.units(), 0.0f);
  s.totals.kernels += seconds_since(begun);
  made_ = y;
  multiply_held(here);
  for (const std::int32_t u : here) {
    if (s.cache.slot_of()[u] != s.slot_with[u]) keep_column(u);  // the slot is for another's
    wanted_[u] = 0;
  }
  arrive();
  made_ = nullptr;
}

void Engine::columns(const float* h, float* y) {
  if (!running_ || active().layout.input_rows == 0) {
    throw std::logic_error("columns come after rows");
  }
  const Layout& layout = active().layout;
  const std::size_t tokens = tokens_;
  for (first_token_ = 0; first_token_ < tokens; first_token_ += kPiece) {
    tokens_ = std::min(kPiece, tokens - first_token_);
    set_activations(h + first_token_ * layout.units());
    multiply_columns();
    write(y + first_token_ * layout.rows);
  }
  running_ = false;
}

// Adds rows' products of arrived or held neurons to what the request makes.
void Engine::multiply_rows(const std::int32_t* units, std::size_t count) {
  const auto begun = Clock::now();
  Site& s = active();
  const Layout& layout = s.layout;
  const std::size_t all = layout.units(), outputs = layout.input_rows * all;
  const std::size_t share = std::clamp<std::size_t>(count / (4 * pool_.threads()), 1, kTask);
  pool_.run((count + share - 1) / share, [&](std::size_t task) {
    const std::size_t last = std::min(count, (task + 1) * share);
    for (std::size_t t = 0; t < tokens_; ++t) {
      Row rows[2 * kTask];
      std::size_t wanted = 0;
      for (std::size_t i = task * share; i < last; ++i) {
        const auto u = static_cast<std::size_t>(units[i]);
        if (!mask_of(t)[u]) continue;
        for (std::size_t r = 0; r < layout.input_rows; ++r) {
          const float scale = s.scale.empty() ? 1.0f : s.scale[r * all + u];
          rows[wanted++] = {record(s, u) + r * layout.stride, scale, r * all + u};
        }
      }
      dipnet::multiply_rows(inputs_[t], rows, wanted, made_ + t * outputs);
    }
  });
  s.totals.kernels += seconds_since(begun);
}

void Engine::multiply_columns() {
  if (active().layout.kind != Kind::bf16) return multiply(neurons_.data(), neurons_.size());
  for (std::size_t first = 0; first < neurons_.size();) {
    const auto end = (static_cast<std::size_t>(neurons_[first]) / kOrdered + 1) * kOrdered;
    std::size_t last = first;
    while (last < neurons_.size() && static_cast<std::size_t>(neurons_[last]) < end) ++last;
    multiply(neurons_.data() + first, last - first);
    first = last;
  }
}

// Copies the column of a record that is about to be given up.
void Engine::keep_column(std::int32_t unit) {
  const Site& s = active();
  const Layout& layout = s.layout;
  std::memcpy(columns_.data() + columns_kept_ * layout.stride,
              record(s, static_cast<std::size_t>(unit)) + layout.input_rows * layout.stride,
              layout.stride);
  column_of_[unit] = static_cast<std::int32_t>(columns_kept_++);
}

// Where a unit's columns begin.
const std::uint8_t* Engine::column(const Site& site, std::size_t unit) const {
  const Layout& layout = site.layout;
  if (layout.input_rows > 0 && column_of_[unit] != kNone) {
    return columns_.data() + static_cast<std::size_t>(column_of_[unit]) * layout.stride;
  }
  return record(site, unit) + layout.input_rows * layout.stride;
}

}  // namespace dipnet
