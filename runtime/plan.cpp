// Keys, compiles and runs plans, and describes them.
#include "runtime/plan.h"

#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

#include "compiler/compiler.h"
#include "dsl/printer.h"
#include "runtime/cpu_backend.h"
#include "runtime/math_backend.h"
#include "runtime/mods.h"

namespace attnjit::runtime {
namespace {

using Json = nlohmann::ordered_json;

// ---- Key

void append_text(std::string* key, const char* text) {
  const std::size_t size = text ? std::strlen(text) : std::numeric_limits<std::size_t>::max();
  key->append(reinterpret_cast<const char*>(&size), sizeof(size));
  if (text) key->append(text, size);
}

// The exact bytes a plan depends on within one context, so that nothing can be forgotten by a hash.
std::string make_key(const CheckedCall& call, const attnjit_attention& attention, std::uint64_t generation) {
  std::string key(reinterpret_cast<const char*>(&call.signature), sizeof(Signature));
  key.append(reinterpret_cast<const char*>(&generation), sizeof(generation));
  append_text(&key, attention.score_mod);
  append_text(&key, attention.mask_mod);
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) append_text(&key, call.capture_names[i]);
  return key;
}

// ---- Problem

std::string shape_text(const Signature& s) {
  return fmt::format("B={} Hq={} Hkv={} Sq={} Skv={} D={} Dv={} {}", s.batch, s.num_heads, s.num_heads_kv, s.seqlen_q,
                     s.seqlen_kv, s.head_dim, s.head_dim_v, dsl::dtype_name(static_cast<dsl::DType>(s.dtype)));
}

compiler::ModProblem make_mod_problem(const Mods& bound, const CheckedCall& call) {
  const Signature& s = call.signature;
  compiler::ModProblem problem;
  problem.score_mod = bound.score_mod;
  problem.mask_mod = bound.mask_mod;
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) {
    const Signature::Capture& capture = s.captures[i];
    compiler::CaptureInfo info;
    info.dtype = static_cast<dsl::DType>(capture.dtype);
    for (int d = 0; d < capture.rank; ++d) {
      info.extent.push_back(capture.extent[d]);
      info.stride_class.push_back(static_cast<compiler::StrideClass>(capture.stride_class[d]));
    }
    problem.captures.push_back(std::move(info));
  }
  problem.batch = std::max<std::int64_t>(s.batch, 1);
  problem.num_heads = std::max<std::int64_t>(s.num_heads, 1);
  // A panel always has all its lanes; those of a shorter problem reach beyond it.
  problem.seqlen_q = std::max<std::int64_t>(s.seqlen_q, cpu::kPanelLanes);
  problem.seqlen_kv = std::max<std::int64_t>(s.seqlen_kv, 1);
  return problem;
}

// ---- Dumps

// Writes each intermediate text of a compile to a file, as ATTNJIT_DUMP asks.
class DumpFiles {
 public:
  DumpFiles(const Context& context, std::string_view key, std::string header)
      : context_(context), header_(std::move(header)) {
    const XXH128_hash_t hash = XXH3_128bits(key.data(), key.size());
    name_ = fmt::format("attnjit-{:016x}", hash.high64 ^ hash.low64);
  }

  bool wants(std::string_view kind) const {
    const Environment& environment = context_.environment();
    return (kind == "mlir" && environment.dump_mlir) || (kind == "llvm" && environment.dump_llvm) ||
           (kind == "asm" && environment.dump_asm);
  }
  bool any() const { return wants("mlir") || wants("llvm") || wants("asm"); }

