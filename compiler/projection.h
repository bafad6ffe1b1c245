// What conditions on several unknowns say together of the intervals that the unknowns are taken from.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace attnjit::compiler {

// A factor per symbol, then a constant.
using Affine = std::vector<std::int64_t>;

// Unknowns between ends that are affine in the symbols, and conditions on them. All numbers are integers.
struct Conditions {
  std::size_t symbols = 0;
  std::vector<std::pair<Affine, Affine>> ends;  // of each unknown, both included
  struct AtLeastZero {
    std::vector<std::int64_t> unknowns;  // factors
    Affine rest;
  };
  std::vector<AtLeastZero> conditions;
  std::vector<Affine> known;  // of the symbols, each at least 0
};

// Necessary for all conditions to hold at one place between the ends, and not implied by what is known and by what each
// condition asks of the ends by itself: each at least 0. Also sufficient, with those, where each condition is on one
// unknown or on the difference of two; else what rational numbers would do is asked for.
struct Projection {
  bool never = false;  // there is no such place, wherever the ends are
  std::vector<Affine> beyond;
};
// Nothing where that would take too long.
std::optional<Projection> project(const Conditions& conditions);

}  // namespace attnjit::compiler
