// The Python module varstream._C: importing it registers the operators (library.cpp). pybind11
// binds only what takes no tensor.
#include <pybind11/pybind11.h>

#include "build_config.h"
#include "torch/cuda_shim.h"
#include "varlen/row_copy_launch.h"

namespace py = pybind11;

namespace {

// Names of the CUDA kernels compiled into this module.
py::list kernels() {
  py::list names;
#if VARSTREAM_WITH_CUDA
  for (const char* name : varstream::varlen::kRowCopyKernels) names.append(name);
#endif
  return names;
}

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
  info["kernels"] = kernels();
  return info;
}

// Whether each CUDA symbol of torch's stable ABI is found in the torch that is loaded.
py::dict cuda_symbols() {
  py::dict found;
  for (const char* name : varstream::shim::kCudaSymbols) {
    found[name] = varstream::shim::cuda_symbol(name) != nullptr;
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "varstream's compiled part. Import varstream instead.";
  m.def("build_info", &build_info, "What this build was made of.");
  m.def("cuda_symbols",
        &cuda_symbols,
        "Whether each CUDA symbol of torch's stable ABI that kernels use can be resolved.");
}
