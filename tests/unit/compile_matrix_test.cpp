// Every kernel compiles for every architecture without a spill or a warning, and fits its shared memory: no GPU needed.
#include <gmock/gmock.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <regex>
#include <thread>

#include "runtime/sm80_backend.h"
#include "runtime/sm80_backward.h"
#include "runtime/sm90_backend.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;

// One compile.
struct Compiled {
  std::string what;
  std::function<CompileResult<EmittedCuda>()> emit;
  CudaArch arch;
  // Of a kernel whose warpgroups hand each other registers: how many there are, one of which loads.
  int warpgroups = 0;
};

constexpr std::string_view kDense = "score + dense[h, q_idx, kv_idx]";

// Sinks of a block, an element and a diagonal.
constexpr const char* kGradients =
    "where(ids[b, q_idx] == ids[b, kv_idx], score * alibi_slopes[h] + dense[h, q_idx, kv_idx] + "
    "table[h, q_idx - kv_idx + 4095], -inf)";

std::vector<Tensor> tensors() {
  return {Tensor::of<std::int32_t>("ids", DType::kInt32, {2, 4096}, std::vector<std::int32_t>(2 * 4096)),
          Tensor::of<std::int64_t>("wide", DType::kInt64, {2, 4096}, std::vector<std::int64_t>(2 * 4096)),
          Tensor::of<std::int32_t>("lengths", DType::kInt32, {2}, std::vector<std::int32_t>(2)),
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
            Mod mod(expression, tensors(), {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096});
            mod.problem.summaries = true;
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

// Of the fused backward, with the gradients of all captured tensors. `as_given`: as the backend compiles for tensors of
// this size, with summaries; otherwise for larger ones.
Compiled sm80_backward_case(const std::string& expression, sm80::Element element, int head_dim, CudaArch arch,
                            bool deterministic, bool as_given = false) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16"};
  const std::string what = "sm80 backward " + expression + " " + kNames[static_cast<int>(element)] +
                           " d=" + std::to_string(head_dim) + (deterministic ? " deterministic " : " ") +
                           (as_given ? "with summaries " : "") + cuda_arch_name(arch);
  return {.what = what,
          .emit = [=]() -> CompileResult<EmittedCuda> {
            Mod mod(expression, tensors(), {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096});
            mod.problem.gradients = differentiable(mod.problem);
            mod.problem.summaries = as_given;
            for (CaptureInfo& capture : mod.problem.captures) capture.offsets_fit_32 |= as_given;
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

// Of Hopper's forward. `by` lacks what does not depend on the row of the matrix.
Compiled sm90_case(const std::string& expression, runtime::Sm90Problem by) {
  by.seqlen_q = by.seqlen_kv = 4096;
  by.max_shared_memory = runtime::max_shared_memory(90);
  const Mod mod(expression, tensors(), {.batch = 2, .num_heads = 16, .seqlen_q = 4096, .seqlen_kv = 4096});
  std::optional<sm90::ForwardConfig> config;
  CompileResult<EmittedCuda> emitted;
  // As the backend does it: whether there is a mask and whether it drifts is known once the mod is emitted.
  for (int round = 0; round < 2; ++round) {
    config = runtime::choose_config(by);
    if (!config) {
      emitted.error = CompileError{"no configuration"};
      break;
    }
    ModProblem problem = mod.problem;
    problem.summaries = true;
    problem.seqlen_q = runtime::round_up(problem.seqlen_q, sm90::tile_m(*config));
    problem.seqlen_kv = runtime::round_up(problem.seqlen_kv, config->tile_n);
    emitted = emit_sm90_forward(problem, *config);
    if (emitted.error) break;
    runtime::learn(emitted.value, &by);
  }
  if (config && static_cast<std::size_t>(sm90::forward_shared_memory(*config)) > by.max_shared_memory)
    emitted.error = CompileError{"the configuration does not fit the shared memory"};
  std::string what = "sm90 " + expression + (by.element == sm90::Element::kF16 ? " float16" : " bfloat16") +
                     " d=" + std::to_string(by.head_dim) + " dv=" + std::to_string(by.head_dim_v);
  if (config) what += ", " + runtime::config_name(*config) + (config->frozen ? "" : ", exact");
  return {.what = std::move(what),
          .emit = [emitted = std::move(emitted)] { return emitted; },
          .arch = {90, true},
          .warpgroups = config ? config->warpgroups + 1 : 0};
}

// What is wrong with the registers of a kernel whose warpgroups hand them on; empty where nothing is. More than it
// starts with, and setmaxnreg waits for ever.
std::string wrong_registers(const CudaResources& kernel, const std::string& ptx, int warpgroups) {
  static const std::regex pattern(R"(setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+))");
  int loads = 0, computes = 0;
  for (std::sregex_iterator at(ptx.begin(), ptx.end(), pattern), end; at != end; ++at) {
    ((*at)[1] == "dec" ? loads : computes) = std::stoi((*at)[2]);
  }
  if (loads == 0 || computes == 0) return "the text has no setmaxnreg\n";
  constexpr int kRegisterFile = 65536, kThreads = 128;
  if (kernel.registers * kThreads * warpgroups > kRegisterFile) return "it cannot be launched\n";
  if (loads + (warpgroups - 1) * computes > kernel.registers * warpgroups) return "setmaxnreg asks for too much\n";
  return "";
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
        std::string ptx;
        CompileOptions options;
        options.dump = [&](std::string_view kind, std::string_view text) {
          if (kind == "ptx") ptx = text;
        };
        const auto binary = compile_cuda(*nvrtc, emitted.value.source, c.arch, options, &phases);
        if (binary.error) problems = binary.error->message;
        for (const std::string& warning : binary.value.warnings) problems += warning + "\n";
        std::vector<std::string> entries;
        for (const CudaResources& r : binary.value.resources) {
          entries.push_back(r.entry);
          facts += " " + r.entry + ": " + std::to_string(r.registers) + " registers";
          if (r.stack_bytes != 0) facts += ", stack " + std::to_string(r.stack_bytes);
          if (c.warpgroups != 0) problems += wrong_registers(r, ptx, c.warpgroups);
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

constexpr sm90::Element kHalves[] = {sm90::Element::kF16, sm90::Element::kBF16};
constexpr const char* kCausalSoftcap = "where(q_idx >= kv_idx, softcap(30), -inf)";
constexpr const char* kCausalAlibi = "where(q_idx >= kv_idx, score + alibi_slopes[h] * (q_idx - kv_idx), -inf)";
constexpr const char* kCausalDense = "where(q_idx >= kv_idx, score + dense[h, q_idx, kv_idx], -inf)";
constexpr const char* kClampedRead = "score + table[h, q_idx - kv_idx]";

// Every row of the table: many heads fill the multiprocessors, few take smaller tiles.
std::vector<Compiled> sm90_cases(std::initializer_list<const char*> expressions,
                                 std::initializer_list<std::array<int, 2>> head_dims,
                                 std::initializer_list<bool> exact) {
  std::vector<Compiled> all;
  for (const char* expression : expressions)
    for (const auto& [head_dim, head_dim_v] : head_dims)
      for (const bool has_row_max : exact)
        for (const std::int64_t heads : {256, 4, 1}) {
          const sm90::Element element = kHalves[all.size() % 2];
          Compiled added = sm90_case(expression, {.element = element,
                                                  .head_dim = head_dim,
                                                  .head_dim_v = head_dim_v,
                                                  .heads = heads,
                                                  .has_row_max = has_row_max});
          if (heads == 256 || added.warpgroups != all.back().warpgroups) all.push_back(std::move(added));
        }
  return all;
}

TEST(CompileMatrix, RegistersThatAreHandedOn) {
  const std::string ptx = "setmaxnreg.dec.sync.aligned.u32  40;\nsetmaxnreg.inc.sync.aligned.u32  232;\n";
  EXPECT_EQ(wrong_registers({.registers = 168}, ptx, 3), "");
  EXPECT_EQ(wrong_registers({.registers = 160}, ptx, 3), "setmaxnreg asks for too much\n");
  EXPECT_EQ(wrong_registers({.registers = 176}, ptx, 3), "it cannot be launched\n");
  EXPECT_EQ(wrong_registers({.registers = 168}, "ret;", 3), "the text has no setmaxnreg\n");
}

TEST(CompileMatrix, Sm90) {
  expect_clean(sm90_cases({"noop", kSoftcapDocument}, {{64, 64}, {96, 128}, {192, 192}, {256, 256}}, {false}));
}

TEST(CompileMatrix, Sm90OtherMods) {
  expect_clean(sm90_cases({"causal", "alibi", "softcap(30)", kCausalDense}, {{64, 64}, {128, 128}}, {false, true}));
  // Masks by tables: four warpgroups where they leave registers.
  expect_clean(sm90_cases(
      {"where(ids[b, q_idx] == ids[b, kv_idx], score, -inf)",
       "where(ids[b, q_idx] == ids[b, kv_idx] and q_idx >= kv_idx and q_idx - kv_idx < 256, score, -inf)",
       "where(ids[b, q_idx] == ids[b, kv_idx] and kv_idx < lengths[b] and q_idx >= kv_idx, score, -inf)",
       "where(wide[b, q_idx] == wide[b, kv_idx] and q_idx >= kv_idx, score, -inf)",
       "where(wide[b, q_idx] == wide[b, kv_idx] and ids[b, q_idx] == ids[b, kv_idx], score + 0.3 * (q_idx - kv_idx), "
       "-inf)"},
      {{64, 64}, {128, 128}}, {false}));
}

TEST(CompileMatrix, SlowSm90Everything) {
  std::vector<Compiled> all;
  std::vector<const char*> expressions(std::begin(kOthers), std::end(kOthers));
  expressions.insert(expressions.end(), {"noop", "softcap(30)", kSoftcapDocument, kCausalSoftcap, kCausalAlibi,
                                         kCausalDense, kClampedRead, "score * score + gelu(score)"});
  for (const char* expression : expressions) {
    std::vector<Compiled> of_mod = sm90_cases(
        {expression},
        {{40, 40}, {64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 192}, {256, 256}, {192, 128}, {64, 256}, {8, 128}},
        {false, true});
    std::move(of_mod.begin(), of_mod.end(), std::back_inserter(all));
  }
  expect_clean(std::move(all));
}

TEST(CompileMatrix, Sm80Backward) {
  std::vector<Compiled> all;
  for (const char* expression : {"noop", kSoftcapDocument, kGradients})
    for (const sm80::Element element : {sm80::Element::kF32, sm80::Element::kBF16})
      for (const int head_dim : {64, 128, 256})
        all.push_back(sm80_backward_case(expression, element, head_dim, {.number = 80}, false));
  for (const char* expression : {"causal", kSoftcapDocument, kGradients})
    for (const int head_dim : {64, 128, 256})
      all.push_back(sm80_backward_case(expression, sm80::Element::kBF16, head_dim, {.number = 80}, false, true));
  for (const int head_dim : {64, 128}) {
    all.push_back(sm80_backward_case(kGradients, sm80::Element::kBF16, head_dim, {.number = 90}, true, true));
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
