// The backends: which of them serves a call, and what it takes to make one ready.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/backward.h"
#include "runtime/context.h"
#include "runtime/cuda_binaries.h"
#include "runtime/cuda_driver.h"
#include "runtime/dumps.h"
#include "runtime/forward.h"
#include "runtime/mods.h"
#include "runtime/status.h"
#include "runtime/validation.h"

namespace attnjit::runtime {

using Json = nlohmann::ordered_json;

// A checked call with its expressions: what a backend is made ready from.
struct Request {
  Context& context;
  const CheckedCall& call;
  const Mods& mods;  // bound
  const DumpFiles& files;
};

// A backend made ready for one problem.
struct PreparedForward {
  std::size_t workspace_size = 0;
  // Allocates only to report a failure; safe from several threads at once, each with its own workspace.
  std::function<Check(const ForwardCall&, void* workspace, CudaStream stream)> run;
};

// Likewise for the backward of a problem.
struct PreparedBackward {
  std::size_t workspace_size = 0;
  std::function<Check(const ForwardCall&, const Gradients&, void* workspace, CudaStream stream)> run;
};

struct ReadyBackend {
  attnjit_backend backend = ATTNJIT_BACKEND_CPU;
  // The one that the request's signature asks for.
  PreparedForward forward;
  PreparedBackward backward;
  Json description = Json::object();  // what it says of itself in a plan's description
  compiler::PhaseTimes phases;
};

// Makes the best backend ready among those that are asked for, permitted by the context and serve the call.
// ATTNJIT_UNSUPPORTED with each backend and its reason where there is none. A forward without output and, on the CPU, a
// backward without output or keys needs no backend's code; other empty calls are the backends'.
Result<ReadyBackend> prepare_backend(const Request& request);

// Those that prepare_backend would try, best first; ATTNJIT_UNSUPPORTED where there are none.
Result<std::vector<attnjit_backend>> permitted_backends(const Context& context, const Signature& signature);

// What is made of an emitted text, handed to the files that want it and to `collect`, which may be null; null where
// nobody wants "ptx" or "cubin". Keeps references to both.
CollectText binary_dumps(const Request& request, const CollectText& collect);

// Runs the compiler's CPU end for `request`. `collect` receives every text in between, beside the files.
Result<std::shared_ptr<const compiler::CpuTile>> compile_tile(const Request& request, const CollectText& collect);
Result<std::shared_ptr<const compiler::CpuGradientTile>> compile_gradient_tile(const Request& request,
                                                                               const CollectText& collect);

// The problem as the compiler takes it, of sequences that reach from 0 to at least `seqlen_q` and `seqlen_kv`.
compiler::ModProblem mod_problem(const Mods& bound, const CheckedCall& call, std::int64_t seqlen_q,
                                 std::int64_t seqlen_kv);

// Nothing to run; nothing to attend to.
inline bool no_output(const Signature& s) { return s.batch == 0 || s.num_heads == 0 || s.seqlen_q == 0; }
inline bool no_keys(const Signature& s) { return s.seqlen_kv == 0; }

// Of a backward.
inline WantedGradients wanted_gradients(const Signature& s) {
  return {.dq = s.wants_dq != 0,
          .dk = s.wants_dk != 0,
          .dv = s.wants_dv != 0,
          .captures = s.capture_gradients,
          .partial_keys = s.partial_keys != 0};
}

// ---- How things are spelled in descriptions and messages.
// Of the compiler's own refusal, a fault of ours.
Failure compile_failure(const Signature& s, std::string_view message);
std::string shape_text(const Signature& s);
std::string hash_text(const compiler::ModFacts& facts);
Json facts_json(const compiler::ModFacts& facts);
// Of the backward of `call`, whose captured tensors it names.
Json gradient_facts_json(const compiler::ModFacts& facts, const CheckedCall& call);
// What the backward of `call` computes, and of what.
Json gradients_json(const CheckedCall& call);
Json phases_json(const compiler::PhaseTimes& phases);
Json host_json(const Context& context);
// What is known of one kernel of a binary: entry, key, where it was found, registers, spills, warnings, times.
Json binary_json(const FoundBinary& found, std::string_view entry);

}  // namespace attnjit::runtime
