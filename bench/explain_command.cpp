// attnjit explain: what the compiler makes of an expression.
#include <attnjit/attnjit.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "bench/api.h"
#include "bench/commands.h"
#include "bench/failure.h"
#include "bench/problem.h"

namespace attnjit::tool {

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kDumpKinds[] = {"mlir", "llvm", "asm", "cuda", "ptx"};

struct ExplainOptions {
  std::string score_mod, mask_mod, shape = "1,16,1024,16,1024,64", dtype = "float32", backend = "auto", arch,
                                   format = "text";
  std::vector<std::string> captures, dumps, gradients;
  bool backward = false, deterministic = false, partial_keys = false;
};

std::string label(std::string key) {
  std::ranges::replace(key, '_', ' ');
  return key;
}

// A JSON value as a person reads it: strings bare, objects and arrays on one line, of objects separated by semicolons,
// in objects in parentheses.
std::string value_text(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_number_float()) return fmt::format("{:.3f}", value.get<double>());
  if (value.empty()) return "none";
  std::string text;
  if (value.is_array() && value[0].is_object()) {
    for (const Json& part : value) text += (text.empty() ? "" : "; ") + value_text(part);
    return text;
  }
  if (!value.is_object()) return value.dump();
  for (const auto& [key, part] : value.items()) {
    const bool nested = part.is_object() && !part.empty();
    text += fmt::format("{}{} {}{}{}", text.empty() ? "" : ", ", label(key), nested ? "(" : "", value_text(part),
                        nested ? ")" : "");
  }
  return text;
}

void append_object(std::string& text, const Json& object, const std::string& indent) {
  std::size_t width = 0;
  for (const auto& [key, value] : object.items()) width = std::max(width, key.size());
  for (const auto& [key, value] : object.items()) {
    text += fmt::format("{}{:<{}}  {}\n", indent, label(key), width, value_text(value));
  }
}

std::string explain_text(const Json& json) {
  std::string text;
  for (const char* mod : {"score_mod", "mask_mod"}) {
    if (!json.contains(mod) || json[mod].is_null()) continue;
    text += fmt::format("{}\n", mod);
    if (json[mod].is_object()) {
      append_object(text, json[mod], "  ");
    } else {
      text += fmt::format("  {}\n", value_text(json[mod]));
    }
  }
  if (json.contains("captures") && !json["captures"].empty()) {
    text += "captures\n";
    for (const Json& capture : json["captures"]) {
      text += fmt::format("  {}: {} {}, read as {}\n", value_text(capture["name"]), value_text(capture["dtype"]),
                          value_text(capture["shape"]), value_text(capture["type"]));
    }
  }
  double total = 0.0;
  for (const auto& [key, value] : json.items()) {
    const bool done = key == "score_mod" || key == "mask_mod" || key == "captures" || key == "kernels";
    const bool dump = std::ranges::find(kDumpKinds, key) != std::end(kDumpKinds);
    if (done || dump) continue;
    if (key == "phases_ms") {
      for (const auto& [phase, milliseconds] : value.items()) total += milliseconds.get<double>();
      text += fmt::format("compile: {:.3f} ms\n", total);
      append_object(text, value, "  ");
    } else if (value.is_object()) {
      text += fmt::format("{}\n", label(key));
      append_object(text, value, "  ");
    } else {
      text += fmt::format("{}: {}\n", label(key), value_text(value));
    }
  }
  if (json.contains("kernels")) {
    for (const Json& kernel : json["kernels"]) {
      text += "kernel\n";
      append_object(text, kernel, "  ");
    }
  }
  for (const char* kind : kDumpKinds) {
    if (json.contains(kind)) text += fmt::format("\n---- {} ----\n{}\n", kind, value_text(json[kind]));
  }
  return text;
}

// The gradients that are asked for, all of q's, k's and v's among them. Whatever has no captured tensor is the
// library's to refuse.
struct Wanted {
  std::vector<DLTensor> tensors;
  std::vector<attnjit_capture_gradient> captures;
  attnjit_gradients gradients = ATTNJIT_GRADIENTS_INIT;

  Wanted(const ExplainOptions& options, const Captures& lent, const DLTensor& q, const DLTensor& kv)
      : tensors{q, kv, kv} {
    for (const std::string& name : options.gradients) {
      const auto at = std::ranges::find(lent.names, name);
      tensors.push_back(at == lent.names.end() ? q : lent.dl[static_cast<std::size_t>(at - lent.names.begin())]);
    }
    for (std::size_t i = 0; i < options.gradients.size(); ++i) {
      captures.push_back({options.gradients[i].c_str(), &tensors[3 + i]});
    }
    gradients.dq = &tensors[0];
    gradients.dk = &tensors[1];
    gradients.dv = &tensors[2];
    gradients.captures = captures.data();
    gradients.num_captures = captures.size();
    gradients.deterministic = options.deterministic ? 1 : 0;
    gradients.partial_keys = options.partial_keys ? 1 : 0;
  }
  Wanted(const Wanted&) = delete;
  Wanted& operator=(const Wanted&) = delete;
};

