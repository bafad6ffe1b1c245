// The commands of the attnjit tool. Each adds itself to `app` and, when it is chosen, sets `action`, which does the
// work and returns the exit code or throws a Failure.
#pragma once

#include <attnjit/attnjit.h>

#include <functional>
#include <string>

namespace CLI {
class App;
}

namespace attnjit::tool {

using Action = std::function<int()>;

void add_run_command(CLI::App& app, Action& action);
void add_explain_command(CLI::App& app, Action& action);
void add_bench_command(CLI::App& app, Action& action);
void add_cache_command(CLI::App& app, Action& action);

// Whether `--device` and `--backend` mean the GPU. "auto" does where there is one, unless the backend is the CPU's.
// "cuda" without one, or with that backend, is an error that says why.
bool uses_gpu(const std::string& device, attnjit_backend backend);

}  // namespace attnjit::tool
