// The logger over spdlog; the only file that includes it.
#include "runtime/logging.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

namespace attnjit::runtime {
namespace {

spdlog::level::level_enum spdlog_level(LogLevel level) {
  switch (level) {
    case LogLevel::kTrace:
      return spdlog::level::trace;
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarn:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
    case LogLevel::kOff:
      break;
  }
  return spdlog::level::off;
}

}  // namespace

struct Logger::Sink {
  // Not in spdlog's registry: a host program's own settings of it stay untouched.
  spdlog::logger logger{"attnjit", std::make_shared<spdlog::sinks::stderr_color_sink_mt>()};
};

Logger::Logger(LogLevel level) : level_(level) {
  if (level_ == LogLevel::kOff) return;
  sink_ = std::make_unique<Sink>();
  sink_->logger.set_level(spdlog_level(level_));
}

Logger::~Logger() = default;

void Logger::log(LogLevel level, std::string_view message) const {
  if (sink_) sink_->logger.log(spdlog_level(level), spdlog::string_view_t(message.data(), message.size()));
}

}  // namespace attnjit::runtime
