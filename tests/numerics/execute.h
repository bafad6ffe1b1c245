// Runs a problem through the library's C interface, in guarded and poisoned memory.
#pragma once

#include <attnjit/attnjit.h>

#include <memory>
#include <string>
#include <vector>

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
enum class Outputs { kAll, kOnlyO };

// Prepares and runs `problem`: outputs, gaps and workspace are NaN before, and guards, gaps and inputs are compared
// afterwards. `context` null: shared_context(problem.spec.threads).
RunResult run(Problem& problem, attnjit_context* context = nullptr, Outputs outputs = Outputs::kAll);

// Runs `problems` with the plan of the first: they may differ in values, not in shapes, types or texts.
std::vector<RunResult> run_with_one_plan(std::vector<Problem*> problems);

// The library's own oracle at `rows`. `o` is (rows, Dv).
RunResult run_reference(Problem& problem, const std::vector<RowIndex>& rows);

}  // namespace attnjit::numerics
