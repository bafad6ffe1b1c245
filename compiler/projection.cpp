// Fourier-Motzkin elimination and a simplex, both MLIR's Presburger library's.
#include "compiler/projection.h"

#include <algorithm>

#include "mlir/Analysis/Presburger/IntegerRelation.h"
#include "mlir/Analysis/Presburger/Simplex.h"

namespace attnjit::compiler {
namespace {

using llvm::DynamicAPInt;
using mlir::presburger::IntegerPolyhedron;
using mlir::presburger::PresburgerSpace;

// An elimination may square the number of inequalities.
constexpr unsigned kMostInequalities = 64;
constexpr std::int64_t kLargestFactor = std::int64_t{1} << 16;
constexpr std::int64_t kLargestConstant = std::int64_t{1} << 42;

void add(Affine& sum, std::int64_t factor, const Affine& term) {
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += factor * term[i];
}

Affine negated(const Affine& row) {
  Affine result;
  for (const std::int64_t factor : row) result.push_back(-factor);
  return result;
}

// Conditions on symbols, each at least 0.
class Known {
 public:
  explicit Known(std::size_t symbols) : all_(static_cast<unsigned>(symbols)) {}
  void insert(const Affine& row) { all_.addInequality(mlir::presburger::getDynamicAPIntVec(row)); }
  // Whether the others leave room for `row` below 0.
  bool can_fail(const Affine& row) {
    const unsigned snapshot = all_.getSnapshot();
    Affine opposite = negated(row);
    opposite.back() -= 1;
    insert(opposite);
    const bool possible = !all_.isEmpty();
    all_.rollback(snapshot);
    return possible;
  }

 private:
  mlir::presburger::Simplex all_;
};

// Nothing where a number is too large to go on with.
std::optional<Affine> small(llvm::ArrayRef<DynamicAPInt> row) {
  Affine result;
  for (const auto& [i, number] : llvm::enumerate(row)) {
    const std::int64_t largest = i + 1 == row.size() ? kLargestConstant : kLargestFactor;
    if (number > DynamicAPInt(largest) || number < DynamicAPInt(-largest)) return std::nullopt;
    result.push_back(static_cast<std::int64_t>(number));
  }
  return result;
}

}  // namespace

std::optional<Projection> project(const Conditions& conditions) {
  const std::size_t unknowns = conditions.ends.size();
  IntegerPolyhedron all(PresburgerSpace::getSetSpace(static_cast<unsigned>(unknowns + conditions.symbols)));
  const auto insert = [&](std::vector<std::int64_t> row, const Affine& rest) {
    row.insert(row.end(), rest.begin(), rest.end());
    all.addInequality(row);
  };
  // What the symbols are known to fulfil without any two conditions taken together.
  std::vector<Affine> apart = conditions.known;
  for (std::size_t i = 0; i < unknowns; ++i) {
    const auto& [low, high] = conditions.ends[i];
    std::vector<std::int64_t> factors(unknowns, 0);
    factors[i] = 1;
    insert(factors, negated(low));
    factors[i] = -1;
    insert(factors, high);
    apart.push_back(high);
    add(apart.back(), -1, low);
  }
  for (const Conditions::AtLeastZero& condition : conditions.conditions) {
    insert(condition.unknowns, condition.rest);
    apart.push_back(condition.rest);
    for (std::size_t i = 0; i < unknowns; ++i) {
      const std::int64_t factor = condition.unknowns[i];
      add(apart.back(), factor, factor > 0 ? conditions.ends[i].second : conditions.ends[i].first);
    }
  }
  for (std::size_t left = unknowns; left > 0; --left) {
    if (all.getNumInequalities() + all.getNumEqualities() > kMostInequalities) return std::nullopt;
    all.projectOut(0);
  }
  std::vector<Affine> rows;
  for (unsigned i = 0; i < all.getNumInequalities() + 2 * all.getNumEqualities(); ++i) {
    const unsigned beyond = i - std::min(i, all.getNumInequalities());
    const std::optional<Affine> row =
        small(i < all.getNumInequalities() ? all.getInequality(i) : all.getEquality(beyond / 2));
    if (!row) return std::nullopt;
    rows.push_back(beyond % 2 == 0 ? *row : negated(*row));
  }
  if (rows.size() > kMostInequalities) return std::nullopt;

  // What fewer symbols decide first: others follow from it.
  std::ranges::sort(rows, {}, [](const Affine& row) { return std::pair(-std::ranges::count(row, 0), row); });
  Known known(conditions.symbols);
  for (const Affine& row : apart) known.insert(row);
  Projection projection;
  for (const Affine& row : rows) {
    const bool constant = std::all_of(row.begin(), row.end() - 1, [](std::int64_t factor) { return factor == 0; });
    projection.never |= constant && row.back() < 0;
    if (constant || !known.can_fail(row)) continue;
    projection.beyond.push_back(row);
    known.insert(row);
  }
  return projection;
}

}  // namespace attnjit::compiler
