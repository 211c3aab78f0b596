// The emulator itself: collectives, barriers, copies and matrix instructions against plain loops; a
// small tiled product; and five classic bugs planted into it, each of which must be caught.
//
// Built by tests/test_emulator.py, under sanitizers and without. Usage: emu_test
// <warp-greedy|round-robin|SEED> [BUG]; with a bug the exit status is 0 only if the emulator caught
// it: by an exception (a deadlock, a guard gap that was written) or by a result that is wrong or
// NaN because the bug let unwritten or undelivered memory be read.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "emu/launch.h"
#include "emu_check.h"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/warp.cuh"

namespace vs = varstream;
namespace emu = varstream::emu;
namespace ptx = varstream::ptx;

enum Bug { kNone, kNoBarrier, kNoWait, kWrongOffset, kShortShared, kSkippedBarrier };

// --- a product C (M, 64) = A (M, 64) B (64, 64)^T: 64 rows a block of 4 warps, K in 2 stages -----

constexpr int kTile = 64, kStage = 32, kRow = kStage + 8;  // 8 more: rows on different banks

struct ProductParams {
  const __nv_bfloat16* a;  // (rows, 64)
  const __nv_bfloat16* b;  // (64, 64)
  float* c;                // (rows, 64)
  int rows;
  Bug bug;
};

constexpr size_t kSharedBytes = size_t{2} * 2 * kTile * kRow * sizeof(__nv_bfloat16);

void product(const ProductParams& p) {
  constexpr size_t kBytes = size_t{2} * kTile * kRow * sizeof(__nv_bfloat16);
  auto& shared = emu::block().shared();
  auto* a = reinterpret_cast<__nv_bfloat16*>(shared.at(0, kBytes));  // [stage][row][kRow]
  const size_t b_bytes = p.bug == kShortShared ? kBytes - 128 : kBytes;
  auto* b = reinterpret_cast<__nv_bfloat16*>(shared.at(kBytes, b_bytes));
  const int tid = int(vs::thread_index().x), warp = tid / 32, lane = tid % 32;
  const int row0 = int(vs::block_index().x) * kTile;
  for (int stage = 0; stage < 2; ++stage) {
    for (int i = tid; i < kTile * kStage / 8; i += 128) {
      const int row = i / (kStage / 8), col = i % (kStage / 8) * 8;
      const int to = (stage * kTile + row) * kRow + col, from = stage * kStage + col;
      const bool valid = row0 + row < p.rows;
      ptx::cp_async_16(a + to, p.a + int64_t{valid ? row0 + row : 0} * 64 + from, valid);
      ptx::cp_async_16(b + to, p.b + row * 64 + from, true);
    }
    ptx::cp_async_commit();
  }
  float d[8][4] = {};
  for (int stage = 0; stage < 2; ++stage) {
    if (p.bug != kNoWait) {
      stage == 0 ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<0>();
    }
    const bool skip = p.bug == kNoBarrier || (p.bug == kSkippedBarrier && warp == 2 && stage == 1);
    if (!skip) ptx::sync_block();
    for (int k = 0; k < kStage; k += 16) {
      uint32_t af[4];
      const int wrong = p.bug == kWrongOffset ? 8 : 0;
      const int a_row = stage * kTile + warp * 16 + lane % 16;
      ptx::ldmatrix_x4(af, a + a_row * kRow + (k + lane / 16 * 8 + wrong) % kStage);
      for (int n = 0; n < 8; n += 2) {
        uint32_t bf[4];
        const int b_row = stage * kTile + n * 8 + lane % 8 + lane / 16 * 8;
        ptx::ldmatrix_x4(bf, b + b_row * kRow + k + lane / 8 % 2 * 8);
        ptx::mma_m16n8k16<__nv_bfloat16>(d[n], af, {bf[0], bf[1]});
        ptx::mma_m16n8k16<__nv_bfloat16>(d[n + 1], af, {bf[2], bf[3]});
      }
    }
  }
  if (p.bug == kNoWait) ptx::cp_async_wait<0>();
  for (int n = 0; n < 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + warp * 16 + lane / 4 + 8 * (i / 2);
      if (row < p.rows) p.c[row * 64 + n * 8 + 2 * (lane % 4) + i % 2] = d[n][i];
    }
  }
}

// Largest error of the emulated product; NaN counts as infinite.
double product_error(emu::Schedule schedule, int rows, Bug bug) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> a(rows * 64), b(64 * 64);
  for (auto& x : a) x = __float2bfloat16(normal(random));
  for (auto& x : b) x = __float2bfloat16(normal(random));
  std::vector<float> c(rows * 64, NAN);
  const ProductParams p{a.data(), b.data(), c.data(), rows, bug};
  const uint32_t blocks = (rows + kTile - 1) / kTile;
  emu::launch({blocks, 1, 1}, {128, 1, 1}, kSharedBytes, schedule, [&] { product(p); });
  double worst = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < 64; ++j) {
      double want = 0;
      for (int k = 0; k < 64; ++k) {
        want += double(__bfloat162float(a[i * 64 + k])) * __bfloat162float(b[j * 64 + k]);
      }
      const double error = std::abs(c[i * 64 + j] - want);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  return worst;
}

