// Translation units for NVRTC: the templates' text around an emitted mod.
#include <string>

#include "compiler/cuda_mod.h"
#include "compiler/dialect/dialect.h"
#include "compiler/frontend.h"
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

std::string config_text(const sm80::ForwardConfig& c) {
  std::string text = std::string("{.element = ") + element_name(c.element);
  const auto field = [&](const char* name, const std::string& value) {
    text += std::string(", .") + name + " = " + value;
  };
  field("head_dim", std::to_string(c.head_dim));
  field("head_dim_v", std::to_string(c.head_dim_v));
  field("tile_m", std::to_string(c.tile_m));
  field("tile_n", std::to_string(c.tile_n));
  field("warps", std::to_string(c.warps));
  field("stages", std::to_string(c.stages));
  field("q_in_registers", c.q_in_registers ? "true" : "false");
  field("min_blocks", std::to_string(c.min_blocks));
  field("load_bytes", std::to_string(c.load_bytes));
  field("store_bytes", std::to_string(c.store_bytes));
  return text + "}";
}

// Runs the passes and prints the mod; false with the result's error set.
bool emit_mod(const ModProblem& problem, CudaAccuracy accuracy, const CompileOptions& options,
              const std::string& config, CompileResult<EmittedCuda>& result, std::string& mod) {
  EmittedCuda& emitted = result.value;
  Frontend frontend(emitted.phases);
  if (!frontend.run(problem, options, Target::kCuda)) {
    result.error = CompileError{frontend.error()};
    return false;
  }
  const PhaseTimer timer(emitted.phases, "emit");
  CudaMod made = emit_cuda_mod(frontend.function(), problem, accuracy);
  if (!made.error.empty()) {
    result.error = CompileError{std::move(made.error)};
    return false;
  }
  emitted.facts = frontend.facts();
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
  const CudaAccuracy accuracy = config.element == sm80::Element::kF32   ? CudaAccuracy::kFull
                                : config.element == sm80::Element::kF16 ? CudaAccuracy::kFloat16
                                                                        : CudaAccuracy::kBFloat16;
  std::string mod;
  const std::string values = config_text(config);
  if (!emit_mod(problem, accuracy, options, "sm80 " + values, result, mod)) return result;
  finish(result.value,
         prelude() + template_file("sm80/config.h") + "\n" + in_namespace("cuda", mod) +
             in_namespace("sm80", "constexpr ForwardConfig kConfig = " + values + ";\n") +
             template_file("sm80/tile.cuh") + "\n" + template_file("sm80/forward.cuh"),
         options);
  return result;
}

CompileResult<EmittedCuda> emit_cuda_math(const ModProblem& problem, const CompileOptions& options) {
  CompileResult<EmittedCuda> result;
  std::string mod;
  // Its scores are float32 whatever the inputs are, and it is what others are measured by.
  if (!emit_mod(problem, CudaAccuracy::kFull, options, "math", result, mod)) return result;
  finish(result.value,
         prelude() + template_file("math/config.h") + "\n" + in_namespace("cuda", mod) + template_file("math/mod.cuh"),
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
                template_file("math/kernels.cuh");
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

}  // namespace attnjit::compiler
