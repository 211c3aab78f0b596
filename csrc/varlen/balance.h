// Ring 2. Assigns items of given costs to a fixed number of bins; plain host C++, no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace varstream::varlen {

struct BalanceProblem {
  const double* costs;  // (n,) finite, at least 0
  int64_t n;
  int64_t bins;  // 1 to 2^31 - 1
};

// Both return (n,) the bin of each item, throw std::invalid_argument naming argument, contract and
// value, and are deterministic. With at least as many items as bins no bin stays empty.

// Longest processing time first: from the costliest item on (equal ones in the given order), each
// into the bin of least load; of such bins into the one of fewest items, then the lowest. The
// largest load is at most 4/3 - 1/(3 bins) times the optimum (Graham 1969). O(n log n).
std::vector<int64_t> balance_lpt(const BalanceProblem& problem);

// Largest differencing (Karmarkar and Karp 1982) for any number of bins: the two partial
// assignments of largest spread are joined, the fullest bins of one with the emptiest of the other.
// The spread of the loads never exceeds the largest cost. O(n log n + n bins).
std::vector<int64_t> balance_karmarkar_karp(const BalanceProblem& problem);

}  // namespace varstream::varlen
