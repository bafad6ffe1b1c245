// attnjit-lower-to-llvm: the function becomes attnjit_mod of kernels_templates/cpu/tile.cpp, or that of a backward the
// functions that gradient_tile.cpp and tile_abi.h ask for; where it stages reads attnjit_lane_rows of rows.cpp beside
// them.
#include <cstddef>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "compiler/tile_facts.h"
#include "kernels_templates/cpu/tile_abi.h"
#include "llvm/ADT/SetVector.h"
#include "mlir/Conversion/ArithToLLVM/ArithToLLVM.h"
#include "mlir/Conversion/FuncToLLVM/ConvertFuncToLLVM.h"
#include "mlir/Conversion/LLVMCommon/ConversionTarget.h"
#include "mlir/Conversion/LLVMCommon/TypeConverter.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/LLVMIR/LLVMDialect.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/IRMapping.h"
#include "mlir/IR/Matchers.h"
#include "mlir/Transforms/DialectConversion.h"

namespace attnjit::compiler {

#define GEN_PASS_DEF_LOWERTOLLVM
#include "AttnjitPasses.h.inc"

namespace {

namespace arith = mlir::arith;
namespace LLVM = mlir::LLVM;
namespace math = mlir::math;
using mlir::Value;

// The layout that the address arithmetic below relies on.
static_assert(sizeof(cpu::CapturedView) == 88 && offsetof(cpu::CapturedView, stride) == 8 &&
              offsetof(cpu::CapturedView, extent) == 48);
static_assert(sizeof(cpu::Tile) == 56 && offsetof(cpu::Tile, h_first) == 8 && offsetof(cpu::Tile, q_first) == 24 &&
              offsetof(cpu::Tile, kv_first) == 40);

constexpr llvm::StringLiteral kTileKindName = "attnjit_tile_kind";

// What a function is made for.
enum class Part : std::uint8_t {
  kValue,     // the modified score: attnjit_mod, attnjit_mod_value
  kGradient,  // attnjit_mod_gradient
  kOffsets,   // attnjit_sink_offsets
  kShifts,    // attnjit_row_shifts
  kRows,      // attnjit_lane_rows
  kTile,      // attnjit_tile_kind, attnjit_kv_range, attnjit_q_range
};

// Where in a function's list of arguments a thing is; those that it has not are not asked for.
struct Arguments {
  unsigned indices = 0;   // b, h, q_idx and, where there is one, kv_idx
  unsigned captured = 0;  // the table
  unsigned staged = 0, element = 0;
  unsigned out = 0;     // what is stored to: addresses, contributions, offsets or values
  unsigned places = 0;  // GradientTileParams::places
};

Arguments arguments_of(Part part) {
  switch (part) {
    case Part::kValue:
      return {.indices = 1, .captured = 5, .staged = 6, .element = 7};
    case Part::kGradient:
      return {.indices = 2, .captured = 6, .staged = 7, .element = 8, .out = 9, .places = 10};
    case Part::kOffsets:
      return {.indices = 0, .captured = 4, .out = 5};
    case Part::kShifts:
      return {.indices = 0, .captured = 3, .out = 5};
    case Part::kRows:
      return {.indices = 0, .captured = 4, .out = 5};
    case Part::kTile:
      return {.indices = 0, .captured = 1, .out = 2};
  }
  return {};
}

// Lowers the operations of one function that upstream has no lowering for, or none that is total and vectorises.
class Lowering {
 public:
  // `sinks`: of a backward, in the order of their numbers.
  Lowering(mlir::OpBuilder& builder, mlir::func::FuncOp function, Part part, llvm::MutableArrayRef<SinkOp> sinks = {})
      : b_(builder), function_(function), part_(part), arguments_(arguments_of(part)), sinks_(sinks) {}

  // False where an operation is none that the builder makes.
  mlir::LogicalResult run() {
    for (mlir::Operation& op : llvm::make_early_inc_range(function_.front())) {
      b_.setInsertionPoint(&op);
      loc_ = op.getLoc();
      if (auto ret = llvm::dyn_cast<mlir::func::ReturnOp>(op)) {
        finish(ret);
        continue;
      }
      if (auto read = llvm::dyn_cast<ReadOp>(op); read && part_ == Part::kRows && read.getStaged()) {
        const Value slot =
            byte_offset(argument(arguments_.out), read.getStaged().value_or(0) * std::int64_t{8} * cpu::kPanelLanes);
        LLVM::StoreOp::create(b_, loc_, element_address(read), slot, 8);
        op.erase();
        continue;
      }
      allow_contraction(op);
      Value replacement;
      if (mlir::failed(lower(op, replacement))) return op.emitOpError("has no lowering");
      if (!replacement) continue;
      op.getResult(0).replaceAllUsesWith(replacement);
      op.erase();
    }
    return mlir::success();
  }

