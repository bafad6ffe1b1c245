// Type rules: what every node's type is, where conversions stand, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "dsl/bind.h"
#include "tests/support/expression_text.h"

namespace attnjit::dsl {
namespace {

using test::bound;
using test::Captures;
using testing::HasSubstr;

const Captures& captures() {
  static const Captures all = {{"f", {.dtype = DType::kBF16, .bytes = {0, 0}}},
                               {"i", {.dtype = DType::kUInt8, .bytes = {0}}},
                               {"c", {.dtype = DType::kBool, .bytes = {0}}},
                               {"t", {.dtype = DType::kF32, .extent = {1}, .bytes = {0, 0, 0, 0}}}};
  return all;
}

// The bound tree, or the error.
std::string typed(std::string_view text, ModKind kind = ModKind::kScoreMod) {
  const auto expr = bound(text, captures(), kind);
  return expr ? test::tree(*expr, expr->root) : "error: " + expr.error().message;
}

TEST(DslBind, WritesConversionsOut) {
  EXPECT_EQ(typed("score + 2*h"), "(+ score (float (* 2 h)))");
  EXPECT_EQ(typed("h"), "(float h)");
  EXPECT_EQ(typed("h / b"), "(/ (float h) (float b))");
  EXPECT_EQ(typed("i + h"), "(float (+ i h))");
  EXPECT_EQ(typed("f + h"), "(+ f (float h))");
  EXPECT_EQ(typed("c + h"), "(float (+ (int c) h))");
  EXPECT_EQ(typed("c * score"), "(* (float c) score)");
  EXPECT_EQ(typed("-c"), "(float (neg (int c)))");
  EXPECT_EQ(typed("exp(h)"), "(exp (float h))");
  EXPECT_EQ(typed("min(h, 1)"), "(float (min h 1))");
  EXPECT_EQ(typed("min(h, score)"), "(min (float h) score)");
  EXPECT_EQ(typed("h ** 2"), "(float (** h 2))");
  EXPECT_EQ(typed("h ** b"), "(** (float h) (float b))");
  EXPECT_EQ(typed("h ** -2"), "(** (float h) (float (neg 2)))");
  EXPECT_EQ(typed("score ** 2"), "(** score (float 2))");
  EXPECT_EQ(typed("where(h < score, h, 1)"), "(float (where (< (float h) score) h 1))");
  EXPECT_EQ(typed("where(c == true, score, 1)"), "(where (== (int c) (int true)) score (float 1))");
  EXPECT_EQ(typed("where(c if h > 1 else true, 1, c)"), "(float (where (where (> h 1) c true) 1 (int c)))");
  EXPECT_EQ(typed("t[c]"), "(t (int c))");
  EXPECT_EQ(typed("float(score) + int(h)"), "(+ score (float h))");
  EXPECT_EQ(typed("floor(h) + ceil(score)"), "(+ (float h) (ceil score))");
  EXPECT_EQ(typed("relu(h) + relu(score)"), "(+ (float (max h 0)) (relu score))");
  EXPECT_EQ(typed("h > 1 and bool(score)", ModKind::kScoreMod).substr(0, 6), "error:");
}

TEST(DslBind, TypesEveryNodeAndSharesConversions) {
  const auto expr = bound("let x = h + 1; exp(x) + log(x) + where(c, score, -inf)", captures());
  ASSERT_TRUE(expr);
  int conversions = 0;
  for (const Node& node : expr->nodes) conversions += node.op == Op::kCall && node.function == Function::kToFloat;
  EXPECT_EQ(conversions, 1);
  for (std::size_t n = 0; n < expr->nodes.size(); ++n) {
    const Node& node = expr->nodes[n];
    for (const NodeId arg : node.args) EXPECT_LT(arg, static_cast<NodeId>(n));
    if (node.args.size() == 2) {
      EXPECT_EQ((*expr)[node.args[0]].type, (*expr)[node.args[1]].type);
    }
  }
}

TEST(DslBind, RefusesWithAReason) {
  EXPECT_THAT(typed("q_idx >= kv_idx"), HasSubstr("give it as a mask_mod, or write where(condition, score, -inf)"));
  EXPECT_THAT(typed("q_idx", ModKind::kMaskMod),
              HasSubstr("must be a bool (true keeps the element), this one is an int"));
  EXPECT_THAT(typed("where(h, 1, 2)"), HasSubstr("the condition of a choice must be a bool, this one is an int"));
  EXPECT_THAT(typed("not h"), HasSubstr("an operand of 'not' must be a bool, this one is an int"));
  EXPECT_THAT(typed("where(c and score, 1, 2)"), HasSubstr("an operand of 'and' must be a bool, this one is a float"));
  EXPECT_THAT(typed("where(c & h, 1, 2)"), HasSubstr("'&' takes two bools or two ints, not a bool and an int"));
  EXPECT_THAT(typed("where(c & kv_idx < 5, 1, 2)"), HasSubstr("write (a < b) & (c < d), or 'and'"));
  EXPECT_THAT(typed("~score"), HasSubstr("'~' takes a bool or an int, not a float"));
  EXPECT_THAT(typed("t[score]"), HasSubstr("an index of 't' must be an int, this one is a float; write int(x)"));
  EXPECT_THAT(typed("t"), HasSubstr("'t' is used as a scalar, but what is bound to it has 1 dimension"));
  EXPECT_THAT(typed("t[0, 1]"), HasSubstr("'t' is read with 2 indices, but what is bound to it has 1 dimension"));
  EXPECT_THAT(typed("f[0]"), HasSubstr("'f' is read with 1 index, but what is bound to it has 0 dimensions"));
  const std::string name(1000, 'x');
  const auto read = parse(name + "[score]");
  ASSERT_TRUE(read);
  const std::vector<CaptureBinding> bindings = {{.dtype = DType::kF32, .rank = 1}};
  EXPECT_EQ(dsl::bind(*read, bindings, ModKind::kScoreMod).error().message,
            "an index of '" + name.substr(0, 57) + "...' must be an int, this one is a float; write int(x)");
  const auto expr = parse("f + 1");
  ASSERT_TRUE(expr);
  EXPECT_THAT(bind(*expr, {}, ModKind::kScoreMod).error().message, HasSubstr("captures 1 value, but 0 are bound"));
}

TEST(DslBind, PointsAtTheFault) {
  const auto expr = bound("score +\n  where(h, 1, 2)", captures());
  ASSERT_FALSE(expr);
  EXPECT_EQ(expr.error().location.line, 2);
  EXPECT_EQ(expr.error().location.column, 3);
}

}  // namespace
}  // namespace attnjit::dsl
