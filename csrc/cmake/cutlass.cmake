# Looks for CUTLASS's headers in the pinned PyPI package nvidia-cutlass (third_party/README.md).
#
# Nothing is vendored or downloaded. Kernels that fuse a GEMM link varstream::cutlass; no kernel of
# this version does, so a missing package is only reported.
execute_process(
  COMMAND
    "${Python_EXECUTABLE}" -c
    "import importlib.util as u; s = u.find_spec('cutlass_library'); \
print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE cutlass_package
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)

set(VARSTREAM_CUTLASS_VERSION "")
set(cutlass_include "${cutlass_package}/source/include")
if(cutlass_package AND EXISTS "${cutlass_include}/cutlass/version.h")
  set(parts "")
  file(READ "${cutlass_include}/cutlass/version.h" version_header)
  foreach(part MAJOR MINOR PATCH)
    string(REGEX MATCH "CUTLASS_${part} ([0-9]+)" _ "${version_header}")
    list(APPEND parts "${CMAKE_MATCH_1}")
  endforeach()
  list(JOIN parts "." VARSTREAM_CUTLASS_VERSION)
  add_library(varstream_cutlass INTERFACE)
  add_library(varstream::cutlass ALIAS varstream_cutlass)
  target_include_directories(varstream_cutlass SYSTEM INTERFACE "${cutlass_include}")
  message(STATUS "varstream: CUTLASS ${VARSTREAM_CUTLASS_VERSION} headers in ${cutlass_include}")
else()
  message(STATUS "varstream: no CUTLASS headers (pip install --no-deps -r "
                 "requirements-cutlass.txt); no kernel of this version needs them")
endif()
