// Ring 2. Packs documents of given lengths into bins of one capacity; plain host C++, no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace varstream::varlen {

// Bin b holds the documents order[offsets[b]] .. order[offsets[b + 1] - 1]. No bin is empty.
struct BinPacking {
  std::vector<int64_t> order;    // (n,) document indices, bin after bin
  std::vector<int64_t> offsets;  // (bins + 1,)
};

struct BinPackingProblem {
  const int64_t* lengths;  // (n,) tokens, 0 to capacity
  int64_t n;
  int64_t capacity;   // tokens of one bin, 1 to 2^31 - 1 (cu_seqlens is int32)
  int64_t max_depth;  // documents of one bin, at least 1
};

// All three throw std::invalid_argument naming argument, contract and value, and are deterministic.

// Documents from long to short (equal ones in the given order), each into the bin with the least
// room that still holds it; of several such bins, the one that was used last. Exact best fit.
BinPacking best_fit_decreasing(const BinPackingProblem& problem);

// Documents from long to short, each into the lowest-numbered bin that holds it.
BinPacking first_fit_decreasing(const BinPackingProblem& problem);

// Documents in the given order; a bin is closed for good when the next document does not fit.
BinPacking next_fit(const BinPackingProblem& problem);

}  // namespace varstream::varlen
