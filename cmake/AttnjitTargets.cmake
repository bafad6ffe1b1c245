# Target helpers shared by every directory.

add_library(attnjit_options INTERFACE)
target_compile_options(attnjit_options INTERFACE
  -Wall -Wextra -Wno-unused-parameter
  # A designated initialiser names what differs from the defaults.
  -Wno-missing-field-initializers
  # g++ 12 sees overlaps in std::string's + and overruns in std::sort of short arrays that are not there; the pragmas are
  # clang's.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict;-Wno-array-bounds;-Wno-unknown-pragmas>
  $<$<BOOL:${ATTNJIT_WARNINGS_AS_ERRORS}>:-Werror>)
if(ATTNJIT_SANITIZE)
  target_compile_options(attnjit_options INTERFACE -fsanitize=${ATTNJIT_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    # It reads the bytes in front of a function that is called by pointer; those of compiled mods may be unmapped.
    target_compile_options(attnjit_options INTERFACE -fno-sanitize=function)
  endif()
  target_link_options(attnjit_options INTERFACE -fsanitize=${ATTNJIT_SANITIZE})
endif()
if(ATTNJIT_FUZZ)
  target_compile_options(attnjit_options INTERFACE -fsanitize=fuzzer-no-link)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  # Debian's /usr/bin/ld.lld is older than the archives.
  target_link_options(attnjit_options INTERFACE --ld-path=${ATTNJIT_LLVM_ROOT}/bin/ld.lld)
endif()

# An object library of one layer. Layers are joined in the attnjit library and in the unit tests.
function(attnjit_add_layer name)
  add_library(${name} OBJECT ${ARGN})
  target_link_libraries(${name} PUBLIC attnjit_options)
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
endfunction()

# LLVM and MLIR as a dependency of the compiler layer.
add_library(attnjit_llvm INTERFACE)
target_include_directories(attnjit_llvm SYSTEM INTERFACE ${LLVM_INCLUDE_DIRS} ${MLIR_INCLUDE_DIRS})
separate_arguments(ATTNJIT_LLVM_DEFINITIONS NATIVE_COMMAND "${LLVM_DEFINITIONS}")
target_compile_definitions(attnjit_llvm INTERFACE ${ATTNJIT_LLVM_DEFINITIONS})
