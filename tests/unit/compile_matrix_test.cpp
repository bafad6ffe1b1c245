// Every kernel compiles for every architecture without a spill or a warning, and fits its shared memory: no GPU needed.
#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "runtime/sm80_backend.h"
#include "runtime/sm80_backward.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;

// One compile.
struct Compiled {
  std::string what;
  std::function<CompileResult<EmittedCuda>()> emit;
  CudaArch arch;
};

constexpr std::string_view kDense = "score + dense[h, q_idx, kv_idx]";

// Sinks of a block, an element and a diagonal.
constexpr const char* kGradients =
    "where(ids[b, q_idx] == ids[b, kv_idx], score * alibi_slopes[h] + dense[h, q_idx, kv_idx] + "
    "table[h, q_idx - kv_idx + 4095], -inf)";

std::vector<Tensor> tensors() {
  return {Tensor::of<std::int32_t>("ids", DType::kInt32, {2, 4096}, std::vector<std::int32_t>(2 * 4096)),
          Tensor::of<float>("alibi_slopes", DType::kF32, {16}, std::vector<float>(16)),
          Tensor::of<std::uint16_t>("dense", DType::kBF16, {16, 64, 4096}, std::vector<std::uint16_t>(16 * 64 * 4096)),
          Tensor::of<std::uint16_t>("table", DType::kF16, {16, 8192}, std::vector<std::uint16_t>(16 * 8192))};
}

// The bits of all captures that have gradients.
std::uint32_t differentiable(const ModProblem& problem) {
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < problem.captures.size(); ++i)
    if (dsl::value_type(problem.captures[i].dtype) == dsl::Type::kFloat) bits |= 1u << i;
  return bits;
}

Compiled sm80_case(const std::string& expression, sm80::Element element, int head_dim, CudaArch arch) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16"};
  const std::string what = "sm80 " + expression + " " + kNames[static_cast<int>(element)] +
                           " d=" + std::to_string(head_dim) + " " + cuda_arch_name(arch);
  return {.what = what,
          .emit = [=]() -> CompileResult<EmittedCuda> {
            const Mod mod(expression, tensors(), {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096});
            const std::size_t limit = runtime::max_shared_memory(arch.number);
            runtime::Sm80Problem by = {.element = element,
                                       .head_dim = head_dim,
                                       .head_dim_v = head_dim,
                                       .seqlen_q = 4096,
                                       .seqlen_kv = 4096,
                                       .arch = arch.number,
                                       .max_shared_memory = limit};
            CompileResult<EmittedCuda> emitted;
            // As the backend does it: the demand is known once the mod is emitted.
            for (int round = 0; round < 2; ++round) {
              const std::optional<sm80::ForwardConfig> config = runtime::choose_config(by);
              if (!config) return {.value = {}, .error = CompileError{"no configuration"}};
              if (static_cast<std::size_t>(sm80::forward_shared_memory(*config)) > limit)
                return {.value = {}, .error = CompileError{"the configuration does not fit the shared memory"}};
              emitted = emit_sm80_forward(mod.problem, *config);
              if (emitted.error || emitted.value.demand == by.demand) break;
              by.demand = emitted.value.demand;
            }
            return emitted;
          },
          .arch = arch};
}

// Of the fused backward, with the gradients of all captured tensors.
Compiled sm80_backward_case(const std::string& expression, sm80::Element element, int head_dim, CudaArch arch,
                            bool deterministic) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16"};
  const std::string what = "sm80 backward " + expression + " " + kNames[static_cast<int>(element)] +
                           " d=" + std::to_string(head_dim) + (deterministic ? " deterministic " : " ") +
                           cuda_arch_name(arch);
  return {.what = what,
          .emit = [=]() -> CompileResult<EmittedCuda> {
            Mod mod(expression, tensors(), {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096});
            mod.problem.gradients = differentiable(mod.problem);
            runtime::Sm80BackwardProblem by = {.element = element,
                                               .head_dim = head_dim,
                                               .head_dim_v = head_dim,
                                               .max_shared_memory = runtime::max_shared_memory(arch.number),
                                               .deterministic = deterministic,
                                               .sinks = {}};
            CompileResult<EmittedCuda> emitted;
            // As the backend does it: demand and sinks are known once the mod is emitted.
            for (int round = 0; round < 2; ++round) {
              const std::optional<sm80::BackwardConfig> config = runtime::choose_backward_config(by);
              if (!config) return {.value = {}, .error = CompileError{"no configuration"}};
              emitted = emit_sm80_backward(mod.problem, *config);
              if (emitted.error) break;
              runtime::learn(emitted.value, &by);
            }
            return emitted;
          },
          .arch = arch};
}

