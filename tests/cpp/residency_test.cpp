// Reads lines `words once shared_bytes fixed_bytes rows cluster`, prints `cluster slots kept`.
#include "cross_entropy/residency.h"

#include <cstdio>

int main() {
  using namespace varstream::cross_entropy;
  std::printf("%d %d %d %d\n", kWordBytes, kRowThreads, kStepWords, kRingSlots);
  long long words, shared, fixed, rows;
  int once;
  unsigned cluster;
  while (std::scanf("%lld %d %lld %lld %lld %u", &words, &once, &shared, &fixed, &rows, &cluster) ==
         6) {
    const Residency found = residency_of(words, once != 0, {shared, fixed, rows, cluster});
    std::printf("%u %d %d\n", found.cluster, found.slots, int(found.kept));
  }
}
