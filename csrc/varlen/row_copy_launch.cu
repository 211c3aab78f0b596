// Ring 2. Device entry points of the row copy kernel and the choice between them.
#include "common/check_cuda.h"
#include "varlen/row_copy_kernel.cuh"
#include "varlen/row_copy_launch.h"

namespace varstream::varlen {
namespace {

template <RowCopy Kind, int VecBytes>
__global__ void __launch_bounds__(kRowCopyThreads) row_copy_entry(const RowCopyParams params) {
  row_copy<Kind, VecBytes>(params);
}

template <RowCopy Kind, int VecBytes>
void launch(const RowCopyParams& params, cudaStream_t stream) {
  const RowCopyShape shape = row_copy_shape(params.n, params.row_vecs);
  const dim3 grid(static_cast<unsigned>(shape.blocks));
  const dim3 block(shape.lanes, shape.block_rows);
  row_copy_entry<Kind, VecBytes><<<grid, block, 0, stream>>>(params);
  check_launch(Kind == RowCopy::kGather ? "gather_rows" : "scatter_rows");
}

template <RowCopy Kind>
void dispatch(int vec_bytes, const RowCopyParams& params, cudaStream_t stream) {
  switch (vec_bytes) {
    case 16:
      return launch<Kind, 16>(params, stream);
    case 8:
      return launch<Kind, 8>(params, stream);
    case 4:
      return launch<Kind, 4>(params, stream);
    case 2:
      return launch<Kind, 2>(params, stream);
    default:
      return launch<Kind, 1>(params, stream);
  }
}

}  // namespace

void launch_row_copy(RowCopy kind,
                     const void* src,
                     void* dst,
                     const int64_t* indices,
                     int64_t n,
                     int64_t rows,
                     int64_t row_bytes,
                     void* stream) {
  if (n == 0 || row_bytes == 0) return;
  const int vec_bytes = widest_vec(row_bytes, src, dst);
  const RowCopyParams params{src, dst, indices, n, rows, row_bytes / vec_bytes};
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  if (kind == RowCopy::kGather) {
    dispatch<RowCopy::kGather>(vec_bytes, params, cuda_stream);
  } else {
    dispatch<RowCopy::kScatter>(vec_bytes, params, cuda_stream);
  }
}

}  // namespace varstream::varlen