 private:
  Value argument(unsigned i) { return function_.getArgument(i); }
  Value f32(float value) { return arith::ConstantOp::create(b_, loc_, b_.getF32FloatAttr(value)); }
  Value integer(mlir::Type type, std::int64_t value) {
    return arith::ConstantOp::create(b_, loc_, b_.getIntegerAttr(type, value));
  }
  Value i64(std::int64_t value) { return integer(b_.getI64Type(), value); }
  Value select(Value c, Value a, Value b) { return arith::SelectOp::create(b_, loc_, c, a, b); }
  Value compare(arith::CmpIPredicate p, Value a, Value b) { return arith::CmpIOp::create(b_, loc_, p, a, b); }

  static void allow_contraction(mlir::Operation& op) {
    using arith::FastMathFlags;
    const bool contract = llvm::isa<arith::AddFOp, arith::SubFOp, arith::MulFOp>(op);
    // Which zero a minimum returns is not observable, and costs instructions.
    const bool no_signed_zeros = llvm::isa<arith::MaximumFOp, arith::MinimumFOp>(op);
    if (!contract && !no_signed_zeros) return;
    op.setAttr(llvm::cast<arith::ArithFastMathInterface>(op).getFastMathAttrName(),
               arith::FastMathFlagsAttr::get(op.getContext(), contract ? FastMathFlags::contract : FastMathFlags::nsz));
  }

  // What is done with what the function was made to return; see make_part.
  void finish(mlir::func::ReturnOp ret) {
    llvm::SmallVector<Value> values(ret.getOperands());
    llvm::ArrayRef<Value> rest = values;
    const auto take = [&rest] {
      const Value first = rest.front();
      rest = rest.drop_front();
      return first;
    };
    llvm::SmallVector<Value, 1> results;
    if (part_ == Part::kValue) {
      results = {select(values[1], values[0], f32(-std::numeric_limits<float>::infinity()))};
    } else if (part_ == Part::kGradient) {
      results = {take()};
      for (auto [i, sink] : llvm::enumerate(sinks_)) {
        if (sink.getRowShift()) continue;
        constexpr std::int64_t kPart = std::int64_t{cpu::kTileRows} * cpu::kPanelLanes;
        const Value at =
            arith::AddIOp::create(b_, loc_, argument(arguments_.element), i64(static_cast<std::int64_t>(i) * kPart));
        const Value slot = element_of(b_.getF32Type(), argument(arguments_.out), at);
        LLVM::StoreOp::create(b_, loc_, take(), slot, 4);
        if (!sink->hasAttr(kPlacedAttr)) continue;
        const unsigned rank = static_cast<unsigned>(sink.getIndices().size());
        const Value place = packed_offset(sink, rest.take_front(rank));
        rest = rest.drop_front(rank);
        LLVM::StoreOp::create(b_, loc_, place, element_of(b_.getI64Type(), argument(arguments_.places), at), 8);
      }
    } else if (part_ == Part::kOffsets) {
      for (auto [i, sink] : llvm::enumerate(sinks_)) {
        if (sink->hasAttr(kPlacedAttr)) continue;
        const unsigned rank = static_cast<unsigned>(sink.getIndices().size());
        const Value offset = packed_offset(sink, rest.take_front(rank));
        rest = rest.drop_front(rank);
        LLVM::StoreOp::create(b_, loc_, offset, byte_offset(argument(arguments_.out), static_cast<std::int64_t>(i) * 8),
                              8);
      }
    } else if (part_ == Part::kShifts) {
      for (auto [i, sink] : llvm::enumerate(sinks_)) {
        if (!sink.getRowShift()) continue;
        LLVM::StoreOp::create(b_, loc_, take(), byte_offset(argument(arguments_.out), static_cast<std::int64_t>(i) * 4),
                              4);
      }
    }
    if (part_ == Part::kTile) {
      if (values[0].getType().isInteger(1)) {
        const auto kind = [&](cpu::TileKind k) { return integer(b_.getI32Type(), static_cast<int>(k)); };
        results = {select(values[0], kind(cpu::TileKind::kSkip),
                          select(values[1], kind(cpu::TileKind::kFull), kind(cpu::TileKind::kPartial)))};
      } else {
        for (auto [i, value] : llvm::enumerate(values))
          LLVM::StoreOp::create(b_, loc_, arith::ExtSIOp::create(b_, loc_, b_.getI64Type(), value),
                                byte_offset(argument(arguments_.out), static_cast<std::int64_t>(i) * 8), 8);
      }
    }
    ret->setOperands(results);
  }

