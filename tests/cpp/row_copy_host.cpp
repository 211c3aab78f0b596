// Runs the row copy kernel on the host, thread after thread, and compares it with a plain loop.
//
// The kernel has no barrier and no shared memory, so running its threads in any order is a legal
// schedule. Built by tests/test_row_copy_host.py with address and undefined-behaviour sanitizers;
// buffers are exactly as large as the kernel may touch, so any access beyond them is reported.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "varlen/row_copy_kernel.cuh"

namespace varstream {
namespace {
Index3 current_thread, current_block, current_block_shape, current_grid_shape;
}
Index3 thread_index() {
  return current_thread;
}
Index3 block_index() {
  return current_block;
}
Index3 block_shape() {
  return current_block_shape;
}
Index3 grid_shape() {
  return current_grid_shape;
}
}  // namespace varstream

namespace vs = varstream;
namespace vl = varstream::varlen;

template <vl::RowCopy Kind, int VecBytes>
void run_grid(const vl::RowCopyParams& params, int64_t max_blocks) {
  const vl::RowCopyShape shape = vl::row_copy_shape(params.n, params.row_vecs);
  const auto blocks = static_cast<uint32_t>(std::min(shape.blocks, max_blocks));
  vs::current_block_shape = {uint32_t(shape.lanes), uint32_t(shape.block_rows), 1};
  vs::current_grid_shape = {blocks, 1, 1};
  for (uint32_t b = 0; b < blocks; ++b) {
    for (uint32_t y = 0; y < vs::current_block_shape.y; ++y) {
      for (uint32_t x = 0; x < vs::current_block_shape.x; ++x) {
        vs::current_block = {b, 0, 0};
        vs::current_thread = {x, y, 0};
        vl::row_copy<Kind, VecBytes>(params);
      }
    }
  }
}

template <vl::RowCopy Kind>
void run_kernel(const vl::RowCopyParams& params, int vec_bytes, int64_t max_blocks) {
  if (vec_bytes == 16) return run_grid<Kind, 16>(params, max_blocks);
  if (vec_bytes == 8) return run_grid<Kind, 8>(params, max_blocks);
  if (vec_bytes == 4) return run_grid<Kind, 4>(params, max_blocks);
  if (vec_bytes == 2) return run_grid<Kind, 2>(params, max_blocks);
  return run_grid<Kind, 1>(params, max_blocks);
}

// A buffer of exactly `bytes` bytes that starts `offset` bytes past a 16-byte boundary.
struct Buffer {
  Buffer(int64_t bytes, int64_t offset)
      : memory(new (std::align_val_t(16)) uint8_t[bytes + offset]), data(memory + offset) {}
  ~Buffer() { operator delete[](memory, std::align_val_t(16)); }
  uint8_t* memory;
  uint8_t* data;
};

// One case; returns whether the kernel wrote what the loop writes.
bool check(vl::RowCopy kind, int64_t row_bytes, int64_t n, int64_t rows, int64_t offset) {
  const bool gather = kind == vl::RowCopy::kGather;
  const int64_t src_rows = gather ? rows : n, dst_rows = gather ? n : rows;
  std::mt19937_64 random(row_bytes * 131 + n * 17 + rows);
  Buffer src(src_rows * row_bytes, offset), dst(dst_rows * row_bytes, offset);
  for (int64_t i = 0; i < src_rows * row_bytes; ++i) src.data[i] = uint8_t(random());
  std::memset(dst.data, 0xAB, dst_rows * row_bytes);

  // Distinct rows in a random order, every fifth index out of range in one way or another.
  std::vector<int64_t> order(rows), indices(n);
  for (int64_t i = 0; i < rows; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  const int64_t outside[] = {-1, rows, INT64_MAX, INT64_MIN};
  for (int64_t i = 0; i < n; ++i) {
    indices[i] = i % 5 == 4 || i >= rows ? outside[i % 4] : order[i];
  }

  std::vector<uint8_t> want(dst.data, dst.data + dst_rows * row_bytes);
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = indices[i] >= 0 && indices[i] < rows;
    if (gather && !inside) std::fill_n(&want[i * row_bytes], row_bytes, uint8_t(0));
    if (!inside) continue;
    const int64_t from = gather ? indices[i] : i, to = gather ? i : indices[i];
    std::copy_n(src.data + from * row_bytes, row_bytes, want.begin() + to * row_bytes);
  }

  const int vec_bytes = vs::widest_vec(row_bytes, src.data, dst.data);
  const vl::RowCopyParams params{
      src.data, dst.data, indices.data(), n, rows, row_bytes / vec_bytes};
  for (int64_t max_blocks : {int64_t(1) << 20, int64_t(2)}) {  // 2: the grid has to stride
    std::memset(dst.data, 0xAB, dst_rows * row_bytes);
    if (gather) {
      run_kernel<vl::RowCopy::kGather>(params, vec_bytes, max_blocks);
    } else {
      run_kernel<vl::RowCopy::kScatter>(params, vec_bytes, max_blocks);
    }
    if (std::memcmp(want.data(), dst.data, want.size()) != 0) {
      std::printf("wrong rows: %s, row_bytes %ld, n %ld, rows %ld, offset %ld\n",
                  gather ? "gather" : "scatter",
                  long(row_bytes),
                  long(n),
                  long(rows),
                  long(offset));
      return false;
    }
  }
  return true;
}

int main() {
  int failures = 0, cases = 0;
  for (auto kind : {vl::RowCopy::kGather, vl::RowCopy::kScatter}) {
    for (int64_t row_bytes : {1, 2, 3, 4, 6, 8, 12, 16, 20, 48, 64, 1000, 1536, 8192, 8208}) {
      for (int64_t n : {1, 2, 7, 257, 600}) {
        if (row_bytes > 1000 && n > 257) continue;
        for (int64_t offset : {0, 8, 2, 1}) {
          failures += !check(kind, row_bytes, n, n + 3, offset);
          failures += !check(kind, row_bytes, n, 1, offset);
          cases += 2;
        }
      }
    }
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
