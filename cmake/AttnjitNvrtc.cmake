# Finds NVRTC for the tests that compile kernels; the build itself needs none. Where no toolkit is installed, its wheel is
# unpacked into the build folder. Sets ATTNJIT_NVRTC, empty where there is none.
set(ATTNJIT_NVRTC "" CACHE FILEPATH "NVRTC of the tests; looked for where empty")
set(ATTNJIT_NVRTC_WHEEL "nvidia-cuda-nvrtc==13.0.*" CACHE STRING "Wheel that brings NVRTC where no toolkit does")

set(nvrtc_directory ${PROJECT_BINARY_DIR}/nvrtc)
set(nvrtc_places
  /usr/local/cuda/lib64/libnvrtc.so.13 /usr/local/cuda/lib64/libnvrtc.so.12
  ${nvrtc_directory}/nvidia/cu13/lib/libnvrtc.so.13)
function(attnjit_find_nvrtc)
  foreach(place ${nvrtc_places})
    if(NOT ATTNJIT_NVRTC AND EXISTS ${place})
      set_property(CACHE ATTNJIT_NVRTC PROPERTY VALUE ${place})
    endif()
  endforeach()
endfunction()

if(ATTNJIT_NVRTC AND NOT EXISTS ${ATTNJIT_NVRTC})
  set_property(CACHE ATTNJIT_NVRTC PROPERTY VALUE "")
endif()
attnjit_find_nvrtc()
if(NOT ATTNJIT_NVRTC)
  message(STATUS "No NVRTC: unpacking ${ATTNJIT_NVRTC_WHEEL} into ${nvrtc_directory}")
  file(MAKE_DIRECTORY ${nvrtc_directory})
  # Nothing is installed: a download, unpacked like the archive that it is.
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -m pip download --quiet --no-deps --disable-pip-version-check
      --dest ${nvrtc_directory} ${ATTNJIT_NVRTC_WHEEL}
    RESULT_VARIABLE failed ERROR_VARIABLE why OUTPUT_QUIET)
  file(GLOB wheel ${nvrtc_directory}/nvidia_cuda_nvrtc*.whl)
  if(failed OR NOT wheel)
    message(WARNING "No NVRTC: the tests that compile kernels will be skipped. ${why}")
  else()
    list(GET wheel 0 wheel)
    file(ARCHIVE_EXTRACT INPUT ${wheel} DESTINATION ${nvrtc_directory})
    file(REMOVE ${wheel})
    attnjit_find_nvrtc()
  endif()
endif()
