// Tensors and points for a random expression: ordinary values, and some at the kEdges.
#pragma once

#include <cstring>
#include <limits>
#include <random>

#include "tests/support/expression_text.h"
#include "tests/support/random_expression.h"

namespace attnjit::test {

inline dsl::DType dtype_of(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(dsl::DType::kF32); ++i) {
    if (dsl::dtype_name(static_cast<dsl::DType>(i)) == name) return static_cast<dsl::DType>(i);
  }
  ADD_FAILURE() << "no dtype " << name;
  return dsl::DType::kF32;
}

// Any bit pattern is an element; floats are mostly ordinary numbers.
inline Captures random_captures(std::mt19937_64& random, const RandomExpression& expression) {
  Captures all;
  for (const RandomCapture& capture : expression.captures) {
    Captured tensor{.dtype = dtype_of(capture.dtype)};
    std::int64_t count = 1;
    for (int i = 0; i < capture.rank; ++i) {
      tensor.extent.push_back(1 + static_cast<std::int64_t>(random() % 4));
      count *= tensor.extent.back();
    }
    const std::int64_t size = dsl::dtype_size(tensor.dtype);
    tensor.bytes.resize(static_cast<std::size_t>(count * size));
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint64_t bits = random();
      if (dsl::value_type(tensor.dtype) == dsl::Type::kFloat && random() % 8 != 0) {
        const float ordinary = static_cast<float>(static_cast<double>(random() % 2000) / 250 - 4);
        std::uint32_t word;
        std::memcpy(&word, &ordinary, 4);
        if (tensor.dtype == dsl::DType::kF32) bits = word;
        if (tensor.dtype == dsl::DType::kBF16) bits = word >> 16;
        if (tensor.dtype == dsl::DType::kF16) bits = 0x3000 + random() % 0x1000 + (random() % 2 << 15);
      } else if (dsl::value_type(tensor.dtype) == dsl::Type::kInt && random() % 4 != 0) {
        bits %= 5;
      }
      std::memcpy(tensor.bytes.data() + i * size, &bits, static_cast<std::size_t>(size));
    }
    all.emplace(capture.name, std::move(tensor));
  }
  return all;
}

inline dsl::Point random_point(std::mt19937_64& random) {
  constexpr double kEdges[] = {
      0.0, 1.0, -1.0, 1e10, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
  const double score = random() % 8 == 0 ? kEdges[random() % 6]
                                         : static_cast<double>(static_cast<std::int64_t>(random() % 4000) - 2000) / 256;
  return {.score = score,
          .b = static_cast<std::int64_t>(random() % 3),
          .h = static_cast<std::int64_t>(random() % 5),
          .q_idx = static_cast<std::int64_t>(random() % 20),
          .kv_idx = static_cast<std::int64_t>(random() % 20)};
}

}  // namespace attnjit::test
