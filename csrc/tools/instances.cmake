# cmake -P instances.cmake, in an empty folder: writes every generated kernel source below it, by the
# functions that the build uses, and prints their paths, one a line.
cmake_minimum_required(VERSION 3.24)
foreach(topic attention cross_entropy)
  include("${CMAKE_CURRENT_LIST_DIR}/../cmake/${topic}.cmake")
  cmake_language(CALL varstream_${topic}_instances sources)
  foreach(source ${sources})
    message(NOTICE "${source}")
  endforeach()
endforeach()
