// A plain flash-attention forward in float32, right or wrong on purpose: what the judge must accept and reject.
#pragma once

#include <string_view>

#include "tests/numerics/judge.h"

namespace attnjit::numerics {

enum class Flaw {
  kNone,
  kScaleDropped,      // scores are q . k
  kScaleTwice,        // ... times scale twice
  kMaskOffByOne,      // the mod sees kv_idx + 1
  kQueryOffByOne,     // the mod sees q_idx + 1
  kWrongHead,         // the mod sees the next head
  kWrongBatch,        // the mod sees the next batch
  kIndicesSwapped,    // the mod sees q_idx and kv_idx exchanged
  kSwappedKvHead,     // h % hkv instead of h / group
  kLastTileSkipped,   // the last kv tile is left out
  kPaddingScored,     // columns past the end of the last tile count, with score 0 and value 0
  kErrorHalfPercent,  // o is 0.5% too large
  kOneElement,        // one element of o is off by 5%
  kNoRescale,         // o is not rescaled when the running maximum moves
  kNoSumRescale,      // the running sum is not
  kRowsExchanged,     // two neighbouring rows of o change places
  kHeadDimCut,        // the last feature of q . k is left out
  kScoresRounded,     // scores in bfloat16, as eager code keeps them
  kLseInLog2,         // lse in log2 units
  kLseWithoutMax,     // lse lacks the maximum
  kRowMaxOfScores,    // row_max taken before the mod
  kNanSwallowed,      // NaN scores count as dropped
  kDroppedNan,        // NaN and infinity at dropped positions reach the row
  kMaskedRowNan,      // a fully masked row gives 0 / 0
  kMaskedLseZero,     // a fully masked row's lse is 0
  kMaskIgnored,       // the mask_mod is not applied
  kRowNotWritten,     // a row of o that no sampled row is stays as it was: NaN
  kLseNotWritten,     // its lse does
  kReferenceFrozen,   // the exponentials' reference stays at the first tile's maximum, whatever comes
  kFrozenSaturated,   // the same, and P stops at its type's largest value
  kDroppedMaximum,    // the maximum is of dropped elements, too
  kMaskedTileNan,     // a wholly masked tile before any kept element gives -inf less -inf
};

// The name of a flaw as it appears in a test's name.
std::string_view flaw_name(Flaw flaw);

Outcome simulate(const Problem& problem, Flaw flaw);

}  // namespace attnjit::numerics
