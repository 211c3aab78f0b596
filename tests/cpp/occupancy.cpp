// Blocks per SM by the CUDA toolkit's own calculator. Reads lines of
//   major minor sm_threads sm_shared block_shared threads registers shared
// and prints a number for each.
#include <cuda_occupancy.h>

#include <climits>
#include <cstdio>

int main() {
  int major, minor, sm_threads, threads, registers;
  size_t sm_shared, block_shared, shared;
  while (std::scanf("%d %d %d %zu %zu %d %d %zu",
                    &major,
                    &minor,
                    &sm_threads,
                    &sm_shared,
                    &block_shared,
                    &threads,
                    &registers,
                    &shared) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = sm_threads;
    device.regsPerBlock = 65536, device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.numSms = 1;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = sm_shared;
    device.sharedMemPerBlockOptin = block_shared, device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0, kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = block_shared, kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    std::printf("%d\n",
                error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -int(error));
  }
}
