// The rules, one unit after the other, against the native cache; src/dipnet/cache/reference.py.
#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "cache.h"
#include "check.h"

namespace {

using dipnet::Cache;
using dipnet::Policy;

std::mt19937 generator(1);

struct Plain {
  std::vector<int> slot_of, unit_in, priority;
  int clock = 0;

  dipnet::Access access(const bool* wanted, Policy policy) {
    ++clock;
    std::vector<int> misses, victims, slots;
    dipnet::Access found{0, 0, 0};
    for (int u = 0; u < static_cast<int>(slot_of.size()); ++u) {
      if (wanted[u]) priority[u] = policy == Policy::kLru ? clock : priority[u] + 1;
      if (wanted[u] && slot_of[u] >= 0) ++found.hits;
      if (wanted[u] && slot_of[u] < 0) misses.push_back(u);
      if (!wanted[u] && slot_of[u] >= 0) victims.push_back(u);
    }
    found.misses = misses.size();
    std::stable_sort(misses.begin(), misses.end(),
                     [&](int a, int b) { return priority[a] > priority[b]; });
    std::stable_sort(victims.begin(), victims.end(),
                     [&](int a, int b) { return priority[a] < priority[b]; });
    for (int s = 0; s < static_cast<int>(unit_in.size()); ++s) {
      if (unit_in[s] < 0) slots.push_back(s);
    }
    for (const int victim : victims) slots.push_back(slot_of[victim]);
    for (std::size_t i = 0; i < std::min(misses.size(), slots.size()); ++i) {
      const int held = unit_in[slots[i]];
      if (held >= 0 && policy == Policy::kLfu && priority[misses[i]] < priority[held]) break;
      if (held >= 0) slot_of[held] = -1;
      unit_in[slots[i]] = misses[i];
      slot_of[misses[i]] = slots[i];
      ++found.admitted;
    }
    return found;
  }
};

void test(std::size_t units, std::size_t slots, Policy policy, int accesses) {
  Cache cache(units, slots, policy);
  Plain plain{std::vector<int>(units, -1), std::vector<int>(slots, -1), std::vector<int>(units), 0};
  const auto wanted = std::make_unique<bool[]>(units);
  for (int i = 0; i < accesses; ++i) {
    const std::size_t percent = generator() % 101;
    for (std::size_t u = 0; u < units; ++u) wanted[u] = generator() % 100 < percent;
    const dipnet::Access found = cache.access(wanted.get());
    const dipnet::Access expected = plain.access(wanted.get(), policy);
    CHECK(found.hits == expected.hits && found.misses == expected.misses);
    CHECK(found.admitted == expected.admitted && cache.missed().size() == found.misses);
    CHECK(std::equal(plain.slot_of.begin(), plain.slot_of.end(), cache.slot_of()));
    CHECK(std::equal(plain.unit_in.begin(), plain.unit_in.end(), cache.unit_in()));
    for (std::size_t u = 0; u < units; ++u) CHECK(cache.resident()[u] == (plain.slot_of[u] >= 0));
  }
}

}  // namespace

int main() {
  for (const Policy policy : {Policy::kLru, Policy::kLfu}) {
    for (std::size_t units = 1; units < 80; units += 7) {
      for (const std::size_t slots : {std::size_t{0}, units / 3, units}) {
        test(units, slots, policy, 40);
      }
    }
    test(5000, 1800, policy, 300);
  }
}
