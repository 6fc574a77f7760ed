// A reader with faults where a test wants them; the readers themselves know nothing of it.
#include <algorithm>
#include <numeric>
#include <utility>

#include "reader.h"

namespace dipnet {
namespace {

class FaultyReader final : public Reader {
 public:
  FaultyReader(std::unique_ptr<Reader> reader, std::vector<Fault> faults)
      : reader_(std::move(reader)), faults_(std::move(faults)) {}

  using Reader::submit;
  void submit(std::vector<Read> reads) override {
    std::erase_if(reads, [this](const Read& read) {
      const int error = fault(read);
      if (error != 0) failed_.push_back({read.tag, error, 0});
      return error != 0;
    });
    reader_->submit(std::move(reads));
  }

  std::size_t poll(std::vector<Done>& done) override {
    const std::size_t failed = report(done);
    return failed + reader_->poll(done);
  }

  std::size_t wait(std::vector<Done>& done) override {
    return failed_.empty() ? reader_->wait(done) : poll(done);
  }

  std::vector<std::uint64_t> cancel_queued(
      const std::function<bool(std::uint64_t tag)>& wanted) override {
    return reader_->cancel_queued(wanted);
  }

  std::size_t outstanding() const override { return reader_->outstanding() + failed_.size(); }
  std::size_t depth() const override { return reader_->depth(); }
  bool direct() const override { return reader_->direct(); }
  std::uint64_t file_bytes() const override { return reader_->file_bytes(); }
  std::string_view backend() const override { return reader_->backend(); }

  ReaderTotals totals() const override {
    ReaderTotals totals = reader_->totals();
    totals.failed += reported_;
    return totals;
  }

 private:
  int fault(const Read& read) const {
    std::uint64_t end = read.offset;
    for (const iovec& part : read.into) end += part.iov_len;
    for (const Fault& f : faults_) {
      if (read.offset < f.end && f.start < end) return f.error;
    }
    return 0;
  }

  std::size_t report(std::vector<Done>& done) {
    const std::size_t count = failed_.size();
    done.insert(done.end(), failed_.begin(), failed_.end());
    failed_.clear();
    reported_ += count;
    return count;
  }

  const std::unique_ptr<Reader> reader_;
  const std::vector<Fault> faults_;
  std::vector<Done> failed_;
  std::uint64_t reported_ = 0;
};

}  // namespace

std::unique_ptr<Reader> make_faulty(std::unique_ptr<Reader> reader, std::vector<Fault> faults) {
  return std::make_unique<FaultyReader>(std::move(reader), std::move(faults));
}

}  // namespace dipnet
