// The tile schedule kernel, emulated, on the batches that come on stdin; prints what it wrote.
//
// Built by tests/test_tile_schedule.py under sanitizers. Usage: tile_schedule_test
// <warp-greedy|round-robin|SEED>. Buffers are exactly as large as the kernel may touch, so any
// access beyond them is reported. Commands, each answered with one line:
//   slots TOTAL_Q BATCH ROWS_PER_QUERY TILE_ROWS -> tile_slots()
//   run BATCH TOTAL_Q TOTAL_K LEFT RIGHT ROWS_PER_QUERY TILE_ROWS TILE_KEYS MAX_COST MAX_TILES USED
//     CU_SEQLENS_Q... CU_SEQLENS_K... [SEQUSED_K...] -> sequence and tile of every slot;
//     MAX_TILES -1: tile_slots(); USED 0 or 1: whether SEQUSED_K follows
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

#include "emu/launch.h"
#include "varlen/tile_schedule_launch.h"

namespace emu = varstream::emu;
namespace vl = varstream::varlen;

int64_t next_number() {
  int64_t value = 0;
  if (!(std::cin >> value)) throw std::runtime_error("a number is missing");
  return value;
}

int32_t next_int() {
  return static_cast<int32_t>(next_number());
}

// An array of its own on the heap, for the sanitizer to watch.
std::unique_ptr<int32_t[]> next_array(int64_t n) {
  std::unique_ptr<int32_t[]> values(new int32_t[n]);
  for (int64_t i = 0; i < n; ++i) values[i] = next_int();
  return values;
}

int64_t slots() {
  const int64_t total_q = next_number(), batch = next_number(), rows_per_query = next_number();
  return vl::tile_slots(total_q, batch, rows_per_query, next_number());
}

void run() {
  vl::TileScheduleParams p{};
  p.lengths.batch = next_int();
  p.lengths.total_q = next_int(), p.lengths.total_k = next_int();
  p.window.left = next_int(), p.window.right = next_int();
  p.rows_per_query = next_int(), p.tile_rows = next_int(), p.tile_keys = next_int();
  p.max_cost = next_int(), p.max_tiles = next_int();
  const bool used = next_int() != 0;
  const auto cu_q = next_array(int64_t{p.lengths.batch} + 1);
  const auto cu_k = next_array(int64_t{p.lengths.batch} + 1);
  const auto seqused = next_array(used ? p.lengths.batch : 0);
  p.lengths.cu_seqlens_q = cu_q.get(), p.lengths.cu_seqlens_k = cu_k.get();
  p.lengths.seqused_k = used ? seqused.get() : nullptr;
  if (p.max_tiles < 0) {
    p.max_tiles = static_cast<int32_t>(
        vl::tile_slots(p.lengths.total_q, p.lengths.batch, p.rows_per_query, p.tile_rows));
  }
  std::unique_ptr<vl::QueryTile[]> tiles(new vl::QueryTile[p.max_tiles]);
  for (int32_t i = 0; i < p.max_tiles; ++i) tiles[i] = {-99, -99};
  p.tiles = tiles.get();
  vl::launch_tile_schedule(p, nullptr);
  for (int32_t i = 0; i < p.max_tiles; ++i) {
    std::printf("%d %d ", tiles[i].sequence, tiles[i].tile);
  }
  std::printf("\n");
}

int main(int argc, char** argv) {
  const std::string order = argc > 1 ? argv[1] : "warp-greedy";
  if (order == "round-robin") {
    emu::schedule() = {emu::Order::kRoundRobin, 0};
  } else if (order != "warp-greedy") {
    emu::schedule() = {emu::Order::kRandom, std::strtoull(order.c_str(), nullptr, 10)};
  }
  try {
    std::string command;
    while (std::cin >> command) {
      if (command == "slots") {
        std::printf("%lld\n", static_cast<long long>(slots()));
      } else {
        run();
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
