// The backend for Linux with io_uring; built where liburing is found.
#include <liburing.h>

#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "reader_queue.h"

namespace dipnet {
namespace {

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

// The ring alone, so that it is closed when the reader's constructor fails after it.
class Ring {
 public:
  explicit Ring(unsigned entries) {
    int error = -EINVAL;
    // Completions wait for the caller's next system call and do not interrupt its computing (Linux
    // 5.19). Not IORING_SETUP_SINGLE_ISSUER: the caller's thread may change.
#if defined(IORING_SETUP_COOP_TASKRUN) && defined(IORING_SETUP_TASKRUN_FLAG)
    error = io_uring_queue_init(entries, &ring_, IORING_SETUP_COOP_TASKRUN |
                                                     IORING_SETUP_TASKRUN_FLAG);
#endif
    if (error == -EINVAL) error = io_uring_queue_init(entries, &ring_, 0);
    if (error < 0) fail(-error, "the kernel gives no io_uring");
  }
  ~Ring() { io_uring_queue_exit(&ring_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  io_uring* get() { return &ring_; }

 private:
  io_uring ring_;
};

class UringReader final : public QueuedReader {
 public:
  UringReader(File file, std::size_t depth)
      : QueuedReader(std::move(file), depth), ring_(static_cast<unsigned>(depth)) {
    const int fd = file_.fd();  // registered: no reference to it is taken and dropped for each read
    const int error = io_uring_register_files(ring_.get(), &fd, 1);
    if (error < 0) fail(-error, "the kernel's io_uring registers no file");
  }

  ~UringReader() override { drain(); }

  std::string_view backend() const override { return "io_uring"; }

 protected:
  void start(std::size_t number) override {
    Job& job = jobs_[number];
    io_uring_sqe* sqe = io_uring_get_sqe(ring_.get());  // never null: the ring has depth() entries
    const iovec* rest = job.rest();
    if (job.rest_count() == 1 && rest->iov_len <= kMostBytes) {
      io_uring_prep_read(sqe, 0, rest->iov_base, static_cast<unsigned>(rest->iov_len),
                         job.position);
    } else {
      io_uring_prep_readv(sqe, 0, rest, static_cast<unsigned>(job.rest_count()), job.position);
    }
    sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, &job);
  }

  void flush() override {
    while (io_uring_sq_ready(ring_.get()) > 0) {
      const int error = io_uring_submit(ring_.get());
      if (error < 0 && error != -EINTR && error != -EAGAIN) fail(-error, "io_uring_submit");
    }
  }

  void reap(bool block) override {
    std::array<io_uring_cqe*, 64> cqes;
    if (block) wait_for_one();
    unsigned count = cqes.size();
    while (count == cqes.size()) {
      count = io_uring_peek_batch_cqe(ring_.get(), cqes.data(), cqes.size());
      for (unsigned i = 0; i < count; ++i) handle(*cqes[i]);
      io_uring_cq_advance(ring_.get(), count);
    }
  }

 private:
  static constexpr std::size_t kMostBytes = std::size_t{1} << 30;

  void wait_for_one() {
    io_uring_cqe* cqe = nullptr;
    int error = -EINTR;
    while (error == -EINTR || error == -EAGAIN) error = io_uring_wait_cqe(ring_.get(), &cqe);
    if (error < 0) fail(-error, "io_uring_wait_cqe");
  }

  void handle(const io_uring_cqe& cqe) {
    const Job& job = *static_cast<const Job*>(io_uring_cqe_get_data(&cqe));
    if (cqe.res > 0) file_.forget(job.position, static_cast<std::uint64_t>(cqe.res));
    completed(static_cast<std::size_t>(&job - jobs_.data()), cqe.res);
  }

  Ring ring_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(File file, std::size_t depth) {
  return std::make_unique<UringReader>(std::move(file), depth);
}

}  // namespace dipnet
