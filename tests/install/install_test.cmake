# Run by CTest: install, check what is visible, build the embedding example by find_package and by pkg-config, run both.
set(prefix ${WORK_DIR}/prefix)
file(REMOVE_RECURSE ${WORK_DIR})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}\nfailed (${result}):\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${prefix})

foreach(file include/attnjit/attnjit.h include/attnjit/attnjit.hpp include/attnjit/expr.hpp include/dlpack/dlpack.h
        ${LIBDIR}/pkgconfig/attnjit.pc)
  if(NOT EXISTS ${prefix}/${file})
    message(FATAL_ERROR "${file} is not installed")
  endif()
endforeach()

# Nothing but the C interface is visible.
run(${NM} --dynamic --defined-only --extern-only --format=posix ${prefix}/${LIBDIR}/libattnjit.so)
string(REGEX MATCHALL "[^\n]+" symbols "${output}")
list(LENGTH symbols count)
list(FILTER symbols EXCLUDE REGEX "^attnjit_")
if(symbols OR count LESS 10)
  message(FATAL_ERROR "${count} visible symbols, beside attnjit_*: ${symbols}")
endif()

# The library to ship needs glibc and nothing else.
if(STATIC_LLVM)
  run(${READELF} --dynamic ${prefix}/${LIBDIR}/libattnjit.so)
  string(REPLACE "[" "<" output "${output}")  # brackets would tie list elements together
  string(REPLACE "]" ">" output "${output}")
  string(REGEX MATCHALL "NEEDED[^\n]*" needed "${output}")
  if(NOT needed)
    message(FATAL_ERROR "no NEEDED entries in:\n${output}")
  endif()
  list(FILTER needed EXCLUDE REGEX "<(libc|libm|libmvec|ld-linux-x86-64)\\.so")
  if(needed)
    message(FATAL_ERROR "libattnjit needs more than glibc: ${needed}")
  endif()
endif()

run(${CMAKE_COMMAND} -S ${SOURCE_DIR} -B ${WORK_DIR}/build -G ${GENERATOR} -DCMAKE_PREFIX_PATH=${prefix}
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=${C_COMPILER} -DCMAKE_CXX_COMPILER=${CXX_COMPILER})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/build)
foreach(program embedding embedding_c)
  run(${WORK_DIR}/build/${program})
  message(STATUS "${program}: ${output}")
endforeach()

# The tool, where it was built, finds its library in the prefix.
if(EXISTS ${prefix}/bin/attnjit)
  run(${prefix}/bin/attnjit explain "score + kv_idx")
endif()

if(PKG_CONFIG)
  set(ENV{PKG_CONFIG_PATH} ${prefix}/${LIBDIR}/pkgconfig)
  run(${PKG_CONFIG} --cflags --libs attnjit)
  string(STRIP "${output}" flags)
  separate_arguments(flags UNIX_COMMAND "${flags}")
  run(${C_COMPILER} ${SOURCE_DIR}/main.c ${flags} -Wl,-rpath,${prefix}/${LIBDIR} -o ${WORK_DIR}/by_pkg_config)
  run(${WORK_DIR}/by_pkg_config)
endif()
