// malloc and its kin, counted and passed on: seen by every library of the process, static libstdc++ or not.
#include "allocation_count.h"

#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ATTNJIT_MALLOC_TAKEN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define ATTNJIT_MALLOC_TAKEN 1
#endif
#endif

namespace {
std::atomic<long> count{0};
std::atomic<bool> asked{false};

// Some builds of OpenBLAS allocate in every product.
[[maybe_unused]] void count_for(const void* caller) {
  Dl_info info;
  if (asked && dladdr(caller, &info) != 0 && info.dli_fname && std::strstr(info.dli_fname, "openblas")) return;
  ++count;
}
}  // namespace

namespace attnjit::test {
long allocation_count() {
  asked = true;
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
