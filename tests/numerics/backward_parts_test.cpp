// Backwards of a part of the keys, given an LSE of all of them: each judged by the oracle, and their sum by the
// whole's.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/numerics/check.h"
#include "tests/numerics/judge.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// From `begin` to `end`, without it.
struct Keys {
  std::int64_t begin, end;
};

// The part of `whole` with these keys. A captured scalar `first` says where they begin.
Problem make_part(const Problem& whole, const Keys& keys) {
  Problem part = whole;
  part.spec.seqlen_kv = keys.end - keys.begin;
  part.spec.backward.partial_keys = true;
  for (const auto& [from, to] : {std::pair(&whole.k, &part.k), std::pair(&whole.v, &part.v)}) {
    std::vector<std::int64_t> shape = from->shape();
    shape[2] = part.spec.seqlen_kv;
    *to = Tensor(from->dtype(), shape, Layout::kPacked);
    for_each_index(
        shape, [&](auto index) { to->set(index, from->at({index[0], index[1], keys.begin + index[2], index[3]})); });
  }
  for (NamedTensor& capture : part.captures) {
    if (capture.name != "first") continue;
    capture.tensor = Tensor(capture.tensor.dtype(), {}, Layout::kPacked);
    capture.tensor.set_int({}, keys.begin);
  }
  std::string error;
  EXPECT_TRUE(bind_mods(&part, &error)) << error;
  return part;
}

// The cuts are where parts begin, but the first.
std::vector<Problem> make_parts(const Problem& whole, std::vector<std::int64_t> cuts) {
  std::vector<Problem> parts;
  cuts.push_back(whole.spec.seqlen_kv);
  parts.reserve(cuts.size());
  std::int64_t begin = 0;
  for (const std::int64_t end : cuts) parts.push_back(make_part(whole, {std::exchange(begin, end), end}));
  return parts;
}

Problem make_whole(const std::string& line) {
  Problem whole = make(line);
  for (NamedTensor& capture : whole.captures) {
    if (capture.name == "first") capture.tensor.set_int({}, 0);
  }
  return whole;
}

// Whose o and lse the backward is given.
enum class Forward {
  kGold,    // rounded to their types
  kWhole,   // the library's, of all keys at once
  kMerged,  // the library's of each part, put together
};

// One part's, or the whole's.
Outcome forward_of(Problem& problem) {
  const RunResult result = run(problem);
  EXPECT_EQ(result.error, "") << to_line(problem.spec);
  return result.outcome;
}

GivenForward forward_given(Problem& whole, std::vector<Problem>& parts, Forward which) {
  if (which == Forward::kGold) {
    const GoldGradients gold = compute_gold_gradients(whole);
    return {gold.o, gold.lse};
  }
  std::vector<Outcome> outcomes;
  if (which == Forward::kWhole) {
    outcomes.push_back(forward_of(whole));
  } else {
    for (Problem& part : parts) outcomes.push_back(forward_of(part));
  }
  const GoldGradients empty = empty_forward(whole);
  GivenForward given{empty.o, empty.lse};
  for_each_index(given.lse.shape(), [&](auto index) {
    const std::size_t row = packed_offset(given.lse, index);
    double maximum = -kInfinity, sum = 0.0;
    for (const Outcome& outcome : outcomes) maximum = std::max(maximum, outcome.lse[row]);
    // NaN where a part's is, and of two infinite ones.
    for (const Outcome& outcome : outcomes) sum += maximum == -kInfinity ? 0.0 : std::exp(outcome.lse[row] - maximum);
    const bool empty_row = maximum == -kInfinity && sum == 0.0;
    const double lse = outcomes.size() == 1 ? outcomes[0].lse[row] : empty_row ? -kInfinity : maximum + std::log(sum);
    given.lse.set(index, lse);
    const auto features = static_cast<std::size_t>(whole.spec.head_dim_v);
    for (std::size_t d = 0; d < features; ++d) {
      double value = 0.0;
      for (const Outcome& outcome : outcomes) {
        const double weight = outcomes.size() == 1 ? 1.0 : empty_row ? 0.0 : std::exp(outcome.lse[row] - lse);
        if (weight != 0.0) value += weight * outcome.o[row * features + d];
      }
      given.o.set({index[0], index[1], index[2], static_cast<std::int64_t>(d)}, value);
    }
  });
  return given;
}

// What the parts' gradients are together: dk and dv side by side, the others summed.
struct Total {
  std::vector<double> ours, gold, bound;
};

