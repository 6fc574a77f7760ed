#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "bind.h"
#include "engine.h"

namespace {

using dipnet::Engine;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Masks = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Scores = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Faults = std::vector<std::tuple<std::uint64_t, std::uint64_t, int>>;

void need(bool fact, const char* what) {
  if (!fact) throw std::invalid_argument(std::string("engine: ") + what);
}

dipnet::Kind kind_of(const std::string& name) {
  if (name == "int4") return dipnet::Kind::int4;
  if (name == "int8") return dipnet::Kind::int8;
  need(name == "bf16", "the kind is int4, int8 or bf16");
  return dipnet::Kind::bf16;
}

dipnet::Policy policy_of(const std::string& name) {
  need(name == "lru" || name == "lfu", "the policy is lru or lfu");
  return name == "lru" ? dipnet::Policy::kLru : dipnet::Policy::kLfu;
}

void construct(Engine* self, const std::string& path, std::size_t depth, const std::string& backend,
               std::size_t threads, std::size_t frame_bytes, std::size_t largest_record,
               const Faults& faults) {
  need(threads > 0 && threads <= 1024, "between 1 and 1024 threads");
  auto reader = dipnet::make_reader(path, depth, backend);
  if (!faults.empty()) {
    std::vector<dipnet::Fault> made;
    for (const auto& [start, end, error] : faults) made.push_back({start, end, error});
    reader = dipnet::make_faulty(std::move(reader), std::move(made));
  }
  new (self) Engine(std::move(reader), threads, frame_bytes, largest_record);
}

std::size_t add(Engine& engine, const std::string& kind, std::size_t channels, std::size_t block,
                std::size_t outputs, std::size_t rows, std::size_t stride, std::size_t record_bytes,
                std::uint64_t offset, std::uint64_t group, std::optional<Scores> scale,
                std::size_t slots, const std::string& policy, std::size_t input_rows) {
  std::vector<float> scales;
  if (scale) scales.assign(scale->data(), scale->data() + scale->size());
  for (const float s : scales) need(std::isfinite(s) && s >= 0, "scales are finite and >= 0");
  const dipnet::Layout layout{kind_of(kind), channels, block,        outputs, rows,
                              stride,        record_bytes, offset, group,   input_rows};
  return engine.add(layout, std::move(scales), slots, policy_of(policy));
}

void begin(Engine& engine, std::size_t site, Floats x, Masks masks) {
  const dipnet::Layout& layout = engine.site(site).layout;
  need(x.shape(0) > 0 && x.shape(0) == masks.shape(0), "as many masks as tokens, at least one");
  need(layout.input_rows == 0, "begin is for columns, rows for neurons");
  need(x.shape(1) == layout.channels, "x is (tokens, channels)");
  need(masks.shape(1) == layout.units(), "masks are (tokens, units)");
  nb::gil_scoped_release unlocked;
  engine.begin(site, x.data(), masks.data(), x.shape(0));
}

void rows(Engine& engine, std::size_t site, Floats x, Masks masks, Result y) {
  const dipnet::Layout& layout = engine.site(site).layout;
  need(layout.input_rows > 0, "rows is for neurons, begin for columns");
  need(x.shape(0) > 0 && x.shape(0) == masks.shape(0), "as many masks as tokens, at least one");
  need(x.shape(1) == layout.rows, "x is (tokens, rows)");
  need(masks.shape(1) == layout.units(), "masks are (tokens, units)");
  need(y.shape(0) == x.shape(0) && y.shape(1) == layout.input_rows * layout.units(),
       "y is (tokens, input_rows * units)");
  nb::gil_scoped_release unlocked;
  engine.rows(site, x.data(), masks.data(), x.shape(0), y.data());
}

void check_result(const Engine& engine, Result& y) {
  const auto [tokens, rows] = engine.result_shape();
  need(y.shape(0) == tokens && y.shape(1) == rows, "y is (tokens, rows)");
}

void finish(Engine& engine, Result y) {
  check_result(engine, y);
  need(engine.asked().layout.input_rows == 0, "columns end a request of neurons");
  nb::gil_scoped_release unlocked;
  engine.finish(y.data());
}

void partial(Engine& engine, Result y) {
  check_result(engine, y);
  need(engine.asked().layout.input_rows == 0, "nothing of a request of neurons is there early");
  nb::gil_scoped_release unlocked;
  engine.partial(y.data());
}

void columns(Engine& engine, Floats h, Result y) {
  check_result(engine, y);
  need(h.shape(0) == y.shape(0) && h.shape(1) == engine.asked().layout.units(),
       "h is (tokens, units)");
  nb::gil_scoped_release unlocked;
  engine.columns(h.data(), y.data());
}

void prefetch(Engine& engine, std::size_t site, Mask wanted, Scores score, bool certain) {
  const std::size_t units = engine.site(site).layout.units();
  need(wanted.size() == units && score.size() == units, "wanted and score are (units,)");
  nb::gil_scoped_release unlocked;
  engine.prefetch(site, wanted.data(), score.data(), certain);
}

std::tuple<std::size_t, std::size_t, std::size_t> access_units(Engine& engine, std::size_t site,
                                                         Mask wanted) {
  need(wanted.size() == engine.site(site).layout.units(), "wanted is (units,)");
  const dipnet::Access found = engine.access(site, wanted.data());
  return {found.hits, found.misses, found.admitted};
}

nb::ndarray<nb::numpy, const bool, nb::ndim<1>> resident(nb::handle_t<Engine> self,
                                                         std::size_t site) {
  const Engine& engine = nb::cast<const Engine&>(self);
  const dipnet::Cache& cache = engine.site(site).cache;
  return {cache.resident(), {cache.units()}, self};
}

nb::dict totals(const Engine& engine, std::size_t site) {
  const dipnet::SiteTotals& t = engine.site(site).totals;
  nb::dict made;
  made["hits"] = t.hits;
  made["misses"] = t.misses;
  made["read"] = t.read;
  made["guessed"] = t.guessed;
  made["useful"] = t.useful;
  made["early"] = t.early;
  made["wait"] = t.wait;
  made["kernels"] = t.kernels;
  made["bookkeeping"] = t.bookkeeping;
  return made;
}

nb::dict reader_totals(const Engine& engine) {
  const dipnet::ReaderTotals t = engine.reader().totals();
  nb::dict made;
  made["reads"] = t.reads;
  made["bytes"] = t.bytes;
  made["busy"] = t.busy_seconds;
  made["backend"] = std::string(engine.reader().backend());
  made["direct"] = engine.reader().direct();
  return made;
}

}  // namespace

