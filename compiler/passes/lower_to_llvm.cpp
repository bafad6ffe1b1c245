// attnjit-lower-to-llvm: the function becomes attnjit_mod of kernels_templates/cpu/tile.cpp, and where it stages reads
// attnjit_lane_rows of rows.cpp beside it.
#include <cstddef>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
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

// The arguments that both functions have, in this order: b, h, q_idx, kv_idx, captured and one more pointer.
constexpr unsigned kModArguments = 1, kRowsArguments = 0;  // the number of the first
constexpr unsigned kCaptured = 4, kPointer = 5, kElement = 6;

// Lowers the operations of one function that upstream has no lowering for, or none that is total and vectorises.
class Lowering {
 public:
  // `rows`: lowers attnjit_lane_rows, which stores the address of a staged read in the place of reading it.
  Lowering(mlir::OpBuilder& builder, mlir::func::FuncOp function, bool rows)
      : b_(builder), function_(function), rows_(rows) {}

  // False where an operation is none that the builder makes.
  mlir::LogicalResult run() {
    for (mlir::Operation& op : llvm::make_early_inc_range(function_.front())) {
      b_.setInsertionPoint(&op);
      loc_ = op.getLoc();
      if (auto ret = llvm::dyn_cast<mlir::func::ReturnOp>(op)) {
        if (rows_) continue;
        const Value dropped = f32(-std::numeric_limits<float>::infinity());
        ret->setOperands({arith::SelectOp::create(b_, loc_, ret.getOperand(1), ret.getOperand(0), dropped)});
        continue;
      }
      if (auto read = llvm::dyn_cast<ReadOp>(op); read && rows_ && read.getStaged()) {
        const Value slot =
            byte_offset(argument(kPointer), read.getStaged().value_or(0) * std::int64_t{8} * cpu::kPanelLanes);
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
  Value argument(unsigned i) { return function_.getArgument((rows_ ? kRowsArguments : kModArguments) + i); }
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
      replacement = argument(static_cast<unsigned>(index.getRole()));
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
    return invariant_load(type, byte_offset(argument(kCaptured), offset), 8);
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

  // Where the element lies in the tensor.
  Value element_address(ReadOp read) {
    const mlir::Type i64_type = b_.getI64Type();
    const auto pointer = LLVM::LLVMPointerType::get(b_.getContext());
    const std::int64_t view = static_cast<std::int64_t>(read.getCapture()) * 88;
    const llvm::SmallVector<bool> unproven(read.getIndices().size(), false);
    const llvm::ArrayRef<bool> in_bounds = read.getInBounds().value_or(unproven);
    Value offset;
    for (unsigned i = 0; i < read.getIndices().size(); ++i) {
      if (read.getStrides()[i] == 0 || read.getExtents()[i] == 1) continue;
      Value index = read.getIndices()[i];
      if (!in_bounds[i]) {
        const Value extent = table_entry(i64_type, view + 48 + 8 * i);
        const Value last = arith::SubIOp::create(b_, loc_, extent, i64(1));
        index = arith::MaxSIOp::create(b_, loc_, arith::MinSIOp::create(b_, loc_, index, last), i64(0));
      }
      if (read.getStrides()[i] != 1)
        index = arith::MulIOp::create(b_, loc_, index, table_entry(i64_type, view + 8 + 8 * i));
      offset = offset ? Value(arith::AddIOp::create(b_, loc_, offset, index)) : index;
    }
    const Value address = table_entry(pointer, view);
    if (!offset) return address;
    return LLVM::GEPOp::create(b_, loc_, pointer, stored_type(read.getElement()), address,
                               llvm::ArrayRef<LLVM::GEPArg>{offset}, LLVM::GEPNoWrapFlags::inbounds);
  }

  // The element of a staged read: a float as f32, everything else as i32.
  Value lower_staged_read(ReadOp read) {
    const mlir::Type result = read.getResult().getType();
    const mlir::Type stored = result.isF32() ? result : mlir::Type(b_.getI32Type());
    const Value first = i64(read.getStaged().value_or(0) * std::int64_t{cpu::kTileRows} * cpu::kPanelLanes);
    const Value element = arith::AddIOp::create(b_, loc_, argument(kElement), first);
    const Value address = LLVM::GEPOp::create(b_, loc_, argument(kPointer).getType(), stored, argument(kPointer),
                                              llvm::ArrayRef<LLVM::GEPArg>{element}, LLVM::GEPNoWrapFlags::inbounds);
    const Value loaded = invariant_load(stored, address, 4);
    if (result.isF32()) return loaded;
    if (result.isInteger(1)) return compare(arith::CmpIPredicate::ne, loaded, integer(stored, 0));
    return arith::ExtSIOp::create(b_, loc_, result, loaded);
  }

  Value lower_read(ReadOp read) {
    if (read.getStaged()) return lower_staged_read(read);
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
  bool rows_;
  mlir::Location loc_ = b_.getUnknownLoc();
};

class LowerToLlvm : public impl::LowerToLlvmBase<LowerToLlvm> {
  void runOnOperation() override {
    mlir::ModuleOp module = getOperation();
    auto functions = module.getOps<mlir::func::FuncOp>();
    if (std::distance(functions.begin(), functions.end()) != 1) {
      module.emitError("expected one function");
      return signalPassFailure();
    }
    mlir::func::FuncOp function = *functions.begin();
    const mlir::FunctionType type = function.getFunctionType();
    mlir::OpBuilder builder(&getContext());
    const mlir::Type f32 = builder.getF32Type(), i64 = builder.getI64Type();
    if (function.isExternal() || !function.getBody().hasOneBlock() ||
        type != builder.getFunctionType({f32}, {f32, builder.getI1Type()})) {
      function.emitOpError("is not split: expected one block and the type (f32) -> (f32, i1), got ") << type;
      return signalPassFailure();
    }
    mlir::func::FuncOp rows;
    if (mlir::failed(make_rows_function(builder, function, rows))) return signalPassFailure();
    const mlir::Type pointer = LLVM::LLVMPointerType::get(&getContext());
    const llvm::SmallVector<mlir::Type> inputs{f32, i64, i64, i64, i64, pointer, pointer, i64};
    for (const mlir::Type input : llvm::ArrayRef(inputs).drop_front())
      function.front().addArgument(input, function.getLoc());
    function.setType(builder.getFunctionType(inputs, {f32}));
    function.setName("attnjit_mod");
    function->setDiscardableAttrs(mlir::DictionaryAttr());
    set_attributes(builder, function, kModArguments + kCaptured);
    function.setArgAttr(kModArguments + kPointer, "llvm.noalias", builder.getUnitAttr());
    function.setArgAttr(kModArguments + kPointer, "llvm.readonly", builder.getUnitAttr());
    if (mlir::failed(Lowering(builder, function, false).run())) return signalPassFailure();
    if (rows && mlir::failed(Lowering(builder, rows, true).run())) return signalPassFailure();

    const mlir::LLVMTypeConverter converter(&getContext());
    mlir::RewritePatternSet patterns(&getContext());
    mlir::arith::populateArithToLLVMConversionPatterns(converter, patterns);
    mlir::populateFuncToLLVMConversionPatterns(converter, patterns);
    mlir::LLVMConversionTarget target(getContext());
    target.addLegalOp<mlir::ModuleOp>();
    if (mlir::failed(mlir::applyFullConversion(module, target, std::move(patterns)))) signalPassFailure();
  }

  static void set_attributes(mlir::OpBuilder& builder, mlir::func::FuncOp function, unsigned captured) {
    function->setAttr("passthrough", builder.getStrArrayAttr({"alwaysinline", "nounwind"}));
    for (const llvm::StringRef name : {"llvm.noalias", "llvm.readonly", "llvm.nonnull"})
      function.setArgAttr(captured, name, builder.getUnitAttr());
    function.setArgAttr(
        captured, "llvm.dereferenceable",
        builder.getI64IntegerAttr(static_cast<std::int64_t>(sizeof(cpu::CapturedView)) * count_captures(function)));
  }

  // attnjit_lane_rows with the staged reads of `function` and what their indices need; nothing where there are none.
  static mlir::LogicalResult make_rows_function(mlir::OpBuilder& builder, mlir::func::FuncOp function,
                                                mlir::func::FuncOp& rows) {
    const llvm::SmallVector<ReadOp> reads = staged_reads(function);
    if (reads.empty()) return mlir::success();
    llvm::SetVector<mlir::Operation*> needed;
    for (const ReadOp read : reads) needed.insert(read);
    for (std::size_t i = 0; i < needed.size(); ++i) {
      for (const Value operand : needed[i]->getOperands()) {
        if (!operand.getDefiningOp()) return needed[i]->emitOpError("feeds a staged read but depends on the score");
        needed.insert(operand.getDefiningOp());
      }
    }

    const mlir::OpBuilder::InsertionGuard guard(builder);
    builder.setInsertionPointAfter(function);
    const mlir::Type i64 = builder.getI64Type(), pointer = LLVM::LLVMPointerType::get(builder.getContext());
    rows =
        mlir::func::FuncOp::create(builder, function.getLoc(), "attnjit_lane_rows",
                                   builder.getFunctionType({i64, i64, i64, i64, pointer, pointer}, mlir::TypeRange()));
    builder.setInsertionPointToEnd(rows.addEntryBlock());
    mlir::IRMapping mapping;
    for (mlir::Operation& op : function.front())
      if (needed.contains(&op)) builder.clone(op, mapping);
    mlir::func::ReturnOp::create(builder, function.getLoc());
    set_attributes(builder, rows, kRowsArguments + kCaptured);
    return mlir::success();
  }

  static std::int64_t count_captures(mlir::func::FuncOp function) {
    std::int64_t count = 0;
    function.walk([&](ReadOp read) { count = std::max<std::int64_t>(count, read.getCapture() + 1); });
    return count;
  }
};

}  // namespace
}  // namespace attnjit::compiler
