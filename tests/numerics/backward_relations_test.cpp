// Relations between gradients that need no oracle, and so find what an oracle misses.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dsl/float32_row.h"
#include "tests/numerics/execute.h"
#include "tests/numerics/expressions.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

// Gold, rounded to their types.
GivenForward given_of(const Problem& problem) {
  const GoldGradients gold = compute_gold_gradients(problem);
  return {gold.o, gold.lse};
}

Gradients run_or_fail(Problem& problem, const GivenForward& given, attnjit_context* context = nullptr) {
  BackwardResult result = run_backward(problem, given.o, given.lse, context);
  EXPECT_EQ(result.error, "") << to_line(problem.spec);
  return std::move(result.gradients);
}
Gradients run_or_fail(Problem& problem) { return run_or_fail(problem, given_of(problem)); }

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void expect_same_bits(const Gradients& a, const Gradients& b, const std::string& what) {
  EXPECT_TRUE(same_bits(a.dq, b.dq)) << what << ": dq";
  EXPECT_TRUE(same_bits(a.dk, b.dk)) << what << ": dk";
  EXPECT_TRUE(same_bits(a.dv, b.dv)) << what << ": dv";
  ASSERT_EQ(a.captures.size(), b.captures.size()) << what;
  for (std::size_t i = 0; i < a.captures.size(); ++i) {
    EXPECT_TRUE(same_bits(a.captures[i], b.captures[i])) << what << ": captured gradient " << i;
  }
}

// `tolerance` is of the largest magnitude.
void expect_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  double largest = 1e-3;
  for (const double value : a) largest = std::max(largest, std::fabs(value));
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool same =
        a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])) || std::fabs(a[i] - b[i]) <= tolerance * largest;
    ASSERT_TRUE(same) << what << ": element " << i << ": " << a[i] << " and " << b[i];
  }
}

void expect_close(const Gradients& a, const Gradients& b, double tolerance, const std::string& what) {
  expect_close(a.dq, b.dq, tolerance, what + ": dq");
  expect_close(a.dk, b.dk, tolerance, what + ": dk");
  expect_close(a.dv, b.dv, tolerance, what + ": dv");
  ASSERT_EQ(a.captures.size(), b.captures.size()) << what;
  for (std::size_t i = 0; i < a.captures.size(); ++i) {
    expect_close(a.captures[i], b.captures[i], tolerance, what + ": captured gradient " + std::to_string(i));
  }
}

// Of two sums that differ by rounding a 16-bit type may round one up and the other down.
void round_alike(const Case& spec, const Gradients& to, Gradients* gradients) {
  for (std::size_t i = 0; i < gradients->captures.size(); ++i) {
    const std::string& name = spec.backward.captures[i].name;
    const auto capture = std::ranges::find(spec.captures, name, &CaptureSpec::name);
    const double spacing = capture->dtype == dsl::DType::kF32 ? 0.0 : 2.0 * dsl::unit_roundoff(capture->dtype);
    for (std::size_t at = 0; at < gradients->captures[i].size(); ++at) {
      double& value = gradients->captures[i][at];
      const double other = to.captures[i][at];
      if (std::fabs(value - other) <= spacing * std::fabs(other)) value = other;
    }
  }
}

double tolerance_of(const Case& spec) { return spec.dtype == dsl::DType::kF32 ? 2e-5 : 2e-2; }

std::string with_backend(const std::string& backend, const std::string& line) { return line + " backend=" + backend; }

constexpr const char* kShapes[] = {
    "b=2 hq=4 hkv=2 sq=65 skv=130 d=64 dtype=float32 seed=3",
    "b=2 hq=2 hkv=1 sq=33 skv=70 d=40 dv=24 dtype=bfloat16 seed=4",
    "b=1 hq=3 hkv=3 sq=128 skv=128 d=128 dtype=float16 seed=5",
};

