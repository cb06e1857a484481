// A few threads that share one loop at a time. A caller that finds them busy runs its loop alone, so several Python
// threads may call at once. So does a forked child: it has no workers, and what they held stays locked there.
#pragma once

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace elf {

class ThreadPool {
 public:
  // Never destroyed: joining threads while the process exits can hang.
  static ThreadPool& shared() {
    static ThreadPool* pool = new ThreadPool;
    return *pool;
  }

  void resize(int threads) { limit_ = threads < 1 ? 1 : threads; }

  // Calls body(0) .. body(count - 1), in any order, on the calling thread and, if `shared`, on idle workers; returns
  // when all are done.
  void run(int64_t count, bool shared, const std::function<void(int64_t)>& body) {
    std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
    if (!shared || count < 2 || limit_ < 2 || is_forked() || !turn.try_lock()) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    owner_ = process();  // before the first lock
    {
      std::lock_guard<std::mutex> lock(mutex_);
      hire();
      body_ = &body;
      count_ = count;
      next_ = 0;
      ++loop_;
    }
    wake_.notify_all();
    take(body, count);
    std::unique_lock<std::mutex> lock(mutex_);
    body_ = nullptr;  // who wakes up now is too late
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  static long process() {
#if __has_include(<unistd.h>)
    return getpid();
#else
    return 1;
#endif
  }

  bool is_forked() const { return owner_ && owner_ != process(); }

  void hire() {
    try {
      for (; workers_ < limit_ - 1; ++workers_) std::thread(&ThreadPool::work, this, workers_).detach();
    } catch (const std::system_error&) {
      limit_ = workers_ + 1;  // the system grants no more threads: go on with those there are
    }
  }

  void take(const std::function<void(int64_t)>& body, int64_t count) {
    for (int64_t i; (i = next_.fetch_add(1)) < count;) body(i);
  }

  void work(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return loop_ != seen; });
      seen = loop_;
      if (!body_ || index >= limit_ - 1) continue;
      const auto& body = *body_;
      const int64_t count = count_;
      ++active_;
      lock.unlock();
      take(body, count);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller whose loop the workers share
  std::mutex mutex_;  // guards all below but the atomics
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int> limit_{1};
  std::atomic<long> owner_{0};  // the process that the workers belong to; 0 before the first shared loop
  uint64_t loop_ = 0;
  int workers_ = 0, active_ = 0;
};

}  // namespace elf
