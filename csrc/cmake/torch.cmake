# Target varstream::torch: torch's stable-ABI headers and the one library they need.
#
# Paths are asked from the building Python; torch itself is not imported (seconds) and its CMake
# package is not used (it demands CUDA parts that a kernel build has no use for).
execute_process(
  COMMAND
    "${Python_EXECUTABLE}" -c
    "import importlib.metadata as m, importlib.util as u; s = u.find_spec('torch'); \
print(s.submodule_search_locations[0] if s else '', m.version('torch') if s else '', sep=';')"
  OUTPUT_VARIABLE torch_answer
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE torch_status)
list(POP_FRONT torch_answer torch_root torch_version)
if(NOT torch_status EQUAL 0 OR NOT EXISTS "${torch_root}/include/torch/csrc/stable/library.h")
  message(
    FATAL_ERROR
      "varstream builds against an installed torch >= 2.11, and ${Python_EXECUTABLE} has none. "
      "Install torch first, then: pip install --no-build-isolation .")
endif()
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "varstream needs torch >= 2.11, found ${torch_version} in ${torch_root}")
endif()
message(STATUS "varstream: torch ${torch_version} in ${torch_root}")

set(VARSTREAM_TORCH_VERSION "${torch_version}")
add_library(varstream_torch INTERFACE)
add_library(varstream::torch ALIAS varstream_torch)
target_include_directories(varstream_torch SYSTEM INTERFACE "${torch_root}/include")
# 2.11: one build serves that release and every later one, and any header outside the stable ABI
# becomes a compile error.
target_compile_definitions(varstream_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_libraries(varstream_torch INTERFACE "${torch_root}/lib/libtorch_cpu.so")
