// Printing: minimal parentheses, lets for shared values, and text that parses back to the same tree.
#include <gtest/gtest.h>

#include <random>

#include "dsl/printer.h"
#include "tests/support/expression_text.h"
#include "tests/support/random_expression.h"
#include "tests/support/random_inputs.h"

namespace attnjit::dsl {
namespace {

std::string printed(std::string_view text, ModKind kind = ModKind::kScoreMod) {
  const auto expr = parse(text, kind);
  return expr ? print(*expr) : "error: " + expr.error().message;
}

struct PrintCase {
  const char* text;
  const char* printed;
};

TEST(DslPrinter, WritesMinimalParentheses) {
  const PrintCase cases[] = {
      {"((score)+((2*h)))", "score + 2 * h"},
      {"score-(b-h)", "score - (b - h)"},
      {"(score-b)-h", "score - b - h"},
      {"score*(b+h)", "score * (b + h)"},
      {"(-score)**2", "(-score) ** 2"},
      {"-(score**2)", "-score ** 2"},
      {"2**(-score)", "2 ** -score"},
      {"(2**3)**score", "(2 ** 3) ** score"},
      {"2**(3**score)", "2 ** 3 ** score"},
      {"-(-score)", "--score"},
      {"~(h&b)", "~(h & b)"},
      {"a if h>1 else k", "where(h > 1, a, k)"},
      {"(h > 1) == (b > 1)", "(h > 1) == (b > 1)"},
      {"not (h > 1 and b > 1) or b == 2", "not (h > 1 and b > 1) or b == 2"},
      {"(not h > 1) == true", "(not h > 1) == true"},
      {"bias[(h), q_idx-1]", "bias[h, q_idx - 1]"},
      {"m - n", "q_idx - kv_idx"},
      {"h < b < 2", "h < b and b < 2"},
      {"min(h, b, 2)", "min(min(h, b), 2)"},
      {"-9223372036854775808", "-9223372036854775808"},
      {"9223372036854775807 - -9223372036854775808", "9223372036854775807 - -9223372036854775808"},
      {"0.1 + 1. + 1e300 + inf - nan + 1e-7", "0.1 + 1.0 + 1e+300 + inf - nan + 1e-07"},
      {"0x10 + True", "16 + true"},
      {"causal", "where(q_idx >= kv_idx, score, -inf)"},
      {"let k2 = k; k2 * k2", "k * k"},
  };
  for (const PrintCase& c : cases) EXPECT_EQ(printed(c.text), c.printed) << c.text;
}

TEST(DslPrinter, NamesSharedValues) {
  EXPECT_EQ(printed("let x = q_idx - kv_idx; x * x + x"), "let t0 = q_idx - kv_idx; t0 * t0 + t0");
  EXPECT_EQ(printed("let x = t0 + 1; x * t2[x]"), "let t1 = t0 + 1; t1 * t2[t1]");
  EXPECT_EQ(printed("softcap(exp(h))"), "let t0 = exp(h); t0 * tanh(score / t0)");
  EXPECT_EQ(printed("where(0 < -score < 1, score, 0)"), "let t0 = -score; where(0 < t0 and t0 < 1, score, 0)");
}

void expect_reads_back(const std::string& text, ModKind kind) {
  const auto expr = parse(text, kind);
  ASSERT_TRUE(expr) << format_error(expr.error(), text);
  const std::string once = print(*expr);
  const auto again = parse(once, kind);
  ASSERT_TRUE(again) << text << "\n" << format_error(again.error(), once);
  EXPECT_TRUE(same_structure(*expr, *again)) << text << "\n" << once;
  EXPECT_EQ(print(*again), once);
}

TEST(DslPrinter, ReadsBackOnRandomExpressions) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 3000; ++i) {
    const bool is_mask = random() % 4 == 0;
    const auto expression = test::random_expression(
        random, {.size = 1 + static_cast<int>(random() % 60), .is_mask = is_mask, .moderate = random() % 2 == 0});
    expect_reads_back(expression.text, is_mask ? ModKind::kMaskMod : ModKind::kScoreMod);
    if (HasFatalFailure()) return;
  }
}

TEST(DslPrinter, RandomExpressionsAreWellTyped) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 2000; ++i) {
    const bool is_mask = random() % 4 == 0;
    const auto expression = test::random_expression(
        random, {.size = 1 + static_cast<int>(random() % 60), .is_mask = is_mask, .moderate = random() % 2 == 0});
    const auto captures = test::random_captures(random, expression);
    const auto expr = test::bound(expression.text, captures, is_mask ? ModKind::kMaskMod : ModKind::kScoreMod);
    ASSERT_TRUE(expr) << format_error(expr.error(), expression.text);
  }
}

TEST(DslPrinter, ReadsBackDeepTrees) {
  std::string deep = "let x0 = score; ";
  std::string long_sum = "score";
  for (int i = 1; i < 1500; ++i) {
    const std::string n = std::to_string(i);
    const std::string last = "x" + std::to_string(i - 1);
    const char* forms[] = {"2 - ", "-", "exp(1 - ", "2 ** "};
    const char* form = forms[i % 4];
    deep.append("let x" + n).append(" = ").append(form).append(last).append(form[0] == 'e' ? "); " : "; ");
    long_sum += " + " + n + ".5";
  }
  expect_reads_back(deep + "x1499", ModKind::kScoreMod);
  expect_reads_back(long_sum, ModKind::kScoreMod);
}

TEST(DslPrinter, StructureTellsTreesApart) {
  const auto same = [](const char* a, const char* b) { return same_structure(*parse(a), *parse(b)); };
  EXPECT_TRUE(same("score + 1", "(score) + 0x1"));
  EXPECT_FALSE(same("score + 1", "1 + score"));
  EXPECT_FALSE(same("score + 1", "score + 1.0"));
  EXPECT_FALSE(same("score + a", "score + k"));
  EXPECT_FALSE(same("exp(score)", "exp2(score)"));
  EXPECT_FALSE(same("min(score, 1)", "max(score, 1)"));
  EXPECT_FALSE(same("let x = exp(score); x * x", "exp(score) * exp(score)"));
  EXPECT_FALSE(same("exp(score) * exp(score)", "let x = exp(score); x * x"));
  EXPECT_TRUE(same("let x = score; x * x", "score * score"));
}

}  // namespace
}  // namespace attnjit::dsl
