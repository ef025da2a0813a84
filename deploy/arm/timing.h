// Timing one engine against another in alternating blocks, as the host does with its own runtimes; raw samples only.
#pragma once
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "counter.h"
#include "engine.h"
#include "onnxruntime.h"
#include "priority.h"

namespace edgeprune {

// One call: elapsed ns, CPU ns of this thread, involuntary context switches.
struct Row {
  int64_t wall_ns, cpu_ns, preempted;
};

struct Sampling {
  double session_ms, block_ms;
  int dropped_calls;
  std::string seed;
};

struct WarmUp {
  double call_s;
  size_t calls;
  bool settled;
};

constexpr size_t kWarmCalls = 3;
constexpr double kWarmS = 0.015, kWarmLimitS = 0.1, kWarmWindowS = 0.005, kWarmAgree = 0.03;
constexpr size_t kWarmWindowCalls = 8;
constexpr int kFewestRounds = 2;
constexpr double kFewestKept = 4, kMostKept = 14;
constexpr double kLongCallS = 0.01;  // from this length on, one dropped call refills the caches
constexpr size_t kMostRows = 100'000;
constexpr double kProfileS = 0.3;
constexpr size_t kFewestProfiled = 5, kMostProfiled = 50;

inline int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

inline int64_t preemptions() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nivcsw;
}

inline Row timed(const Runnable& engine) {
  const int64_t before = preemptions();
  const int64_t cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID), wall = nanoseconds(CLOCK_MONOTONIC);
  engine.run();
  const int64_t wall_ns = nanoseconds(CLOCK_MONOTONIC) - wall;
  return {wall_ns, nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu, preemptions() - before};
}

// Calls until the fastest calls of successive windows agree, or for as long as is reasonable.
inline WarmUp warm_up(const Runnable& engine, Priority& priority) {
  std::vector<double> took;
  const double start = now_s();
  for (;;) {
    priority.breathe();
    const double before = now_s();
    engine.run();
    const double now = now_s();
    took.push_back(std::max(now - before, 1e-9));
    const auto window = static_cast<size_t>(
        std::clamp(std::round(kWarmWindowS / took.back()), 1.0, static_cast<double>(kWarmWindowCalls)));
    double recent = took.back();
    bool agreed = false;
    if (took.size() >= 2 * window) {
      recent = *std::min_element(took.end() - static_cast<long>(window), took.end());
      const double earlier = *std::min_element(took.end() - static_cast<long>(2 * window),
                                               took.end() - static_cast<long>(window));
      agreed = std::abs(recent / earlier - 1) <= kWarmAgree;
    }
    const double fastest = *std::min_element(took.begin(), took.end());
    const bool enough = took.size() >= kWarmCalls && now - start >= kWarmS;
    if (enough && (agreed || now - start >= std::max(kWarmLimitS, 2 * kWarmCalls * fastest))) {
      return {recent, took.size(), agreed};
    }
  }
}

// Fills the inputs with seeded standard-normal noise; with zeros where the type is no float, because an index must stay
// in range. Zeros everywhere would be too kind, denormals too cruel to some processors.
inline void fill_noise(const Runnable& engine) {
  std::mt19937_64 generator(0);
  std::normal_distribution<float> normal;
  for (const Port& port : engine.inputs()) {
    const DLTensor& tensor = engine.tensor(port);
    const size_t count = bytes_of(tensor) / (tensor.dtype.bits / 8);
    if (tensor.dtype.code == kDLFloat && tensor.dtype.bits == 32) {
      auto* values = static_cast<float*>(tensor.data);
      for (size_t place = 0; place < count; ++place) values[place] = normal(generator);
    }
  }
}

inline std::mt19937_64 seeded(const std::string& seed) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const char each : seed) hash = (hash ^ static_cast<uint8_t>(each)) * 1099511628211u;
  return std::mt19937_64(hash);
}

struct Session {
  std::vector<Row> rows[2];  // of candidate and reference
  WarmUp warm[2];
  std::string priority;
};

