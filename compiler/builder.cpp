// Builds the MLIR function of a bound expression, node by node.
#include "compiler/builder.h"

#include <algorithm>
#include <limits>

#include "compiler/dialect/dialect.h"
#include "compiler/passes/passes.h"
#include "dsl/functions.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using dsl::Function;
using dsl::Op;
using dsl::Type;
using mlir::Value;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::uint64_t kLargestSquaredPower = 255;  // up to here: as quick to compile as any function

class Builder {
 public:
  Builder(mlir::OpBuilder& builder, const ModProblem& problem, Value score)
      : b_(builder), loc_(builder.getUnknownLoc()), problem_(problem), score_(score) {}

  Value expression(const dsl::Expr& expr) {
    std::vector<Value> values(expr.nodes.size());
    // Arguments precede their users; nodes that the root does not reach are left to dead-code elimination.
    for (std::size_t i = 0; i <= static_cast<std::size_t>(expr.root); ++i) {
      const dsl::Node& node = expr.nodes[i];
      std::vector<Value> args;
      args.reserve(node.args.size());
      for (const dsl::NodeId arg : node.args) args.push_back(values[static_cast<std::size_t>(arg)]);
      const Type operand = node.args.empty() ? node.type : expr[node.args.back()].type;
      values[i] = build(expr, node, args, operand);
    }
    return values[static_cast<std::size_t>(expr.root)];
  }

  Value f32(double value) {
    return arith::ConstantOp::create(b_, loc_, b_.getF32FloatAttr(dsl::float32_literal(value)));
  }
  Value select(Value condition, Value yes, Value no) { return arith::SelectOp::create(b_, loc_, condition, yes, no); }

 private:
  Value i64(std::int64_t value) { return arith::ConstantOp::create(b_, loc_, b_.getI64IntegerAttr(value)); }
  Value boolean(bool value) { return arith::ConstantOp::create(b_, loc_, b_.getBoolAttr(value)); }

  Value index(Role role, std::int64_t extent) {
    return IndexOp::create(b_, loc_, role, b_.getI64IntegerAttr(std::max<std::int64_t>(extent, 1)));
  }

  mlir::Type element_type(dsl::DType dtype) {
    switch (dtype) {
      case dsl::DType::kBool:
        return b_.getI1Type();
      case dsl::DType::kInt8:
        return b_.getI8Type();
      case dsl::DType::kInt16:
        return b_.getI16Type();
      case dsl::DType::kInt32:
        return b_.getI32Type();
      case dsl::DType::kInt64:
        return b_.getI64Type();
      case dsl::DType::kUInt8:
        return b_.getIntegerType(8, false);
      case dsl::DType::kF16:
        return b_.getF16Type();
      case dsl::DType::kBF16:
        return b_.getBF16Type();
      case dsl::DType::kF32:
        return b_.getF32Type();
    }
    return b_.getF32Type();
  }

  mlir::Type value_type(Type type) {
    return type == Type::kFloat ? mlir::Type(b_.getF32Type()) : type == Type::kInt ? b_.getI64Type() : b_.getI1Type();
  }

  Value read(const dsl::Node& node, const std::vector<Value>& indices) {
    const CaptureInfo& info = problem_.captures[static_cast<std::size_t>(node.capture)];
    std::vector<std::int64_t> extents, strides;
    for (std::size_t i = 0; i < indices.size(); ++i) {
      extents.push_back(info.extent[i]);
      strides.push_back(info.stride_class[i] == StrideClass::kZero   ? 0
                        : info.stride_class[i] == StrideClass::kUnit ? 1
                                                                     : -1);
    }
    return ReadOp::create(b_, loc_, value_type(dsl::value_type(info.dtype)), static_cast<std::uint32_t>(node.capture),
                          indices, extents, strides, mlir::DenseBoolArrayAttr(), mlir::IntegerAttr(),
                          element_type(info.dtype));
  }

  // A sign or a conversion of a literal is a literal: the rule of dropped elements looks at them.
  Value folded(Value result) {
    llvm::SmallVector<Value> values;
    mlir::Operation* op = result.getDefiningOp();
    if (mlir::failed(b_.tryFold(op, values))) return result;
    op->erase();
    return values.front();
  }

  Value marked(llvm::StringRef mark, Value result) {
    result.getDefiningOp()->setAttr(mark, b_.getUnitAttr());
    return result;
  }

