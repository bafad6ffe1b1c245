// Relations between results that need no oracle, and so find what an oracle misses.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>

#include "tests/numerics/execute.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

Outcome run_or_fail(Problem& problem, attnjit_context* context = nullptr, Outputs outputs = Outputs::kAll) {
  RunResult result = run(problem, context, outputs);
  EXPECT_EQ(result.error, "") << to_line(problem.spec);
  return std::move(result.outcome);
}

// The same bits, NaN included.
bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

void expect_same_bits(const Outcome& a, const Outcome& b, const std::string& what) {
  EXPECT_TRUE(same_bits(a.o, b.o)) << what << ": o";
  EXPECT_TRUE(same_bits(a.lse, b.lse)) << what << ": lse";
  EXPECT_TRUE(same_bits(a.row_max, b.row_max)) << what << ": row_max";
}

void expect_close(const std::vector<double>& a, const std::vector<double>& b, double tolerance,
                  const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool same = a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i])) || std::fabs(a[i] - b[i]) <= tolerance;
    ASSERT_TRUE(same) << what << ": element " << i << ": " << a[i] << " and " << b[i];
  }
}

std::string with_backend(const std::string& backend, const std::string& line) { return line + " backend=" + backend; }

// The same result: to the bit, but for the eager path of a GPU, where a BLAS picks its kernels by strides, alignment
// and number of problems.
void expect_same(const Outcome& a, const Outcome& b, const Case& spec, const std::string& what) {
  if (spec.device == "cpu" || spec.backend != "math") return expect_same_bits(a, b, what);
  expect_close(a.o, b.o, spec.dtype == dsl::DType::kF32 ? 1e-4 : 2e-2, what + ": o");
  expect_close(a.lse, b.lse, 1e-3, what + ": lse");
  expect_close(a.row_max, b.row_max, 1e-3, what + ": row_max");
}

// Where no row_max is asked for, a backend may have another way.
constexpr Outputs kWays[] = {Outputs::kAll, Outputs::kNoRowMax};

constexpr const char* kShapes[] = {
    "b=2 hq=4 hkv=2 sq=65 skv=130 d=64 dtype=float32 seed=3",
    "b=2 hq=2 hkv=1 sq=33 skv=70 d=40 dv=24 dtype=bfloat16 seed=4",
    "b=1 hq=3 hkv=3 sq=128 skv=128 d=128 dtype=float16 seed=5",
};

// Two spellings of the same scores.
TEST(NumericsRelation, SpellingsAgreeToTheBit) {
  constexpr std::pair<const char*, const char*> kPairs[] = {
      {"noop", "score + 0"},
      {"noop", "score * 1"},
      {"where(q_idx >= kv_idx, score, -inf)", "where(kv_idx > q_idx, -inf, score)"},
      {"score + q_idx * 2 + h", "h + (2 * q_idx + score)"},
      {"causal", "where(kv_idx <= q_idx, score, -inf)"},
  };
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      for (const auto& [one, other] : kPairs) {
        Problem a = make(with_backend(backend, std::string(shape) + " score_mod=\"" + one + "\""));
        Problem b = make(with_backend(backend, std::string(shape) + " score_mod=\"" + other + "\""));
        for (const Outputs way : kWays) {
          const Outcome first = run_or_fail(a, nullptr, way), second = run_or_fail(b, nullptr, way);
          const std::string what = std::string(one) + " and " + other + " on " + to_line(a.spec);
          if (backend != "math") {
            expect_same_bits(first, second, what);
          } else {
            // Eager runs the operations as they are written.
            expect_close(first.o, second.o, a.spec.dtype == dsl::DType::kF32 ? 1e-4 : 2e-2, what);
          }
        }
      }
    }
  }
}

