// Verifiers, folders and integer ranges of the attnjit dialect.
#include "compiler/dialect/dialect.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dsl/expr.h"
#include "kernels_templates/cpu/tile_abi.h"
#include "llvm/ADT/TypeSwitch.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/IR/DialectImplementation.h"

// Generated; the order matters.
// clang-format off
#include "AttnjitDialect.cpp.inc"
#include "AttnjitEnums.cpp.inc"
#define GET_OP_CLASSES
#include "AttnjitOps.cpp.inc"
// clang-format on

namespace attnjit::compiler {

using llvm::APInt;
using mlir::ConstantIntRanges;

void AttnjitDialect::initialize() {
  addOperations<
#define GET_OP_LIST
#include "AttnjitOps.cpp.inc"
      >();
}

mlir::Operation* AttnjitDialect::materializeConstant(mlir::OpBuilder& builder, mlir::Attribute value, mlir::Type type,
                                                     mlir::Location loc) {
  return mlir::arith::ConstantOp::materialize(builder, value, type, loc);
}

// ---- index

mlir::LogicalResult IndexOp::verify() {
  const std::int64_t extent = getExtent().value_or(1);
  if (extent < 1) return emitOpError("needs an extent of at least 1, got ") << extent;
  return mlir::success();
}

void IndexOp::inferResultRanges(llvm::ArrayRef<ConstantIntRanges>, mlir::SetIntRangeFn set_range) {
  const std::int64_t last = getExtent().value_or(std::numeric_limits<std::int64_t>::max()) - 1;
  set_range(getResult(), ConstantIntRanges::fromSigned(APInt(64, 0), APInt(64, last)));
}

// ---- tile_end

mlir::LogicalResult TileEndOp::verify() {
  if (getExtent() < 1) return emitOpError("needs an extent of at least 1, got ") << getExtent();
  return mlir::success();
}

void TileEndOp::inferResultRanges(llvm::ArrayRef<ConstantIntRanges>, mlir::SetIntRangeFn set_range) {
  set_range(getResult(), ConstantIntRanges::fromSigned(APInt(64, 0), APInt(64, getExtent() - 1)));
}

// ---- read

mlir::LogicalResult ReadOp::verify() {
  const std::size_t rank = getIndices().size();
  if (getCapture() >= static_cast<std::uint32_t>(dsl::kMaxCaptures))
    return emitOpError("reads capture ") << getCapture() << ", allowed are 0 to " << dsl::kMaxCaptures - 1;
  if (rank > static_cast<std::size_t>(dsl::kMaxRank))
    return emitOpError("has ") << rank << " indices, allowed are up to " << dsl::kMaxRank;
  const llvm::SmallVector<bool> unproven(rank, false);
  if (getExtents().size() != rank || getStrides().size() != rank || getInBounds().value_or(unproven).size() != rank)
    return emitOpError("needs one extent, stride and in_bounds flag per index");
  for (const std::int64_t extent : getExtents())
    if (extent < 1) return emitOpError("needs extents of at least 1, got ") << extent;
  for (const std::int64_t stride : getStrides())
    if (stride < -1 || stride > 1) return emitOpError("needs strides of 0, 1 or -1 (any), got ") << stride;

  if (getStaged().value_or(0) >= static_cast<std::uint32_t>(cpu::kMaxStagedReads))
    return emitOpError("is staged as ") << *getStaged() << ", allowed are 0 to " << cpu::kMaxStagedReads - 1;

  const mlir::Type element = getElement(), result = getResult().getType();
  const auto integer = llvm::dyn_cast<mlir::IntegerType>(element);
  const bool is_float = element.isF32() || element.isF16() || element.isBF16();
  const bool is_bool = element.isInteger(1);
  const bool is_int =
      integer &&
      (integer.isUnsigned() ? integer.getWidth() == 8
                            : integer.isSignless() && llvm::is_contained({8u, 16u, 32u, 64u}, integer.getWidth()));
  if (!is_float && !is_bool && !is_int) return emitOpError("cannot read elements of type ") << element;
  if (is_float ? !result.isF32() : is_bool ? !result.isInteger(1) : !result.isInteger(64))
    return emitOpError("reads ") << element << " as f32, i64 or i1 by kind, not as " << result;
  return mlir::success();
}

void ReadOp::inferResultRanges(llvm::ArrayRef<ConstantIntRanges>, mlir::SetIntRangeFn set_range) {
  const auto integer = llvm::dyn_cast<mlir::IntegerType>(getElement());
  if (!integer) return;
  const unsigned width = integer.getWidth();
  if (width == 1) return set_range(getResult(), ConstantIntRanges::maxRange(1));
  const ConstantIntRanges range = integer.isUnsigned()
                                      ? ConstantIntRanges::fromSigned(APInt(64, 0), APInt::getMaxValue(width).zext(64))
                                      : ConstantIntRanges::fromSigned(APInt::getSignedMinValue(width).sext(64),
                                                                      APInt::getSignedMaxValue(width).sext(64));
  set_range(getResult(), range);
}

// ---- sink

mlir::LogicalResult SinkOp::verify() {
  const std::size_t rank = getIndices().size();
  if (getCapture() >= static_cast<std::uint32_t>(dsl::kMaxCaptures))
    return emitOpError("adds to capture ") << getCapture() << ", allowed are 0 to " << dsl::kMaxCaptures - 1;
  if (rank > static_cast<std::size_t>(dsl::kMaxRank))
    return emitOpError("has ") << rank << " indices, allowed are up to " << dsl::kMaxRank;
  const llvm::SmallVector<bool> unproven(rank, false);
  if (getExtents().size() != rank || getInBounds().value_or(unproven).size() != rank)
    return emitOpError("needs one extent and in_bounds flag per index");
  for (const std::int64_t extent : getExtents())
    if (extent < 1) return emitOpError("needs extents of at least 1, got ") << extent;
  return mlir::success();
}

// ---- floordiv, floormod

namespace {

APInt floor_div(const APInt& a, const APInt& b) {
  if (b.isZero()) return APInt::getZero(a.getBitWidth());
  APInt quotient, remainder;
  APInt::sdivrem(a, b, quotient, remainder);  // wraps for the smallest divided by -1
  if (!remainder.isZero() && remainder.isNegative() != b.isNegative()) --quotient;
  return quotient;
}

APInt floor_mod(const APInt& a, const APInt& b) {
  if (b.isZero()) return APInt::getZero(a.getBitWidth());
  APInt remainder = a.srem(b);
  if (!remainder.isZero() && remainder.isNegative() != b.isNegative()) remainder += b;
  return remainder;
}

APInt smaller(const APInt& a, const APInt& b) { return a.slt(b) ? a : b; }
APInt larger(const APInt& a, const APInt& b) { return a.slt(b) ? b : a; }

// The negative and the positive part of [low, high], each as a pair of ends.
llvm::SmallVector<std::pair<APInt, APInt>, 2> nonzero_parts(const APInt& low, const APInt& high) {
  const unsigned width = low.getBitWidth();
  llvm::SmallVector<std::pair<APInt, APInt>, 2> parts;
  if (low.isNegative()) parts.emplace_back(low, smaller(high, APInt::getAllOnes(width)));
  if (high.isStrictlyPositive()) parts.emplace_back(larger(low, APInt(width, 1)), high);
  return parts;
}

bool contains_zero(const ConstantIntRanges& range) {
  return !range.smin().isStrictlyPositive() && !range.smax().isNegative();
}

mlir::OpFoldResult fold_division(mlir::Attribute lhs, mlir::Attribute rhs, mlir::Type type,
                                 APInt (*evaluate)(const APInt&, const APInt&)) {
  const auto a = llvm::dyn_cast_or_null<mlir::IntegerAttr>(lhs), b = llvm::dyn_cast_or_null<mlir::IntegerAttr>(rhs);
  if (!a || !b) return {};
  return mlir::IntegerAttr::get(type, evaluate(a.getValue(), b.getValue()));
}

}  // namespace

mlir::OpFoldResult FloorDivOp::fold(FoldAdaptor adaptor) {
  const auto divisor = llvm::dyn_cast_or_null<mlir::IntegerAttr>(adaptor.getRhs());
  if (divisor && divisor.getValue().isOne()) return getLhs();
  return fold_division(adaptor.getLhs(), adaptor.getRhs(), getType(), floor_div);
}

mlir::OpFoldResult FloorModOp::fold(FoldAdaptor adaptor) {
  return fold_division(adaptor.getLhs(), adaptor.getRhs(), getType(), floor_mod);
}

// For divisors of one sign the quotient is monotone in each operand, so its extremes lie at the corners.
void FloorDivOp::inferResultRanges(llvm::ArrayRef<ConstantIntRanges> ranges, mlir::SetIntRangeFn set_range) {
  const ConstantIntRanges &a = ranges[0], &b = ranges[1];
  const unsigned width = a.smin().getBitWidth();
  const bool wraps = a.smin().isMinSignedValue() && b.smin().isNegative() && b.smax().sge(APInt::getAllOnes(width));
  if (wraps) return set_range(getResult(), ConstantIntRanges::maxRange(width));
  APInt low = APInt::getSignedMaxValue(width), high = APInt::getSignedMinValue(width);
  const auto include = [&](const APInt& value) {
    low = smaller(low, value);
    high = larger(high, value);
  };
  if (contains_zero(b)) include(APInt::getZero(width));
  for (const auto& [first, last] : nonzero_parts(b.smin(), b.smax()))
    for (const APInt& numerator : {a.smin(), a.smax()})
      for (const APInt& divisor : {first, last}) include(floor_div(numerator, divisor));
  set_range(getResult(), ConstantIntRanges::fromSigned(low, high));
}

void FloorModOp::inferResultRanges(llvm::ArrayRef<ConstantIntRanges> ranges, mlir::SetIntRangeFn set_range) {
  const ConstantIntRanges &a = ranges[0], &b = ranges[1];
  const unsigned width = a.smin().getBitWidth();
  const APInt zero = APInt::getZero(width);
  if (!a.smin().isNegative() && b.smin().sgt(a.smax())) return set_range(getResult(), a);  // x % n = x
  const APInt low = b.smin().isNegative() ? b.smin() + 1 : zero;
  APInt high = b.smax().isStrictlyPositive() ? b.smax() - 1 : zero;
  if (!a.smin().isNegative() && !b.smin().isNegative()) high = smaller(high, a.smax());
  set_range(getResult(), ConstantIntRanges::fromSigned(low, high));
}

// ---- floor_log2

void FloorLog2Op::inferResultRanges(llvm::ArrayRef<ConstantIntRanges> ranges, mlir::SetIntRangeFn set_range) {
  const auto log2 = [](const APInt& value) {
    return APInt(value.getBitWidth(), value.isStrictlyPositive() ? value.logBase2() : 0);
  };
  set_range(getResult(), ConstantIntRanges::fromSigned(log2(ranges[0].smin()), log2(ranges[0].smax())));
}

// ---- to_int

mlir::OpFoldResult ToIntOp::fold(FoldAdaptor adaptor) {
  const auto value = llvm::dyn_cast_or_null<mlir::FloatAttr>(adaptor.getValue());
  if (!value) return {};
  const double x = value.getValueAsDouble();
  constexpr std::int64_t kSmallest = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
  const std::int64_t result = std::isnan(x) ? 0
                              : x >= 0x1p63 ? kLargest
                              : x < -0x1p63 ? kSmallest
                                            : static_cast<std::int64_t>(x);
  return mlir::IntegerAttr::get(getType(), result);
}

}  // namespace attnjit::compiler