// Two spellings of the same scores.
TEST(NumericsBackwardRelation, SpellingsAgree) {
  constexpr std::pair<const char*, const char*> kPairs[] = {
      {"noop", "score + 0"},
      {"noop", "score * 1"},
      {"where(q_idx >= kv_idx, score, -inf)", "where(kv_idx > q_idx, -inf, score)"},
      {"score + q_idx * 2 + h", "h + (2 * q_idx + score)"},
  };
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      for (const auto& [one, other] : kPairs) {
        const std::string line =
            with_backend(backend, std::string(shape) + " backward=dq,dk,dv deterministic=1") + " score_mod=\"";
        Problem a = make(line + one + "\""), b = make(line + other + "\"");
        const GivenForward given = given_of(a);
        const Gradients first = run_or_fail(a, given), second = run_or_fail(b, given);
        const std::string what = std::string(one) + " and " + other + " on " + to_line(a.spec);
        // Eager runs the operations as they are written.
        if (backend == "math") {
          expect_close(first, second, tolerance_of(a.spec), what);
        } else {
          expect_same_bits(first, second, what);
        }
      }
    }
  }
}

TEST(NumericsBackwardRelation, CausalTwoWays) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      const std::string line = with_backend(backend, std::string(shape) + " backward=dq,dk,dv deterministic=1") + " ";
      Problem by_mod = make(line + "score_mod=\"causal\""), by_mask = make(line + "mask_mod=\"causal\"");
      const GivenForward given = given_of(by_mod);
      const Gradients a = run_or_fail(by_mod, given), b = run_or_fail(by_mask, given);
      if (backend == "math") {
        expect_close(a, b, tolerance_of(by_mod.spec), to_line(by_mod.spec));
      } else {
        expect_same_bits(a, b, to_line(by_mod.spec));
      }
    }
  }
}

// The gradient of one kv head is the sum of what its copies get.
TEST(NumericsBackwardRelation, GroupedHeadsAreRepeatedHeads) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      const std::string line =
          with_backend(backend, std::string("b=2 hq=6 sq=33 skv=66 d=48 dv=16 score_mod=\"score * (1 + 0.1 * h) + "
                                            "t[h, kv_idx]\" capture=t:float32:6x66:packed:normal seed=8 "
                                            "backward=dq,dk,dv grads=t grad_lse=1 dtype=") +
                                    dtype);
      Problem grouped = make(line + " hkv=2"), repeated = make(line + " hkv=6");
      const auto repeat = [&](const Tensor& from, Tensor* to) {
        for_each_index(to->shape(),
                       [&](auto index) { to->set(index, from.at({index[0], index[1] / 3, index[2], index[3]})); });
      };
      repeat(grouped.k, &repeated.k);
      repeat(grouped.v, &repeated.v);
      repeated.q = grouped.q;
      repeated.grad_out = grouped.grad_out;
      repeated.grad_lse = grouped.grad_lse;
      for_each_index(grouped.captures[0].tensor.shape(),
                     [&](auto index) { repeated.captures[0].tensor.set(index, grouped.captures[0].tensor.at(index)); });
      const GivenForward given = given_of(grouped);
      const Gradients few = run_or_fail(grouped, given);
      Gradients many = run_or_fail(repeated, given);
      for (std::vector<double>* const values : {&many.dk, &many.dv}) {
        const std::size_t block = values->size() / 12;
        std::vector<double> sums(4 * block, 0.0);
        for (std::size_t i = 0; i < values->size(); ++i) sums[i / block / 3 * block + i % block] += (*values)[i];
        *values = sums;
      }
      expect_close(few, many, tolerance_of(grouped.spec), to_line(grouped.spec));
    }
  }
}