// A causal score_mod, the mask_mod, and a loop over the rows' own prefixes.
TEST(NumericsRelation, CausalThreeWays) {
  for (const std::string& backend : target().backends) {
    const std::string line = with_backend(backend, "b=2 hq=2 hkv=1 sq=37 skv=40 d=32 dtype=float32");
    Problem by_mod = make(line + " score_mod=\"causal\"");
    Problem by_mask = make(line + " mask_mod=\"causal\"");
    const Outcome a = run_or_fail(by_mod), b = run_or_fail(by_mask);
    expect_same_bits(a, b, std::string("score_mod and mask_mod, ") + backend);

    Problem whole = make(line);
    const std::int64_t features = whole.spec.head_dim_v;
    for (std::int64_t i = 0; i < whole.spec.seqlen_q; ++i) {
      // Row i alone, against keys 0 to i.
      Problem prefix = whole;
      prefix.spec.seqlen_q = 1;
      prefix.spec.seqlen_kv = i + 1;
      const auto cut = [](const Tensor& tensor, std::int64_t first, std::int64_t length) {
        std::vector<std::int64_t> shape = tensor.shape();
        shape[2] = length;
        return tensor.view(shape, tensor.stride(), first * tensor.stride()[2]);
      };
      prefix.q = cut(whole.q, i, 1);
      prefix.k = cut(whole.k, 0, i + 1);
      prefix.v = cut(whole.v, 0, i + 1);
      const Outcome row = run_or_fail(prefix);
      for (std::int64_t bh = 0; bh < whole.spec.batch * whole.spec.num_heads; ++bh) {
        for (std::int64_t d = 0; d < features; ++d) {
          const double expected = row.o[static_cast<std::size_t>(bh * features + d)];
          const double got = a.o[static_cast<std::size_t>((bh * whole.spec.seqlen_q + i) * features + d)];
          ASSERT_NEAR(got, expected, 2e-6) << backend << " row " << i;
        }
        ASSERT_NEAR(a.lse[static_cast<std::size_t>(bh * whole.spec.seqlen_q + i)],
                    row.lse[static_cast<std::size_t>(bh)], 1e-5);
      }
    }
  }
}

// One kv head for a group of query heads is the same as that head repeated, which strides can do as well as copies.
TEST(NumericsRelation, GroupedHeadsAreRepeatedHeads) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      const std::string line = with_backend(
          backend, std::string("b=2 hq=6 sq=33 skv=66 d=48 dv=16 score_mod=\"score + 0.3 * h\" seed=8 dtype=") + dtype);
      Problem grouped = make(line + " hkv=2");
      Problem repeated = make(line + " hkv=6");
      const auto repeat = [&](const Tensor& from, Tensor* to) {
        for_each_index(to->shape(),
                       [&](auto index) { to->set(index, from.at({index[0], index[1] / 3, index[2], index[3]})); });
      };
      repeat(grouped.k, &repeated.k);
      repeat(grouped.v, &repeated.v);
      repeated.q = grouped.q;
      for (const Outputs way : kWays) {
        const Outcome one = run_or_fail(grouped, nullptr, way), other = run_or_fail(repeated, nullptr, way);
        expect_same(one, other, grouped.spec, to_line(grouped.spec));
      }
    }
  }
}

