// Attention with an ALiBi-like bias and a causal mask, from a program that only knows the installed library.
#include <attnjit/attnjit.hpp>
#include <cmath>
#include <cstdio>
#include <vector>

int main() {
  constexpr std::int64_t kBatch = 1, kHeads = 4, kLength = 256, kHeadDim = 64;
  std::vector<float> q(kBatch * kHeads * kLength * kHeadDim), k(q.size()), v(q.size()), o(q.size());
  for (std::size_t i = 0; i < q.size(); ++i) {
    q[i] = std::sin(0.37f * static_cast<float>(i));
    k[i] = std::cos(0.21f * static_cast<float>(i));
    v[i] = std::sin(0.11f * static_cast<float>(i));
  }
  const std::vector<float> slope = {0.5f, 0.25f, 0.125f, 0.0625f};

  attnjit::Result<attnjit::Context> context = attnjit::Context::create();
  if (!context) return std::fprintf(stderr, "%s\n", context.status().message().c_str()), 1;

  const attnjit::Attention attention = {
      .q = {q.data(), {kBatch, kHeads, kLength, kHeadDim}},
      .k = {k.data(), {kBatch, kHeads, kLength, kHeadDim}},
      .v = {v.data(), {kBatch, kHeads, kLength, kHeadDim}},
      .o = {o.data(), {kBatch, kHeads, kLength, kHeadDim}},
      .score_mod = "score - slope[h] * (q_idx - kv_idx)",
      .mask_mod = "causal",
      .captures = {{"slope", {slope.data(), {kHeads}}}},
  };
  if (const attnjit::Status status = context->forward(attention); !status) {
    return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
  }

  // The oracle's view of the last row.
  const attnjit::Row row = {kBatch - 1, kHeads - 1, kLength - 1};
  std::vector<double> gold(kHeadDim);
  if (const attnjit::Status status = context->reference(attention, {&row, 1}, gold); !status) {
    return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
  }
  double error = 0;
  for (std::size_t d = 0; d < gold.size(); ++d) {
    error = std::fmax(error, std::fabs(gold[d] - static_cast<double>(o[o.size() - gold.size() + d])));
  }
  std::printf("attnjit %s: largest error of the last row %.1e\n", attnjit::version(), error);
  return error < 1e-5 ? 0 : 1;
}