  // The rule of dropped elements looks through sums, minima and choices of the text, not through those that a function
  // is made of.
  Value opaque(Value result) { return marked(kOpaqueAttr, result); }

  Value compare(Op op, Value a, Value b, Type operand) {
    if (operand == Type::kFloat) {
      using P = arith::CmpFPredicate;
      const P p = op == Op::kLt   ? P::OLT
                  : op == Op::kLe ? P::OLE
                  : op == Op::kGt ? P::OGT
                  : op == Op::kGe ? P::OGE
                  : op == Op::kEq ? P::OEQ
                                  : P::UNE;
      return arith::CmpFOp::create(b_, loc_, p, a, b);
    }
    using P = arith::CmpIPredicate;
    const bool is_bool = operand == Type::kBool;  // false < true: unsigned, as an i1's 1 is -1 otherwise
    const P p = op == Op::kLt   ? (is_bool ? P::ult : P::slt)
                : op == Op::kLe ? (is_bool ? P::ule : P::sle)
                : op == Op::kGt ? (is_bool ? P::ugt : P::sgt)
                : op == Op::kGe ? (is_bool ? P::uge : P::sge)
                : op == Op::kEq ? P::eq
                                : P::ne;
    return arith::CmpIOp::create(b_, loc_, p, a, b);
  }

  // int ** non-negative int literal; wraps as every integer product. Written out by squaring it vectorises, but the
  // largest exponents would take 125 products, and a text of many such powers minutes to compile.
  Value int_power(Value base, std::uint64_t exponent) {
    if (exponent > kLargestSquaredPower)
      return math::IPowIOp::create(b_, loc_, base, i64(static_cast<std::int64_t>(exponent)));
    Value result;
    for (Value square = base; exponent != 0;) {
      if (exponent & 1) result = result ? Value(arith::MulIOp::create(b_, loc_, result, square)) : square;
      exponent >>= 1;
      if (exponent != 0) square = arith::MulIOp::create(b_, loc_, square, square);
    }
    return result ? result : i64(1);
  }

  Value power(const dsl::Expr& expr, const dsl::Node& node, Value base, Value exponent) {
    if (node.type == Type::kInt) return int_power(base, static_cast<std::uint64_t>(expr[node.args[1]].int_value));
    mlir::FloatAttr literal;
    if (mlir::matchPattern(exponent, mlir::m_Constant(&literal))) {
      const double value = literal.getValueAsDouble();
      if (value == 2.0 || value == 3.0) {
        const Value square = arith::MulFOp::create(b_, loc_, base, base);
        return value == 2.0 ? square : Value(arith::MulFOp::create(b_, loc_, square, base));
      }
    }
    return math::PowFOp::create(b_, loc_, base, exponent);
  }

  // Python's: the result has the divisor's sign.
  Value float_mod(Value a, Value b) {
    const Value zero = f32(0.0);
    const Value remainder = arith::RemFOp::create(b_, loc_, a, b);
    const Value nonzero = arith::CmpFOp::create(b_, loc_, arith::CmpFPredicate::UNE, remainder, zero);
    const Value r_negative = arith::CmpFOp::create(b_, loc_, arith::CmpFPredicate::OLT, remainder, zero);
    const Value b_negative = arith::CmpFOp::create(b_, loc_, arith::CmpFPredicate::OLT, b, zero);
    const Value differ = arith::XOrIOp::create(b_, loc_, r_negative, b_negative);
    const Value adjust = arith::AndIOp::create(b_, loc_, nonzero, differ);
    return opaque(select(adjust, arith::AddFOp::create(b_, loc_, remainder, b), remainder));
  }

