// Ring 3. The tile table of the attention forward kernel for mma.sync, sm_80 and up.
//
// Each row: the head dims it serves, tile sizes and the reason. Shared memory holds one tile of Q,
// K and V; 99 KB is what sm_86 and sm_89 have, so that one table serves every GPU.
#pragma once

#include <cstddef>

namespace varstream::attention {

// Q and K rows of Dim, V rows of ValueDim; smaller head dims are padded with zeros inside.
template <int Dim, int ValueDim, bool Modified>
struct ForwardTile;

// Score modifiers hold positions, slopes and random words beside the accumulators: fewer keys.
//
// 32, 64: a warp's 32 rows take 128 keys at a time: 128 score registers, each K and V fragment
// used twice. 24 and 48 KB: 2 blocks per SM by registers, everywhere.
template <bool Modified>
struct ForwardTile<32, 32, Modified> {
  static constexpr int kRows = 128, kKeys = Modified ? 64 : 128, kWarps = 4, kMinBlocks = 2;
};
template <bool Modified>
struct ForwardTile<64, 64, Modified> {
  static constexpr int kRows = 128, kKeys = Modified ? 64 : 128, kWarps = 4, kMinBlocks = 2;
};
// 96, 128: 96 and 128 output registers leave room for 64 keys. 48 and 64 KB: 2 blocks per SM, but 1
// of the plain kernel at 128 where an SM has 100 KB (sm_86, sm_89).
template <bool Modified>
struct ForwardTile<96, 96, Modified> {
  static constexpr int kRows = 128, kKeys = Modified ? 32 : 64, kWarps = 4, kMinBlocks = 2;
};
template <bool Modified>
struct ForwardTile<128, 128, Modified> {
  static constexpr int kRows = 128, kKeys = Modified ? 32 : 64, kWarps = 4, kMinBlocks = 2;
};
// 192 with values of 128 (latent attention) or 192: 8 warps of 16 rows, as 32 rows a warp would
// need 192 output registers. 88 and 96 KB, 1 block per SM.
template <bool Modified>
struct ForwardTile<192, 128, Modified> {
  static constexpr int kRows = 128, kKeys = 64, kWarps = 8, kMinBlocks = 1;
};
template <bool Modified>
struct ForwardTile<192, 192, Modified> {
  static constexpr int kRows = 128, kKeys = 64, kWarps = 8, kMinBlocks = 1;
};
// 256: 64 rows keep Q, K and V at 96 KB: 1 block per SM, 2 on sm_90. Asking for 1 costs none, as no
// thread has more than 255 registers.
template <bool Modified>
struct ForwardTile<256, 256, Modified> {
  static constexpr int kRows = 64, kKeys = 64, kWarps = 4, kMinBlocks = 1;
};

template <typename Element_, int Dim, int ValueDim, bool Modified>
struct ForwardTraits : ForwardTile<Dim, ValueDim, Modified> {
  using Element = Element_;
  using Sizes = ForwardTile<Dim, ValueDim, Modified>;
  static constexpr int kDim = Dim, kValueDim = ValueDim;
  static constexpr bool kModified = Modified;
  static constexpr int kThreads = 32 * Sizes::kWarps;
  static constexpr int kWarpRows = Sizes::kRows / Sizes::kWarps;
  static constexpr int kWarpTiles = kWarpRows / 16;  // accumulators of 16 rows in a warp
  static_assert(kWarpRows % 16 == 0 && kValueDim <= kDim);

  static constexpr size_t kQBytes = size_t{2} * Sizes::kRows * kDim;  // also stages the output
  static constexpr size_t kKBytes = size_t{2} * Sizes::kKeys * kDim;
  static constexpr size_t kVBytes = size_t{2} * Sizes::kKeys * kValueDim;
  static constexpr size_t kTileBytes = kQBytes + kKBytes + kVBytes;
  static constexpr size_t kWorkBytes = 128;  // a QueryWork
  static constexpr size_t kSharedBytes = kTileBytes + kWorkBytes;
  static_assert(kSharedBytes <= (99 << 10), "sm_86 and sm_89 have 99 KB");
};

}  // namespace varstream::attention
