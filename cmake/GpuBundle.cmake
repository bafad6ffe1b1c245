# The target gpu_bundle: library, tool, tests and benchmarks as one folder and one archive below the build folder, to be
# carried to a machine with a GPU. It runs on any x86-64 Linux with glibc from 2.36, a CUDA driver, libnvrtc and
# libcublas; tests/run_gpu.sh is the way in.
set(ATTNJIT_BUNDLE_PROGRAMS attnjit_tool attnjit_numerics attnjit_gpu_test attnjit_api_test
  attnjit_call_overhead)
if(TARGET attnjit_example_cuda_graph)
  list(APPEND ATTNJIT_BUNDLE_PROGRAMS attnjit_example_cuda_graph)
endif()
set(bundle COMPONENT gpu_bundle EXCLUDE_FROM_ALL)

install(TARGETS attnjit LIBRARY DESTINATION lib ${bundle})
foreach(program ${ATTNJIT_BUNDLE_PROGRAMS})
  if(NOT program STREQUAL attnjit_tool)  # has one that fits
    set_target_properties(${program} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib")
  endif()
  # The runtime path serves what the libraries need as well, not only what the programs do.
  target_link_options(${program} PRIVATE LINKER:--disable-new-dtags)
  install(TARGETS ${program} RUNTIME_DEPENDENCY_SET gpu_bundle_dependencies RUNTIME DESTINATION bin ${bundle})
endforeach()
# libstdc++ and what Debian has as a shared library only travel along; glibc is the machine's own.
install(RUNTIME_DEPENDENCY_SET gpu_bundle_dependencies
  PRE_EXCLUDE_REGEXES "^(libc|libm|libmvec|libdl|libpthread|librt|ld-linux-x86-64)\\.so" "^libattnjit\\.so"
  LIBRARY DESTINATION lib ${bundle})
install(PROGRAMS tests/run_gpu.sh DESTINATION . ${bundle})
install(PROGRAMS bench/peers.py DESTINATION python ${bundle})
install(FILES bench/attnjit_ctypes.py tests/gpu/binary_cache.py tests/gpu/repeat_runs.py tests/python/ctypes_test.py
  DESTINATION python ${bundle})

set(folder ${PROJECT_BINARY_DIR}/gpu_bundle/attnjit-gpu)
set(cache ${PROJECT_BINARY_DIR}/gpu_cache)
set(ATTNJIT_GPU_CACHE_ARCH "sm_90" CACHE STRING "Architecture whose binaries the target gpu_cache builds")
# What the numerics suite runs on that architecture, compiled beforehand; a bundle made afterwards takes it along.
set(warm ${PROJECT_SOURCE_DIR}/tests/warm_cache.sh $<TARGET_FILE:attnjit_numerics> ${ATTNJIT_GPU_CACHE_ARCH} ${cache})
set(warm_sm90 ${CMAKE_COMMAND} -E true)
set(warm_few ${CMAKE_COMMAND} -E true)
if(ATTNJIT_GPU_CACHE_ARCH STREQUAL sm_90)
  set(warm_sm90 ${warm} --backend sm90)
  set(warm_few ${CMAKE_COMMAND} -E env ATTNJIT_CUDA_MAX_SMS=5 ${warm_sm90})
endif()
add_custom_target(gpu_cache
  COMMAND ${warm}
  COMMAND ${warm_sm90}
  COMMAND ${warm_few}
  DEPENDS attnjit_numerics
  USES_TERMINAL
  VERBATIM)
add_custom_target(gpu_bundle
  COMMAND ${CMAKE_COMMAND} -E rm -rf ${folder}
  COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --component gpu_bundle --strip --prefix ${folder}
  COMMAND sh -c "test ! -d '${cache}' || cp -r '${cache}' '${folder}/cache'"
  COMMAND ${CMAKE_COMMAND} -E chdir ${folder}/.. ${CMAKE_COMMAND} -E tar czf attnjit-gpu.tar.gz attnjit-gpu
  DEPENDS attnjit ${ATTNJIT_BUNDLE_PROGRAMS}
  COMMENT "Collecting the GPU bundle"
  VERBATIM)