TEST(NumericsBackwardRelation, PermutedBatchPermutesTheGradients) {
  for (const std::string& backend : target().backends) {
    const std::string line =
        with_backend(backend,
                     "b=3 hq=2 hkv=1 sq=40 skv=50 d=32 dtype=bfloat16 score_mod=\"score * t[kv_idx]\" "
                     "capture=t:float32:50:packed:normal backward=dq,dk,dv grads=t deterministic=1");
    Problem problem = make(line), permuted = make(line);
    const std::int64_t order[] = {2, 0, 1};
    for (const auto& [from, to] :
         {std::pair(&problem.q, &permuted.q), std::pair(&problem.k, &permuted.k), std::pair(&problem.v, &permuted.v),
          std::pair(&problem.grad_out, &permuted.grad_out)}) {
      for_each_index(to->shape(),
                     [&](auto index) { to->set(index, from->at({order[index[0]], index[1], index[2], index[3]})); });
    }
    const Gradients a = run_or_fail(problem), b = run_or_fail(permuted);
    const auto expect_permuted = [&](const std::vector<double>& of, const std::vector<double>& by, const char* name) {
      std::vector<double> expected;
      const auto block = static_cast<std::ptrdiff_t>(of.size() / 3);
      for (const std::int64_t from : order) {
        expected.insert(expected.end(), of.begin() + from * block, of.begin() + (from + 1) * block);
      }
      expect_close(expected, by, backend == "math" ? tolerance_of(problem.spec) : 0.0, backend + ": " + name);
    };
    expect_permuted(a.dq, b.dq, "dq");
    expect_permuted(a.dk, b.dk, "dk");
    expect_permuted(a.dv, b.dv, "dv");
    expect_close(a.captures[0], b.captures[0], 2e-5, backend + ": captured gradient");
  }
}

TEST(NumericsBackwardRelation, StridedIsPacked) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16"}) {
      const std::string line = with_backend(
          backend, std::string("b=2 hq=4 hkv=2 sq=45 skv=77 d=33 dv=17 score_mod=\"score + bias[h, q_idx, kv_idx]\" "
                               "capture=bias:float32:4x45x77:packed:normal seed=6 backward=dq,dk,dv grads=bias "
                               "grad_lse=1 deterministic=1 dtype=") +
                       dtype);
      Problem packed = make(line);
      const GivenForward given = given_of(packed);
      const Gradients expected = run_or_fail(packed, given);
      for (const Layout layout : {Layout::kBshd, Layout::kPadded}) {
        Problem strided = packed;
        Case& spec = strided.spec;
        BackwardSpec& backward = spec.backward;
        spec.layout_q = spec.layout_k = spec.layout_v = spec.layout_o = layout;
        backward.layout_grad_out = backward.layout_dq = backward.layout_dk = backward.layout_dv = layout;
        backward.captures[0].layout = layout;
        GivenForward strided_given = given;
        for (Tensor* const tensor : {&strided.q, &strided.k, &strided.v, &strided.captures[0].tensor, &strided.grad_out,
                                     &strided.grad_lse, &strided_given.o, &strided_given.lse}) {
          Tensor other(tensor->dtype(), tensor->shape(), layout, 1);
          for_each_index(tensor->shape(), [&](auto index) { other.set(index, tensor->at(index)); });
          *tensor = other;
        }
        const Gradients got = run_or_fail(strided, strided_given);
        if (spec.device == "cuda") {
          expect_close(expected, got, tolerance_of(spec), to_line(spec));
        } else {
          expect_same_bits(expected, got, to_line(spec));
        }
      }
    }
  }
}