  void write(std::string_view kind, std::string_view text) const {
    const std::string_view comment = kind == "mlir" ? "//" : kind == "llvm" ? ";" : "#";
    const std::string_view extension = kind == "mlir" ? "mlir" : kind == "llvm" ? "ll" : "s";
    const std::filesystem::path directory = context_.environment().dump_dir;
    const std::filesystem::path path = directory / fmt::format("{}.{}", name_, extension);
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    std::ofstream file(path, std::ios::binary);
    for (std::string_view rest = header_; !rest.empty();) {
      const std::size_t newline = rest.find('\n');
      file << comment << ' ' << rest.substr(0, newline) << '\n';
      rest = newline == std::string_view::npos ? std::string_view() : rest.substr(newline + 1);
    }
    file << text;
    file.close();
    const bool written = !file.fail();
    const LogLevel level = written ? LogLevel::kInfo : LogLevel::kWarn;
    if (context_.logger().enabled(level)) {
      context_.logger().log(level, fmt::format("{} {}", written ? "wrote" : "cannot write", path.string()));
    }
  }

 private:
  const Context& context_;
  std::string header_;
  std::string name_;
};

// ---- Compile

std::string_view score_class_name(compiler::ScoreClass score_class) {
  switch (score_class) {
    case compiler::ScoreClass::kIdentity:
      return "identity";
    case compiler::ScoreClass::kAffine:
      return "affine";
    case compiler::ScoreClass::kNonlinear:
      return "nonlinear";
  }
  return "?";
}

Json facts_json(const compiler::ModFacts& facts) {
  return {{"score_class", score_class_name(facts.score_class)},
          {"has_mask", facts.has_mask},
          {"mask_reads_score", facts.mask_reads_score},
          {"reads_proven", facts.reads_proven},
          {"reads_clamped", facts.reads_clamped},
          {"indices_fit_32", facts.indices_fit_32}};
}

std::string hash_text(const compiler::ModFacts& facts) {
  return fmt::format("{:016x}{:016x}", facts.hash_high, facts.hash_low);
}

Json phases_json(const compiler::PhaseTimes& phases) {
  Json json = Json::object();
  for (const auto& [name, milliseconds] : phases) json[name] = milliseconds;
  return json;
}

Json host_json(const Context& context) {
  return {{"isa", compiler::cpu_isa_name(context.cpu_isa())}, {"threads", context.num_threads()}};
}

// Everything about a compile but who asked: the parsed and bound expressions and their native code.
struct Compiled {
  Mods parsed;
  Mods bound;
  std::shared_ptr<const compiler::CpuTile> tile;
};

Result<Compiled> parse_and_bind(Context& context, const dsl::Registry& registry, const attnjit_attention& attention,
                                const CheckedCall& call) {
  Result<Mods> parsed = parse_mods(attention.score_mod, attention.mask_mod, registry);
  if (!parsed) return parsed.failure();
  Result<Mods> bound = bind_mods(*parsed, attention.score_mod, attention.mask_mod, registry, call);
  if (!bound) return bound.failure();
  return Compiled{.parsed = std::move(*parsed), .bound = std::move(*bound), .tile = nullptr};
}

// `collect` receives every intermediate text, beside the files that ATTNJIT_DUMP asks for.
Check compile_tile(Context& context, const attnjit_attention& attention, const CheckedCall& call, std::string_view key,
                   const std::function<void(std::string_view, std::string_view)>& collect, Compiled* compiled) {
  const DumpFiles files(
      context, key,
      fmt::format("score_mod: {}\nmask_mod: {}\n{} {}", attention.score_mod ? attention.score_mod : "none",
                  attention.mask_mod ? attention.mask_mod : "none", shape_text(call.signature),
                  compiler::cpu_isa_name(context.cpu_isa())));
  compiler::CompileOptions options{.isa = context.cpu_isa(), .dump = nullptr};
  if (files.any() || collect) {
    options.dump = [&](std::string_view kind, std::string_view text) {
      if (files.wants(kind)) files.write(kind, text);
      if (collect) collect(kind, text);
    };
  }
  auto tile = compiler::compile_cpu_tile(make_mod_problem(compiled->bound, call), options);
  if (tile.error) return Failure{ATTNJIT_INTERNAL, fmt::format("score_mod does not compile: {}", tile.error->message)};
  compiled->tile = std::move(tile.value);
  return {};
}

