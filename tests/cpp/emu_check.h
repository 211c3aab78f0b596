// What the emulator's test programs share: failed expectations, messages, schedules by name.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>

#include "emu/block.h"

inline int failures = 0;
inline void expect(bool holds, const char* what) {
  if (!holds) std::printf("failed: %s\n", what), ++failures;
}

inline std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// warp-greedy, round-robin, or the seed of a random one.
inline varstream::emu::Schedule schedule_named(const std::string& name) {
  using varstream::emu::Order;
  if (name == "warp-greedy") return {Order::kWarpGreedy, 0};
  if (name == "round-robin") return {Order::kRoundRobin, 0};
  return {Order::kRandom, std::strtoull(name.c_str(), nullptr, 10)};
}