// Halves of K and V, each with the o and lse that a merge over both gives: dq and the captured gradients, row shifts
// (u) and what is that in part (w) among them, sum to the whole's, dk and dv are its halves. So a ring of devices
// computes its gradients.
TEST(NumericsBackwardRelation, MergedHalvesAreTheWhole) {
  for (const std::string& backend : target().backends) {
    const std::string line =
        with_backend(backend,
                     "b=1 hq=2 hkv=2 sq=50 d=32 score_mod=\"where(q_idx >= kv_idx + first, score * (t[h, kv_idx + "
                     "first] + w[h]) + u[q_idx] - 2 * w[h], -inf)\" capture=first:int32::packed:normal "
                     "capture=t:float32:2x48:packed:normal capture=u:float32:50:packed:normal "
                     "capture=w:float32:2:packed:normal backward=dq,dk,dv grads=t,u,w grad_lse=1");
    Problem whole = make(line + " skv=48 row_shifts=u");
    whole.captures[0].tensor.set_int({}, 0);
    const GivenForward given = given_of(whole);
    const Gradients all = run_or_fail(whole, given);
    Gradients sum;
    for (std::int64_t half = 0; half < 2; ++half) {
      Problem part = make(line + " skv=24 partial_keys=1");
      part.captures[0].tensor.set_int({}, 24 * half);
      for (std::size_t i = 1; i < part.captures.size(); ++i) {
        for_each_index(whole.captures[i].tensor.shape(),
                       [&](auto index) { part.captures[i].tensor.set(index, whole.captures[i].tensor.at(index)); });
      }
      part.q = whole.q;
      part.grad_out = whole.grad_out;
      part.grad_lse = whole.grad_lse;
      for (const auto& [from, to] : {std::pair(&whole.k, &part.k), std::pair(&whole.v, &part.v)}) {
        for_each_index(to->shape(), [&](auto index) {
          to->set(index, from->at({index[0], index[1], index[2] + 24 * half, index[3]}));
        });
      }
      const Gradients gradients = run_or_fail(part, given);
      const auto add = [](const std::vector<double>& from, std::vector<double>* to) {
        to->resize(from.size());
        for (std::size_t i = 0; i < from.size(); ++i) (*to)[i] += from[i];
      };
      add(gradients.dq, &sum.dq);
      sum.captures.resize(gradients.captures.size());
      for (std::size_t i = 0; i < sum.captures.size(); ++i) add(gradients.captures[i], &sum.captures[i]);
      // Keys of one head lie side by side.
      for (const auto& [from, to] : {std::pair(&gradients.dk, &sum.dk), std::pair(&gradients.dv, &sum.dv)}) {
        to->resize(2 * from->size());
        const std::size_t block = from->size() / 2;
        for (std::size_t i = 0; i < from->size(); ++i) {
          (*to)[(i / block * 2 + static_cast<std::size_t>(half)) * block + i % block] = (*from)[i];
        }
      }
    }
    expect_close(all, sum, 2e-5, backend);
  }
}

// A backward's forward plan is that of attnjit_prepare, and a backward does not change what a forward gives.
TEST(NumericsBackwardRelation, ForwardIsUntouched) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      Problem problem = make(with_backend(
          backend, std::string(shape) + " score_mod=\"softcap(5)\" backward=dq,dk,dv grad_lse=1 forward=own"));
      const RunResult before = run(problem);
      ASSERT_EQ(before.error, "");
      const GivenForward given = given_of(problem);
      const BackwardResult own = run_backward(problem, given.o, given.lse);
      ASSERT_EQ(own.error, "") << to_line(problem.spec);
      const RunResult after = run(problem);
      EXPECT_TRUE(same_bits(before.outcome.o, after.outcome.o)) << to_line(problem.spec);
      EXPECT_TRUE(same_bits(before.outcome.lse, after.outcome.lse)) << to_line(problem.spec);
      EXPECT_TRUE(same_bits(before.outcome.o, own.forward.o)) << to_line(problem.spec);
      EXPECT_TRUE(same_bits(before.outcome.lse, own.forward.lse)) << to_line(problem.spec);
    }
  }
}

constexpr const char* kCaptured[] = {
    R"_(score_mod="causal")_",
    R"_(score_mod="score + t[off[q_idx, kv_idx]]" capture=t:float32:7:packed:normal capture=off:int32:QxK:packed:index)_",
    R"_(score_mod="score * s + t[h, q_idx - kv_idx] + u[kv_idx]" capture=s:float32::packed:normal capture=t:bfloat16:Hx70:packed:normal capture=u:float16:K:packed:normal)_",
    R"_(score_mod="tanh(score + t[kv_idx]) + w[q_idx]" capture=t:float32:K:packed:normal capture=w:float32:Q:packed:normal)_",
};

