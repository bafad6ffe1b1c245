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
// More calls than this for one product, where strides of batches and heads do not merge: packing costs less.
constexpr std::int64_t kMaxCalls = 16;
// Blocks along a grid's second axis.
constexpr std::int64_t kMaxGridY = 65535;

math::Element element_of(dsl::DType dtype) {
  return dtype == dsl::DType::kF16    ? math::Element::kF16
         : dtype == dsl::DType::kBF16 ? math::Element::kBF16
                                      : math::Element::kF32;
}

std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

std::size_t align(std::size_t bytes) {
  constexpr std::size_t kAlignment = Cublas::kWorkspaceAlignment;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::int64_t pitch_of(std::int64_t seqlen_kv) { return ceil_div(seqlen_kv, math::kVector) * math::kVector; }

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

// ---- Products

// One matrix per (batch, kv head, query head of its group): `stride` elements from row to row, `step` from matrix to
// matrix along each of the three.
struct Operand {
  void* data = nullptr;
  dsl::DType dtype = dsl::DType::kF32;
  std::int64_t columns = 0;
  std::int64_t stride = 0;
  std::int64_t step[3] = {};
};

// cuBLAS can walk the rows of `tensor`.
bool cublas_takes(const TensorView& tensor) {
  return tensor.shape[2] <= 1 || (tensor.stride[2] >= tensor.shape[3] && tensor.stride[2] <= kMaxInt);
}

// `group`: query heads of one head of keys where the tensor has query heads, else 1.
Operand operand_of(const TensorView& tensor, std::int64_t group) {
  return {.data = tensor.data,
          .dtype = tensor.dtype,
          .columns = tensor.shape[3],
          .stride = tensor.shape[2] <= 1 ? tensor.shape[3] : tensor.stride[2],
          .step = {tensor.stride[0], tensor.stride[1] * group, group > 1 ? tensor.stride[1] : 0}};
}

// As a compact tensor at `data`.
TensorView packed(TensorView tensor, void* data) {
  tensor.data = data;
  tensor.stride[3] = 1;
  for (int d = 3; d > 0; --d) tensor.stride[d - 1] = tensor.stride[d] * tensor.shape[d];
  return tensor;
}

// Nothing is gained by packing it.
bool is_packed(const TensorView& tensor) {
  const TensorView compact = packed(tensor, tensor.data);
  for (int d = 0; d < 3; ++d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != compact.stride[d]) return false;
  }
  return true;
}

// A product per (batch, kv head, query head of its group), in as few calls as the strides allow.
struct Products {
  Cublas::Product first;               // of all that one call computes
  std::int64_t extent[3] = {1, 1, 1};  // what calls are made for
  std::int64_t step[3][3] = {};        // of a, b and c along each

  std::int64_t calls() const { return extent[0] * extent[1] * extent[2]; }

  Check run(Cublas::Queue& queue) const {
    for (std::int64_t call = 0, count = calls(); call < count; ++call) {
      Cublas::Product product = first;
      Cublas::Matrix* const matrices[] = {&product.a, &product.b, &product.c};
      std::int64_t rest = call;
      for (int d = 2; d >= 0; --d) {
        const std::int64_t index = rest % extent[d];
        rest /= extent[d];
        for (int i = 0; i < 3; ++i) {
          matrices[i]->data =
              static_cast<char*>(matrices[i]->data) + index * step[i][d] * dsl::dtype_size(matrices[i]->dtype);
        }
      }
      if (Check failure = queue.add(product)) return failure;
    }
    return {};
  }
};

