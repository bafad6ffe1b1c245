// Scores by cuBLAS, the mod, softmax, the product with V: each a launch, with the copies that cuBLAS needs in between.
#include "runtime/cuda_math_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <utility>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/math/config.h"
#include "runtime/cuda_call.h"

namespace attnjit::runtime {
namespace {

constexpr const char* kModEntry = "attnjit_math_mod";
constexpr const char* kZeroRowsEntry = "attnjit_math_zero_rows";
constexpr const char* kCopyEntry = "attnjit_math_copy";

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();

math::Element element_of(dsl::DType dtype) {
  return dtype == dsl::DType::kF16    ? math::Element::kF16
         : dtype == dsl::DType::kBF16 ? math::Element::kBF16
                                      : math::Element::kF32;
}

// How the mod's kernel covers the scores.
struct ModGrid {
  int log2_vectors;
  unsigned threads;
  std::int64_t kv_tiles, q_tiles;
};

ModGrid mod_grid(std::int64_t seqlen_q, std::int64_t seqlen_kv) {
  const auto vectors = static_cast<std::uint64_t>(ceil_div(seqlen_kv, math::kVector));
  const std::uint64_t width = std::min<std::uint64_t>(std::bit_ceil(vectors), math::kModThreads);
  const auto rows = static_cast<std::uint64_t>(ceil_div(seqlen_q, math::kModRows));
  const std::uint64_t height = std::min<std::uint64_t>(std::bit_ceil(rows), math::kModThreads / width);
  return {.log2_vectors = std::countr_zero(width),
          .threads = static_cast<unsigned>(width * height),
          .kv_tiles = ceil_div(static_cast<std::int64_t>(vectors), static_cast<std::int64_t>(width)),
          .q_tiles = ceil_div(seqlen_q, static_cast<std::int64_t>(math::kModRows * height))};
}

}  // namespace

std::string CudaMathPlan::refuse(const ForwardCall& problem) {
  if (std::string reason = CudaProducts::refuse(problem); !reason.empty()) return reason;
  const ModGrid grid = mod_grid(problem.q.shape[2], problem.k.shape[2]);
  if (grid.kv_tiles * grid.q_tiles > kMaxInt) return "its scores cannot be addressed";
  return {};
}

const char* CudaMathPlan::softmax_entry(std::int64_t seqlen_kv) {
  if (seqlen_kv <= math::kMaxWarp2) return "attnjit_math_softmax_warp2";
  if (seqlen_kv <= math::kMaxWarp8) return "attnjit_math_softmax_warp8";
  if (seqlen_kv <= math::kMaxBlock) return "attnjit_math_softmax_block";
  return "attnjit_math_softmax_long";
}

CudaMathPlan::CudaMathPlan(const ForwardCall& problem, Parts parts)
    : parts_(std::move(parts)), products_(problem, parts_.cublas, parts_.copy, parts_.arch) {
  const CudaProducts& p = products_;
  empty_ = p.scores_size();
  q_ = v_ = empty_ + CudaProducts::size_of(p.batch * p.heads * p.seqlen_q, 1, 1);
  k_ = q_ + p.packed_size(p.heads, p.seqlen_q, p.head_dim);
  o_ = v_ + p.packed_size(p.heads_kv, p.seqlen_kv, p.head_dim_v);
  cublas_ = std::max(k_ + p.packed_size(p.heads_kv, p.seqlen_kv, p.head_dim),
                     o_ + p.packed_size(p.heads, p.seqlen_q, p.head_dim_v));
  workspace_size_ = cublas_ + p.cublas_size();
}

std::string CudaMathPlan::describe() const {
  const std::string heads = fmt::format("({}, {}, {}, ", products_.batch, products_.heads, products_.seqlen_q);
  std::string text = fmt::format("q k^T by {}: float32 {}{})\n", products_.description(), heads, products_.seqlen_kv);
  if (!parts_.mod_is_identity) text += "mod in place\n";
  text +=
      fmt::format("softmax by {}: {} in place\n", softmax_entry(products_.seqlen_kv), dsl::dtype_name(products_.dtype));
  text += fmt::format("p v by {}: {} {}{})\n", products_.description(), dsl::dtype_name(products_.dtype), heads,
                      products_.head_dim_v);
  text += "zeros for rows without a kept element\n";
  return text;
}

Check CudaMathPlan::run(const ForwardCall& call, void* workspace, CudaStream stream) const {
  char* const bytes = static_cast<char*>(workspace);
  if (products_.seqlen_kv == 0) {
    if (Check failure = run_softmax(call, bytes, stream)) return failure;
    return run_zero_rows(call, bytes, stream);
  }
  const ScoreScale scale = score_scale(call.scale, parts_.score_factor);
  // A product times 0 would not see NaN and infinity in q and k.
  const float alpha = scale.main == 0.0f ? 1.0f : scale.main;
  const float factor = scale.main == 0.0f ? 0.0f : scale.rest;
  const CudaProducts::Queue queue{bytes + cublas_, stream};
  if (Check failure = products_.multiply_features(alpha, {call.q, bytes + q_}, {call.k, bytes + k_}, bytes, queue)) {
    return failure;
  }
  if (!parts_.mod_is_identity || factor != 1.0f) {
    if (Check failure = run_mod(call, factor, bytes, stream)) return failure;
  }
  if (Check failure = run_softmax(call, bytes, stream)) return failure;
  const float unscale = 1.0f / math::probability_scale(element_of(products_.dtype));
  if (Check failure = products_.multiply_keys(unscale, bytes, {call.v, bytes + v_}, {call.o, bytes + o_}, queue)) {
    return failure;
  }
  return run_zero_rows(call, bytes, stream);
}

Check CudaMathPlan::run_mod(const ForwardCall& call, float factor, char* workspace, CudaStream stream) const {
  const ModGrid grid = mod_grid(products_.seqlen_q, products_.seqlen_kv);
  math::ModParams params{.scores = reinterpret_cast<float*>(workspace),
                         .pitch = products_.pitch,
                         .factor = factor,
                         .num_heads = static_cast<int>(products_.heads),
                         .seqlen_q = static_cast<int>(products_.seqlen_q),
                         .seqlen_kv = static_cast<int>(products_.seqlen_kv),
                         .heads = static_cast<unsigned>(products_.batch * products_.heads),
                         .q_idx_origin = 0,
                         .kv_idx_origin = 0,
                         .log2_vectors = grid.log2_vectors,
                         .kv_tiles = static_cast<unsigned>(grid.kv_tiles),
                         .captured = {}};
  fill_captured(call, params.captured);
  return parts_.mod->launch({.x = static_cast<unsigned>(grid.kv_tiles * grid.q_tiles),
                             .y = static_cast<unsigned>(std::min(products_.batch * products_.heads, kMaxGridY))},
                            grid.threads, &params, stream);
}

Check CudaMathPlan::run_softmax(const ForwardCall& call, char* workspace, CudaStream stream) const {
  const std::int64_t rows = products_.batch * products_.heads * products_.seqlen_q;
  math::SoftmaxParams params{.scores = reinterpret_cast<float*>(workspace),
                             .pitch = products_.pitch,
                             .empty = reinterpret_cast<unsigned char*>(workspace + empty_),
                             .lse = call.lse.data,
                             .row_max = call.row_max.data,
                             .lse_stride = {},
                             .row_max_stride = {},
                             .rows = static_cast<unsigned>(rows),
                             .num_heads = static_cast<unsigned>(products_.heads),
                             .seqlen_q = static_cast<unsigned>(products_.seqlen_q),
                             .seqlen_kv = static_cast<int>(products_.seqlen_kv)};
  std::copy_n(call.lse.stride, 3, params.lse_stride);
  std::copy_n(call.row_max.stride, 3, params.row_max_stride);
  std::int64_t blocks = rows;
  std::int64_t threads = math::kLongThreads;
  if (products_.seqlen_kv <= math::kMaxWarp8) {
    threads = math::kWarpThreads;
    blocks = ceil_div(rows, threads / 32);
  } else if (products_.seqlen_kv <= math::kMaxBlock) {
    threads = ceil_div(products_.seqlen_kv, 32 * math::kBlockVectors * math::kVector) * 32;
  }
  return parts_.softmax->launch({.x = static_cast<unsigned>(blocks)}, static_cast<unsigned>(threads), &params, stream);
}

// 0 times a V that is not finite stays out of an empty row.
Check CudaMathPlan::run_zero_rows(const ForwardCall& call, char* workspace, CudaStream stream) const {
  const math::ZeroParams params{.empty = reinterpret_cast<unsigned char*>(workspace + empty_),
                                .o = call.o.data,
                                .o_stride = {call.o.stride[0], call.o.stride[1], call.o.stride[2]},
                                .rows = static_cast<unsigned>(products_.batch * products_.heads * products_.seqlen_q),
                                .num_heads = static_cast<unsigned>(products_.heads),
                                .seqlen_q = static_cast<unsigned>(products_.seqlen_q),
                                .head_dim_v = static_cast<int>(products_.head_dim_v)};
  return parts_.zero_rows->launch({.x = static_cast<unsigned>(ceil_div(params.rows, math::kWarpThreads))},
                                  math::kWarpThreads, &params, stream);
}

// ---- Making one

Result<CudaMathBinaries> build_cuda_math(const Request& request, compiler::CudaArch arch, const CollectText& collect) {
  if (Check failure = check_cuda_arch(arch)) return *failure;
  if (std::string reason = CudaMathPlan::refuse(request.call.forward); !reason.empty()) {
    return Failure{ATTNJIT_UNSUPPORTED, std::move(reason)};
  }
  const Signature& s = request.call.signature;
  compiler::CompileOptions options{.dump = request.files.collector(collect)};
  auto emitted = compiler::emit_cuda_math(mod_problem(request.mods, request.call, s.seqlen_q, s.seqlen_kv), options);
  if (emitted.error) return compile_failure(s, emitted.error->message);
  CudaMathBinaries binaries{.facts = std::move(emitted.value.facts),
                            .score_factor = emitted.value.source.score_factor,
                            .mod = {},
                            .kernels = {},
                            .phases = std::move(emitted.value.phases)};
  const auto find = [&](const compiler::CudaSource& source, FoundBinary* binary) -> Check {
    Result<FoundBinary> found = find_cuda_binary(request.context, source, arch, options);
    if (!found) return found.failure();
    *binary = std::move(*found);
    add_phases(binary->phases, &binaries.phases);
    return {};
  };
  options.dump = binary_dumps(request, collect);
  if (Check failure = find(emitted.value.source, &binaries.mod)) return *failure;
  // Nothing of the expression is in these.
  options.dump = nullptr;
  if (Check failure = find(compiler::cuda_math_kernels(request.call.forward.q.dtype), &binaries.kernels)) {
    return *failure;
  }
  return binaries;
}

Json kernels_json(const CudaMathBinaries& binaries, std::int64_t seqlen_kv) {
  return Json::array({binary_json(binaries.mod, kModEntry),
                      binary_json(binaries.kernels, CudaMathPlan::softmax_entry(seqlen_kv)),
                      binary_json(binaries.kernels, kZeroRowsEntry), binary_json(binaries.kernels, kCopyEntry)});
}

Result<ReadyBackend> prepare_cuda_math(const Request& request) {
  Result<std::shared_ptr<CudaDevice>> found = request.context.cuda_device(request.call.signature.device);
  if (!found) return found.failure();
  const std::shared_ptr<CudaDevice>& device = *found;
  const std::int64_t seqlen_kv = request.call.signature.seqlen_kv;
  Result<CudaMathBinaries> binaries = build_cuda_math(request, {.number = device->arch(), .specific = false}, nullptr);
  if (!binaries) return binaries.failure();

  const auto start = std::chrono::steady_clock::now();
  CudaMathPlan::Parts parts;
  parts.arch = device->arch();
  parts.score_factor = binaries->score_factor;
  parts.mod_is_identity = binaries->facts.score_class == compiler::ScoreClass::kIdentity && !binaries->facts.has_mask &&
                          binaries->score_factor == std::numbers::log2e;
  const struct {
    std::shared_ptr<const CudaKernel>* kernel;
    const FoundBinary& binary;
    const char* entry;
  } wanted[] = {{&parts.mod, binaries->mod, kModEntry},
                {&parts.softmax, binaries->kernels, CudaMathPlan::softmax_entry(seqlen_kv)},
                {&parts.zero_rows, binaries->kernels, kZeroRowsEntry},
                {&parts.copy, binaries->kernels, kCopyEntry}};
  for (const auto& [kernel, binary, entry] : wanted) {
    auto loaded = CudaKernel::load(device, binary.binary->cubin, entry, 0);
    if (!loaded) return loaded.failure();
    *kernel = std::move(*loaded);
  }
  const auto loaded_at = std::chrono::steady_clock::now();
  Result<std::shared_ptr<const Cublas>> cublas = Cublas::get(device, request.context.environment().cublas);
  if (!cublas) return cublas.failure();
  parts.cublas = std::move(*cublas);
  const auto end = std::chrono::steady_clock::now();

  using Milliseconds = std::chrono::duration<double, std::milli>;
  ReadyBackend ready;
  ready.phases = std::move(binaries->phases);
  ready.phases.emplace_back("load", Milliseconds(loaded_at - start).count());
  ready.phases.emplace_back("cublas", Milliseconds(end - loaded_at).count());
  const auto plan = std::make_shared<const CudaMathPlan>(request.call.forward, std::move(parts));
  ready.description = {{"device", device->name()},
                       {"hash", hash_text(binaries->facts)},
                       {"facts", facts_json(binaries->facts)},
                       {"passes", plan->describe()},
                       {"kernels", kernels_json(*binaries, seqlen_kv)}};
  ready.forward.workspace_size = plan->workspace_size();
  ready.forward.run = [plan](const ForwardCall& call, void* workspace, CudaStream stream) {
    return plan->run(call, workspace, stream);
  };
  return ready;
}

}  // namespace attnjit::runtime
