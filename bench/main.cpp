// The attnjit tool: parses the command line, runs one command, turns failures into messages and exit codes.
#include <attnjit/attnjit.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>

#include "bench/commands.h"
#include "bench/cuda.h"
#include "bench/failure.h"
#include "bench/problem.h"
#include "bench/safetensors.h"

namespace attnjit::tool {

bool uses_gpu(const std::string& device, attnjit_backend backend) {
  if (device != "auto" && device != "cpu" && device != "cuda") {
    throw user_error(fmt::format("--device {}: allowed are auto, cpu and cuda", in_quotes(device)));
  }
  const bool cpu_only = backend == ATTNJIT_BACKEND_CPU;
  const bool gpu_only = backend == ATTNJIT_BACKEND_SM80 || backend == ATTNJIT_BACKEND_SM90;
  if ((device == "cuda" && cpu_only) || (device == "cpu" && gpu_only)) {
    throw user_error(fmt::format("--device {} --backend {}: the backend is one of the {}", device,
                                 attnjit_backend_name(backend), cpu_only ? "CPU" : "GPU"));
  }
  const std::string& unavailable = device == "cpu" || cpu_only ? "not asked for" : Gpu::unavailable();
  if (unavailable.empty()) return true;
  if (device == "cuda" || gpu_only) throw environment_error(fmt::format("there is no GPU to use: {}", unavailable));
  return false;
}

namespace {

int fail(Fault fault, const std::string& message) {
  fmt::print(stderr, "attnjit: error: {}\n", message);
  return static_cast<int>(fault);
}

int run_tool(int argc, const char* const* argv) {
  CLI::App app("Compiles attention score_mod expressions: runs, explains and measures them.", "attnjit");
  app.set_version_flag("--version", fmt::format("attnjit {}", attnjit_version()));
  Action action;
  add_run_command(app, action);
  add_explain_command(app, action);
  add_bench_command(app, action);
  add_cache_command(app, action);

  std::vector<std::string> arguments =
      normalize_arguments(std::span(argv + 1, static_cast<std::size_t>(std::max(argc - 1, 0))));
  std::ranges::reverse(arguments);  // CLI11 takes them from the back
  try {
    app.parse(std::move(arguments));
  } catch (const CLI::Success& help_or_version) {
    return app.exit(help_or_version);
  } catch (const CLI::ParseError& error) {
    return fail(Fault::kUser,
                fmt::format("{}\nattnjit --help and attnjit COMMAND --help show what is allowed.", error.what()));
  }
  // Not left to CLI11, which would not name an unknown command.
  if (!action)
    return fail(Fault::kUser, "a command is required: run, explain, bench score-mod or cache list, verify or clear");
  return action();
}

}  // namespace
}  // namespace attnjit::tool

int main(int argc, char** argv) {
  using attnjit::tool::Fault;
  try {
    return attnjit::tool::run_tool(argc, argv);
  } catch (const attnjit::tool::Failure& failure) {
    return attnjit::tool::fail(failure.fault(), failure.what());
  } catch (const std::bad_alloc&) {
    return attnjit::tool::fail(Fault::kEnvironment, "out of memory");
  } catch (const std::exception& exception) {
    return attnjit::tool::fail(Fault::kInternal, exception.what());
  }
}
