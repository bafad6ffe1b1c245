// Random shapes, types and layouts.
#pragma once

#include <array>
#include <cstdint>

#include "tests/numerics/case.h"

namespace attnjit::numerics {

inline constexpr std::array<dsl::DType, 3> kDTypes = {dsl::DType::kF32, dsl::DType::kBF16, dsl::DType::kF16};

// The same for the same seed on every platform.
Case random_case(std::uint64_t seed);

// `spec` or, of a partial backend's target, what is nearest to it and served; one in eight stays.
Case served_case(const Case& spec);

// The same with at most so many scores: a backward has no rows that could be left out of a sample.
Case random_case_of(std::int64_t scores, std::uint64_t seed);

// `spec` with its gradients, usually all, and how they are asked for.
Case with_random_gradients(const Case& spec, std::uint64_t seed);

}  // namespace attnjit::numerics
