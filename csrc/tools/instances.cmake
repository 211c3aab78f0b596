# cmake -P instances.cmake, in an empty folder: writes every generated kernel source below it, by the
# function that the build uses, and prints their paths, one a line.
cmake_minimum_required(VERSION 3.24)
include("${CMAKE_CURRENT_LIST_DIR}/../cmake/attention.cmake")
varstream_attention_instances(sources)
foreach(source ${sources})
  message(NOTICE "${source}")
endforeach()
