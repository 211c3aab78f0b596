// The Python module varstream._C: importing it registers the operators (library.cpp). pybind11
// binds only what takes no tensor.
#include <pybind11/pybind11.h>

#include "build_config.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = VARSTREAM_VERSION;
  info["cuda"] = bool(VARSTREAM_WITH_CUDA);
  info["cuda_reason"] = VARSTREAM_CUDA_REASON;
  info["nvcc"] = VARSTREAM_NVCC_VERSION;
  info["cuda_archs"] = VARSTREAM_CUDA_ARCHS;
  info["cutlass"] = VARSTREAM_CUTLASS_VERSION;
  info["torch"] = VARSTREAM_TORCH_VERSION;
  info["compiler"] = VARSTREAM_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "varstream's compiled part. Import varstream instead.";
  m.def("build_info", &build_info, "What this build was made of.");
}