void bind_engine(nb::module_& m) {
  m.attr("BATCH") = Engine::kBatch;
  m.attr("HELD") = Engine::kHeld;
  static PyObject* error = nullptr;
  // No OSError: that keeps two of its arguments only.
  nb::object made =
      nb::steal(PyErr_NewException("dipnet._native.RecordError", PyExc_RuntimeError, nullptr));
  error = made.ptr();
  m.attr("RecordError") = made;
  nb::register_exception_translator(
      [](const std::exception_ptr& thrown, void*) {
        try {
          std::rethrow_exception(thrown);
        } catch (const dipnet::RecordError& e) {
          PyErr_SetObject(error, nb::make_tuple(e.site, e.unit, e.error, e.what()).ptr());
        }
      });

  nb::class_<Engine>(m, "Engine")
      .def("__init__", &construct, nb::arg("path"), nb::kw_only(), nb::arg("depth"),
           nb::arg("backend"), nb::arg("threads"), nb::arg("frame_bytes"),
           nb::arg("largest_record"), nb::arg("faults") = Faults{})
      .def("add", &add, nb::kw_only(), nb::arg("kind"), nb::arg("channels"), nb::arg("block"),
           nb::arg("outputs"), nb::arg("rows"), nb::arg("stride"), nb::arg("record_bytes"),
           nb::arg("offset"), nb::arg("group"), nb::arg("scale").none(), nb::arg("slots"),
           nb::arg("policy"), nb::arg("input_rows") = 0)
      .def("access", &access_units)
      .def("resident", &resident)
      .def("load", &Engine::load, nb::call_guard<nb::gil_scoped_release>())
      .def("begin", &begin)
      .def("partial", &partial, nb::arg("y").noconvert())
      .def("prefetch", &prefetch)
      .def("finish", &finish, nb::arg("y").noconvert())
      .def("rows", &rows, nb::arg("site"), nb::arg("x"), nb::arg("masks"),
           nb::arg("y").noconvert())
      .def("columns", &columns, nb::arg("h"), nb::arg("y").noconvert())
      .def("totals", &totals)
      .def("reader_totals", &reader_totals)
      .def("reset_totals", &Engine::reset_totals)
      .def_prop_ro("frame_bytes", &Engine::frame_bytes);
  m.def("instruction_set", &dipnet::instruction_set);
  m.def("use_instruction_set", [](const std::string& name) {
    dipnet::use_instruction_set(name.c_str());
  });
}
