// attnjit run: one attention call, tensors from a safetensors file into another.
#include <attnjit/attnjit.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bench/api.h"
#include "bench/commands.h"
#include "bench/device_tensor.h"
#include "bench/problem.h"
#include "bench/safetensors.h"
#include "bench/tensor.h"

namespace attnjit::tool {

namespace {

struct RunOptions {
  std::string score_mod, score_mod_file, mask_mod, input, output, device = "auto", backend = "auto";
  std::optional<float> scale;
  std::vector<std::string> grad;
  int threads = 0;
  bool check_reads = false, backward = false, deterministic = false, partial_keys = false;
};

constexpr std::size_t kMaxModFileBytes = 1 << 20;  // the language's own limit is 64 KiB; it words the error

std::string read_text_file(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    throw user_error(fmt::format("--score-mod-file: there is no file {}", in_quotes(path)));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) throw environment_error(fmt::format("--score-mod-file: cannot read {}", in_quotes(path)));
  std::string text(kMaxModFileBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) throw environment_error(fmt::format("--score-mod-file: cannot read {}", in_quotes(path)));
  if (!file.eof()) throw user_error(fmt::format("--score-mod-file: {} is longer than 1 MiB", in_quotes(path)));
  text.resize(static_cast<std::size_t>(file.gcount()));
  // The library takes a C string: what follows a NUL byte would silently be left out.
  if (text.find('\0') != std::string::npos) {
    throw user_error(fmt::format("--score-mod-file: {} contains a NUL byte; it is no text", in_quotes(path)));
  }
  return text;
}

Tensor read_named(const SafetensorsReader& file, const std::string& name, const char* what) {
  if (const SafetensorsEntry* entry = file.find(name)) return file.read(*entry);
  std::vector<std::string> names;
  for (const SafetensorsEntry& entry : file.entries()) {
    if (names.size() == 20) {
      names.push_back("...");
      break;
    }
    names.push_back(in_quotes(entry.name));
  }
  throw user_error(fmt::format("{} has no tensor {} ({}); it has {}", in_quotes(file.path()), in_quotes(name), what,
                               names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "))));
}

std::string listed(const std::vector<CapturedName>& names) {
  std::string text;
  for (const CapturedName& name : names) text += (text.empty() ? "" : ", ") + in_quotes(name.name);
  return text.empty() ? "nothing" : text;
}

void require_four_dimensions(const Tensor& tensor, const char* name, const char* dimensions) {
  if (tensor.shape().size() == 4) return;
  throw user_error(
      fmt::format("{} has shape ({}); 4 dimensions {} are allowed", name, fmt::join(tensor.shape(), ", "), dimensions));
}

// To standard error, a line for each dimension of a captured tensor with indices that were clamped.
void report_clamped_reads(attnjit_context* context, const attnjit_attention& attention) {
  const std::int64_t* const shape = attention.q->shape;
  std::vector<attnjit_row> rows;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t h = 0; h < shape[1]; ++h) {
      for (std::int64_t q_idx = 0; q_idx < shape[2]; ++q_idx) rows.push_back({b, h, q_idx});
    }
  }
  for (const auto& reads : clamped_reads(context, attention, rows)) {
    const auto& first = reads.at("first");
    const auto number = [](const nlohmann::ordered_json& value) { return value.get<std::int64_t>(); };
    fmt::print(stderr,
               "attnjit: warning: {}: {} indices of dimension {} are outside [0, {}) and were clamped, the first, {}, "
               "at b={} h={} q_idx={} kv_idx={}\n",
               in_quotes(reads.at("name").get<std::string>()), number(reads.at("count")), number(reads.at("dimension")),
               number(reads.at("extent")), number(first.at("index")), number(first.at("b")), number(first.at("h")),
               number(first.at("q_idx")), number(first.at("kv_idx")));
  }
}

// The backward's part of a call: its inputs from the file, its outputs' memory. Stays where it is: the structs point
// into each other.
class Backward {
 public:
  Backward(const SafetensorsReader& file, bool on_gpu, const RunOptions& options)
      : on_gpu_(on_gpu),
        grad_out_(read_named(file, "grad_out", "gradient of o (B, Hq, Sq, Dv)"), on_gpu),
        grad_out_dl_(lend(grad_out_)) {
    if (file.find("grad_lse")) grad_lse_.emplace(read_named(file, "grad_lse", ""), on_gpu);
    gradients_.deterministic = options.deterministic ? 1 : 0;
    gradients_.partial_keys = options.partial_keys ? 1 : 0;
    gradients_.grad_out = &grad_out_dl_;
    if (!grad_lse_) return;
    grad_lse_dl_ = lend(*grad_lse_);
    gradients_.grad_lse = &*grad_lse_dl_;
  }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  // Asks for the gradients of `of`, by the names that they have in the output; those from the fourth on are of captured
  // tensors. Without memory yet: prepare refuses shapes that would make it absurd.
  void want(std::vector<std::pair<std::string, const Tensor*>> of, const std::vector<std::string>& captured) {
    constexpr std::size_t kInputs = 3;  // q, k, v
    of_ = std::move(of);
    dl_.resize(of_.size());
    for (std::size_t i = 0; i < of_.size(); ++i) {
      dl_[i] = of_[i].second->dl();
      dl_[i].device = grad_out_dl_.device;
      dl_[i].data = nullptr;
    }
    for (std::size_t i = 0; i < captured.size(); ++i) captures_.push_back({captured[i].c_str(), &dl_[kInputs + i]});
    gradients_.dq = &dl_[0];
    gradients_.dk = &dl_[1];
    gradients_.dv = &dl_[2];
    gradients_.captures = captures_.data();
    gradients_.num_captures = captures_.size();
  }
  const attnjit_gradients& gradients() const { return gradients_; }