// ---- Plans

// Nothing to run, or nothing to attend to: no backend sees these.
bool no_output(const Signature& s) { return s.batch == 0 || s.num_heads == 0 || s.seqlen_q == 0; }
bool no_keys(const Signature& s) { return s.seqlen_kv == 0; }

// Without keys, every row is a fully masked one.
void run_without_keys(const ForwardCall& call) {
  const std::int64_t* shape = call.o.shape;
  const std::int64_t size = dsl::dtype_size(call.o.dtype);
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t h = 0; h < shape[1]; ++h) {
      for (std::int64_t q = 0; q < shape[2]; ++q) {
        const std::int64_t offset = b * call.o.stride[0] + h * call.o.stride[1] + q * call.o.stride[2];
        std::memset(static_cast<char*>(call.o.data) + offset * size, 0, static_cast<std::size_t>(shape[3] * size));
        for (const RowView* rows : {&call.lse, &call.row_max}) {
          if (!rows->data) continue;
          rows->data[b * rows->stride[0] + h * rows->stride[1] + q * rows->stride[2]] =
              -std::numeric_limits<float>::infinity();
        }
      }
    }
  }
}

// The eager loops keep to the instruction set that the compiled code is held to.
MathOptions math_options(const Context& context) {
  MathOptions options;
  switch (context.cpu_isa()) {
    case compiler::CpuIsa::kSse2:
      options.passes = &sse2_passes();
      break;
    case compiler::CpuIsa::kAvx2:
      options.passes = &avx2_passes();
      break;
    case compiler::CpuIsa::kAvx512:
    case compiler::CpuIsa::kAvx512Bf16:
      options.passes = &avx512_passes();
      break;
  }
  return options;
}

attnjit_backend choose_backend(const Signature& s) {
  const auto asked = static_cast<attnjit_backend>(s.backend);
  return asked == ATTNJIT_BACKEND_AUTO ? ATTNJIT_BACKEND_CPU : asked;
}

