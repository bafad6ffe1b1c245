// A loop over independent tasks, on all processors.
#pragma once

#include <cstdint>
#include <functional>

namespace attnjit::tool {

// Calls task(i) once for each 0 <= i < tasks, in any order, some at the same time; returns when all are done. Its
// threads end with it, so a task should take some 0.1 ms or more. What a task throws is thrown here, once all threads
// have ended; tasks that none has begun by then are left out.
void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& task);

}  // namespace attnjit::tool
