# Decides whether CUDA kernels are built, and for which architectures.
#
# Sets VARSTREAM_WITH_CUDA (0 or 1), VARSTREAM_CUDA_REASON (one line for people) and, when kernels
# are built, CMAKE_CUDA_ARCHITECTURES; enables the CUDA language.
include(CheckLanguage)

# A cached define wins over the environment, the environment over the default.
function(varstream_option name default help)
  if(DEFINED ENV{${name}} AND NOT "$ENV{${name}}" STREQUAL "")
    set(default "$ENV{${name}}")
  endif()
  set(${name} "${default}" CACHE STRING "${help}")
endfunction()

varstream_option(VARSTREAM_CUDA AUTO "CUDA kernels: AUTO, ON or OFF")
varstream_option(VARSTREAM_CUDA_ARCHS "80-real;90a-real;90-virtual" "CUDA architectures")

string(TOUPPER "${VARSTREAM_CUDA}" cuda_mode)
if(NOT cuda_mode MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "VARSTREAM_CUDA must be AUTO, ON or OFF, got ${VARSTREAM_CUDA}")
endif()

# Spellings people use become CMake's: sm_80 -> 80-real, compute_90 -> 90-virtual.
string(REGEX REPLACE "[, ]+" ";" cuda_archs "${VARSTREAM_CUDA_ARCHS}")
list(TRANSFORM cuda_archs REPLACE "^sm_([0-9]+[af]?)$" "\\1-real")
list(TRANSFORM cuda_archs REPLACE "^compute_([0-9]+[af]?)$" "\\1-virtual")

set(VARSTREAM_WITH_CUDA 0)
set(nvcc_problem "")
if(cuda_mode STREQUAL "OFF")
  set(nvcc_problem "VARSTREAM_CUDA=OFF")
else()
  # VARSTREAM_NVCC names a compiler outright; otherwise CUDACXX, the toolkit's variables and PATH.
  if(DEFINED ENV{CUDACXX} AND NOT DEFINED VARSTREAM_NVCC)
    set(VARSTREAM_NVCC "$ENV{CUDACXX}" CACHE FILEPATH "nvcc")
  endif()
  find_program(
    VARSTREAM_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(NOT VARSTREAM_NVCC OR NOT EXISTS "${VARSTREAM_NVCC}")
    set(nvcc_problem "no nvcc found")
  else()
    set(CMAKE_CUDA_COMPILER "${VARSTREAM_NVCC}")
    set(CMAKE_CUDA_ARCHITECTURES "${cuda_archs}")
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(VARSTREAM_WITH_CUDA 1)
    else()
      set(nvcc_problem "${VARSTREAM_NVCC} does not compile here")
    endif()
  endif()
endif()

if(VARSTREAM_WITH_CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  set(VARSTREAM_NVCC_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
  string(REPLACE ";" " " VARSTREAM_BUILT_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
  set(VARSTREAM_CUDA_REASON "built with nvcc ${VARSTREAM_NVCC_VERSION}")
  message(STATUS "varstream: CUDA kernels for ${VARSTREAM_BUILT_ARCHS}, nvcc "
                 "${VARSTREAM_NVCC_VERSION}")
else()
  if(cuda_mode STREQUAL "ON")
    message(
      FATAL_ERROR
        "VARSTREAM_CUDA=ON, but ${nvcc_problem}. Install the CUDA toolkit (12.8 or newer), put nvcc "
        "on PATH or set CUDA_HOME, or build without kernels: VARSTREAM_CUDA=OFF")
  endif()
  set(VARSTREAM_NVCC_VERSION "")
  set(VARSTREAM_BUILT_ARCHS "")
  set(VARSTREAM_CUDA_REASON "${nvcc_problem}")
  message(STATUS "varstream: CPU only (${nvcc_problem}); no CUDA kernel is built")
endif()
