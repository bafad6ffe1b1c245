// Arranges products over batches and heads into as few calls of cuBLAS as the strides allow.
#include "runtime/cuda_products.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/math/config.h"

namespace attnjit::runtime {
namespace {

constexpr std::int64_t kMaxInt = std::numeric_limits<int>::max();
// More calls than this for one product, where strides of batches and heads do not merge: packing costs less.
constexpr std::int64_t kMaxCalls = 16;

std::int64_t pitch_of(std::int64_t seqlen_kv) { return ceil_div(seqlen_kv, math::kVector) * math::kVector; }

// One matrix per (batch, kv head, query head of its group): `stride` elements from row to row, `step` from matrix to
// matrix along each of the three.
struct Matrices {
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
Matrices matrices_of(const TensorView& tensor, std::int64_t group) {
  return {.data = tensor.data,
          .dtype = tensor.dtype,
          .columns = tensor.shape[3],
          .stride = tensor.shape[2] <= 1 ? tensor.shape[3] : tensor.stride[2],
          .step = {tensor.stride[0], tensor.stride[1] * group, group > 1 ? tensor.stride[1] : 0}};
}

// Nothing is gained by packing it.
bool is_packed(const TensorView& tensor) {
  const TensorView compact = CudaProducts::packed(tensor, tensor.data);
  for (int d = 0; d < 3; ++d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != compact.stride[d]) return false;
  }
  return true;
}

// The rows of a group's heads lie one below the other.
bool stacks(const Matrices& x, std::int64_t rows) {
  return rows > 1 ? x.step[2] == rows * x.stride : x.step[2] >= x.columns && x.step[2] <= kMaxInt;
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

// `first` has what one product is; its a is of the query heads. A product with transpose_a is the sum over a group,
// whose heads stack in a and b.
Products arrange(Cublas::Product first, std::int64_t batch, std::int64_t heads_kv, std::int64_t group, Matrices a,
                 Matrices b, Matrices c) {
  // Where the rows of a group's heads lie one below the other: one product with the keys they share.
  std::int64_t& rows = first.transpose_a ? first.k : first.m;
  Matrices& other = first.transpose_a ? b : c;
  if (group > 1 && rows * group <= kMaxInt && stacks(a, rows) && stacks(other, rows)) {
    if (rows == 1) {
      a.stride = a.step[2];
      other.stride = other.step[2];
    }
    rows *= group;
    group = 1;
  }

  const Matrices* const operands[] = {&a, &b, &c};
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
    const Matrices& x = *operands[i];
    return Cublas::Matrix{
        .data = x.data, .dtype = x.dtype, .stride = x.stride, .batch_stride = products.step[i][longest]};
  };
  products.first = first;
  products.first.batch = std::exchange(products.extent[longest], 1);
  products.first.a = matrix(0);
  products.first.b = matrix(1);
  products.first.c = matrix(2);
  return products;
}

}  // namespace

CudaProducts::CudaProducts(const ForwardCall& problem, std::shared_ptr<const Cublas> cublas,
                           std::shared_ptr<const CudaKernel> copy, int arch)
    : dtype(problem.q.dtype),
      batch(problem.q.shape[0]),
      heads(problem.q.shape[1]),
      heads_kv(problem.k.shape[1]),
      seqlen_q(problem.q.shape[2]),
      seqlen_kv(problem.k.shape[2]),
      head_dim(problem.q.shape[3]),
      head_dim_v(problem.v.shape[3]),
      pitch(pitch_of(seqlen_kv)),
      cublas_(std::move(cublas)),
      copy_(std::move(copy)),
      cublas_size_(Cublas::workspace_size(arch)) {}

std::string CudaProducts::refuse(const ForwardCall& problem) {
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
  constexpr std::int64_t kMaxScores = std::int64_t{1} << 48;  // a thousand times any device's memory
  if (2 * pitch > kMaxInt || pitch > kMaxScores / std::max<std::int64_t>(batch * heads * seqlen_q, 1)) {
    return "its scores cannot be addressed";
  }
  return {};
}

std::size_t CudaProducts::size_of(std::int64_t rows, std::int64_t columns, std::int64_t element) {
  constexpr std::size_t kAlignment = Cublas::kWorkspaceAlignment;
  const std::size_t bytes = static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns * element);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

TensorView CudaProducts::packed(TensorView tensor, void* data) {
  tensor.data = data;
  tensor.stride[3] = 1;
  for (int d = 3; d > 0; --d) tensor.stride[d - 1] = tensor.stride[d] * tensor.shape[d];
  return tensor;
}

TensorView CudaProducts::scores_view(void* data, dsl::DType type) const {
  const std::int64_t stride = pitch * static_cast<std::int64_t>(sizeof(float)) / dsl::dtype_size(type);
  return {.data = data,
          .dtype = type,
          .shape = {batch, heads, seqlen_q, seqlen_kv},
          .stride = {heads * seqlen_q * stride, seqlen_q * stride, stride, 1}};
}

Check CudaProducts::multiply_features(float alpha, const Operand& x, const Operand& y, void* scores,
                                      const Queue& at) const {
  const std::int64_t group = heads / heads_kv;
  TensorView from_x = x.tensor, from_y = y.tensor;
  const auto products = [&] {
    return arrange({.transpose_b = true, .m = seqlen_q, .n = seqlen_kv, .k = x.tensor.shape[3], .alpha = alpha}, batch,
                   heads_kv, group, matrices_of(from_x, group), matrices_of(from_y, 1),
                   matrices_of(scores_view(scores, dsl::DType::kF32), group));
  };
  const bool many = products().calls() > kMaxCalls;
  if (!cublas_takes(from_x) || (many && !is_packed(from_x))) from_x = packed(from_x, x.room);
  if (!cublas_takes(from_y) || (many && !is_packed(from_y))) from_y = packed(from_y, y.room);
  if (Check failure = copy(x.tensor, from_x, at.stream)) return failure;
  if (Check failure = copy(y.tensor, from_y, at.stream)) return failure;
  Cublas::Queue queue(*cublas_, at.workspace, cublas_size_, at.stream);
  return products().run(queue);
}

Check CudaProducts::multiply_keys(float alpha, void* scores, const Operand& y, const Operand& out,
                                  const Queue& at) const {
  const std::int64_t group = heads / heads_kv;
  TensorView from = y.tensor, to = out.tensor;
  const auto products = [&] {
    return arrange({.m = seqlen_q, .n = out.tensor.shape[3], .k = seqlen_kv, .alpha = alpha}, batch, heads_kv, group,
                   matrices_of(scores_view(scores, dtype), group), matrices_of(from, 1), matrices_of(to, group));
  };
  const bool many = products().calls() > kMaxCalls;
  if (!cublas_takes(from) || (many && !is_packed(from))) from = packed(from, y.room);
  if (!cublas_takes(to) || (many && !is_packed(to))) to = packed(to, out.room);
  if (Check failure = copy(y.tensor, from, at.stream)) return failure;
  {
    Cublas::Queue queue(*cublas_, at.workspace, cublas_size_, at.stream);
    if (Check failure = products().run(queue)) return failure;
  }
  return copy(to, out.tensor, at.stream);
}

Check CudaProducts::multiply_queries(float alpha, void* scores, const Operand& x, const Operand& out,
                                     const Queue& at) const {
  const std::int64_t group = heads / heads_kv;
  TensorView from = x.tensor, to = out.tensor;
  // The heads of a group are summed up in one product, in float32, so they have to stack.
  if (!cublas_takes(from) || (group > 1 && !stacks(matrices_of(from, group), seqlen_q))) from = packed(from, x.room);
  const auto products = [&] {
    return arrange({.transpose_a = true, .m = seqlen_kv, .n = out.tensor.shape[3], .k = seqlen_q, .alpha = alpha},
                   batch, heads_kv, group, matrices_of(scores_view(scores, dtype), group), matrices_of(from, group),
                   matrices_of(to, 1));
  };
  const bool many = products().calls() > kMaxCalls;
  if (many && !is_packed(from)) from = packed(from, x.room);
  if (!cublas_takes(to) || (many && !is_packed(to))) to = packed(to, out.room);
  if (Check failure = copy(x.tensor, from, at.stream)) return failure;
  {
    Cublas::Queue queue(*cublas_, at.workspace, cublas_size_, at.stream);
    if (Check failure = products().run(queue)) return failure;
  }
  return copy(to, out.tensor, at.stream);
}

Check CudaProducts::copy(const TensorView& from, const TensorView& to, CudaStream stream) const {
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
  return copy_->launch({.x = static_cast<unsigned>(ceil_div(params.rows, math::kCopyThreads / width))},
                       math::kCopyThreads, &params, stream);
}

}  // namespace attnjit::runtime