Result<std::shared_ptr<const Plan>> make_plan(Context& context, const dsl::Registry& registry,
                                              const attnjit_attention& attention, const CheckedCall& call,
                                              std::string_view key) {
  const auto start = std::chrono::steady_clock::now();
  Result<Compiled> compiled = parse_and_bind(context, registry, attention, call);
  if (!compiled) return compiled.failure();
  const auto bound_at = std::chrono::steady_clock::now();

  auto plan = std::make_shared<Plan>();
  const Signature& s = plan->signature = call.signature;
  plan->has_score_mod = attention.score_mod != nullptr;
  plan->has_mask_mod = attention.mask_mod != nullptr;
  plan->score_mod = attention.score_mod ? attention.score_mod : "";
  plan->mask_mod = attention.mask_mod ? attention.mask_mod : "";
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) plan->names.emplace_back(call.capture_names[i]);
  plan->backend = choose_backend(s);

  using Milliseconds = std::chrono::duration<double, std::milli>;
  Json phases = {{"parse_and_bind", Milliseconds(bound_at - start).count()}};
  const std::optional<dsl::Expr>& mask_mod = compiled->parsed.mask_mod;
  Json json = {{"backend", attnjit_backend_name(plan->backend)},
               {"score_mod", dsl::print(compiled->parsed.score_mod)},
               {"mask_mod", mask_mod ? Json(dsl::print(*mask_mod)) : Json()},
               {"problem", shape_text(s)},
               {"host", host_json(context)}};
  if (no_output(s) || no_keys(s)) {
    plan->forward.run = [](const ForwardCall& forward, void*) { run_without_keys(forward); };
  } else if (plan->backend == ATTNJIT_BACKEND_CPU) {
    if (Check failure = compile_tile(context, attention, call, key, nullptr, &*compiled)) return *failure;
    ThreadPool& pool = context.pool();
    plan->forward.workspace_size = cpu_workspace_size(call.forward, *compiled->tile, pool.size());
    plan->forward.run = [tile = compiled->tile, isa = context.cpu_isa(), &pool](const ForwardCall& forward,
                                                                                void* workspace) {
      cpu_forward(forward, *tile, isa, workspace, pool);
    };
    json["hash"] = hash_text(compiled->tile->facts());
    json["facts"] = facts_json(compiled->tile->facts());
    for (const auto& [name, milliseconds] : compiled->tile->phases()) phases[name] = milliseconds;
  } else {
    const Mods& bound = compiled->bound;
    auto math = std::make_shared<const MathPlan>(call.forward, bound.score_mod,
                                                 bound.mask_mod ? &*bound.mask_mod : nullptr, math_options(context));
    if (math->workspace_size() == std::numeric_limits<std::size_t>::max()) {
      return Failure{
          ATTNJIT_UNSUPPORTED,
          fmt::format("no permitted backend serves {}; math: its scores cannot be addressed", shape_text(s))};
    }
    ThreadPool& pool = context.pool();
    plan->forward.workspace_size = math->workspace_size();
    json["passes"] = math->describe();
    plan->forward.run = [math = std::move(math), &pool](const ForwardCall& forward, void* workspace) {
      math->run(forward, workspace, pool);
    };
  }
  const double total = Milliseconds(std::chrono::steady_clock::now() - start).count();
  json["workspace_bytes"] = plan->forward.workspace_size;
  json["compiled"] = true;
  json["compile_ms"] = total;
  json["phases_ms"] = std::move(phases);
  plan->description_compiled = json.dump(2);
  json["compiled"] = false;
  plan->description_cached = json.dump(2);
  if (context.logger().enabled(LogLevel::kInfo)) {
    context.logger().log(LogLevel::kInfo,
                         fmt::format("compiled '{}' for {} on {} in {:.1f} ms", json["score_mod"].get<std::string>(),
                                     shape_text(s), attnjit_backend_name(plan->backend), total));
  }
  return std::shared_ptr<const Plan>(std::move(plan));
}

// ---- What differs between prepare and run

bool same_text(const char* given, bool has, const std::string& text) { return given ? has && text == given : !has; }

Failure changed(std::string_view what, const auto& was, const auto& is) {
  return {ATTNJIT_INVALID_ARGUMENT,
          fmt::format("{} was {} when the plan was prepared and is {} now; prepare again", what, was, is)};
}

std::string dimensions(const std::int64_t* extent, int rank) {
  return fmt::format("({})", fmt::join(extent, extent + rank, ", "));
}

std::string shown_text(bool has, std::string_view text) { return has ? fmt::format("'{}'", text) : "NULL"; }

