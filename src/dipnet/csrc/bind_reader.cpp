#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "bind.h"
#include "reader.h"

namespace {

using Faults = std::vector<std::tuple<std::uint64_t, std::uint64_t, int>>;

std::unique_ptr<dipnet::Reader> open_reader(const std::filesystem::path& path, std::size_t depth,
                                            std::string_view backend, const Faults& faults) {
  auto reader = dipnet::make_reader(path.string(), depth, backend);
  if (faults.empty()) return reader;
  std::vector<dipnet::Fault> list;
  for (const auto& [start, end, error] : faults) list.push_back({start, end, error});
  return dipnet::make_faulty(std::move(reader), std::move(list));
}

// A reader that keeps the arrays it reads into alive, and that threads may share.
class PythonReader {
 public:
  using Array = Rows<std::uint8_t>;
  using Report = std::tuple<std::uint64_t, int, std::uint64_t>;  // tag, errno, bytes

  PythonReader(const std::filesystem::path& path, std::size_t depth, std::string_view backend,
               const Faults& faults)
      : reader_(open_reader(path, depth, backend, faults)) {}

  void submit(std::uint64_t offset, const std::vector<Array>& into, std::uint64_t tag) {
    dipnet::Read read{offset, {}, next_};
    for (const Array& part : into) read.into.push_back({part.data(), part.size()});
    std::vector<dipnet::Read> reads;
    reads.push_back(std::move(read));
    pending_[next_++] = {tag, into};
    start(std::move(reads));
  }

  void submit_rows(const std::vector<std::uint64_t>& offsets, Array rows, std::uint64_t first_tag) {
    if (rows.ndim() != 2 || rows.shape(0) != offsets.size()) {
      throw std::invalid_argument("submit_rows: rows must be (len(offsets), bytes)");
    }
    std::vector<dipnet::Read> reads;
    for (std::size_t i = 0; i < offsets.size(); ++i) {
      std::uint8_t* row = rows.data() + i * rows.shape(1);
      reads.push_back({offsets[i], {{row, rows.shape(1)}}, next_});
      pending_[next_++] = {first_tag + i, {rows}};
    }
    start(std::move(reads));
  }

  std::vector<Report> poll() { return collect(&dipnet::Reader::poll); }
  std::vector<Report> wait() { return collect(&dipnet::Reader::wait); }

  std::vector<std::uint64_t> cancel_queued(const std::vector<std::uint64_t>& tags) {
    std::vector<std::uint64_t> cancelled;
    const auto locked = lock();
    const auto wanted = [&](std::uint64_t number) {
      const std::uint64_t tag = pending_.at(number).tag;
      return std::find(tags.begin(), tags.end(), tag) != tags.end();
    };
    for (const std::uint64_t number : reader_->cancel_queued(wanted)) {
      cancelled.push_back(take(number));
    }
    return cancelled;
  }

  template <auto Property>
  auto get() {
    const auto locked = lock();
    return ((*reader_).*Property)();
  }

  nb::dict totals() {
    const dipnet::ReaderTotals totals = get<&dipnet::Reader::totals>();
    nb::dict result;
    result["reads"] = totals.reads;
    result["bytes"] = totals.bytes;
    result["failed"] = totals.failed;
    result["busy_seconds"] = totals.busy_seconds;
    return result;
  }

 private:
  struct Pending {
    std::uint64_t tag;
    std::vector<Array> arrays;
  };

  // The interpreter is let go of meanwhile: a thread that is in wait() holds the mutex.
  std::unique_lock<std::mutex> lock() {
    nb::gil_scoped_release unlocked;
    return std::unique_lock(mutex_);
  }

  void start(std::vector<dipnet::Read> reads) {
    std::vector<std::uint64_t> numbers;
    for (const dipnet::Read& read : reads) numbers.push_back(read.tag);
    try {
      nb::gil_scoped_release unlocked;
      const std::lock_guard locked(mutex_);
      reader_->submit(std::move(reads));
    } catch (...) {
      for (const std::uint64_t number : numbers) take(number);
      throw;
    }
  }

  template <typename Method>
  std::vector<Report> collect(Method method) {
    std::vector<dipnet::Done> done;
    {
      nb::gil_scoped_release unlocked;
      const std::lock_guard locked(mutex_);
      ((*reader_).*method)(done);
    }
    std::vector<Report> reports;
    for (const dipnet::Done& d : done) reports.emplace_back(take(d.tag), d.error, d.bytes);
    return reports;
  }

  std::uint64_t take(std::uint64_t number) {
    const std::uint64_t tag = pending_.at(number).tag;
    pending_.erase(number);
    return tag;
  }

  std::mutex mutex_;         // of reader_; what is below belongs to the holder of the interpreter
  std::uint64_t next_ = 0;   // the reads' own tags, which are unique
  std::unordered_map<std::uint64_t, Pending> pending_;
  std::unique_ptr<dipnet::Reader> reader_;  // last: it ends before the arrays it reads into
};

// OSError, or the subclass that its errno stands for.
void translate_system_error(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const std::system_error& error) {
    const nb::tuple arguments = nb::make_tuple(error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments.ptr());
  }
}

}  // namespace

void bind_reader(nb::module_& m) {
  nb::register_exception_translator(translate_system_error);
  m.def("reader_backends", &dipnet::reader_backends);
  nb::class_<PythonReader>(m, "Reader")
      .def(nb::init<const std::filesystem::path&, std::size_t, std::string_view, const Faults&>(),
           nb::arg("path"), nb::arg("depth") = dipnet::kDefaultDepth, nb::arg("backend") = "auto",
           nb::kw_only(), nb::arg("faults") = Faults())
      .def("submit", &PythonReader::submit, nb::arg("offset"), nb::arg("into").noconvert(),
           nb::arg("tag"))
      .def("submit_rows", &PythonReader::submit_rows, nb::arg("offsets"),
           nb::arg("rows").noconvert(), nb::arg("first_tag"))
      .def("poll", &PythonReader::poll)
      .def("wait", &PythonReader::wait)
      .def("cancel_queued", &PythonReader::cancel_queued, nb::arg("tags"))
      .def("totals", &PythonReader::totals)
      .def_prop_ro("outstanding", &PythonReader::get<&dipnet::Reader::outstanding>)
      .def_prop_ro("depth", &PythonReader::get<&dipnet::Reader::depth>)
      .def_prop_ro("direct", &PythonReader::get<&dipnet::Reader::direct>)
      .def_prop_ro("file_bytes", &PythonReader::get<&dipnet::Reader::file_bytes>)
      .def_prop_ro("backend", &PythonReader::get<&dipnet::Reader::backend>);
}
