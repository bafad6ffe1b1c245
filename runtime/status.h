// A failure on its way to the C edge, and the value-or-failure that carries it.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

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
  Result(T value) : state_(std::move(value)) {}
  Result(Failure failure) : state_(std::move(failure)) {}
  explicit operator bool() const { return std::holds_alternative<T>(state_); }
  T& operator*() { return *std::get_if<T>(&state_); }
  const T& operator*() const { return *std::get_if<T>(&state_); }
  T* operator->() { return std::get_if<T>(&state_); }
  const T* operator->() const { return std::get_if<T>(&state_); }
  const Failure& failure() const { return *std::get_if<Failure>(&state_); }

 private:
  std::variant<T, Failure> state_;
};

}  // namespace attnjit::runtime