void add_part(const GoldGradient& gold, const std::vector<double>& ours, const Keys& keys, std::int64_t all_keys,
              Total* total) {
  const bool has_keys = gold.name == "dk" || gold.name == "dv";
  for (std::size_t at = 0; at < ours.size(); ++at) {
    std::size_t to = at;
    if (has_keys) {
      const auto dim = static_cast<std::size_t>(gold.shape[3]), rows = static_cast<std::size_t>(gold.shape[2]) * dim;
      to = (at / rows * static_cast<std::size_t>(all_keys) + static_cast<std::size_t>(keys.begin)) * dim + at % rows;
    }
    total->ours[to] += ours[at];
    total->gold[to] += gold.value[at];
    total->bound[to] += gold.bound[at];
  }
}

bool within(double a, double b, double bound) {
  return (std::isnan(a) && std::isnan(b)) || a == b || std::fabs(a - b) <= bound;
}

// What a test may want to see of the parts' gold.
using PartGold = std::vector<GoldGradients>;

// Every part against its gold, their golds against the whole's, and their sums against what the library gives for the
// whole.
PartGold expect_parts(Problem& whole, const std::vector<std::int64_t>& cuts, Forward which) {
  std::vector<Problem> parts = make_parts(whole, cuts);
  Problem all = make_part(whole, {0, whole.spec.seqlen_kv});
  const std::string line = to_line(whole.spec);
  if (!target().compile_only.empty()) {
    const GoldGradients empty = empty_forward(whole);
    forward_given(whole, parts, which);
    for (Problem& part : parts) {
      const Check check = check_partial_keys(part, {empty.o, empty.lse});
      EXPECT_TRUE(check.accepted) << check.message;
    }
    EXPECT_EQ(run_backward(whole, empty.o, empty.lse).error, "") << line;
    return {};
  }

  const GivenForward given = forward_given(whole, parts, which);
  const GoldGradients of_all = compute_gold_gradients(all, &given);
  std::vector<Total> totals;
  for (const GoldGradient& gold : of_all.wanted) {
    const std::vector<double> zeros(gold.value.size());
    totals.push_back({zeros, zeros, zeros});
  }
  PartGold golds;
  std::int64_t begin = 0;
  for (Problem& part : parts) {
    Gradients gradients;
    GoldGradients& gold = golds.emplace_back();
    const Check check = check_partial_keys(part, given, &gold, &gradients);
    EXPECT_TRUE(check.accepted) << check.message << " from key " << begin;
    if (!check.accepted) return golds;
    const auto ours = in_order(gold, gradients);
    const Keys keys{begin, begin + part.spec.seqlen_kv};
    for (std::size_t i = 0; i < totals.size(); ++i) {
      add_part(gold.wanted[i], *ours[i], keys, whole.spec.seqlen_kv, &totals[i]);
    }
    begin = keys.end;
  }

  const BackwardResult result = run_backward(whole, given.o, given.lse);
  EXPECT_EQ(result.error, "") << line;
  const GoldGradients usual = compute_gold_gradients(whole);
  const auto at_once = in_order(of_all, result.gradients);
  for (std::size_t i = 0; i < totals.size(); ++i) {
    const GoldGradient &gold = of_all.wanted[i], &of_usual = usual.wanted[i];
    const bool is_shift = gold.name.starts_with("d_") && whole.spec.backward.shifts_rows(gold.name.substr(2));
    const Total& total = totals[i];
    std::size_t compared = 0;
    for (std::size_t at = 0; at < total.ours.size(); ++at) {
      if (total.bound[at] == kInfinity || gold.bound[at] == kInfinity) continue;
      ++compared;
      // A P is computed from its score and lse alone.
      EXPECT_TRUE(within(total.gold[at], gold.value[at], 1e-9 * (1.0 + std::fabs(gold.value[at]))))
          << "the parts' gold sums to " << total.gold[at] << ", the whole's is " << gold.value[at] << ": " << gold.name
          << ", element " << at << " of " << line;
      // The whole's row shifts know of what flows into lse only, and of no rounding of o and lse.
      const double bound =
          total.bound[at] +
          (is_shift ? of_usual.bound[at] + std::fabs(gold.value[at] - of_usual.value[at]) : gold.bound[at]);
      const double expected = (*at_once[i])[at];
      EXPECT_TRUE(within(total.ours[at], expected, bound))
          << "the parts sum to " << total.ours[at] << ", the whole's is " << expected << ", allowed are " << bound
          << ": " << gold.name << ", element " << at << " of " << line;
      if (testing::Test::HasFailure()) return golds;
    }
    EXPECT_GT(compared, total.ours.size() / 4) << gold.name << " of " << line;
  }
  return golds;
}

