// Attention as an eager framework runs it: tensors in a workspace and one pass per operation over them. What the eager
// forward and backward on the CPU are made of. It knows the language and not the compiler, so it checks the compiled
// path independently.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "dsl/expr.h"
#include "runtime/blas.h"
#include "runtime/forward.h"
#include "runtime/math_passes.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// What a plan computes with; the defaults are the best of this machine.
struct MathOptions {
  const Passes* passes = &host_passes();
  const Blas* blas = Blas::get();  // null: plain code
};

inline constexpr std::int64_t kElementsPerTask = 1 << 15;  // of one pass: 128 KiB of floats, well above a task's cost

// Bits of the dimensions that a tensor has of (B, Hq, Sq, Skv).
inline constexpr unsigned kDimB = 1, kDimH = 2, kDimQ = 4, kDimKv = 8, kRowDims = 7, kAllDims = 15;

// A tensor of f32 that BLAS accepts, per batch and head.
struct Matrices {
  const float* data = nullptr;
  std::int64_t stride[3] = {};
  const float* of(std::int64_t b, std::int64_t h) const { return data + b * stride[0] + h * stride[1]; }
};

// The steps of a plan and what they run on. Immutable once built.
//
// Scores are f32 of (B, Hq, Sq, Skv); 16-bit inputs are widened first. An operation's result has the broadcast shape of
// its operands (`q_idx - kv_idx` is one (Sq, Skv) tensor of int64, `bias[h]` one of (Hq)) and lives until its last use.
struct MathProgram {
  // A tensor: a place in the workspace or among the constants.
  struct Place {
    bool constant = false;
    std::size_t offset = 0;  // bytes
  };

  // Those up to kScatter are run by run_pass, the others by their plan.
  enum class Kind : std::uint8_t {
    kIota,
    kElementwise,
    kRead,
    kSum,      // over one dimension
    kScatter,  // in[0] is added to doubles of the captured tensor's shape, at the indices in[1] and on
    kScores,
    // Of the backward: rows of what is given, gradients of probabilities, products with dS and P.
    kLse,
    kGradLse,
    kDelta,
    kGradProbabilities,
    kGradQ,
    kGradK,
    kGradV,
  };
  static constexpr int kMaxOperands = dsl::kMaxRank + 1;

  // One pass: the output is contiguous, dimensions that every operand walks alike are merged, and of the innermost one
  // each operand has the stride 0 or 1. A sum is of (extent[0], extent[1], extent[2]) over the middle one.
  struct Step {
    Kind kind = Kind::kElementwise;
    ElementwiseFn elementwise = nullptr;
    std::int32_t capture = -1;
    // A scatter's: the elements are shared out among `parts`, which have sums of their own if `apart`.
    std::int64_t parts = 0;
    bool apart = true;
    Place out = {};
    std::size_t out_size = 0;  // bytes of an element
    int num_in = 0;
    Place in[kMaxOperands] = {};
    std::size_t in_size[kMaxOperands] = {};
    std::int64_t in_stride[kMaxOperands][4] = {};
    int rank = 1;
    std::int64_t extent[4] = {1, 1, 1, 1};
    std::int64_t elements = 1;
    std::string text;
  };

  MathProgram(const ForwardCall& problem, const MathOptions& options);

  // Room in the workspace for packed f32 copies of such a tensor: f32 tensors need it only where BLAS cannot take their
  // strides, which may differ from call to call. The offset.
  std::size_t reserve(std::int64_t heads, std::int64_t rows, std::int64_t columns);
  std::size_t reserve_bytes(std::size_t bytes);
  // Whether scores and what is reserved can be addressed with room to spare.
  bool is_addressable() const;
  std::string describe_engine() const;

  void* at(const Place& place, void* workspace) const;
  void run_pass(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const;

  // `tensor` itself where BLAS takes it, or its copy at `packed`, an offset.
  Matrices as_f32(const TensorView& tensor, std::size_t packed, void* workspace, ThreadPool& pool) const;
  // Q K^T, scaled; `q` and `k` are room for packed copies.
  void run_scores(const Step& step, const ForwardCall& call, std::size_t q, std::size_t k, void* workspace,
                  ThreadPool& pool) const;
  // Products, each with a part of the rows per task. X is of the query heads, Y of the key/value heads; alpha is
  // anything. scores (B, Hq, Sq, Skv) = alpha * X Y^T, of `depth` features.
  void multiply_features(float alpha, const Matrices& x, const Matrices& y, std::int64_t depth, float* scores,
                         ThreadPool& pool) const;
  // out (B, Hq, Sq, .) = alpha * S Y, through f32 rows at `packed` where its type or strides ask for it.
  void multiply_keys(float alpha, const float* scores, const Matrices& y, const TensorView& out, std::size_t packed,
                     void* workspace, ThreadPool& pool) const;
  // out (B, Hkv, Skv, .) = alpha * sum of S^T X over a group's heads, likewise.
  void multiply_queries(float alpha, const float* scores, const Matrices& x, const TensorView& out, std::size_t packed,
                        void* workspace, ThreadPool& pool) const;

  MathOptions options;
  std::int64_t batch, heads, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v;
  std::vector<std::uint64_t> constants;  // one element each
  std::vector<Step> steps;
  std::size_t workspace_size = 0;  // saturates at the largest size_t, which no workspace has

 private:
  void run_sum(const Step& step, void* workspace, ThreadPool& pool) const;
  void run_scatter(const Step& step, const ForwardCall& call, void* workspace, ThreadPool& pool) const;
  template <typename Visit>
  void walk(const Step& step, void* workspace, std::int64_t begin, std::int64_t end, Visit&& visit) const;
  void gemm(const GemmArgs& args) const;
  void finish_rows(float alpha, const TensorView& out, std::int64_t b, std::int64_t h, std::int64_t begin,
                   std::int64_t count, float* rows, std::int64_t stride) const;
  float* rows_of(const TensorView& out, std::size_t packed, void* workspace, std::int64_t b, std::int64_t h,
                 std::int64_t begin, std::int64_t* stride) const;
  std::int64_t rows_per_product(std::int64_t products, std::int64_t rows, int threads) const;
};

// An expression's values, by node; -1 for those that the root does not need.
struct LoweredExpr {
  static constexpr int kTrue = -1;
  static constexpr int kFalse = -2;