  // The address of element `index`.
  Value element_of(mlir::Type type, Value pointer, Value index) {
    return LLVM::GEPOp::create(b_, loc_, pointer.getType(), type, pointer, llvm::ArrayRef<LLVM::GEPArg>{index},
                               LLVM::GEPNoWrapFlags::inbounds);
  }

  // A function of kernels_templates/cpu/functions.cpp.
  Value call(llvm::StringRef name, mlir::ValueRange arguments, mlir::Type result) {
    auto module = function_->getParentOfType<mlir::ModuleOp>();
    auto callee = module.lookupSymbol<mlir::func::FuncOp>(name);
    if (!callee) {
      mlir::OpBuilder::InsertionGuard guard(b_);
      b_.setInsertionPointToEnd(module.getBody());
      callee = mlir::func::FuncOp::create(b_, loc_, name, b_.getFunctionType(arguments.getTypes(), {result}));
      callee.setPrivate();
    }
    return mlir::func::CallOp::create(b_, loc_, callee, arguments).getResult(0);
  }

  mlir::LogicalResult lower(mlir::Operation& op, Value& replacement) {
    if (auto index = llvm::dyn_cast<IndexOp>(op)) {
      replacement = argument(arguments_.indices + static_cast<unsigned>(index.getRole()));
      return mlir::success();
    }
    if (auto tile_end = llvm::dyn_cast<TileEndOp>(op)) {
      const auto role = static_cast<std::int64_t>(tile_end.getRole());
      const std::int64_t member = role == 0 ? 0 : 2 * role - 1 + (tile_end.getEnd() == End::Last ? 1 : 0);
      replacement =
          LLVM::LoadOp::create(b_, loc_, b_.getI64Type(), byte_offset(argument(arguments_.indices), 8 * member), 8);
      return mlir::success();
    }
    if (auto read = llvm::dyn_cast<ReadOp>(op)) {
      replacement = lower_read(read);
      return mlir::success();
    }
    if (auto div = llvm::dyn_cast<FloorDivOp>(op)) {
      replacement = divide(div.getLhs(), div.getRhs(), false);
      return mlir::success();
    }
    if (auto mod = llvm::dyn_cast<FloorModOp>(op)) {
      replacement = divide(mod.getLhs(), mod.getRhs(), true);
      return mlir::success();
    }
    if (auto log2 = llvm::dyn_cast<FloorLog2Op>(op)) {
      const mlir::Type type = log2.getType();
      const Value positive = arith::MaxSIOp::create(b_, loc_, log2.getValue(), integer(type, 1));
      const Value zeros = LLVM::CountLeadingZerosOp::create(b_, loc_, type, positive, /*is_zero_poison=*/true);
      replacement = arith::SubIOp::create(b_, loc_, integer(type, type.getIntOrFloatBitWidth() - 1), zeros);
      return mlir::success();
    }
    if (auto to_int = llvm::dyn_cast<ToIntOp>(op)) {
      replacement =
          LLVM::CallIntrinsicOp::create(b_, loc_, b_.getI64Type(), b_.getStringAttr("llvm.fptosi.sat.i64.f32"),
                                        mlir::ValueRange{to_int.getValue()})
              .getResult(0);
      return mlir::success();
    }
    if (llvm::isa<arith::RemFOp, GeluOp>(op)) {
      replacement = call(llvm::isa<GeluOp>(op) ? "attnjit_gelu" : "attnjit_fmod", op.getOperands(), b_.getF32Type());
      return mlir::success();
    }
    if (!llvm::isa<math::MathDialect>(op.getDialect()))
      return mlir::success(llvm::isa<arith::ArithDialect>(op.getDialect()));
    return lower_math(op, replacement);
  }

