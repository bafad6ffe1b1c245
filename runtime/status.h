// A failure on its way to the C edge, and the value-or-failure that carries it.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "attnjit/attnjit.h"

namespace attnjit::runtime {

// `message` names the argument, what it was and what is allowed.
struct Failure {
  attnjit_status status = ATTNJIT_INTERNAL;
  std::string message;
};

// Nothing: all is well.
using Check = std::optional<Failure>;

// A value or a Failure.
template <typename T>
class Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Failure failure) : failure_(std::move(failure)) {}
  explicit operator bool() const { return value_.has_value(); }
  T& operator*() { return *value_; }
  const T& operator*() const { return *value_; }
  T* operator->() { return &*value_; }
  const T* operator->() const { return &*value_; }
  const Failure& failure() const { return failure_; }

 private:
  std::optional<T> value_;
  Failure failure_;
};

}  // namespace attnjit::runtime
