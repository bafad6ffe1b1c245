// What the compiler makes of a problem, for people.
#pragma once

#include <string>

#include "attnjit/attnjit.h"
#include "runtime/context.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// The JSON of attnjit_explain. `options` may be null.
Result<std::string> explain(Context& context, const attnjit_attention* attention,
                            const attnjit_explain_options* options);

}  // namespace attnjit::runtime