  mlir::LogicalResult lower_math(mlir::Operation& op, Value& replacement) {
    const Value x = op.getOperand(0);
    const mlir::Type type = x.getType();
    if (llvm::isa<math::FloorOp>(op)) {
      replacement = LLVM::FFloorOp::create(b_, loc_, type, x);
    } else if (llvm::isa<math::CeilOp>(op)) {
      replacement = LLVM::FCeilOp::create(b_, loc_, type, x);
    } else if (llvm::isa<math::RoundEvenOp>(op)) {
      replacement = LLVM::RoundEvenOp::create(b_, loc_, type, x);
    } else if (llvm::isa<math::AbsFOp>(op)) {
      replacement = LLVM::FAbsOp::create(b_, loc_, type, x);
    } else if (llvm::isa<math::SqrtOp>(op)) {
      replacement = LLVM::SqrtOp::create(b_, loc_, type, x);
    } else if (llvm::isa<math::RsqrtOp>(op)) {
      replacement = arith::DivFOp::create(b_, loc_, f32(1.0f), LLVM::SqrtOp::create(b_, loc_, type, x));
    } else if (llvm::isa<math::ExpOp, math::Exp2Op, math::LogOp, math::Log2Op, math::Log1pOp, math::TanhOp, math::ErfOp,
                         math::SinOp, math::CosOp, math::PowFOp, math::IPowIOp>(op)) {
      const llvm::StringRef name = op.getName().stripDialect();
      replacement =
          call(llvm::isa<math::PowFOp>(op) ? "attnjit_pow" : ("attnjit_" + name).str(), op.getOperands(), type);
    } else {
      return mlir::failure();
    }
    return mlir::success();
  }

  // Floor division (or its remainder) without a trap: a divisor that would trap is replaced by 1, and selects put the
  // defined result in. Constant divisors, the usual ones, leave none of that.
  Value divide(Value a, Value d, bool remainder) {
    using P = arith::CmpIPredicate;
    const mlir::Type type = a.getType();
    const unsigned width = type.getIntOrFloatBitWidth();
    const Value zero = integer(type, 0), one = integer(type, 1);
    Value is_zero, safe = d;
    llvm::APInt literal;
    if (mlir::matchPattern(d, mlir::m_ConstantInt(&literal))) {
      if (literal.isZero()) return zero;
      if (literal.isAllOnes()) return remainder ? zero : Value(arith::SubIOp::create(b_, loc_, zero, a));
    } else {
      const Value smallest =
          arith::ConstantOp::create(b_, loc_, b_.getIntegerAttr(type, llvm::APInt::getSignedMinValue(width)));
      is_zero = compare(P::eq, d, zero);
      const Value overflows =
          arith::AndIOp::create(b_, loc_, compare(P::eq, a, smallest), compare(P::eq, d, integer(type, -1)));
      // Divided by 1 the smallest integer stays itself: the wrapped quotient, and remainder 0.
      safe = select(arith::OrIOp::create(b_, loc_, is_zero, overflows), one, d);
    }
    const Value quotient = arith::DivSIOp::create(b_, loc_, a, safe);
    const Value rest = arith::SubIOp::create(b_, loc_, a, arith::MulIOp::create(b_, loc_, quotient, safe));
    const Value signs_differ = compare(P::slt, arith::XOrIOp::create(b_, loc_, rest, safe), zero);
    const Value adjust = arith::AndIOp::create(b_, loc_, compare(P::ne, rest, zero), signs_differ);
    Value result;
    if (remainder) {
      result = select(adjust, arith::AddIOp::create(b_, loc_, rest, safe), rest);
    } else {
      result = select(adjust, arith::SubIOp::create(b_, loc_, quotient, one), quotient);
    }
    return is_zero ? select(is_zero, zero, result) : result;
  }

  // A load at a constant byte offset of the captured table: the same for all elements of a call.
  Value table_entry(mlir::Type type, std::int64_t offset) {
    return invariant_load(type, byte_offset(argument(arguments_.captured), offset), 8);
  }

  Value byte_offset(Value pointer, std::int64_t offset) {
    return LLVM::GEPOp::create(b_, loc_, pointer.getType(), b_.getI8Type(), pointer,
                               llvm::ArrayRef<LLVM::GEPArg>{static_cast<std::int32_t>(offset)},
                               LLVM::GEPNoWrapFlags::inbounds);
  }

