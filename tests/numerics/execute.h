// Runs a problem through the library's C interface, in guarded and poisoned memory.
#pragma once

#include <attnjit/attnjit.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tests/numerics/gradients.h"
#include "tests/numerics/judge.h"
#include "tests/numerics/problem.h"
#include "tests/support/handles.h"

namespace attnjit::numerics {

using test::ContextPtr;
using test::PlanPtr;

// One context per number of threads, kept for the whole program. `isa`: the value of ATTNJIT_CPU_ISA, "" for the host's
// best. Null where the library refuses.
attnjit_context* shared_context(int threads, const std::string& isa = "");

// The instruction sets of this machine, by the names that ATTNJIT_CPU_ISA knows.
std::vector<std::string> host_isas();

struct RunResult {
  Outcome outcome;
  std::string error;  // empty when everything went well, surroundings of every buffer included
  attnjit_status status = ATTNJIT_OK;
};

// Which of the optional outputs are asked for.
enum class Outputs {
  kAll,
  kNoRowMax,  // a backend may have a faster way then
  kOnlyO,
};

// Prepares and runs `problem`: outputs, gaps and workspace are NaN before, and guards, gaps and inputs are compared
// afterwards. `context` null: shared_context(problem.spec.threads).
RunResult run(Problem& problem, attnjit_context* context = nullptr, Outputs outputs = Outputs::kAll);

// Runs `problems` with the plan of the first: they may differ in values, not in shapes, types or texts.
std::vector<RunResult> run_with_one_plan(std::vector<Problem*> problems);

struct BackwardResult {
  Gradients gradients;
  Outcome forward;    // of a case with its own forward: what that gave
  std::string error;  // as RunResult's
  attnjit_status status = ATTNJIT_OK;
};

// Prepares the backward of `problem`, and the forward with it, and runs them likewise. `o` and `lse` are what the
// backward is given, or, of a case with its own forward, what that fills. `context` null: as in run().
BackwardResult run_backward(Problem& problem, Tensor o, Tensor lse, attnjit_context* context = nullptr);

// Runs several backwards with the plan of the first, as run_with_one_plan does.
struct BackwardCall {
  Problem* problem;
  Tensor o, lse;
};
std::vector<BackwardResult> run_backward_with_one_plan(std::span<BackwardCall> calls,
                                                       attnjit_context* context = nullptr);

// The library's own oracle of the backward: all gradients, and what it says they may be off by (infinite: anything).
struct ReferenceGradients {
  Gradients gradients, bounds;
  std::string error;
};
// `given`: with partial keys, which it needs.
ReferenceGradients run_reference_backward(Problem& problem, const GivenForward* given = nullptr);

// The library's own oracle at `rows`. `o` is (rows, Dv).
RunResult run_reference(Problem& problem, const std::vector<RowIndex>& rows);

}  // namespace attnjit::numerics