struct PartCase {
  const char* name;
  const char* fields;
};

// The causal ones leave nothing of the later parts to the first rows; the last one leaves nothing to them of any part.
constexpr PartCase kCases[] = {
    {"noop", R"_(score_mod="noop")_"},
    {"causal", R"_(score_mod="where(q_idx >= kv_idx + first, score, -inf)" capture=first:int32::packed:normal)_"},
    {"shift",
     R"_(score_mod="where(q_idx >= kv_idx + first, score + u[q_idx] - 2 * w[h], -inf)" capture=first:int32::packed:normal capture=u:float32:50:packed:normal capture=w:float32:4:packed:normal grads=u,w row_shifts=u,w)_"},
    {"captured",
     R"_(score_mod="score * (1 + 0.1 * w[h]) + t[h, kv_idx + first] + bias[q_idx, kv_idx + first]" capture=first:int32::packed:normal capture=w:float32:4:packed:normal capture=t:float32:4x56:packed:normal capture=bias:bfloat16:50x56:packed:normal grads=w,t,bias)_"},
    {"masked",
     R"_(score_mod="softcap(3) + t[kv_idx + first]" mask_mod="q_idx >= kv_idx + first + 5" capture=first:int32::packed:normal capture=t:float16:56:packed:normal grads=t)_"},
};

constexpr const char* kShape = "b=2 hq=4 hkv=2 sq=50 skv=56 d=32 dv=24 backward=dq,dk,dv grad_lse=1 ";

std::string line_of(const std::string& fields, const std::string& dtype, const std::string& backend) {
  return kShape + fields + " dtype=" + dtype + " backend=" + backend;
}

TEST(NumericsBackwardPart, SumsToTheWhole) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16", "bfloat16"}) {
      for (const PartCase& each : kCases) {
        SCOPED_TRACE(each.name);
        Problem whole = make_whole(line_of(each.fields, dtype, backend));
        expect_parts(whole, {24}, Forward::kGold);
        expect_parts(whole, {24}, Forward::kWhole);
        expect_parts(whole, {16, 40}, Forward::kMerged);
        if (HasFailure()) return;
      }
    }
  }
}

// A part without a key that a row keeps, where the row's merged lse is finite: that row's dq is 0 to the bit.
TEST(NumericsBackwardPart, DroppedRowsOfAPartAreZero) {
  for (const std::string& backend : target().backends) {
    Problem whole = make_whole(line_of(kCases[1].fields, "float32", backend));
    const PartGold golds = expect_parts(whole, {24}, Forward::kMerged);
    if (golds.empty()) continue;  // nothing runs
    const GoldGradient& dq = golds[1].wanted[0];
    const auto dim = static_cast<std::size_t>(dq.shape[3]), rows = static_cast<std::size_t>(dq.shape[2]);
    for (std::size_t at = 0; at < dq.value.size(); ++at) {
      if (at / dim % rows < 24) ASSERT_EQ(dq.bound[at], 0.0) << at;
    }
  }
}

std::size_t required_nans(const GoldGradient& gold) {
  std::size_t count = 0;
  for (std::size_t at = 0; at < gold.value.size(); ++at) {
    count += std::isnan(gold.value[at]) && gold.bound[at] != kInfinity;
  }
  return count;
}