  Value invariant_load(mlir::Type type, Value address, unsigned alignment) {
    auto load = LLVM::LoadOp::create(b_, loc_, type, address, alignment);
    load.setInvariant(true);
    return load;
  }

  // What an element is loaded as from memory.
  mlir::Type stored_type(mlir::Type element) {
    if (element.isF32()) return element;
    return b_.getIntegerType(element.isInteger(1) ? 8 : element.getIntOrFloatBitWidth());
  }

  // An index clamped to the extent in the captured table.
  Value clamped(Value index, std::int64_t view, unsigned dimension) {
    const Value last = arith::SubIOp::create(b_, loc_, table_extent(view, dimension), i64(1));
    return arith::MaxSIOp::create(b_, loc_, arith::MinSIOp::create(b_, loc_, index, last), i64(0));
  }
  Value table_extent(std::int64_t view, unsigned dimension) {
    return table_entry(b_.getI64Type(), view + 48 + 8 * std::int64_t{dimension});
  }
  static std::int64_t view_of(std::uint32_t capture) { return static_cast<std::int64_t>(capture) * 88; }

  // Where the element lies in the tensor.
  Value element_address(ReadOp read) {
    const std::int64_t view = view_of(read.getCapture());
    const llvm::SmallVector<bool> unproven(read.getIndices().size(), false);
    const llvm::ArrayRef<bool> in_bounds = read.getInBounds().value_or(unproven);
    Value offset;
    for (unsigned i = 0; i < read.getIndices().size(); ++i) {
      if (read.getStrides()[i] == 0 || read.getExtents()[i] == 1) continue;
      Value index = read.getIndices()[i];
      if (!in_bounds[i]) index = clamped(index, view, i);
      if (read.getStrides()[i] != 1)
        index = arith::MulIOp::create(b_, loc_, index, table_entry(b_.getI64Type(), view + 8 + 8 * i));
      offset = offset ? Value(arith::AddIOp::create(b_, loc_, offset, index)) : index;
    }
    const Value address = table_entry(LLVM::LLVMPointerType::get(b_.getContext()), view);
    return offset ? element_of(stored_type(read.getElement()), address, offset) : address;
  }

  // Where in a packed tensor of the captured one's extents a contribution goes.
  Value packed_offset(SinkOp sink, llvm::ArrayRef<Value> indices) {
    const std::int64_t view = view_of(sink.getCapture());
    const llvm::SmallVector<bool> unproven(indices.size(), false);
    const llvm::ArrayRef<bool> in_bounds = sink.getInBounds().value_or(unproven);
    Value offset;
    for (unsigned i = 0; i < indices.size(); ++i) {
      if (sink.getExtents()[i] == 1) continue;
      const Value index = in_bounds[i] ? indices[i] : clamped(indices[i], view, i);
      if (offset) offset = arith::MulIOp::create(b_, loc_, offset, table_extent(view, i));
      offset = offset ? Value(arith::AddIOp::create(b_, loc_, offset, index)) : index;
    }
    return offset ? offset : i64(0);
  }

  // The element of a staged read: a float as f32, everything else as i32.
  Value lower_staged_read(ReadOp read) {
    const mlir::Type result = read.getResult().getType();
    const mlir::Type stored = result.isF32() ? result : mlir::Type(b_.getI32Type());
    const Value first = i64(read.getStaged().value_or(0) * std::int64_t{cpu::kTileRows} * cpu::kPanelLanes);
    const Value element = arith::AddIOp::create(b_, loc_, argument(arguments_.element), first);
    const Value loaded = invariant_load(stored, element_of(stored, argument(arguments_.staged), element), 4);
    if (result.isF32()) return loaded;
    if (result.isInteger(1)) return compare(arith::CmpIPredicate::ne, loaded, integer(stored, 0));
    return arith::ExtSIOp::create(b_, loc_, result, loaded);
  }