Products arrange(bool transpose_b, float alpha, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t batch,
                 std::int64_t heads_kv, std::int64_t group, Operand a, const Operand& b, Operand c) {
  // The rows of a group's heads one below the other, where they lie so: one product with the keys they share.
  const auto stacks = [&](const Operand& x) {
    return m > 1 ? x.step[2] == m * x.stride : x.step[2] >= x.columns && x.step[2] <= kMaxInt;
  };
  if (group > 1 && m * group <= kMaxInt && stacks(a) && stacks(c)) {
    if (m == 1) {
      a.stride = a.step[2];
      c.stride = c.step[2];
    }
    m *= group;
    group = 1;
  }

  const Operand* const operands[] = {&a, &b, &c};
  const std::int64_t extents[] = {batch, heads_kv, group};
  Products products;
  int last = 0;  // the dimension that the next one may go on with
  for (int d = 0; d < 3; ++d) {
    if (extents[d] == 1) continue;
    // The dimension before goes on where this one ends: for all three, they are one.
    bool merges = true;
    for (int i = 0; i < 3; ++i) merges = merges && products.step[i][last] == operands[i]->step[d] * extents[d];
    if (products.extent[last] == 1 || !merges) last = d;
    products.extent[last] *= extents[d];
    for (int i = 0; i < 3; ++i) products.step[i][last] = operands[i]->step[d];
  }

  // One call goes over the longest of what is left.
  const auto longest = std::max_element(products.extent, products.extent + 3) - products.extent;
  const auto matrix = [&](int i) {
    const Operand& x = *operands[i];
    return Cublas::Matrix{
        .data = x.data, .dtype = x.dtype, .stride = x.stride, .batch_stride = products.step[i][longest]};
  };
  products.first = {.transpose_b = transpose_b,
                    .m = m,
                    .n = n,
                    .k = k,
                    .batch = std::exchange(products.extent[longest], 1),
                    .alpha = alpha,
                    .a = matrix(0),
                    .b = matrix(1),
                    .c = matrix(2)};
  return products;
}

}  // namespace

std::string CudaMathPlan::refuse(const ForwardCall& problem) {
  const std::int64_t batch = problem.q.shape[0], heads = problem.q.shape[1], heads_kv = problem.k.shape[1];
  const std::int64_t seqlen_q = problem.q.shape[2], seqlen_kv = problem.k.shape[2];
  // Extents fit 31 bits: these products need care.
  const auto rows_fit = [&](std::int64_t all_heads, std::int64_t seqlen) {
    std::int64_t rows = 0;
    return !__builtin_mul_overflow(batch * all_heads, seqlen, &rows) && rows <= math::kMaxRows;
  };
  if (!rows_fit(heads, seqlen_q) || !rows_fit(heads_kv, seqlen_kv)) {
    return fmt::format("more than {} rows of q or k", math::kMaxRows);
  }
  const std::int64_t pitch = pitch_of(seqlen_kv);
  const ModGrid grid = mod_grid(seqlen_q, seqlen_kv);
  constexpr std::int64_t kMaxScores = std::int64_t{1} << 48;  // a thousand times any device's memory
  if (2 * pitch > kMaxInt || pitch > kMaxScores / std::max<std::int64_t>(batch * heads * seqlen_q, 1) ||
      grid.kv_tiles * grid.q_tiles > kMaxInt) {
    return "its scores cannot be addressed";
  }
  return {};
}

const char* CudaMathPlan::softmax_entry(std::int64_t seqlen_kv) {
  if (seqlen_kv <= math::kMaxWarp2) return "attnjit_math_softmax_warp2";
  if (seqlen_kv <= math::kMaxWarp8) return "attnjit_math_softmax_warp8";
  if (seqlen_kv <= math::kMaxBlock) return "attnjit_math_softmax_block";
  return "attnjit_math_softmax_long";
}

CudaMathPlan::CudaMathPlan(const ForwardCall& problem, Parts parts)
    : parts_(std::move(parts)),
      dtype_(problem.q.dtype),
      batch_(problem.q.shape[0]),
      heads_(problem.q.shape[1]),
      heads_kv_(problem.k.shape[1]),
      seqlen_q_(problem.q.shape[2]),
      seqlen_kv_(problem.k.shape[2]),
      head_dim_(problem.q.shape[3]),
      head_dim_v_(problem.v.shape[3]),
      pitch_(pitch_of(seqlen_kv_)) {
  const auto bytes = [](std::int64_t rows, std::int64_t columns, std::int64_t size) {
    return align(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns * size));
  };
  const std::int64_t rows = batch_ * heads_ * seqlen_q_;
  const std::int64_t rows_kv = batch_ * heads_kv_ * seqlen_kv_;
  const std::int64_t size = dsl::dtype_size(dtype_);
  empty_ = bytes(rows, pitch_, sizeof(float));
  q_ = v_ = empty_ + bytes(rows, 1, 1);
  k_ = q_ + bytes(rows, head_dim_, size);
  o_ = v_ + bytes(rows_kv, head_dim_v_, size);
  cublas_ = std::max(k_ + bytes(rows_kv, head_dim_, size), o_ + bytes(rows, head_dim_v_, size));
  cublas_size_ = Cublas::workspace_size(parts_.arch);
  workspace_size_ = cublas_ + cublas_size_;
}