Case captured_case(const std::string& backend, const char* shape, const char* fields) {
  const Case base = parse(shape);
  const Case captured = with_expression(base, fields);
  Case spec = with_all_gradients(captured);
  spec.backend = backend;
  spec.backward.grad_lse = true;
  return spec;
}

TEST(NumericsBackwardRelation, DeterministicRunsAreBitIdentical) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      for (const char* const fields : kCaptured) {
        Case spec = captured_case(backend, shape, fields);
        spec.backward.deterministic = true;
        Problem problem = make(to_line(spec));
        const GivenForward given = given_of(problem);
        attnjit_context* const context = shared_context(2);
        const Gradients first = run_or_fail(problem, given, context);
        for (int repeat = 0; repeat < 4; ++repeat) {
          expect_same_bits(first, run_or_fail(problem, given, context), "again: " + to_line(spec));
        }
      }
    }
  }
}

// In any order they are the same within rounding.
TEST(NumericsBackwardRelation, DeterministicIsTheSameWithinRounding) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      for (const char* const fields : kCaptured) {
        Case spec = captured_case(backend, shape, fields);
        Problem free = make(to_line(spec));
        spec.backward.deterministic = true;
        Problem fixed = make(to_line(spec));
        const GivenForward given = given_of(free);
        const Gradients exact = run_or_fail(fixed, given);
        Gradients rounded = run_or_fail(free, given);
        round_alike(spec, exact, &rounded);
        expect_close(rounded, exact, tolerance_of(spec), to_line(spec));
      }
    }
  }
}

// What is not asked for changes nothing of the rest.
TEST(NumericsBackwardRelation, GradientsNotAskedForChangeNothing) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      const Case spec = captured_case(backend, shape, kCaptured[2]);
      Problem problem = make(to_line(spec));
      const GivenForward given = given_of(problem);
      const Gradients all = run_or_fail(problem, given);
      const double tolerance = tolerance_of(spec);
      for (const int only : {0, 1, 2, 3}) {
        Case part = spec;
        part.backward.dq = only == 0;
        part.backward.dk = only == 1;
        part.backward.dv = only == 2;
        if (only < 3) part.backward.captures.clear();
        Problem alone = make(to_line(part));
        Gradients one = run_or_fail(alone, given);
        Gradients expected;
        if (only == 0) expected.dq = all.dq;
        if (only == 1) expected.dk = all.dk;
        if (only == 2) expected.dv = all.dv;
        if (only == 3) expected.captures = all.captures;
        if (only == 3) round_alike(spec, expected, &one);
        expect_close(expected, one, tolerance, to_line(part));
      }
    }
  }
}

// Four times what flows in gives four times the gradients.
TEST(NumericsBackwardRelation, GradientsAreLinearInTheInflow) {
  for (const std::string& backend : target().backends) {
    for (const char* const fields : kCaptured) {
      Case spec = captured_case(backend, kShapes[0], fields);
      spec.backward.deterministic = true;
      Problem problem = make(to_line(spec));
      const GivenForward given = given_of(problem);
      Gradients once = run_or_fail(problem, given);
      for (Tensor* const tensor : {&problem.grad_out, &problem.grad_lse}) {
        for_each_index(tensor->shape(), [&](auto index) { tensor->set(index, 4.0 * tensor->at(index)); });
      }
      const Gradients more = run_or_fail(problem, given);
      std::vector<std::vector<double>*> all = {&once.dq, &once.dk, &once.dv};
      for (std::vector<double>& values : once.captures) all.push_back(&values);
      for (std::vector<double>* const values : all) {
        for (double& value : *values) value *= 4.0;
      }
      expect_close(once, more, tolerance_of(spec), to_line(spec));
    }
  }
}