  Value lower_read(ReadOp read) {
    if (read.getStaged() && (part_ == Part::kValue || part_ == Part::kGradient)) return lower_staged_read(read);
    const mlir::Type i64_type = b_.getI64Type();
    const mlir::Type element = read.getElement();
    const mlir::Type stored = stored_type(element);
    const unsigned bits = stored.getIntOrFloatBitWidth();
    const Value loaded = invariant_load(stored, element_address(read), bits / 8);
    if (element.isF32()) return loaded;
    if (element.isInteger(1)) return compare(arith::CmpIPredicate::ne, loaded, integer(stored, 0));
    if (element.isBF16()) {
      const Value wide = arith::ExtUIOp::create(b_, loc_, b_.getI32Type(), loaded);
      const Value high = arith::ShLIOp::create(b_, loc_, wide, integer(b_.getI32Type(), 16));
      return arith::BitcastOp::create(b_, loc_, b_.getF32Type(), high);
    }
    if (element.isF16()) return call("attnjit_widen_f16", {loaded}, b_.getF32Type());
    if (bits == 64) return loaded;
    return element.isUnsignedInteger() ? Value(arith::ExtUIOp::create(b_, loc_, i64_type, loaded))
                                       : Value(arith::ExtSIOp::create(b_, loc_, i64_type, loaded));
  }

  mlir::OpBuilder& b_;
  mlir::func::FuncOp function_;
  Part part_;
  Arguments arguments_;
  llvm::MutableArrayRef<SinkOp> sinks_;
  mlir::Location loc_ = b_.getUnknownLoc();
};

class LowerToLlvm : public impl::LowerToLlvmBase<LowerToLlvm> {
  void runOnOperation() override {
    mlir::ModuleOp module = getOperation();
    auto tile_facts = module.lookupSymbol<mlir::func::FuncOp>(kTileFactsName);
    auto functions = module.getOps<mlir::func::FuncOp>();
    const auto count = std::distance(functions.begin(), functions.end());
    const bool alone = tile_facts && count == 1;
    if (!alone && (count != (tile_facts ? 2 : 1) || *functions.begin() == tile_facts)) {
      module.emitError("expected one function");
      return signalPassFailure();
    }
    mlir::OpBuilder builder(&getContext());
    if (!alone && mlir::failed(lower_mod(builder, *functions.begin()))) return signalPassFailure();
    if (tile_facts && mlir::failed(lower_tile_facts(builder, tile_facts))) return signalPassFailure();

    const mlir::LLVMTypeConverter converter(&getContext());
    mlir::RewritePatternSet patterns(&getContext());
    mlir::arith::populateArithToLLVMConversionPatterns(converter, patterns);
    mlir::populateFuncToLLVMConversionPatterns(converter, patterns);
    mlir::LLVMConversionTarget target(getContext());
    target.addLegalOp<mlir::ModuleOp>();
    if (mlir::failed(mlir::applyFullConversion(module, target, std::move(patterns)))) signalPassFailure();
  }

  static mlir::LogicalResult lower_mod(mlir::OpBuilder& builder, mlir::func::FuncOp function) {
    const mlir::FunctionType type = function.getFunctionType();
    const mlir::Type f32 = builder.getF32Type(), i1 = builder.getI1Type();
    const bool one_block = !function.isExternal() && function.getBody().hasOneBlock();
    if (one_block && type == builder.getFunctionType({f32}, {f32, i1})) return lower_forward(builder, function);
    if (one_block && type.getInputs() == llvm::ArrayRef<mlir::Type>{f32, f32} && type.getNumResults() >= 3 &&
        type.getResults().take_front(3) == llvm::ArrayRef<mlir::Type>{f32, i1, f32}) {
      return lower_backward(builder, function);
    }
    return function.emitOpError("is not split: expected one block and the type (f32) -> (f32, i1), or of a backward (")
           << "f32, f32) -> (f32, i1, f32, f32...), got " << type;
  }

  static mlir::LogicalResult lower_forward(mlir::OpBuilder& builder, mlir::func::FuncOp function) {
    mlir::func::ReturnOp ret = return_of(function);
    mlir::func::FuncOp mod = make_part(builder, function, Part::kValue, "attnjit_mod", ret.getOperands());
    if (mlir::failed(Lowering(builder, mod, Part::kValue).run())) return mlir::failure();
    return finish(builder, function);
  }

