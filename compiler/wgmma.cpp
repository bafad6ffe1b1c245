// A product is one asm statement, all its steps in it: nothing can come between them, and ptxas sees one pipeline
// stage.
#include "compiler/wgmma.h"

#include <vector>

namespace attnjit::compiler {
namespace {

// "%4, %5, %6".
std::string operands(int first, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i ? ", %" : "%") + std::to_string(first + i);
  return text;
}

// The C++ operands `name[0..count)`.
std::string registers(const char* constraint, const char* name, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) {
    if (i) text += i % 8 == 0 ? ",\n        " : ", ";
    text += std::string("\"") + constraint + "\"(" + name + "[" + std::to_string(i) + "])";
  }
  return text;
}

std::string lines(const std::vector<std::string>& instructions) {
  std::string text;
  for (const std::string& line : instructions) text += "      \"" + line + "\\n\"\n";
  return text;
}

std::string function(const std::string& head, const std::vector<std::string>& instructions, const std::string& outputs,
                     const std::string& inputs) {
  return "__device__ __forceinline__ void " + head + " {\n  asm volatile(\n" + lines(instructions) + "      : " +
         outputs + "\n      : " + inputs + "\n      : \"memory\");\n}\n";
}

std::string array(const char* type, const char* name, int size) {
  return std::string(type) + " (&" + name + ")[" + std::to_string(size) + "]";
}

std::string instruction(int n, const char* element, const std::string& result, const std::string& rest) {
  return "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32." + element + "." + element + " {" +
         result + "}, " + rest + ";";
}

}  // namespace

std::string wgmma_products(const sm90::ForwardConfig& config) {
  const char* const element = config.element == sm90::Element::kBF16 ? "bf16" : "f16";
  const int scores = config.tile_n / 2;
  const int probabilities = config.tile_n / 4;
  const int features = sm90::padded(config.head_dim_v);
  const int outputs = features / 2;
  const std::string s = array("float", "s", scores);
  const std::string o = array("float", "o", outputs);

  // Q and K lie with their features side by side: a step of 16 is 32 bytes on, within columns of 64.
  std::vector<std::string> qk = {"{",
                                 ".reg .pred first, next;",
                                 ".reg .b64 q, k;",
                                 ".reg .b32 zero;",
                                 "mov.b32 zero, 0;",
                                 "setp.ne.b32 first, zero, 0;",
                                 "setp.eq.b32 next, zero, 0;",
                                 "wgmma.fence.sync.aligned;"};
  for (int step = 0; step < sm90::padded(config.head_dim) / 16; ++step) {
    const int column = step / 4;
    const int within = step % 4 * 32;
    const int q = (column * sm90::kRowsOfWarpgroup * 128 + within) / 16;
    const int k = (column * config.tile_n * 128 + within) / 16;
    qk.push_back("add.s64 q, %" + std::to_string(scores) + ", " + std::to_string(q) + ";");
    qk.push_back("add.s64 k, %" + std::to_string(scores + 1) + ", " + std::to_string(k) + ";");
    qk.push_back(instruction(config.tile_n, element, operands(0, scores),
                             std::string("q, k, ") + (step == 0 ? "first" : "next") + ", 1, 1, 0, 0"));
  }
  qk.insert(qk.end(), {"wgmma.commit_group.sync.aligned;", "}"});

  // V lies with its keys one below the other: a step of 16 is 2048 bytes on.
  std::vector<std::string> pv = {"{",
                                 ".reg .pred next;",
                                 ".reg .b64 v;",
                                 ".reg .b32 zero;",
                                 "mov.b32 zero, 0;",
                                 "setp.eq.b32 next, zero, 0;",
                                 "wgmma.fence.sync.aligned;"};
  for (int step = 0; step < config.tile_n / 16; ++step) {
    pv.push_back("add.s64 v, %" + std::to_string(outputs + probabilities) + ", " + std::to_string(step * 2048 / 16) +
                 ";");
    pv.push_back(instruction(features, element, operands(0, outputs),
                             "{" + operands(outputs + 4 * step, 4) + "}, v, next, 1, 1, 1"));
  }
  pv.insert(pv.end(), {"wgmma.commit_group.sync.aligned;", "}"});

  const auto wait = [](const std::string& head, int pending, const std::string& results) {
    return function(head, {"wgmma.wait_group.sync.aligned " + std::to_string(pending) + ";"}, results, "");
  };
  const std::string all_scores = registers("+f", "s", scores);
  const std::string all_outputs = registers("+f", "o", outputs);
  return function("multiply_qk(" + s + ", unsigned long long q, unsigned long long k)", qk,
                  registers("=f", "s", scores), "\"l\"(q), \"l\"(k)") +
         "\n" +
         function("multiply_pv(" + o + ", const " + array("unsigned", "p", probabilities) + ", unsigned long long v)",
                  pv, all_outputs, registers("r", "p", probabilities) + ", \"l\"(v)") +
         "\n" + wait("wait_for_scores(" + s + ")", 1, all_scores) + "\n" +
         wait("wait_for_output(" + o + ")", 0, all_outputs) + "\n" +
         wait("wait_for_all(" + s + ", " + o + ")", 0, all_scores + ",\n        " + all_outputs);
}

}  // namespace attnjit::compiler
