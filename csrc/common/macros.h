// Ring 0. The only macros kernels use.
//
// A kernel body is a function template marked VARSTREAM_DEVICE that takes its parameter struct, so
// the same source compiles for the device (nvcc) and for the host (g++ with VARSTREAM_EMULATED).
#pragma once

#if defined(__CUDACC__)
#define VARSTREAM_DEVICE __device__ __forceinline__
#define VARSTREAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VARSTREAM_DEVICE inline
#define VARSTREAM_HOST_DEVICE inline
#endif

#if defined(__CUDACC__)
#define VARSTREAM_UNROLL _Pragma("unroll")
#else
#define VARSTREAM_UNROLL
#endif
