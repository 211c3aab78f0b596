// The emulator's clusters, and its counts of global memory: row sums over 1 to 8 blocks against
// plain loops, six bugs planted into them, each of which must be caught, and errors by their words.
//
// Built by tests/test_emulator.py, under sanitizers and without. Usage: emu_cluster_test
// <warp-greedy|round-robin|SEED> [BUG]; with a bug the exit status is 0 only if the emulator caught
// it, by an exception or by sums that are wrong or NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/vec.cuh"
#include "emu/launch.h"
#include "emu_check.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/global.cuh"
#include "ptx/launch.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warp.cuh"

namespace vs = varstream;
namespace emu = varstream::emu;
namespace ptx = varstream::ptx;

enum Bug {
  kNone,
  kReadsEarly,       // no barrier between writing partial sums and reading the peers'
  kWritesEarly,      // none between reading them and writing the next row's
  kEndsEarly,        // a block's end does not wait for its last readers
  kArrivesTwice,     //
  kOneWarpStays,     // one warp of one block waits for something else
  kWritesOverTheEnd  // the last block's array is too short
};

// --- sums of rows, each spread over a cluster ----------------------------------------------------

constexpr int kRows = 5, kWords = 3;  // rows of one cluster; words of 4 values a thread and row

struct RowSums {
  struct Params {
    const float* x;  // (clusters, kRows, cluster * kThreads * kWords * 4)
    float* sums;     // (clusters, kRows, cluster): every block writes what it found
    uint32_t cluster;
    Bug bug;
  };
  struct Partial {
    float sum;
    uint32_t block, place;  // row * kThreads + thread
  };
  static constexpr int kThreads = 64, kMinBlocks = 1;
  static constexpr size_t kSharedBytes = 64 + kThreads * sizeof(Partial);

  // The barrier in its two halves, unless the bug leaves them out.
  static void arrive(const Params& p, Bug without) {
    if (p.bug != without) ptx::cluster_arrive();
  }
  static void wait(const Params& p, Bug without) {
    if (p.bug != without) ptx::cluster_wait();
  }

  static void run(const Params& p) {
    const uint32_t tid = vs::thread_index().x, lane = tid % 32, block = vs::block_index().x;
    const uint32_t rank = block % p.cluster;
    const bool stays = p.bug == kOneWarpStays && rank == 1 && tid >= 32;
    const bool is_short = p.bug == kWritesOverTheEnd && rank == p.cluster - 1;
    auto* warps = ptx::shared_array<float>(0, is_short ? 4 : 8);  // (2,)
    auto* partial = ptx::shared_array<Partial>(64, kThreads * sizeof(Partial));
    constexpr int64_t kRowWords = kThreads * kWords;  // of one block
    for (uint32_t row = 0; row < kRows; ++row) {
      const auto* words =
          reinterpret_cast<const vs::Vec<16>*>(p.x) +
          ((int64_t{block / p.cluster} * kRows + row) * p.cluster + rank) * kRowWords;
      float sum = 0;
      for (int i = 0; i < kWords; ++i) {
        float values[4];
        const auto word = ptx::load_global(words + i * kThreads + tid);
        std::memcpy(values, &word, 16);
        for (const float value : values) sum += value;
      }
      for (int step = 16; step > 0; step /= 2) sum += ptx::shuffle_xor(sum, step);
      if (lane == 0) warps[tid / 32] = sum;
      ptx::sync_block();
      if (row > 0) wait(p, kWritesEarly);
      partial[tid] = {warps[0] + warps[1], rank, row * kThreads + tid};
      if (stays) ptx::barrier_sync(3, 64);
      arrive(p, kReadsEarly);
      if (p.bug == kArrivesTwice) ptx::cluster_arrive();
      wait(p, kReadsEarly);
      sum = 0;
      for (uint32_t peer = 0; peer < p.cluster; ++peer) {
        const Partial other = ptx::load_peer(partial + tid, peer);
        sum += other.block == peer && other.place == row * kThreads + tid ? other.sum : NAN;
      }
      const bool last = row == kRows - 1;
      arrive(p, last ? kEndsEarly : kWritesEarly);
      if (tid == kThreads - 1) {
        ptx::store_global(p.sums + (block / p.cluster * kRows + row) * p.cluster + rank, sum);
      }
    }
    wait(p, kEndsEarly);
  }
};

