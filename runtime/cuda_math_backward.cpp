// Scores and gradients of probabilities by cuBLAS, the mod's pass over both, products with what it leaves.
#include "runtime/cuda_math_backward.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <utility>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/math/config.h"
#include "runtime/cuda_binaries.h"
#include "runtime/cuda_call.h"

namespace attnjit::runtime {
namespace {

constexpr const char* kModEntry = "attnjit_math_mod_backward";
constexpr const char* kDeltaEntry = "attnjit_math_delta";
constexpr const char* kCopyEntry = "attnjit_math_copy";

math::Element element_of(dsl::DType dtype) {
  return dtype == dsl::DType::kF16    ? math::Element::kF16
         : dtype == dsl::DType::kBF16 ? math::Element::kBF16
                                      : math::Element::kF32;
}

// How the mod's kernel covers the scores: all keys of a few queries per block, of whole warps.
struct RowsGrid {
  int log2_vectors;
  unsigned threads;
  std::int64_t tiles;  // of queries
};

RowsGrid rows_grid(std::int64_t seqlen_q, std::int64_t seqlen_kv) {
  const auto vectors = static_cast<std::uint64_t>(ceil_div(seqlen_kv, math::kVector));
  const std::uint64_t width = std::min<std::uint64_t>(std::bit_ceil(vectors), math::kModThreads);
  const auto rows = static_cast<std::uint64_t>(ceil_div(seqlen_q, math::kModRows));
  std::uint64_t height = std::min<std::uint64_t>(std::bit_ceil(rows), math::kModThreads / width);
  height = std::max<std::uint64_t>(height, 32 / std::min<std::uint64_t>(width, 32));
  return {.log2_vectors = std::countr_zero(width),
          .threads = static_cast<unsigned>(width * height),
          .tiles = ceil_div(seqlen_q, static_cast<std::int64_t>(math::kModRows * height))};
}

// Of a scale: what products are multiplied by and what the mod's kernel does. A product times 0 would not see NaN and
// infinity in its operands.
struct Factors {
  float product, mod;
};

Factors factors_of(float scale) {
  const ScoreScale parts = score_scale(scale, 1.0);
  return parts.main == 0.0f ? Factors{1.0f, 0.0f} : Factors{parts.main, parts.rest};
}

}  // namespace

CudaMathBackwardPlan::CudaMathBackwardPlan(const ForwardCall& problem, const WantedGradients& wanted, Parts parts)
    : parts_(std::move(parts)),
      products_(problem, parts_.cublas, parts_.copy, parts_.arch),
      wanted_(wanted),
      is_empty_(std::min({products_.batch, products_.heads, products_.seqlen_q, products_.seqlen_kv}) == 0),
      needs_gradients_(wanted.dq || wanted.dk || wanted.captures != 0) {
  const CudaProducts& p = products_;
  const auto reserve = [&](std::size_t bytes) { return std::exchange(workspace_size_, workspace_size_ + bytes); };
  const std::size_t rows = CudaProducts::size_of(p.batch * p.heads * p.seqlen_q, 1, sizeof(float));
  reserve(p.scores_size());
  gradients_ = reserve(needs_gradients_ ? p.scores_size() : 0);
  row_lse_ = reserve(rows);
  row_delta_ = reserve(rows);
  q_ = reserve(p.packed_size(p.heads, p.seqlen_q, p.head_dim));
  k_ = reserve(p.packed_size(p.heads_kv, p.seqlen_kv, p.head_dim));
  v_ = reserve(needs_gradients_ ? p.packed_size(p.heads_kv, p.seqlen_kv, p.head_dim_v) : 0);
  grad_out_ = reserve(p.packed_size(p.heads, p.seqlen_q, p.head_dim_v));
  dq_ = reserve(wanted.dq ? p.packed_size(p.heads, p.seqlen_q, p.head_dim) : 0);
  dk_ = reserve(wanted.dk ? p.packed_size(p.heads_kv, p.seqlen_kv, p.head_dim) : 0);
  dv_ = reserve(wanted.dv ? p.packed_size(p.heads_kv, p.seqlen_kv, p.head_dim_v) : 0);
  sums_ = reserve(parts_.sums.size());
  cublas_ = reserve(p.cublas_size());
}

std::string CudaMathBackwardPlan::describe() const {
  const CudaProducts& p = products_;
  if (is_empty_) return "zeros\n";
  const std::string by = " by " + p.description();
  const std::string scores = fmt::format("float32 ({}, {}, {}, {})\n", p.batch, p.heads, p.seqlen_q, p.seqlen_kv);
  std::string text = "q k^T" + by + ": " + scores;
  if (needs_gradients_) text += "grad_out v^T" + by + ": " + scores;
  text += fmt::format("delta\nmod backward: {} in place\n", dsl::dtype_name(p.dtype));
  if (wanted_.dq) text += "ds k" + by + "\n";
  if (wanted_.dk) text += "ds^T q" + by + "\n";
  if (wanted_.dv) text += "p^T grad_out" + by + "\n";
  return text + parts_.sums.describe();
}

Check CudaMathBackwardPlan::run(const ForwardCall& call, const Gradients& gradients, void* workspace,
                                CudaStream stream) const {
  char* const bytes = static_cast<char*>(workspace);
  if (Check failure = parts_.sums.clear(bytes + sums_, stream)) return failure;
  if (is_empty_) {
    const struct {
      bool wanted;
      const TensorView& tensor;
      std::size_t room;
    } outputs[] = {{wanted_.dq, gradients.dq, dq_}, {wanted_.dk, gradients.dk, dk_}, {wanted_.dv, gradients.dv, dv_}};
    for (const auto& [wanted, tensor, room] : outputs) {
      if (!wanted) continue;
      if (Check failure = run_zeros(tensor, bytes + room, stream)) return failure;
    }
  } else if (Check failure = run_scores(call, gradients, bytes, stream)) {
    return failure;
  }
  return parts_.sums.finish(call, gradients, bytes + sums_, stream);
}

Check CudaMathBackwardPlan::run_scores(const ForwardCall& call, const Gradients& gradients, char* workspace,
                                       CudaStream stream) const {
  const CudaProducts::Queue queue{workspace + cublas_, stream};
  const Factors factors = factors_of(call.scale);
  const CudaProducts::Operand q{call.q, workspace + q_}, k{call.k, workspace + k_}, v{call.v, workspace + v_},
      grad_out{gradients.grad_out, workspace + grad_out_};
  if (Check failure = products_.multiply_features(factors.product, q, k, workspace, queue)) return failure;
  if (needs_gradients_) {
    if (Check failure = products_.multiply_features(1.0f, grad_out, v, workspace + gradients_, queue)) return failure;
  }
  if (Check failure = run_delta(call, gradients, workspace, stream)) return failure;
  if (Check failure = run_mod(call, gradients, factors.mod, workspace, stream)) return failure;
  if (wanted_.dq) {
    if (Check failure = products_.multiply_keys(factors.product, workspace + gradients_, k,
                                                {gradients.dq, workspace + dq_}, queue)) {
      return failure;
    }
  }
  if (wanted_.dk) {
    if (Check failure = products_.multiply_queries(factors.product, workspace + gradients_, q,
                                                   {gradients.dk, workspace + dk_}, queue)) {
      return failure;
    }
  }
  if (!wanted_.dv) return {};
  return products_.multiply_queries(1.0f / math::probability_scale(element_of(products_.dtype)), workspace, grad_out,
                                    {gradients.dv, workspace + dv_}, queue);
}

Check CudaMathBackwardPlan::run_delta(const ForwardCall& call, const Gradients& gradients, char* workspace,
                                      CudaStream stream) const {
  const CudaProducts& p = products_;
  math::DeltaParams params{.o = call.o.data,
                           .grad_out = gradients.grad_out.data,
                           .lse = call.lse.data,
                           .grad_lse = gradients.grad_lse.data,
                           .row_lse = reinterpret_cast<float*>(workspace + row_lse_),
                           .row_delta = reinterpret_cast<float*>(workspace + row_delta_),
                           .o_stride = {},
                           .grad_out_stride = {},
                           .lse_stride = {},
                           .grad_lse_stride = {},
                           .rows = static_cast<unsigned>(p.batch * p.heads * p.seqlen_q),
                           .num_heads = static_cast<unsigned>(p.heads),
                           .seqlen_q = static_cast<unsigned>(p.seqlen_q),
                           .head_dim_v = static_cast<int>(p.head_dim_v)};
  std::copy_n(call.o.stride, 3, params.o_stride);
  std::copy_n(gradients.grad_out.stride, 3, params.grad_out_stride);
  std::copy_n(call.lse.stride, 3, params.lse_stride);
  std::copy_n(gradients.grad_lse.stride, 3, params.grad_lse_stride);
  return parts_.delta->launch({.x = static_cast<unsigned>(ceil_div(params.rows, math::kWarpThreads / 32))},
                              math::kWarpThreads, &params, stream);
}

Check CudaMathBackwardPlan::run_mod(const ForwardCall& call, const Gradients& gradients, float factor, char* workspace,
                                    CudaStream stream) const {
  const CudaProducts& p = products_;
  const RowsGrid grid = rows_grid(p.seqlen_q, p.seqlen_kv);
  math::ModBackwardParams params{
      .scores = reinterpret_cast<float*>(workspace),
      .gradients = needs_gradients_ ? reinterpret_cast<float*>(workspace + gradients_) : nullptr,
      .row_lse = reinterpret_cast<float*>(workspace + row_lse_),
      .row_delta = reinterpret_cast<float*>(workspace + row_delta_),
      .grad_lse = gradients.grad_lse.data,
      .grad_lse_stride = {},
      .pitch = p.pitch,
      .factor = factor,
      .element = element_of(p.dtype),
      .num_heads = static_cast<int>(p.heads),
      .seqlen_q = static_cast<int>(p.seqlen_q),
      .seqlen_kv = static_cast<int>(p.seqlen_kv),
      .heads = static_cast<unsigned>(p.batch * p.heads),
      .q_idx_origin = 0,
      .kv_idx_origin = 0,
      .log2_vectors = grid.log2_vectors,
      .captured = {},
      .sums = {}};
  std::copy_n(gradients.grad_lse.stride, 3, params.grad_lse_stride);
  fill_captured(call, params.captured);
  parts_.sums.fill_views(workspace + sums_, params.sums);
  return parts_.mod->launch(
      {.x = static_cast<unsigned>(grid.tiles), .y = static_cast<unsigned>(std::min(p.batch * p.heads, kMaxGridY))},
      grid.threads, &params, stream);
}

Check CudaMathBackwardPlan::run_zeros(const TensorView& tensor, char* room, CudaStream stream) const {
  const std::size_t size = products_.packed_size(tensor.shape[1], tensor.shape[2], tensor.shape[3]);
  if (size == 0) return {};
  if (Check failure = parts_.device->fill(room, 0, size, stream)) return failure;
  return products_.copy(CudaProducts::packed(tensor, room), tensor, stream);
}

// ---- Making one

Result<CudaMathBackwardBinaries> build_cuda_math_backward(const Request& request, compiler::CudaArch arch,
                                                          const CollectText& collect) {
  if (Check failure = check_cuda_arch(arch)) return *failure;
  if (std::string reason = CudaProducts::refuse(request.call.forward); !reason.empty()) {
    return Failure{ATTNJIT_UNSUPPORTED, std::move(reason)};
  }
  const Signature& s = request.call.signature;
  compiler::CompileOptions options{.dump = request.files.collector(collect)};
  auto emitted = compiler::emit_cuda_math_backward(mod_problem(request.mods, request.call, s.seqlen_q, s.seqlen_kv),
                                                   s.deterministic != 0, options);
  if (emitted.error) return compile_failure(s, emitted.error->message);
  CudaMathBackwardBinaries binaries{.facts = std::move(emitted.value.facts),
                                    .mod = {},
                                    .kernels = {},
                                    .finish = {},
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
  auto finish = find_finish_kernel(request, arch, &binaries.phases);
  if (!finish) return finish.failure();
  binaries.finish = std::move(*finish);
  return binaries;
}

Json kernels_json(const CudaMathBackwardBinaries& binaries) {
  Json json = Json::array({binary_json(binaries.mod, kModEntry), binary_json(binaries.kernels, kDeltaEntry),
                           binary_json(binaries.kernels, kCopyEntry)});
  add_finish_kernel(binaries.finish, &json);
  return json;
}

Result<ReadyBackend> prepare_cuda_math_backward(const Request& request) {
  const Signature& s = request.call.signature;
  Result<std::shared_ptr<CudaDevice>> found = request.context.cuda_device(s.device);
  if (!found) return found.failure();
  const std::shared_ptr<CudaDevice>& device = *found;
  Result<CudaMathBackwardBinaries> binaries =
      build_cuda_math_backward(request, {.number = device->arch(), .specific = false}, nullptr);
  if (!binaries) return binaries.failure();

  const auto start = std::chrono::steady_clock::now();
  CudaMathBackwardPlan::Parts parts{
      .device = device,
      .mod = {},
      .delta = {},
      .copy = {},
      .cublas = {},
      .arch = device->arch(),
      .sums = CudaGradientSums(request.call.forward, s.capture_gradients, binaries->facts.sinks, s.deterministic != 0)};
  if (Check failure = parts.sums.load(device, binaries->finish)) return *failure;
  const struct {
    std::shared_ptr<const CudaKernel>* kernel;
    const FoundBinary& binary;
    const char* entry;
  } wanted[] = {{&parts.mod, binaries->mod, kModEntry},
                {&parts.delta, binaries->kernels, kDeltaEntry},
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
  const auto plan =
      std::make_shared<const CudaMathBackwardPlan>(request.call.forward, wanted_gradients(s), std::move(parts));
  ready.description = {{"device", device->name()},
                       {"hash", hash_text(binaries->facts)},
                       {"facts", gradient_facts_json(binaries->facts, request.call)},
                       {"passes", plan->describe()},
                       {"kernels", kernels_json(*binaries)}};
  ready.backward.workspace_size = plan->workspace_size();
  ready.backward.run = [plan](const ForwardCall& call, const Gradients& gradients, void* workspace, CudaStream stream) {
    return plan->run(call, gradients, workspace, stream);
  };
  return ready;
}

}  // namespace attnjit::runtime
