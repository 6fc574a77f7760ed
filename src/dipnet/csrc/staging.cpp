#include "staging.h"

#include <algorithm>
#include <stdexcept>

namespace dipnet {

std::uint8_t* Staging::take(std::size_t bytes) {
  std::size_t begin = rooms_.empty() ? 0 : rooms_.back().end;
  const std::size_t oldest = rooms_.empty() ? 0 : rooms_.front().begin;
  const bool wrapped = begin <= oldest && !rooms_.empty();
  if (!wrapped && begin + bytes > memory_.bytes()) begin = 0;
  const bool before = !rooms_.empty() && begin <= oldest;  // it lies in front of the oldest
  if (begin + bytes > (before ? oldest : memory_.bytes())) return nullptr;
  rooms_.push_back({begin, begin + bytes, true});
  return memory_.data() + begin;
}

void Staging::give(const std::uint8_t* room) {
  const auto begin = static_cast<std::size_t>(room - memory_.data());
  const auto found = std::find_if(rooms_.begin(), rooms_.end(), [&](const Room& r) {
    return r.used && r.begin == begin;
  });
  if (found == rooms_.end()) throw std::logic_error("this room was not taken");
  found->used = false;
  while (!rooms_.empty() && !rooms_.front().used) rooms_.pop_front();
}

}  // namespace dipnet
