#include "varlen/bin_packing.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>

#include "varlen/bit_tree.h"

namespace varstream::varlen {
namespace {

constexpr int32_t kNone = -1;

void check(const BinPackingProblem& p) {
  const auto fail = [](const std::string& text) { throw std::invalid_argument(text); };
  if (p.capacity < 1 || p.capacity > INT32_MAX) {
    fail("capacity must be 1 to 2**31 - 1 (cu_seqlens is int32), got " +
         std::to_string(p.capacity));
  }
  if (p.max_depth < 1) fail("max_depth must be at least 1, got " + std::to_string(p.max_depth));
  if (p.n > INT32_MAX) fail("lengths must have fewer than 2**31 entries");
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t length = p.lengths[i];
    if (length >= 0 && length <= p.capacity) continue;
    const std::string got = ", got " + std::to_string(length) + " at index " + std::to_string(i);
    if (length < 0) fail("lengths must be >= 0" + got);
    fail("lengths must be at most the capacity " + std::to_string(p.capacity) + got);
  }
}

// A table with one entry per token count pays while it is small against the work or the caches.
bool table_pays(int64_t entries, int64_t n) {
  return entries <= std::max<int64_t>(8 * n, 1 << 20);
}

// Documents in the order in which they are packed. Lengths stand beside them because looking each
// one up would be a cache miss per document.
struct Documents {
  std::vector<int32_t> index;   // (n,)
  std::vector<int32_t> length;  // (n,) at most the capacity, so 32 bits hold it
};

// From long to short; equal lengths keep their order.
Documents decreasing(const BinPackingProblem& p) {
  Documents documents{std::vector<int32_t>(p.n), std::vector<int32_t>(p.n)};
  const int64_t longest = p.n == 0 ? 0 : *std::max_element(p.lengths, p.lengths + p.n);
  if (!table_pays(longest + 1, p.n)) {
    std::iota(documents.index.begin(), documents.index.end(), 0);
    std::stable_sort(documents.index.begin(), documents.index.end(), [&](int32_t a, int32_t b) {
      return p.lengths[a] > p.lengths[b];
    });
    for (int64_t i = 0; i < p.n; ++i) documents.length[i] = p.lengths[documents.index[i]];
    return documents;
  }
  std::vector<int32_t> start(longest + 2, 0);  // start[r]: documents with rank < r
  for (int64_t i = 0; i < p.n; ++i) ++start[longest - p.lengths[i] + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t rank = 0; rank <= longest; ++rank) {
    std::fill(documents.length.begin() + start[rank],
              documents.length.begin() + start[rank + 1],
              static_cast<int32_t>(longest - rank));
  }
  for (int64_t i = 0; i < p.n; ++i) documents.index[start[longest - p.lengths[i]]++] = i;
  return documents;
}

// Open bins by the room they have left; bins of equal room form a stack.
// Table: one stack head per room and a bit tree over the rooms that have one.
class RoomTable {
 public:
  explicit RoomTable(int64_t capacity) : head_(capacity + 1, kNone), rooms_(capacity + 1) {}

  void push(int64_t room, int32_t bin) {
    if (static_cast<size_t>(bin) >= below_.size()) below_.resize(bin + 1);
    if (head_[room] == kNone) rooms_.insert(room);
    below_[bin] = head_[room];
    head_[room] = bin;
  }

  // Takes out the bin of least room >= length; kNone when there is none. room receives its room.
  int32_t pop(int64_t length, int64_t& room) {
    room = rooms_.next(length);
    if (room < 0) return kNone;
    const int32_t bin = head_[room];
    head_[room] = below_[bin];
    if (head_[room] == kNone) rooms_.erase(room);
    return bin;
  }

 private:
  std::vector<int32_t> head_;   // (capacity + 1,) top of each room's stack
  std::vector<int32_t> below_;  // (bins,) next bin of the same stack
  BitTree rooms_;
};

// The same for capacities far beyond the number of documents.
class RoomMap {
 public:
  explicit RoomMap(int64_t) {}

  void push(int64_t room, int32_t bin) { stacks_[room].push_back(bin); }