TEST(NumericsRelation, PermutedBatchPermutesTheOutput) {
  for (const std::string& backend : target().backends) {
    const std::string line =
        with_backend(backend,
                     "b=3 hq=2 hkv=1 sq=40 skv=50 d=32 dtype=bfloat16 score_mod=\"score + t[kv_idx]\" "
                     "capture=t:float32:50:packed:normal");
    Problem problem = make(line);
    Problem permuted = make(line);
    const std::int64_t order[] = {2, 0, 1};
    for (const auto& [from, to] :
         {std::pair(&problem.q, &permuted.q), std::pair(&problem.k, &permuted.k), std::pair(&problem.v, &permuted.v)}) {
      for_each_index(to->shape(),
                     [&](auto index) { to->set(index, from->at({order[index[0]], index[1], index[2], index[3]})); });
    }
    const Outcome a = run_or_fail(problem), b = run_or_fail(permuted);
    const std::size_t block = a.o.size() / 3, rows = a.lse.size() / 3;
    for (std::size_t i = 0; i < 3; ++i) {
      const auto from = static_cast<std::size_t>(order[i]);
      EXPECT_TRUE(std::equal(b.o.begin() + static_cast<std::ptrdiff_t>(i * block),
                             b.o.begin() + static_cast<std::ptrdiff_t>((i + 1) * block),
                             a.o.begin() + static_cast<std::ptrdiff_t>(from * block)))
          << backend;
      EXPECT_TRUE(std::equal(b.lse.begin() + static_cast<std::ptrdiff_t>(i * rows),
                             b.lse.begin() + static_cast<std::ptrdiff_t>((i + 1) * rows),
                             a.lse.begin() + static_cast<std::ptrdiff_t>(from * rows)))
          << backend;
    }
  }
}

TEST(NumericsRelation, StridedIsPacked) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16"}) {
      const std::string line = with_backend(
          backend, std::string("b=2 hq=4 hkv=2 sq=45 skv=77 d=33 dv=17 score_mod=\"score + bias[h, q_idx, kv_idx]\" "
                               "capture=bias:float32:4x45x77:packed:normal seed=6 dtype=") +
                       dtype);
      Problem packed = make(line);
      const Outcome expected = run_or_fail(packed);
      for (const Layout layout : {Layout::kBshd, Layout::kPadded}) {
        Problem strided = packed;
        strided.spec.layout_q = strided.spec.layout_k = strided.spec.layout_v = strided.spec.layout_o = layout;
        for (Tensor* const tensor : {&strided.q, &strided.k, &strided.v, &strided.captures[0].tensor}) {
          Tensor other(tensor->dtype(), tensor->shape(), layout, 1);
          for_each_index(tensor->shape(), [&](auto index) { other.set(index, tensor->at(index)); });
          *tensor = other;
        }
        expect_same(expected, run_or_fail(strided), strided.spec, to_line(strided.spec));
      }
    }
  }
}

// Documents side by side in one sequence, under a document mask, are the documents apart.
TEST(NumericsRelation, DocumentsApart) {
  for (const std::string& backend : target().backends) {
    Problem together = make(with_backend(backend,
                                         "b=1 hq=2 hkv=1 sq=100 skv=100 d=32 score_mod=\"document(ids) and causal()\" "
                                         "capture=ids:int32:100:packed:normal"));
    const std::int64_t starts[] = {0, 1, 34, 66, 100};
    for (std::int64_t document = 0; document < 4; ++document) {
      for (std::int64_t i = starts[document]; i < starts[document + 1]; ++i) {
        together.captures[0].tensor.set_int(std::array{i}, document);
      }
    }
    const Outcome whole = run_or_fail(together);
    for (std::int64_t document = 0; document < 4; ++document) {
      const std::int64_t first = starts[document], length = starts[document + 1] - first;
      Problem apart = make(with_backend(backend, "b=1 hq=2 hkv=1 sq=" + std::to_string(length) +
                                                     " skv=" + std::to_string(length) + " d=32 score_mod=\"causal\""));
      for (const auto& [from, to] :
           {std::pair(&together.q, &apart.q), std::pair(&together.k, &apart.k), std::pair(&together.v, &apart.v)}) {
        for_each_index(to->shape(),
                       [&](auto index) { to->set(index, from->at({index[0], index[1], index[2] + first, index[3]})); });
      }
      const Outcome part = run_or_fail(apart);
      for (std::int64_t h = 0; h < 2; ++h) {
        for (std::int64_t i = 0; i < length; ++i) {
          ASSERT_NEAR(whole.lse[static_cast<std::size_t>(h * 100 + first + i)],
                      part.lse[static_cast<std::size_t>(h * length + i)], 1e-5);
          for (std::int64_t d = 0; d < 32; ++d) {
            ASSERT_NEAR(whole.o[static_cast<std::size_t>((h * 100 + first + i) * 32 + d)],
                        part.o[static_cast<std::size_t>((h * length + i) * 32 + d)], 2e-6)
                << backend << " document " << document << " row " << i;
          }
        }
      }
    }
  }
}

