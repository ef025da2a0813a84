// A clock that tells executed instructions: ONNX Runtime's profiler, the only one to know what each node of a model
// costs, reads the C library's clock, and the clock of an emulator says nothing. So for as long as a CountingClock
// lives, a microsecond of this program is an instruction. Included by one file of a program.
#pragma once
#include <dlfcn.h>
#include <time.h>

#include <cstdint>

#include "counter.h"

namespace edgeprune {

class CountingClock {
 public:
  CountingClock() { counter() = &own_; }
  ~CountingClock() { counter() = nullptr; }
  CountingClock(const CountingClock&) = delete;
  CountingClock& operator=(const CountingClock&) = delete;

  static const Counter*& counter() {
    static const Counter* counter = nullptr;
    return counter;
  }

 private:
  const Counter own_;
};

}  // namespace edgeprune

// In place of the C library's; libraries that are loaded find this one first.
extern "C" __attribute__((visibility("default"))) int clock_gettime(clockid_t clock, timespec* now) noexcept {
  static const auto real = reinterpret_cast<int (*)(clockid_t, timespec*)>(dlsym(RTLD_NEXT, "clock_gettime"));
  uint64_t count = 0;
  if (const edgeprune::Counter* counter = edgeprune::CountingClock::counter()) {
    counter->mark();
    if (counter->take(count)) {
      *now = {static_cast<time_t>(count / 1'000'000), static_cast<long>(count % 1'000'000 * 1000)};
      return 0;
    }
  }
  return real(clock, now);
}
