// Counts what the whole process allocates, the library and its threads included.
#pragma once

namespace attnjit::test {

// False where a sanitizer owns malloc: counts stay 0 then.
bool counts_allocations();
// Allocations since the program started. Those of OpenBLAS, which are not ours, are left out once a call found it
// loaded.
long allocation_count();

}  // namespace attnjit::test
