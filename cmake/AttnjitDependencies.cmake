# Finds every package the build needs.

set(ATTNJIT_LLVM_ROOT "/usr/lib/llvm-22" CACHE PATH "Prefix of the LLVM and MLIR 22.1 installation")
list(APPEND CMAKE_PREFIX_PATH ${ATTNJIT_LLVM_ROOT})

find_package(MLIR 22.1 REQUIRED CONFIG)
find_package(Threads REQUIRED)
find_package(spdlog REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_path(ATTNJIT_DLPACK_INCLUDE_DIR dlpack/dlpack.h REQUIRED)
find_path(ATTNJIT_XXHASH_INCLUDE_DIR xxhash.h REQUIRED)

list(APPEND CMAKE_MODULE_PATH "${MLIR_CMAKE_DIR}" "${LLVM_CMAKE_DIR}")
include(TableGen)
include(AddLLVM)
include(AddMLIR)

# The CPU template is compiled to LLVM bitcode; reader and writer must be the same LLVM.
find_program(ATTNJIT_CLANGXX clang++-22 HINTS ${ATTNJIT_LLVM_ROOT}/bin REQUIRED)

if(ATTNJIT_BUILD_TESTS)
  find_package(GTest REQUIRED)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  find_program(ATTNJIT_FILECHECK FileCheck-22 HINTS ${ATTNJIT_LLVM_ROOT}/bin REQUIRED)
  find_program(ATTNJIT_LIT NAMES lit-22 llvm-lit-22 lit HINTS ${ATTNJIT_LLVM_ROOT}/bin ${ATTNJIT_LLVM_ROOT}/build/utils/lit REQUIRED)
  if(NOT ATTNJIT_SANITIZE MATCHES "thread" AND NOT ATTNJIT_FUZZ)
    include(cmake/AttnjitNvrtc.cmake)
  endif()
endif()