// The halves of K and V, merged by their LSE, are the whole.
TEST(NumericsRelation, LseMergesHalves) {
  for (const std::string& backend : target().backends) {
    const std::string line =
        with_backend(backend,
                     "b=1 hq=2 hkv=2 sq=50 d=32 score_mod=\"where(q_idx >= kv_idx + first, score * 1.5, -inf)\" "
                     "capture=first:int32::packed:normal");
    Problem whole = make(line + " skv=48");
    whole.captures[0].tensor.set_int({}, 0);
    const Outcome all = run_or_fail(whole);
    Outcome halves[2];
    for (std::int64_t half = 0; half < 2; ++half) {
      Problem part = make(line + " skv=24");
      part.captures[0].tensor.set_int({}, 24 * half);
      part.q = whole.q;
      for (const auto& [from, to] : {std::pair(&whole.k, &part.k), std::pair(&whole.v, &part.v)}) {
        for_each_index(to->shape(), [&](auto index) {
          to->set(index, from->at({index[0], index[1], index[2] + 24 * half, index[3]}));
        });
      }
      halves[half] = run_or_fail(part);
    }
    for (std::size_t row = 0; row < all.lse.size(); ++row) {
      const double largest = std::max(halves[0].lse[row], halves[1].lse[row]);
      const double w0 = std::exp(halves[0].lse[row] - largest), w1 = std::exp(halves[1].lse[row] - largest);
      ASSERT_NEAR(all.lse[row], largest + std::log(w0 + w1), 1e-5) << backend << " row " << row;
      for (std::size_t d = 0; d < 32; ++d) {
        const double merged = (w0 * halves[0].o[row * 32 + d] + w1 * halves[1].o[row * 32 + d]) / (w0 + w1);
        ASSERT_NEAR(all.o[row * 32 + d], merged, 2e-6) << backend << " row " << row;
      }
    }
  }
}

TEST(NumericsRelation, RunsAndThreadCountsAreBitIdentical) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      for (const char* const mod : {"causal", "softcap(5)", "score + 0.1 * (q_idx - kv_idx)"}) {
        Problem problem = make(with_backend(backend, std::string(shape) + " score_mod=\"" + mod + "\""));
        for (const Outputs way : kWays) {
          const Outcome once = run_or_fail(problem, shared_context(1), way);
          expect_same_bits(once, run_or_fail(problem, shared_context(1), way), "again: " + to_line(problem.spec));
        }
        const Outcome first = run_or_fail(problem, shared_context(1));
        // A BLAS divides its work by the number of threads; the fused kernel's panels are the same for any.
        if (backend == "math") continue;
        expect_same_bits(first, run_or_fail(problem, shared_context(2)), "two threads: " + to_line(problem.spec));
        expect_same_bits(first, run_or_fail(problem, shared_context(3)), "three threads: " + to_line(problem.spec));
      }
    }
  }
}

