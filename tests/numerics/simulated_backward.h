// A plain attention backward in float32, right or wrong on purpose: what the judge must accept and reject.
#pragma once

#include <string_view>

#include "tests/numerics/gradients.h"

namespace attnjit::numerics {

enum class BackwardFlaw {
  kNone,
  kNoScaleInDq,           // dq lacks the scale
  kNoScaleInDk,           // dk does
  kScoresWithoutScale,    // p is recomputed from q . k
  kNoDelta,               // dm = p * dp
  kDeltaOfOtherRow,       // delta is that of the row above
  kGradLseIgnored,        // delta = dO . O
  kGradLseAdded,          // ... + dlse
  kLseOfOtherRow,         // p is recomputed with the lse of the row above
  kLseInLog2,             // ... with an lse in log2 units
  kUnnormalisedDv,        // dv is summed from exp(m - maximum)
  kMaskOffByOne,          // the mod sees kv_idx + 1
  kWrongHead,             // the mod sees the next head
  kMaskIgnored,           // the mask_mod is not applied
  kNoDerivative,          // ds = dm
  kDerivativeTwice,       // ds = dm * mod' * mod'
  kDerivativeOfOther,     // mod' is that at the negative score: of the branch that is not taken
  kDerivativeOfModified,  // mod' is that at the modified score
  kSwappedKvHead,         // h % hkv instead of h / group
  kOneHeadOfGroup,        // only the group's last head is in dk and dv
  kQueriesOfOtherHead,    // dk is summed with the queries of the group's first head
  kLastKvTileSkipped,     // keys of the last tile are left out
  kLastQTileSkipped,      // queries of the last tile are left out of dk, dv and the captured gradients
  kPaddingCounted,        // queries beyond the last count as the last one
  kHeadDimCut,            // the last feature of dP = dO V^T is left out
  kScoresRounded,         // scores in bfloat16, as eager code keeps them
  kCaptureShifted,        // captured gradients lie one element further
  kOneReadOfTwo,          // of several reads of a captured tensor only the last counts
  kClampedLeftOut,        // reads whose index was clamped have no gradient
  kCaptureInType,         // captured gradients are added up in the captured tensor's type
  kCaptureOfDs,           // captured gradients are those of ds in the place of dm
  kRowShiftSummed,        // gradients of row shifts are sums of dm
  kDroppedNan,            // what a dropped element has in the place of a derivative reaches the sums
  kMaskedRowsCount,       // a fully masked row's probabilities are 1
  kErrorHalfPercent,      // every gradient is 0.5% too large
  kOneElement,            // one element of each gradient is off by 5%
  kDqRowNotWritten,       // one row of dq stays as it was: NaN
  kDkRowNotWritten,       // of dk
  kDvRowNotWritten,       // of dv
  kCaptureNotWritten,     // the last element of each captured gradient
  kNothingWritten,        // zeros
  kRowsExchanged,         // two rows of dq, dk and dv change places
};

// The name of a flaw as it appears in a test's name.
std::string_view flaw_name(BackwardFlaw flaw);

// The backward of `problem`, given the o and lse of `gold`.
Gradients simulate_backward(const Problem& problem, const GoldGradients& gold, BackwardFlaw flaw);

}  // namespace attnjit::numerics
