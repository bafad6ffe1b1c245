// The expression tree: nodes in an arena, in evaluation order, shared by parser, types, printer and interpreter.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace attnjit::dsl {

// What a value is. Ints mean 64-bit two's complement, floats mean f32 (the interpreter: double).
enum class Type : std::uint8_t { kBool, kInt, kFloat };
std::string_view type_name(Type type);

// Element types of captured tensors and of q, k, v. float64 is refused when bound.
enum class DType : std::uint8_t { kBool, kInt8, kInt16, kInt32, kInt64, kUInt8, kF16, kBF16, kF32 };
std::string_view dtype_name(DType dtype);  // "bool", "int8", ..., "float16", "bfloat16", "float32"
std::int64_t dtype_size(DType dtype);      // bytes of one element
Type value_type(DType dtype);              // what a captured element reads as

// Limits of the language; beyond them parsing or binding reports an error.
inline constexpr int kMaxNesting = 256;
inline constexpr int kMaxNodes = 4096;
inline constexpr int kMaxCaptures = 16;
inline constexpr int kMaxRank = 5;
inline constexpr std::size_t kMaxTextBytes = 64 * 1024;

// A place in the text: 1-based line and column, column counted in bytes.
struct SourceLocation {
  int line = 1;
  int column = 1;
};

enum class Op : std::uint8_t {
  // Leaves.
  kScore,
  kIndexB,
  kIndexH,
  kIndexQ,
  kIndexKv,  // ints: batch, query head, logical query and key positions
  kInt,
  kFloat,
  kBool,  // literals: Node::int_value / float_value / int_value (0 or 1)
  kRead,  // captured tensor or scalar: Node::capture, args are the indices (none: scalar)
  // Operators. After binding, operands of one operator have one type, and conversions are explicit kCall nodes.
  kNeg,
  kNot,
  kBitNot,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kFloorDiv,
  kMod,
  kPow,
  kLt,
  kLe,
  kGt,
  kGe,
  kEq,
  kNe,
  kAnd,
  kOr,  // `and`, `or`: bools
  kBitAnd,
  kBitOr,   // `&`, `|`: two bools or two ints
  kSelect,  // args: condition, then, else (`a if c else b` and `where(c, a, b)`)
  kCall,    // Node::function
};

// Functions of the language. One row each in the table of functions.cpp.
// `where` is Op::kSelect; min and max are binary (more arguments nest to the left); clamp(x, lo, hi) has three.
enum class Function : std::uint8_t {
  kMin,
  kMax,
  kClamp,
  kAbs,
  kExp,
  kExp2,
  kLog,
  kLog2,
  kLog1p,
  kSqrt,
  kRsqrt,
  kTanh,
  kSigmoid,
  kSilu,
  kGelu,
  kRelu,
  kErf,
  kSin,
  kCos,
  kFloor,
  kCeil,
  kRound,
  kSign,
  kToFloat,
  kToInt,
  kToBool,
  kIsInf,
  kIsNan,
};

// How an operator is written; for leaves, reads and calls what they are in words.
std::string_view op_name(Op op);

using NodeId = std::int32_t;

struct Node {
  Op op = Op::kScore;
  Function function = Function::kMin;  // kCall
  Type type = Type::kFloat;            // set by bind()
  std::int64_t int_value = 0;          // kInt, kBool
  double float_value = 0.0;            // kFloat
  std::int32_t capture = -1;           // kRead: index into Expr::captures
  std::vector<NodeId> args = {};       // every argument precedes its user in Expr::nodes
  SourceLocation location = {};
};

// A captured name, in order of first appearance. rank 0 is a scalar.
struct Capture {
  std::string name;
  int rank = 0;
  SourceLocation location = {};
};

// One expression. A value named by `let` is one node with several users, so an Expr is a DAG.
struct Expr {
  std::vector<Node> nodes;
  NodeId root = -1;
  std::vector<Capture> captures;

  const Node& operator[](NodeId id) const { return nodes[static_cast<std::size_t>(id)]; }
};

// Whether two expressions are the same tree: operations, literals, captured names and ranks, and which values are
// shared. Leaves count by value; order in the arena, locations and types do not count.
bool same_structure(const Expr& a, const Expr& b);

// A user's fault in an expression. `message` says what, `location` where.
struct Error {
  std::string message;
  SourceLocation location = {};
};

// `name` for a message: of one longer than 60 characters its start and `...`, as names can be as long as texts.
std::string shortened(std::string_view name);

// `message` with line and column, the line of `text` it happened in and a caret below it. Tabs and control characters
// of the text are shown as spaces, bytes beyond ASCII as `?`, and a long line is cut around the place.
std::string format_error(const Error& error, std::string_view text);

// A value or an Error.
template <typename T>
class Expected {
 public:
  Expected(T value) : value_(std::move(value)), ok_(true) {}
  Expected(Error error) : error_(std::move(error)) {}
  explicit operator bool() const { return ok_; }
  T& operator*() { return value_; }
  const T& operator*() const { return value_; }
  T* operator->() { return &value_; }
  const T* operator->() const { return &value_; }
  const Error& error() const { return error_; }

 private:
  T value_{};
  Error error_;
  bool ok_ = false;
};

}  // namespace attnjit::dsl
