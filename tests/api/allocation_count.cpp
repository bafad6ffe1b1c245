// malloc and its kin, counted and passed on: seen by every library of the process, static libstdc++ or not.
#include "allocation_count.h"

#include <link.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ATTNJIT_MALLOC_TAKEN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define ATTNJIT_MALLOC_TAKEN 1
#endif
#endif

namespace {
std::atomic<long> count{0};
// Where OpenBLAS lies; empty until it was looked for. Some builds of it allocate in every product.
std::atomic<std::uintptr_t> blas_begin{0}, blas_end{0};

int find_blas(dl_phdr_info* info, std::size_t, void*) {
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, "openblas")) return 0;
  std::uintptr_t begin = std::numeric_limits<std::uintptr_t>::max(), end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    begin = std::min<std::uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
    end = std::max<std::uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  blas_begin = begin;
  blas_end = end;
  return 1;
}

[[maybe_unused]] void count_for(const void* caller) {
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  if (address < blas_begin || address >= blas_end) ++count;
}
}  // namespace

namespace attnjit::test {
long allocation_count() {
  dl_iterate_phdr(find_blas, nullptr);
  return count;
}
#ifdef ATTNJIT_MALLOC_TAKEN
bool counts_allocations() { return false; }
#else
bool counts_allocations() { return true; }
#endif
}  // namespace attnjit::test

#ifndef ATTNJIT_MALLOC_TAKEN
extern "C" {
// glibc's own names of what stands behind malloc.
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming)
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t number, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)

__attribute__((visibility("default"))) void* malloc(std::size_t size) {
  count_for(__builtin_return_address(0));
  return __libc_malloc(size);
}
__attribute__((visibility("default"))) void* calloc(std::size_t number, std::size_t size) {
  count_for(__builtin_return_address(0));
  return __libc_calloc(number, size);
}
__attribute__((visibility("default"))) void* realloc(void* memory, std::size_t size) {
  count_for(__builtin_return_address(0));
  return __libc_realloc(memory, size);
}
__attribute__((visibility("default"))) void* aligned_alloc(std::size_t alignment, std::size_t size) {
  count_for(__builtin_return_address(0));
  return __libc_memalign(alignment, size);
}
__attribute__((visibility("default"))) void* memalign(std::size_t alignment, std::size_t size) {
  count_for(__builtin_return_address(0));
  return __libc_memalign(alignment, size);
}
__attribute__((visibility("default"))) int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  count_for(__builtin_return_address(0));
  *memory = __libc_memalign(alignment, size);
  return *memory ? 0 : ENOMEM;
}
}
#endif
