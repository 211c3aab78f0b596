// The Python module varstream._C: importing it registers the operators (library.cpp). pybind11
// binds only what takes no tensor.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention/backward_launch.h"
#include "attention/forward_launch.h"
#include "build_config.h"
#include "torch/cuda_shim.h"
#include "varlen/balance.h"
#include "varlen/bin_packing.h"
#include "varlen/row_copy_launch.h"
#include "varlen/tile_schedule.h"
#include "varlen/tile_schedule_launch.h"

namespace py = pybind11;
namespace varlen = varstream::varlen;

namespace {

// Names of the CUDA kernels compiled into this module.
py::list kernels() {
  py::list names;
#if VARSTREAM_WITH_CUDA
  for (const char* name : varlen::kRowCopyKernels) names.append(name);
  for (const char* name : varlen::kTileScheduleKernels) names.append(name);
  for (const char* name : varstream::attention::kForwardKernels) names.append(name);
  for (const char* name : varstream::attention::kBackwardKernels) names.append(name);
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

// A numpy array that owns values, without a copy.
py::array_t<int64_t> as_array(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  py::capsule owner(owned, [](void* memory) { delete static_cast<std::vector<int64_t>*>(memory); });
  return py::array_t<int64_t>(owned->size(), owned->data(), owner);
}

using Packer = varlen::BinPacking(const varlen::BinPackingProblem&);

// Binds a packer as name(lengths, capacity, max_depth) -> (order, offsets).
void def_packer(py::module_& m, const char* name, Packer* packer) {
  using Lengths = py::array_t<int64_t, py::array::c_style>;
  m.def(
      name,
      [packer](const Lengths& lengths, int64_t capacity, int64_t max_depth) {
        const varlen::BinPackingProblem problem{
            lengths.data(), lengths.size(), capacity, max_depth};
        varlen::BinPacking packing;
        {
          const py::gil_scoped_release release;
          packing = packer(problem);
        }
        return py::make_tuple(as_array(std::move(packing.order)),
                              as_array(std::move(packing.offsets)));
      },
      py::arg("lengths"),
      py::arg("capacity"),
      py::arg("max_depth"),
      "Bins as (order, offsets): bin b holds documents order[offsets[b]:offsets[b + 1]].");
}

using Balancer = std::vector<int64_t>(const varlen::BalanceProblem&);

// Binds a balancer as name(costs, bins) -> bin of each item.
void def_balancer(py::module_& m, const char* name, Balancer* balancer) {
  using Costs = py::array_t<double, py::array::c_style>;
  m.def(
      name,
      [balancer](const Costs& costs, int64_t bins) {
        const varlen::BalanceProblem problem{costs.data(), costs.size(), bins};
        std::vector<int64_t> bin_of;
        {
          const py::gil_scoped_release release;
          bin_of = balancer(problem);
        }
        return as_array(std::move(bin_of));
      },
      py::arg("costs"),
      py::arg("bins"),
      "The bin of each item.");
}

using Lengths32 = py::array_t<int32_t, py::array::c_style>;

std::vector<int32_t> as_vector(const char* name, const Lengths32& values) {
  if (values.ndim() == 1) return {values.data(), values.data() + values.size()};
  throw std::invalid_argument(std::string(name) + " must have one dimension, got " +
                              std::to_string(values.ndim()));
}

// One row a tile: the fields of varlen::PlannedTile in order.
py::array_t<int32_t> tile_schedule(const Lengths32& cu_seqlens_q,
                                   const Lengths32& cu_seqlens_k,
                                   const std::optional<Lengths32>& seqused_k,
                                   int32_t total_q,
                                   int32_t total_k,
                                   int32_t left,
                                   int32_t right,
                                   int32_t rows_per_query,
                                   int32_t tile_rows,
                                   int32_t tile_keys) {
  varlen::TilePlanProblem problem{as_vector("cu_seqlens_q", cu_seqlens_q),
                                  as_vector("cu_seqlens_k", cu_seqlens_k),
                                  std::nullopt,
                                  total_q,
                                  total_k,
                                  {left, right},
                                  rows_per_query,
                                  tile_rows,
                                  tile_keys};
  if (seqused_k) problem.seqused_k = as_vector("seqused_k", *seqused_k);
  std::vector<varlen::PlannedTile> tiles;
  {
    const py::gil_scoped_release release;
    tiles = varlen::plan_tiles(problem);
  }
  constexpr py::ssize_t kFields = 7;
  static_assert(sizeof(varlen::PlannedTile) == kFields * sizeof(int32_t));
  py::array_t<int32_t> table({static_cast<py::ssize_t>(tiles.size()), kFields});
  auto* row = reinterpret_cast<varlen::PlannedTile*>(table.mutable_data());
  std::copy(tiles.begin(), tiles.end(), row);
  return table;
}

void def_tile_schedule(py::module_& m) {
  m.def("tile_schedule",
        &tile_schedule,
        py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"),
        py::arg("seqused_k"),
        py::arg("total_q"),
        py::arg("total_k"),
        py::arg("left"),
        py::arg("right"),
        py::arg("rows_per_query"),
        py::arg("tile_rows"),
        py::arg("tile_keys"),
        "Query tiles, longest first: sequence, tile, first and last row, key begin and end, cost.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "varstream's compiled part. Import varstream instead.";
  m.def("build_info", &build_info, "What this build was made of.");
  m.def("cuda_symbols",
        &cuda_symbols,
        "Whether each CUDA symbol of torch's stable ABI that kernels use can be resolved.");
  def_packer(m, "best_fit_decreasing", &varlen::best_fit_decreasing);
  def_packer(m, "first_fit_decreasing", &varlen::first_fit_decreasing);
  def_packer(m, "next_fit", &varlen::next_fit);
  def_balancer(m, "balance_lpt", &varlen::balance_lpt);
  def_balancer(m, "balance_karmarkar_karp", &varlen::balance_karmarkar_karp);
  def_tile_schedule(m);
}
