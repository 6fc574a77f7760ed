#include <nanobind/stl/string_view.h>

#include <stdexcept>
#include <string_view>

#include "bind.h"
#include "cache.h"

namespace {

using dipnet::Cache;

template <typename T>
using View = nb::ndarray<nb::numpy, const T, nb::ndim<1>>;

// A numpy view of the cache's own memory, which keeps the cache alive.
template <typename T>
View<T> view(nb::handle owner, const T* data, std::size_t n) {
  return View<T>(data, {n}, owner);
}

dipnet::Policy policy_named(std::string_view name) {
  if (name == "lru") return dipnet::Policy::kLru;
  if (name == "lfu") return dipnet::Policy::kLfu;
  throw std::invalid_argument("policy must be lru or lfu");
}

void construct(Cache* self, std::size_t units, std::size_t slots, std::string_view policy) {
  new (self) Cache(units, slots, policy_named(policy));
}

nb::tuple access_units(Cache& self, Rows<const bool> wanted) {
  if (wanted.ndim() != 1 || wanted.size() != self.units()) {
    throw std::invalid_argument("wanted must have the shape (units,)");
  }
  const dipnet::Access found = self.access(wanted.data());
  return nb::make_tuple(found.hits, found.misses, found.admitted);
}

View<std::int32_t> missed(nb::handle_t<Cache> self) {
  const auto units = nb::cast<Cache&>(self).missed();
  return view(self, units.data(), units.size());
}

View<std::int32_t> slot_of(nb::handle_t<Cache> self) {
  const auto& cache = nb::cast<Cache&>(self);
  return view(self, cache.slot_of(), cache.units());
}

View<std::int32_t> unit_in(nb::handle_t<Cache> self) {
  const auto& cache = nb::cast<Cache&>(self);
  return view(self, cache.unit_in(), cache.slots());
}

View<bool> resident(nb::handle_t<Cache> self) {
  const auto& cache = nb::cast<Cache&>(self);
  return view(self, cache.resident(), cache.units());
}

}  // namespace

void bind_cache(nb::module_& m) {
  nb::class_<Cache>(m, "Cache")
      .def("__init__", &construct, nb::arg("units"), nb::arg("slots"), nb::arg("policy"))
      .def("access", &access_units, nb::arg("wanted").noconvert())
      .def("reset", &Cache::reset)
      .def("__deepcopy__", [](const Cache& self, nb::handle) { return Cache(self); })
      .def_prop_ro("units", &Cache::units)
      .def_prop_ro("slots", &Cache::slots)
      .def_prop_ro("missed", &missed)
      .def_prop_ro("slot_of", &slot_of)
      .def_prop_ro("unit_in", &unit_in)
      .def_prop_ro("resident", &resident);
}
