// attnjit run: one attention call, tensors from a safetensors file into another.
#include <attnjit/attnjit.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
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
  int threads = 0;
  bool check_reads = false;
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

int run(const RunOptions& options) {
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.backend = parse_backend(options.backend);
  const bool on_gpu = uses_gpu(options.device, attention.backend);
  const std::string score_mod =
      options.score_mod_file.empty() ? options.score_mod : read_text_file(options.score_mod_file);
  if (!score_mod.empty()) attention.score_mod = score_mod.c_str();
  if (!options.mask_mod.empty()) attention.mask_mod = options.mask_mod.c_str();
  if (options.scale) attention.scale = &*options.scale;
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
  const PlanPtr plan = prepare(context.get(), attention);

  const Placed o(Tensor(q.type(), o_shape), on_gpu), lse(Tensor(ElementType::kFloat32, row_shape), on_gpu);
  o_dl = o.device.dl();
  lse_dl = lse.device.dl();
  const std::size_t workspace_size = attnjit_plan_workspace_size(plan.get());
  const Workspace workspace(workspace_size, on_gpu);
  check(attnjit_run(plan.get(), &attention, workspace.data(), workspace_size, nullptr));
  o.device.download();
  lse.device.download();

  std::map<std::string, std::string> metadata{
      {"format", "attnjit"},
      {"attnjit_version", attnjit_version()},
      {"backend", attnjit_backend_name(attnjit_plan_backend(plan.get()))},
      {"scale", fmt::format("{}", options.scale.value_or(
                                      static_cast<float>(1.0 / std::sqrt(static_cast<double>(q.shape()[3])))))},
      {"score_mod", attention.score_mod != nullptr ? score_mod : "noop"},
  };
  if (attention.mask_mod != nullptr) metadata["mask_mod"] = options.mask_mod;
  write_safetensors(options.output, {{"o", &o.host}, {"lse", &lse.host}}, metadata);
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
  command->add_option("--output", options->output, "safetensors file to write: o, lse")->required();
  command->add_option("--scale", options->scale, "multiplies q . k before the score_mod (default: 1 / sqrt(D))");
  command->add_option("--device", options->device, "auto, cpu or cuda (default: auto)");
  command->add_option("--backend", options->backend, "auto, sm80, math or cpu (default: auto)");
  command->add_option("--threads", options->threads, "CPU threads (default: one per processor)")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--check-reads", options->check_reads,
                    "warn of captured reads whose indices were clamped; interprets every element: slow");
  command->callback([options, &action] { action = [options] { return run(*options); }; });
}

}  // namespace attnjit::tool
