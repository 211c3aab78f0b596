#include "varlen/balance.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace varstream::varlen {
namespace {

constexpr int64_t kNone = -1;

void check(const BalanceProblem& p) {
  if (p.bins < 1 || p.bins > INT32_MAX) {
    throw std::invalid_argument("bins must be 1 to 2**31 - 1, got " + std::to_string(p.bins));
  }
  for (int64_t i = 0; i < p.n; ++i) {
    if (std::isfinite(p.costs[i]) && p.costs[i] >= 0) continue;
    throw std::invalid_argument("costs must be finite and >= 0, got " + std::to_string(p.costs[i]) +
                                " at index " + std::to_string(i));
  }
}

// Some items that share a bin; items form a linked list through Differencing::next_.
struct Subset {
  double load;
  int64_t first, last;
};

bool heavier(const Subset& a, const Subset& b) {
  return a.load > b.load;
}

// An assignment of some of the items. subsets: heaviest first, at most `bins` of them; bins beyond
// them are empty, so all partial assignments together never hold more than n subsets.
using Partial = std::vector<Subset>;

class Differencing {
 public:
  explicit Differencing(const BalanceProblem& p) : p_(p), next_(p.n, kNone), partials_(p.n) {
    for (int64_t i = 0; i < p.n; ++i) {
      partials_[i] = {Subset{p.costs[i], i, i}};
      push(i);
    }
  }

  std::vector<int64_t> run() {
    while (heap_.size() > 1) {
      const int64_t a = pop(), b = pop();
      // Pairing is symmetric: growing the larger one moves less.
      const bool swap = partials_[a].size() < partials_[b].size();
      const int64_t into = swap ? b : a, from = swap ? a : b;
      join(partials_[into], partials_[from]);
      partials_[from] = Partial();
      push(into);
    }
    std::vector<int64_t> bin_of(p_.n);
    if (p_.n == 0) return bin_of;
    const Partial& whole = partials_[pop()];
    for (size_t bin = 0; bin < whole.size(); ++bin) {
      for (int64_t i = whole[bin].first; i != kNone; i = next_[i]) bin_of[i] = bin;
    }
    return bin_of;
  }

 private:
  // Largest spread first, then the lowest number.
  using Key = std::pair<double, int64_t>;  // (-spread, index into partials_)

  void push(int64_t index) {
    const Partial& partial = partials_[index];
    const bool full = static_cast<int64_t>(partial.size()) == p_.bins;
    heap_.emplace((full ? partial.back().load : 0.0) - partial.front().load, index);
  }

  int64_t pop() {
    const int64_t index = heap_.top().second;
    heap_.pop();
    return index;
  }

  // Heaviest bin of a with lightest of b and so on. Counted over all `bins`, subset j of b meets
  // place bins - 1 - j of a: places before bins - |b| stay, those behind are joined or filled.
  void join(Partial& a, Partial& b) {
    const auto size_a = static_cast<int64_t>(a.size()), size_b = static_cast<int64_t>(b.size());
    for (int64_t j = 0; j < size_b; ++j) {
      const int64_t place = p_.bins - 1 - j;
      if (place >= size_a) continue;
      next_[b[j].last] = a[place].first;
      b[j].last = a[place].last;
      b[j].load += a[place].load;
    }
    std::stable_sort(b.begin(), b.end(), heavier);
    a.resize(std::min(size_a, p_.bins - size_b));
    const auto kept = static_cast<int64_t>(a.size());
    a.insert(a.end(), b.begin(), b.end());
    std::inplace_merge(a.begin(), a.begin() + kept, a.end(), heavier);
  }

  const BalanceProblem& p_;
  std::vector<int64_t> next_;      // (n,) next item of the same subset
  std::vector<Partial> partials_;  // (n,) emptied once joined into another
  std::priority_queue<Key, std::vector<Key>, std::greater<Key>> heap_;
};

}  // namespace

std::vector<int64_t> balance_lpt(const BalanceProblem& p) {
  check(p);
  std::vector<int64_t> order(p.n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.costs[a] > p.costs[b]; });
  using Bin = std::tuple<double, int64_t, int64_t>;  // load, items, number
  std::priority_queue<Bin, std::vector<Bin>, std::greater<Bin>> bins;
  // Bins beyond the number of items stay empty.
  for (int64_t b = 0; b < std::min(p.bins, p.n); ++b) bins.emplace(0.0, 0, b);
  std::vector<int64_t> bin_of(p.n);
  for (const int64_t i : order) {
    const auto [load, items, bin] = bins.top();
    bins.pop();
    bin_of[i] = bin;
    bins.emplace(load + p.costs[i], items + 1, bin);
  }
  return bin_of;
}

std::vector<int64_t> balance_karmarkar_karp(const BalanceProblem& p) {
  check(p);
  if (p.n <= p.bins) return balance_lpt(p);  // one item a bin, without moving ever longer lists
  return Differencing(p).run();
}

}  // namespace varstream::varlen