// Times both engines in blocks whose order is drawn anew in every round; the calls after a switch are dropped.
inline Session timed_session(const Runnable& candidate, const Runnable& reference, const Sampling& sampling,
                             Priority& priority) {
  const Runnable* engines[2] = {&candidate, &reference};
  Session session;
  int dropped[2], kept[2];
  double longest_s = 0;
  for (int which = 0; which < 2; ++which) {
    const double first = now_s();
    engines[which]->run();
    priority.take(now_s() - first);
    session.warm[which] = warm_up(*engines[which], priority);
    priority.lower();
    const double call_s = session.warm[which].call_s;
    kept[which] = static_cast<int>(std::clamp(std::round(sampling.block_ms / 1000 / call_s), kFewestKept, kMostKept));
    dropped[which] = call_s >= kLongCallS ? std::min(sampling.dropped_calls, 1) : sampling.dropped_calls;
    longest_s = std::max(longest_s, (dropped[which] + kept[which]) * call_s);
  }
  std::mt19937_64 order = seeded(sampling.seed);
  session.priority = priority.take(longest_s);
  const double end = now_s() + sampling.session_ms / 1000;
  for (int round = 0; round < kFewestRounds || now_s() < end; ++round) {
    const int first = static_cast<int>(order() & 1);
    for (const int which : {first, 1 - first}) {
      priority.breathe();
      for (int call = 0; call < dropped[which]; ++call) engines[which]->run();
      for (int call = 0; call < kept[which]; ++call) session.rows[which].push_back(timed(*engines[which]));
    }
    if (session.rows[0].size() + session.rows[1].size() > kMostRows) break;
  }
  priority.lower();
  return session;
}

// Counts the instructions of several calls of an engine under an emulator, after one call to warm up, and a few more
// where they still differ: ONNX Runtime plans its memory in the first calls. Then they are the same every time, so there
// is nothing to alternate with.
inline std::vector<int64_t> counted_calls(const Runnable& engine) {
  constexpr size_t kCalls = 4, kMostCalls = 10;
  const Counter counter;
  engine.run();
  std::vector<int64_t> counts;
  for (size_t call = 0; call < kMostCalls; ++call) {
    counts.push_back(static_cast<int64_t>(counter.count([&engine] { engine.run(); })));
    if (counts.size() > kCalls) counts.erase(counts.begin());
    if (counts.size() == kCalls && std::equal(counts.begin() + 1, counts.end(), counts.begin())) break;
  }
  return counts;
}

// What one call of each step costs: the median ns of several calls, or the instructions of one where they are counted.
inline std::vector<int64_t> step_costs(const Engine& engine, bool counting) {
  std::vector<std::vector<int64_t>> seen(engine.program().steps().size());
  engine.run();
  const Counter counter;
  const double end = now_s() + kProfileS;
  for (size_t call = 0; call < (counting ? 1 : kMostProfiled) && (call < kFewestProfiled || now_s() < end); ++call) {
    size_t place = 0;
    for (const Step& step : engine.program().steps()) {
      if (counting) {
        const uint64_t count = counter.count([&engine, &step] { engine.run(step); });
        seen[place++].push_back(static_cast<int64_t>(count));
      } else {
        const int64_t start = nanoseconds(CLOCK_MONOTONIC);
        engine.run(step);
        seen[place++].push_back(nanoseconds(CLOCK_MONOTONIC) - start);
      }
    }
  }
  std::vector<int64_t> typical;
  for (auto& each : seen) {
    std::nth_element(each.begin(), each.begin() + static_cast<long>(each.size() / 2), each.end());
    typical.push_back(each[each.size() / 2]);
  }
  return typical;
}

// What each node of a model costs that ONNX Runtime profiles into the file named; as `step_costs` does.
inline std::vector<Cost> node_costs(const OnnxEngine& engine, bool counting) {
  engine.run();
  const double end = now_s() + kProfileS;
  for (size_t call = 0; call < (counting ? 1 : kMostProfiled) && (call < kFewestProfiled || now_s() < end); ++call) {
    engine.run();
  }
  std::vector<Cost> costs = costs_of_nodes(engine.profile());
  for (Cost& each : costs) each.amount *= counting ? 1 : 1000;  // the profiler writes microseconds
  return costs;
}

}  // namespace edgeprune