// A key of one part whose score is NaN or +infinity makes lse NaN, and so the gradients of all that the row keeps, in
// every part.
TEST(NumericsBackwardPart, PoisonReachesEveryPart) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16", "bfloat16"}) {
      for (const double poison : {kNan, kInfinity}) {
        Problem whole =
            make_whole(line_of(R"_(score_mod="where(q_idx >= kv_idx + first, score + t[h, kv_idx + first], -inf)" )_"
                               R"_(capture=first:int32::packed:normal capture=t:float32:4x56:packed:normal grads=t)_",
                               dtype, backend));
        whole.captures[1].tensor.set({1, 20}, poison);
        for (const Forward which : {Forward::kGold, Forward::kWhole, Forward::kMerged}) {
          const PartGold golds = expect_parts(whole, {24, 40}, which);
          // A forward's lse may be +infinity there, which promises nothing.
          if (golds.empty() || which != Forward::kGold) continue;
          for (std::size_t part = 0; part < golds.size(); ++part) {
            const GoldGradients& gold = golds[part];
            // Rows from 20 on of both batches' second head, of which some keep no key of the last part.
            const auto rows = static_cast<std::size_t>(50 - (part == 2 ? 40 : part == 1 ? 24 : 20));
            EXPECT_EQ(required_nans(gold.wanted[0]), 2 * 32 * rows) << part;
            for (std::size_t i = 1; i < gold.wanted.size(); ++i) EXPECT_GT(required_nans(gold.wanted[i]), 0u) << part;
          }
        }
        // The same of a key: what K itself spoils is of its own part.
        Problem by_key = make_whole(line_of(kCases[1].fields, dtype, backend));
        by_key.k.set({0, 1, 20, 3}, poison);
        const PartGold golds = expect_parts(by_key, {24}, Forward::kGold);
        if (golds.empty() || !std::isnan(poison)) continue;
        // Of both heads of the group.
        EXPECT_EQ(required_nans(golds[0].wanted[0]), 2u * 31 * 30);
        EXPECT_EQ(required_nans(golds[1].wanted[0]), 2u * 32 * 26);
      }
    }
  }
}

// A value of one part that is infinite makes o infinite where lse is finite: in every part, delta times the P of
// exactly 0 of a score of -infinity is not nothing, unless the mask dropped it.
TEST(NumericsBackwardPart, AnInfiniteValueReachesElementsOfMinusInfinity) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16", "bfloat16"}) {
      Problem whole =
          make_whole(line_of(R"_(score_mod="score + t[h, kv_idx + first]" mask_mod="kv_idx + first != 32" )_"
                             R"_(capture=first:int32::packed:normal capture=t:float32:4x56:packed:normal grads=t)_",
                             dtype, backend));
      for (std::int64_t h = 0; h < 4; ++h) {
        for (const std::int64_t key : {30, 31, 32}) whole.captures[1].tensor.set({h, key}, -kInfinity);
      }
      whole.v.set({0, 1, 5, 3}, kInfinity);
      for (const Forward which : {Forward::kGold, Forward::kWhole, Forward::kMerged}) {
        const PartGold golds = expect_parts(whole, {24}, which);
        if (golds.empty()) continue;  // nothing runs
        const GoldGradients& gold = golds[1];
        for (const GoldGradient& each : gold.wanted) {
          if (each.name != "dk" && each.name != "dv") continue;
          const auto dim = static_cast<std::size_t>(each.shape[3]), keys = static_cast<std::size_t>(each.shape[2]);
          for (std::size_t at = 0; at < each.bound.size(); ++at) {
            const std::size_t key = 24 + at / dim % keys, head = at / dim / keys;
            const bool open = each.name == "dk" && head == 1 && key != 32, nothing = key >= 30 && key <= 32;
            ASSERT_EQ(each.bound[at] == kInfinity, open) << each.name << ' ' << at;
            ASSERT_EQ(each.bound[at] == 0.0, nothing && !open) << each.name << ' ' << at;
          }
        }
      }
    }
  }
}

// A kernel may give 0 or NaN to what a row of lse = +infinity keeps, and nothing to its elements of -infinity.
TEST(NumericsBackwardPart, AnLseOfInfinityLeavesElementsOfMinusInfinityAtZero) {
  if (!target().compile_only.empty()) GTEST_SKIP() << "nothing is judged";
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16", "bfloat16"}) {
      Problem whole =
          make_whole(line_of(R"_(score_mod="score + t[h, kv_idx + first]" capture=first:int32::packed:normal )_"
                             R"_(capture=t:float32:4x56:packed:normal grads=t)_",
                             dtype, backend));
      for (std::int64_t h = 0; h < 4; ++h) whole.captures[1].tensor.set({h, 30}, -kInfinity);
      std::vector<Problem> parts = make_parts(whole, {24});
      GivenForward given = forward_given(whole, parts, Forward::kGold);
      given.lse.set({0, 1, 7}, kInfinity);
      GoldGradients gold;
      const Check check = check_partial_keys(parts[1], given, &gold);
      EXPECT_TRUE(check.accepted) << check.message;
      EXPECT_EQ(gold.undecided, 1) << check.message;
      for (const GoldGradient& each : gold.wanted) {
        if (each.name != "dk" && each.name != "dv") continue;
        const auto dim = static_cast<std::size_t>(each.shape[3]), keys = static_cast<std::size_t>(each.shape[2]);
        for (std::size_t at = 0; at < each.bound.size(); ++at) {
          const std::size_t key = 24 + at / dim % keys, head = at / dim / keys;
          ASSERT_EQ(each.bound[at] == kInfinity, head == 0 && key != 30) << each.name << ' ' << at;
          ASSERT_EQ(each.bound[at] == 0.0, key == 30) << each.name << ' ' << at;
        }
      }
    }
  }
}