  void run(attnjit_plan* plan, const attnjit_attention& attention) {
    for (std::size_t i = 0; i < of_.size(); ++i) {
      outputs_.push_back(std::make_unique<Placed>(Tensor(of_[i].second->type(), of_[i].second->shape()), on_gpu_));
      dl_[i] = outputs_.back()->device.dl();
    }
    const std::size_t size = attnjit_plan_workspace_size(plan);
    const Workspace workspace(size, on_gpu_);
    check(attnjit_run_backward(plan, &attention, &gradients_, workspace.data(), size, nullptr));
    for (const auto& output : outputs_) output->device.download();
  }
  void add_to(std::vector<std::pair<std::string, const Tensor*>>* tensors) const {
    for (std::size_t i = 0; i < of_.size(); ++i) tensors->emplace_back(of_[i].first, &outputs_[i]->host);
  }

 private:
  static DLTensor lend(const Placed& placed) {
    placed.device.upload();
    return placed.device.dl();
  }

  bool on_gpu_;
  Placed grad_out_;
  std::optional<Placed> grad_lse_;
  DLTensor grad_out_dl_;
  std::optional<DLTensor> grad_lse_dl_;
  std::vector<std::pair<std::string, const Tensor*>> of_;
  std::vector<DLTensor> dl_;
  std::vector<std::unique_ptr<Placed>> outputs_;
  std::vector<attnjit_capture_gradient> captures_;
  attnjit_gradients gradients_ = ATTNJIT_GRADIENTS_INIT;
};

int run(const RunOptions& options) {
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.backend = parse_backend(options.backend);
  const bool on_gpu = uses_gpu(options.device, attention.backend);
  const std::string score_mod =
      options.score_mod_file.empty() ? options.score_mod : read_text_file(options.score_mod_file);
  if (!score_mod.empty()) attention.score_mod = score_mod.c_str();
  if (!options.mask_mod.empty()) attention.mask_mod = options.mask_mod.c_str();
  if (options.scale) attention.scale = &*options.scale;
  if (!options.backward && (!options.grad.empty() || options.deterministic || options.partial_keys)) {
    throw user_error(fmt::format("{} goes with --backward", !options.grad.empty()   ? "--grad"
                                                            : options.deterministic ? "--deterministic"
                                                                                    : "--partial-keys"));
  }
  std::error_code ignored;
  if (std::filesystem::equivalent(options.input, options.output, ignored)) {
    throw user_error(fmt::format("--output {} is the input file", in_quotes(options.output)));
  }

  const ContextPtr context = make_context(options.threads);
  const std::vector<CapturedName> names = captured_names(context.get(), attention.score_mod, attention.mask_mod);

  const SafetensorsReader file(options.input);
  Tensor q = read_named(file, "q", "queries (B, Hq, Sq, D)");
  Tensor k = read_named(file, "k", "keys (B, Hkv, Skv, D)");
  Tensor v = read_named(file, "v", "values (B, Hkv, Skv, Dv)");
  require_four_dimensions(q, "q", "(B, Hq, Sq, D)");
  require_four_dimensions(k, "k", "(B, Hkv, Skv, D)");
  require_four_dimensions(v, "v", "(B, Hkv, Skv, Dv)");
  std::vector<Tensor> captured;
  captured.reserve(names.size());
  for (const CapturedName& name : names) captured.push_back(read_named(file, name.name, "captured by the expression"));

  // A scalar stays on the host, and is passed by value.
  std::vector<DeviceTensor> memory;
  std::vector<DLTensor> captured_dl;
  captured_dl.reserve(names.size());
  const auto place = [&](Tensor& tensor) {
    memory.emplace_back(tensor, on_gpu && !tensor.shape().empty());
    memory.back().upload();
    return memory.back().dl();
  };
  for (Tensor& tensor : captured) captured_dl.push_back(place(tensor));
  std::vector<attnjit_capture> captures;
  captures.reserve(names.size());
  for (std::size_t i = 0; i < names.size(); ++i) captures.push_back({names[i].name.c_str(), &captured_dl[i]});

  const DLTensor q_dl = place(q), k_dl = place(k), v_dl = place(v);
  attention.q = &q_dl;
  attention.k = &k_dl;
  attention.v = &v_dl;
  attention.captures = captures.data();
  attention.num_captures = captures.size();

  // The outputs' memory comes after prepare, which refuses shapes that would make it absurd.
  const std::vector<std::int64_t> row_shape(q.shape().begin(), q.shape().begin() + 3);
  std::vector<std::int64_t> o_shape = row_shape, o_strides(4, 1), row_strides(3, 1);
  o_shape.push_back(v.shape()[3]);
  DLTensor o_dl = q_dl, lse_dl = q_dl;
  o_dl.data = nullptr;
  o_dl.shape = o_shape.data();
  o_dl.strides = nullptr;
  lse_dl = o_dl;
  lse_dl.ndim = 3;
  lse_dl.dtype = {kDLFloat, 32, 1};
  attention.o = &o_dl;
  attention.lse = &lse_dl;
  // Of more keys than these, they are what other calls gave: no forward is run then.
  std::optional<Placed> o, lse;
  const auto place_given = [&](std::optional<Placed>& tensor, const char* name, const char* what, DLTensor& dl) {
    tensor.emplace(read_named(file, name, what), on_gpu);
    tensor->device.upload();
    dl = tensor->device.dl();
  };
  if (options.partial_keys) {
    place_given(o, "o", "output of all keys (B, Hq, Sq, Dv), for --partial-keys", o_dl);
    place_given(lse, "lse", "LSE of all keys (B, Hq, Sq), for --partial-keys", lse_dl);
  }
  std::optional<Backward> backward;
  PlanPtr plan, backward_plan;
  if (options.backward) {
    backward.emplace(file, on_gpu, options);
    std::vector<std::pair<std::string, const Tensor*>> of = {{"dq", &q}, {"dk", &k}, {"dv", &v}};
    for (const std::string& name : options.grad) {
      const auto found = std::ranges::find(names, name, &CapturedName::name);
      if (found == names.end()) {
        throw user_error(fmt::format("--grad {}: the expressions capture {}", in_quotes(name), listed(names)));
      }
      of.emplace_back("d_" + name, &captured[static_cast<std::size_t>(found - names.begin())]);
    }
    backward->want(std::move(of), options.grad);
    if (options.partial_keys) {
      backward_plan = prepare_backward(context.get(), attention, backward->gradients());
    } else {
      TrainingPlans plans = prepare_training(context.get(), attention, backward->gradients());
      plan = std::move(plans.forward);
      backward_plan = std::move(plans.backward);
    }
  } else {
    plan = prepare(context.get(), attention);
  }

  std::vector<std::pair<std::string, const Tensor*>> outputs;
  if (plan) {
    o.emplace(Tensor(q.type(), o_shape), on_gpu);
    lse.emplace(Tensor(ElementType::kFloat32, row_shape), on_gpu);
    o_dl = o->device.dl();
    lse_dl = lse->device.dl();
    const std::size_t workspace_size = attnjit_plan_workspace_size(plan.get());
    const Workspace workspace(workspace_size, on_gpu);
    check(attnjit_run(plan.get(), &attention, workspace.data(), workspace_size, nullptr));
    outputs = {{"o", &o->host}, {"lse", &lse->host}};
  }
  if (backward) {
    backward->run(backward_plan.get(), attention);
    backward->add_to(&outputs);
  }
  if (plan) {
    o->device.download();
    lse->device.download();
  }

  std::map<std::string, std::string> metadata{
      {"format", "attnjit"},
      {"attnjit_version", attnjit_version()},
      {"backend", attnjit_backend_name(attnjit_plan_backend(plan ? plan.get() : backward_plan.get()))},
      {"scale", fmt::format("{}", options.scale.value_or(
                                      static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.shape()[3])))))},
      {"score_mod", attention.score_mod != nullptr ? score_mod : "noop"},
  };
  if (attention.mask_mod != nullptr) metadata["mask_mod"] = options.mask_mod;
  if (options.partial_keys) metadata["partial_keys"] = "true";
  write_safetensors(options.output, outputs, metadata);
  if (options.check_reads) {
    // The interpreter reads the program's memory.
    for (std::size_t i = 0; i < captured.size(); ++i) captured_dl[i] = captured[i].dl();
    const DLTensor q_host = q.dl(), k_host = k.dl(), v_host = v.dl();
    attention.q = &q_host;
    attention.k = &k_host;
    attention.v = &v_host;
    report_clamped_reads(context.get(), attention);
  }
  return 0;
}

}  // namespace