std::string CudaMathPlan::describe() const {
  const std::string heads = fmt::format("({}, {}, {}, ", batch_, heads_, seqlen_q_);
  std::string text = fmt::format("q k^T by {}: float32 {}{})\n", parts_.cublas->description(), heads, seqlen_kv_);
  if (!parts_.mod_is_identity) text += "mod in place\n";
  text += fmt::format("softmax by {}: {} in place\n", softmax_entry(seqlen_kv_), dsl::dtype_name(dtype_));
  text +=
      fmt::format("p v by {}: {} {}{})\n", parts_.cublas->description(), dsl::dtype_name(dtype_), heads, head_dim_v_);
  text += "zeros for rows without a kept element\n";
  return text;
}

Check CudaMathPlan::run(const ForwardCall& call, void* workspace, CudaStream stream) const {
  char* const bytes = static_cast<char*>(workspace);
  if (seqlen_kv_ == 0) {
    if (Check failure = run_softmax(call, bytes, stream)) return failure;
    return run_zero_rows(call, bytes, stream);
  }
  const ScoreScale scale = score_scale(call.scale, parts_.score_factor);
  // A product times 0 would not see NaN and infinity in q and k.
  const float alpha = scale.main == 0.0f ? 1.0f : scale.main;
  const float factor = scale.main == 0.0f ? 0.0f : scale.rest;
  if (Check failure = run_scores(call, alpha, bytes, stream)) return failure;
  if (!parts_.mod_is_identity || factor != 1.0f) {
    if (Check failure = run_mod(call, factor, bytes, stream)) return failure;
  }
  if (Check failure = run_softmax(call, bytes, stream)) return failure;
  return run_output(call, bytes, stream);
}

Check CudaMathPlan::run_scores(const ForwardCall& call, float alpha, char* workspace, CudaStream stream) const {
  const std::int64_t group = heads_ / heads_kv_;
  const TensorView scores{.data = workspace,
                          .dtype = dsl::DType::kF32,
                          .shape = {batch_, heads_, seqlen_q_, seqlen_kv_},
                          .stride = {heads_ * seqlen_q_ * pitch_, seqlen_q_ * pitch_, pitch_, 1}};
  TensorView q = call.q, k = call.k;
  const auto products = [&] {
    return arrange(true, alpha, seqlen_q_, seqlen_kv_, head_dim_, batch_, heads_kv_, group, operand_of(q, group),
                   operand_of(k, 1), operand_of(scores, group));
  };
  const bool many = products().calls() > kMaxCalls;
  if (!cublas_takes(q) || (many && !is_packed(q))) q = packed(q, workspace + q_);
  if (!cublas_takes(k) || (many && !is_packed(k))) k = packed(k, workspace + k_);
  if (Check failure = run_copy(call.q, q, stream)) return failure;
  if (Check failure = run_copy(call.k, k, stream)) return failure;
  Cublas::Queue queue(*parts_.cublas, workspace + cublas_, cublas_size_, stream);
  return products().run(queue);
}

Check CudaMathPlan::run_mod(const ForwardCall& call, float factor, char* workspace, CudaStream stream) const {
  const ModGrid grid = mod_grid(seqlen_q_, seqlen_kv_);
  math::ModParams params{.scores = reinterpret_cast<float*>(workspace),
                         .pitch = pitch_,
                         .factor = factor,
                         .num_heads = static_cast<int>(heads_),
                         .seqlen_q = static_cast<int>(seqlen_q_),
                         .seqlen_kv = static_cast<int>(seqlen_kv_),
                         .heads = static_cast<unsigned>(batch_ * heads_),
                         .q_idx_origin = 0,
                         .kv_idx_origin = 0,
                         .log2_vectors = grid.log2_vectors,
                         .kv_tiles = static_cast<unsigned>(grid.kv_tiles),
                         .captured = {}};
  fill_captured(call, params.captured);
  return parts_.mod->launch({.x = static_cast<unsigned>(grid.kv_tiles * grid.q_tiles),
                             .y = static_cast<unsigned>(std::min(batch_ * heads_, kMaxGridY))},
                            grid.threads, &params, stream);
}