  int32_t pop(int64_t length, int64_t& room) {
    const auto found = stacks_.lower_bound(length);
    if (found == stacks_.end()) return kNone;
    room = found->first;
    const int32_t bin = found->second.back();
    found->second.pop_back();
    if (found->second.empty()) stacks_.erase(found);
    return bin;
  }

 private:
  std::map<int64_t, std::vector<int32_t>> stacks_;
};

// Collects which bin each document of a sequence went to and lays bins out flat.
class Assignment {
 public:
  explicit Assignment(int64_t n) { bin_of_.reserve(n); }

  int32_t open_bin() {
    depth_.push_back(0);
    return static_cast<int32_t>(depth_.size() - 1);
  }

  // Puts the next document into bin; returns how many the bin then holds.
  int32_t add(int32_t bin) {
    bin_of_.push_back(bin);
    return ++depth_[bin];
  }

  int64_t bins() const { return static_cast<int64_t>(depth_.size()); }

  // index (n,): the documents in the order in which they were added.
  BinPacking layout(const std::vector<int32_t>& index) const {
    BinPacking packing;
    packing.order.resize(index.size());
    packing.offsets.assign(depth_.size() + 1, 0);
    std::partial_sum(depth_.begin(), depth_.end(), packing.offsets.begin() + 1);
    std::vector<int32_t> next(packing.offsets.begin(), packing.offsets.end() - 1);
    for (size_t i = 0; i < index.size(); ++i) packing.order[next[bin_of_[i]]++] = index[i];
    return packing;
  }

 private:
  std::vector<int32_t> bin_of_;  // (documents added,)
  std::vector<int32_t> depth_;   // (bins,) documents in each
};

template <typename Rooms>
BinPacking best_fit(const BinPackingProblem& p, const Documents& documents) {
  Rooms rooms(p.capacity);
  Assignment assignment(p.n);
  for (const int64_t length : documents.length) {
    int64_t room = 0;
    int32_t bin = rooms.pop(length, room);
    if (bin == kNone) {
      bin = assignment.open_bin();
      room = p.capacity;
    }
    if (assignment.add(bin) < p.max_depth) rooms.push(room - length, bin);
  }
  return assignment.layout(documents.index);
}

}  // namespace

BinPacking best_fit_decreasing(const BinPackingProblem& p) {
  check(p);
  const Documents documents = decreasing(p);
  if (table_pays(p.capacity + 1, p.n)) return best_fit<RoomTable>(p, documents);
  return best_fit<RoomMap>(p, documents);
}

BinPacking first_fit_decreasing(const BinPackingProblem& p) {
  check(p);
  const Documents documents = decreasing(p);
  // Tree of maxima over the room of every bin there could be, unopened ones at full capacity: the
  // leftmost leaf with enough room is the first fit, whether opened already or not.
  int64_t leaves = 1;
  while (leaves < p.n) leaves *= 2;
  const auto capacity = static_cast<int32_t>(p.capacity);
  std::vector<int32_t> most(2 * leaves, capacity);  // node 1 is the root, leaves come last
  Assignment assignment(p.n);
  for (const int32_t length : documents.length) {
    int64_t node = 1;
    while (node < leaves) node = 2 * node + (most[2 * node] < length ? 1 : 0);
    const auto bin = static_cast<int32_t>(node - leaves);
    if (bin == assignment.bins()) assignment.open_bin();
    const bool closed = assignment.add(bin) == p.max_depth;
    most[node] = closed ? -1 : most[node] - length;
    while (node /= 2) most[node] = std::max(most[2 * node], most[2 * node + 1]);
  }
  return assignment.layout(documents.index);
}

BinPacking next_fit(const BinPackingProblem& p) {
  check(p);
  std::vector<int32_t> index(p.n);
  std::iota(index.begin(), index.end(), 0);
  Assignment assignment(p.n);
  int32_t bin = kNone;
  int64_t room = 0, depth = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    if (bin == kNone || room < p.lengths[i] || depth == p.max_depth) {
      bin = assignment.open_bin();
      room = p.capacity;
    }
    depth = assignment.add(bin);
    room -= p.lengths[i];
  }
  return assignment.layout(index);
}

}  // namespace varstream::varlen