  std::vector<int> value;
  int root = -1;
  int keep = kTrue;  // the value that says which elements are kept; kTrue where the root is -inf at all the others
  // By node: whether it decides about dropping, and whether it then drops every element that has its value.
  std::vector<bool> decides, drops;
};

// Lowers expressions to steps over values, then gives the values their places.
class MathBuilder {
 public:
  // Places begin behind what `program` has reserved.
  explicit MathBuilder(MathProgram* program);

  LoweredExpr lower(const dsl::Expr& expr, bool wants_keep);

  int constant(dsl::Type type, std::uint64_t bits);
  int literal(float value);
  int elementwise(ElementwiseFn function, dsl::Type result, const std::vector<int>& in, const std::string& name);
  int elementwise(dsl::Op op, dsl::Function function, dsl::Type operand, dsl::Type result, const std::vector<int>& in,
                  const std::string& name);
  int select(int condition, int then, int otherwise);
  // `value`, -inf where `mask_mod`, which may be null, is false.
  int masked(int value, const dsl::Expr* mask_mod);
  // As a tensor of its own over all four dimensions.
  int materialize(int value);
  // Over what `value` has beyond `dims`.
  int sum(int value, unsigned dims);
  // A tensor that a step of `kind` fills.
  int produce(MathProgram::Kind kind, unsigned dims, const std::vector<int>& in, const std::string& name);
  // A step whose results lie elsewhere.
  void consume(MathProgram::Step step, const std::vector<int>& in);
  unsigned dims(int value) const { return values_[static_cast<std::size_t>(value)].dims; }
  // The dimension whose positions `value` holds; 0 for other values.
  unsigned position_of(int value) const;
  std::int64_t extent(unsigned dim) const { return extent_[std::countr_zero(dim)]; }

  // Places everything; `live` are values that outlive the steps.
  void finish(const std::vector<int>& live);
  MathProgram::Place place(int value) const;
  // Of a contiguous tensor with these dimensions; 0 for the others.
  void strides(unsigned dims, std::int64_t (&stride)[4]) const;

 private:
  struct Value {
    dsl::Type type = dsl::Type::kFloat;
    unsigned dims = 0;
    bool constant = false;
    std::size_t offset = 0;
    bool owns_place = true;
    int last_use = -1;  // number of a step
  };
  struct Pending {
    MathProgram::Step step;
    int out;  // -1: none
    std::vector<int> in;
  };

  // Hands out places of the workspace; a freed one is used again by the best fit.
  class Arena {
   public:
    explicit Arena(std::size_t begin) : end_(begin) {}
    std::size_t take(std::size_t bytes);
    void give_back(std::size_t offset, std::size_t bytes);
    std::size_t end() const { return end_; }

   private:
    struct Block {
      std::size_t offset, bytes;
    };
    std::vector<Block> free_;  // by offset, no two adjacent
    std::size_t end_;
  };

  int add_value(const Value& value);
  void add_step(MathProgram::Step step, int out, std::vector<int> in);
  int index(unsigned dim);
  int score();
  int lower_node(const dsl::Expr& expr, const dsl::Node& node, const std::vector<int>& value);
  int lower_read(const dsl::Node& node, const std::vector<int>& in);
  int lower_keep(const dsl::Expr& expr, LoweredExpr* lowered);
  int keep_and(int a, int b);
  int keep_select(int condition, int then, int otherwise);
  std::size_t bytes(const Value& value) const;
  void place_step(int s);
  void finish_step(Pending& pending);
  void merge_dimensions(Pending& pending, unsigned dims);
  void arrange_sum(Pending& pending);

  MathProgram& program_;
  Arena arena_;
  std::int64_t extent_[4];
  std::vector<Value> values_;
  std::vector<Pending> steps_;
  int index_[4] = {-1, -1, -1, -1};
  int score_ = -1;
  bool emit_keep_ = false;
};

}  // namespace attnjit::runtime