  Value call(Function function, const std::vector<Value>& args, Type operand, Type result) {
    const Value x = args.empty() ? Value() : args[0];
    const bool is_float = operand == Type::kFloat;
    switch (function) {
      case Function::kMin:
        return is_float ? Value(arith::MinimumFOp::create(b_, loc_, x, args[1]))
                        : Value(arith::MinSIOp::create(b_, loc_, x, args[1]));
      case Function::kMax:
        return is_float ? Value(arith::MaximumFOp::create(b_, loc_, x, args[1]))
                        : Value(arith::MaxSIOp::create(b_, loc_, x, args[1]));
      case Function::kClamp: {
        const Value raised = call(Function::kMax, {x, args[1]}, operand, result);
        const Value clamped = call(Function::kMin, {raised, args[2]}, operand, result);
        if (is_float) {
          const mlir::IntegerAttr number = b_.getI64IntegerAttr(clamps_++);
          for (const Value half : {raised, clamped}) half.getDefiningOp()->setAttr(kClampAttr, number);
        }
        return opaque(clamped);
      }
      case Function::kAbs:
        // The smallest integer stays itself; math.absi leaves that open.
        return is_float ? Value(math::AbsFOp::create(b_, loc_, x))
                        : Value(arith::MaxSIOp::create(b_, loc_, x, arith::SubIOp::create(b_, loc_, i64(0), x)));
      case Function::kExp:
        return math::ExpOp::create(b_, loc_, x);
      case Function::kExp2:
        return math::Exp2Op::create(b_, loc_, x);
      case Function::kLog:
        return math::LogOp::create(b_, loc_, x);
      case Function::kLog2:
        return math::Log2Op::create(b_, loc_, x);
      case Function::kLog1p:
        return math::Log1pOp::create(b_, loc_, x);
      case Function::kSqrt:
        return math::SqrtOp::create(b_, loc_, x);
      case Function::kRsqrt:
        return math::RsqrtOp::create(b_, loc_, x);
      case Function::kTanh:
        return math::TanhOp::create(b_, loc_, x);
      case Function::kSigmoid:
        return arith::DivFOp::create(b_, loc_, f32(1.0), one_plus_exp_minus(x));
      case Function::kSilu:
        return arith::DivFOp::create(b_, loc_, x, one_plus_exp_minus(x));
      case Function::kGelu:
        return GeluOp::create(b_, loc_, b_.getF32Type(), x);
      case Function::kRelu:
        return is_float ? marked(kReluAttr, arith::MaximumFOp::create(b_, loc_, x, f32(0.0)))
                        : Value(arith::MaxSIOp::create(b_, loc_, x, i64(0)));
      case Function::kErf:
        return math::ErfOp::create(b_, loc_, x);
      case Function::kSin:
        return math::SinOp::create(b_, loc_, x);
      case Function::kCos:
        return math::CosOp::create(b_, loc_, x);
      case Function::kFloor:
        return is_float ? Value(math::FloorOp::create(b_, loc_, x)) : x;
      case Function::kCeil:
        return is_float ? Value(math::CeilOp::create(b_, loc_, x)) : x;
      case Function::kRound:
        return is_float ? Value(math::RoundEvenOp::create(b_, loc_, x)) : x;
      case Function::kSign: {
        const Value zero = is_float ? f32(0.0) : i64(0);
        // What is neither is itself: a zero or NaN.
        const Value above = select(compare(Op::kGt, x, zero, operand), is_float ? f32(1.0) : i64(1), x);
        const Value sign = select(compare(Op::kLt, x, zero, operand), is_float ? f32(-1.0) : i64(-1), above);
        return opaque(is_float ? marked(kFlatAttr, sign) : sign);
      }
      case Function::kToFloat:
        if (is_float) return x;
        return operand == Type::kInt ? Value(arith::SIToFPOp::create(b_, loc_, b_.getF32Type(), x))
                                     : Value(arith::UIToFPOp::create(b_, loc_, b_.getF32Type(), x));
      case Function::kToInt:
        if (is_float) return ToIntOp::create(b_, loc_, b_.getI64Type(), x);
        return operand == Type::kInt ? x : Value(arith::ExtUIOp::create(b_, loc_, b_.getI64Type(), x));
      case Function::kToBool:
        return operand == Type::kBool ? x : compare(Op::kNe, x, is_float ? f32(0.0) : i64(0), operand);
      case Function::kIsInf:
        if (!is_float) return boolean(false);
        return compare(Op::kEq, math::AbsFOp::create(b_, loc_, x), f32(kInfinity), operand);
      case Function::kIsNan:
        if (!is_float) return boolean(false);
        return arith::CmpFOp::create(b_, loc_, arith::CmpFPredicate::UNO, x, x);
    }
    return x;
  }

  Value one_plus_exp_minus(Value x) {
    const Value exp = math::ExpOp::create(b_, loc_, arith::NegFOp::create(b_, loc_, x));
    return arith::AddFOp::create(b_, loc_, exp, f32(1.0));
  }

