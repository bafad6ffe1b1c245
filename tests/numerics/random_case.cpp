// Random cases.
#include "tests/numerics/random_case.h"

#include <algorithm>

#include "tests/numerics/expressions.h"

namespace attnjit::numerics {
namespace {

constexpr std::array<std::int64_t, 16> kLengths = {1, 2, 7, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 160, 200, 257};
constexpr std::array<std::int64_t, 26> kHeadDims = {1,  2,  3,  7,  8,  15, 16,  17,  24,  31,  32,  33,  40,
                                                    48, 63, 64, 65, 80, 96, 112, 127, 128, 129, 192, 255, 256};
constexpr std::array<std::array<std::int64_t, 2>, 7> kHeads = {
    {{1, 1}, {2, 2}, {4, 2}, {3, 1}, {6, 3}, {8, 2}, {5, 5}}};

constexpr std::array<Layout, 8> kInputLayouts = {Layout::kPacked,         Layout::kPacked,       Layout::kBshd,
                                                 Layout::kBshd,           Layout::kPadded,       Layout::kPadded,
                                                 Layout::kBroadcastBatch, Layout::kBroadcastHead};
constexpr std::array<Layout, 3> kOutputLayouts = {Layout::kPacked, Layout::kBshd, Layout::kPadded};

}  // namespace

Case random_case(std::uint64_t seed) {
  Random random(seed);
  Case spec;
  spec.seed = seed;
  spec.batch = random.between(1, 3);
  const auto heads = random.pick(kHeads);
  spec.num_heads = heads[0];
  spec.num_heads_kv = heads[1];
  spec.seqlen_q = random.pick(kLengths);
  spec.seqlen_kv = random.between(0, 2) == 0 ? spec.seqlen_q : random.pick(kLengths);
  spec.head_dim = random.pick(kHeadDims);
  spec.head_dim_v = random.between(0, 1) == 0 ? spec.head_dim : random.pick(kHeadDims);
  spec.dtype = random.pick(kDTypes);
  spec.layout_q = random.pick(kInputLayouts);
  spec.layout_k = random.pick(kInputLayouts);
  spec.layout_v = random.between(0, 15) == 0 ? Layout::kBroadcastSeq : random.pick(kInputLayouts);
  spec.layout_o = random.pick(kOutputLayouts);
  constexpr std::array<Inputs, 6> kInputs = {Inputs::kNormal, Inputs::kNormal,   Inputs::kNormal,
                                             Inputs::kLarge,  Inputs::kPositive, Inputs::kZero};
  spec.inputs = random.pick(kInputs);
  if (random.between(0, 3) == 0) spec.scale = static_cast<float>(random.normal());
  spec.threads = static_cast<int>(random.between(1, 2));
  spec.rows = 48;
  return spec;
}

Case served_case(const Case& spec) {
  if (!target().is_partial() || spec.seed % 8 == 0) return spec;
  Case result = spec;
  if (spec.dtype == dsl::DType::kF32) result.dtype = spec.seed % 2 == 0 ? dsl::DType::kBF16 : dsl::DType::kF16;
  for (std::int64_t* const head_dim : {&result.head_dim, &result.head_dim_v}) *head_dim = (*head_dim + 7) / 8 * 8;
  for (Layout* const layout : {&result.layout_q, &result.layout_k, &result.layout_v, &result.layout_o}) {
    const bool served = *layout == Layout::kPacked || *layout == Layout::kBshd;
    if (!served) *layout = Layout::kAligned;
  }
  return result;
}

Case random_case_of(std::int64_t scores, std::uint64_t seed) {
  Case result = random_case(seed);
  const auto count = [&] { return result.batch * result.num_heads * result.seqlen_q * result.seqlen_kv; };
  if (count() > scores) result.batch = 1;
  if (count() > scores) {
    result.num_heads = std::min<std::int64_t>(result.num_heads, 2);
    result.num_heads_kv = seed % 2 == 0 ? 1 : result.num_heads;
  }
  while (count() > scores) {
    std::int64_t& longer = result.seqlen_q > result.seqlen_kv ? result.seqlen_q : result.seqlen_kv;
    longer = (longer + 1) / 2;
  }
  return result;
}

Case with_random_gradients(const Case& spec, std::uint64_t seed) {
  Random random(seed ^ 0x6261636b);
  Case result = with_all_gradients(spec);
  BackwardSpec& backward = result.backward;
  if (random.between(0, 3) == 0) {
    for (bool* const wanted : {&backward.dq, &backward.dk, &backward.dv}) *wanted = random.between(0, 1) == 0;
    std::erase_if(backward.captures, [&](const GradientSpec&) { return random.between(0, 1) == 0; });
    if (!backward.wanted()) backward.dk = true;
  }
  for (GradientSpec& capture : backward.captures) capture.layout = random.pick(kOutputLayouts);
  backward.grad_lse = random.between(0, 1) == 0;
  backward.deterministic = random.between(0, 3) == 0;
  backward.own_forward = random.between(0, 2) == 0;
  backward.layout_grad_out = random.between(0, 7) == 0 ? Layout::kBroadcastSeq : random.pick(kInputLayouts);
  for (Layout* const layout : {&backward.layout_dq, &backward.layout_dk, &backward.layout_dv}) {
    *layout = random.pick(kOutputLayouts);
  }
  return result;
}

}  // namespace attnjit::numerics
