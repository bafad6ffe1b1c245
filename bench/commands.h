// The commands of the attnjit tool. Each adds itself to `app` and, when it is chosen, sets `action`, which does the
// work and returns the exit code or throws a Failure.
#pragma once

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

// "auto" and "cpu" pass; anything else is an error that says what this build has.
void check_device(const std::string& device);

}  // namespace attnjit::tool
