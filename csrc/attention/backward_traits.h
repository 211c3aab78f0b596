// Ring 3. The tile table of the attention backward kernels for mma.sync, sm_80 and up.
#pragma once

#include <cstddef>

namespace varstream::attention {

// Small: for GPUs with 99 KB of shared memory a block (sm_86, sm_89, sm_120); otherwise 163 KB. The
// modified kernel's larger tiles at 32 and 64 fit everywhere: their small ones are not launched.
// Larger tiles run 1 block per SM, by registers.
//
// Warps share each product by rows x columns: scores (rows of Q x keys), key gradients (keys x
// dims), query gradients (rows x dims). Squares of 32 x 32 read the fewest fragments a product.
template <int Dim, bool Modified, bool Small>
struct BackwardTile;

// 32, 64: 128 x 128 scores, 64 registers each for scores and their gradient; the modified kernel
// holds the softcap's slope as well: half the rows. Two stages of Q and dO: 112 and 160 KB,
// modified 64 and 96 KB.
template <bool Modified>
struct BackwardTile<32, Modified, false> {
  static constexpr int kRows = Modified ? 64 : 128, kKeys = 128, kWarps = 8, kStages = 2;
  static constexpr int kScoreRowWarps = Modified ? 2 : 4, kKeyWarps = 4, kQueryWarps = 4;
};
template <bool Modified>
struct BackwardTile<64, Modified, false> {
  static constexpr int kRows = Modified ? 64 : 128, kKeys = 128, kWarps = 8, kStages = 2;
  static constexpr int kScoreRowWarps = Modified ? 2 : 4, kKeyWarps = 4;
  static constexpr int kQueryWarps = Modified ? 2 : 4;
};
// 96, 128: 64 rows, as the gradients of keys and values take 96 and 128 registers. The modified
// kernel at 128 halves these with 64 keys. 128 and 160 KB, modified 112 KB at 128.
template <bool Modified>
struct BackwardTile<96, Modified, false> {
  static constexpr int kRows = 64, kKeys = 128, kWarps = 8, kStages = 2;
  static constexpr int kScoreRowWarps = 2, kKeyWarps = 4, kQueryWarps = 4;
};
template <bool Modified>
struct BackwardTile<128, Modified, false> {
  static constexpr int kRows = 64, kKeys = Modified ? 64 : 128, kWarps = 8, kStages = 2;
  static constexpr int kScoreRowWarps = Modified ? 4 : 2, kKeyWarps = Modified ? 2 : 4;
  static constexpr int kQueryWarps = 2;
};
// 192, 256: 64 keys; at 256 one stage is all that fits. 160 and 144 KB.
template <bool Modified>
struct BackwardTile<192, Modified, false> {
  static constexpr int kRows = 64, kKeys = 64, kWarps = 8, kStages = 2;
  static constexpr int kScoreRowWarps = 4, kKeyWarps = 2, kQueryWarps = 2;
};
template <bool Modified>
struct BackwardTile<256, Modified, false> {
  static constexpr int kRows = 64, kKeys = 64, kWarps = 8, kStages = 1;
  static constexpr int kScoreRowWarps = 4, kKeyWarps = 2, kQueryWarps = 2;
};

// 99 KB: one stage of Q and dO, squares of 64 up to 128, 32 rows at 192, 32 x 32 and 4 warps at
// 256. 32, 48, 64, 80, 80 and 68 KB: 2 blocks per SM at 32 and 64, 1 above.
template <int Dim, bool Modified>
struct BackwardTile<Dim, Modified, true> {
  static_assert(Dim <= 128);
  static constexpr int kRows = 64, kKeys = 64, kWarps = 8, kStages = 1;
  static constexpr int kScoreRowWarps = 4, kKeyWarps = 4, kQueryWarps = 4;
};
template <bool Modified>
struct BackwardTile<192, Modified, true> {
  static constexpr int kRows = 32, kKeys = 64, kWarps = 8, kStages = 1;
  static constexpr int kScoreRowWarps = 2, kKeyWarps = 4, kQueryWarps = 2;
};
template <bool Modified>
struct BackwardTile<256, Modified, true> {
  static constexpr int kRows = 32, kKeys = 32, kWarps = 4, kStages = 1;
  static constexpr int kScoreRowWarps = 2, kKeyWarps = 2, kQueryWarps = 2;
};

// The kernel that owns query tiles, for a repeatable dQ: 64 rows, 16 a warp, whose Q and dO stay.
// 32 keys at 256, to stay within 99 KB, and for the modified kernel's registers at 192; 64 below.
// 2 blocks per SM or more; where SMs have 100 KB (sm_86, sm_89) 1 from 128 on, on sm_80 at 256 and
// at 192/192 (plain).
template <typename Element_, int Dim, int ValueDim, bool Modified>
struct BackwardQueryTraits {
  using Element = Element_;
  static constexpr int kDim = Dim, kValueDim = ValueDim;
  static constexpr bool kModified = Modified;
  static constexpr int kRows = 64, kKeys = Dim > (Modified ? 128 : 192) ? 32 : 64, kWarps = 4;
  static constexpr int kThreads = 32 * kWarps, kMinBlocks = 2;