// One plan serves any values.
TEST(NumericsBackwardRelation, OnePlanServesNewValues) {
  for (const std::string& backend : target().backends) {
    const std::string line = with_backend(
        backend,
        "b=1 hq=2 hkv=1 sq=40 skv=70 d=32 score_mod=\"score * t + bias[h, kv_idx]\" "
        "mask_mod=\"kv_idx < lengths[b] + 20\" capture=t:float32::packed:normal "
        "capture=bias:bfloat16:2x70:packed:normal capture=lengths:int32:1:packed:normal backward=dq,dk,dv grads=t,bias "
        "deterministic=1 forward=own");
    Problem first = make(line + " seed=1 scale=0.2"), second = make(line + " seed=3 scale=0.3");
    first.captures[2].tensor.set_int(std::array<std::int64_t, 1>{0}, 3);
    second.captures[2].tensor.set_int(std::array<std::int64_t, 1>{0}, 30);
    const GivenForward given_first = given_of(first), given_second = given_of(second);
    const Gradients expected_first = run_or_fail(first, given_first);
    const Gradients expected_second = run_or_fail(second, given_second);
    EXPECT_FALSE(same_bits(expected_first.dq, expected_second.dq));
    BackwardCall calls[] = {{&first, given_first.o, given_first.lse},
                            {&second, given_second.o, given_second.lse},
                            {&first, given_first.o, given_first.lse}};
    const auto results = run_backward_with_one_plan(calls);
    ASSERT_EQ(results.size(), 3u) << results.front().error;
    for (const BackwardResult& result : results) ASSERT_EQ(result.error, "");
    expect_same_bits(results[0].gradients, expected_first, backend);
    expect_same_bits(results[1].gradients, expected_second, backend);
    expect_same_bits(results[2].gradients, expected_first, backend);
  }
}

// Callers at once, each with its own problem and all through one context, get what they get alone.
TEST(NumericsBackwardRelation, ConcurrentCallsAreBitIdentical) {
  for (const std::string& backend : target().backends) {
    constexpr int kCallers = 4;
    attnjit_context* const context = shared_context(backend == "math" ? 1 : 2);
    std::vector<Problem> problems;
    std::vector<GivenForward> given;
    std::vector<Gradients> alone;
    for (int i = 0; i < kCallers; ++i) {
      problems.push_back(make(with_backend(
          backend,
          "b=2 hq=2 sq=65 skv=100 d=32 score_mod=\"softcap(" + std::to_string(2 + i / 2) +
              ") + t[kv_idx]\" capture=t:float32:100:packed:normal backward=dq,dk,dv grads=t deterministic=1 seed=" +
              std::to_string(i))));
      given.push_back(given_of(problems.back()));
      alone.push_back(run_or_fail(problems.back(), given.back(), context));
    }
    std::vector<std::thread> callers;
    callers.reserve(kCallers);
    std::vector<std::string> faults(kCallers);
    for (int i = 0; i < kCallers; ++i) {
      callers.emplace_back([&, i] {
        const auto number = static_cast<std::size_t>(i);
        for (int repeat = 0; repeat < 10; ++repeat) {
          const BackwardResult result = run_backward(problems[number], given[number].o, given[number].lse, context);
          if (!result.error.empty()) faults[number] = result.error;
          if (!same_bits(result.gradients.dq, alone[number].dq)) faults[number] = "dq differs";
          if (!same_bits(result.gradients.dk, alone[number].dk)) faults[number] = "dk differs";
          if (!same_bits(result.gradients.dv, alone[number].dv)) faults[number] = "dv differs";
          if (!same_bits(result.gradients.captures[0], alone[number].captures[0])) faults[number] = "d_t differs";
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::string& fault : faults) EXPECT_EQ(fault, "") << backend;
  }
}

}  // namespace
}  // namespace attnjit::numerics
