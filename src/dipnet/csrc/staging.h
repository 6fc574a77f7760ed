// Memory that reads of several records arrive in, before the records go to their places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>

#include "memory.h"

namespace dipnet {

// A ring: rooms are taken in order and given back in any, but used again in the order of the taking.
class Staging {
 public:
  Staging() = default;
  explicit Staging(std::size_t bytes) : memory_(bytes) {}

  // Room for so many bytes, as aligned as the sizes of all rooms; nullptr when there is none now.
  // An empty ring has room for everything up to its size.
  std::uint8_t* take(std::size_t bytes);
  void give(const std::uint8_t* room);

 private:
  struct Room {
    std::size_t begin, end;
    bool used;
  };

  Memory memory_;
  std::deque<Room> rooms_;  // in the order of the taking
};

}  // namespace dipnet