// Scores on a jump: given lse, each element is within the height of its own, whatever share of its part it has.
TEST(NumericsBackwardPart, JumpsAreBoundedByTheirElements) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      Problem whole = make_whole(line_of(R"_(score_mod="score + floor(score)" scale=1)_", dtype, backend));
      for_each_index(whole.q.shape(), [&](auto index) { whole.q.set(index, index[3] == 0 ? 1.0 : 0.0); });
      // Whole numbers from key 24 on, far below the other scores.
      for_each_index(whole.k.shape(), [&](auto index) {
        if (index[3] == 0) whole.k.set(index, index[2] < 24 ? 8.25 + 0.25 * static_cast<double>(index[2] % 3) : 1.0);
      });
      std::vector<Problem> parts = make_parts(whole, {24});
      if (target().compile_only.empty()) {
        const GoldGradients alone = compute_gold_gradients(parts[1]);
        EXPECT_EQ(alone.undecided, alone.rows);
      }
      const PartGold golds = expect_parts(whole, {24}, Forward::kGold);
      if (golds.empty()) continue;
      EXPECT_EQ(golds[1].undecided, 0);
      for (const GoldGradient& gold : golds[1].wanted) {
        EXPECT_EQ(std::ranges::count(gold.bound, kInfinity), 0) << gold.name;
        EXPECT_LT(*std::ranges::max_element(gold.bound), 1e-3) << gold.name;
      }
    }
  }
}

// What a kernel gives that does not take lse as it is given, or takes a part for the whole, is not accepted.
TEST(NumericsBackwardPart, WrongPartsAreRejected) {
  if (!target().compile_only.empty()) GTEST_SKIP() << "nothing is judged";
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16", "bfloat16"}) {
      for (const PartCase& each : kCases) {
        const std::string what = std::string(each.name) + ' ' + dtype + ' ' + backend;
        Problem whole = make_whole(line_of(each.fields, dtype, backend));
        std::vector<Problem> parts = make_parts(whole, {24});
        Problem& part = parts[1];
        const GivenForward given = forward_given(whole, parts, Forward::kGold);
        const GoldGradients gold = compute_gold_gradients(part, &given), alone = compute_gold_gradients(part);
        const auto accepts = [&](Problem& problem, const Tensor& o, const Tensor& lse) {
          const BackwardResult result = run_backward(problem, o, lse);
          EXPECT_EQ(result.error, "") << what;
          return judge(gold, result.gradients).accepted;
        };
        EXPECT_TRUE(accepts(part, given.o, given.lse)) << what;
        EXPECT_FALSE(accepts(part, alone.o, alone.lse)) << what << ": o and lse of the part";
        EXPECT_FALSE(accepts(part, given.o, alone.lse)) << what << ": normalised over the part";
        EXPECT_FALSE(accepts(part, alone.o, given.lse)) << what << ": o of the part";
        if (whole.spec.backward.row_shifts.empty()) continue;
        Problem as_whole = part;
        as_whole.spec.backward.partial_keys = false;
        EXPECT_FALSE(accepts(as_whole, given.o, given.lse)) << what << ": row shifts as of all keys";
      }
      // The NaN of another part's key, which this part's scores know nothing of.
      Problem whole = make_whole(line_of(kCases[1].fields, dtype, backend));
      whole.k.set({0, 1, 20, 3}, kNan);
      std::vector<Problem> parts = make_parts(whole, {24});
      const GivenForward given = forward_given(whole, parts, Forward::kGold);
      const GoldGradients gold = compute_gold_gradients(parts[1], &given), alone = compute_gold_gradients(parts[1]);
      const BackwardResult result = run_backward(parts[1], alone.o, alone.lse);
      EXPECT_EQ(result.error, "");
      EXPECT_FALSE(judge(gold, result.gradients).accepted) << dtype << ' ' << backend << ": NaN swallowed";
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
