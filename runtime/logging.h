// What the library says on stderr, off unless ATTNJIT_LOG asks for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

namespace attnjit::runtime {

enum class LogLevel : std::uint8_t { kTrace, kDebug, kInfo, kWarn, kError, kOff };

// Safe to use from several threads at once.
class Logger {
 public:
  explicit Logger(LogLevel level);
  ~Logger();
  // Ask first where a message costs something to build.
  bool enabled(LogLevel level) const { return level >= level_; }
  void log(LogLevel level, std::string_view message) const;

 private:
  struct Sink;
  LogLevel level_;
  std::unique_ptr<Sink> sink_;  // none when off
};

}  // namespace attnjit::runtime
