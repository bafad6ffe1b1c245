// What is projected out of random conditions, against every place between the ends.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "compiler/projection.h"

namespace attnjit::compiler {
namespace {

std::int64_t value(const Affine& row, const std::vector<std::int64_t>& symbols) {
  std::int64_t sum = row.back();
  for (std::size_t i = 0; i < symbols.size(); ++i) sum += row[i] * symbols[i];
  return sum;
}

// Two unknowns, x and y, between symbols 0 and 1 and symbols 2 and 3; a fifth symbol stands for itself.
constexpr std::size_t kSymbols = 5;
Affine symbol(std::size_t i) {
  Affine row(kSymbols + 1, 0);
  row[i] = 1;
  return row;
}
Conditions between() {
  return {.symbols = kSymbols,
          .ends = {{symbol(0), symbol(1)}, {symbol(2), symbol(3)}},
          .conditions = {},
          .known = {symbol(0), symbol(2)}};
}

bool holds_at(const Conditions& conditions, const std::vector<std::int64_t>& symbols, std::int64_t x, std::int64_t y) {
  return std::ranges::all_of(conditions.conditions, [&](const Conditions::AtLeastZero& condition) {
    return condition.unknowns[0] * x + condition.unknowns[1] * y + value(condition.rest, symbols) >= 0;
  });
}

// Whether each condition by itself can hold between the ends.
bool hold_apart(const Conditions& conditions, const std::vector<std::int64_t>& symbols) {
  return std::ranges::all_of(conditions.conditions, [&](const Conditions::AtLeastZero& condition) {
    const std::int64_t a = condition.unknowns[0], b = condition.unknowns[1];
    return a * symbols[a > 0 ? 1 : 0] + b * symbols[b > 0 ? 3 : 2] + value(condition.rest, symbols) >= 0;
  });
}

struct Judged {
  int empty = 0, told_apart = 0, told = 0;  // tiles without such a place; how many of them are told as such
};

Judged judge(std::mt19937_64& random, int count, bool differences) {
  const auto between_both = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
  };
  Judged judged;
  for (int i = 0; i < count; ++i) {
    Conditions conditions = between();
    for (std::int64_t k = between_both(2, 4); k > 0; --k) {
      std::int64_t a = between_both(-1, 1),
                   b = differences ? (a == 0 ? between_both(-1, 1) : -a * between_both(0, 1)) : between_both(-3, 3);
      if (!differences) a *= between_both(1, 4);
      Conditions::AtLeastZero condition{.unknowns = {a, b}, .rest = Affine(kSymbols + 1, 0)};
      condition.rest.back() = between_both(-9, 9);
      condition.rest[4] = between_both(-1, 1);
      conditions.conditions.push_back(condition);
    }
    const std::optional<Projection> projection = project(conditions);
    EXPECT_TRUE(projection);
    if (!projection) continue;
    for (int k = 0; k < 40; ++k) {
      std::vector<std::int64_t> symbols{between_both(0, 9), 0, between_both(0, 9), 0, between_both(-5, 12)};
      symbols[1] = symbols[0] + between_both(0, 4);
      symbols[3] = symbols[2] + between_both(0, 4);
      bool found = false;
      for (std::int64_t x = symbols[0]; x <= symbols[1]; ++x)
        for (std::int64_t y = symbols[2]; y <= symbols[3]; ++y) found |= holds_at(conditions, symbols, x, y);
      const bool apart = hold_apart(conditions, symbols);
      const bool told = !apart || projection->never || std::ranges::any_of(projection->beyond, [&](const Affine& row) {
        return value(row, symbols) < 0;
      });
      EXPECT_FALSE(found && told);
      judged.empty += found ? 0 : 1;
      judged.told_apart += apart ? 0 : 1;
      judged.told += told ? 1 : 0;
    }
  }
  return judged;
}

TEST(CompilerProjection, IsExactOfDifferences) {
  std::mt19937_64 random(1);
  const Judged judged = judge(random, 1000, true);
  EXPECT_EQ(judged.told, judged.empty);
  EXPECT_GT(judged.told - judged.told_apart, 100);
}

TEST(CompilerProjection, IsNeverWrong) {
  std::mt19937_64 random(2);
  const Judged judged = judge(random, 1000, false);
  EXPECT_GT(judged.told, judged.empty * 9 / 10);
  EXPECT_GT(judged.told, judged.told_apart);
}

// Of what intervals decide nothing is left.
TEST(CompilerProjection, LeavesOutWhatEachSays) {
  const auto conditions = [](const std::vector<std::vector<std::int64_t>>& rows) {
    Conditions made = between();
    for (const std::vector<std::int64_t>& row : rows) {
      Conditions::AtLeastZero condition{.unknowns = {row[0], row[1]}, .rest = Affine(kSymbols + 1, 0)};
      condition.rest.back() = row[2];
      made.conditions.push_back(condition);
    }
    const std::optional<Projection> projection = project(made);
    EXPECT_TRUE(projection);
    return projection.value_or(Projection{});
  };
  const auto window = conditions({{1, -1, 0}, {-1, 1, 5}});
  EXPECT_FALSE(window.never);
  EXPECT_TRUE(window.beyond.empty());
  EXPECT_TRUE(conditions({{1, 0, -3}, {0, 1, -4}}).beyond.empty());
  // 3 <= x and x <= y and y <= 2.
  EXPECT_TRUE(conditions({{1, 0, -3}, {-1, 1, 0}, {0, -1, 2}}).never);
  // x <= 7 - y and y <= x: y is at most 3, which its lower end has to be.
  const auto both = conditions({{-1, -1, 7}, {1, -1, 0}});
  ASSERT_EQ(both.beyond.size(), 1u);
  EXPECT_EQ(both.beyond[0], (Affine{0, 0, -1, 0, 0, 3}));
}

}  // namespace
}  // namespace attnjit::compiler