  static mlir::LogicalResult lower_backward(mlir::OpBuilder& builder, mlir::func::FuncOp function) {
    mlir::func::ReturnOp ret = return_of(function);
    llvm::SmallVector<SinkOp> sinks;
    for (const Value result : ret.getOperands().drop_front(3)) {
      auto sink = result.getDefiningOp<SinkOp>();
      if (!sink) return function.emitOpError("returns what is no sink behind the gradient of the score");
      sinks.push_back(sink);
    }
    // What finish() expects, in that order.
    llvm::SmallVector<Value> gradient{ret.getOperand(2)}, offsets, shifts;
    for (SinkOp sink : sinks) {
      (sink.getRowShift() ? shifts : gradient).push_back(sink.getValue());
      llvm::append_range(sink->hasAttr(kPlacedAttr) ? gradient : offsets, sink.getIndices());
    }
    const auto make = [&](Part part, llvm::StringRef name, mlir::ValueRange results) {
      mlir::func::FuncOp made = make_part(builder, function, part, name, results);
      return made ? Lowering(builder, made, part, sinks).run() : mlir::failure();
    };
    if (mlir::failed(make(Part::kValue, "attnjit_mod_value", ret.getOperands().take_front(2))) ||
        mlir::failed(make(Part::kGradient, "attnjit_mod_gradient", gradient)))
      return mlir::failure();
    if (!sinks.empty() && mlir::failed(make(Part::kOffsets, "attnjit_sink_offsets", offsets))) return mlir::failure();
    if (!shifts.empty() && mlir::failed(make(Part::kShifts, "attnjit_row_shifts", shifts))) return mlir::failure();
    return finish(builder, function);
  }

  static mlir::LogicalResult lower_tile_facts(mlir::OpBuilder& builder, mlir::func::FuncOp function) {
    const mlir::Type i1 = builder.getI1Type(), i32 = builder.getI32Type();
    if (function.isExternal() || !function.getBody().hasOneBlock() ||
        function.getFunctionType() != builder.getFunctionType({}, {i1, i1, i32, i32, i32, i32, i1}))
      return function.emitOpError("needs one block and the type () -> (i1, i1, i32, i32, i32, i32, i1)");
    const mlir::ValueRange results = return_of(function).getOperands();
    const auto make = [&](llvm::StringRef name, TileResult first) {
      mlir::func::FuncOp made =
          make_part(builder, function, Part::kTile, name, results.slice(static_cast<unsigned>(first), 2));
      return made ? Lowering(builder, made, Part::kTile).run() : mlir::failure();
    };
    if ((knows_tiles(function) && mlir::failed(make(kTileKindName, TileResult::kNever))) ||
        (knows_kv_range(function) && mlir::failed(make("attnjit_kv_range", TileResult::kKvFirst))) ||
        (knows_q_range(function) && mlir::failed(make("attnjit_q_range", TileResult::kQFirst))))
      return mlir::failure();
    function.erase();
    return mlir::success();
  }

  // What forward and backward share at the end.
  static mlir::LogicalResult finish(mlir::OpBuilder& builder, mlir::func::FuncOp function) {
    llvm::SmallVector<Value> staged;
    for (ReadOp read : staged_reads(function)) staged.push_back(read.getResult());
    if (!staged.empty()) {
      mlir::func::FuncOp rows = make_part(builder, function, Part::kRows, "attnjit_lane_rows", staged);
      if (!rows || mlir::failed(Lowering(builder, rows, Part::kRows).run())) return mlir::failure();
    }
    function.erase();
    return mlir::success();
  }

  static mlir::func::ReturnOp return_of(mlir::func::FuncOp function) {
    return llvm::cast<mlir::func::ReturnOp>(function.front().getTerminator());
  }

  // `kind`: of Part::kTile, the one with a result.
  static mlir::FunctionType part_type(mlir::OpBuilder& builder, Part part, bool kind) {
    const mlir::Type f32 = builder.getF32Type(), i64 = builder.getI64Type();
    const mlir::Type pointer = LLVM::LLVMPointerType::get(builder.getContext());
    switch (part) {
      case Part::kValue:
        return builder.getFunctionType({f32, i64, i64, i64, i64, pointer, pointer, i64}, {f32});
      case Part::kGradient:
        return builder.getFunctionType({f32, f32, i64, i64, i64, i64, pointer, pointer, i64, pointer, pointer}, {f32});
      case Part::kShifts:
        return builder.getFunctionType({i64, i64, i64, pointer, f32, pointer}, {});
      case Part::kOffsets:
      case Part::kRows:
        return builder.getFunctionType({i64, i64, i64, i64, pointer, pointer}, {});
      case Part::kTile:
        return kind ? builder.getFunctionType({pointer, pointer}, {builder.getI32Type()})
                    : builder.getFunctionType({pointer, pointer, pointer}, {});
    }
    return {};
  }