// Callers at once, each with its own problem and all through one context, get what they get alone.
TEST(NumericsRelation, ConcurrentCallsAreBitIdentical) {
  for (const std::string& backend : target().backends) {
    constexpr int kCallers = 4;
    // A pool's workers go to one call at a time, and eager's products are divided by how many there are.
    attnjit_context* const context = shared_context(backend == "math" ? 1 : 2);
    std::vector<Problem> problems;
    std::vector<Outcome> alone;
    for (int i = 0; i < kCallers; ++i) {
      problems.push_back(make(with_backend(backend, "b=2 hq=2 sq=65 skv=100 d=32 score_mod=\"softcap(" +
                                                        std::to_string(2 + i / 2) + ")\" seed=" + std::to_string(i))));
      alone.push_back(run_or_fail(problems.back(), context));
    }
    std::vector<std::thread> callers;
    callers.reserve(kCallers);
    std::vector<std::string> faults(kCallers);
    for (int i = 0; i < kCallers; ++i) {
      callers.emplace_back([&, i] {
        const auto number = static_cast<std::size_t>(i);
        for (int repeat = 0; repeat < 10; ++repeat) {
          const RunResult result = run(problems[number], context);
          if (!result.error.empty()) faults[number] = result.error;
          if (!same_bits(result.outcome.o, alone[number].o)) faults[number] = "o differs";
          if (!same_bits(result.outcome.lse, alone[number].lse)) faults[number] = "lse differs";
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const std::string& fault : faults) EXPECT_EQ(fault, "") << backend;
  }
}

// One plan serves any values: nothing of the first call's data, captured values or scale stays in it.
TEST(NumericsRelation, OnePlanServesNewValues) {
  for (const std::string& backend : target().backends) {
    const std::string line =
        with_backend(backend,
                     "b=1 hq=2 hkv=1 sq=40 skv=70 d=32 score_mod=\"score * t + bias[h, kv_idx]\" "
                     "mask_mod=\"kv_idx < lengths[b] + 20\" capture=t:float32::packed:normal "
                     "capture=bias:bfloat16:2x70:packed:normal capture=lengths:int32:1:packed:normal");
    Problem first = make(line + " seed=1 scale=0.2"), second = make(line + " seed=2 scale=0.3");
    first.captures[2].tensor.set_int(std::array<std::int64_t, 1>{0}, 3);
    second.captures[2].tensor.set_int(std::array<std::int64_t, 1>{0}, 30);
    const Outcome expected_first = run_or_fail(first), expected_second = run_or_fail(second);
    EXPECT_FALSE(same_bits(expected_first.o, expected_second.o));
    const auto results = run_with_one_plan({&first, &second, &first});
    ASSERT_EQ(results.size(), 3u) << results.front().error;
    for (const RunResult& result : results) ASSERT_EQ(result.error, "");
    expect_same_bits(results[0].outcome, expected_first, backend);
    expect_same_bits(results[1].outcome, expected_second, backend);
    expect_same_bits(results[2].outcome, expected_first, backend);
  }
}

TEST(NumericsRelation, OutputsNotAskedForChangeNothing) {
  for (const std::string& backend : target().backends) {
    for (const char* const shape : kShapes) {
      Problem problem = make(with_backend(backend, std::string(shape) + " score_mod=\"causal\""));
      const Outcome all = run_or_fail(problem);
      const RunResult only = run(problem, nullptr, Outputs::kOnlyO);
      EXPECT_EQ(only.error, "");
      // sm90 sums otherwise where no row_max is asked for.
      if (problem.spec.backend == "sm90" || problem.spec.backend == "auto") {
        expect_close(all.o, only.outcome.o, 5e-2, to_line(problem.spec));
      } else {
        EXPECT_TRUE(same_bits(all.o, only.outcome.o)) << to_line(problem.spec);
      }
    }
  }
}

// A scale given outright is the default one when it has its value, and multiplies the score before the mod.
TEST(NumericsRelation, ScaleIsAppliedBeforeTheMod) {
  for (const std::string& backend : target().backends) {
    const std::string line = with_backend(backend, "b=1 hq=2 sq=20 skv=40 d=64 score_mod=\"tanh(score)\"");
    Problem by_default = make(line), given = make(line + " scale=0.125"), doubled = make(line + " scale=0.25");
    expect_same_bits(run_or_fail(by_default), run_or_fail(given), backend);
    Problem in_mod = make(with_backend(backend, "b=1 hq=2 sq=20 skv=40 d=64 score_mod=\"tanh(2 * score)\""));
    expect_close(run_or_fail(doubled).o, run_or_fail(in_mod).o, 2e-6, backend);
  }
}

}  // namespace
}  // namespace attnjit::numerics
