// Ring 4. CUDA implementations of pack and unpack: tensors become row copy parameters.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "torch/checks.h"
#include "torch/cuda_shim.h"
#include "varlen/row_copy_launch.h"

namespace varstream {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using varlen::RowCopy;

// The shape of tensor with its first dimension replaced.
std::vector<int64_t> with_rows(const Tensor& tensor, int64_t rows) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[0] = rows;
  return shape;
}

// Bytes of one index of the first dimension.
int64_t row_bytes(const Tensor& tensor) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t axis = 1; axis < tensor.dim(); ++axis) bytes *= tensor.size(axis);
  return bytes;
}

void copy_rows(RowCopy kind, const Tensor& src, Tensor& dst, const Tensor& indices, int64_t rows) {
  const Tensor contiguous_src = torch::stable::contiguous(src);
  const Tensor contiguous_indices = torch::stable::contiguous(indices);
  varlen::launch_row_copy(kind,
                          contiguous_src.const_data_ptr(),
                          dst.mutable_data_ptr(),
                          contiguous_indices.const_data_ptr<int64_t>(),
                          indices.size(0),
                          rows,
                          row_bytes(src),
                          shim::current_cuda_stream(src.get_device_index()));
}

// x (rows, ...), indices int64 (n,) -> (n, ...)
Tensor pack_cuda(Tensor x, Tensor indices) {
  VARSTREAM_CHECK(x.dim() >= 1, "x must have at least 1 dimension (rows, ...), got a scalar");
  check_indices(indices);
  check_same_cuda_device(indices, "indices", x, "x");
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, with_rows(x, indices.size(0)));
  copy_rows(RowCopy::kGather, x, out, indices, x.size(0));
  return out;
}

// values (n, ...), indices int64 (n,) -> (rows, ...)
Tensor unpack_cuda(Tensor values, Tensor indices, int64_t rows, double fill) {
  VARSTREAM_CHECK(values.dim() >= 1,
                  "values must have at least 1 dimension (n, ...), got a scalar");
  check_indices(indices);
  check_same_cuda_device(indices, "indices", values, "values");
  VARSTREAM_CHECK(values.size(0) == indices.size(0),
                  "values must have one row per index, ",
                  indices.size(0),
                  ", got shape ",
                  shape_text(values));
  VARSTREAM_CHECK(rows >= 0, "rows must be >= 0, got ", rows);
  const DeviceGuard guard(values.get_device_index());
  Tensor out = torch::stable::new_empty(values, with_rows(values, rows));
  torch::stable::fill_(out, fill);
  copy_rows(RowCopy::kScatter, values, out, indices, rows);
  return out;
}

}  // namespace
}  // namespace varstream

STABLE_TORCH_LIBRARY_IMPL(varstream, CUDA, m) {
  m.impl("pack", TORCH_BOX(&varstream::pack_cuda));
  m.impl("unpack", TORCH_BOX(&varstream::unpack_cuda));
}