// Largest error of the sums over clusters of `cluster` blocks; NaN counts as infinite.
double sums_error(emu::Schedule schedule, uint32_t cluster, Bug bug) {
  constexpr uint32_t kClusters = 3;
  const int width = int(cluster) * RowSums::kThreads * kWords * 4;
  struct alignas(16) Four {
    float value[4];
  };
  std::vector<Four> x(size_t{kClusters} * kRows * width / 4);
  for (size_t i = 0; i < x.size() * 4; ++i) x[i / 4].value[i % 4] = float(i * 7919 % 1000) - 400;
  std::vector<float> sums(kClusters * kRows * cluster, NAN);
  emu::schedule() = schedule;
  const RowSums::Params params{x.front().value, sums.data(), cluster, bug};
  ptx::launch<RowSums>(
      "row sums", kClusters * cluster, RowSums::kSharedBytes, params, nullptr, cluster);
  double worst = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    double want = 0;
    for (int j = 0; j < width; ++j) {
      const size_t at = i / cluster * width + j;
      want += x[at / 4].value[at % 4];
    }
    const double error = std::abs(sums[i] - want);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

void check_sums(emu::Schedule schedule) {
  for (uint32_t cluster : {1, 2, 4, 8}) {
    emu::reset_instruction_counts();
    expect(sums_error(schedule, cluster, kNone) == 0, "sums over a cluster");  // of integers
    auto counts = emu::instruction_counts();
    const int64_t blocks = 3 * cluster;
    expect(counts["global bytes read"] == blocks * kRows * RowSums::kThreads * kWords * 16,
           "bytes read");
    expect(counts["global bytes written"] == blocks * kRows * 4, "bytes written");
    expect(counts["cluster barrier"] == 3 * kRows * 2, "count of cluster barriers");
    expect(counts["barrier"] == blocks * kRows, "count of barriers");
  }
}

// --- one rule at a time --------------------------------------------------------------------------

void check_words(emu::Schedule schedule) {
  // Words of every size, and cp.async of what is valid.
  alignas(16) uint8_t from[64], to[64] = {};
  for (int i = 0; i < 64; ++i) from[i] = uint8_t(3 * i + 1);
  emu::reset_instruction_counts();
  emu::launch({1, 1, 1}, {1, 1, 1}, 32, schedule, [&] {
    auto move = [&](auto word, int at) {
      using Word = decltype(word);
      ptx::store_global(reinterpret_cast<Word*>(to + at),
                        ptx::load_global(reinterpret_cast<const Word*>(from + at)));
    };
    move(vs::Vec<16>{}, 0), move(vs::Vec<8>{}, 16), move(vs::Vec<4>{}, 24), move(vs::Vec<2>{}, 28);
    auto* shared = ptx::shared_array<uint8_t>(0, 32);
    ptx::cp_async_16(shared, from, true);
    ptx::cp_async_16(shared + 16, from, false);
    ptx::cp_async_8(shared + 16, from, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  });
  expect(std::equal(from, from + 30, to) && to[30] == 0, "words moved");
  auto counts = emu::instruction_counts();
  expect(counts["global bytes read"] == 30 + 24, "bytes read by words");
  expect(counts["global bytes written"] == 30, "bytes written by words");
}

// Runs a cluster of 2 blocks.
std::string message_of_pair(emu::Schedule schedule,
                            uint32_t threads,
                            const std::function<void(uint32_t rank)>& body) {
  return message_of([&] {
    emu::launch({2, 1, 1}, {threads, 1, 1}, 64, schedule, [&] { body(vs::block_index().x); }, 2);
  });
}

void check_barrier(emu::Schedule schedule) {
  auto run = [&](uint32_t threads, const std::function<void(uint32_t)>& body) {
    return message_of_pair(schedule, threads, body);
  };
  auto tid = [] { return int(vs::thread_index().x); };
  // A thread that has ended counts as arrived, whether it arrived before or not.
  int arrivals = 0, passed = 0;
  bool early = false;
  std::string text = run(64, [&](uint32_t rank) {
    if (rank == 1 && tid() >= 32) return;
    ++arrivals;
    ptx::cluster_arrive();
    if (rank == 1 && tid() < 16) return;
    ptx::cluster_wait();
    early |= arrivals < 64 + 32;
    ptx::cluster_arrive();
    ptx::cluster_wait();
    ++passed;
  });
  expect(text.empty() && passed == 64 + 16 && !early, "threads that have ended count as arrived");
  // What happens between the halves is not waited for.
  bool met = true;
  int arrived = 0;
  text = run(32, [&](uint32_t) {
    ++arrived;
    ptx::cluster_arrive();
    ptx::sync_block();
    ptx::cluster_wait();
    met &= arrived == 64;
  });
  expect(text.empty() && met, "the barrier in two halves");
  text = run(32, [&](uint32_t rank) {
    if (rank == 1 && tid() == 5) ptx::cluster_arrive();
    ptx::cluster_arrive();
  });
  expect(has(text, "block (1,0,0) warp 0 lane 5: arrives at the cluster's barrier twice"),
         text.c_str());
  text = run(64, [&](uint32_t rank) {
    if (rank == 1 && tid() == 40) ptx::cluster_wait();
  });
  expect(has(text, "block (1,0,0) warp 1 lane 8: waits at the cluster's barrier without"),
         text.c_str());
  text = run(64, [&](uint32_t rank) {
    if (rank == 0 && tid() < 32) ptx::barrier_sync(5, 64);
    ptx::cluster_arrive();
    ptx::cluster_wait();
  });
  expect(has(text, "deadlock") && has(text, "(0,0,0) warp 0 lane 0 waits for barrier 5, 64") &&
             has(text, "(0,0,0) warp 1 lane 0 waits for the barrier of its cluster") &&
             has(text, "(1,0,0) warp 0 lane 0 waits for the barrier of its cluster") &&
             has(text, "(1,0,0) warp 1"),
         text.c_str());
  text = run(32, [&](uint32_t rank) {
    if (rank == 1 && tid() != 7) ptx::ballot(true);
  });
  expect(has(text, "(1,0,0) warp 0 lane 0 waits for ballot") && !has(text, "(0,0,0)"),
         "blocks that have ended are not told of");
}

void check_peers(emu::Schedule schedule) {
  auto run = [&](const std::function<void(uint32_t)>& body) {
    return message_of_pair(schedule, 1, body);
  };
  static const float elsewhere = 1;
  bool unwritten = false, alone = false;
  std::string text = run([&](uint32_t rank) {
    if (rank == 0) {
      auto* x = ptx::shared_array<float>(16, 16);
      x[0] = x[2] = 3;
      unwritten = std::isnan(ptx::load_peer(x + 2, 1)) && ptx::load_peer(x + 2, 0) == 3;
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
  });
  expect(text.empty() && unwritten, "an array that the peer has not come to");
  text = message_of([&] {
    emu::launch({1, 1, 1}, {1, 1, 1}, 64, schedule, [&] {
      auto* x = ptx::shared_array<float>(0, 4);
      *x = 7;
      ptx::cluster_arrive();
      ptx::cluster_wait();
      alone = ptx::load_peer(x, 0) == 7;
    });
  });
  expect(text.empty() && alone, "a block outside clusters is alone in one");
  text = run([&](uint32_t) {
    ptx::load_peer(ptx::shared_array<float>(0, 4), 2);
    ptx::cluster_arrive();
  });
  expect(has(text, "reads block 2 of a cluster of 2"), text.c_str());
  text = run([&](uint32_t) { ptx::load_peer(&elsewhere, 0); });
  expect(has(text, "load_peer of something outside shared memory"), text.c_str());
  text = run([&](uint32_t rank) {
    auto* x = ptx::shared_array<float>(0, 4);
    // Only block 1 waits; block 0 has ended by then.
    ptx::cluster_arrive();
    if (rank == 0) return;
    ptx::cluster_wait();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    while (true) {  // under any schedule, in the end
      ptx::load_peer(x, 0);
      ptx::cluster_arrive();
      ptx::cluster_wait();
      ptx::sync_warp();
    }
  });
  expect(has(text,
             "block (1,0,0) warp 0 lane 0: reads the shared memory of a block that has ended, "
             "number 0"),
         text.c_str());
}

void check_refusals(emu::Schedule schedule) {
  auto run = [&](uint32_t blocks, uint32_t cluster) {
    return message_of([&] { emu::launch({blocks, 1, 1}, {1, 1, 1}, 0, schedule, [] {}, cluster); });
  };
  const char* refused = "a cluster the device refuses";
  expect(emu::max_cluster_blocks() == 8 && run(16, 8).empty(), "a cluster of 8");
  expect(has(run(12, 8), refused) && has(run(16, 16), refused) && has(run(1, 0), refused),
         "clusters that are refused");
  emu::max_cluster_blocks() = 1;
  expect(emu::max_cluster_blocks() == 1 && has(run(2, 2), refused) && run(2, 1).empty(),
         "a device without clusters");
  emu::max_cluster_blocks() = 8;
  alignas(16) static float source[8];
  auto message = [&](const std::function<void()>& body) {
    return message_of([&] { emu::launch({1, 1, 1}, {1, 1, 1}, 64, schedule, body); });
  };
  auto* shifted = reinterpret_cast<const vs::Vec<16>*>(source + 1);
  expect(has(message([&] { ptx::load_global(shifted); }), "not aligned to 16 bytes"),
         "an unaligned load");
  expect(has(message([&] { ptx::load_global(ptx::shared_array<float>(0, 4)); }),
             "load_global of shared memory"),
         "a load of shared memory");
  expect(has(message([&] { ptx::store_global(ptx::shared_array<float>(0, 4), 1.0f); }),
             "store_global of shared memory"),
         "a store to shared memory");
}

int main(int count, char** arguments) {
  const emu::Schedule schedule = schedule_named(count > 1 ? arguments[1] : "warp-greedy");
  if (count > 2) {
    double error = INFINITY;
    const std::string text =
        message_of([&] { error = sums_error(schedule, 4, Bug(std::atoi(arguments[2]))); });
    std::printf("error %.2e %s\n", error, text.c_str());
    return error > 1e-3 ? 0 : 1;
  }
  check_sums(schedule);
  check_words(schedule);
  check_barrier(schedule);
  check_peers(schedule);
  check_refusals(schedule);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
