// The CPU that is timed on, and the best scheduling this process may have there, held only while something is timed.
#pragma once
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "refusal.h"

namespace edgeprune {

inline double now_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

inline std::vector<int> usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set)) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// Pins this thread to `wanted`, or to the last CPU it may use if that is negative; returns the CPU.
inline int pin(int wanted) {
  const std::vector<int> cpus = usable_cpus();
  if (cpus.empty()) throw Refusal("request", "no CPU to pin to");
  const int chosen = wanted < 0 ? cpus.back() : wanted;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (chosen >= CPU_SETSIZE) throw Refusal("request", "there is no CPU " + std::to_string(chosen));
  CPU_SET(chosen, &set);
  if (sched_setaffinity(0, sizeof set, &set)) {
    throw Refusal("request", "CPU " + std::to_string(chosen) + " cannot be used: " + strerror(errno));
  }
  return chosen;
}

class Priority {
 public:
  // `wanted` is "auto" (real-time FIFO, else nice -20) or "normal". With one CPU alone, real-time spinning on it would
  // stop everything else, so it is not taken there.
  Priority(const std::string& wanted, bool alone) {
    if (wanted == "normal") return;
    fifo_ = !alone && fifo();
    lower();
    nice_ = setpriority(PRIO_PROCESS, 0, -20) == 0;
    lower();
  }
  ~Priority() { lower(); }
  Priority(const Priority&) = delete;
  Priority& operator=(const Priority&) = delete;

  // Takes it and returns its name. `longest_s` is the longest time between two calls of `breathe`: FIFO is not held
  // longer than a second at a stretch, because the kernel throttles it then.
  const char* take(double longest_s) {
    since_ = now_s();
    held_ = fifo_ && longest_s <= kStretchS;
    if (held_) return fifo() ? "fifo" : "normal";
    return nice_ && !setpriority(PRIO_PROCESS, 0, -20) ? "nice -20" : "normal";
  }

  // Lets others run if they have been kept out for long.
  void breathe() {
    if (!held_ || now_s() - since_ <= kStretchS) return;
    lower();
    const timespec breath{0, 10'000'000};
    nanosleep(&breath, nullptr);
    held_ = fifo();
    since_ = now_s();
  }

  void lower() {
    held_ = false;
    const sched_param none{};
    sched_setscheduler(0, SCHED_OTHER, &none);
    setpriority(PRIO_PROCESS, 0, 0);
  }

 private:
  static constexpr double kStretchS = 1.0;

  static bool fifo() {
    sched_param real_time{};
    real_time.sched_priority = 20;  // above every ordinary process, below the kernel's own threads
    return sched_setscheduler(0, SCHED_FIFO, &real_time) == 0;
  }

  bool fifo_ = false, nice_ = false, held_ = false;
  double since_ = 0;
};

}  // namespace edgeprune