// Compiles all of `cases`, on every core.
void expect_clean(std::vector<Compiled> cases) {
  const Nvrtc* const nvrtc = load_nvrtc(ATTNJIT_TEST_NVRTC, nullptr);
  if (!nvrtc) GTEST_SKIP() << "no NVRTC 12.8 or later on this machine";
  const bool verbose = std::getenv("ATTNJIT_TEST_VERBOSE") != nullptr;
  std::atomic<std::size_t> next = 0;
  std::mutex mutex;
  const auto work = [&] {
    for (std::size_t i = next++; i < cases.size(); i = next++) {
      const Compiled& c = cases[i];
      const auto emitted = c.emit();
      std::string problems, facts;
      if (emitted.error) {
        problems = emitted.error->message;
      } else {
        PhaseTimes phases = emitted.value.phases;
        const auto binary = compile_cuda(*nvrtc, emitted.value.source, c.arch, {}, &phases);
        if (binary.error) problems = binary.error->message;
        for (const std::string& warning : binary.value.warnings) problems += warning + "\n";
        std::vector<std::string> entries;
        for (const CudaResources& r : binary.value.resources) {
          entries.push_back(r.entry);
          facts += " " + r.entry + ": " + std::to_string(r.registers) + " registers";
          if (r.stack_bytes != 0) facts += ", stack " + std::to_string(r.stack_bytes);
        }
        std::sort(entries.begin(), entries.end());
        std::vector<std::string> expected = emitted.value.source.entries;
        std::sort(expected.begin(), expected.end());
        if (problems.empty() && entries != expected) problems = "other kernels than the source names";
        for (const auto& [name, ms] : phases) facts += " " + name + " " + std::to_string(std::lround(ms));
      }
      const std::lock_guard lock(mutex);
      if (!problems.empty()) ADD_FAILURE() << c.what << facts << "\n" << problems;
      if (verbose) std::printf("%s:%s\n", c.what.c_str(), facts.c_str());
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

constexpr int kHeadDims[] = {16, 32, 64, 96, 128, 192, 256};
constexpr sm80::Element kElements[] = {sm80::Element::kF32, sm80::Element::kF16, sm80::Element::kBF16};
// What FlexAttention's users write, in one.
constexpr const char* kSoftcapDocument = "where(ids[b, q_idx] == ids[b, kv_idx], softcap(30), -inf)";
constexpr const char* kOthers[] = {"causal",
                                   "rel",
                                   "head_bias",
                                   "alibi",
                                   "sliding_window(256)",
                                   kDense.data(),
                                   "score + table[h, q_idx - kv_idx + 4095]"};

std::vector<Compiled> cases(std::initializer_list<CudaArch> archs, std::initializer_list<const char*> expressions) {
  std::vector<Compiled> all;
  for (const CudaArch arch : archs)
    for (const char* expression : expressions)
      for (const sm80::Element element : kElements)
        for (const int head_dim : kHeadDims) all.push_back(sm80_case(expression, element, head_dim, arch));
  return all;
}

TEST(CompileMatrix, Sm80) { expect_clean(cases({{80}}, {"noop", kSoftcapDocument})); }
TEST(CompileMatrix, Sm90a) { expect_clean(cases({{90, true}}, {"noop", kSoftcapDocument})); }

TEST(CompileMatrix, OtherArchitectures) {
  std::vector<Compiled> all;
  for (const int arch : {86, 89, 100, 120})
    for (const int head_dim : {64, 128, 256})
      all.push_back(sm80_case("noop", sm80::Element::kBF16, head_dim, {.number = arch}));
  expect_clean(std::move(all));
}

TEST(CompileMatrix, OtherMods) {
  std::vector<Compiled> all;
  for (const char* expression : kOthers)
    for (const int head_dim : {64, 128})
      all.push_back(sm80_case(expression, sm80::Element::kBF16, head_dim, {.number = 80}));
  expect_clean(std::move(all));
}

TEST(CompileMatrix, Sm80Backward) {
  std::vector<Compiled> all;
  for (const char* expression : {"noop", kSoftcapDocument, kGradients})
    for (const sm80::Element element : {sm80::Element::kF32, sm80::Element::kBF16})
      for (const int head_dim : {64, 128, 256})
        all.push_back(sm80_backward_case(expression, element, head_dim, {.number = 80}, false));
  for (const int head_dim : {64, 128}) {
    all.push_back(sm80_backward_case("causal", sm80::Element::kF16, head_dim, {.number = 90}, false));
    all.push_back(sm80_backward_case(kGradients, sm80::Element::kBF16, head_dim, {.number = 90}, true));
  }
  for (const int arch : {86, 120})
    all.push_back(sm80_backward_case("noop", sm80::Element::kBF16, 128, {.number = arch}, false));
  expect_clean(std::move(all));
}

TEST(CompileMatrix, SlowBackwardEverywhere) {
  std::vector<Compiled> all;
  for (const CudaArch arch : {CudaArch{80}, {86}, {90}, {100}, {120}}) {
    std::vector<const char*> expressions(std::begin(kOthers), std::end(kOthers));
    expressions.insert(expressions.end(), {"noop", kSoftcapDocument, kGradients});
    for (const char* expression : expressions)
      for (const sm80::Element element : kElements)
        for (const int head_dim : kHeadDims)
          for (const bool deterministic : {false, true})
            all.push_back(sm80_backward_case(expression, element, head_dim, arch, deterministic));
  }
  expect_clean(std::move(all));
}

TEST(CompileMatrix, SlowEverythingEverywhere) {
  std::vector<Compiled> all;
  for (const CudaArch arch : {CudaArch{80}, {86}, {87}, {89}, {90}, {90, true}, {100}, {103}, {120}}) {
    std::vector<const char*> expressions(std::begin(kOthers), std::end(kOthers));
    expressions.insert(expressions.end(), {"noop", kSoftcapDocument});
    for (const char* expression : expressions)
      for (const sm80::Element element : kElements)
        for (const int head_dim : kHeadDims) all.push_back(sm80_case(expression, element, head_dim, arch));
  }
  expect_clean(std::move(all));
}

TEST(CompileMatrix, Math) {
  std::vector<Compiled> all;
  for (const CudaArch arch : {CudaArch{80}, {90, true}, {120}}) {
    all.push_back({.what = "finishing gradients " + cuda_arch_name(arch),
                   .emit =
                       [] {
                         CompileResult<EmittedCuda> result;
                         result.value.source = cuda_finish_gradients();
                         return result;
                       },
                   .arch = arch});
    all.push_back({.what = "summaries " + cuda_arch_name(arch),
                   .emit =
                       [] {
                         CompileResult<EmittedCuda> result;
                         result.value.source = cuda_summaries();
                         return result;
                       },
                   .arch = arch});
    for (const char* expression : {"noop", kSoftcapDocument, kGradients})
      for (const bool deterministic : {false, true})
        all.push_back({.what = std::string("math backward ") + expression + " " + cuda_arch_name(arch),
                       .emit =
                           [=] {
                             ModProblem problem =
                                 Mod(expression, tensors(),
                                     {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096})
                                     .problem;
                             problem.gradients = differentiable(problem);
                             return emit_cuda_math_backward(problem, deterministic);
                           },
                       .arch = arch});
    for (const char* expression : {"noop", "alibi", kSoftcapDocument})
      all.push_back({.what = std::string("math ") + expression + " " + cuda_arch_name(arch),
                     .emit =
                         [=] {
                           return emit_cuda_math(Mod(expression, tensors(),
                                                     {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096})
                                                     .problem);
                         },
                     .arch = arch});
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16})
      all.push_back({.what = "math kernels " + std::string(dsl::dtype_name(dtype)) + " " + cuda_arch_name(arch),
                     .emit =
                         [=] {
                           CompileResult<EmittedCuda> result;
                           result.value.source = cuda_math_kernels(dtype);
                           return result;
                         },
                     .arch = arch});
  }
  expect_clean(std::move(all));
}

}  // namespace
}  // namespace attnjit::compiler::testing
