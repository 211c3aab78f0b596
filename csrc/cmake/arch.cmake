# Decides whether CUDA kernels are built, and for which architectures.
#
# Sets VARSTREAM_WITH_CUDA (0 or 1), VARSTREAM_CUDA_REASON (one line for people) and, when kernels
# are built, CMAKE_CUDA_ARCHITECTURES; enables the CUDA language.

# A define wins over the environment, the environment over the default. Only defines are cached:
# what the environment said at one configure is forgotten at the next.
macro(varstream_option name default)
  if(NOT DEFINED CACHE{${name}})
    set(${name} "$ENV{${name}}")
    if("${${name}}" STREQUAL "")
      set(${name} "${default}")
    endif()
  endif()
endmacro()

varstream_option(VARSTREAM_CUDA AUTO)
varstream_option(VARSTREAM_CUDA_ARCHS "80-real;90")
varstream_option(VARSTREAM_NVCC "$ENV{CUDACXX}")
set(oldest_cuda 12.8)

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
  if(VARSTREAM_NVCC)
    set(nvcc "${VARSTREAM_NVCC}")
  else()
    find_program(
      nvcc nvcc
      HINTS ENV CUDA_HOME ENV CUDA_PATH
      PATHS /usr/local/cuda
      PATH_SUFFIXES bin
      NO_CACHE)
  endif()
  if(NOT nvcc OR NOT EXISTS "${nvcc}")
    set(nvcc_problem "no nvcc found")
  else()
    execute_process(
      COMMAND "${nvcc}" --version
      OUTPUT_VARIABLE nvcc_answer
      RESULT_VARIABLE nvcc_status
      ERROR_QUIET)
    if(NOT nvcc_status EQUAL 0 OR NOT nvcc_answer MATCHES "release ([0-9]+\\.[0-9]+)")
      set(nvcc_problem "${nvcc} --version tells no version")
    elseif(CMAKE_MATCH_1 VERSION_LESS oldest_cuda)
      set(nvcc_problem "${nvcc} is of CUDA ${CMAKE_MATCH_1}, older than ${oldest_cuda}")
    else()
      set(VARSTREAM_WITH_CUDA 1)
    endif()
  endif()
endif()

if(VARSTREAM_WITH_CUDA)
  set(CMAKE_CUDA_COMPILER "${nvcc}")
  set(CMAKE_CUDA_ARCHITECTURES "${cuda_archs}")
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
        "VARSTREAM_CUDA=ON, but ${nvcc_problem}. Install the CUDA toolkit (${oldest_cuda} or "
        "newer), put nvcc on PATH or set CUDA_HOME, or build without kernels: VARSTREAM_CUDA=OFF")
  endif()
  set(VARSTREAM_NVCC_VERSION "")
  set(VARSTREAM_BUILT_ARCHS "")
  set(VARSTREAM_CUDA_REASON "${nvcc_problem}")
  message(STATUS "varstream: CPU only (${nvcc_problem}); no CUDA kernel is built")
endif()
