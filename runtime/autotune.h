// Autotuning: times some kernels of one call on its device and remembers the fastest, in the disk cache too.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "runtime/backends.h"
#include "runtime/cuda_driver.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// One way to compute a call.
struct Contestant {
  using Launch = std::function<Check(const ForwardCall&, CudaStream)>;
  std::string name;  // one of its own: it is what is stored
  // Compiles and loads it, on a thread of its own. A failure leaves it out.
  std::function<Result<Launch>()> make;
};

struct Tuned {
  std::size_t winner = 0;  // of the contestants
  Json description;        // config, why, and candidates: each with `ms`, or with why it was `left_out`
  double spent_ms = 0;     // on compiles and timing; 0 where it was stored, or not tuned
};

// The winner that an earlier process stored, else the fastest of `contestants` by the device's clock, which is stored
// then. The first one is the usual choice: it wins where no other is measurably faster, and where nothing can be timed,
// which the description and the log tell.
// `problem`: all that the answer depends on, but device, driver, library and outputs. `why_not`: why nothing may be
// timed; empty where it may. `summaries`: what of captured tensors decides which tiles are computed. The tensors are
// not touched: kernels run over memory of their own, of the call's shapes and strides.
Tuned autotune(const Request& request, const std::shared_ptr<CudaDevice>& device, std::string_view problem,
               std::span<const Contestant> contestants, std::string_view why_not,
               std::span<const compiler::TileSummary> summaries);

// What an entry of the disk cache was stored for; nothing where it is no winner's.
std::optional<std::string> tuned_about(std::string_view payload);

}  // namespace attnjit::runtime
