// A failure of the tool: whose fault it was, which is the exit code, and a message.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

namespace attnjit::tool {

// The exit codes of docs/tool.md.
enum class Fault { kUser = 1, kEnvironment = 2, kInternal = 3 };

class Failure : public std::runtime_error {
 public:
  Failure(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}
  Fault fault() const { return fault_; }

 private:
  Fault fault_;
};

inline Failure user_error(const std::string& message) { return Failure(Fault::kUser, message); }
inline Failure environment_error(const std::string& message) { return Failure(Fault::kEnvironment, message); }

// Runs `body`. Where memory ends it is an error of the environment that says for what.
template <typename Body>
void with_memory_for(const std::string& what, Body&& body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    throw environment_error("out of memory for " + what);
  } catch (const std::length_error&) {
    throw environment_error("out of memory for " + what);
  }
}

}  // namespace attnjit::tool