Check CudaMathPlan::run_softmax(const ForwardCall& call, char* workspace, CudaStream stream) const {
  const std::int64_t rows = batch_ * heads_ * seqlen_q_;
  math::SoftmaxParams params{.scores = reinterpret_cast<float*>(workspace),
                             .pitch = pitch_,
                             .empty = reinterpret_cast<unsigned char*>(workspace + empty_),
                             .lse = call.lse.data,
                             .row_max = call.row_max.data,
                             .lse_stride = {},
                             .row_max_stride = {},
                             .rows = static_cast<unsigned>(rows),
                             .num_heads = static_cast<unsigned>(heads_),
                             .seqlen_q = static_cast<unsigned>(seqlen_q_),
                             .seqlen_kv = static_cast<int>(seqlen_kv_)};
  std::copy_n(call.lse.stride, 3, params.lse_stride);
  std::copy_n(call.row_max.stride, 3, params.row_max_stride);
  std::int64_t blocks = rows;
  std::int64_t threads = math::kLongThreads;
  if (seqlen_kv_ <= math::kMaxWarp8) {
    threads = math::kWarpThreads;
    blocks = ceil_div(rows, threads / 32);
  } else if (seqlen_kv_ <= math::kMaxBlock) {
    threads = ceil_div(seqlen_kv_, 32 * math::kBlockVectors * math::kVector) * 32;
  }
  return parts_.softmax->launch({.x = static_cast<unsigned>(blocks)}, static_cast<unsigned>(threads), &params, stream);
}

Check CudaMathPlan::run_output(const ForwardCall& call, char* workspace, CudaStream stream) const {
  const std::int64_t group = heads_ / heads_kv_;
  // A row of probabilities starts where the row of scores did.
  const std::int64_t pitch = pitch_ * static_cast<std::int64_t>(sizeof(float)) / dsl::dtype_size(dtype_);
  const TensorView p{.data = workspace,
                     .dtype = dtype_,
                     .shape = {batch_, heads_, seqlen_q_, seqlen_kv_},
                     .stride = {heads_ * seqlen_q_ * pitch, seqlen_q_ * pitch, pitch, 1}};
  TensorView v = call.v, o = call.o;
  const auto products = [&] {
    return arrange(false, 1.0f / math::probability_scale(element_of(dtype_)), seqlen_q_, head_dim_v_, seqlen_kv_,
                   batch_, heads_kv_, group, operand_of(p, group), operand_of(v, 1), operand_of(o, group));
  };
  const bool many = products().calls() > kMaxCalls;
  if (!cublas_takes(v) || (many && !is_packed(v))) v = packed(v, workspace + v_);
  if (!cublas_takes(o) || (many && !is_packed(o))) o = packed(o, workspace + o_);
  if (Check failure = run_copy(call.v, v, stream)) return failure;
  {
    Cublas::Queue queue(*parts_.cublas, workspace + cublas_, cublas_size_, stream);
    if (Check failure = products().run(queue)) return failure;
  }
  if (Check failure = run_copy(o, call.o, stream)) return failure;
  return run_zero_rows(call, workspace, stream);
}

// 0 times a V that is not finite stays out of an empty row.
Check CudaMathPlan::run_zero_rows(const ForwardCall& call, char* workspace, CudaStream stream) const {
  const math::ZeroParams params{.empty = reinterpret_cast<unsigned char*>(workspace + empty_),
                                .o = call.o.data,
                                .o_stride = {call.o.stride[0], call.o.stride[1], call.o.stride[2]},
                                .rows = static_cast<unsigned>(batch_ * heads_ * seqlen_q_),
                                .num_heads = static_cast<unsigned>(heads_),
                                .seqlen_q = static_cast<unsigned>(seqlen_q_),
                                .head_dim_v = static_cast<int>(head_dim_v_)};
  return parts_.zero_rows->launch({.x = static_cast<unsigned>(ceil_div(params.rows, math::kWarpThreads))},
                                  math::kWarpThreads, &params, stream);
}

