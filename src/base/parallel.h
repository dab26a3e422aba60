// base/parallel.h — the one thread pool. Work is cut into tasks by size, never by thread count, so that results
// do not depend on how many threads there are.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

namespace kda {

class ThreadPool {
 public:
  // threads >= 1 counts the caller; 0 takes one per core this process may use.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls f(task, worker) for every task in [0,tasks), worker in [0,threads()); returns when all are done.
  // Tasks start in rising order and are handed out as workers come free. The first exception is rethrown here.
  // Not reentrant: f must not call run.
  void run(int64_t tasks, const std::function<void(int64_t task, int worker)>& f);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kda