  // A function for `part` behind `function`, with what `results` need of it and a return of them that Lowering
  // replaces. Null, with an error emitted, where they depend on what the part is not given.
  static mlir::func::FuncOp make_part(mlir::OpBuilder& builder, mlir::func::FuncOp function, Part part,
                                      llvm::StringRef name, mlir::ValueRange results) {
    const mlir::OpBuilder::InsertionGuard guard(builder);
    builder.setInsertionPointToEnd(function->getParentOfType<mlir::ModuleOp>().getBody());
    const mlir::FunctionType type = part_type(builder, part, name == kTileKindName);
    mlir::func::FuncOp made = mlir::func::FuncOp::create(builder, function.getLoc(), name, type);
    builder.setInsertionPointToEnd(made.addEntryBlock());
    mlir::IRMapping mapping;
    if (part == Part::kValue || part == Part::kGradient) mapping.map(function.getArgument(0), made.getArgument(0));
    if (part == Part::kGradient) mapping.map(function.getArgument(1), made.getArgument(1));
    if (part == Part::kShifts && function.getNumArguments() > 1)
      mapping.map(function.getArgument(1), made.getArgument(4));

    llvm::SetVector<mlir::Operation*> needed;
    const auto need = [&](Value value, mlir::Operation* user) -> mlir::LogicalResult {
      if (mlir::Operation* op = value.getDefiningOp()) {
        auto index = llvm::dyn_cast<IndexOp>(op);
        if (part == Part::kShifts && index && index.getRole() == Role::Kv)
          return user->emitOpError("feeds a row shift but depends on kv_idx");
        needed.insert(op);
        return mlir::success();
      }
      if (mapping.contains(value)) return mlir::success();
      return user->emitOpError(part == Part::kRows     ? "feeds a staged read but depends on the score"
                               : part == Part::kShifts ? "feeds a row shift but depends on the score"
                                                       : "feeds a sink's index but depends on the score");
    };
    for (const Value result : results)
      if (mlir::failed(need(result, function.front().getTerminator()))) return {};
    for (std::size_t i = 0; i < needed.size(); ++i)
      for (const Value operand : needed[i]->getOperands())
        if (mlir::failed(need(operand, needed[i]))) return {};
    for (mlir::Operation& op : function.front())
      if (needed.contains(&op)) builder.clone(op, mapping);
    llvm::SmallVector<Value> returned;
    // Staged reads become stores.
    if (part != Part::kRows)
      for (const Value result : results) returned.push_back(mapping.lookup(result));
    mlir::func::ReturnOp::create(builder, function.getLoc(), returned);
    set_attributes(builder, made, part, count_captures(function));
    return made;
  }

  static void set_attributes(mlir::OpBuilder& builder, mlir::func::FuncOp function, Part part, std::int64_t captures) {
    const Arguments arguments = arguments_of(part);
    const bool inlined = part != Part::kOffsets && part != Part::kShifts && part != Part::kTile;
    function->setAttr("passthrough", inlined ? builder.getStrArrayAttr({"alwaysinline", "nounwind"})
                                             : builder.getStrArrayAttr({"nounwind"}));
    for (const llvm::StringRef name : {"llvm.noalias", "llvm.readonly", "llvm.nonnull"})
      function.setArgAttr(arguments.captured, name, builder.getUnitAttr());
    function.setArgAttr(arguments.captured, "llvm.dereferenceable",
                        builder.getI64IntegerAttr(static_cast<std::int64_t>(sizeof(cpu::CapturedView)) * captures));
    if (arguments.staged) {
      for (const llvm::StringRef name : {"llvm.noalias", "llvm.readonly"})
        function.setArgAttr(arguments.staged, name, builder.getUnitAttr());
    }
    for (const unsigned out : {arguments.out, arguments.places})
      if (out && out < function.getNumArguments() && part != Part::kRows)
        function.setArgAttr(out, "llvm.noalias", builder.getUnitAttr());
  }

  static std::int64_t count_captures(mlir::func::FuncOp function) {
    std::int64_t count = 0;
    function.walk([&](ReadOp read) { count = std::max<std::int64_t>(count, read.getCapture() + 1); });
    function.walk([&](SinkOp sink) { count = std::max<std::int64_t>(count, sink.getCapture() + 1); });
    return count;
  }
};

}  // namespace
}  // namespace attnjit::compiler