// Nothing where both are one tensor.
Check CudaMathPlan::run_copy(const TensorView& from, const TensorView& to, CudaStream stream) const {
  if (from.data == to.data) return {};
  const std::int64_t size = dsl::dtype_size(from.dtype);
  math::CopyParams params{.from = from.data,
                          .to = to.data,
                          .from_stride = {},
                          .to_stride = {},
                          .rows = static_cast<unsigned>(from.shape[0] * from.shape[1] * from.shape[2]),
                          .num_heads = static_cast<unsigned>(from.shape[1]),
                          .seqlen = static_cast<unsigned>(from.shape[2]),
                          .pieces = 0,
                          .piece_bytes = 0,
                          .log2_width = 0};
  const std::int64_t row_bytes = from.shape[3] * size;
  // Every address is a sum of these: what divides them all divides every address.
  auto together = reinterpret_cast<std::uintptr_t>(from.data) | reinterpret_cast<std::uintptr_t>(to.data) |
                  static_cast<std::uintptr_t>(row_bytes) | 16u;
  for (int d = 0; d < 3; ++d) {
    params.from_stride[d] = from.stride[d] * size;
    params.to_stride[d] = to.stride[d] * size;
    together |= static_cast<std::uintptr_t>(params.from_stride[d]) | static_cast<std::uintptr_t>(params.to_stride[d]);
  }
  params.piece_bytes = 1 << std::countr_zero(together);
  params.pieces = static_cast<int>(row_bytes / params.piece_bytes);
  const auto width = std::min<unsigned>(std::bit_ceil(static_cast<unsigned>(params.pieces)), math::kCopyThreads);
  params.log2_width = std::countr_zero(width);
  return parts_.copy->launch({.x = static_cast<unsigned>(ceil_div(params.rows, math::kCopyThreads / width))},
                             math::kCopyThreads, &params, stream);
}

// ---- Making one

Result<CudaMathBinaries> build_cuda_math(const Request& request, compiler::CudaArch arch, const CollectText& collect) {
  if (Check failure = check_cuda_arch(arch)) return *failure;
  if (std::string reason = CudaMathPlan::refuse(request.call.forward); !reason.empty()) {
    return Failure{ATTNJIT_UNSUPPORTED, std::move(reason)};
  }
  const Signature& s = request.call.signature;
  compiler::CompileOptions options;
  if (request.files.any() || collect) {
    options.dump = [&](std::string_view kind, std::string_view text) {
      if (request.files.wants(kind)) request.files.write(kind, "", text);
      if (collect) collect(kind, text);
    };
  }
  auto emitted = compiler::emit_cuda_math(mod_problem(request.mods, request.call, s.seqlen_q, s.seqlen_kv), options);
  if (emitted.error) {
    return Failure{ATTNJIT_INTERNAL, fmt::format("score_mod does not compile: {}", emitted.error->message)};
  }
  CudaMathBinaries binaries{.facts = std::move(emitted.value.facts),
                            .score_factor = emitted.value.source.score_factor,
                            .mod = {},
                            .kernels = {},
                            .phases = std::move(emitted.value.phases)};
  const auto find = [&](const compiler::CudaSource& source, FoundBinary* binary) -> Check {
    Result<FoundBinary> found = find_cuda_binary(request.context, source, arch, options);
    if (!found) return found.failure();
    *binary = std::move(*found);
    for (const auto& [name, milliseconds] : binary->phases) {
      const auto same = std::find_if(binaries.phases.begin(), binaries.phases.end(),
                                     [&name = name](const auto& phase) { return phase.first == name; });
      if (same == binaries.phases.end()) {
        binaries.phases.emplace_back(name, milliseconds);
      } else {
        same->second += milliseconds;
      }
    }
    return {};
  };
  // Texts of the emission do not need a compile.
  if (!collect && !request.files.wants("ptx") && !request.files.wants("cubin")) options.dump = nullptr;
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
