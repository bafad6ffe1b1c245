// Picks a backend and makes it ready.
#include "runtime/backends.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "runtime/cpu_backend.h"
#include "runtime/cpu_backward.h"
#include "runtime/cuda_math_backend.h"
#include "runtime/cuda_math_backward.h"
#include "runtime/math_backend.h"
#include "runtime/math_backward.h"
#include "runtime/sm80_backend.h"
#include "runtime/sm80_backward.h"
#include "runtime/sm90_backend.h"

namespace attnjit::runtime {
namespace {

// ---- The CPU's

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

// Zeroes a strided tensor of elements of `size` bytes.
void zero(char* data, std::int64_t size, int rank, const std::int64_t* extent, const std::int64_t* stride) {
  if (rank == 0 || (rank == 1 && *stride == 1)) {
    std::memset(data, 0, static_cast<std::size_t>(rank == 0 ? size : *extent * size));
    return;
  }
  for (std::int64_t i = 0; i < *extent; ++i) zero(data + i * *stride * size, size, rank - 1, extent + 1, stride + 1);
}

// Without an output or keys nothing contributes to a gradient.
void zero_gradients(const ForwardCall& call, const Gradients& gradients) {
  for (const TensorView* t : {&gradients.dq, &gradients.dk, &gradients.dv}) {
    if (t->data) zero(static_cast<char*>(t->data), dsl::dtype_size(t->dtype), 4, t->shape, t->stride);
  }
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    const CaptureGradient& gradient = gradients.captures[i];
    const dsl::CaptureView& captured = call.captures[i];
    if (!gradient.data) continue;
    zero(static_cast<char*>(gradient.data), dsl::dtype_size(captured.dtype), captured.rank, captured.extent,
         gradient.stride);
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

Result<ReadyBackend> prepare_cpu(const Request& request) {
  ReadyBackend ready;
  if (no_keys(request.call.signature)) {
    ready.forward.run = [](const ForwardCall& call, void*, CudaStream) {
      run_without_keys(call);
      return Check();
    };
    return ready;
  }
  Result<std::shared_ptr<const compiler::CpuTile>> tile = compile_tile(request, nullptr);
  if (!tile) return tile.failure();
  ThreadPool& pool = request.context.pool();
  ready.forward.workspace_size = cpu_workspace_size(request.call.forward, **tile, pool.size());
  ready.forward.run = [tile = *tile, isa = request.context.cpu_isa(), &pool](const ForwardCall& call, void* workspace,
                                                                             CudaStream) {
    cpu_forward(call, *tile, isa, workspace, pool);
    return Check();
  };
  ready.description["hash"] = hash_text((*tile)->facts());
  ready.description["facts"] = facts_json((*tile)->facts());
  ready.phases = (*tile)->phases();
  return ready;
}

Result<ReadyBackend> prepare_cpu_backward(const Request& request) {
  Result<std::shared_ptr<const compiler::CpuGradientTile>> tile = compile_gradient_tile(request, nullptr);
  if (!tile) return tile.failure();
  const WantedGradients wants = wanted_gradients(request.call.signature);
  ThreadPool& pool = request.context.pool();
  ReadyBackend ready;
  ready.backward.workspace_size = cpu_backward_workspace_size(request.call.forward, wants, **tile, pool.size());
  ready.backward.run = [tile = *tile, isa = request.context.cpu_isa(), &pool](
                           const ForwardCall& call, const Gradients& gradients, void* workspace, CudaStream) {
    cpu_backward(call, gradients, *tile, isa, workspace, pool);
    return Check();
  };
  ready.description["hash"] = hash_text((*tile)->facts());
  ready.description["facts"] = gradient_facts_json((*tile)->facts(), request.call);
  ready.phases = (*tile)->phases();
  return ready;
}

Result<ReadyBackend> prepare_sm90_backward(const Request&) { return refuse_sm90_backward(); }

Result<ReadyBackend> prepare_math(const Request& request) {
  if (request.call.signature.device != kCpu) return prepare_cuda_math(request);
  ReadyBackend ready;
  if (no_keys(request.call.signature)) {
    ready.forward.run = [](const ForwardCall& call, void*, CudaStream) {
      run_without_keys(call);
      return Check();
    };
    return ready;
  }
  const Mods& bound = request.mods;
  auto math =
      std::make_shared<const MathPlan>(request.call.forward, bound.score_mod,
                                       bound.mask_mod ? &*bound.mask_mod : nullptr, math_options(request.context));
  if (math->workspace_size() == std::numeric_limits<std::size_t>::max()) {
    return Failure{ATTNJIT_UNSUPPORTED, "its scores cannot be addressed"};
  }
  ready.forward.workspace_size = math->workspace_size();
  ready.description["passes"] = math->describe();
  ready.forward.run = [math = std::move(math), &pool = request.context.pool()](const ForwardCall& call, void* workspace,
                                                                               CudaStream) {
    math->run(call, workspace, pool);
    return Check();
  };
  return ready;
}

Result<ReadyBackend> prepare_math_backward(const Request& request) {
  if (request.call.signature.device != kCpu) return prepare_cuda_math_backward(request);
  const Mods& bound = request.mods;
  auto math = std::make_shared<const MathBackwardPlan>(request.call.forward, wanted_gradients(request.call.signature),
                                                       bound.score_mod, bound.mask_mod ? &*bound.mask_mod : nullptr,
                                                       math_options(request.context));
  if (math->workspace_size() == std::numeric_limits<std::size_t>::max()) {
    return Failure{ATTNJIT_UNSUPPORTED, "its scores cannot be addressed"};
  }
  ReadyBackend ready;
  ready.backward.workspace_size = math->workspace_size();
  ready.description["passes"] = math->describe();
  ready.backward.run = [math = std::move(math), &pool = request.context.pool()](
                           const ForwardCall& call, const Gradients& gradients, void* workspace, CudaStream) {
    math->run(call, gradients, workspace, pool);
    return Check();
  };
  return ready;
}

// ---- The choice

// Best first.
struct Backend {
  attnjit_backend id;
  bool on_cpu, on_cuda;
  Result<ReadyBackend> (*prepare)(const Request&);
  Result<ReadyBackend> (*prepare_backward)(const Request&);
};
constexpr std::array<Backend, 4> kBackends = {
    {{ATTNJIT_BACKEND_SM90, false, true, prepare_sm90, prepare_sm90_backward},
     {ATTNJIT_BACKEND_SM80, false, true, prepare_sm80, prepare_sm80_backward},
     {ATTNJIT_BACKEND_CPU, true, false, prepare_cpu, prepare_cpu_backward},
     {ATTNJIT_BACKEND_MATH, true, true, prepare_math, prepare_math_backward}}};

// Why a call cannot be given to `backend`, as far as that is known without trying; empty where it can.
std::string why_not(const Backend& backend, const Context& context, const Signature& s) {
  const auto asked = static_cast<attnjit_backend>(s.backend);
  if (asked != ATTNJIT_BACKEND_AUTO && asked != backend.id) return "not asked for";
  if (!context.permits(backend.id)) return "not permitted by the context's options or ATTNJIT_BACKENDS";
  if (s.device == kCpu ? !backend.on_cpu : !backend.on_cuda) {
    return fmt::format("the tensors are on {}", device_text(s.device));
  }
  return {};
}

// What serves a call without a backend's code, where there is nothing to compute.
std::optional<ReadyBackend> prepare_empty(const Signature& s) {
  ReadyBackend ready;
  if (s.backward && s.device == kCpu && (no_output(s) || no_keys(s))) {
    ready.backward.run = [](const ForwardCall& call, const Gradients& gradients, void*, CudaStream) {
      zero_gradients(call, gradients);
      return Check();
    };
    return ready;
  }
  if (s.backward || !no_output(s)) return std::nullopt;
  ready.forward.run = [](const ForwardCall&, void*, CudaStream) { return Check(); };
  return ready;
}

Result<ReadyBackend> prepare_with(const Backend& backend, const Request& request) {
  const Signature& s = request.call.signature;
  if (std::optional<ReadyBackend> ready = prepare_empty(s)) return std::move(*ready);
  if (!s.backward) return backend.prepare(request);
  return backend.prepare_backward(request);
}

// Gathers why each backend does not serve.
class Reasons {
 public:
  void add(attnjit_backend backend, std::string_view reason) {
    text_ += fmt::format("{}{}: {}", text_.empty() ? "" : "; ", attnjit_backend_name(backend), reason);
  }
  Failure failure(const Signature& s) const {
    return {ATTNJIT_UNSUPPORTED,
            fmt::format("no permitted backend serves {} on {}; {}", shape_text(s), device_text(s.device), text_)};
  }

 private:
  std::string text_;
};

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

// Runs `compile` for the problem as the CPU's tiles see it.
template <typename Tile>
Result<Tile> compile_for_cpu(const Request& request, const CollectText& collect,
                             compiler::CompileResult<Tile> (*compile)(const compiler::ModProblem&,
                                                                      const compiler::CompileOptions&)) {
  const compiler::CompileOptions options{.isa = request.context.cpu_isa(), .dump = request.files.collector(collect)};
  // A panel always has all its lanes; those of a shorter problem reach beyond it.
  auto tile = compile(
      mod_problem(request.mods, request.call, std::max<std::int64_t>(request.call.signature.seqlen_q, cpu::kPanelLanes),
                  request.call.signature.seqlen_kv),
      options);
  if (tile.error) return compile_failure(request.call.signature, tile.error->message);
  return std::move(tile.value);
}

std::string_view gradient_need_name(compiler::GradientNeed need) {
  switch (need) {
    case compiler::GradientNeed::kNothing:
      return "nothing";
    case compiler::GradientNeed::kFactor:
      return "factor";
    case compiler::GradientNeed::kScore:
      return "score";
  }
  return "?";
}

std::string_view sink_level_name(compiler::SinkLevel level) {
  switch (level) {
    case compiler::SinkLevel::kBlock:
      return "block";
    case compiler::SinkLevel::kRow:
      return "row";
    case compiler::SinkLevel::kColumn:
      return "column";
    case compiler::SinkLevel::kDiagonal:
      return "diagonal";
    case compiler::SinkLevel::kElement:
      return "element";
  }
  return "?";
}

}  // namespace

Result<std::vector<attnjit_backend>> permitted_backends(const Context& context, const Signature& signature) {
  std::vector<attnjit_backend> permitted;
  Reasons reasons;
  for (const Backend& backend : kBackends) {
    const std::string reason = why_not(backend, context, signature);
    if (reason.empty()) permitted.push_back(backend.id);
    reasons.add(backend.id, reason);
  }
  if (permitted.empty()) return reasons.failure(signature);
  return permitted;
}

Result<ReadyBackend> prepare_backend(const Request& request) {
  const Signature& s = request.call.signature;
  Reasons reasons;
  for (const Backend& backend : kBackends) {
    std::string reason = why_not(backend, request.context, s);
    if (reason.empty()) {
      Result<ReadyBackend> ready = prepare_with(backend, request);
      if (ready) {
        ready->backend = backend.id;
        return ready;
      }
      // A backend that broke is no reason to take a slower one in silence.
      if (ready.failure().status != ATTNJIT_UNSUPPORTED) return ready;
      reason = ready.failure().message;
    }
    reasons.add(backend.id, reason);
  }
  return reasons.failure(s);
}

CollectText binary_dumps(const Request& request, const CollectText& collect) {
  // Texts of the emission do not need a compile.
  if (!collect && !request.files.wants("ptx") && !request.files.wants("cubin")) return nullptr;
  return request.files.collector(collect);
}

Result<std::shared_ptr<const compiler::CpuTile>> compile_tile(const Request& request, const CollectText& collect) {
  return compile_for_cpu(request, collect, compiler::compile_cpu_tile);
}

Result<std::shared_ptr<const compiler::CpuGradientTile>> compile_gradient_tile(const Request& request,
                                                                               const CollectText& collect) {
  return compile_for_cpu(request, collect, compiler::compile_cpu_gradient_tile);
}

compiler::ModProblem mod_problem(const Mods& bound, const CheckedCall& call, std::int64_t seqlen_q,
                                 std::int64_t seqlen_kv) {
  const Signature& s = call.signature;
  compiler::ModProblem problem;
  problem.score_mod = bound.score_mod;
  problem.mask_mod = bound.mask_mod;
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) {
    const Signature::Capture& capture = s.captures[i];
    compiler::CaptureInfo info;
    info.dtype = static_cast<dsl::DType>(capture.dtype);
    info.offsets_fit_32 = capture.offsets_fit_32 != 0;
    for (int d = 0; d < capture.rank; ++d) {
      info.extent.push_back(capture.extent[d]);
      info.stride_class.push_back(static_cast<compiler::StrideClass>(capture.stride_class[d]));
    }
    problem.captures.push_back(std::move(info));
  }
  problem.batch = std::max<std::int64_t>(s.batch, 1);
  problem.num_heads = std::max<std::int64_t>(s.num_heads, 1);
  problem.seqlen_q = std::max<std::int64_t>(seqlen_q, 1);
  problem.seqlen_kv = std::max<std::int64_t>(seqlen_kv, 1);
  problem.gradients = s.capture_gradients;
  problem.partial_keys = s.partial_keys != 0;
  return problem;
}

Failure compile_failure(const Signature& s, std::string_view message) {
  return {ATTNJIT_INTERNAL,
          fmt::format("{}score_mod does not compile: {}", s.backward ? "the gradient of " : "", message)};
}

std::string shape_text(const Signature& s) {
  return fmt::format("B={} Hq={} Hkv={} Sq={} Skv={} D={} Dv={} {}{}", s.batch, s.num_heads, s.num_heads_kv, s.seqlen_q,
                     s.seqlen_kv, s.head_dim, s.head_dim_v, dsl::dtype_name(static_cast<dsl::DType>(s.dtype)),
                     s.backward ? " backward" : "");
}

std::string hash_text(const compiler::ModFacts& facts) {
  return fmt::format("{:016x}{:016x}", facts.hash_high, facts.hash_low);
}

namespace {

Json cost_json(const compiler::ModCost& cost) {
  Json json = Json::object();
  const std::pair<const char*, const compiler::Slots&> parts[] = {
      {"score", cost.score},       {"mask", cost.mask},     {"gradient", cost.gradient},
      {"diagonal", cost.diagonal}, {"column", cost.column}, {"row", cost.row}};
  for (const auto& [name, slots] : parts) {
    if (slots == compiler::Slots() && &slots != &cost.score) continue;
    json[name] = {{"alu", slots.alu}, {"fma", slots.fma}, {"mufu", slots.mufu}, {"load", slots.load}};
  }
  return json;
}

}  // namespace

Json facts_json(const compiler::ModFacts& facts) {
  Json json = {{"score_class", score_class_name(facts.score_class)},
               {"has_mask", facts.has_mask},
               {"mask_reads_score", facts.mask_reads_score},
               {"knows_tiles", facts.knows_tiles},
               {"knows_rows", facts.knows_rows},
               {"knows_kv_range", facts.knows_kv_range},
               {"knows_q_range", facts.knows_q_range},
               {"reads_proven", facts.reads_proven},
               {"reads_clamped", facts.reads_clamped},
               {"indices_fit_32", facts.indices_fit_32}};
  if (facts.score_bounds) json["score_bounds"] = {facts.score_bounds->low, facts.score_bounds->high};
  if (facts.folded) {
    json["has_shift"] = facts.folded->has_shift;
    json["additive"] = facts.folded->additive;
    json["linear"] = facts.folded->linear;
    json["drifts"] = facts.folded->drifts;
  }
  if (facts.cost) json["cost"] = cost_json(*facts.cost);
  return json;
}

Json gradient_facts_json(const compiler::ModFacts& facts, const CheckedCall& call) {
  Json json = facts_json(facts);
  json["gradient_need"] = gradient_need_name(facts.gradient_need);
  Json& sinks = json["sinks"] = Json::array();
  for (const compiler::SinkFacts& sink : facts.sinks) {
    sinks.push_back({{"capture", call.capture_names[sink.capture]},
                     {"level", sink_level_name(sink.level)},
                     {"row_shift", sink.row_shift},
                     {"data_dependent", sink.data_dependent},
                     {"injective", sink.injective}});
  }
  return json;
}

Json gradients_json(const CheckedCall& call) {
  const Signature& s = call.signature;
  Json wanted = Json::array();
  if (s.wants_dq) wanted.push_back("dq");
  if (s.wants_dk) wanted.push_back("dk");
  if (s.wants_dv) wanted.push_back("dv");
  Json captures = Json::array();
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) {
    if (s.capture_gradients >> i & 1u) captures.push_back(call.capture_names[i]);
  }
  return {{"wanted", std::move(wanted)},
          {"captures", std::move(captures)},
          {"grad_lse", s.has_grad_lse != 0},
          {"deterministic", s.deterministic != 0},
          {"partial_keys", s.partial_keys != 0}};
}

Json phases_json(const compiler::PhaseTimes& phases) {
  Json json = Json::object();
  for (const auto& [name, milliseconds] : phases) json[name] = milliseconds;
  return json;
}

Json host_json(const Context& context) {
  return {{"isa", compiler::cpu_isa_name(context.cpu_isa())}, {"threads", context.num_threads()}};
}

Json binary_json(const FoundBinary& found, std::string_view entry) {
  Json json = {{"entry", entry}, {"key", found.key}, {"origin", binary_origin_name(found.origin)}};
  for (const compiler::CudaResources& resources : found.binary->resources) {
    if (resources.entry != entry) continue;
    json["registers"] = resources.registers;
    json["static_shared_bytes"] = resources.static_shared_bytes;
    json["spill_store_bytes"] = resources.spill_store_bytes;
    json["spill_load_bytes"] = resources.spill_load_bytes;
    json["stack_bytes"] = resources.stack_bytes;
  }
  json["warnings"] = found.binary->warnings;
  json["phases_ms"] = phases_json(found.phases);
  return json;
}

}  // namespace attnjit::runtime
