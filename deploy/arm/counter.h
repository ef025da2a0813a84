// How many instructions this process has executed, told by an emulator that runs it with our counter; see
// deploy/emulated/count.c. A real machine answers nothing.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <string>

#include "refusal.h"

namespace edgeprune {

// No kernel has this system call; the counter sees it, writes eight bytes to the descriptor it names, and the call
// fails as an unknown one does.
inline constexpr long kMark = 0x5EED;

class Counter {
 public:
  Counter() {
    if (pipe2(ends_, O_CLOEXEC | O_NONBLOCK)) throw Refusal("memory", "no pipe: " + std::string(strerror(errno)));
  }
  ~Counter() {
    close(ends_[0]);
    close(ends_[1]);
  }
  Counter(const Counter&) = delete;
  Counter& operator=(const Counter&) = delete;

  // Asks for the count of this moment; `take` returns it. Marks are answered in order.
  void mark() const { syscall(kMark, ends_[1]); }

  // Returns whether there was an answer.
  bool take(uint64_t& count) const { return read(ends_[0], &count, sizeof count) == sizeof count; }

  // The instructions that `work` takes, those of the second mark included.
  template <typename Work>
  uint64_t count(const Work& work) const {
    uint64_t before = 0, after = 0;
    mark();
    work();
    mark();
    if (!take(before) || !take(after)) throw Refusal("lost", "the emulator's counter does not answer");
    return after - before;
  }

 private:
  int ends_[2] = {-1, -1};
};

// Whether an emulator counts for this process.
inline bool counted() {
  const Counter counter;
  uint64_t count = 0;
  counter.mark();
  return counter.take(count);
}

// Whether this process is emulated, as far as it can tell: an ARM process that sees the processor of another kind of
// machine or the one that deploy/emulated/setup describes, or one that is counted. The clock of an emulator says nothing
// about any device.
inline bool emulated() {
  if (counted()) return true;
#if defined(__aarch64__)
  std::ifstream processor("/proc/cpuinfo");
  for (std::string line; std::getline(processor, line);) {
    if (line.rfind("vendor_id", 0) == 0 || line.find("emulated by qemu-user") != std::string::npos) return true;
  }
#endif
  return false;
}

}  // namespace edgeprune
