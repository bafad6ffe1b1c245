// The oracle of the language: evaluates a bound expression in double precision, element by element.
// Shares the parser and the types with the compiler, and nothing else.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dsl/expr.h"
#include "dsl/functions.h"

namespace attnjit::dsl {

// A captured tensor as the interpreter reads it. Strides in elements. Indices are clamped to the extents, which are at
// least 1.
struct CaptureView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::int64_t extent[kMaxRank] = {};
  std::int64_t stride[kMaxRank] = {};
};

struct Point {
  double score = 0.0;
  std::int64_t b = 0, h = 0, q_idx = 0, kv_idx = 0;
};

// A score_mod's value and the `keep` of language.md, "Dropped elements". value is -inf where keep is false.
struct Element {
  double value = 0.0;
  bool keep = true;
};

// An index of a captured read that was clamped, as it lies outside its dimension.
struct ClampedIndex {
  std::int32_t capture = 0;  // its number
  int dimension = 0;
  std::int64_t index = 0;
};

// Reusable evaluation of one bound expression, which must outlive it; not safe for concurrent use of one object.
// Floats are doubles throughout: literals as they are written, captured values widened exactly, ints converted.
class Interpreter {
 public:
  Interpreter(const Expr& bound, std::span<const CaptureView> captures);
  Element score_mod(const Point& point);
  bool mask_mod(const Point& point);
  // Of the last evaluation: the value of every node. Valid until the next call.
  std::span<const Scalar> values() const { return values_; }
  // Of the last evaluation: the clamped indices of reads that its result depends on. What a choice did not choose has
  // no part in it, nor, where the element is dropped, what did not drop it. Valid until the next call.
  std::span<const ClampedIndex> clamped_indices();

 private:
  void evaluate(const Point& point);
  bool keep(const Node& node) const;
  Scalar read(const Node& node) const;

  const Expr& expr_;
  std::vector<CaptureView> captures_;
  std::vector<Scalar> values_;
  std::vector<char> keep_;
  std::vector<char> used_;
  std::vector<ClampedIndex> clamped_;
};

// One captured element, widened. bf16 and f16 exactly; bools as 0 or 1.
double read_as_double(const void* data, DType dtype, std::int64_t offset);
std::int64_t read_as_int(const void* data, DType dtype, std::int64_t offset);

}  // namespace attnjit::dsl
