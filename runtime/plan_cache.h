// Values by key, each made once: one thread compiles, others that ask for the same key wait, other keys go on.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

namespace attnjit::runtime {

// Holds at most `capacity` finished values and forgets the least recently used one first; a value that is still being
// compiled is never forgotten. Outcome is a value or a failure, copied to every waiter, and tells by operator bool
// whether it may be kept: a failure reaches the threads that waited for it and is compiled anew by the next one.
template <typename Outcome>
class PlanCache {
 public:
  struct Found {
    Outcome outcome;
    bool compiled_here;  // this call ran `compile`
  };

  explicit PlanCache(std::size_t capacity) : capacity_(capacity) {}

  // Returns the value of `key`, from `compile()` when there is none. No lock is held while `compile` runs. An exception
  // of `compile` reaches every waiter, and is not kept either.
  template <typename Compile>
  Found get(const std::string& key, Compile&& compile) {
    std::promise<Outcome> promise;
    std::uint64_t id = 0;
    {
      std::unique_lock lock(mutex_);
      if (const auto it = entries_.find(key); it != entries_.end()) {
        recent_.splice(recent_.begin(), recent_, it->second.place);
        const std::shared_future<Outcome> future = it->second.future;
        lock.unlock();
        return {future.get(), false};
      }
      id = next_id_++;
      recent_.push_front(key);
      try {
        entries_.emplace(key, Entry{promise.get_future().share(), recent_.begin(), id});
      } catch (...) {
        recent_.pop_front();
        throw;
      }
      evict();
    }
    try {
      Outcome outcome = compile();
      if (!outcome) forget(key, id);
      promise.set_value(outcome);
      return {std::move(outcome), true};
    } catch (...) {
      forget(key, id);
      promise.set_exception(std::current_exception());
      throw;
    }
  }

  // The finished value of `key`, where there is one: neither waits nor compiles.
  std::optional<Outcome> find(const std::string& key) {
    std::lock_guard lock(mutex_);
    const auto it = entries_.find(key);
    if (it == entries_.end() || it->second.future.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
      return std::nullopt;
    }
    recent_.splice(recent_.begin(), recent_, it->second.place);
    return it->second.future.get();
  }

  std::size_t size() const {
    std::lock_guard lock(mutex_);
    return entries_.size();
  }

 private:
  struct Entry {
    std::shared_future<Outcome> future;
    std::list<std::string>::iterator place;
    std::uint64_t id;  // tells this entry from a later one of the same key
  };

  void evict() {
    for (auto place = recent_.end(); entries_.size() > capacity_ && place != recent_.begin();) {
      --place;
      const auto it = entries_.find(*place);
      if (it->second.future.wait_for(std::chrono::seconds(0)) != std::future_status::ready) continue;
      entries_.erase(it);
      place = recent_.erase(place);
    }
  }

  void forget(const std::string& key, std::uint64_t id) {
    std::lock_guard lock(mutex_);
    const auto it = entries_.find(key);
    if (it == entries_.end() || it->second.id != id) return;
    recent_.erase(it->second.place);
    entries_.erase(it);
  }

  const std::size_t capacity_;
  mutable std::mutex mutex_;
  std::unordered_map<std::string, Entry> entries_;
  std::list<std::string> recent_;  // keys, the most recently used one first
  std::uint64_t next_id_ = 0;
};

}  // namespace attnjit::runtime
