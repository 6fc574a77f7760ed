// The arithmetic of a request: activations, terms, sums.
#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "engine.h"

namespace dipnet {
namespace {

// Records that several tokens are multiplied with in turn, so that they stay in a cache.
constexpr std::size_t kShared = 128;
// Columns that a thread takes on at a time: few, so that all threads end together.
constexpr std::size_t kTaskBytes = 1 << 20;
constexpr std::size_t kTogether = 16;  // what the kernels take in one pass

// Outputs of one task: a multiple of 512, as the kernels want, and as even a share as that allows.
std::size_t task_outputs(std::size_t outputs, std::size_t threads) {
  constexpr std::size_t kStep = 512, kMost = 4096;
  const std::size_t tasks = ((outputs + kMost - 1) / kMost + threads - 1) / threads * threads;
  const std::size_t share = (outputs + tasks - 1) / tasks;
  return (share + kStep - 1) / kStep * kStep;
}

}  // namespace

void Engine::set_activations(const float* x) {
  const auto begun = Clock::now();
  Site& s = active();
  const std::size_t channels = s.layout.channels, units = s.layout.units(), block = s.layout.block;
  activations_.resize(std::max(activations_.size(), tokens_));
  terms_.resize(std::max(terms_.size(), tokens_));
  totals_.resize(std::max(totals_.size(), tokens_ * parts()));
  const float* const scale =
      s.scale.empty() ? nullptr : s.scale.data() + s.layout.input_rows * channels;
  pool_.run(tokens_, [&](std::size_t t) {
    const auto* const mask = reinterpret_cast<const bool*>(mask_of(t));
    if (block == 1) {
      activations_[t].set(x + t * channels, scale, mask, channels);
    } else {
      const auto keep = std::make_unique<bool[]>(channels);
      for (std::size_t u = 0; u < units; ++u) std::fill_n(&keep[u * block], block, mask[u]);
      activations_[t].set(x + t * channels, scale, keep.get(), channels);
    }
  });
  pool_.run(tokens_ * parts(), [&](std::size_t t) {
    totals_[t].reset(s.layout.kind, s.layout.outputs, activations_[t / parts()].classes);
  });
  s.totals.kernels += seconds_since(begun);
}

// Sums of a single token that are kept apart, one for each thread.
std::size_t Engine::parts() const {
  const bool exact = sites_[active_].layout.kind != Kind::bf16;
  return tokens_ == 1 && exact ? pool_.threads() : 1;
}

void Engine::multiply(const std::int32_t* units, std::size_t count) {
  if (tokens_ == 0 || count == 0) return;
  if (made_) return multiply_rows(units, count);
  const auto begun = Clock::now();
  const std::size_t step = tokens_ == 1 ? count : kShared;
  for (std::size_t i = 0; i < count; i += step) {
    multiply_part(units + i, std::min(step, count - i));
  }
  active().totals.kernels += seconds_since(begun);
}

void Engine::multiply_part(const std::int32_t* units, std::size_t count) {
  pool_.run(tokens_, [&](std::size_t t) { sort_terms(t, units, count, terms_[t]); });
  if (parts() > 1) {
    share_columns();
  } else {
    share_outputs();
  }
}

// Every thread multiplies all columns, and some of their weights each.
void Engine::share_outputs() {
  const Layout& layout = active().layout;
  const std::size_t share = task_outputs(layout.outputs, pool_.threads());
  pool_.run((layout.outputs + share - 1) / share, [&](std::size_t task) {
    const std::size_t first = task * share, last = std::min(layout.outputs, first + share);
    for (std::size_t t = 0; t < tokens_; ++t) {
      accumulate(layout.kind, layout.outputs, terms_[t].data(), terms_[t].size(), activations_[t],
                 totals_[t], first, last);
    }
  });
}

// Every thread multiplies whole columns, which are the longest runs that memory has for it.
void Engine::share_columns() {
  const Layout& layout = active().layout;
  const std::vector<Term>& terms = terms_[0];
  const std::size_t step = std::max(kTaskBytes / layout.stride / kTogether, std::size_t{1});
  std::atomic<std::size_t> next{0};
  pool_.run(parts(), [&](std::size_t part) {
    for (std::size_t i; (i = next.fetch_add(step * kTogether)) < terms.size();) {
      accumulate(layout.kind, layout.outputs, terms.data() + i,
                 std::min(step * kTogether, terms.size() - i), activations_[0], totals_[part], 0,
                 layout.outputs);
    }
  });
}

// The columns of the units that a token wants, by class of magnitude; bf16 in order.
void Engine::sort_terms(std::size_t token, const std::int32_t* units, std::size_t count,
                        std::vector<Term>& terms) const {
  const Site& s = sites_[active_];
  const std::size_t block = s.layout.block;
  const std::uint8_t* const mask = mask_of(token);
  const bool sorted = s.layout.kind != Kind::bf16;
  const auto& magnitude = activations_[token].magnitude;
  std::array<std::size_t, kClasses> next{};
  std::size_t wanted = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (!mask[units[i]]) continue;
    ++wanted;
    for (std::size_t j = 0; sorted && j < block; ++j) ++next[magnitude[units[i] * block + j]];
  }
  terms.resize(wanted * block);
  std::size_t start = 0;
  for (std::size_t& n : next) n = std::exchange(start, start + n);
  std::size_t in_turn = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (!mask[units[i]]) continue;
    const std::uint8_t* const at = column(s, static_cast<std::size_t>(units[i]));
    for (std::size_t j = 0; j < block; ++j) {
      const auto channel = static_cast<std::uint32_t>(units[i] * block + j);
      terms[sorted ? next[magnitude[channel]]++ : in_turn++] = {at + j * s.layout.stride, channel};
    }
  }
}

// (units) what a token wants.
const std::uint8_t* Engine::mask_of(std::size_t token) const {
  return masks_.data() + (first_token_ + token) * sites_[active_].layout.units();
}

void Engine::write(float* y) {
  const auto begun = Clock::now();
  const Layout& layout = active().layout;
  const std::size_t share = task_outputs(layout.outputs, pool_.threads());
  const std::size_t shares = (layout.rows + share - 1) / share;
  pool_.run(tokens_ * shares, [&](std::size_t task) {
    const std::size_t t = task / shares, first = task % shares * share;
    dipnet::finish(layout.kind, activations_[t], &totals_[t * parts()], parts(), first,
                   std::min(layout.rows, first + share), y + t * layout.rows);
  });
  active().totals.kernels += seconds_since(begun);
}

std::pair<std::size_t, std::size_t> Engine::result_shape() const {
  if (!running_) throw std::logic_error("there is a result after begin only");
  return {tokens_, sites_[active_].layout.rows};
}

void Engine::partial(float* y) {
  if (!running_) throw std::logic_error("partial comes between begin and finish");
  write(y);
}

}  // namespace dipnet
