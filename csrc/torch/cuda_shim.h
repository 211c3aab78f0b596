// Ring 4. The one symbol of libtorch_cuda that varstream needs, looked up when first used.
//
// It is not linked, so a module full of CUDA kernels still imports where torch is CPU-only.
#pragma once

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace varstream::shim {

inline constexpr const char* kCurrentStream = "aoti_torch_get_current_cuda_stream";

// Every symbol that is looked up at run time; varstream._C.cuda_symbols() reports on them.
inline constexpr std::array<const char*, 1> kCudaSymbols = {kCurrentStream};

// The address of a stable-ABI symbol in the libtorch_cuda that torch has loaded, else null.
inline void* cuda_symbol(const char* name) {
  // RTLD_NOLOAD: never brings a second library in, only finds the one torch uses.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr) {
    void* symbol = dlsym(library, name);
    dlclose(library);  // drops our reference; torch keeps its own
    if (symbol != nullptr) return symbol;
  }
  return dlsym(RTLD_DEFAULT, name);
}

// torch's current stream of a CUDA device, as a cudaStream_t.
inline void* current_cuda_stream(int32_t device_index) {
  using Function = int32_t (*)(int32_t device_index, void** stream);
  static const auto function = reinterpret_cast<Function>(cuda_symbol(kCurrentStream));
  if (function == nullptr) {
    throw std::runtime_error(std::string("varstream: the loaded torch has no symbol ") +
                             kCurrentStream + "; CUDA tensors need a CUDA build of torch >= 2.11");
  }
  void* stream = nullptr;
  if (function(device_index, &stream) != 0) {
    throw std::runtime_error("varstream: torch gave no current stream for cuda:" +
                             std::to_string(device_index));
  }
  return stream;
}

}  // namespace varstream::shim
