#include <unistd.h>

#include <vector>

#include "check.h"
#include "pool.h"

namespace {

using dipnet::Pool;

// What the tasks write is plain memory: the thread sanitizer sees whether run() orders it.
void test_every_task_once(Pool& pool, std::size_t tasks) {
  std::vector<int> done(tasks, 0);
  pool.run(tasks, [&](std::size_t task) { ++done[task]; });
  for (const int times : done) CHECK(times == 1);
}

void test_many_short_runs(Pool& pool) {
  std::size_t sum = 0;
  for (std::size_t run = 0; run < 3000; ++run) {
    std::size_t part[3] = {};
    pool.run(3, [&](std::size_t task) { part[task] = run + task; });
    sum += part[0] + part[1] + part[2];
  }
  CHECK(sum == 3 * (3000 * 2999 / 2) + 3 * 3000);
}

}  // namespace

int main() {
  for (int i = 0; i < 200; ++i) Pool gone_before_its_threads_began(1 + i % 5);
  for (const std::size_t threads : {0, 1, 2, 3, 5}) {
    Pool pool(threads);
    CHECK(pool.threads() == (threads == 0 ? 1 : threads));
    for (const std::size_t tasks : {0, 1, 2, 3, 7, 1000}) test_every_task_once(pool, tasks);
    test_many_short_runs(pool);
    ::usleep(20000);  // the threads sleep by now
    test_every_task_once(pool, 50);
  }
}