// The first difference, by name. Only called when there is one.
Failure difference(const Plan& plan, const CheckedCall& call, const attnjit_attention& attention) {
  if (!same_text(attention.score_mod, plan.has_score_mod, plan.score_mod)) {
    return changed("score_mod", shown_text(plan.has_score_mod, plan.score_mod),
                   shown_text(attention.score_mod, attention.score_mod ? attention.score_mod : ""));
  }
  if (!same_text(attention.mask_mod, plan.has_mask_mod, plan.mask_mod)) {
    return changed("mask_mod", shown_text(plan.has_mask_mod, plan.mask_mod),
                   shown_text(attention.mask_mod, attention.mask_mod ? attention.mask_mod : ""));
  }
  const std::size_t given = call.forward.num_captures;
  const std::span names(call.capture_names, given);
  if (!std::ranges::equal(plan.names, names)) {
    return changed("the names in captures", "(" + listed(plan.names) + ")", "(" + listed(names) + ")");
  }

  const Signature& was = plan.signature;
  const Signature& is = call.signature;
  const struct {
    std::string_view what;
    std::int64_t was, is;
  } numbers[] = {{"q's batch", was.batch, is.batch},
                 {"q's number of heads", was.num_heads, is.num_heads},
                 {"k's number of heads", was.num_heads_kv, is.num_heads_kv},
                 {"q's sequence length", was.seqlen_q, is.seqlen_q},
                 {"k's sequence length", was.seqlen_kv, is.seqlen_kv},
                 {"q's head_dim", was.head_dim, is.head_dim},
                 {"v's head_dim", was.head_dim_v, is.head_dim_v}};
  for (const auto& number : numbers) {
    if (number.was != number.is) return changed(number.what, number.was, number.is);
  }
  const auto dtype = [](std::uint8_t value) { return dsl::dtype_name(static_cast<dsl::DType>(value)); };
  if (was.dtype != is.dtype) return changed("q's dtype", dtype(was.dtype), dtype(is.dtype));
  if (was.backend != is.backend) {
    return changed("backend", attnjit_backend_name(static_cast<attnjit_backend>(was.backend)),
                   attnjit_backend_name(static_cast<attnjit_backend>(is.backend)));
  }
  const auto wanted = [](std::uint8_t flag) { return flag ? "given" : "NULL"; };
  if (was.has_lse != is.has_lse) return changed("lse", wanted(was.has_lse), wanted(is.has_lse));
  if (was.has_row_max != is.has_row_max) return changed("row_max", wanted(was.has_row_max), wanted(is.has_row_max));
  static constexpr std::string_view kStrideClasses[] = {"0", "1", "another"};
  const struct {
    std::string_view name;
    const std::uint8_t* was;
    const std::uint8_t* is;
  } strides[] = {{"q", was.q_stride, is.q_stride}, {"k", was.k_stride, is.k_stride}, {"v", was.v_stride, is.v_stride}};
  for (const auto& tensor : strides) {
    for (int d = 0; d < 3; ++d) {
      if (tensor.was[d] != tensor.is[d]) {
        return changed(fmt::format("{}'s stride of dimension {}", tensor.name, d), kStrideClasses[tensor.was[d]],
                       kStrideClasses[tensor.is[d]]);
      }
    }
  }
  for (std::size_t i = 0; i < given; ++i) {
    const Signature::Capture& a = was.captures[i];
    const Signature::Capture& b = is.captures[i];
    const std::string name = dsl::shortened(plan.names[i]);
    if (a.dtype != b.dtype) return changed(fmt::format("captured {}'s dtype", name), dtype(a.dtype), dtype(b.dtype));
    const std::string was_shape = dimensions(a.extent, a.rank);
    const std::string shape = dimensions(b.extent, b.rank);
    if (was_shape != shape) return changed(fmt::format("captured {}'s shape", name), was_shape, shape);
    for (int d = 0; d < a.rank; ++d) {
      if (a.stride_class[d] != b.stride_class[d]) {
        return changed(fmt::format("captured {}'s stride of dimension {}", name, d), kStrideClasses[a.stride_class[d]],
                       kStrideClasses[b.stride_class[d]]);
      }
    }
  }
  return {ATTNJIT_INTERNAL, "the call differs from the prepared one in a way that has no name"};
}

bool same_call(const Plan& plan, const CheckedCall& call, const attnjit_attention& attention) {
  if (!(plan.signature == call.signature)) return false;
  if (!same_text(attention.score_mod, plan.has_score_mod, plan.score_mod)) return false;
  if (!same_text(attention.mask_mod, plan.has_mask_mod, plan.mask_mod)) return false;
  for (std::size_t i = 0; i < plan.names.size(); ++i) {
    if (plan.names[i] != call.capture_names[i]) return false;
  }
  return true;
}

}  // namespace