  Value build(const dsl::Expr& expr, const dsl::Node& node, const std::vector<Value>& args, Type operand) {
    const bool is_float = operand == Type::kFloat;
    switch (node.op) {
      case Op::kScore:
        return score_;
      case Op::kIndexB:
        return index(Role::B, problem_.batch);
      case Op::kIndexH:
        return index(Role::H, problem_.num_heads);
      case Op::kIndexQ:
        return index(Role::Q, problem_.seqlen_q);
      case Op::kIndexKv:
        return index(Role::Kv, problem_.seqlen_kv);
      case Op::kInt:
        return i64(node.int_value);
      case Op::kFloat:
        return f32(node.float_value);
      case Op::kBool:
        return boolean(node.int_value != 0);
      case Op::kRead:
        return read(node, args);
      case Op::kNeg: {
        const Value result = is_float ? Value(arith::NegFOp::create(b_, loc_, args[0]))
                                      : Value(arith::SubIOp::create(b_, loc_, i64(0), args[0]));
        const Op of = expr[node.args[0]].op;
        return of == Op::kInt || of == Op::kFloat ? folded(result) : result;
      }
      case Op::kNot:
        return arith::XOrIOp::create(b_, loc_, args[0], boolean(true));
      case Op::kBitNot:
        return arith::XOrIOp::create(b_, loc_, args[0], operand == Type::kBool ? boolean(true) : i64(-1));
      case Op::kAdd:
        return is_float ? Value(arith::AddFOp::create(b_, loc_, args[0], args[1]))
                        : Value(arith::AddIOp::create(b_, loc_, args[0], args[1]));
      case Op::kSub:
        return is_float ? Value(arith::SubFOp::create(b_, loc_, args[0], args[1]))
                        : Value(arith::SubIOp::create(b_, loc_, args[0], args[1]));
      case Op::kMul:
        return is_float ? Value(arith::MulFOp::create(b_, loc_, args[0], args[1]))
                        : Value(arith::MulIOp::create(b_, loc_, args[0], args[1]));
      case Op::kDiv:
        return arith::DivFOp::create(b_, loc_, args[0], args[1]);
      case Op::kFloorDiv:
        if (is_float) return math::FloorOp::create(b_, loc_, arith::DivFOp::create(b_, loc_, args[0], args[1]));
        return FloorDivOp::create(b_, loc_, args[0], args[1]);
      case Op::kMod:
        return is_float ? float_mod(args[0], args[1]) : FloorModOp::create(b_, loc_, args[0], args[1]);
      case Op::kPow:
        return power(expr, node, args[0], args[1]);
      case Op::kLt:
      case Op::kLe:
      case Op::kGt:
      case Op::kGe:
      case Op::kEq:
      case Op::kNe:
        return compare(node.op, args[0], args[1], operand);
      case Op::kAnd:
      case Op::kBitAnd:
        return arith::AndIOp::create(b_, loc_, args[0], args[1]);
      case Op::kOr:
      case Op::kBitOr:
        return arith::OrIOp::create(b_, loc_, args[0], args[1]);
      case Op::kSelect:
        return select(args[0], args[1], args[2]);
      case Op::kCall: {
        const Value result = call(node.function, args, operand, node.type);
        const bool literal = node.function == Function::kToFloat && expr[node.args[0]].op == Op::kInt;
        return literal ? folded(result) : result;
      }
    }
    return score_;
  }

  mlir::OpBuilder& b_;
  mlir::Location loc_;
  const ModProblem& problem_;
  Value score_;
  std::int64_t clamps_ = 0;
};

}  // namespace

mlir::OwningOpRef<mlir::ModuleOp> build_module(mlir::MLIRContext& context, const ModProblem& problem) {
  mlir::OpBuilder builder(&context);
  const mlir::Location loc = builder.getUnknownLoc();
  mlir::OwningOpRef<mlir::ModuleOp> module = mlir::ModuleOp::create(loc);
  builder.setInsertionPointToEnd(module->getBody());
  const mlir::Type f32 = builder.getF32Type();
  auto function = mlir::func::FuncOp::create(builder, loc, "score_mod", builder.getFunctionType({f32}, {f32}));
  mlir::Block* body = function.addEntryBlock();
  builder.setInsertionPointToEnd(body);
  Builder expressions(builder, problem, body->getArgument(0));
  Value value = expressions.expression(problem.score_mod);
  if (problem.mask_mod) {
    const Value keep = expressions.expression(*problem.mask_mod);
    value = expressions.select(keep, value, expressions.f32(-kInfinity));
  }
  mlir::func::ReturnOp::create(builder, loc, value);
  return module;
}

}  // namespace attnjit::compiler