  static constexpr size_t kQBytes = size_t{2} * kRows * kDim;  // also stages dQ
  static constexpr size_t kDoutBytes = size_t{2} * kRows * kValueDim;
  static constexpr size_t kKBytes = size_t{2} * kKeys * kDim;
  static constexpr size_t kVBytes = size_t{2} * kKeys * kValueDim;
  static constexpr size_t kDoutOffset = kQBytes;
  static constexpr size_t kKOffset = kDoutOffset + kDoutBytes;
  static constexpr size_t kVOffset = kKOffset + kKBytes;
  static constexpr size_t kWorkOffset = kVOffset + kVBytes;
  static constexpr size_t kWorkBytes = 128;
  static constexpr size_t kSharedBytes = kWorkOffset + kWorkBytes;
  static_assert(kSharedBytes <= (99 << 10));
};

// Padded head dims: Q and K rows of Dim, V and dO rows of ValueDim.
template <typename Element_, int Dim, int ValueDim, bool Modified, bool Small>
struct BackwardTraits : BackwardTile<Dim, Modified, Small> {
  using Element = Element_;
  using Tile = BackwardTile<Dim, Modified, Small>;
  static constexpr int kDim = Dim, kValueDim = ValueDim;
  static constexpr bool kModified = Modified, kSmall = Small;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kMinBlocks = 1;

  // A warp's share of each product: 16-row tiles and 8-column tiles of its accumulators.
  static constexpr int kScoreTiles = Tile::kRows / Tile::kScoreRowWarps / 16;
  static constexpr int kScoreColumns = Tile::kKeys / (Tile::kWarps / Tile::kScoreRowWarps) / 8;
  static constexpr int kKeyTiles = Tile::kKeys / Tile::kKeyWarps / 16;
  static constexpr int kKeyColumns = Dim / (Tile::kWarps / Tile::kKeyWarps) / 8;
  static constexpr int kValueColumns = ValueDim / (Tile::kWarps / Tile::kKeyWarps) / 8;
  static constexpr int kQueryTiles = Tile::kRows / Tile::kQueryWarps / 16;
  static constexpr int kQueryColumns = Dim / (Tile::kWarps / Tile::kQueryWarps) / 8;
  static_assert(kScoreTiles > 0 && kKeyTiles > 0 && kQueryTiles > 0);
  static_assert(kScoreColumns % 2 == 0 && kKeyColumns % 2 == 0 && kValueColumns % 2 == 0 &&
                kQueryColumns % 2 == 0);

  static constexpr size_t kKBytes = size_t{2} * Tile::kKeys * kDim;
  static constexpr size_t kVBytes = size_t{2} * Tile::kKeys * kValueDim;
  static constexpr size_t kQBytes = size_t{2} * Tile::kRows * kDim;
  static constexpr size_t kDoutBytes = size_t{2} * Tile::kRows * kValueDim;
  static constexpr size_t kScoreBytes = size_t{2} * Tile::kRows * Tile::kKeys;
  static constexpr size_t kVOffset = kKBytes;
  static constexpr size_t kQOffset = kVOffset + kVBytes;
  static constexpr size_t kDoutOffset = kQOffset + Tile::kStages * kQBytes;
  static constexpr size_t kWeightOffset = kDoutOffset + Tile::kStages * kDoutBytes;
  static constexpr size_t kDscoreOffset = kWeightOffset + kScoreBytes;
  static constexpr size_t kStatisticsBytes = size_t{8} * Tile::kRows;
  static constexpr size_t kStatisticsOffset = kDscoreOffset + kScoreBytes;
  static constexpr size_t kWorkOffset = kStatisticsOffset + Tile::kStages * kStatisticsBytes;
  static constexpr size_t kWorkBytes = 128;  // what the block has to do
  static constexpr size_t kSharedBytes = kWorkOffset + kWorkBytes;
  static_assert(kThreads >= Tile::kRows, "a thread copies a row's statistics");
  static_assert(kSharedBytes <= size_t{Small ? 99 : 163} << 10);
  static constexpr bool kFitsSmallDevices = kSharedBytes <= (99 << 10);
};

}  // namespace varstream::attention
