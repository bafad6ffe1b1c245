// What a report says of the machine, and how much of it there is.
#pragma once

#include <cstdint>
#include <string>

namespace attnjit::tool {

std::string cpu_model();                 // as the kernel names it; "unknown processor" where it does not
int available_processors();              // that this process may run on
std::uint64_t available_memory_bytes();  // free or reclaimable; UINT64_MAX where unknown

}  // namespace attnjit::tool