Result<PlanHandle> prepare(const std::shared_ptr<Context>& context, const attnjit_attention* attention) {
  CheckedCall call;
  if (Check failure = check_call(attention, Purpose::kPrepare, &call)) return *failure;
  const RegistrySnapshot snapshot = context->registry();
  const std::string key = make_key(call, *attention, snapshot.generation);
  auto found =
      context->plans().get(key, [&] { return make_plan(*context, *snapshot.registry, *attention, call, key); });
  if (!found.outcome) return found.outcome.failure();
  return PlanHandle{.context = context, .plan = std::move(*found.outcome), .compiled_here = found.compiled_here};
}

Check run(const PlanHandle& handle, const attnjit_attention* attention, void* workspace, std::size_t workspace_size,
          void* stream) {
  const Plan& plan = *handle.plan;
  if (stream) return Failure{ATTNJIT_INVALID_ARGUMENT, "stream is not NULL; a CPU plan runs on the calling thread"};
  CheckedCall call;
  if (Check failure = check_call(attention, Purpose::kRun, &call)) return failure;
  if (!same_call(plan, call, *attention)) return difference(plan, call, *attention);
  if (Check failure = check_workspace(call, workspace, workspace_size, plan.forward.workspace_size)) return failure;
  if (handle.context->logger().enabled(LogLevel::kTrace)) {
    handle.context->logger().log(LogLevel::kTrace, fmt::format("run {}", shape_text(plan.signature)));
  }
  if (!no_output(plan.signature)) plan.forward.run(call.forward, workspace);
  return {};
}

Result<std::string> explain(Context& context, const attnjit_attention* attention, bool dump) {
  CheckedCall call;
  if (Check failure = check_call(attention, Purpose::kExplain, &call)) return *failure;
  const RegistrySnapshot snapshot = context.registry();
  Result<Compiled> compiled = parse_and_bind(context, *snapshot.registry, *attention, call);
  if (!compiled) return compiled.failure();
  Json dumps = Json::object();
  std::function<void(std::string_view, std::string_view)> collect;
  if (dump) collect = [&](std::string_view kind, std::string_view text) { dumps[std::string(kind)] = text; };
  const std::string key = make_key(call, *attention, snapshot.generation);
  if (Check failure = compile_tile(context, *attention, call, key, collect, &*compiled)) return *failure;

  const compiler::ModFacts& facts = compiled->tile->facts();
  Json captures = Json::array();
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) {
    const dsl::CaptureView& capture = call.captures[i];
    captures.push_back({{"name", call.capture_names[i]},
                        {"dtype", dsl::dtype_name(capture.dtype)},
                        {"type", dsl::type_name(dsl::value_type(capture.dtype))},
                        {"shape", Json(std::vector<std::int64_t>(capture.extent, capture.extent + capture.rank))}});
  }
  const auto expression = [](const dsl::Expr& parsed, const dsl::Expr& bound) {
    return Json{{"canonical", dsl::print(parsed)},
                {"typed", dsl::print(bound)},
                {"type", dsl::type_name(bound[bound.root].type)}};
  };
  const std::optional<dsl::Expr>& mask = compiled->parsed.mask_mod;
  const std::optional<dsl::Expr>& bound_mask = compiled->bound.mask_mod;
  Json json = {{"score_mod", expression(compiled->parsed.score_mod, compiled->bound.score_mod)},
               {"mask_mod", mask && bound_mask ? expression(*mask, *bound_mask) : Json()},
               {"captures", std::move(captures)},
               {"problem", shape_text(call.signature)},
               {"backend", attnjit_backend_name(choose_backend(call.signature))},
               {"host", host_json(context)},
               {"hash", hash_text(facts)},
               {"facts", facts_json(facts)},
               {"phases_ms", phases_json(compiled->tile->phases())}};
  for (const auto& [kind, text] : dumps.items()) json[kind] = text;
  return json.dump(2);
}

}  // namespace attnjit::runtime
