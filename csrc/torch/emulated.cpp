// Ring 4. Operators that tests of emulated kernels steer them by. Built by tests/cpp only; the
// kernels' own operators of this namespace are defined beside their bindings.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

#include "emu/cluster.h"
#include "emu/counts.h"
#include "emu/launch.h"
#include "torch/checks.h"

namespace varstream {
namespace {

using torch::stable::Tensor;

// order: 0 warp-greedy, 1 round-robin, 2 random from seed.
void set_schedule(int64_t order, int64_t seed) {
  VARSTREAM_CHECK(0 <= order && order <= 2, "order must be 0, 1 or 2, got ", order);
  emu::schedule() = {static_cast<emu::Order>(order), static_cast<uint64_t>(seed)};
}

// Shared memory that a block of the emulated device can ask for, which decides tiles.
void set_shared_limit(int64_t bytes) {
  VARSTREAM_CHECK(bytes > 0, "bytes must be positive, got ", bytes);
  emu::max_shared_bytes() = static_cast<size_t>(bytes);
}

// Blocks that a cluster of the emulated device may have; 1: none, as before sm_90.
void set_cluster_limit(int64_t blocks) {
  VARSTREAM_CHECK(1 <= blocks && blocks <= 8, "blocks must be 1 to 8, got ", blocks);
  emu::max_cluster_blocks() = static_cast<int>(blocks);
}

// How often the instruction called name (emu/counts.h) has run since the counts were cleared.
int64_t instruction_count(std::string name) {
  const auto counts = emu::instruction_counts();
  const auto found = counts.find(name);
  return found == counts.end() ? 0 : found->second;
}

void clear_instruction_counts() {
  emu::reset_instruction_counts();
}

// The byte after x (n,) uint8: a mistake on purpose, which shows that sanitizers watch tensors.
int64_t read_past_the_end(Tensor x) {
  const auto* bytes = static_cast<const volatile uint8_t*>(x.const_data_ptr());
  return bytes[x.numel()];
}

}  // namespace
}  // namespace varstream

STABLE_TORCH_LIBRARY_FRAGMENT(varstream_emulated, m) {
  m.def("set_schedule(int order, int seed) -> ()");
  m.def("set_shared_limit(int bytes) -> ()");
  m.def("set_cluster_limit(int blocks) -> ()");
  m.def("instruction_count(str name) -> int");
  m.def("clear_instruction_counts() -> ()");
  m.def("read_past_the_end(Tensor x) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(varstream_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&varstream::set_schedule));
  m.impl("set_shared_limit", TORCH_BOX(&varstream::set_shared_limit));
  m.impl("set_cluster_limit", TORCH_BOX(&varstream::set_cluster_limit));
  m.impl("instruction_count", TORCH_BOX(&varstream::instruction_count));
  m.impl("clear_instruction_counts", TORCH_BOX(&varstream::clear_instruction_counts));
  m.impl("read_past_the_end", TORCH_BOX(&varstream::read_past_the_end));
}