int explain_expression(const ExplainOptions& options) {
  if (!options.backward && (!options.gradients.empty() || options.deterministic || options.partial_keys)) {
    throw user_error("--grad, --deterministic and --partial-keys are the backward's: give --backward");
  }
  const Shape shape = parse_shape(options.shape);
  const ElementType type = parse_dtype(options.dtype);
  const std::vector<CaptureSpec> specs = parse_captures(options.captures);

  const ContextPtr context = make_context(0);
  const char* mask_mod = options.mask_mod.empty() ? nullptr : options.mask_mod.c_str();
  const Captures captures = make_captures(context.get(), options.score_mod.c_str(), mask_mod, specs,
                                          registered_mods(context.get()), shape, std::nullopt, true);

  const std::vector q = {shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim};
  const std::vector kv = {shape.batch, shape.heads_kv, shape.seqlen_kv, shape.head_dim};
  DLTensor q_dl = dl_without_data(type, q), kv_dl = dl_without_data(type, kv), o_dl = q_dl;

  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.score_mod = options.score_mod.c_str();
  attention.mask_mod = mask_mod;
  attention.q = &q_dl;
  attention.k = &kv_dl;
  attention.v = &kv_dl;
  attention.o = &o_dl;
  attention.captures = captures.lent.data();
  attention.num_captures = captures.lent.size();
  attention.backend = parse_backend(options.backend);
  Wanted wanted(options, captures, q_dl, kv_dl);
  Json json = explain(context.get(), attention, options.backward ? &wanted.gradients : nullptr, options.arch,
                      !options.dumps.empty());
  for (const char* kind : kDumpKinds) {
    if (std::ranges::find(options.dumps, kind) == options.dumps.end()) json.erase(kind);
  }
  fmt::print("{}", options.format == "json" ? json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"
                                            : explain_text(json));
  return 0;
}

}  // namespace

void add_explain_command(CLI::App& app, Action& action) {
  auto options = std::make_shared<ExplainOptions>();
  CLI::App* command = app.add_subcommand(
      "explain", "Canonical form, hash, types, facts, intermediate code and compile times of an expression");
  command->add_option("EXPR", options->score_mod, "expression of the score, or a registered name")->required();
  command->add_option("--mask-mod", options->mask_mod, "condition to keep an element, applied after EXPR");
  command->add_option("--shape", options->shape, "B,Hq,Sq,Hkv,Skv,D (default: 1,16,1024,16,1024,64)");
  command->add_option("--dtype", options->dtype, "float32, float16 or bfloat16 of q, k, v (default: float32)");
  command
      ->add_option("--captures", options->captures,
                   "NAME:DTYPE:DIMS[=VALUE] of a captured tensor, as slopes:float32:Hq or ids:int32:B,Sq; DIMS are "
                   "numbers or B, Hq, Hkv, Sq, Skv, D (default: float32, extents that fit the indices); repeatable")
      ->allow_extra_args(false);
  command->add_option(
      "--arch", options->arch,
      "sm_80, sm_90a, ...: the CUDA kernels for this architecture, with registers, shared memory, spills "
      "and compile times; needs no GPU (default: what runs on the CPU)");
  command->add_flag("--backward", options->backward, "the backward instead: gradients of q, k and v, and --grad's");
  command->add_option("--grad", options->gradients, "captured tensors whose gradients are wanted, separated by commas")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_flag("--deterministic", options->deterministic, "with --backward: the same bits in every run");
  command->add_flag("--partial-keys", options->partial_keys,
                    "with --backward: the keys are a part of those that o and lse are of");
  command->add_option("--dump", options->dumps, "mlir, llvm, asm, cuda or ptx, separated by commas; repeatable")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::IsMember({"mlir", "llvm", "asm", "cuda", "ptx"}));
  command->add_option("--backend", options->backend, "auto, sm90, sm80, math or cpu (default: auto)");
  command->add_option("--format", options->format, "text or json (default: text)")
      ->check(CLI::IsMember({"text", "json"}));
  command->callback([options, &action] { action = [options] { return explain_expression(*options); }; });
}

}  // namespace attnjit::tool