// --- who runs next -------------------------------------------------------------------------------

void check_ready_set() {
  // Against a scan, on sets that shrink and grow.
  constexpr int kCount = 1000;
  std::mt19937 random(3);
  emu::ReadySet set;
  set.fill(kCount);
  std::vector<bool> want(kCount, true);
  for (int step = 0; step < 20000; ++step) {
    const int i = int(random() % kCount);
    const bool add = step / 2000 % 2 == 1 || (i > 900 && i % 7 == 0);
    add ? set.add(i / 32, 1u << i % 32) : set.remove(i / 32, i % 32);
    want[i] = add;
    int next = int(random() % kCount);
    const int from = next;
    for (int seen = 0; seen < kCount && !want[next]; ++seen) next = (next + 1) % kCount;
    if (set.empty() == want[next]) return expect(false, "emptiness of a ready set");
    if (want[next] && set.next(from) != next) return expect(false, "next of a ready set");
  }
}

void check_order(emu::Schedule schedule) {
  // Every thread passes twice, with a warp barrier between.
  auto log_of = [](emu::Schedule s) {
    std::vector<int> log;
    emu::launch({1, 1, 1}, {64, 1, 1}, 0, s, [&] {
      log.push_back(int(vs::thread_index().x));
      ptx::sync_warp();
      log.push_back(int(vs::thread_index().x));
    });
    return log;
  };
  const std::vector<int> log = log_of(schedule);
  expect(log.size() == 128, "threads that ran");
  expect(log == log_of(schedule), "a schedule repeats");
  std::vector<int> want;
  auto lanes = [&](int first, int end) {
    for (int i = first; i < end; ++i) want.push_back(i);
  };
  if (schedule.order == emu::Order::kWarpGreedy) {
    // The last lane to arrive goes on; the other warp waits until this one is done.
    lanes(0, 32), lanes(31, 32), lanes(0, 31), lanes(32, 64), lanes(63, 64), lanes(32, 63);
  } else if (schedule.order == emu::Order::kRoundRobin) {
    lanes(0, 32), lanes(31, 64), lanes(63, 64), lanes(0, 31), lanes(32, 63);
  } else {
    schedule.seed += 1;
    want = log_of(schedule);
    expect(log != want, "seeds differ");
    return;
  }
  expect(log == want, "order of threads");
}

// --- one instruction at a time -------------------------------------------------------------------

void check_collectives(emu::Schedule schedule) {
  std::vector<int> wrong(96, 0);
  emu::launch({1, 1, 1}, {96, 1, 1}, 0, schedule, [&] {
    const int tid = int(vs::thread_index().x), lane = tid % 32;
    float sum = float(tid);
    for (int step = 16; step > 0; step /= 2) sum += ptx::shuffle_xor(sum, step);
    const float want = 32 * (tid / 32 * 32) + 496;
    const bool odd_half = lane >= 16;
    const uint32_t half = odd_half ? 0xFFFF0000u : 0x0000FFFFu;
    const int first = ptx::shuffle(tid, odd_half ? 16 : 0, half);  // halves may diverge
    wrong[tid] = sum != want || first != tid / 16 * 16 ||
                 ptx::ballot(lane % 3 == 0) != 0x49249249u ||
                 ptx::shuffle_down(lane, 5) != (lane + 5 < 32 ? lane + 5 : lane) ||
                 !ptx::any(lane == 31) || ptx::all(lane != 31);
    ptx::sync_warp();
  });
  for (int w : wrong) expect(w == 0, "collectives");
}

void check_named_barriers(emu::Schedule schedule) {
  // Warp 0 produces, warp 1 consumes, through barrier 1; warp 2 isn't part of it.
  std::vector<int> box(8, -1), seen(8, -1);
  emu::launch({1, 1, 1}, {96, 1, 1}, 0, schedule, [&] {
    const int tid = int(vs::thread_index().x);
    for (int round = 0; round < 8 && tid < 64; ++round) {
      if (tid < 32) {
        if (tid == 0) box[round] = round * round;
        ptx::barrier_arrive(1, 64);
      } else {
        ptx::barrier_sync(1, 64);
        if (tid == 32) seen[round] = box[round];
      }
      ptx::barrier_sync(2, 64);
    }
  });
  for (int i = 0; i < 8; ++i) expect(seen[i] == i * i, "named barriers");
}

