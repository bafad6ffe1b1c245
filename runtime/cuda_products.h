// The products of the eager plans on a GPU: by cuBLAS over materialised scores, with packed copies of tensors whose
// strides it cannot walk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "runtime/cublas.h"
#include "runtime/cuda_driver.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// Of one problem. Scores are (B, Hq, Sq, pitch) of f32, or in their place of the inputs' 16-bit type, whose rows start
// where rows of f32 would.
class CudaProducts {
 public:
  // Shapes and dtypes of `problem` are used. `copy`: attnjit_math_copy for its dtype.
  CudaProducts(const ForwardCall& problem, std::shared_ptr<const Cublas> cublas, std::shared_ptr<const CudaKernel> copy,
               int arch);

  // Why no call of these shapes can be served, on any device; empty where it can.
  static std::string refuse(const ForwardCall& problem);

  // Bytes, a multiple of the workspace's alignment: of scores, of a packed copy of a tensor (B, heads, rows, columns),
  // and of cuBLAS's own workspace.
  std::size_t scores_size() const { return size_of(batch * heads * seqlen_q, pitch, sizeof(float)); }
  std::size_t packed_size(std::int64_t all_heads, std::int64_t rows, std::int64_t columns) const {
    return size_of(batch * all_heads * rows, columns, dsl::dtype_size(dtype));
  }
  std::size_t cublas_size() const { return cublas_size_; }
  static std::size_t size_of(std::int64_t rows, std::int64_t columns, std::int64_t element);

  // A tensor and room for its packed copy.
  struct Operand {
    TensorView tensor;
    void* room;
  };
  struct Queue {
    void* workspace;  // of cublas_size()
    CudaStream stream;
  };
  // X is of the query heads, Y of the key/value heads; alpha is not 0.
  // scores (B, Hq, Sq, Skv), f32 = alpha * X Y^T.
  Check multiply_features(float alpha, const Operand& x, const Operand& y, void* scores, const Queue& queue) const;
  // out (B, Hq, Sq, .) = alpha * S Y, for S in the inputs' type.
  Check multiply_keys(float alpha, void* scores, const Operand& y, const Operand& out, const Queue& queue) const;
  // out (B, Hkv, Skv, .) = alpha * sum of S^T X over a group's heads, likewise.
  Check multiply_queries(float alpha, void* scores, const Operand& x, const Operand& out, const Queue& queue) const;
  // Nothing where both are one tensor.
  Check copy(const TensorView& from, const TensorView& to, CudaStream stream) const;
  // As a compact tensor at `data`.
  static TensorView packed(TensorView tensor, void* data);

  const std::string& description() const { return cublas_->description(); }

  dsl::DType dtype;
  std::int64_t batch, heads, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v;
  std::int64_t pitch;  // scores from row to row

 private:
  TensorView scores_view(void* data, dsl::DType type) const;

  std::shared_ptr<const Cublas> cublas_;
  std::shared_ptr<const CudaKernel> copy_;
  std::size_t cublas_size_;
};

// Blocks along a grid's second axis.
inline constexpr std::int64_t kMaxGridY = 65535;
inline std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

}  // namespace attnjit::runtime
