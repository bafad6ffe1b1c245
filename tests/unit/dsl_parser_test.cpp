// The grammar: precedence, names, literals, headers, let, registered mods, refusals and limits.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "dsl/parser.h"
#include "tests/support/expression_text.h"

namespace attnjit::dsl {
namespace {

using test::tree;
using testing::HasSubstr;

struct TreeCase {
  const char* text;
  const char* tree;
};

TEST(DslParser, HasPythonsPrecedence) {
  const TreeCase cases[] = {
      {"score + 2*h", "(+ score (* 2 h))"},
      {"score - b - h", "(- (- score b) h)"},
      {"score / 2 * 3", "(* (/ score 2) 3)"},
      {"score // 2 % 3", "(% (// score 2) 3)"},
      {"-score ** 2", "(neg (** score 2))"},
      {"2 ** -score", "(** 2 (neg score))"},
      {"score ** 2 ** 3", "(** score (** 2 3))"},
      {"-2 * score", "(* (neg 2) score)"},
      {"- -score", "(neg (neg score))"},
      {"+score", "score"},
      {"score if h > 1 else b if b > 2 else 3", "(where (> h 1) score (where (> b 2) b 3))"},
      {"h > 1 or b > 2 and not b > 3", "(or (> h 1) (and (> b 2) (not (> b 3))))"},
      {"not h == 1", "(not (== h 1))"},
      {"h < b < 5", "(and (< h b) (< b 5))"},
      {"0 <= h < b != 3", "(and (and (<= 0 h) (< h b)) (!= b 3))"},
      {"h & 1 == 0", "(== (& h 1) 0)"},
      {"h | b & 3", "(| h (& b 3))"},
      {"~h & b + 1", "(& (~ h) (+ b 1))"},
      {"~h ** 2", "(~ (** h 2))"},
      {"h + 1 < b * 2", "(< (+ h 1) (* b 2))"},
      {"where(h > 1, score, -inf)", "(where (> h 1) score (neg inf))"},
      {"min(score, 1, h)", "(min (min score 1) h)"},
      {"max(score, 1)", "(max score 1)"},
      {"clamp(score, -1, 1)", "(clamp score (neg 1) 1)"},
      {"float(int(bool(score)))", "(float (int (bool score)))"},
  };
  for (const TreeCase& c : cases) EXPECT_EQ(tree(c.text), c.tree) << c.text;
}

TEST(DslParser, ReadsNamesAndLiterals) {
  const TreeCase cases[] = {
      {"m - n", "(- q_idx kv_idx)"},
      {"token_q - token_kv", "(- q_idx kv_idx)"},
      {"score * scale_of_mine", "(* score scale_of_mine)"},
      {"bias[h, q_idx + 1, kv_idx]", "(bias h (+ q_idx 1) kv_idx)"},
      {"m[n] + h[h] + exp[b]", "(+ (+ (m kv_idx) (h h)) (exp b))"},
      {"0x1F + 0XA", "(+ 31 10)"},
      {"true", "true"},
      {"False", "false"},
      {"-9223372036854775808", "(neg -9223372036854775808)"},
      {"9223372036854775807", "9223372036854775807"},
      {"1e-400", "0.0"},
      {"2e-9223372036854775807", "0.0"},
      {"0.0e99999999999999999999", "0.0"},
  };
  for (const TreeCase& c : cases) {
    EXPECT_EQ(tree(c.text), c.tree) << c.text;
  }
  EXPECT_EQ(tree("score # the score\n  + 1 # and one"), "(+ score 1)");
  const auto floats = parse(".5 + 5. + 1e3 + 2.5E-1 + 1e22");
  ASSERT_TRUE(floats);
  std::vector<double> values;
  for (const Node& node : floats->nodes) {
    if (node.op == Op::kFloat) values.push_back(node.float_value);
  }
  EXPECT_EQ(values, (std::vector<double>{0.5, 5.0, 1000.0, 0.25, 1e22}));
}

TEST(DslParser, RecordsCapturesInOrderOfAppearance) {
  const auto expr = parse("where(ids[q_idx] == ids[kv_idx], score * k, -inf) + bias[b, h]");
  ASSERT_TRUE(expr);
  ASSERT_EQ(expr->captures.size(), 3u);
  EXPECT_EQ(expr->captures[0].name, "ids");
  EXPECT_EQ(expr->captures[0].rank, 1);
  EXPECT_EQ(expr->captures[1].name, "k");
  EXPECT_EQ(expr->captures[1].rank, 0);
  EXPECT_EQ(expr->captures[2].name, "bias");
  EXPECT_EQ(expr->captures[2].rank, 2);
  EXPECT_EQ(expr->captures[2].location.column, 53);
}

TEST(DslParser, NamesParametersInAHeader) {
  EXPECT_EQ(tree("mod(s, batch, head, i, j) = s + head * (i - j)"), "(+ score (* h (- q_idx kv_idx)))");
  EXPECT_EQ(tree("f(score, b, h, n, m) = n - m"), "(- q_idx kv_idx)");
  EXPECT_EQ(tree("f(b, h, q, k) = q >= k", ModKind::kMaskMod), "(>= q_idx kv_idx)");
  EXPECT_EQ(tree("f(s, b, h, q, k) = let d = q - k; s + d"), "(+ score (- q_idx kv_idx))");
  EXPECT_THAT(tree("f(s, b, h, q) = s"), HasSubstr("a score_mod takes five"));
  EXPECT_THAT(tree("f(s, b, h, q, k) = q", ModKind::kMaskMod), HasSubstr("a mask_mod takes four"));
  EXPECT_THAT(tree("f(s, b, h, q, q) = s"), HasSubstr("two parameters are named 'q'"));
  EXPECT_THAT(tree("f(s, b, h, q, k) = score"), HasSubstr("'score' is called 's' in this text"));
  EXPECT_THAT(tree("f(s, b, h, exp, k) = s"), HasSubstr("'exp' is a word of the language"));
  EXPECT_THAT(tree("f(s, b, h, q, k) = q[h]"), HasSubstr("'q' names a value here"));
}

TEST(DslParser, LetNamesAValueOnce) {
  const auto expr = parse("let d = q_idx - kv_idx; let s = score * 2; s + d * d");
  ASSERT_TRUE(expr);
  EXPECT_EQ(tree(*expr, expr->root), "(+ (* score 2) (* (- q_idx kv_idx) (- q_idx kv_idx)))");
  EXPECT_EQ(expr->nodes.size(), 8u);
  EXPECT_EQ(tree("let x = h; let x = x + 1; x * x"), "(* (+ h 1) (+ h 1))");
  EXPECT_EQ(tree("let unused = bias[h]; score"), "score");
  EXPECT_EQ(parse("let unused = bias[h]; score + k")->captures.size(), 1u);
  EXPECT_EQ(tree("let rel = q_idx - kv_idx; score + rel"), "(+ score (- q_idx kv_idx))");
  EXPECT_THAT(tree("let score = 1; score"), HasSubstr("'score' has a meaning already"));
  EXPECT_THAT(tree("let exp = 1; score"), HasSubstr("'exp' has a meaning already"));
  EXPECT_THAT(tree("let x = x; x"), HasSubstr("no value yet"));
  EXPECT_THAT(tree("let y = x; let x = 1; x + y"), HasSubstr("captured earlier"));
  EXPECT_THAT(tree("let x = 1; x[h]"), HasSubstr("'x' names a value here"));
  EXPECT_THAT(tree("let x = 1 score"), HasSubstr("expected ';' after the value of 'x'"));
  EXPECT_THAT(tree("score + (let x = 1; x)"), HasSubstr("at the start"));
}

TEST(DslParser, ChainedComparisonSharesItsMiddle) {
  const auto expr = parse("where(0 < exp(score) < 1, score, 0)");
  ASSERT_TRUE(expr);
  const Node& both = (*expr)[(*expr)[expr->root].args[0]];
  ASSERT_EQ(both.op, Op::kAnd);
  EXPECT_EQ((*expr)[both.args[0]].args[1], (*expr)[both.args[1]].args[0]);
}

TEST(DslParser, ArgumentsPrecedeTheirUsers) {
  const auto expr = parse("let a = exp(score); where(a < bias[h] < 2, min(a, 1, 2), -a)");
  ASSERT_TRUE(expr);
  for (std::size_t i = 0; i < expr->nodes.size(); ++i) {
    for (const NodeId arg : expr->nodes[i].args) EXPECT_LT(arg, static_cast<NodeId>(i));
  }
}

TEST(DslParser, ExpandsRegisteredMods) {
  EXPECT_EQ(tree("noop"), "score");
  EXPECT_EQ(tree("rel"), "(+ score (- q_idx kv_idx))");
  EXPECT_EQ(tree("head_bias()"), "(+ score (* 2 h))");
  EXPECT_EQ(tree("softcap(30)"), "(* 30 (tanh (/ score 30)))");
  EXPECT_EQ(tree("causal", ModKind::kMaskMod), "(>= q_idx kv_idx)");
  EXPECT_EQ(tree("causal"), "(where (>= q_idx kv_idx) score (neg inf))");
  EXPECT_EQ(tree("causal() and not prefix_lm(3)"),
            "(where (and (>= q_idx kv_idx) (not (or (< kv_idx 3) (>= q_idx kv_idx)))) score (neg inf))");
  EXPECT_EQ(tree("causal & causal"), "(where (& (>= q_idx kv_idx) (>= q_idx kv_idx)) score (neg inf))");
  EXPECT_EQ(tree("q_idx >= kv_idx"), "(>= q_idx kv_idx)") << "only registered masks stand for a choice";
  EXPECT_EQ(tree("where(causal, softcap(2), -inf)"), "(where (>= q_idx kv_idx) (* 2 (tanh (/ score 2))) (neg inf))");
  EXPECT_EQ(tree("document(doc_of)", ModKind::kMaskMod), "(== (doc_of q_idx) (doc_of kv_idx))");
  EXPECT_EQ(tree("alibi"), "(+ score (* (alibi_slopes h) (- kv_idx q_idx)))");
  EXPECT_EQ(tree("alibi_exp2(8)").substr(0, 20), "(+ score (* (exp2 (n");
}

TEST(DslParser, ChecksArgumentsOfRegisteredMods) {
  EXPECT_THAT(tree("softcap"), HasSubstr("'softcap' takes 1 argument, not 0: softcap(c)"));
  EXPECT_THAT(tree("softcap(1, 2)"), HasSubstr("takes 1 argument, not 2"));
  EXPECT_THAT(tree("causal(1)"), HasSubstr("takes 0 arguments, not 1"));
  EXPECT_THAT(tree("document(q_idx + 1)"), HasSubstr("'ids' names a value here"));
  EXPECT_THAT(tree("softcap(30)", ModKind::kMaskMod), HasSubstr("decides without the score"));
}

TEST(DslParser, ExpansionIsHygienic) {
  // The argument is computed once.
  const auto shared = parse("softcap(exp(bias[h]))");
  ASSERT_TRUE(shared);
  EXPECT_EQ(std::count_if(shared->nodes.begin(), shared->nodes.end(), [](const Node& n) { return n.op == Op::kCall; }),
            2);
  // Parameters and names of the caller do not meet.
  EXPECT_EQ(tree("softcap(w + c)"), "(* (+ w c) (tanh (/ score (+ w c))))");
  Registry registry = Registry::builtin();
  ASSERT_FALSE(registry.add({.name = "inner", .parameters = {"x"}, .body = "let t = x * 2; t + y + score"}));
  ASSERT_FALSE(registry.add({.name = "outer", .parameters = {"y"}, .body = "inner(y) * y"}));
  EXPECT_EQ(tree("let t = h; let y = b; outer(t) + y", ModKind::kScoreMod, registry),
            "(+ (* (+ (+ (* h 2) y) score) h) b)");
  ASSERT_FALSE(
      registry.add({.name = "same", .parameters = {"t"}, .body = "document(t) and t[0] == 1", .is_mask = true}));
  EXPECT_EQ(tree("same(ids)", ModKind::kMaskMod, registry), "(and (== (ids q_idx) (ids kv_idx)) (== (ids 0) 1))");
  EXPECT_EQ(tree("f(s, b, h, q, k) = where(same(z), s, 0) + q", ModKind::kScoreMod, registry),
            "(+ (where (and (== (z q_idx) (z kv_idx)) (== (z 0) 1)) score 0) q_idx)");
}

TEST(DslParser, ReportsWhere) {
  const auto unknown = parse("score +\n  tahn(score)");
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().location.line, 2);
  EXPECT_EQ(unknown.error().location.column, 3);
  EXPECT_THAT(unknown.error().message, HasSubstr("did you mean 'tanh'?"));
  EXPECT_EQ(format_error(unknown.error(), "score +\n\ttahn(score)").substr(0, 17), "line 2, column 3:");
  EXPECT_EQ(format_error({.message = "wrong", .location = {.line = 2, .column = 4}},
                         "a\n\tb\xc3\xa9"
                         "c\nd"),
            "line 2, column 4: wrong\n   b??c\n     ^");
  const std::string long_line(1000, 'x');
  EXPECT_EQ(format_error({.message = "wrong", .location = {.line = 1, .column = 500}}, long_line),
            "line 1, column 500: wrong\n  ..." + std::string(120, 'x') + "...\n  " + std::string(63, ' ') + "^");
  EXPECT_EQ(format_error({.message = "wrong", .location = {.line = 9, .column = 9}}, "ab"),
            "line 9, column 9: wrong\n  ab\n    ^");
  // A fault inside a registered mod is shown at its use.
  const auto nested = parse("ids[0, 1] + where(document(ids), score, 0)");
  ASSERT_FALSE(nested);
  EXPECT_EQ(nested.error().location.column, 19);
}

struct RefusalCase {
  const char* text;
  const char* message;
};

TEST(DslParser, RefusesWithAReason) {
  const RefusalCase cases[] = {
      {"", "expected a value, but the text ends"},
      {"score +", "expected a value, but the text ends"},
      {"score score", "expected an operator or the end of the expression, found 'score'"},
      {"(score", "expected ')' to close the parenthesis"},
      {"score)", "found ')'"},
      {"score ^ 2", "'^' is not part of the language; write **"},
      {"score << 2", "'<<' is not part of the language"},
      {"score >> 2", "with //"},
      {"score @ 2", "no matrices"},
      {"(x := 2)", "':=' is not part of the language; write let"},
      {"x = 2", "let name = value;"},
      {"lambda s: s", "'lambda' is not part of the language"},
      {"h in b", "'in' is not part of the language"},
      {"h is b", "'is' is not part of the language; compare with =="},
      {"h not in b", "found 'not'"},
      {"h > 1 && b > 1", "write and"},
      {"h > 1 || b > 1", "write or"},
      {"!h", "write not"},
      {"h ? b : 1", "a if c else b"},
      {"h if b", "expected 'else'"},
      {"torch.exp(score)", "no modules"},
      {"'score'", "no strings"},
      {"[1, 2]", "no lists"},
      {"(1, 2)", "no tuples"},
      {"bias[h:2]", "no slices"},
      {"bias[]", "an index is missing"},
      {"bias[h][b]", "one pair of brackets"},
      {"bias[h, ]", "expected a value, found ']'"},
      {"score[h] + score[h, b]",
       "'score' is captured as a tensor of rank 2 here and as a tensor of rank 1 at line 1, column 1"},
      {"k + k[h]", "'k' is captured as a tensor of rank 1 here and as a scalar at line 1, column 1"},
      {"bias(h)", "a captured tensor is read with brackets"},
      {"score(h)", "'score' is a value, not a function"},
      {"let f = 1; f(2)", "'f' is a value, not a function"},
      {"exp + 1", "'exp' is a function; call it: exp(...)"},
      {"where + 1", "'where' is a function"},
      {"exp()", "'exp' takes 1 argument, not 0"},
      {"min(1)", "'min' takes 2 arguments or more, not 1"},
      {"clamp(1, 2, 3, 4)", "'clamp' takes 3 arguments, not 4"},
      {"where(true, 1)", "'where' takes 3 arguments, not 2"},
      {"clamp(score, lo=1, hi=2)", "without names"},
      {"maximum(score, 1)", "write max(x, y)"},
      {"sigmod(score)", "did you mean 'sigmoid'?"},
      {"casual()", "did you mean 'causal'?"},
      {"12abc", "'12abc' is not a number"},
      {"1.2.3", "'1.2.3' is not a number"},
      {"0x", "needs digits after 0x"},
      {"007", "leading zeros in '007'"},
      {"9223372036854775808", "does not fit in 64 bits"},
      {"99999999999999999999", "does not fit in 64 bits"},
      {"1e999", "too large for a float; write inf"},
      {"2e9223372036854775807", "too large for a float"},
      {"2e99999999999999999999", "too large for a float"},
      {"score \xe2\x89\xa5 1", "unexpected byte 0xe2"},
      {"score $ 1", "the character '$' has no meaning here"},
      {"a[0,0,0,0,0,0]", "at most 5 dimensions"},
      {"h == not b", "expected a value, found 'not'"},
      {"2(h)", "only a function's name can be called"},
      {"(h)[1]", "only a captured tensor has indices"},
  };
  for (const RefusalCase& c : cases)
    EXPECT_THAT(tree(c.text), testing::AllOf(HasSubstr("error: "), HasSubstr(c.message))) << c.text;
}

TEST(DslParser, SuggestsParenthesesAroundComparisons) {
  EXPECT_THAT(tree("q_idx >= kv_idx & kv_idx < 5", ModKind::kMaskMod),
              HasSubstr("(q_idx >= kv_idx) & (kv_idx < 5), or write 'and'"));
  EXPECT_THAT(tree("b == 1 | h == 2 | h == 3", ModKind::kMaskMod),
              HasSubstr("(b == 1) | (h == 2) | (h == 3), or write 'or'"));
  EXPECT_EQ(tree("0 <= (h & 3) < 2", ModKind::kMaskMod), "(and (<= 0 (& h 3)) (< (& h 3) 2))");
}

std::string repeated(int count, const std::string& text) {
  std::string all;
  for (int i = 0; i < count; ++i) all += text;
  return all;
}

TEST(DslParser, HoldsItsLimits) {
  EXPECT_EQ(tree(repeated(255, "(") + "score" + repeated(255, ")")), "score");
  for (const std::string& text :
       {repeated(257, "(") + "score" + repeated(257, ")"), repeated(30000, "("), repeated(30000, "-") + "score",
        repeated(15000, "not ") + "true", repeated(20000, "2**") + "2", repeated(10000, "exp("), repeated(20000, "a["),
        repeated(4000, "1 if true else ") + "2", repeated(20000, "~") + "h"}) {
    EXPECT_THAT(tree(text), HasSubstr("nests deeper than 256 levels"));
  }
  EXPECT_TRUE(parse("score" + repeated(2000, "+exp(h)")));
  EXPECT_THAT(tree("score" + repeated(2100, "+exp(h)")), HasSubstr("more than 4096 operations"));
  EXPECT_TRUE(parse("score" + repeated(64 * 1024 - 5, " ")));
  EXPECT_THAT(tree("score" + repeated(64 * 1024 - 4, " ")), HasSubstr("the limit is 65536"));
  std::string captures = "score";
  for (int i = 0; i < 16; ++i) captures += " + c" + std::to_string(i);
  EXPECT_TRUE(parse(captures));
  EXPECT_THAT(tree(captures + " + d[h]"), HasSubstr("captures more than 16"));
  EXPECT_TRUE(parse("a[0,0,0,0,0]"));
}

TEST(DslParser, StopsExpandingWithoutEnd) {
  // Each mod uses the one before twice: 2^12 expansions at the last, without a node.
  Registry registry;
  ASSERT_FALSE(registry.add({.name = "f0", .parameters = {"x"}, .body = "x"}));
  for (int i = 1; i <= 11; ++i) {
    std::string body = "f(f(x))";
    const std::string inner = "f" + std::to_string(i - 1);
    body.replace(2, 1, inner).replace(0, 1, inner);
    ASSERT_FALSE(registry.add({.name = "f" + std::to_string(i), .parameters = {"x"}, .body = body}));
  }
  EXPECT_TRUE(registry.add({.name = "last", .parameters = {"x"}, .body = "f11(f11(x))"}));
  EXPECT_EQ(tree("f5(score)", ModKind::kScoreMod, registry), "score");
  // A name that was captured when the mod was added may become a mod that leads back to it.
  Registry cyclic;
  ASSERT_FALSE(cyclic.add({.name = "first", .body = "second + 1"}));
  ASSERT_FALSE(cyclic.add({.name = "second", .body = "first + 1"}));
  EXPECT_THAT(tree("first", ModKind::kScoreMod, cyclic), HasSubstr("nests deeper"));
}

TEST(DslParser, NamesTheNearestName) {
  EXPECT_EQ(nearest_name("scroe"), "score");
  EXPECT_EQ(nearest_name("kv_id"), "kv_idx");
  EXPECT_EQ(nearest_name("biass", std::vector<std::string>{"bias"}), "bias");
  EXPECT_EQ(nearest_name("entirely_different"), "");
}

}  // namespace
}  // namespace attnjit::dsl