void check_poison(emu::Schedule schedule) {
  // Unwritten shared memory is NaN; so is what an asynchronous copy has not delivered yet.
  alignas(16) float source[4] = {1, 2, 3, 4};
  bool fresh = false, early = false, late = false;
  emu::launch({1, 1, 1}, {1, 1, 1}, 16, schedule, [&] {
    auto* x = reinterpret_cast<float*>(emu::block().shared().at(0, 16));
    fresh = std::isnan(x[3]);
    x[0] = 5;
    ptx::cp_async_16(x, source, true);
    ptx::cp_async_commit();
    early = std::isnan(x[0]);
    ptx::cp_async_wait<0>();
    late = x[0] == 1 && x[3] == 4;
  });
  expect(fresh && early && late, "poisoned shared memory");
}

void check_errors(emu::Schedule schedule) {
  auto run = [&](uint32_t threads, const std::function<void()>& body) {
    return message_of([&] { emu::launch({1, 1, 1}, {threads, 1, 1}, 64, schedule, body); });
  };
  auto tid = [] { return int(vs::thread_index().x); };
  std::string text = run(64, [&] {
    if (tid() < 32) ptx::sync_block();
  });
  expect(has(text, "deadlock") && has(text, "warp 0") && has(text, "barrier 0"), text.c_str());
  text = message_of([&] {
    emu::launch({3, 1, 1}, {64, 1, 1}, 64, schedule, [&] {
      if (vs::block_index().x == 2 && tid() >= 32) ptx::barrier_sync(5, 64);
    });
  });
  expect(has(text, "block (2,0,0) warp 1 lane 0 waits for barrier 5, 64 threads"), text.c_str());
  expect(!has(text, "warp 0") && !has(text, "lane 1"), "one line for lanes that wait alike");
  text = run(32, [&] {
    if (tid() != 7) ptx::ballot(true);
  });
  expect(has(text, "warp 0 lane 0 waits for ballot of its warp"), text.c_str());
  text = run(32, [&] { tid() == 3 ? ptx::sync_warp() : void(ptx::ballot(true)); });
  expect(has(text, "meets"), "divergent collectives");
  text = run(32, [&] { ptx::shuffle(1, 20, tid() < 16 ? 0xFFFFu : 0xFFFF0000u); });
  expect(has(text, "takes no part"), "shuffle from an absent lane");
  text = run(32, [&] { ptx::barrier_sync(16, 32); });
  expect(has(text, "not one the device has"), "barrier 16");
  text = run(1, [&] { emu::block().shared().at(0, 65); });
  expect(has(text, "ends at byte 65 of 64"), "too much shared memory");
  alignas(16) static float source[8];
  text = run(1, [&] { ptx::cp_async_16(emu::block().shared().at(0, 64), source, true); });
  expect(has(text, "never waited"), "a copy nobody waits for");
  text = run(1, [&] { ptx::cp_async_16(emu::block().shared().at(0, 64), source + 1, true); });
  expect(has(text, "not aligned"), "an unaligned copy");
  text = run(1, [&] { ptx::cp_async_16(source, source + 4, true); });
  expect(has(text, "outside shared memory"), "a copy to global memory");
  text = run(32, [&] {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, source);
  });
  expect(has(text, "not in shared memory"), "ldmatrix of global memory");
}

void check_counts(emu::Schedule schedule) {
  // One block, 4 warps: 4 steps of k with 5 ldmatrix and 8 mma each, rows on different banks.
  emu::reset_instruction_counts();
  product_error(schedule, kTile, kNone);
  auto counts = emu::instruction_counts();
  expect(counts["ldmatrix"] == 4 * 4 * 5 && counts["mma"] == 4 * 4 * 8, "count of mma");
  expect(counts["cp.async"] == 2 * 2 * kTile * kStage / 8, "count of cp.async");
  expect(counts["barrier"] == 2 && counts["ldmatrix bank conflicts"] == 0, "count of barriers");
  expect(counts["shuffle"] == 0 && counts["vote"] == 0, "count of nothing");
  emu::reset_instruction_counts();
  check_collectives(schedule);
  counts = emu::instruction_counts();
  // 3 warps: 5 + 1 shuffles of whole warps and one of each half; 3 votes.
  expect(counts["shuffle"] == 3 * 8 && counts["vote"] == 3 * 3, "count of shuffles");
}

int main(int count, char** arguments) {
  const emu::Schedule schedule = schedule_named(count > 1 ? arguments[1] : "warp-greedy");
  if (count > 2) {
    double error = INFINITY;
    const std::string text =
        message_of([&] { error = product_error(schedule, 150, Bug(std::atoi(arguments[2]))); });
    std::printf("error %.2e %s\n", error, text.c_str());
    return error > 1e-3 ? 0 : 1;
  }
  check_ready_set();
  check_order(schedule);
  check_collectives(schedule);
  check_named_barriers(schedule);
  check_poison(schedule);
  check_errors(schedule);
  check_counts(schedule);
  for (int rows : {1, 63, 64, 65, 150}) {
    expect(product_error(schedule, rows, kNone) < 1e-4, "product");
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
