#include "base/parallel.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
static void relax() { _mm_pause(); }
#else
static void relax() {}
#endif

namespace kda {

namespace {
// A wait first spins about as long as the gap between two ops of a decode step, then sleeps in the kernel: a
// neighbour on the machine costs us a wake-up, never its whole time slice.
constexpr int kSpins = 4000;

template <class T, class Done>
void wait_until(const std::atomic<T>& a, Done done) {
  for (int i = 0; i < kSpins; ++i) {
    if (done(a.load(std::memory_order_acquire))) return;
    relax();
  }
  for (T seen = a.load(std::memory_order_acquire); !done(seen); seen = a.load(std::memory_order_acquire)) a.wait(seen);
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
  return std::max(1, int(std::thread::hardware_concurrency()));
}
}  // namespace

// One word tells everything about a round: its number, whether it is open to workers, and how many are in it. The caller
// takes tasks too and waits only for workers that came in: one that the system has not woken yet costs nothing.
struct ThreadPool::Impl {
  static constexpr uint32_t kInside = (1u << 13) - 1, kOpen = 1u << 13, kRound = 1u << 14;

  int threads = 1;
  std::vector<std::thread> workers;
  std::atomic<uint32_t> word{0};
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  int64_t tasks = 0;
  const std::function<void(int64_t, int)>* f = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;

  void work(int worker) {
    try {
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) (*f)(t, worker);
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);  // start no more tasks
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  void loop(int worker) {
    for (uint32_t seen = 0;;) {  // the round this worker was in last
      wait_until(word, [&](uint32_t w) { return (w & kOpen && w / kRound != seen) || stop.load(std::memory_order_acquire); });
      if (stop.load(std::memory_order_acquire)) return;
      uint32_t w = word.load(std::memory_order_acquire);
      if (!(w & kOpen) || w / kRound == seen || !word.compare_exchange_weak(w, w + 1, std::memory_order_acq_rel)) continue;
      seen = w / kRound;
      work(worker);
      const uint32_t before = word.fetch_sub(1, std::memory_order_acq_rel);
      if (!(before & kOpen) && (before & kInside) == 1) word.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  KDA_CHECK(threads >= 0 && threads <= 4096, "threads must be 1..4096, or 0 for one per core; got ", threads);
  impl_->threads = threads ? threads : usable_cores();
  for (int w = 1; w < impl_->threads; ++w) impl_->workers.emplace_back([this, w] { impl_->loop(w); });
}

ThreadPool::~ThreadPool() {
  impl_->stop.store(true, std::memory_order_release);
  impl_->word.fetch_add(Impl::kRound, std::memory_order_release);
  impl_->word.notify_all();
  for (auto& t : impl_->workers) t.join();
}

int ThreadPool::threads() const { return impl_->threads; }

void ThreadPool::run(int64_t tasks, const std::function<void(int64_t, int)>& f) {
  if (tasks <= 0) return;
  Impl& p = *impl_;
  if (tasks == 1 || p.threads == 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t, 0);
    return;
  }
  p.f = &f;
  p.tasks = tasks;
  p.error = nullptr;
  p.next.store(0, std::memory_order_relaxed);
  const uint32_t round = p.word.load(std::memory_order_relaxed) / Impl::kRound + 1;  // nobody is inside: see below
  p.word.store(round * Impl::kRound | Impl::kOpen, std::memory_order_release);
  p.word.notify_all();
  p.work(0);
  p.word.fetch_and(~Impl::kOpen, std::memory_order_acq_rel);
  wait_until(p.word, [](uint32_t w) { return (w & Impl::kInside) == 0; });
  if (p.error) std::rethrow_exception(p.error);
}

}  // namespace kda
