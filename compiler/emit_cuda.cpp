// Translation units for NVRTC: the templates' text around an emitted mod.
#include <string>

#include "compiler/cuda_mod.h"
#include "compiler/dialect/dialect.h"
#include "compiler/frontend.h"
#include "compiler/wgmma.h"
#include "dsl/printer.h"
#include "kernels_templates/cuda/embedded.h"
#include "kernels_templates/math/config.h"

namespace attnjit::compiler {
namespace {

std::string template_file(const char* path) {
  const cuda::EmbeddedText text = cuda::template_text(path);
  return {text.data, text.size};
}

// What stands in front of every mod.
std::string prelude() {
  return template_file("cuda/params.h") + "\n" + template_file("cuda/ptx.cuh") + "\n" +
         template_file("cuda/functions.cuh") + "\n" + template_file("cuda/mod_defaults.cuh") + "\n";
}

// Of the eager path, behind what its kernels share.
std::string math_template(const char* path) { return template_file("math/common.cuh") + "\n" + template_file(path); }

std::string in_namespace(const char* name, const std::string& text) {
  return std::string("namespace attnjit::") + name + " {\n\n" + text + "\n}  // namespace attnjit::" + name + "\n\n";
}

// The names of the kernels in `text`: what stands before the parenthesis of their parameters.
std::vector<std::string> entries(const std::string& text) {
  constexpr std::string_view kKernel = "extern \"C\" __global__ void";
  constexpr std::string_view kParameters = "(const __grid_constant__ ";
  std::vector<std::string> names;
  for (std::size_t at = text.find(kKernel); at != std::string::npos; at = text.find(kKernel, at + 1)) {
    std::size_t end = text.find(kParameters, at);
    if (end == std::string::npos) break;
    std::size_t start = end;
    while (start > at && (std::isalnum(static_cast<unsigned char>(text[start - 1])) || text[start - 1] == '_')) --start;
    names.push_back(text.substr(start, end - start));
  }
  return names;
}

// ---- The header

std::string comment(const std::string& text) {
  std::string result;
  std::size_t start = 0;
  while (start <= text.size()) {
    const std::size_t end = std::min(text.find('\n', start), text.size());
    result += "// " + text.substr(start, end - start);
    // A backslash at the end would continue the comment.
    if (result.back() == '\\') result += '.';
    while (result.back() == ' ') result.pop_back();
    result += '\n';
    start = end + 1;
  }
  return result;
}

std::string extents(const CaptureInfo& info) {
  std::string text;
  for (std::size_t i = 0; i < info.extent.size(); ++i) {
    text += (i ? " x " : "") + std::to_string(info.extent[i]);
    if (info.stride_class[i] == StrideClass::kZero) text += " (broadcast)";
    if (info.stride_class[i] == StrideClass::kUnit) text += " (contiguous)";
  }
  return text.empty() ? "a scalar" : text;
}

std::string describe(std::size_t number, const SinkFacts& sink) {
  constexpr const char* kShared[] = {"batch and head", "query", "key", "difference of positions", "element"};
  return "sink " + std::to_string(number) + ": the gradient of captured[" + std::to_string(sink.capture) +
         "], a place per " + kShared[static_cast<int>(sink.level)] +
         (sink.data_dependent ? ", from captured values" : "") + (sink.row_shift ? ", a row shift" : "") +
         (sink.injective ? ", each of one element" : "");
}

std::string describe(const FoldedFacts& folded) {
  std::string text = folded.has_shift ? "folded: a shift per row, and " : "folded: ";
  text += folded.linear     ? "the score and a multiple of the positions' difference"
          : folded.additive ? "the score and a term"
                            : "a function of the score";
  return text + (folded.drifts ? ", which drifts along the keys" : "");
}

std::string describe(const ModProblem& problem, const ModFacts& facts, const std::string& config) {
  std::string text = "score_mod: " + dsl::print(problem.score_mod) + "\n";
  if (problem.mask_mod) text += "mask_mod: " + dsl::print(*problem.mask_mod) + "\n";
  text += "problem: batch " + std::to_string(problem.batch) + ", heads " + std::to_string(problem.num_heads) +
          ", queries " + std::to_string(problem.seqlen_q) + ", keys " + std::to_string(problem.seqlen_kv) + "\n";
  for (std::size_t i = 0; i < problem.captures.size(); ++i) {
    const std::vector<dsl::Capture>& names = problem.score_mod.captures;
    text += "captured[" + std::to_string(i) + "]" + (i < names.size() ? " " + names[i].name : "") + ": " +
            std::string(dsl::dtype_name(problem.captures[i].dtype)) + ", " + extents(problem.captures[i]) + "\n";
  }
  for (std::size_t i = 0; i < facts.sinks.size(); ++i) text += describe(i, facts.sinks[i]) + "\n";
  if (facts.folded) text += describe(*facts.folded) + "\n";
  text += "reads: " + std::to_string(facts.reads_proven) + " in bounds, " + std::to_string(facts.reads_clamped) +
          " clamped; integers " + (facts.indices_fit_32 ? "fit 32 bits" : "need 64 bits");
  if (!config.empty()) text += "\nconfig: " + config;
  return comment(text);
}

// ---- Configs as text

const char* element_name(sm80::Element element) {
  switch (element) {
    case sm80::Element::kF32:
      return "Element::kF32";
    case sm80::Element::kF16:
      return "Element::kF16";
    case sm80::Element::kBF16:
      return "Element::kBF16";
  }
  return "";
}

CudaAccuracy accuracy_for(sm80::Element element) {
  switch (element) {
    case sm80::Element::kF32:
      return CudaAccuracy::kFull;
    case sm80::Element::kF16:
      return CudaAccuracy::kFloat16;
    case sm80::Element::kBF16:
      return CudaAccuracy::kBFloat16;
  }
  return CudaAccuracy::kFull;
}

sm80::Element as_sm80(sm90::Element element) {
  return element == sm90::Element::kF16 ? sm80::Element::kF16 : sm80::Element::kBF16;
}

const char* bool_text(bool value) { return value ? "true" : "false"; }

std::string initializer(const std::vector<std::pair<const char*, std::string>>& fields) {
  std::string text;
  for (const auto& [name, value] : fields) text += std::string(text.empty() ? "{." : ", .") + name + " = " + value;
  return text + "}";
}

std::string config_text(const sm80::ForwardConfig& c) {
  return initializer({{"element", element_name(c.element)},
                      {"head_dim", std::to_string(c.head_dim)},
                      {"head_dim_v", std::to_string(c.head_dim_v)},
                      {"tile_m", std::to_string(c.tile_m)},
                      {"tile_n", std::to_string(c.tile_n)},
                      {"warps", std::to_string(c.warps)},
                      {"stages", std::to_string(c.stages)},
                      {"q_in_registers", bool_text(c.q_in_registers)},
                      {"min_blocks", std::to_string(c.min_blocks)},
                      {"load_bytes", std::to_string(c.load_bytes)},
                      {"store_bytes", std::to_string(c.store_bytes)}});
}

std::string config_text(const sm90::ForwardConfig& c) {
  return initializer({{"element", element_name(as_sm80(c.element))},
                      {"head_dim", std::to_string(c.head_dim)},
                      {"head_dim_v", std::to_string(c.head_dim_v)},
                      {"warpgroups", std::to_string(c.warpgroups)},
                      {"tile_n", std::to_string(c.tile_n)},
                      {"stages", std::to_string(c.stages)},
                      {"q_buffers", std::to_string(c.q_buffers)},
                      {"ping_pong", bool_text(c.ping_pong)},
                      {"frozen", bool_text(c.frozen)},
                      {"fma_exponentials", std::to_string(c.fma_exponentials)},
                      {"bounded", bool_text(c.bounded)}});
}

std::string config_text(const sm80::BackwardConfig& c) {
  return initializer({{"element", element_name(c.element)},
                      {"head_dim", std::to_string(c.head_dim)},
                      {"head_dim_v", std::to_string(c.head_dim_v)},
                      {"tile_m", std::to_string(c.tile_m)},
                      {"tile_n", std::to_string(c.tile_n)},
                      {"warps", std::to_string(c.warps)},
                      {"step_m", std::to_string(c.step_m)},
                      {"stages", std::to_string(c.stages)},
                      {"slices", std::to_string(c.slices)},
                      {"load_bytes", std::to_string(c.load_bytes)},
                      {"store_bytes", std::to_string(c.store_bytes)},
                      {"wants_dq", bool_text(c.wants_dq)},
                      {"wants_dk", bool_text(c.wants_dk)},
                      {"wants_dv", bool_text(c.wants_dv)},
                      {"deterministic", bool_text(c.deterministic)}});
}

enum class Direction : std::uint8_t { kForward, kFoldedForward, kBackward };

// Runs the passes and prints the mod; false with the result's error set.
bool emit_mod(const ModProblem& problem, Direction direction, CudaAccuracy accuracy, const CompileOptions& options,
              const std::string& config, CompileResult<EmittedCuda>& result, std::string& mod) {
  EmittedCuda& emitted = result.value;
  Frontend frontend(emitted.phases);
  const bool ran = direction == Direction::kBackward ? frontend.run_backward(problem, options, Target::kCuda)
                                                     : frontend.run(problem, options, Target::kCuda);
  if (!ran) {
    result.error = CompileError{frontend.error()};
    return false;
  }
  const PhaseTimer timer(emitted.phases, "emit");
  emitted.facts = frontend.facts();
  CudaMod made = emit_cuda_mod(frontend.function(), problem, accuracy, emitted.facts.sinks, frontend.tile_facts(),
                               direction == Direction::kFoldedForward ? ModForm::kFolded : ModForm::kPlain);
  if (!made.error.empty()) {
    result.error = CompileError{std::move(made.error)};
    return false;
  }
  for (std::size_t i = 0; i < made.sink_levels.size(); ++i) emitted.facts.sinks[i].level = made.sink_levels[i];
  emitted.facts.folded = made.folded;
  emitted.facts.cost = made.cost;
  emitted.demand = made.demand;
  emitted.source.score_factor = frontend.score_factor();
  emitted.source.header = describe(problem, emitted.facts, config);
  mod = std::move(made.text);
  return true;
}

void finish(EmittedCuda& emitted, std::string text, const CompileOptions& options) {
  CudaSource& source = emitted.source;
  source.text = std::move(text);
  source.entries = entries(source.text);
  if (options.dump) options.dump("cuda", source.header + "\n" + source.text);
}

}  // namespace

CompileResult<EmittedCuda> emit_sm80_forward(const ModProblem& problem, const sm80::ForwardConfig& config,
                                             const CompileOptions& options) {
  CompileResult<EmittedCuda> result;
  std::string mod;
  const std::string values = config_text(config);
  if (!emit_mod(problem, Direction::kForward, accuracy_for(config.element), options, "sm80 " + values, result, mod))
    return result;
  finish(result.value,
         prelude() + template_file("sm80/config.h") + "\n" + in_namespace("cuda", mod) +
             in_namespace("sm80", "constexpr ForwardConfig kConfig = " + values + ";\n") +
             template_file("sm80/walk.cuh") + "\n" + template_file("sm80/tile.cuh") + "\n" +
             template_file("sm80/forward.cuh"),
         options);
  return result;
}

CompileResult<EmittedCuda> emit_sm90_forward(const ModProblem& problem, const sm90::ForwardConfig& config,
                                             const CompileOptions& options) {
  CompileResult<EmittedCuda> result;
  std::string mod;
  const std::string values = config_text(config);
  if (!emit_mod(problem, Direction::kFoldedForward, accuracy_for(as_sm80(config.element)), options, "sm90 " + values,
                result, mod))
    return result;
  finish(result.value,
         prelude() + template_file("sm90/config.h") + "\n" + in_namespace("cuda", mod) +
             in_namespace("sm90", "constexpr ForwardConfig kConfig = " + values + ";\n\n" + wgmma_products(config)) +
             template_file("sm90/forward.cuh"),
         options);
  return result;
}

CompileResult<EmittedCuda> emit_sm80_backward(const ModProblem& problem, const sm80::BackwardConfig& config,
                                              const CompileOptions& options) {
  CompileResult<EmittedCuda> result;
  std::string mod;
  const std::string values = config_text(config);
  if (!emit_mod(problem, Direction::kBackward, accuracy_for(config.element), options, "sm80 backward " + values, result,
                mod))
    return result;
  finish(result.value,
         prelude() + template_file("cuda/gradients.cuh") + "\n" + template_file("sm80/config.h") + "\n" +
             in_namespace("cuda", mod) + in_namespace("sm80", "constexpr BackwardConfig kConfig = " + values + ";\n") +
             template_file("sm80/walk.cuh") + "\n" + template_file("sm80/tile.cuh") + "\n" +
             template_file("sm80/backward.cuh"),
         options);
  // Accumulators take most registers: what ptxas gains by more it loses by spilling.
  result.value.source.register_usage_level = 0;
  return result;
}

CompileResult<EmittedCuda> emit_cuda_math_backward(const ModProblem& problem, bool deterministic,
                                                   const CompileOptions& options) {
  CompileResult<EmittedCuda> result;
  std::string mod;
  const std::string constant =
      std::string("[[maybe_unused]] constexpr bool kDeterministic = ") + bool_text(deterministic) + ";\n";
  if (!emit_mod(problem, Direction::kBackward, CudaAccuracy::kFull, options,
                std::string("math backward") + (deterministic ? ", deterministic" : ""), result, mod))
    return result;
  finish(result.value,
         prelude() + template_file("cuda/gradients.cuh") + "\n" + template_file("math/config.h") + "\n" +
             in_namespace("cuda", mod) + in_namespace("math", constant) + math_template("math/mod_backward.cuh"),
         options);
  return result;
}

CompileResult<EmittedCuda> emit_cuda_math(const ModProblem& problem, const CompileOptions& options) {
  CompileResult<EmittedCuda> result;
  std::string mod;
  // Its scores are float32 whatever the inputs are, and it is what others are measured by.
  if (!emit_mod(problem, Direction::kForward, CudaAccuracy::kFull, options, "math", result, mod)) return result;
  finish(result.value,
         prelude() + template_file("math/config.h") + "\n" + in_namespace("cuda", mod) + math_template("math/mod.cuh"),
         options);
  return result;
}

CudaSource cuda_math_kernels(dsl::DType dtype) {
  const char* const element = dtype == dsl::DType::kF32   ? "Element::kF32"
                              : dtype == dsl::DType::kF16 ? "Element::kF16"
                                                          : "Element::kBF16";
  CudaSource source;
  source.header = comment("math: softmax and what the products need, " + std::string(dsl::dtype_name(dtype)));
  source.text = template_file("cuda/params.h") + "\n" + template_file("math/config.h") + "\n" +
                in_namespace("math", std::string("constexpr Config kConfig = {.element = ") + element + "};\n") +
                math_template("math/kernels.cuh");
  source.entries = entries(source.text);
  return source;
}

CudaSource cuda_finish_gradients() {
  CudaSource source;
  source.header = comment("gradients of captured tensors: from sums to elements");
  source.text = template_file("cuda/params.h") + "\n" + template_file("cuda/gradients.cuh") + "\n" +
                template_file("cuda/finish_gradients.cuh");
  source.entries = entries(source.text);
  return source;
}

CudaSource cuda_summaries() {
  CudaSource source;
  source.header = comment("extremes of captured tensors' values");
  source.text = template_file("cuda/params.h") + "\n" + template_file("cuda/summaries.h") + "\n" +
                template_file("cuda/summaries.cuh");
  source.entries = entries(source.text);
  return source;
}

}  // namespace attnjit::compiler