void add_run_command(CLI::App& app, Action& action) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command = app.add_subcommand(
      "run",
      "One attention call: q, k, v and what the expression captures from a safetensors file, o and lse to another");
  CLI::Option* score_mod = command->add_option("--score-mod", options->score_mod,
                                               "expression of the score, or a registered name (default: noop)");
  command->add_option("--score-mod-file", options->score_mod_file, "a file that holds the expression")
      ->excludes(score_mod);
  command->add_option("--mask-mod", options->mask_mod, "condition to keep an element, applied after the score_mod");
  command->add_option("--input", options->input, "safetensors file with q, k, v and the captured tensors by name")
      ->required();
  command->add_option("--output", options->output, "safetensors file to write: o, lse; dq, dk, dv, d_NAME")->required();
  command->add_flag("--backward", options->backward,
                    "also the gradients, given grad_out, and grad_lse where it is there, in the input");
  command->add_option("--grad", options->grad, "captured tensors whose gradients are wanted: NAME,...")->delimiter(',');
  command->add_flag("--deterministic", options->deterministic, "gradients that are the same bits in every run");
  command->add_flag("--partial-keys", options->partial_keys,
                    "with --backward: k and v are a part of the keys that o and lse, in the input, are of; no forward");
  command->add_option("--scale", options->scale, "multiplies q . k before the score_mod (default: 1 / sqrt(D))");
  command->add_option("--device", options->device, "auto, cpu or cuda (default: auto)");
  command->add_option("--backend", options->backend, "auto, sm90, sm80, math or cpu (default: auto)");
  command->add_option("--threads", options->threads, "CPU threads (default: one per processor)")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--check-reads", options->check_reads,
                    "warn of captured reads whose indices were clamped; interprets every element: slow");
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace attnjit::tool
